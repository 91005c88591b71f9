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
"""A weight or a table to EXL3, by the fastest search that there is on its device."""

from collections.abc import Callable

import torch

from . import encoder, feedback
from .kernels import cpu
from .kernels.triton import gpu


def encode(weight, bits, codebook, seed, effort="default", progress=None, moments=None):
    """`encoder.quantize_weight`, or with the `Moments` of inputs `feedback.quantize_weight`: see there for arguments and result."""
    search = search_on(weight.device)
    if moments is None:
        return encoder.quantize_weight(weight, bits, codebook, seed, effort, search, progress)
    return feedback.quantize_weight(weight, moments, bits, codebook, seed, effort, search, progress)


def encode_embedding(weight, bits, seed, effort="default", progress=None):
    """`encoder.quantize_embedding`: see there for arguments and result."""
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
