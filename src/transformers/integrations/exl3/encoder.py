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
Quantizing a weight to EXL3 without data: regularize the matrix, then search the trellis of each of its tiles.

`search_reference` is the definition of the search in plain torch. The compiled one of `kernels/cpu.cpp` does the same
operations in fp32 and returns the same states. All sums are elementwise additions in a fixed order, so that the same
weight, rate, codebook and seed give the same bytes on every machine and on any number of threads.
"""

import math
import zlib
from collections.abc import Callable

import torch

from . import format
from .hadamard import hadamard


# The RMS of the matrix to code, in units of a codebook's values, at which the mean squared error relative to it is least:
# measured on samples of N(0, 1), 2**17 up to K=4 and 2**18 above, where it falls since the largest value of a codebook is
# only about 3.3 times its RMS. 0.05 beside it the error grows by 0.02 dB at K=2 and by 0.1 dB at K=8.
INPUT_RMS = {
    "mul1": {1: 1.14, 1.5: 1.04, 2: 1.0, 2.5: 0.97, 3: 0.95, 3.5: 0.93, 4: 0.91, 5: 0.88, 6: 0.85, 7: 0.81, 8: 0.77},
    "mcg": {1: 1.43, 1.5: 1.3, 2: 1.24, 2.5: 1.21, 3: 1.18, 3.5: 1.17, 4: 1.15, 5: 1.08, 6: 1.0, 7: 0.96, 8: 0.92},
    "3inst": {1: 1.43, 1.5: 1.3, 2: 1.24, 2.5: 1.21, 3: 1.18, 3.5: 1.16, 4: 1.14, 5: 1.08, 6: 1.0, 7: 0.96, 8: 0.92},
}

# The state between a tile's last and first weight is taken from a search of its last and first 80 weights. All 128 take a
# quarter longer and lower the error by 0.02 dB at K=1 and 0.01 dB above; 64 of them would raise it by as much again.
BOUNDARY_WINDOW = 80

STRIP_ELEMENTS = 1 << 19  # about as many weights are regularized and searched at a time: bounds the scratch memory
REFERENCE_TILES = 8  # tiles that the reference searches at a time, each with 256 KiB for every intermediate
BALANCE_ROUNDS = 10  # alternations of rows and columns that bring the energies of blocks together
FP16_EXPONENT = 15  # scales start below 2**15, fp16 ends at 2**16: room for fitting them again


def search_reference(tiles: torch.Tensor, bits: float, codebook: str) -> torch.Tensor:
    """The states whose values are nearest to `tiles`, by exact Viterbi search of the ring that each tile is.

    A ring has no end to search from. So first the state between its last and its first weight is found: the cheapest path
    through the last and the first `BOUNDARY_WINDOW` weights, free at both ends, is taken to pass it rightly. Then the
    cheapest path is searched that starts and ends there.

    Args:
        tiles (`torch.Tensor`): fp32 `[n, 256]`, in stream order and in units of the codebook's values, finite.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.

    Returns:
        `torch.Tensor`: int32 `[n, 256]`, to be packed by `format.pack_states`.

    Raises:
        ValueError: For an unknown rate or codebook.
    """
    values = format.codebook_values(codebook, tiles.device).float()
    states = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device)
    ends = format.stream_ends(format.check_bits(bits))
    added = [ends[0], ends[1] - ends[0]]  # bits that even and odd weights add to the stream
    for some, result in zip(tiles.split(REFERENCE_TILES), states.split(REFERENCE_TILES)):
        around = some.roll(BOUNDARY_WINDOW, 1)[:, : 2 * BOUNDARY_WINDOW]
        boundary = _cheapest_path(around, added, values)[:, BOUNDARY_WINDOW] >> added[0]
        result.copy_(_cheapest_path(some, added, values, boundary))
    return states


def _cheapest_path(weights, added, values, boundary=None):
    """The states `[n, steps]` of the cheapest path along `weights` `[n, steps]`, from and to the nodes `boundary` `[n]`.

    Between two weights stands a node: the bits that their states share. A step of `shift` bits leads from node
    `state >> shift` to the low bits of `state`; the high bits, which the next step shifts out, are the choice to make.
    The cost of a node is `min(cost[state >> shift] + (values[state] - weight)**2)`, each operation rounded to fp32, and
    of equal costs that of the smallest state counts.
    """
    rows, steps = weights.shape
    node_bits = format.STATE_BITS - added[0]
    cost = torch.zeros(rows, 1 << node_bits, device=weights.device)
    if boundary is not None:
        cost.fill_(float("inf")).scatter_(1, boundary[:, None].long(), 0)
    choices = []
    for step in range(steps):
        shift, choice_bits = added[step % 2], added[(step + 1) % 2]
        difference = values - weights[:, step, None]
        candidates = cost.repeat_interleave(1 << shift, 1) + difference * difference
        candidates = candidates.unflatten(1, (1 << choice_bits, -1))
        cost = candidates.amin(1)
        index = torch.arange(1 << choice_bits, dtype=torch.uint8, device=weights.device)[:, None]
        choices.append(torch.where(candidates == cost[:, None], index, index[-1:]).amin(1))
    # The smallest index, which argmin does not promise.
    nodes = torch.arange(1 << node_bits, device=weights.device)
    last = torch.where(cost == cost.amin(1, True), nodes, nodes[-1]).amin(1)
    node = last if boundary is None else boundary.long()
    states = torch.empty(rows, steps, dtype=torch.int32, device=weights.device)
    for step in reversed(range(steps)):
        choice = choices[step].gather(1, node[:, None]).squeeze(1).long()
        state = (choice << (format.STATE_BITS - added[(step + 1) % 2])) | node
        states[:, step] = state
        node = state >> added[step % 2]
    return states


def seed_of(name: str) -> int:
    """The seed of the random signs of the module `name`."""
    return zlib.crc32(name.encode())


def random_signs(count: int, seed: int, side: int, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """Random signs that depend on nothing but the arguments, whatever the version of torch.

    Sign `i` is the lowest bit of `hash(hash(2 * seed + side) + i)`, 1 for minus, where `hash` is a bijection of 32-bit
    numbers (github.com/skeeto/hash-prospector, 16-bit shift and multipliers 21f0aaad and 735a2d97).

    Args:
        count (`int`): How many.
        seed (`int`): Any number, of which the lowest 31 bits count.
        side (`int`): 0 for the input features, 1 for the output features.

    Returns:
        `torch.Tensor`: float64 `[count]`.
    """
    start = _hash(torch.tensor((2 * seed + side) & 0xFFFFFFFF, device=device))
    return 1.0 - 2.0 * (_hash(start + torch.arange(count, device=device)) & 1).double()


def _hash(number):
    number = number & 0xFFFFFFFF
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        number = ((number ^ (number >> shift)) * multiplier) & 0xFFFFFFFF
    return number ^ (number >> 15)


def quantize_weight(
    weight: torch.Tensor,
    bits: float,
    codebook: str = "mul1",
    seed: int = 0,
    search: Callable = search_reference,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the weight of a linear layer without data.

    The scales are those of the least squared error. Channels of one 128x128 block are mixed by the rotation, where scales
    that go with the square root of the channels' RMS are best (Cauchy-Schwarz). Blocks are not mixed, so that each block
    row and block column is brought to the RMS that suits the codebook. `svh` is fitted again to the result.

    Args:
        weight (`torch.Tensor`): `[out, in]`, as in `nn.Linear`, of any floating dtype and any size.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`, *optional*, defaults to `"mul1"`): One of `format.CODEBOOKS`.
        seed (`int`, *optional*, defaults to 0): Of the random signs; see `seed_of`.
        search (`Callable`, *optional*): `search_reference` or one that gives the same states faster.
        progress (`Callable`, *optional*): Called with the number of weights whenever some more are done.

    Returns:
        `tuple(torch.Tensor)`: `trellis` int16 `[in/16, out/16, 16K]`, `suh` fp16 `[in]` and `svh` fp16 `[out]`, with both
        sizes padded to multiples of 128. Channels of zeros, padding too, have the scale 0, and so have those that are too
        small for fp16.

    Raises:
        ValueError: For an unknown rate or codebook, and for a weight that is no matrix, empty, of integers, has values that
            are not finite, or needs scales that are too large for fp16.
    """
    bits = format.check_bits(bits)
    rms = _input_rms(bits, codebook)
    _check(weight)
    into, out = format.padded(weight.shape[1]), format.padded(weight.shape[0])
    suh, svh = (scale.double() for scale in _scales(weight, rms, seed))
    values = format.codebook_values(codebook, weight.device).float()
    words = int(bits * format.TILE)
    trellis = torch.empty(into // format.TILE, out // format.TILE, words, dtype=torch.int16, device=weight.device)
    for start, strip in _strips(weight):
        columns = slice(start, start + strip.shape[0])
        regular = hadamard(_divide(_divide(strip, suh), svh[columns, None]).float())
        regular = hadamard(regular.T.contiguous())
        tiles = format.matrix_to_tiles(regular)
        states = search(tiles.flatten(0, 1), bits, codebook).view(tiles.shape)
        trellis[:, start // format.TILE : columns.stop // format.TILE] = format.pack_states(states, bits)
        decoded = hadamard(hadamard(format.tiles_to_matrix(values[states])).T.contiguous()).double() * suh
        svh[columns] = _divide(_sum(decoded * strip, 1), _sum(decoded * decoded, 1))
        if progress is not None:
            progress(max(min(columns.stop, weight.shape[0]) - start, 0) * weight.shape[1])
    return trellis, _to_fp16(suh), _to_fp16(svh)


def _input_rms(bits, codebook):
    if codebook not in INPUT_RMS:
        raise ValueError(f"unknown EXL3 codebook {codebook!r}, the format has {', '.join(format.CODEBOOKS)}")
    return INPUT_RMS[codebook][bits]


def _check(weight):
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"EXL3 quantizes matrices of floating point numbers, this is {list(weight.shape)} of {weight.dtype}"
        )
    bad, first = 0, None
    for start, rows in enumerate(weight.split(_strip_rows(weight))):
        wrong = ~torch.isfinite(rows)
        count = int(wrong.sum())
        if count and first is None:
            row, column = wrong.nonzero()[0].tolist()
            first = f"[{start * _strip_rows(weight) + row}, {column}]"
        bad += count
    if bad:
        raise ValueError(f"{bad} of {weight.numel()} values are not finite, the first of them at {first}")


def _strip_rows(weight):
    """How many rows of `weight` are worked on at a time: whole blocks."""
    return max(STRIP_ELEMENTS // format.padded(weight.shape[1]) // format.BLOCK, 1) * format.BLOCK


def _strips(weight):
    """The first row and the values, float64 padded with zeros `[rows, in]`, of all strips of `weight` `[out, in]`."""
    step = _strip_rows(weight)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].detach().double()
        right, below = (format.padded(size) - size for size in (rows.shape[1], rows.shape[0]))
        yield start, torch.nn.functional.pad(rows, (0, right, 0, below))


def _sum(values, dim):
    """The sum along `dim` as a tree of elementwise additions, in an order that depends on the length alone."""
    values = values.movedim(dim, 0)
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        folded = values[:half] + values[half : 2 * half]
        values = torch.cat((folded, values[2 * half :])) if values.shape[0] % 2 else folded
    return values[0]


def _divide(values, scales):
    """`values / scales`, and 0 where the scale is 0."""
    return torch.where(scales == 0, 0.0, values / torch.where(scales == 0, 1.0, scales))


def _scales(weight, rms, seed):
    """`suh` and `svh`, fp16, that bring `weight` to about `rms` in every block."""
    largest = max(float(rows.abs().max()) for rows in weight.detach().split(_strip_rows(weight)))
    into, out = format.padded(weight.shape[1]), format.padded(weight.shape[0])
    if largest == 0:
        return tuple(torch.zeros(size, dtype=torch.float16, device=weight.device) for size in (into, out))
    # Energies are of `weight / largest`, whose squares neither overflow nor vanish.
    in_energy = torch.zeros(into, dtype=torch.float64, device=weight.device)
    out_energy = torch.zeros(out, dtype=torch.float64, device=weight.device)
    for start, strip in _strips(weight):
        square = (strip / largest).square()
        in_energy += _sum(square, 0)
        out_energy[start : start + strip.shape[0]] = _sum(square, 1)
    # The square root of an RMS is the fourth root of an energy; the common factor is set right below.
    in_scale, out_scale = in_energy.sqrt().sqrt(), out_energy.sqrt().sqrt()
    energy = torch.zeros(into // format.BLOCK, out // format.BLOCK, dtype=torch.float64, device=weight.device)
    for start, strip in _strips(weight):
        scaled = _divide(_divide(strip / largest, in_scale), out_scale[start : start + strip.shape[0], None])
        blocks = scaled.square().unflatten(1, (-1, format.BLOCK)).unflatten(0, (-1, format.BLOCK))
        first = start // format.BLOCK
        energy[:, first : first + blocks.shape[0]] = _sum(_sum(blocks, 3), 1).T
    in_block, out_block = _balance(energy / format.BLOCK**2)
    in_scale = in_scale * in_block.repeat_interleave(format.BLOCK) / rms
    out_scale = out_scale * out_block.repeat_interleave(format.BLOCK)
    signs = [random_signs(size, seed, side, weight.device) for side, size in enumerate((into, out))]
    return _split_magnitude(in_scale * signs[0], out_scale * signs[1], largest)


def _balance(energy):
    """Scales of the rows and of the columns that bring the mean energy of each row's and column's blocks to 1.

    `energy` `[rows, columns]` are the mean squares of blocks. Blocks of zeros do not count.
    """
    row_scale, column_scale = (torch.ones_like(_sum(energy, dim)) for dim in (1, 0))
    filled = (energy > 0).double()
    for _ in range(BALANCE_ROUNDS):
        column_scale = _divide(_sum(energy / row_scale[:, None].square(), 0), _sum(filled, 0)).sqrt()
        column_scale = torch.where(column_scale == 0, 1.0, column_scale)
        row_scale = _divide(_sum(energy / column_scale.square(), 1), _sum(filled, 1)).sqrt()
        row_scale = torch.where(row_scale == 0, 1.0, row_scale)
    return row_scale, column_scale


def _split_magnitude(suh, svh, factor):
    """`suh` and `svh` in fp16 whose products are those of the given ones times `factor`, which powers of two share out.

    The middle of the range of either is brought to the same power of two, as far as fp16 holds the largest then.
    """
    mantissa, exponent = math.frexp(factor)
    suh = suh * mantissa
    low, high = zip(*(torch.frexp(scale[scale != 0]).exponent.aminmax() for scale in (suh, svh)))
    low, high = [int(end) for end in low], [int(end) for end in high]
    if exponent + sum(high) > 2 * FP16_EXPONENT:
        raise ValueError(f"values of up to {factor:g} need scales that are too large for fp16")
    shift = (exponent + (low[1] + high[1] - low[0] - high[0]) // 2) // 2
    shift = min(max(shift, exponent + high[1] - FP16_EXPONENT), FP16_EXPONENT - high[0])
    return _to_fp16(suh * 2.0**shift), _to_fp16(svh * 2.0 ** (exponent - shift))


def _to_fp16(scale):
    rounded = scale.float().half()
    if not torch.isfinite(rounded).all():
        raise ValueError(f"a scale of {float(scale.abs().max()):g} is too large for fp16")
    return rounded
