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
"""What checkpoints lack although models save it: constants of modules, and corrections of routers that converters drop."""

import copy

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ... import initialization as init
from ...utils import logging
from .checkpoint import Exl3CheckpointError


logger = logging.get_logger(__name__)

# Trained, and yet not read by exllamav3's converter for some architectures (MiniMax-M2, ERNIE 4.5): its checkpoints lack them.
ROUTER_CORRECTIONS = ("e_score_correction_bias",)


class _VectorsOnCpu(TorchFunctionMode):
    """Makes scalars and vectors on the CPU, and what is larger, as most of a model is, on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in torch.utils._device._device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "meta"})
        return func(*args, **{**kwargs, "device": "cpu"}) if made.dim() < 2 else made


def _constructed(model: nn.Module) -> nn.Module:
    """Another model of the same config, whose vectors have the values that constructors give them."""
    with init.no_init_weights(), init.no_tie_weights(), _VectorsOnCpu():
        return type(model)(copy.deepcopy(model.config))


@torch.no_grad()
def restore(model: nn.Module, names: list[str]):
    """
    Give tensors that a checkpoint lacks their values: buffers what the constructors of their modules give them, the corrections
    of routers zeros, with a warning.

    Args:
        model (`PreTrainedModel`): Loaded but for these.
        names (`list[str]`): Of persistent buffers, and of corrections of routers, which may be parameters.

    Raises:
        `ValueError`: For buffers whose value no constructor tells.
    """
    corrections = [name for name in names if name.endswith(ROUTER_CORRECTIONS)]
    buffers = [name for name in names if name not in corrections]
    for name in corrections:
        model.get_parameter_or_buffer(name).zero_()
    if corrections:
        logger.warning(
            f"The checkpoint lacks {len(corrections)} corrections of routers that the model was trained with, such as "
            f"{corrections[0]}: exllamav3's converter drops them for this architecture. They are zero now, and the model chooses "
            "other experts than the original one. Copy these tensors from the original checkpoint, or quantize it with "
            "`Exl3Config`, which keeps them."
        )
    if not buffers:
        return
    try:
        values = dict(_constructed(model).named_buffers())
    except (RuntimeError, NotImplementedError) as error:  # of a constructor that reads what is on the meta device
        values, cause = {}, error
    else:
        cause = None
    lacking = [name for name in buffers if name not in values or values[name].is_meta]
    if lacking:
        problems = [f"{name} is a buffer that is not in the checkpoint" for name in lacking]
        remedy = (
            "Their values are not known here. Copy these tensors from the original checkpoint, or convert it again."
        )
        raise Exl3CheckpointError(problems, remedy) from cause
    for name in buffers:
        model.get_buffer(name).copy_(values[name])
