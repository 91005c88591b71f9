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
The door to the Triton kernels, for NVIDIA's, AMD's and Intel's GPUs: those beside this file or, where there are none, the hub's.

Where Triton is missing or does not work, `is_available()` says so once and everything runs on the torch reference. Before
the kernels are used on a device, a small product is computed there and compared with the reference, and before tiles are
searched there, two of them.
"""

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from .....utils import logging
from ... import format
from ... import search as trellis_search
from ...format import hadamard
from .. import hub


logger = logging.get_logger(__name__)

DEVICE_TYPES = ("cuda", "xpu")
HUB_KERNEL = "kernels-community/exl3-triton"
HUB_VERSION = 1  # raised with every change of what is called here
_ARE_HERE = Path(__file__).with_name("calls.py").is_file()


@lru_cache
def kernels() -> ModuleType:
    """The kernels: the module `calls`. Raises `ImportError` without Triton and `FileNotFoundError` without them."""
    package = __package__ if _ARE_HERE else f"{hub.load(HUB_KERNEL, HUB_VERSION).__name__}.kernels.triton"
    return import_module(f"{package}.calls")


def is_available(device: torch.device) -> bool:
    """Whether the kernels work on `device`. Warns the first time when they should and do not."""
    if device.type not in DEVICE_TYPES:
        return False
    if is_capturing(device):
        return _imports()  # no time to compare results: that needs a copy to the host
    return _works(device)


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on `device` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache
def _warn(reason: str):
    logger.warning(f"EXL3 runs on the torch reference, which is much slower on a GPU: {reason}")


@lru_cache
def _imports() -> bool:
    try:
        kernels()
    except FileNotFoundError as error:
        _warn(f"the kernels are on the hub, and {error}")
        return False
    except ImportError as error:
        _warn(
            f"Triton cannot be imported ({error}). Install the one that belongs to this PyTorch (`pip install triton`)."
        )
        return False
    return True


@lru_cache
def _works(device: torch.device) -> bool:
    if not _imports():
        return False
    try:
        check(device)
    except Exception as error:
        _warn(f"Triton does not work here. {type(error).__name__}: {error}")
        return False
    return True


def check(device: torch.device):
    """Raise `RuntimeError`, or whatever Triton raises, unless the kernels compute what the reference does on `device`."""
    generator = torch.Generator().manual_seed(0)
    trellis = torch.randint(-(1 << 15), 1 << 15, (32, 8, 64), generator=generator).to(torch.int16)
    x = torch.randn(1, 512, generator=generator)
    inner, ones = format.decode(trellis, "mul1"), torch.ones(512)
    if not torch.equal(kernels().decode(trellis.to(device), "mul1", torch.float16).cpu(), inner):
        raise RuntimeError(f"the Triton kernels of EXL3 decode wrongly on {device}")
    expected = hadamard(hadamard(x) @ inner.float())
    y = kernels().linear(x.to(device), trellis.to(device), ones.to(device), ones[:128].to(device), None, "mul1", 128)
    if not torch.allclose(y.cpu(), expected, rtol=0, atol=1e-4 * expected.abs().max().item()):
        raise RuntimeError(f"the Triton kernels of EXL3 multiply wrongly on {device}")


@lru_cache
def has_search(device: torch.device) -> bool:
    """Whether `search` works on `device`, on which the other kernels do. Warns the first time when it does not."""
    tiles = torch.randn(2, format.TILE_SIZE, generator=torch.Generator().manual_seed(0))
    try:
        found = kernels().search(tiles.to(device), 3, "mul1").cpu()
        if not torch.equal(found, trellis_search.search_reference(tiles, 3, "mul1")):
            raise RuntimeError("it finds other states than the reference")
    except Exception as error:
        _warn(f"the trellis search does not work on {device}. {type(error).__name__}: {error}")
        return False
    return True
