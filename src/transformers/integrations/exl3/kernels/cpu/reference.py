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
"""What `exl3_linear` computes for rows of 16 bits on every instruction set, in plain torch, to the byte."""

import torch

from ... import format
from ...format import hadamard


MATRIX_ROWS = 16  # of bfloat16 numbers, from which on AMX multiplies them
FUSED_ROWS = 2  # up to which a mul1 weight has inputs of 8 bits, or of two bytes that are signed numbers each
FUSED_INPUTS = {8: 127, 16: 127 * 256 + 127}
# Of mcg and 3inst a whole input times 8, the largest power of two of their fp16 numbers, has 16 bits.
LARGEST_INPUT = {"mul1": 32767, "mcg": 4095, "3inst": 4095}
# What a code stands for before it is rounded to fp16: `STEP * code + START`. Of mul1 it is the sum of four bytes, less the
# middle of all such sums, of the others the sum of two fp16 numbers in units of 2**-13.
STEP = {"mul1": 0.00676727294921875, "mcg": 2**-13, "3inst": 2**-13}
MIDDLE = {"mul1": 510, "mcg": 0, "3inst": 0}
START = {"mul1": (1024 + MIDDLE["mul1"]) * STEP["mul1"] - 10.3828125, "mcg": 0.0, "3inst": 0.0}
LARGEST_CODE = {"mul1": 510, "mcg": 2047 << 4, "3inst": 2047 << 4}


def codes(trellis: torch.Tensor, codebook: str) -> torch.Tensor:
    """The codes of a `trellis` `[in/16, out/16, 16K]`: float64 `[in, out]`, whole numbers of at most `LARGEST_CODE`."""
    states = format.tiles_to_matrix(format.unpack_states(trellis))
    values = format.exact_codebook_values(codebook)[states].double()
    return (values - START[codebook]) / STEP[codebook]


def scales_of(blocks: torch.Tensor, codebook: str, fused: int | None) -> torch.Tensor:
    """fp32 `[rows, in/128]`: what a whole input stands for in each of the `blocks` `[rows, in/128, 128]`."""
    if fused:
        return blocks.abs().amax(-1) / FUSED_INPUTS[fused]
    # So that products of the inputs, each rounded by up to a half, and of codes add up to less than 2**31.
    largest_sum = (2**31 - 1) // LARGEST_CODE[codebook] - format.BLOCK // 2 - 2
    sums = (blocks.double().abs().sum(-1) / largest_sum).float()
    return torch.maximum(blocks.abs().amax(-1) / LARGEST_INPUT[codebook], sums)


def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str = "mul1",
    input_bits: int = 16,
) -> torch.Tensor:
    """
    `x @ W + bias` with the rotated `x` rounded to whole numbers, block by block of 128 features with a scale of its own.

    Args:
        x (`torch.Tensor`): float16 or bfloat16 `[rows, in]`, finite.
        trellis, suh, svh, bias (`torch.Tensor`): As of `ops.linear`, without padding.
        codebook (`str`, *optional*, defaults to `"mul1"`): One of `format.CODEBOOKS`.
        input_bits (`int`, *optional*, defaults to 16): 8 or 16; counts for up to `FUSED_ROWS` rows and mul1.

    Returns:
        `torch.Tensor`: `[rows, out]`, of the dtype of `x`.
    """
    blocks = hadamard(x.float() * suh.float()).unflatten(1, (-1, format.BLOCK))
    is_fused = x.shape[0] <= FUSED_ROWS and codebook == "mul1"
    scales = scales_of(blocks, codebook, input_bits if is_fused else None)
    factors = (1 / scales).where(scales >= torch.finfo(torch.float32).tiny, 0)
    whole = (blocks * factors[..., None]).round()
    sums = torch.zeros(x.shape[0], svh.shape[0])
    total = torch.zeros(x.shape[0], 1)
    for block, weights in enumerate(codes(trellis, codebook).split(format.BLOCK)):
        scale = scales[:, block, None]
        sums += (whole[:, block].double() @ weights).float() * scale  # the products are exact
        total += whole[:, block].sum(-1, keepdim=True) * scale
    y = hadamard(sums * STEP[codebook] + total * START[codebook]) * svh.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def matrix_linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str = "mul1",
) -> torch.Tensor:
    """
    `x @ W + bias` with the rotated `x`, and codes less their middle, rounded to bfloat16: what AMX multiplies, whose sums are fp32.

    Args:
        x (`torch.Tensor`): bfloat16 `[rows, in]`.
        trellis, suh, svh, bias (`torch.Tensor`): As of `ops.linear`, without padding.
        codebook (`str`, *optional*, defaults to `"mul1"`): One of `format.CODEBOOKS`.

    Returns:
        `torch.Tensor`: bfloat16 `[rows, out]`.
    """
    rounded = hadamard(x.float() * suh.float()).bfloat16().double()
    sums = rounded @ codes(trellis, codebook).bfloat16().double()
    y = hadamard((sums * STEP[codebook] + rounded.sum(-1, keepdim=True) * START[codebook]).float()) * svh.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)
