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
"""How many bits each tensor gets when the average is not a rate that the format has."""

import heapq

from . import format


def allocate_bits(sizes: dict[str, int], bits: float, codebook: str) -> dict[str, float]:
    """
    Choose a rate for each group of tensors so that the average is as close to `bits` as it gets without passing it.

    The rule needs no data. Coding at `K` bits adds noise of about `4^-K` of a tensor's energy, and what a linear map passes
    on of it does not depend on the map's size: a bit costs as many bits as a group has weights and takes the same share of
    its noise. So every group starts at the largest rate that `bits` covers, and what is left is spent, step by step, where
    it takes most noise per bit: on small groups first, among equal ones on those near the ends of the list, where models
    are most sensitive.

    Args:
        sizes (`dict[str, int]`): Number of weights of each group, in the order of the model.
        bits (`float`): The average to meet, in bits per weight, from 1 to 8.
        codebook (`str`): One of `format.CODEBOOKS`; only mul1 has half-integer rates.

    Returns:
        `dict[str, float]`: Bits per weight of each group.
    """
    rates = [rate for rate in format.BITS if codebook == "mul1" or rate == int(rate)]
    floor = max(index for index, rate in enumerate(rates) if rate <= bits)
    budget = (bits - rates[floor]) * sum(sizes.values())
    level = dict.fromkeys(sizes, floor)

    def candidate(position, name):
        now, then = rates[level[name]], rates[level[name] + 1]
        cost = (then - now) * sizes[name]
        gain = (4.0**-now - 4.0**-then) / cost
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
