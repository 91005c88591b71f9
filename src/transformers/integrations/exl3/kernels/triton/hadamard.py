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
The blockwise Hadamard rotation in Triton, with the scales before and after it: `hadamard` of format.py and what stands around it.

Activations become *operands*: float16 (the dtype of the decoded weights) whatever the dtype of the activations. A power of
two, the *scale* of a row or of a block of 128 features, first brings them into its range; that changes no digit. Where
float16 has fewer digits than the activations (float32), a second operand row holds the rest.
"""

import torch
import triton
import triton.language as tl

from ... import format


_BLOCK = tl.constexpr(format.BLOCK)
_NORM = tl.constexpr(format.BLOCK**-0.5)
# A rotated element is at most sqrt(128) < 2^4 times the largest of its block, which is below 2^(exponent + 1).
_HEADROOM = tl.constexpr(5)
_INVERSE = tl.constexpr(254 - 5)  # minus a biased exponent: that of the scale's inverse
_REST = tl.constexpr(2.0**11)  # what float16 rounds away is below 2^-11 of the number

# Rows and warps of a program. UNMEASURED: chosen for four to eight elements a thread, never timed on a GPU.
BLOCK_PROGRAM = (1, 1)
ROW_PROGRAM = (4, 4)
TRANSPOSING_PROGRAM = (32, 4)


@triton.jit
def _butterfly(x, HALF: tl.constexpr, ROWS: tl.constexpr):
    x = tl.permute(tl.reshape(x, (ROWS, _BLOCK // (2 * HALF), 2, HALF)), (0, 1, 3, 2))
    low, high = tl.split(x)
    x = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(x, (ROWS, _BLOCK))


@triton.jit
def rotate(x, ROWS: tl.constexpr):
    """fp32 `[ROWS, 128]` rotated as `hadamard` does it, by additions in the same order."""
    x = _butterfly(x, 1, ROWS)
    x = _butterfly(x, 2, ROWS)
    x = _butterfly(x, 4, ROWS)
    x = _butterfly(x, 8, ROWS)
    x = _butterfly(x, 16, ROWS)
    x = _butterfly(x, 32, ROWS)
    x = _butterfly(x, 64, ROWS)
    return x * _NORM


@triton.jit
def expert_of_row(ranges, rows, expert_count, EXPERTS: tl.constexpr):
    """The expert of each of `rows` and whether there is one: `ranges` tells where the rows of each begin and end."""
    expert = tl.arange(0, EXPERTS)
    begins = tl.load(ranges + 2 * expert, mask=expert < expert_count, other=0)
    ends = tl.load(ranges + 2 * expert + 1, mask=expert < expert_count, other=0)
    is_of = ((begins[None, :] <= rows[:, None]) & (rows[:, None] < ends[None, :])).to(tl.int32)
    return tl.sum(is_of * expert[None, :], axis=1), tl.sum(is_of, axis=1) != 0


@triton.jit
def _scaled(x, suh, rows, is_row, start, x_stride, in_features):
    """fp32 `x * suh` of 128 features from `start` on, zero beyond the ends; `suh` as a pointer for each row."""
    feature = start + tl.arange(0, _BLOCK)
    inside = is_row[:, None] & (feature < in_features)[None, :]
    x = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + feature[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) * tl.load(suh + feature[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)


@triton.jit
def _rotate_input(
    x,
    suh,
    operand,
    scales,
    counters,
    ranges,
    row_count,
    in_features,
    features,
    span,
    x_stride,
    suh_stride,
    counter_count,
    expert_count,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < row_count
    if EXPERTS:
        expert, is_any = expert_of_row(ranges, rows, expert_count, EXPERTS)
        is_row &= is_any
        suh_of_rows = suh + (expert.to(tl.int64) * suh_stride)[:, None]
    else:
        suh_of_rows = suh + (rows * 0)[:, None]
    first = tl.program_id(1) * span
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(first, first + span, _BLOCK):
        values = _scaled(x, suh_of_rows, rows, is_row, start, x_stride, in_features)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, _INVERSE - 1)
    scale = ((exponent + _HEADROOM) << 23).to(tl.float32, bitcast=True)
    inverse = ((0 - exponent + _INVERSE) << 23).to(tl.float32, bitcast=True)
    at = rows.to(tl.int64) * TERMS
    scale_at = scales + at * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale_at, scale, mask=is_row)
    if TERMS == 2:
        tl.store(scale_at + tl.num_programs(1), scale / _REST, mask=is_row)

    # Where each feature of a block goes: the inverse of `band_row`.
    feature = tl.arange(0, _BLOCK)
    tile, high, run, low = (feature >> 4) & 3, (feature >> 3) & 1, (feature >> 1) & 3, feature & 1
    if ORDER == "pairs":
        place = (feature & 64) + 16 * run + 8 * high + 2 * tile + low
    elif ORDER == "fours":
        place = (feature & 64) + 16 * run + 4 * tile + 2 * high + low
    else:
        place = feature
    for start in range(first, first + span, _BLOCK):
        values = _scaled(x, suh_of_rows, rows, is_row, start, x_stride, in_features)
        values = rotate(values * inverse[:, None], ROWS)
        rounded = values.to(operand.dtype.element_ty)
        target = operand + at[:, None] * features + start + place[None, :]
        tl.store(target, rounded, mask=is_row[:, None])
        if TERMS == 2:
            rest = (values - rounded.to(tl.float32)) * _REST
            tl.store(target + features, rest.to(operand.dtype.element_ty), mask=is_row[:, None])

    # The counters of the product that follows.
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for start in range(program * _BLOCK, counter_count, programs * _BLOCK):
        index = start + tl.arange(0, _BLOCK)
        tl.store(counters + index, tl.zeros((_BLOCK,), tl.int32), mask=index < counter_count)


@triton.jit
def finish_output(
    inner,
    svh,
    bias,
    y,
    rows,
    row_count,
    start,
    out_features,
    y_stride,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Rotate fp32 `inner` `[ROWS, 128]`, scale it by `svh`, add the bias and store it in `y`, from column `start` on."""
    feature = start + tl.arange(0, _BLOCK)
    values = rotate(inner, ROWS) * tl.load(svh + feature).to(tl.float32)[None, :]
    is_feature = feature < out_features
    if HAS_BIAS:
        values += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    target = y + rows.to(tl.int64)[:, None] * y_stride + feature[None, :]
    tl.store(target, values.to(y.dtype.element_ty), mask=(rows < row_count)[:, None] & is_feature[None, :])


@triton.jit
def _rotate_output(
    inner,
    scales,
    svh,
    bias,
    y,
    row_count,
    out_features,
    row_stride,
    feature_stride,
    y_stride,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * _BLOCK
    feature = start + tl.arange(0, _BLOCK)
    source = inner + rows.to(tl.int64)[:, None] * row_stride + feature.to(tl.int64)[None, :] * feature_stride
    values = tl.load(source, mask=(rows < row_count)[:, None], other=0.0).to(tl.float32)
    if HAS_SCALES:
        values *= tl.load(scales + rows, mask=rows < row_count, other=0.0)[:, None]
    finish_output(values, svh, bias, y, rows, row_count, start, out_features, y_stride, ROWS, HAS_BIAS)


def rotate_input(
    x: torch.Tensor,
    suh: torch.Tensor,
    *,
    by_block: bool,
    dtype: torch.dtype = torch.float16,
    terms: int = 1,
    order: str = "natural",
    counters: torch.Tensor | None = None,
    ranges: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Activations to the operands of the product with the inner matrix: `hadamard(pad(x) * suh)` apart from the scales.

    Args:
        x (`torch.Tensor`): `[rows, in_features]`, float32, float16 or bfloat16, contiguous in its last dimension.
        suh (`torch.Tensor`): `[in]`, or with experts `[experts, in]`, contiguous in its last dimension.
        by_block (`bool`): A scale for each block of 128 features, else one for each row.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): Of the operands.
        terms (`int`, *optional*, defaults to 1): Operand rows of each row, which are to be added up: 1 or 2.
        order (`str`, *optional*, defaults to `"natural"`): Of the features within each 64, see `decode_bands`.
        counters (`torch.Tensor`, *optional*): int32, contiguous, set to zero on the way.
        ranges (`torch.Tensor`, *optional*): int32 `[experts, 2]`, contiguous, with experts: the rows `ranges[e, 0]` to
            `ranges[e, 1]` are those of expert `e`. Nothing is computed for other rows.

    Returns:
        `tuple(torch.Tensor)`: The operands `[rows * terms, in]`, of magnitudes below 1, and what they are to be multiplied
        with, fp32 `[rows * terms, in / 128]` or `[rows * terms, 1]`.
    """
    rows, features = x.shape[0], suh.shape[-1]
    operand = x.new_empty(rows * terms, features, dtype=dtype)
    span = format.BLOCK if by_block else features
    scales = x.new_empty(rows * terms, features // span, dtype=torch.float32)
    per_program, warps = BLOCK_PROGRAM if by_block else ROW_PROGRAM
    _rotate_input[(triton.cdiv(rows, per_program), features // span)](
        x,
        suh,
        operand,
        scales,
        counters if counters is not None else scales,
        ranges if ranges is not None else scales,
        rows,
        x.shape[1],
        features,
        span,
        x.stride(0),
        0 if ranges is None else suh.stride(0),
        0 if counters is None else counters.numel(),
        0 if ranges is None else ranges.shape[0],
        ROWS=per_program,
        TERMS=terms,
        ORDER=order,
        EXPERTS=0 if ranges is None else triton.next_power_of_2(ranges.shape[0]),
        num_warps=warps,
        enable_fp_fusion=True,  # the default of Triton before 3.10
    )
    return operand, scales


def rotate_output(
    inner: torch.Tensor,
    svh: torch.Tensor,
    y: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
):
    """
    What follows a product with the inner matrix: `y = hadamard(inner * scales) * svh + bias`, computed in fp32.

    Args:
        inner (`torch.Tensor`): `[rows, out]`, floating, of any strides.
        svh (`torch.Tensor`): `[out]`.
        y (`torch.Tensor`): `[rows, out_features]`, contiguous in its last dimension, `out_features <= out`: the result.
        scales (`torch.Tensor`, *optional*): fp32 `[rows]`, contiguous.
        bias (`torch.Tensor`, *optional*): `[out_features]` or more.
    """
    rows, features = inner.shape
    per_program, warps = ROW_PROGRAM if inner.stride(1) == 1 else TRANSPOSING_PROGRAM
    _rotate_output[(triton.cdiv(rows, per_program), features // format.BLOCK)](
        inner,
        inner if scales is None else scales,
        svh,
        svh if bias is None else bias,
        y,
        rows,
        y.shape[1],
        inner.stride(0),
        inner.stride(1),
        y.stride(0),
        ROWS=per_program,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        enable_fp_fusion=True,  # the default of Triton before 3.10
    )
