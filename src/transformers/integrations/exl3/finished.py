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
Where layers go when they are quantized: nowhere, or to files, from which they are mapped back in.

Files are what a conversion keeps of its work: each is there whole or not at all, and a layer whose file is there is not
quantized again. What is mapped is the system's to drop from memory and to read again, so that a model of such layers takes
hardly any.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


SUFFIX = ".safetensors"
PART = ".part"  # ends the name of a file that is being written


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


class LayerFiles(Layers):
    """
    Keeps layers as files.

    Args:
        folder (`Path`): For the files, and nothing else. It is made if need be.
        device (`torch.device`, *optional*): Where to quantize a layer.
    """

    are_files = True

    def __init__(self, folder: Path, device: torch.device | None = None):
        self.folder, self.device = folder, device
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, model):
        """Raises `OSError` where the disk has no room for the layers and, beside them, for the checkpoint."""
        there = 0
        for file in list(self.folder.iterdir()):
            if file.suffix == SUFFIX:
                there += file.stat().st_size
            else:  # what a kill left: a part, or what safetensors writes before it has the name of one
                file.unlink()
        layers, checkpoint = _bytes_to_write(model)
        needed, free = max(layers - there, 0) + checkpoint, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the disk has {_size(free)} free, and about {_size(needed)} are needed: {_size(checkpoint)} for the "
                f"checkpoint, and meanwhile as much as its quantized layers take again ({_size(layers)}, of which {_size(there)} are "
                "there). Make room, or convert to a folder on another disk."
            )

    def find(self, name):
        file = self._file(name)
        return self._mapped(file) if file.exists() else None

    def keep(self, name, tensors, parts=()):
        file = self._file(name)
        write_whole(file, lambda path: save_file({key: value.contiguous() for key, value in tensors.items()}, path))
        for part in parts:
            self._file(part).unlink()
        return self._mapped(file)

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}{SUFFIX}"

    @staticmethod
    def _mapped(file: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged ({error}). Remove it: the layer will be quantized again, and no other."
            ) from error


def write_whole(file: Path, write):
    """Have `write(path)` write a file, which stands at `file` when all of it is on the disk, and not before."""
    part = file.with_name(file.name + PART)
    write(part)
    with open(part, "r+b") as written:
        os.fsync(written.fileno())
    os.replace(part, file)


def _bytes_to_write(model: nn.Module) -> tuple[int, int]:
    """What the quantized layers of `model` take, and all that is saved of it."""
    layers, checkpoint, seen = 0, 0, set()
    for module in model.modules():
        stored, pending = getattr(module, "stored", ()), getattr(module, "pending", ())
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            is_saved = name in stored or name not in (*pending, *module._non_persistent_buffers_set)
            if tensor is None or not is_saved or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            checkpoint += tensor.nbytes
            layers += tensor.nbytes if name in stored else 0
    return layers, checkpoint


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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
