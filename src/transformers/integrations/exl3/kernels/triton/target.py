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
"""What the Triton kernels need to know of a device, and how they are launched on it."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Target:
    """
    A device, as far as the choice of kernels depends on it.

    Args:
        backend (`str`): `cuda`, `hip` or `xpu`, or `interpreter` for the CPU, where only Triton's interpreter runs kernels.
        arch (`str`): `sm_90` or `gfx942`, for instance.
        processors (`int`): Multiprocessors, compute units or Xe cores.
    """

    backend: str
    arch: str
    processors: int

    @property
    def ptx(self) -> bool:
        """Whether codebooks are computed in NVIDIA's assembly."""
        return self.backend == "cuda"

    @property
    def warp(self) -> int:
        """Threads of a warp."""
        return 64 if self.arch.startswith("gfx9") else 32

    @property
    def capability(self) -> int:
        """90 for `sm_90`, 0 if this is none of NVIDIA's."""
        return int(self.arch.removeprefix("sm_")) if self.backend == "cuda" else 0


@lru_cache
def target_of(device: torch.device) -> Target:
    """The `Target` that `device` is. Raises `ValueError` for a type of device that there are no Triton kernels for."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
        return Target("cuda", f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
    if device.type == "xpu":
        return Target("xpu", "xpu", torch.xpu.get_device_properties(device).gpu_subslice_count)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return Target("interpreter", "cpu", 4)
    raise ValueError(f"there are no Triton kernels of EXL3 for a device of type {device.type!r}")


def on(device: torch.device):
    """The context in which kernels go to `device`, onto its current stream, whichever device is the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
