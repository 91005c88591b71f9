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
"""Where layers go when they are quantized: nowhere, unless a conversion has them go to files."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn


class Layers:
    """
    Leaves layers as they are, in memory.

    Attributes:
        device (`torch.device` or `None`): Where to quantize a layer, None for where its weight is.
        are_files (`bool`): Whether layers are files: a model of them is made to be saved, not to be run.
    """

    device: torch.device | None = None
    are_files = False

    def begin(self, model: nn.Module):
        """Is called once, before the first layer, with the model on the meta device that waits for its weights."""

    def find(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors that were kept under `name`, None where none were."""

    def keep(self, name: str, tensors: dict[str, torch.Tensor], parts: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """Keep `tensors` under `name`, in place of what was kept under the names `parts`, and return what is as good as they."""
        return tensors


_layers: ContextVar[Layers] = ContextVar("exl3 layers", default=Layers())


def layers() -> Layers:
    """Where layers that are quantized go now."""
    return _layers.get()


@contextmanager
def kept_as(instead: Layers) -> Iterator[None]:
    """Have layers that are quantized in this context go to `instead`."""
    token = _layers.set(instead)
    try:
        yield
    finally:
        _layers.reset(token)
