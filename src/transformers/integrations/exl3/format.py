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
The EXL3 format in plain torch, on any device: the executable specification that every kernel is tested against.

A linear layer with `in` input and `out` output features, both padded to multiples of 128, is stored as

| tensor            | dtype | shape                  | meaning                                                   |
|-------------------|-------|------------------------|-----------------------------------------------------------|
| `trellis`         | int16 | `[in/16, out/16, 16K]` | the codes of 16x16 tiles, `K` bits a weight               |
| `suh`             | fp16  | `[in]`                 | signs and scales of the input features                    |
| `svh`             | fp16  | `[out]`                | signs and scales of the output features                   |
| `su`, `sv`        | int16 | `[in/16]`, `[out/16]`  | signs alone, one bit each (old files, instead of the two) |
| `mcg` or `mul1`   | int32 | `[]`                   | names the codebook; neither means `3inst`                 |
| `bias`            | fp16  | `[out]`                | optional                                                  |

and stands for the weight `W = diag(suh) B inner B diag(svh)` of shape `[in, out]` (`nn.Linear` keeps its transpose), where
`inner` is what the trellis decodes to and `B` is the blockwise rotation `hadamard`.

How it works: `B` spreads outliers over their block of 128 features. It is its own inverse and as easily undone on the activations,
`y = ((x * suh) B inner) B * svh`, so that a product never needs the weight in full. `suh` and `svh` hold random signs and scales.
The 256 weights of a tile share a ring of `256 K` bits, and each is a function of the 16 bits that end where its own `K` bits end:
neighbors share bits, and a code with `2^K` choices a weight draws on 65536 values. That function is computed, not stored. Quantizing
is to find the path through this trellis that is closest to the rotated weights, among those that close to a ring (tail-biting).

Names: a *tile* is 16x16 weights of `inner`, in the *stream order* of its 256 codes; a *state* is the 16-bit window of the
tile's bit stream (a ring of `256 K` bits) that a weight is decoded from; a *codebook* maps states to fp16 values.
"""

from functools import lru_cache

import torch


TILE = 16
TILE_SIZE = TILE * TILE
STATE_BITS = 16
NUM_STATES = 1 << STATE_BITS
BLOCK = 128  # features of one Hadamard block: every stored size is a multiple of it

BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)

CODEBOOKS = ("3inst", "mcg", "mul1")
# The multiplier of a codebook is also the value of the marker tensor that selects it.
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}

# QTIP (arXiv 2406.11235), "3INST": a linear congruence, then two fp16 numbers from masked halves of the result.
_3INST_MULTIPLIER, _3INST_ADDEND = 89226354, 64248484
_3INST_MASK, _3INST_EXPONENTS = 0x8FFF8FFF, 0x3B603B60
# mul1 sums the four bytes of the product and maps the sum to about N(0, 1): (1024 + sum) * scale + offset, both fp16.
_MUL1_SCALE, _MUL1_OFFSET = 0.00676727294921875, -10.3828125

EMBEDDING_GROUP = 256  # elements of an embedding row that share one ring, one scale and one Hadamard rotation


def padded(features: int) -> int:
    """The number of features that a layer with `features` of them is stored with: the next multiple of 128."""
    return -(-features // BLOCK) * BLOCK


def hadamard(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Rotate the last dimension of `x`, in blocks of `block`, by the orthonormal Hadamard matrix in Sylvester's order.

    The matrix is `H[i, j] = (-1)^popcount(i & j) / sqrt(block)`, symmetric and so its own inverse. It is applied as
    butterflies, elementwise additions in a fixed order: the result has the same bits on every machine and thread count.

    Args:
        x (`torch.Tensor`): `[..., n]` with `n` a multiple of `block`, of a floating dtype.
        block (`int`, *optional*, defaults to 128): A power of two.

    Returns:
        `torch.Tensor`: `[..., n]`, of the dtype of `x`.
    """
    shape = x.shape
    half = 1
    while half < block:
        low, high = x.reshape(-1, block // (2 * half), 2, half).unbind(2)
        x = torch.stack((low + high, low - high), 2)
        half *= 2
    return x.reshape(shape) * block**-0.5


def marker(codebook: str) -> torch.Tensor | None:
    """The 0-d int32 tensor that names `codebook` in a checkpoint, None for `3inst`, which has none."""
    if codebook not in MARKERS:
        return None
    return torch.tensor(MARKERS[codebook], dtype=torch.int64, device="cpu").to(torch.int32)


def bits_of(trellis: torch.Tensor) -> float:
    """Bits a weight of a trellis, from the length of its tiles."""
    return check_bits(trellis.shape[-1] / TILE)


def check_bits(bits: float) -> float:
    """`bits`, as an int where it is whole. Raises `ValueError` where the format has no such rate."""
    if bits not in BITS:
        raise ValueError(f"EXL3 has no rate of {bits:g} bits per weight, it has {', '.join(f'{b:g}' for b in BITS)}")
    return int(bits) if bits == int(bits) else bits


def stream_ends(bits: float) -> list[int]:
    """For each of a tile's 256 weights the position in the bit stream, in bits, where its state ends.

    Each weight adds `bits` of the stream; where that is half-integer, the weights add less and more in turn.
    """
    return [int(bits * (t + 1)) for t in range(TILE_SIZE)]


@lru_cache
def _tile_order(device: torch.device) -> torch.Tensor:
    """int64 `[256]`: the place in the stream of each element of a row-major tile.

    The stream follows the register order of a tensor core's 16x8 operand (PTX `mma.m16n8k16`), twice side by side.
    """
    t = torch.arange(TILE_SIZE, device=device)
    lane, j = t >> 3, t & 7
    row = 2 * (lane & 3) + (j & 1) + 8 * ((j >> 1) & 1)
    column = (lane >> 2) + 8 * (j >> 2)
    return torch.argsort(row * TILE + column)


def tiles_to_matrix(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles in stream order `[in/16, out/16, 256]` to the matrix `[in, out]` that they make up."""
    rows, columns, _ = tiles.shape
    tiles = tiles[..., _tile_order(tiles.device)].view(rows, columns, TILE, TILE)
    return tiles.transpose(1, 2).reshape(rows * TILE, columns * TILE)


def matrix_to_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix `[in, out]` cut into tiles in stream order `[in/16, out/16, 256]`."""
    rows, columns = matrix.shape[0] // TILE, matrix.shape[1] // TILE
    tiles = matrix.view(rows, TILE, columns, TILE).transpose(1, 2).reshape(rows, columns, TILE_SIZE)
    return tiles[..., torch.argsort(_tile_order(matrix.device))]


def unpack_states(trellis: torch.Tensor) -> torch.Tensor:
    """int16 `trellis` `[..., 16K]` to the int32 states `[..., 256]` of its tiles in stream order.

    The stream is the tile's little-endian 32-bit words, each from its most significant bit on. A weight's state is the
    16 bits that end where the weight's own bits end, the first of them the most significant, around the ring.
    """
    ends = torch.tensor(stream_ends(bits_of(trellis)), device=trellis.device)
    words = (trellis.to(torch.int32) & 0xFFFF).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    starts = (ends - STATE_BITS) % (words.shape[-1] * 16)
    first = starts >> 4
    pair = (words[..., first] << 16) | words[..., (first + 1) % words.shape[-1]]
    return (pair >> (16 - (starts & 15)).to(torch.int32)) & 0xFFFF


def pack_states(states: torch.Tensor, bits: float) -> torch.Tensor:
    """The states `[..., 256]` of tiles to their int16 trellis `[..., 16K]`, the inverse of `unpack_states`.

    The states must be those of a ring: each one the last shifted by the bits of its weight, the first following the last.
    """
    ends = torch.tensor(stream_ends(check_bits(bits)), device=states.device)
    word_ends = torch.arange(1, int(bits * TILE) + 1, device=states.device) * 16
    # A 16-bit word of the stream is cut from the first state that reaches its end and from the state before that.
    after = torch.searchsorted(ends, word_ends)
    too_long = ends[after] - word_ends
    before = torch.where(too_long > 0, after - 1, after)
    too_short = word_ends - ends[before]
    states = states.to(torch.int32)
    words = ((states[..., before] << too_short) & 0xFFFF) | (states[..., after] >> too_long)
    return words.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).to(torch.int16)


def check_codebook(codebook: str):
    """Raise `ValueError` for a codebook that the format does not have."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown EXL3 codebook {codebook!r}, the format has {', '.join(CODEBOOKS)}")


def exact_codebook_values(codebook: str, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """fp32 `[65536]`: `codebook_values` before they are rounded, exact."""
    check_codebook(codebook)
    states = torch.arange(NUM_STATES, dtype=torch.int64, device=device)
    if codebook == "mul1":
        product = states * MARKERS["mul1"]
        byte_sum = sum((product >> shift) & 0xFF for shift in (0, 8, 16, 24))
        return (1024 + byte_sum).float() * _MUL1_SCALE + _MUL1_OFFSET
    product = states * MARKERS["mcg"] if codebook == "mcg" else states * _3INST_MULTIPLIER + _3INST_ADDEND
    product = (product & _3INST_MASK) ^ _3INST_EXPONENTS
    halves = torch.stack((product & 0xFFFF, (product >> 16) & 0xFFFF))
    return halves.to(torch.int32).to(torch.int16).view(torch.float16).float().sum(0)


@lru_cache
def codebook_values(codebook: str, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """fp16 `[65536]`: the value of each state under `codebook`. Raises `ValueError` for an unknown codebook."""
    return exact_codebook_values(codebook, device).half()  # rounded once


def decode(trellis: torch.Tensor, codebook: str) -> torch.Tensor:
    """int16 `trellis` `[in/16, out/16, 16K]` to the inner matrix, fp16 `[in, out]`."""
    values = codebook_values(codebook, trellis.device)
    return tiles_to_matrix(values[unpack_states(trellis)])


def unpack_signs(packed: torch.Tensor) -> torch.Tensor:
    """int16 `su` or `sv` `[n/16]` of old files to the fp16 `suh` or `svh` `[n]`: a set bit is -1, from the lowest on."""
    bit = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(16, device=packed.device)) & 1
    return (1 - 2 * bit).flatten(-2).half()


def unpack_embedding_states(rings: torch.Tensor) -> torch.Tensor:
    """int16 rings `[..., 16K]` of an embedding table to int32 states `[..., 256]`.

    Unlike in linear layers, symbols of K bits stand in the 16-bit words from the lowest bit on, and the state of an
    element is its own symbol in the lowest bits with the symbols of the elements before it above.
    """
    bits = rings.shape[-1] // 16
    starts = torch.arange(EMBEDDING_GROUP, device=rings.device) * bits
    words = rings.to(torch.int32) & 0xFFFF
    first = starts >> 4
    pair = words[..., first] | (words[..., (first + 1) % words.shape[-1]] << 16)
    states = symbols = (pair >> (starts & 15).to(torch.int32)) & ((1 << bits) - 1)
    for back in range(1, -(-STATE_BITS // bits)):
        states = states | (symbols.roll(back, -1) << (back * bits))
    return states & 0xFFFF


def pack_embedding_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """The states `[..., 256]` of rings to their int16 words `[..., 16K]`, the inverse of `unpack_embedding_states`.

    The states must be those of a ring, as for `pack_states`: both packings are of the same code.
    """
    bit = (states.to(torch.int32).unsqueeze(-1) >> torch.arange(bits, device=states.device)) & 1
    words = bit.flatten(-2).unflatten(-1, (16 * bits, 16)) << torch.arange(16, device=states.device)
    return words.sum(-1).to(torch.int32).to(torch.int16)


def embedding_bits(trellis: torch.Tensor, signs: torch.Tensor) -> int:
    """Bits an element of a quantized embedding table, from the shapes of `trellis` `[vocab, G(1+16K)]` and `signs` `[G, 256]`.

    Raises `ValueError` where the shapes fit no table.
    """
    groups = signs.shape[0] if signs.dim() == 2 and signs.shape[-1] == EMBEDDING_GROUP else 0
    words, rest = divmod(trellis.shape[-1], groups) if groups and trellis.dim() == 2 else (0, 1)
    if rest or words < 17 or (words - 1) % 16 or (words - 1) // 16 not in BITS:
        raise ValueError(
            f"`trellis` {list(trellis.shape)} and `signs` {list(signs.shape)} are no EXL3 embedding table, whose shapes "
            f"are [vocab, G * (1 + 16K)] and [G, {EMBEDDING_GROUP}] for 1 <= K <= 8"
        )
    return (words - 1) // 16


def embedding_scales(trellis: torch.Tensor, groups: int) -> torch.Tensor:
    """fp16 `[..., G, 1]`: the scale of each ring in int16 rows `trellis` `[..., G(1+16K)]` of an embedding table."""
    return trellis.unflatten(-1, (groups, -1))[..., :1].contiguous().view(torch.float16)
