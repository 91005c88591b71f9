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
"""Decoding a trellis to its inner matrix, and to the weight that it stands for, in Triton."""

import torch
import triton
import triton.language as tl

from ... import format
from .codes import decode_bands, load_words, word_offsets
from .hadamard import rotate_output


BANDS, COLUMN_TILES, WARPS = 1, 8, 4  # of a program: 64 rows and 128 columns. UNMEASURED


@triton.jit(do_not_specialize=["in_stride", "out_stride"], do_not_specialize_on_alignment=["trellis"])
def _decode(
    trellis,
    inner,
    in_stride,
    out_stride,
    inner_stride,
    K2: tl.constexpr,
    CODEBOOK: tl.constexpr,
    PTX: tl.constexpr,
    BANDS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    band, column = tl.program_id(0).to(tl.int64) * BANDS, tl.program_id(1).to(tl.int64) * COLUMN_TILES
    trellis += 4 * band * in_stride + column * out_stride
    before, start, last = word_offsets(in_stride, out_stride, K2, BANDS, COLUMN_TILES)
    words = load_words(trellis, before, start, last, K2)
    values = decode_bands(words, K2, CODEBOOK, PTX, BANDS, COLUMN_TILES, "natural")
    row = 64 * band + tl.arange(0, 64 * BANDS)
    feature = 16 * column + tl.arange(0, 16 * COLUMN_TILES)
    tl.store(inner + row[:, None] * inner_stride + feature[None, :], tl.trans(values).to(inner.dtype.element_ty))


def as_words(trellis: torch.Tensor) -> torch.Tensor:
    """
    The words of a trellis, as kernels take them: int32 `[in/16, out/16, 8K]`, in whichever order its tiles lie in memory, or of a
    stack of them, `[experts, in/16, out/16, 8K]`.

    Raises:
        ValueError: For a tensor that is no trellis of whole blocks, or whose words do not lie as kernels need them.
    """
    if trellis.dtype is not torch.int16 or trellis.dim() not in (3, 4):
        raise ValueError(f"a trellis is int16 [in/16, out/16, 16K], not {trellis.dtype} {list(trellis.shape)}")
    format.bits_of(trellis)
    tiles_per_block = format.BLOCK // format.TILE
    if trellis.shape[-3] % tiles_per_block or trellis.shape[-2] % tiles_per_block or not trellis.numel():
        raise ValueError(
            f"a trellis has whole blocks of {tiles_per_block} by {tiles_per_block} tiles, not {list(trellis.shape)}"
        )
    if trellis.stride(-1) != 1 or trellis.data_ptr() % 4:
        raise ValueError("the words of a tile must lie one after the other, and at addresses that are multiples of 4")
    words = trellis.view(torch.int32)
    if tiles_per_block * max(words.stride()[-3:-1]) >= 1 << 31:
        raise ValueError(f"the tiles of a block lie too far from each other in memory: strides {trellis.stride()}")
    return words


def decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype, ptx: bool) -> torch.Tensor:
    """
    The same as `format.decode(trellis, codebook).to(dtype)`, to the byte.

    Args:
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]`, of any strides but the last.
        codebook (`str`): One of `format.CODEBOOKS`.
        dtype (`torch.dtype`): float32, float16 or bfloat16.
        ptx (`bool`): Whether the codebook is computed in NVIDIA's assembly.

    Returns:
        `torch.Tensor`: `[in, out]`, of `dtype`.
    """
    words = as_words(trellis)
    rows, columns = words.shape[0] * format.TILE, words.shape[1] * format.TILE
    inner = trellis.new_empty(rows, columns, dtype=dtype)
    grid = (rows // (64 * BANDS), columns // (16 * COLUMN_TILES))
    _decode[grid](
        words,
        inner,
        words.stride(0),
        words.stride(1),
        inner.stride(0),
        K2=words.shape[2] // 4,
        CODEBOOK=codebook,
        PTX=ptx,
        BANDS=BANDS,
        COLUMN_TILES=COLUMN_TILES,
        num_warps=WARPS,
        enable_fp_fusion=True,  # the default of Triton before 3.10
    )
    return inner


def dequantize(
    trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str, weight: torch.Tensor, ptx: bool
):
    """
    The weight of a strip of output features, into `weight`.

    Args:
        trellis, codebook, ptx: As in `decode`.
        suh, svh (`torch.Tensor`): `[in]` and `[out]`.
        weight (`torch.Tensor`): fp32 `[out, in]`, contiguous: the result.
    """
    inner = decode(trellis, codebook, torch.float32, ptx)
    rotated = torch.empty_like(inner)
    rotate_output(inner, svh, rotated)
    rotate_output(rotated.T, suh, weight)
