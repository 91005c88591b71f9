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
What computes the operators fast: `cpu`, compiled C++, and `triton`, for GPUs. Each has a door, which finds the kernels here or on
the hub, and `calls`, which is theirs and checks what they are given.
"""

import torch


DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of activations, numbered as in cpu/common.h


def check_devices(*tensors: torch.Tensor | None):
    """Raise `ValueError` where tensors are on different devices. To PyTorch an operator with one on `meta` is one to be faked."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the tensors of an EXL3 layer and its input are on different devices: {names}")
