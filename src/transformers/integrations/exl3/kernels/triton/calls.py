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
The calls of the Triton kernels. What is passed to them is checked here. Imports Triton. This file is the hub kernel's as well.
"""

import torch

from ... import format
from ... import search as trellis_search
from .. import DTYPES, check_devices
from . import dequantize as dequantizing
from . import linear as multiplying
from . import search as searching
from . import target


def has_grouped_linear(device: torch.device) -> bool:
    """Whether `device`, on which the kernels work, has the matrix instructions that `grouped_linear` needs."""
    return bool(multiplying.row_tiles(target.target_of(device)))


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
    _check_dtype("activations", x.dtype)
    format.check_codebook(codebook)
    check_devices(x, trellis, suh, svh, bias)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    with target.on(x.device):
        y = multiplying.linear(
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
        multiplying.grouped_linear(x, ranges, trellis, *scales, codebook, y, target.target_of(x.device))
    return y


def decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype) -> torch.Tensor:
    """The same as `format.decode(trellis, codebook).to(dtype)`, to the byte. Raises `ValueError` as `linear` does."""
    _check_dtype("an inner matrix", dtype)
    format.check_codebook(codebook)
    with target.on(trellis.device):
        return dequantizing.decode(trellis, codebook, dtype, target.target_of(trellis.device).ptx)


def dequantize(trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str, weight: torch.Tensor):
    """The operator `exl3::dequantize`, into `weight`, fp32 `[out, in]`. Raises `ValueError` as `linear` does."""
    format.check_codebook(codebook)
    check_devices(weight, trellis, suh, svh)
    with target.on(trellis.device):
        dequantizing.dequantize(
            trellis, suh.contiguous(), svh.contiguous(), codebook, weight, target.target_of(trellis.device).ptx
        )


def search(tiles: torch.Tensor, bits: float, codebook: str, effort: str = "default") -> torch.Tensor:
    """
    The same as `search.search_reference`, to the byte, for finite tiles. The host waits for the device to tell which saturated.

    Raises:
        ValueError: For tiles of another dtype or shape or with values that are not finite, and for an unknown rate,
            codebook or effort.
    """
    if tiles.dtype is not torch.float32 or tiles.shape[1:] != (format.TILE_SIZE,):
        raise ValueError(f"tiles must be float32 [n, 256], not {tiles.dtype} {list(tiles.shape)}")
    if not torch.isfinite(tiles).all():
        raise ValueError("tiles must be finite")
    with target.on(tiles.device):
        return trellis_search.search(
            tiles,
            bits,
            codebook,
            effort,
            lambda *arguments: searching.kernel(*arguments, target.target_of(tiles.device)),
        )


def _check_dtype(what, dtype):
    if dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"EXL3 on a GPU: {what} must be {names}, not {str(dtype).removeprefix('torch.')}")
