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
"""What a conversion has of its own while it is not finished: a folder in the output folder, which tells what it makes of what."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ... import __version__
from .finished import write_whole
from .scratch import scratch


UNFINISHED = ".unfinished-conversion"
DONE = ".finished-conversion"  # what UNFINISHED is called while it is removed
SAMPLES, SAMPLE = 64, 1 << 16  # of a file of weights, so many pieces of so many bytes tell whether it is the same


class Conversion:
    """
    Args:
        output (`Path`): The folder that the result is for.
        settings (`dict[str, Any]`): All that tells what the result will be, by what errors may call it; of types that JSON has.

    Attributes:
        folder (`Path`): For all that is the conversion's own.
        work (`Path`): In it, for what takes long, with which a conversion goes on.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.folder, self.work = output, output / UNFINISHED, output / UNFINISHED / "work"
        self._settings_file = self.folder / "settings.json"
        self.settings = json.loads(json.dumps(settings))

    @contextlib.contextmanager
    def running(self, resume: bool) -> Iterator[None]:
        """
        Begin the conversion or go on with it, and keep other processes from it. When the context ends without an error, nothing is
        left of the conversion but its result.

        Args:
            resume (`bool`): Whether to go on with what there is.

        Raises:
            `FileExistsError`: Where the output folder has something in it that is not to be resumed.
            `ValueError`: Where what there is was begun with other settings.
            `RuntimeError`: Where another process is at it.
        """
        is_new, done = not self.output.exists(), self.output / DONE
        if not is_new and not self.output.is_dir():
            raise FileExistsError(f"{self.output} is no folder: give a new one for the result.")

        def refuse():
            raise RuntimeError(f"Another process is converting to {self.output}: wait for it, or end it.")

        with scratch(self.folder, refuse):
            try:
                shutil.rmtree(done, ignore_errors=True)
                self._check_output(resume)
                self._check_settings()
                yield
                os.replace(self.folder, done)
            except BaseException:
                if not self._has_work():  # what is mended next may be the settings
                    shutil.rmtree(self.folder)
                    with contextlib.suppress(OSError):  # has something in it
                        if is_new:
                            self.output.rmdir()
                raise
            with contextlib.suppress(FileNotFoundError):  # another process that begins removes it, too
                shutil.rmtree(done)

    def _has_work(self) -> bool:
        """Whether something is there that took long."""
        return any(path.is_file() for path in self.work.rglob("*"))

    def _check_output(self, resume: bool):
        if not self._settings_file.exists() and any(path != self.folder for path in self.output.iterdir()):
            raise FileExistsError(
                f"{self.output} is not empty, and has no unfinished conversion to go on with: convert to another folder, or remove it."
            )
        if self._has_work() and not resume:
            raise FileExistsError(
                f"{self.output} has an unfinished conversion in it: go on with it by --resume, convert to another folder, or remove "
                f"{self.folder} to begin anew."
            )

    def _check_settings(self):
        """Have the settings written down, or be those that are."""
        file = self._settings_file
        if not file.exists() or not self._has_work():
            text = json.dumps(self.settings, indent=2)
            write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        # As texts: the order of overrides counts.
        then, now = ({name: json.dumps(value) for name, value in of.items()} for of in (before, self.settings))
        changed = [
            f"{name} was {then.get(name, 'not set')} and is now {now.get(name, 'not set')}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.output} has an unfinished conversion of other settings in it: {'; '.join(changed)}. Repeat the command with "
                f"those of then, convert to another folder, or remove {self.folder} to begin anew."
            )


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """By name, what tells each of `files` from other files: its size, and a digest of samples of it."""
    found = {}
    for file in files:
        size, digest = file.stat().st_size, hashlib.sha256()
        with open(file, "rb") as stream:
            digest.update(stream.read(SAMPLE * SAMPLES))  # with the names and shapes of tensors
            for index in range(1, SAMPLES + 1):
                stream.seek(max(size - SAMPLE, 0) * index // SAMPLES)
                digest.update(stream.read(SAMPLE))
        found[file.name] = f"{size} bytes {digest.hexdigest()[:16]}"
    return found


def versions() -> dict[str, str]:
    """The versions of what the result depends on."""
    return {"transformers": __version__, "torch": torch.__version__}
