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
"""How many bits each tensor gets: by patterns that name it, or by what an average that is no rate of the format leaves."""

import difflib
import heapq
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from . import format


PLAIN = 16  # the rate that stands for a weight that is not quantized
SUGGESTIONS = 3


def allocate_bits(
    sizes: dict[str, int], bits: float, codebook: str, noises: dict[str, float] | None = None
) -> dict[str, float]:
    """
    Choose a rate for each group of tensors so that the average is as close to `bits` as it gets without passing it.

    Coding at `K` bits adds noise of about `4^-K` of a tensor's energy. What that counts is measured where there is data: every
    group starts at the lowest rate, and bits are spent, step by step, where they take most noise each.

    Without data, what a linear map passes on of its noise does not depend on the map's size: a bit costs as many bits as a
    group has weights and takes the same share. So every group starts at the largest rate that `bits` covers, and what is left is
    spent in the same way: on small groups first, among equal ones on those near the ends of the list, where models are most
    sensitive.

    Args:
        sizes (`dict[str, int]`): Number of weights of each group, in the order of the model.
        bits (`float`): The average to meet, in bits per weight, from 1 to 8.
        codebook (`str`): One of `format.CODEBOOKS`; only mul1 has half-integer rates.
        noises (`dict[str, float]`, *optional*): What noise of its energy counts in each group, with any common factor.

    Returns:
        `dict[str, float]`: Bits per weight of each group.
    """
    rates = [rate for rate in format.BITS if codebook == "mul1" or rate == int(rate)]
    floor = max(index for index, rate in enumerate(rates) if rate <= bits) if noises is None else 0
    budget = (bits - rates[floor]) * sum(sizes.values())
    level = dict.fromkeys(sizes, floor)

    def candidate(position, name):
        now, then = rates[level[name]], rates[level[name] + 1]
        cost = (then - now) * sizes[name]
        gain = (noises[name] if noises else 1.0) * (4.0**-now - 4.0**-then) / cost
        return (-gain, min(position, len(sizes) - 1 - position), position, name, cost)

    queue = [candidate(*item) for item in enumerate(sizes)] if rates[floor] < bits else []
    heapq.heapify(queue)
    while queue:
        *_, position, name, cost = heapq.heappop(queue)
        if cost <= budget:
            budget -= cost
            level[name] += 1
            if level[name] + 1 < len(rates):
                heapq.heappush(queue, candidate(position, name))
    return {name: rates[index] for name, index in level.items()}


def override_bits(
    overrides: dict[str, float], units: dict[str, set[str]], codebook: str, plain: Iterable[str] = ()
) -> dict[str, float]:
    """
    The rates that patterns give to what they name.

    Args:
        overrides (`dict[str, float]`): Patterns for whole names, `*` for any characters and the others of `fnmatch`, to bits
            per weight, 16 for not quantized. Of several that match, the last counts.
        units (`dict[str, set[str]]`): What can be quantized, each with all names that it goes by.
        codebook (`str`): One of `format.CODEBOOKS`; only mul1 has half-integer rates.
        plain (`Iterable[str]`, *optional*): Names of modules that are left as they are for another reason.

    Returns:
        `dict[str, float]`: Bits per weight of those units that a pattern names.

    Raises:
        `ValueError`: For a pattern that names nothing to quantize, and for a rate that the codebook does not have.
    """
    bits = {}
    for pattern, rate in overrides.items():
        matched = [unit for unit, names in units.items() if any(fnmatchcase(name, pattern) for name in names)]
        if not matched:
            raise ValueError(f"`overrides` of Exl3Config: {pattern!r} {_why_unmatched(pattern, units, plain)}")
        if rate != int(rate) and codebook != "mul1":
            raise ValueError(
                f"`overrides` of Exl3Config: {pattern!r} asks for {rate} bits, which need the codebook `mul1`, not `{codebook}`."
            )
        bits |= dict.fromkeys(matched, rate)
    return bits


def _why_unmatched(pattern, units, plain):
    left = [name for name in plain if fnmatchcase(name, pattern)]
    if left:
        return (
            f"matches only modules that are not quantized whatever it says ({', '.join(left[:SUGGESTIONS])}): "
            "`head_bits`, `embedding_bits` and `modules_to_not_convert` tell about those."
        )
    known = sorted(set().union(*units.values()))
    endings = {"*." + name.split(".", up)[-1] for name in known for up in range(1, name.count(".") + 1)}
    # What could be meant by a name without a wildcard first: an ending.
    near = [f"*.{pattern}"] if f"*.{pattern}" in endings else []
    near += difflib.get_close_matches(pattern, [*known, *sorted(endings)], SUGGESTIONS)
    near = [repr(name) for name in dict.fromkeys(near)][:SUGGESTIONS]
    return "matches no layer that is quantized; a pattern has to match a whole name, " + (
        f"such as {', '.join(near)}." if near else f"such as {known[0]!r} or '*.{known[0].rpartition('.')[2]}'."
    )


def table_of_bits(bits: dict[str, float], sizes: dict[str, int]) -> str:
    """
    The rates as text: the average, and a line for each rate with the names that have it, those that differ in their first
    number together.

    Args:
        bits (`dict[str, float]`): Bits per weight by name.
        sizes (`dict[str, int]`): Number of weights by name.
    """
    average = sum(rate * sizes[name] for name, rate in bits.items()) / sum(sizes[name] for name in bits)
    lines = [f"{len(bits)} weights of {sum(sizes[name] for name in bits):,} elements, {average:.4g} bits on average:"]
    for rate in sorted(set(bits.values())):
        numbers: dict[tuple[str, ...], list[int]] = {}
        for name in (name for name in bits if bits[name] == rate):
            before, number, after = re.fullmatch(r"(\D*)(\d*)(.*)", name).groups()
            numbers.setdefault((before, after), []).append(int(number or -1))
        named = (f"{before}{_ranges(found)}{after}" for (before, after), found in numbers.items())
        lines.append(f"  {rate:g} bits: {', '.join(named)}")
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """`numbers` as in `0-3,5`; nothing for -1, which stands for no number."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs if b >= 0)
