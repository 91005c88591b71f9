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
searched there, two of them. What is passed to the kernels is checked here.
"""

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from .....utils import logging
from ... import format
from ... import search as trellis_search
from ...hadamard import hadamard
from .. import hub


logger = logging.get_logger(__name__)

DEVICE_TYPES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HUB_KERNEL = "kernels-community/exl3-triton"
HUB_VERSION = 1  # raised with every change of what is called here
_ARE_HERE = Path(__file__).with_name("linear.py").is_file()


def _kernels(name: str) -> ModuleType:
    """The module of this name among the kernels. Raises `ImportError` without Triton and `FileNotFoundError` without them."""
    return import_module(f"{__package__ if _ARE_HERE else _hub_package()}.{name}")


@lru_cache
def _hub_package() -> str:
    return f"{hub.load(HUB_KERNEL, HUB_VERSION).__name__}.kernels.triton"


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


def has_grouped_linear(device: torch.device) -> bool:
    """Whether `device`, on which the kernels work, has the matrix instructions that `grouped_linear` needs."""
    return bool(_kernels("linear").row_tiles(_kernels("target").target_of(device)))


@lru_cache
def _warn(reason: str):
    logger.warning(f"EXL3 runs on the torch reference, which is much slower on a GPU: {reason}")


@lru_cache
def _imports() -> bool:
    try:
        _kernels("linear")
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
    if not torch.equal(decode(trellis.to(device), "mul1", torch.float16).cpu(), inner):
        raise RuntimeError(f"the Triton kernels of EXL3 decode wrongly on {device}")
    expected = hadamard(hadamard(x) @ inner.float())
    y = linear(x.to(device), trellis.to(device), ones.to(device), ones[:128].to(device), None, "mul1", 128)
    if not torch.allclose(y.cpu(), expected, rtol=0, atol=1e-4 * expected.abs().max().item()):
        raise RuntimeError(f"the Triton kernels of EXL3 multiply wrongly on {device}")


def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    out_features: int,
) -> torch.Tensor:
    """
    The operator `exl3::linear`, on sizes that fit each other.

    Raises:
        ValueError: For activations of another dtype than float32, float16 and bfloat16, for tensors on different devices,
            and for an unknown codebook.
    """
    target = _kernels("target")
    _check_dtype("activations", x.dtype)
    format.check_codebook(codebook)
    check_devices(x, trellis, suh, svh, bias)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    with target.on(x.device):
        y = _kernels("linear").linear(
            rows,
            trellis,
            suh.contiguous(),
            svh.contiguous(),
            None if bias is None else bias.contiguous(),
            codebook,
            out_features,
            target.target_of(x.device),
        )
    return y.view(*x.shape[:-1], out_features)


def grouped_linear(
    x: torch.Tensor,
    ranges: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    out_features: int,
) -> torch.Tensor:
    """
    The operator `exl3::grouped_linear`, on sizes that fit each other, without asking the device how many rows an expert has.
    Needs `has_grouped_linear`.

    Raises:
        ValueError: As `linear`.
    """
    target = _kernels("target")
    _check_dtype("activations", x.dtype)
    format.check_codebook(codebook)
    check_devices(x, ranges, trellis, suh, svh, bias)
    y = x.new_zeros(x.shape[0], out_features)
    if not y.numel() or not len(ranges):
        return y
    x, *scales = (
        tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, suh, svh, bias)
    )
    ranges = ranges.to(torch.int32).contiguous()
    with target.on(x.device):
        _kernels("linear").grouped_linear(x, ranges, trellis, *scales, codebook, y, target.target_of(x.device))
    return y


def decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype) -> torch.Tensor:
    """The same as `format.decode(trellis, codebook).to(dtype)`, to the byte. Raises `ValueError` as `linear` does."""
    target = _kernels("target")
    _check_dtype("an inner matrix", dtype)
    format.check_codebook(codebook)
    with target.on(trellis.device):
        return _kernels("dequantize").decode(trellis, codebook, dtype, target.target_of(trellis.device).ptx)


def dequantize(trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str, weight: torch.Tensor):
    """The operator `exl3::dequantize`, into `weight`, fp32 `[out, in]`. Raises `ValueError` as `linear` does."""
    target = _kernels("target")
    format.check_codebook(codebook)
    check_devices(weight, trellis, suh, svh)
    with target.on(trellis.device):
        _kernels("dequantize").dequantize(
            trellis, suh.contiguous(), svh.contiguous(), codebook, weight, target.target_of(trellis.device).ptx
        )


@lru_cache
def has_search(device: torch.device) -> bool:
    """Whether `search` works on `device`, on which the other kernels do. Warns the first time when it does not."""
    tiles = torch.randn(2, format.TILE_SIZE, generator=torch.Generator().manual_seed(0))
    try:
        found = search(tiles.to(device), 3, "mul1").cpu()
        if not torch.equal(found, trellis_search.search_reference(tiles, 3, "mul1")):
            raise RuntimeError("it finds other states than the reference")
    except Exception as error:
        _warn(f"the trellis search does not work on {device}. {type(error).__name__}: {error}")
        return False
    return True


def search(tiles: torch.Tensor, bits: float, codebook: str, effort: str = "default") -> torch.Tensor:
    """
    The same as `search.search_reference`, to the byte, for finite tiles. The host waits for the device to tell which saturated.

    Raises:
        ValueError: For tiles of another dtype or shape or with values that are not finite, and for an unknown rate,
            codebook or effort.
    """
    target, kernel = _kernels("target"), _kernels("search").kernel
    if tiles.dtype is not torch.float32 or tiles.shape[1:] != (format.TILE_SIZE,):
        raise ValueError(f"tiles must be float32 [n, 256], not {tiles.dtype} {list(tiles.shape)}")
    if not torch.isfinite(tiles).all():
        raise ValueError("tiles must be finite")
    with target.on(tiles.device):
        return trellis_search.search(
            tiles, bits, codebook, effort, lambda *arguments: kernel(*arguments, target.target_of(tiles.device))
        )


def _check_dtype(what, dtype):
    if dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"EXL3 on a GPU: {what} must be {names}, not {str(dtype).removeprefix('torch.')}")


def check_devices(*tensors: torch.Tensor | None):
    """Raise `ValueError` where tensors are on different devices. To PyTorch an operator with one on `meta` is one to be faked."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the tensors of an EXL3 layer and its input are on different devices: {names}")
