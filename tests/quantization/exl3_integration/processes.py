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
"""
Processes for tests: in one of its own something may be killed, run out of memory or be one of several.

They are copies of a server that has imported once what tests need, has one thread and has computed nothing.
"""

import multiprocessing
import os
import sys
import traceback

import torch

from transformers import logging


def copies():
    """What makes such processes: a context of `multiprocessing`. With `torch.multiprocessing`, call this first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.testing_utils"])  # which takes seconds; it does not find the tests
    return context


def call_all(calls):
    """Call functions with their arguments, in a process that is to be forked: no threads, no progress bars that share a lock."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for function, *arguments in calls:
        function(*arguments)


def in_a_process(test, *calls):
    """Make `calls` in a process of its own, and have `test` fail where that fails."""
    process = copies().Process(target=call_all, args=(calls,))
    process.start()
    process.join(300)
    process.kill()
    test.assertEqual(process.exitcode, 0)


def forked(work):
    """What a copy of this process, which has one thread, exits with after `work`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 3
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at(moment, folder):
    """End this process at the change number `moment` of a file in `folder`, before it is made."""
    changes = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
    left = moment

    def hook(event, arguments):
        nonlocal left
        if event in changes and str(arguments[0]).startswith(folder):
            if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
                left -= 1
                if left < 0:
                    os._exit(9)

    sys.addaudithook(hook)
