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
"""The blockwise Hadamard rotation."""

import torch

from .format import BLOCK


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
