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
The door to the compiled CPU kernels: those of the hub where they are to be had, or those beside this file, where `setup.py` has
compiled them. Where both are missing, `is_available()` says so once and everything runs on the torch reference.

The environment variable `EXL3_CPU_ISA` forces an instruction set, otherwise the best that the machine has is taken:
`amx` (on Linux), `avx512vnni` (with VBMI), `avx512vlvnni` (without), `avx512`, `avxvnni`, `avx2`, on aarch64 `i8mm` or `dotprod`,
and everywhere `base`. Results are the same bytes on any number of threads, and on all instruction sets but `amx`, which multiplies
16 and more rows of bfloat16 as bfloat16 matrices. `torch.get_num_threads()` are used, those of torch's own OpenMP library where
it has one.

Activations of 16 bits are rounded to whole numbers after their rotation. For one or two rows and the mul1 codebook these have 8
bits at rates up to 4 bits per weight, otherwise 16; `EXL3_CPU_INPUT_BITS` (`8` or `16`) decides for all rates.
"""

import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .....utils import logging
from .. import hub


logger = logging.get_logger(__name__)

LIBRARY = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")
HUB_KERNEL = "kernels-community/exl3-cpu"
HUB_VERSION = 1  # raised with every change of what is called here


@lru_cache
def _found() -> ModuleType | None:
    try:
        return import_module(f"{hub.load(HUB_KERNEL, HUB_VERSION, 'cpu').__name__}.kernels.cpu.calls")
    except FileNotFoundError as error:
        reason = error
    if not LIBRARY.is_file():
        logger.warning(
            "The compiled CPU kernels of EXL3 are missing, so the much slower torch reference is used. They do not come from the "
            f"hub: {reason}. Nor were they built with this transformers, from source with a C++ compiler: no {LIBRARY}."
        )
        return None
    calls = import_module(f"{__name__}.calls")
    calls.load(LIBRARY)
    return calls


def is_available() -> bool:
    """Whether the compiled kernels are there. Warns the first time when they are not.

    Raises:
        ImportError: If those that are there belong to another version.
    """
    return _found() is not None


def kernels() -> ModuleType:
    """The kernels: the module `calls`.

    Raises:
        RuntimeError: If they are missing.
    """
    if not is_available():
        raise RuntimeError(f"the compiled CPU kernels of EXL3 are not there: neither on the hub nor at {LIBRARY}")
    return _found()
