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
"""The quantization kinds of GGUF, by libgguf: pure ones, without an importance matrix."""

import libgguf
import torch


KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def round_to(model, names: list[str], kind: str) -> float:
    """Round the weights of the layers `names` of `model` to `kind`, in place; bits per weight. Rows are of `256 n` weights."""
    code = libgguf.GGMLQuantizationType[kind]
    size = weights = 0
    for name in names:
        weight = model.get_submodule(name).weight
        packed = libgguf.quantize_rows(weight.detach().float().numpy(), code)
        weight.data = torch.from_numpy(libgguf.dequantize_rows(packed, code)).to(weight.dtype)
        size += packed.nbytes
        weights += weight.numel()
    return 8 * size / weights
