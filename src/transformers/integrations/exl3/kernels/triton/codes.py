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
Decoding inside Triton kernels: from a trellis in memory to the values of a strip of tiles in registers.

A *band* is four tiles one below the other, 64 rows of the inner matrix. It is read by groups of 32 lanes: lane
`4 * column + tile` holds 32 consecutive weights of the stream of one of the four tiles, those of columns `column` and
`column + 8`. They begin at a multiple of `32 K` bits, so where the 16 bits of each state lie in the lane's words is known
when the kernel is compiled, and a lane reads its own words and the one before.
"""

import struct

import triton
import triton.language as tl

from ... import format


_3INST_MULTIPLIER = tl.constexpr(format._3INST_MULTIPLIER)
_3INST_ADDEND = tl.constexpr(format._3INST_ADDEND)
_3INST_MASK = tl.constexpr(format._3INST_MASK)
_3INST_EXPONENTS = tl.constexpr(format._3INST_EXPONENTS)
_MCG_MULTIPLIER = tl.constexpr(format.MARKERS["mcg"])
_MUL1_MULTIPLIER = tl.constexpr(format.MARKERS["mul1"])
_MUL1_SCALE = tl.constexpr(format._MUL1_SCALE)
# (1024 + sum) * scale + offset as sum * scale + (1024 * scale + offset): the bracket is exact in fp32 too.
_MUL1_CENTER = tl.constexpr(1024 * format._MUL1_SCALE + format._MUL1_OFFSET)


def _fp16_pair(value: float) -> str:
    """`value` as both halves of a PTX register of two fp16."""
    return "0x" + 2 * f"{struct.unpack('<H', struct.pack('<e', value))[0]:04x}"


# Two states to two fp16 values. The fp16 number with the bits 0x6400 + n is 1024 + n for n < 1024.
_PTX_MUL1 = tl.constexpr(
    f"""{{
    .reg .b32 x, y, scale, offset;
    mul.lo.u32 x, $1, {format.MARKERS["mul1"]:#x};
    mul.lo.u32 y, $2, {format.MARKERS["mul1"]:#x};
    dp4a.u32.u32 x, x, 0x01010101, 0x6400;
    dp4a.u32.u32 y, y, 0x01010101, 0x6400;
    prmt.b32 x, x, y, 0x5410;
    mov.b32 scale, {_fp16_pair(format._MUL1_SCALE)};
    mov.b32 offset, {_fp16_pair(format._MUL1_OFFSET)};
    fma.rn.f16x2 $0, x, scale, offset;
    }}"""
)
# 0x6a is the truth table of (a & b) ^ c.
_PTX_HALVES = f"""
    lop3.b32 x, x, {format._3INST_MASK:#x}, {format._3INST_EXPONENTS:#x}, 0x6a;
    lop3.b32 y, y, {format._3INST_MASK:#x}, {format._3INST_EXPONENTS:#x}, 0x6a;
    prmt.b32 low, x, y, 0x5410;
    prmt.b32 high, x, y, 0x7632;
    add.rn.f16x2 $0, low, high;
    }}"""
_PTX_MCG = tl.constexpr(
    f"""{{
    .reg .b32 x, y, low, high;
    mul.lo.u32 x, $1, {format.MARKERS["mcg"]:#x};
    mul.lo.u32 y, $2, {format.MARKERS["mcg"]:#x};"""
    + _PTX_HALVES
)
_PTX_3INST = tl.constexpr(
    f"""{{
    .reg .b32 x, y, low, high;
    mad.lo.u32 x, $1, {format._3INST_MULTIPLIER:#x}, {format._3INST_ADDEND:#x};
    mad.lo.u32 y, $2, {format._3INST_MULTIPLIER:#x}, {format._3INST_ADDEND:#x};"""
    + _PTX_HALVES
)


@triton.jit
def values_of(states, CODEBOOK: tl.constexpr, PTX: tl.constexpr):
    """uint32 `states`, an even number a thread, to their fp16 values. With `PTX` in NVIDIA's assembly."""
    if PTX:
        if CODEBOOK == "mul1":
            ptx: tl.constexpr = _PTX_MUL1
        elif CODEBOOK == "mcg":
            ptx: tl.constexpr = _PTX_MCG
        else:
            ptx: tl.constexpr = _PTX_3INST
        values = tl.inline_asm_elementwise(ptx, "=r,r,r", [states], dtype=tl.float16, is_pure=True, pack=2)
    elif CODEBOOK == "mul1":
        x = states * _MUL1_MULTIPLIER
        x = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
        byte_sum = (x * 0x00010001) >> 16
        values = (byte_sum.to(tl.int32).to(tl.float32) * _MUL1_SCALE + _MUL1_CENTER).to(tl.float16)
    else:
        if CODEBOOK == "mcg":
            x = states * _MCG_MULTIPLIER
        else:
            x = states * _3INST_MULTIPLIER + _3INST_ADDEND
        x = (x & _3INST_MASK) ^ _3INST_EXPONENTS
        values = x.to(tl.uint16).to(tl.float16, bitcast=True) + (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return values


@triton.jit
def word_offsets(in_stride, out_stride, K2: tl.constexpr, BANDS: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """
    Where the lanes find their first and their second word.

    The hint that the lanes' words are contiguous is not true. It has every release of Triton lay the lanes along the first
    dimension, and nothing else comes of it as long as no alignment of the trellis's address is known: words are then never
    loaded in vectors.

    Args:
        in_stride, out_stride: Words from one tile to the next in each direction.
        K2: Twice the bits a weight.

    Returns:
        Two int32 `[32, COLUMN_TILES, BANDS]`, and where the last word of a lane lies (used if K is not whole).
    """
    lane = tl.arange(0, 32)[:, None, None]
    column, tile = lane // 4, lane % 4
    band = tl.arange(0, BANDS)[None, None, :]
    column_tile = tl.arange(0, COLUMN_TILES)[None, :, None]
    offsets = (band * 4 + tile) * in_stride + column_tile * out_stride
    # A lane's weights begin at the 16-bit half `column * K2` of the stream; it needs the 16 bits before.
    first = (column * K2 + 8 * K2 - 1) // 2
    before = tl.max_contiguous(offsets + first % (4 * K2), [32, 2, 1])
    start = tl.max_contiguous(offsets + (first + 1) % (4 * K2), [32, 2, 1])
    last = tl.max_contiguous(offsets + (first + K2 // 2 + 1) % (4 * K2), [32, 2, 1])
    return before, start, last


@triton.jit
def load_words(trellis, before, start, last, K2: tl.constexpr):
    """
    The words of each lane, in the order of the stream: the bit before a lane's first weight is the lowest of the first one
    where K is whole, and its 16th where it is not.
    """
    words = (tl.load(trellis + before).to(tl.uint32, bitcast=True),)
    WHOLE: tl.constexpr = K2 // 2
    for i in tl.static_range(WHOLE):
        words = words + (tl.load(trellis + start + i).to(tl.uint32, bitcast=True),)
    if K2 % 2:
        words = words + (tl.load(trellis + last).to(tl.uint32, bitcast=True),)
        # Even columns begin within a word: shift them to where odd columns begin.
        is_even = (tl.arange(0, 32)[:, None, None] // 4) % 2 == 0
        shifted = ()
        for i in tl.static_range(WHOLE + 1):
            shifted = shifted + (tl.where(is_even, (words[i] << 16) | (words[i + 1] >> 16), words[i]),)
        words = shifted
    return words


@triton.jit
def _state(words, index: tl.constexpr, K2: tl.constexpr):
    """The state of a lane's weight number `index`, from its words."""
    end: tl.constexpr = (32 if K2 % 2 == 0 else 16) + K2 * (index + 1) // 2  # of its bits, in the lane's stream
    word: tl.constexpr = (end - 1) // 32
    shift: tl.constexpr = 32 * (word + 1) - end
    if shift <= 16:
        bits = words[word] >> shift
    else:
        bits = (((words[word - 1].to(tl.uint64) << 32) | words[word].to(tl.uint64)) >> shift).to(tl.uint32)
    return bits & 0xFFFF


@triton.jit
def _run(words, run: tl.constexpr, K2: tl.constexpr, CODEBOOK: tl.constexpr, PTX: tl.constexpr):
    """Eight weights that follow each other in the stream, `[..., 2, 2, 2]`, the last dimension the slowest."""
    first: tl.constexpr = 8 * run
    v0 = values_of(tl.join(_state(words, first, K2), _state(words, first + 1, K2)), CODEBOOK, PTX)
    v1 = values_of(tl.join(_state(words, first + 2, K2), _state(words, first + 3, K2)), CODEBOOK, PTX)
    v2 = values_of(tl.join(_state(words, first + 4, K2), _state(words, first + 5, K2)), CODEBOOK, PTX)
    v3 = values_of(tl.join(_state(words, first + 6, K2), _state(words, first + 7, K2)), CODEBOOK, PTX)
    return tl.join(tl.join(v0, v1), tl.join(v2, v3))


@triton.jit
def decode_bands(
    words,
    K2: tl.constexpr,
    CODEBOOK: tl.constexpr,
    PTX: tl.constexpr,
    BANDS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ORDER: tl.constexpr,
):
    """
    The inner matrix of bands of tiles, transposed: fp16 `[16 * COLUMN_TILES, 64 * BANDS]`.

    Args:
        words: What `load_words` returned.
        ORDER: Of the rows of each band (see `band_row`). Each keeps the weights with the lanes that a matrix instruction
            wants them in, so that they need not pass through shared memory; "natural" does not.
    """
    r0 = _run(words, 0, K2, CODEBOOK, PTX)
    r1 = _run(words, 1, K2, CODEBOOK, PTX)
    r2 = _run(words, 2, K2, CODEBOOK, PTX)
    r3 = _run(words, 3, K2, CODEBOOK, PTX)
    values = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    # 0 column, 1 tile, 2 column tile, 3 band, 4-6 place in the run (lowest bit first), 7-8 run (likewise)
    values = tl.reshape(values, (8, 4, COLUMN_TILES, BANDS, 2, 2, 2, 2, 2))
    if ORDER == "pairs":
        values = tl.permute(values, (2, 6, 0, 3, 8, 7, 5, 1, 4))
    elif ORDER == "fours":
        values = tl.permute(values, (2, 6, 0, 3, 8, 7, 1, 5, 4))
    else:
        values = tl.permute(values, (2, 6, 0, 3, 1, 5, 8, 7, 4))
    return tl.reshape(values, (16 * COLUMN_TILES, 64 * BANDS))


@triton.jit
def band_row(position, ORDER: tl.constexpr):
    """The row of a band, 0 to 63, that stands at `position` in the order `ORDER` of `decode_bands`."""
    if ORDER == "natural":
        row = position
    else:
        run, low = position >> 4, position & 1
        if ORDER == "pairs":
            high, tile = (position >> 3) & 1, (position >> 1) & 3
        else:
            high, tile = (position >> 1) & 1, (position >> 2) & 3
        row = 16 * tile + 8 * high + 2 * run + low
    return row
