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
The trellis search: the states of a tile whose values are nearest to its weights.

`search_reference` is its definition in plain torch. The compiled one of `kernels/cpu` and that of `kernels/triton`
return the same states. Costs are either fp32, added in a fixed order, or integers: the same tile gives the same states on
every machine.

| effort      | rates       | costs                  | boundary searched among  | loss on N(0, 1)          |
|-------------|-------------|------------------------|--------------------------|--------------------------|
| `"exact"`   | all         | fp32                   | all weights              | the yardstick            |
| `"default"` | up to 2     | 8 bits of 128 levels   | `BOUNDARY_WINDOWS`       | at most 0.05 dB          |
|             | up to 4     | 8 bits                 |                          |                          |
|             | more than 4 | 16 bits                |                          |                          |
| `"fast"`    | up to 4     | 8 bits of 128 levels   | `FAST_WINDOW`            | 0.2 to 0.5 dB            |
|             | more than 4 | 16 bits                |                          | 0.07 to 0.2 dB           |

Integer costs saturate where a weight is far from all values. Tiles whose path meets such a cost are searched again
with another range or, in the end, in fp32.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

from . import format


EFFORTS = ("default", "fast", "exact")

# The RMS of the matrix to code, in units of a codebook's values, at which the mean squared error relative to it is least:
# measured on samples of N(0, 1), 2**17 up to K=4 and 2**18 above, where it falls since the largest value of a codebook is
# only about 3.3 times its RMS. 0.05 beside it the error grows by 0.02 dB at K=2 and by 0.1 dB at K=8.
INPUT_RMS = {
    "mul1": {1: 1.14, 1.5: 1.04, 2: 1.0, 2.5: 0.97, 3: 0.95, 3.5: 0.93, 4: 0.91, 5: 0.88, 6: 0.85, 7: 0.81, 8: 0.77},
    "mcg": {1: 1.43, 1.5: 1.3, 2: 1.24, 2.5: 1.21, 3: 1.18, 3.5: 1.17, 4: 1.15, 5: 1.08, 6: 1.0, 7: 0.96, 8: 0.92},
    "3inst": {1: 1.43, 1.5: 1.3, 2: 1.24, 2.5: 1.21, 3: 1.18, 3.5: 1.16, 4: 1.14, 5: 1.08, 6: 1.0, 7: 0.96, 8: 0.92},
}

# The state between a tile's last and first weight is taken from a search of so many of its last and of its first weights,
# by the largest rate that they are for. Multiples of 8, since the compiled search goes back in strides of up to 8. Measured
# on 131 072 samples of N(0, 1), 8 fewer lose from 0.002 dB at K=8 to 0.015 dB at K=3.
BOUNDARY_WINDOWS = {2: 80, 3: 56, 5: 48, 8: 32}
EXACT_WINDOW = format.TILE_SIZE // 2
FAST_WINDOW = 8  # 16 lose half as much at K=1 to 3, and take 3 % longer

# Up to so many bits the values are rounded to 128 levels, whose costs AVX-512 looks up in one operation. It loses 0.001 dB
# at K=1, 0.018 at K=2, 0.06 at K=3 and 0.27 at K=4.
LEVELS = 128
COARSE_BITS = {"default": 2, "fast": 4}

# Integer costs, see `word_scale`.
BYTE_COST_BITS = 4  # up to so many bits costs have 8 bits, above 16, of which a vector holds half as many
# The largest cost in units of the mean squared error, first of all tiles and then of those that saturated. Of the first, 40
# and less lose up to 0.09 dB at K=4, 80 loses 0.005 dB more than 50. 256 of 16-bit costs lose 0.003 dB by rounding.
BYTE_COST_RANGES, WORD_COST_RANGES = (64, 256), (256,)
MEAN_ERROR = 1.1  # the mean squared error of a search up to 4 bits in units of the least possible, 4**-K
WORD_LIMIT = 2**15 - 1
DIFFERENCE_LIMIT = 255  # the largest number whose square has 16 bits

REFERENCE_TILES = 8  # tiles that the reference searches at a time, each with 256 KiB for every intermediate


def search(tiles: torch.Tensor, bits: float, codebook: str, effort: str, kernel: Callable) -> torch.Tensor:
    """`search_reference` by way of `kernel`, which does what `reference_kernel` does."""
    bits = format.check_bits(bits)
    if effort not in EFFORTS:
        raise ValueError(f"unknown effort {effort!r}: there are {', '.join(EFFORTS)}")
    values = format.codebook_values(codebook, tiles.device).float()
    window = window_of(bits, effort)
    if effort == "exact":
        return kernel(tiles, values, None, bits, window)
    states = torch.full(tiles.shape, -1, dtype=torch.int32, device=tiles.device)
    left = torch.arange(len(tiles), device=tiles.device)
    for cost_range in BYTE_COST_RANGES if bits <= BYTE_COST_BITS else WORD_COST_RANGES:
        words = _to_words(tiles[left], word_scale(bits, codebook, cost_range))
        value_words = _value_words(bits, codebook, cost_range, bits <= COARSE_BITS[effort], tiles.device)
        states[left] = kernel(words, *value_words, bits, window)
        left = left[(states[left, 0] < 0) | (words.abs() == WORD_LIMIT).any(1)]
    states[left] = kernel(tiles[left], values, None, bits, window)
    return states


def window_of(bits: float, effort: str) -> int:
    """The weights on either side of a ring's boundary among which the state there is searched."""
    if effort != "default":
        return EXACT_WINDOW if effort == "exact" else FAST_WINDOW
    return next(window for largest, window in BOUNDARY_WINDOWS.items() if bits <= largest)


def saturated_cost(bits: float) -> int:
    """The largest integer cost at a rate."""
    return 2**8 - 1 if bits <= BYTE_COST_BITS else DIFFERENCE_LIMIT**2


def word_scale(bits: float, codebook: str, cost_range: int) -> float:
    """What tiles and values are multiplied by for a search with integer costs.

    The square of a difference of these words, shifted right by 16 bits for 8-bit costs, is then a cost, and the largest
    cost is `cost_range` times the mean squared error to expect.
    """
    unit = 2**16 if bits <= BYTE_COST_BITS else 1
    error = MEAN_ERROR * 4**-bits * INPUT_RMS[codebook][bits] ** 2
    return (unit * saturated_cost(bits) / (cost_range * error)) ** 0.5


def _to_words(numbers, scale):
    return (numbers * scale).round().clamp(-WORD_LIMIT, WORD_LIMIT).short()


@lru_cache
def _value_words(bits, codebook, cost_range, are_coarse, device):
    """The values of the states as words, and the levels that they are rounded to, evenly spaced, if `are_coarse`."""
    words = _to_words(format.codebook_values(codebook, device).float(), word_scale(bits, codebook, cost_range))
    if not are_coarse:
        return words, None
    low, high = words.int().aminmax()
    width, steps = high - low, LEVELS - 1
    levels = (low + (torch.arange(LEVELS, device=device) * width + steps // 2) // steps).short()
    return levels[((words.int() - low) * steps + width // 2) // width], levels


def search_reference(tiles: torch.Tensor, bits: float, codebook: str, effort: str = "default") -> torch.Tensor:
    """The states whose values are nearest to `tiles`, by a Viterbi search of the ring that each tile is.

    Args:
        tiles (`torch.Tensor`): fp32 `[n, 256]`, in stream order and in units of the codebook's values, finite.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.
        effort (`str`, *optional*, defaults to `"default"`): One of `EFFORTS`.

    Returns:
        `torch.Tensor`: int32 `[n, 256]`, to be packed by `format.pack_states`.

    Raises:
        ValueError: For an unknown rate, codebook or effort.
    """
    return search(tiles, bits, codebook, effort, reference_kernel)


def reference_kernel(
    tiles: torch.Tensor, values: torch.Tensor, levels: torch.Tensor | None, bits: float, window: int
) -> torch.Tensor:
    """The search of rings with one kind of costs.

    A ring has no end to search from. So first the state between its last and its first weight is found: the cheapest path
    through the last and the first `window` weights, free at both ends, is taken to pass it rightly. Then the cheapest path
    is searched that starts and ends there.

    Args:
        tiles (`torch.Tensor`): `[n, 256]`, of fp32 for fp32 costs, of int16 for integer costs.
        values (`torch.Tensor`): `[65536]`, what states decode to, of the dtype of `tiles`.
        levels (`torch.Tensor` or `None`): int16 `[128]` in order, if `values` has no others. It only helps the kernel for CPUs.
        bits (`float`): Bits per weight, one of `format.BITS`.
        window (`int`): A multiple of 8, at most 128.

    Returns:
        `torch.Tensor`: int32 `[n, 256]`. In tiles whose integer costs saturated on the path that was taken, which may be far
        from the best then, the first state is -1.
    """
    states = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device)
    ends = format.stream_ends(bits)
    added = [ends[0], ends[1] - ends[0]]  # bits that even and odd weights add to the stream
    for some, result in zip(tiles.split(REFERENCE_TILES), states.split(REFERENCE_TILES)):
        around = some.roll(window, 1)[:, : 2 * window]
        path, saturated = _cheapest_path(around, added, values, first=window)
        boundary = path[:, window] >> added[0]
        path, saturated_again = _cheapest_path(some, added, values, boundary)
        path[:, 0].masked_fill_(saturated | saturated_again, -1)
        result.copy_(path)
    return states


def _cheapest_path(weights, added, values, boundary=None, first=0):
    """The states `[n, steps]` of the cheapest path along `weights` `[n, steps]`, from and to the nodes `boundary` `[n]`.

    Between two weights stands a node: the bits that their states share. A step of `shift` bits leads from node
    `state >> shift` to the low bits of `state`; the high bits, which the next step shifts out, are the choice to make.
    The cost of a node is `min(cost[state >> shift] + (values[state] - weight)**2)`, each operation rounded to fp32 or
    saturated, and of equal costs that of the smallest state counts. From integer costs the least cost of the step before is
    subtracted, but not from saturated ones. Whether one of these is on the path from step `first` on is also returned.
    """
    rows, steps = weights.shape
    node_bits = format.STATE_BITS - added[0]
    is_word = values.dtype is torch.int16
    unreached = saturated_cost(sum(added) / 2) if is_word else float("inf")
    cost = torch.zeros(rows, 1 << node_bits, dtype=torch.int32 if is_word else torch.float32, device=weights.device)
    if boundary is not None:
        cost.fill_(unreached).scatter_(1, boundary[:, None].long(), 0)
    choices, saturations = [], []
    for step in range(steps):
        shift, choice_bits = added[step % 2], added[(step + 1) % 2]
        metric = _squared_differences(values, weights[:, step, None], unreached)
        candidates = (cost.repeat_interleave(1 << shift, 1) + metric).clamp_(max=unreached)
        candidates = candidates.unflatten(1, (1 << choice_bits, -1))
        offset, cost = cost.amin(1, True), candidates.amin(1)
        index = torch.arange(1 << choice_bits, dtype=torch.uint8, device=weights.device)[:, None]
        choices.append(torch.where(candidates == cost[:, None], index, index[-1:]).amin(1))
        if is_word:
            saturations.append(cost == unreached)
            cost = torch.where(saturations[-1], unreached, (cost - offset).clamp_(min=0))
    # The smallest index, which argmin does not promise.
    nodes = torch.arange(1 << node_bits, device=weights.device)
    last = torch.where(cost == cost.amin(1, True), nodes, nodes[-1]).amin(1)
    node = last if boundary is None else boundary.long()
    states = torch.empty(rows, steps, dtype=torch.int32, device=weights.device)
    saturated = torch.zeros(rows, dtype=torch.bool, device=weights.device)
    for step in reversed(range(first, steps)):
        if is_word:
            saturated |= saturations[step].gather(1, node[:, None]).squeeze(1)
        choice = choices[step].gather(1, node[:, None]).squeeze(1).long()
        state = (choice << (format.STATE_BITS - added[(step + 1) % 2])) | node
        states[:, step] = state
        node = state >> added[step % 2]
    return states, saturated


def _squared_differences(values, weights, largest):
    """What each state costs, up to `largest`."""
    if values.dtype is not torch.int16:
        return (values - weights).square()
    difference = (values.int() - weights.int()).abs_()
    if largest < DIFFERENCE_LIMIT**2:
        return difference.clamp_(max=WORD_LIMIT).square_() >> 16
    return difference.clamp_(max=DIFFERENCE_LIMIT).square_()
