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
The product of activations and a quantized weight in Triton, `y = hadamard(hadamard(x * suh) @ inner) * svh + bias`.

Few rows: one kernel rotates the activations, another decodes the weight in the registers of a matrix instruction and
multiplies. The input dimension is split over programs, whose partial sums the last one to finish adds up, always in the same
order, and rotates. Many rows: the weight is decoded strip by strip into a buffer, and PyTorch multiplies.

Nothing here waits for the device or depends on values, so that all of it can be captured in a CUDA graph.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ... import format
from .codes import decode_bands, load_words, word_offsets
from .dequantize import as_words, decode
from .hadamard import finish_output, rotate_input, rotate_output
from .target import Target


# None of these has been timed on a GPU: they are UNMEASURED, and follow from registers and counted instructions alone.
MAX_PRODUCT_ROWS = 128  # operand rows up to which weights are multiplied where they are decoded
MAX_ROW_TILES = 4  # how often the same weights are decoded for that, at most
PROGRAMS_PER_PROCESSOR = 6  # that the product is split into: what 80 registers a thread leave room for
MAX_FINISH_ROWS = 8  # rows that are rotated at a time at the end of the product
GROUPED_ROWS = 4096  # of all experts that are multiplied at a time: it bounds the memory of partial sums
DENSE_ELEMENTS = 1 << 25  # of the inner matrix that are decoded at a time for many rows: 64 MiB in float16

_BLOCK = tl.constexpr(format.BLOCK)
_COLUMN_TILES = tl.constexpr(format.BLOCK // format.TILE)


@triton.jit
def _rows_of_tile(ranges, tile, expert_count, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert that tile number `tile` of up to `ROWS` rows of one expert belongs to, its first row and the end of its rows."""
    expert = tl.arange(0, EXPERTS)
    begins = tl.load(ranges + 2 * expert, mask=expert < expert_count, other=0)
    ends = tl.load(ranges + 2 * expert + 1, mask=expert < expert_count, other=0)
    tile_ends = tl.cumsum((ends - begins + ROWS - 1) // ROWS, axis=0)
    before = tile_ends <= tile
    mine = tl.sum(before.to(tl.int32), axis=0)
    is_any = mine < expert_count  # else there are fewer tiles
    mine = tl.where(is_any, mine, 0)
    first_tile = tl.max(tl.where(before, tile_ends, 0), axis=0)
    end = tl.load(ranges + 2 * mine + 1)
    return mine, tl.where(is_any, tl.load(ranges + 2 * mine) + (tile - first_tile) * ROWS, end), end


@triton.jit(
    do_not_specialize=[
        *("in_stride", "out_stride", "operand_rows", "row_count", "split_blocks", "expert_count"),
        *("trellis_stride", "svh_stride", "bias_stride"),
    ],
    do_not_specialize_on_alignment=["trellis"],
)
def _product(
    operand,
    scales,
    trellis,
    partial,
    counters,
    svh,
    bias,
    y,
    ranges,
    operand_rows,
    row_count,
    blocks,
    out_features,
    in_stride,
    out_stride,
    y_stride,
    split_blocks,
    expert_count,
    trellis_stride,
    svh_stride,
    bias_stride,
    K2: tl.constexpr,
    CODEBOOK: tl.constexpr,
    PTX: tl.constexpr,
    ORDER: tl.constexpr,
    OPERAND_ROWS: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    column, split, row_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns, splits = tl.num_programs(0), tl.num_programs(1)
    first = split * split_blocks
    end = tl.minimum(first + split_blocks, blocks)

    if EXPERTS:
        expert, begin, row_end = _rows_of_tile(ranges, row_tile, expert_count, EXPERTS, OPERAND_ROWS // TERMS)
        if begin >= row_end:
            return
        trellis += expert.to(tl.int64) * trellis_stride
        svh += expert.to(tl.int64) * svh_stride
        bias += expert.to(tl.int64) * bias_stride
    else:
        begin, row_end = row_tile * (OPERAND_ROWS // TERMS), row_count
    trellis += first.to(tl.int64) * 8 * in_stride + column.to(tl.int64) * _COLUMN_TILES * out_stride
    before, start, last = word_offsets(in_stride, out_stride, K2, 1, _COLUMN_TILES)
    row = begin * TERMS + tl.arange(0, OPERAND_ROWS)
    is_row = row < row_end * TERMS
    x_offsets = tl.arange(0, OPERAND_ROWS)[None, :] * (blocks * _BLOCK) + tl.arange(0, 64)[:, None]
    x_at = operand + (begin * TERMS).to(tl.int64) * (blocks * _BLOCK) + first * _BLOCK
    total = tl.zeros((_BLOCK, OPERAND_ROWS), tl.float32)
    for block in tl.range(first, end, num_stages=1):
        part = tl.zeros((_BLOCK, OPERAND_ROWS), tl.float32)
        for _ in tl.static_range(2):
            words = load_words(trellis, before, start, last, K2)
            x = tl.load(x_at + x_offsets, mask=is_row[None, :], other=0.0)
            part = tl.dot(decode_bands(words, K2, CODEBOOK, PTX, 1, _COLUMN_TILES, ORDER), x, part)
            trellis += 4 * in_stride
            x_at += 64
        total += part * tl.load(scales + row * blocks + block, mask=is_row, other=0.0)[None, :]

    feature = column * _BLOCK + tl.arange(0, _BLOCK)
    out = columns * _BLOCK
    partial_at = partial + (split * operand_rows + row).to(tl.int64)[None, :] * out + feature[:, None]
    tl.store(partial_at, total, mask=is_row[None, :])
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + row_tile * columns + column, 1, sem="acq_rel")
    if arrived == splits - 1:
        for part_begin in range(0, OPERAND_ROWS // TERMS, FINISH_ROWS):
            rows = begin + part_begin + tl.arange(0, FINISH_ROWS)
            source = partial + (rows * TERMS).to(tl.int64)[:, None] * out + feature[None, :]
            inner = tl.zeros((FINISH_ROWS, _BLOCK), tl.float32)
            for _ in range(splits):
                for term in tl.static_range(TERMS):
                    inner += tl.load(
                        source + term * out, mask=(rows < row_end)[:, None], other=0.0, cache_modifier=".cg"
                    )
                source += operand_rows.to(tl.int64) * out
            finish_output(
                inner, svh, bias, y, rows, row_end, column * _BLOCK, out_features, y_stride, FINISH_ROWS, HAS_BIAS
            )


@dataclass(frozen=True)
class ProductOptions:
    """
    How the product is compiled: operand rows of a program, warps, the order of rows in `decode_bands`, and what else the
    compiler is told.
    """

    operand_rows: int
    warps: int
    order: str
    extra: tuple[tuple[str, int], ...] = ()


def row_tiles(target: Target) -> dict[int, int]:
    """For each number of operand rows that a program may take the warps that it needs not to spill registers."""
    if target.backend == "cuda":
        if target.capability < 80:
            return {}  # no matrix instruction that `tl.dot` could use
        if target.capability == 90:
            return {8: 4, 16: 4, 32: 4, 64: 8}
        if 100 <= target.capability < 110:
            # Two warps cannot use the tensor memory, the way to which costs 1.5 instructions a weight.
            return {8: 2, 16: 4, 32: 4, 64: 8}
        return {8: 4, 16: 4, 32: 4}
    if target.backend == "hip" and target.arch.startswith("gfx9"):
        return {16: 4, 32: 4, 64: 8}
    if target.backend == "interpreter":
        return {8: 4, 32: 4}
    return {16: 8}


def register_limit(rows: int, warps: int, codebook: str, has_experts: bool) -> int:
    """
    Registers of a thread that NVIDIA's assembler may use for a program of `rows` operand rows. Left alone, it takes a few less
    than are needed, for some rates in some releases, and spills two. Other codebooks than the default and the search for an expert need more.
    """
    if warps == 2 or rows > 16:
        return 255
    if rows == 16 or has_experts:
        return 128 if codebook == "mul1" and not has_experts else 168
    return 80 if codebook == "mul1" else 128


@lru_cache
def choose_product(
    operand_rows: int, target: Target, codebook: str = "mul1", has_experts: bool = False
) -> ProductOptions | None:
    """How `operand_rows` are multiplied on `target`: options of the product kernel, or None if the weight is decoded first."""
    tiles = row_tiles(target)
    if not tiles or operand_rows > min(MAX_PRODUCT_ROWS, MAX_ROW_TILES * max(tiles)):
        return None
    rows = next((rows for rows in tiles if rows >= operand_rows), max(tiles))
    has_wide_instruction = target.capability == 90 or 100 <= target.capability < 110
    is_wide = has_wide_instruction and rows > 8
    # Before Triton 3.8 the older matrix instruction got its operand in fours of rows where they came out of `tl.join`.
    in_fours = target.backend == "cuda" and not is_wide and _triton_version() < (3, 8)
    limit = register_limit(rows, tiles[rows], codebook, has_experts)
    extra = (("maxnreg", limit),) if target.backend == "cuda" else ()
    return ProductOptions(rows, tiles[rows], "fours" if in_fours else "pairs", extra)


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    out_features: int,
    target: Target,
) -> torch.Tensor:
    """
    The product of activations and a quantized weight.

    Args:
        x (`torch.Tensor`): `[rows, in_features]`, float32, float16 or bfloat16, contiguous in its last dimension.
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]`, of any strides but the last.
        suh, svh (`torch.Tensor`): `[in]` and `[out]`, contiguous.
        bias (`torch.Tensor`, *optional*): `[out_features]` or more, contiguous.
        codebook (`str`): One of `format.CODEBOOKS`.
        out_features (`int`): Output features without their padding.
        target (`Target`): The device that the tensors are on.

    Returns:
        `torch.Tensor`: `[rows, out_features]`, of the dtype of `x`.
    """
    y = x.new_empty(x.shape[0], out_features)
    if not y.numel():
        return y
    # What float16 cannot hold of a float32 activation goes into an operand row of its own.
    terms = 2 if x.dtype is torch.float32 else 1
    options = choose_product(x.shape[0] * terms, target, codebook)
    if options is None:
        _decode_then_multiply(x, trellis, suh, svh, bias, codebook, y, target)
    else:
        _multiply(x, trellis, suh, svh, bias, codebook, y, target, options, terms)
    return y


def grouped_linear(
    x: torch.Tensor,
    ranges: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    y: torch.Tensor,
    target: Target,
):
    """
    The products of the rows of each expert with that expert's weight. Only experts that have rows are decoded, and the host
    need not know which these are.

    Args:
        x (`torch.Tensor`): `[rows, in_features]`, the rows of one expert next to each other, as in `linear` otherwise.
        ranges (`torch.Tensor`): int32 `[experts, 2]`, contiguous: rows `ranges[e, 0]` to `ranges[e, 1]` are those of expert `e`.
        trellis, suh, svh, bias (`torch.Tensor`): As in `linear`, with a first dimension for the experts, of any stride.
        codebook (`str`): One of `format.CODEBOOKS`.
        y (`torch.Tensor`): `[rows, out_features]`, the result. Rows that are of no expert are left alone.
        target (`Target`): The device that the tensors are on, one that `row_tiles` has something for.
    """
    tiles = row_tiles(target)
    terms = 2 if x.dtype is torch.float32 else 1
    for start in range(0, x.shape[0], GROUPED_ROWS):
        part = slice(start, start + GROUPED_ROWS)
        rows = x[part]
        options = choose_product(
            min(triton.cdiv(rows.shape[0], len(ranges)) * terms, max(tiles)), target, codebook, True
        )
        part_ranges = ranges if rows.shape[0] == x.shape[0] else (ranges - start).clamp(0, rows.shape[0])
        _multiply(rows, trellis, suh, svh, bias, codebook, y[part], target, options, terms, part_ranges)


def _multiply(x, trellis, suh, svh, bias, codebook, y, target, options, terms, ranges=None):
    words = as_words(trellis)
    rows, blocks, columns = x.shape[0], suh.shape[-1] // format.BLOCK, svh.shape[-1] // format.BLOCK
    experts = 0 if ranges is None else len(ranges)
    tile_rows = options.operand_rows // terms
    tiles = triton.cdiv(rows, tile_rows) if ranges is None else min(rows, experts + rows // tile_rows)
    splits = max(1, min(blocks, PROGRAMS_PER_PROCESSOR * target.processors // (columns * tiles)))
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    counters = x.new_empty(tiles * columns, dtype=torch.int32)
    operand, scales = rotate_input(
        x, suh, by_block=True, terms=terms, order=options.order, counters=counters, ranges=ranges
    )
    partial = x.new_empty(splits, rows * terms, svh.shape[-1], dtype=torch.float32)
    _product[(columns, splits, tiles)](
        operand,
        scales,
        words,
        partial,
        counters,
        svh,
        svh if bias is None else bias,
        y,
        counters if ranges is None else ranges,
        rows * terms,
        rows,
        blocks,
        y.shape[1],
        words.stride(-3),
        words.stride(-2),
        y.stride(0),
        split_blocks,
        experts,
        words.stride(0) if experts else 0,
        svh.stride(0) if experts else 0,
        bias.stride(0) if experts and bias is not None else 0,
        K2=words.shape[-1] // 4,
        CODEBOOK=codebook,
        PTX=target.ptx,
        ORDER=options.order,
        OPERAND_ROWS=options.operand_rows,
        FINISH_ROWS=finish_rows(rows, options, terms),
        TERMS=terms,
        HAS_BIAS=bias is not None,
        EXPERTS=triton.next_power_of_2(experts) if experts else 0,
        num_warps=options.warps,
        enable_fp_fusion=True,  # the default of Triton before 3.10
        **dict(options.extra),
    )


def finish_rows(rows: int, options: ProductOptions, terms: int) -> int:
    """How many of `rows` a program of the product rotates at a time: one, or as many as there may be."""
    return 1 if rows == 1 else min(MAX_FINISH_ROWS, options.operand_rows // terms)


def _decode_then_multiply(x, trellis, suh, svh, bias, codebook, y, target):
    # In float16 the product cannot overflow: rows of the operand have a norm of at most sqrt(in / 128), columns of the
    # inner matrix one of at most 4 sqrt(in).
    dtype = torch.float32 if x.dtype is torch.float32 else torch.float16
    operand, scales = rotate_input(x, suh, by_block=False, dtype=dtype)
    step = max(1, DENSE_ELEMENTS // (suh.shape[0] * format.BLOCK)) * format.BLOCK
    for start in range(0, y.shape[1], step):
        strip = slice(start, min(start + step, svh.shape[0]))
        tiles = slice(strip.start // format.TILE, strip.stop // format.TILE)
        inner = operand @ decode(trellis[:, tiles], codebook, dtype, target.ptx)
        strip_bias = None if bias is None else bias[strip]
        rotate_output(inner, svh[strip], y[:, strip], scales=scales, bias=strip_bias)
