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
The operators that encode, and the choice of the search that they use.

| operator                    | computes                                                                          |
|-----------------------------|-----------------------------------------------------------------------------------|
| `exl3::encode`              | trellis and scales of a weight                                                    |
| `exl3::encode_embedding`    | rings and signs of an embedding table                                             |
"""

from collections.abc import Callable

import torch

from . import encoder, feedback, format
from .kernels import cpu
from .kernels.triton import gpu


@torch.library.custom_op("exl3::encode", mutates_args=())
def encode(
    weight: torch.Tensor, bits: float, codebook: str, seed: int, effort: str = "default"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Quantize a weight without data.

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`, floating, of any size.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.
        seed (`int`): Of the random signs.
        effort (`str`, *optional*, defaults to `"default"`): One of `search.EFFORTS`.

    Returns:
        `tuple(torch.Tensor)`: `trellis` int16 `[in/16, out/16, 16K]`, `suh` fp16 `[in]` and `svh` fp16 `[out]`.
    """
    return encode_with_progress(weight, bits, codebook, seed, effort)


@encode.register_fake
def _(weight, bits, codebook, seed, effort="default"):
    out, into = (format.padded(features) for features in weight.shape)
    trellis = weight.new_empty(into // format.TILE, out // format.TILE, int(bits * format.TILE), dtype=torch.int16)
    return trellis, weight.new_empty(into, dtype=torch.float16), weight.new_empty(out, dtype=torch.float16)


def encode_with_progress(weight, bits, codebook, seed, effort="default", progress=None, moments=None):
    """`encode`, calling `progress(n)` whenever `n` more weights are done; with the `Moments` of inputs as feedback.py has it."""
    search = search_on(weight.device)
    if moments is None:
        return encoder.quantize_weight(weight, bits, codebook, seed, effort, search, progress)
    return feedback.quantize_weight(weight, moments, bits, codebook, seed, effort, search, progress)


@torch.library.custom_op("exl3::encode_embedding", mutates_args=())
def encode_embedding(
    weight: torch.Tensor, bits: int, seed: int, effort: str = "default"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantize an embedding table without data.

    Args:
        weight (`torch.Tensor`): `[vocab, hidden]`, floating.
        bits (`int`): Bits per element, from 1 to 8.
        seed (`int`): Of the random signs.
        effort (`str`, *optional*, defaults to `"default"`): One of `search.EFFORTS`.

    Returns:
        `tuple(torch.Tensor)`: `trellis` int16 `[vocab, G(1+16K)]` and `signs` fp16 `[G, 256]`, as `embedding` takes them.
    """
    return encode_embedding_with_progress(weight, bits, seed, effort)


@encode_embedding.register_fake
def _(weight, bits, seed, effort="default"):
    groups = -(-weight.shape[1] // format.EMBEDDING_GROUP)
    trellis = weight.new_empty(weight.shape[0], groups * (1 + format.TILE * bits), dtype=torch.int16)
    return trellis, weight.new_empty(groups, format.EMBEDDING_GROUP, dtype=torch.float16)


def encode_embedding_with_progress(weight, bits, seed, effort="default", progress=None):
    """`encode_embedding`, calling `progress(n)` whenever `n` more elements are done."""
    return encoder.quantize_embedding(weight, bits, seed, effort, search_on(weight.device), progress)


def search_on(device: torch.device) -> Callable:
    """The fastest search for tiles on `device` that there is, with the signature and the states of `search.search_reference`."""
    if gpu.is_available(device) and gpu.has_search(device):
        return gpu.kernels().search
    if not cpu.is_available():
        return encoder.search_reference
    return cpu.kernels().search if device.type == "cpu" else _search_on_host


def _search_on_host(tiles, bits, codebook, effort="default"):
    return cpu.kernels().search(tiles.cpu(), bits, codebook, effort).to(tiles.device)
