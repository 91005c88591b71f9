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
Quantized models in `DistributedDataParallel`, which adapters are trained in.

It sends all that a model has from the first process to the others when it is made, and all buffers before each step. The backends
know no 16-bit integers, and the tensors of quantized layers never change: these are sent once, as bytes, and are left out from
then on.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .modules import Exl3Module


BUCKET_BYTES = 250 << 20  # that are sent at a time, as many as DistributedDataParallel itself sends


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the quantized layers of `model` by their names in it, without biases that are trained."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        if isinstance(module, Exl3Module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if not tensor.requires_grad
    }


def _send_frozen_tensors(parent: nn.Module, name: str, model: nn.Module):
    """Where `parent` is a `DistributedDataParallel` that is made for `model`, in whatever the quantized model is wrapped."""
    if not isinstance(parent, DistributedDataParallel) or name in parent._modules:
        return
    tensors = frozen_tensors(model)
    if tensors:
        sent = [torch.atleast_1d(tensor.detach()).view(torch.uint8) for tensor in tensors.values()]
        dist._broadcast_coalesced(parent.process_group, sent, BUCKET_BYTES, 0)
        parent.parameters_to_ignore.update(tensors)


register_module_module_registration_hook(_send_frozen_tensors)
