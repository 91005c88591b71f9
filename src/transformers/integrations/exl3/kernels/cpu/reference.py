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
"""What the fused product of `linear.h` computes for one or two rows and a mul1 weight, in plain torch, to the byte."""

import torch

from ... import format
from ...hadamard import hadamard


# Of a byte, and of a number whose two bytes are signed numbers each.
LARGEST_INPUTS = {8: 127, 16: 127 * 256 + 127}
# What a code stands for before it is rounded to fp16: `STEP * code + START`, where a code is the sum of the four bytes.
STEP = 0.00676727294921875
START = 1024 * STEP - 10.3828125


def codes(trellis: torch.Tensor) -> torch.Tensor:
    """The codes of a mul1 `trellis` `[in/16, out/16, 16K]`: float64 `[in, out]`, whole numbers from 0 to 1020."""
    return ((format.decode(trellis, "mul1").double() - START) / STEP).round()


def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    input_bits: int,
) -> torch.Tensor:
    """
    `x @ W + bias` with the rotated `x` rounded to whole numbers, block by block of 128 features with a scale of its own.

    Args:
        x (`torch.Tensor`): float16 or bfloat16 `[rows, in]`, finite, each block with something above zero.
        trellis, suh, svh, bias (`torch.Tensor`): As of `ops.linear`, without padding; the codebook is mul1.
        input_bits (`int`): 8 or 16.

    Returns:
        `torch.Tensor`: `[rows, out]`, of the dtype of `x`.
    """
    blocks = hadamard(x.float() * suh.float()).unflatten(1, (-1, format.BLOCK))
    scales = blocks.abs().amax(-1) / LARGEST_INPUTS[input_bits]
    whole = (blocks * (1 / scales)[..., None]).round()
    sums = torch.zeros(x.shape[0], svh.shape[0])
    total = torch.zeros(x.shape[0], 1)
    for block, weights in enumerate(codes(trellis).split(format.BLOCK)):
        scale = scales[:, block, None]
        sums += (whole[:, block].double() @ weights).float() * scale  # the products are exact
        total += whole[:, block].sum(-1, keepdim=True) * scale
    y = hadamard(sums * STEP + total * START) * svh.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)
