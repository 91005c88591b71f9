# Copyright 2026 The HuggingFace Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A folder for files on their way, beside what they are for, which one process or thread has at a time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = "lock"


@contextlib.contextmanager
def scratch(folder: Path, when_taken: Callable[[], None]) -> Iterator[None]:
    """
    Have `folder` to oneself in this context. It is made if need be, with a file for the lock in it. Who is done with it removes it,
    lock and all, before the context ends: nobody gets a lock that is not there any more.

    Args:
        folder (`Path`): The folder.
        when_taken (`Callable`): Is called once where another process or thread has it, to raise an error. Without one it is waited for.
    """
    lock, timeout = FileLock(folder / LOCK), 0
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # who had it has just removed it
            try:
                lock.acquire(timeout=timeout)
            except Timeout:
                if timeout == 0:
                    when_taken()
                timeout = 1
    try:
        yield
    finally:
        lock.release()


def if_none(folder: Path) -> str:
    """What to do where `folder` is taken by nobody: without locks of the system, as on some network drives, a kill leaves the file."""
    return f"If there is none, remove {folder / LOCK}."
