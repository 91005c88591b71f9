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

The search is that of search.py. All sums are elementwise additions in a fixed order, so that the same weight, rate,
codebook and seed give the same bytes on every machine and on any number of threads. On a GPU they do as far as its arithmetic
is that of IEEE 754: there all of this but the search is PyTorch's, in float64 and float32, an operation a kernel.
"""

import math
import zlib
from collections.abc import Callable

import torch

from . import format
from .format import hadamard
from .search import INPUT_RMS, search_reference


STRIP_ELEMENTS = 1 << 19  # about as many weights are regularized and searched at a time: bounds the scratch memory
ACCELERATOR_STRIP_ELEMENTS = 1 << 22  # the same where there is more to be kept busy
BALANCE_ROUNDS = 10  # alternations of rows and columns that bring the energies of blocks together
# A ring of an embedding table has a scale of its own, and above 4 bits, where clipping costs most, it is brought to what its
# own peak suits: to this RMS, but no value beyond this peak. Against `INPUT_RMS` for all it saves 0.3 dB at 8 bits and 0.16 dB
# at 6 on N(0, 1); 0.2 to either side of the peak cost 0.03 dB at 6 bits.
RING_RMS, RING_PEAK = 0.92, 3.0
FP16_EXPONENT = 15  # scales start below 2**15, fp16 ends at 2**16: room for fitting them again


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
    effort: str = "default",
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
        effort (`str`, *optional*, defaults to `"default"`): One of `search.EFFORTS`.
        search (`Callable`, *optional*): `search_reference` or one that gives the same states faster.
        progress (`Callable`, *optional*): Called with the number of weights whenever some more are done.

    Returns:
        `tuple(torch.Tensor)`: `trellis` int16 `[in/16, out/16, 16K]`, `suh` fp16 `[in]` and `svh` fp16 `[out]`, with both
        sizes padded to multiples of 128. Channels of zeros, padding too, have the scale 0, and so have those that are too
        small for fp16.

    Raises:
        ValueError: For an unknown rate, codebook or effort, and for a weight that is no matrix, empty, of integers, has values that
            are not finite, or needs scales that are too large for fp16.
    """
    bits = format.check_bits(bits)
    rms = input_rms(bits, codebook)
    check_weight(weight)
    into, out = format.padded(weight.shape[1]), format.padded(weight.shape[0])
    suh, svh = (scale.double() for scale in scales(weight, rms, seed))
    values = format.codebook_values(codebook, weight.device).float()
    trellis = new_trellis(into, out, bits, weight.device)
    for start, strip in strips(weight):
        columns = slice(start, start + strip.shape[0])
        tiles = format.matrix_to_tiles(regular(strip, suh, svh[columns]))
        states = search(tiles.flatten(0, 1), bits, codebook, effort).view(tiles.shape)
        trellis[:, start // format.TILE : columns.stop // format.TILE] = format.pack_states(states, bits)
        decoded = hadamard(hadamard(format.tiles_to_matrix(values[states])).T.contiguous()).double() * suh
        svh[columns] = divide(_sum(decoded * strip, 1), _sum(decoded * decoded, 1))
        if progress is not None:
            progress(max(min(columns.stop, weight.shape[0]) - start, 0) * weight.shape[1])
    return trellis, to_fp16(suh), to_fp16(svh)


def quantize_embedding(
    weight: torch.Tensor,
    bits: int,
    seed: int = 0,
    effort: str = "default",
    search: Callable = search_reference,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize an embedding table without data: rows of rings of 256 elements, each with its scale, to be decoded one by one.

    Args:
        weight (`torch.Tensor`): `[vocab, hidden]`, of any floating dtype.
        bits (`int`): Bits per element, from 1 to 8. Rows are padded to multiples of 256 elements, which count.
        seed, effort, search, progress (*optional*): As in `quantize_weight`.

    Returns:
        `tuple(torch.Tensor)`: `trellis` int16 `[vocab, G(1+16K)]` and `signs` fp16 `[G, 256]`, with `G = ceil(hidden / 256)`.
        Rings of zeros have the scale 0, and so have those that are too small for fp16.

    Raises:
        ValueError: As `quantize_weight`, and for half-integer rates.
    """
    bits = format.check_bits(bits)
    if bits != int(bits):
        raise ValueError(f"EXL3 has no embedding tables of {bits:g} bits: the rate has to be a whole number")
    check_weight(weight)
    groups = -(-weight.shape[1] // format.EMBEDDING_GROUP)
    width = groups * format.EMBEDDING_GROUP
    signs = random_signs(width, seed, 0, weight.device)
    values = format.codebook_values("mul1", weight.device).float()
    trellis = torch.empty(weight.shape[0], groups, 1 + 16 * bits, dtype=torch.int16, device=weight.device)
    step = max(_strip_elements(weight) // width, 1)
    for start in range(0, weight.shape[0], step):
        rows = torch.nn.functional.pad(weight[start : start + step].detach().double(), (0, width - weight.shape[1]))
        rings = hadamard((rows * signs).view(-1, format.EMBEDDING_GROUP), format.EMBEDDING_GROUP)
        states = search(divide(rings, _ring_scales(rings, bits)).float(), bits, "mul1", effort)
        decoded = values[states].double()
        scales = to_fp16(divide(_sum(decoded * rings, 1), _sum(decoded * decoded, 1)))
        words = torch.cat((scales.view(torch.int16)[:, None], format.pack_embedding_states(states, bits)), 1)
        trellis[start : start + step] = words.unflatten(0, (-1, groups))
        if progress is not None:
            progress(rows.shape[0] * weight.shape[1])
    return trellis.flatten(1), signs.half().view(groups, format.EMBEDDING_GROUP)


def _ring_scales(rings, bits):
    """What float64 `rings` `[n, 256]` are divided by for the search, `[n, 1]`; 0 for rings of zeros."""
    peak = rings.abs().amax(1, True)
    rms = (_sum(divide(rings, peak).square(), 1)[:, None] / format.EMBEDDING_GROUP).sqrt()
    if bits <= 4:
        return peak * rms / INPUT_RMS["mul1"][bits]
    return torch.maximum(peak * rms / RING_RMS, peak / RING_PEAK)


def new_trellis(into, out, bits, device):
    shape = into // format.TILE, out // format.TILE, int(bits * format.TILE)
    return torch.empty(shape, dtype=torch.int16, device=device)


def input_rms(bits, codebook):
    format.check_codebook(codebook)
    return INPUT_RMS[codebook][bits]


def check_weight(weight):
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
    return max(_strip_elements(weight) // format.padded(weight.shape[1]) // format.BLOCK, 1) * format.BLOCK


def _strip_elements(weight):
    return STRIP_ELEMENTS if weight.device.type == "cpu" else ACCELERATOR_STRIP_ELEMENTS


def strips(weight, least=0):
    """
    The first row and the values, float64 padded with zeros `[rows, in]`, of all strips of `weight` `[out, in]`, which have
    `least` rows if there are as many.
    """
    step = max(_strip_rows(weight), least)
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


def divide(values, scales):
    """`values / scales`, and 0 where the scale is 0."""
    return torch.where(scales == 0, 0.0, values / torch.where(scales == 0, 1.0, scales))


def regular(strip, suh, svh):
    """The rows `strip` of a weight, float64 `[rows, in]`, without their scales and rotated, as they are searched: fp32 `[in, rows]`."""
    rotated = hadamard(divide(divide(strip, suh), svh[:, None]).float())
    return hadamard(rotated.T.contiguous())


def scales(weight, rms, seed, in_scale_of=lambda energy: energy.sqrt().sqrt()):
    """
    `suh` and `svh`, fp16, that bring `weight` to about `rms` in every block. `in_scale_of` takes the energies of input
    channels, float64 `[in]`, to scales that go with `suh` in each block.
    """
    largest = max(float(rows.abs().max()) for rows in weight.detach().split(_strip_rows(weight)))
    into, out = format.padded(weight.shape[1]), format.padded(weight.shape[0])
    if largest == 0:
        return tuple(torch.zeros(size, dtype=torch.float16, device=weight.device) for size in (into, out))
    # Energies are of `weight / largest`, whose squares neither overflow nor vanish.
    in_energy = torch.zeros(into, dtype=torch.float64, device=weight.device)
    out_energy = torch.zeros(out, dtype=torch.float64, device=weight.device)
    for start, strip in strips(weight):
        square = (strip / largest).square()
        in_energy += _sum(square, 0)
        out_energy[start : start + strip.shape[0]] = _sum(square, 1)
    # The square root of an RMS is the fourth root of an energy; the common factor is set right below.
    in_scale, out_scale = in_scale_of(in_energy), out_energy.sqrt().sqrt()
    energy = torch.zeros(into // format.BLOCK, out // format.BLOCK, dtype=torch.float64, device=weight.device)
    for start, strip in strips(weight):
        scaled = divide(divide(strip / largest, in_scale), out_scale[start : start + strip.shape[0], None])
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
        column_scale = divide(_sum(energy / row_scale[:, None].square(), 0), _sum(filled, 0)).sqrt()
        column_scale = torch.where(column_scale == 0, 1.0, column_scale)
        row_scale = divide(_sum(energy / column_scale.square(), 1), _sum(filled, 1)).sqrt()
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
    return to_fp16(suh * 2.0**shift), to_fp16(svh * 2.0 ** (exponent - shift))


def to_fp16(scale):
    rounded = scale.float().half()
    if not torch.isfinite(rounded).all():
        raise ValueError(f"a scale of {float(scale.abs().max()):g} is too large for fp16")
    return rounded
