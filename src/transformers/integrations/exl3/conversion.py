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
What a conversion has of its own while it is not finished: a folder in the output folder, which tells what it makes of what, and the
layers that are done.

Each layer is a file, which is there whole or not at all, and a layer whose file is there is not quantized again. They are mapped back
in: what is mapped is the system's to drop from memory and to read again, so that a model of such layers takes hardly any.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ... import __version__
from .finished import Layers
from .scratch import if_none, scratch


UNFINISHED = ".unfinished-conversion"
DONE = ".finished-conversion"  # what UNFINISHED is called while it is removed
SUFFIX = ".safetensors"
PART = ".part"  # ends the name of a file that is being written
SAMPLES, SAMPLE = 64, 1 << 16  # of a file of weights, so many pieces of so many bytes tell whether it is the same


class Conversion:
    """
    Args:
        output (`Path`): The folder that the result is for.
        settings (`dict[str, Any]`): All that tells what the result will be, by what errors may call it; of types that JSON has.

    Attributes:
        folder (`Path`): For all that is the conversion's own.
        work (`Path`): In it, for what takes long, with which a conversion goes on.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.folder, self.work = output, output / UNFINISHED, output / UNFINISHED / "work"
        self._settings_file = self.folder / "settings.json"
        self.settings = json.loads(json.dumps(settings))

    @contextlib.contextmanager
    def running(self, resume: bool) -> Iterator[None]:
        """
        Begin the conversion or go on with it, and keep other processes from it. When the context ends without an error, nothing is
        left of the conversion but its result.

        Args:
            resume (`bool`): Whether to go on with what there is.

        Raises:
            `FileExistsError`: Where the output folder has something in it that is not to be resumed.
            `ValueError`: Where what there is was begun with other settings.
            `RuntimeError`: Where another process is at it.
        """
        is_new, done = not self.output.exists(), self.output / DONE
        if not is_new and not self.output.is_dir():
            raise FileExistsError(f"{self.output} is no folder: give a new one for the result.")

        def refuse():
            raise RuntimeError(
                f"Another process is converting to {self.output}: wait for it, or end it. {if_none(self.folder)}"
            )

        with scratch(self.folder, refuse):
            try:
                shutil.rmtree(done, ignore_errors=True)
                self._check_output(resume)
                self._check_settings()
                yield
                os.replace(self.folder, done)
            except BaseException:
                if not self._has_work():  # what is mended next may be the settings
                    shutil.rmtree(self.folder)
                    with contextlib.suppress(OSError):  # has something in it
                        if is_new:
                            self.output.rmdir()
                raise
            with contextlib.suppress(FileNotFoundError):  # another process that begins removes it, too
                shutil.rmtree(done)

    def _has_work(self) -> bool:
        """Whether something is there that took long."""
        return any(path.is_file() for path in self.work.rglob("*"))

    def _check_output(self, resume: bool):
        if not self._settings_file.exists() and any(path != self.folder for path in self.output.iterdir()):
            raise FileExistsError(
                f"{self.output} is not empty, and has no unfinished conversion to go on with: convert to another folder, or remove it."
            )
        if self._has_work() and not resume:
            raise FileExistsError(
                f"{self.output} has an unfinished conversion in it: go on with it by --resume, convert to another folder, or remove "
                f"{self.folder} to begin anew."
            )

    def _check_settings(self):
        """Have the settings written down, or be those that are."""
        file = self._settings_file
        if not file.exists() or not self._has_work():
            text = json.dumps(self.settings, indent=2)
            write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        # As texts: the order of overrides counts.
        then, now = ({name: json.dumps(value) for name, value in of.items()} for of in (before, self.settings))
        changed = [
            f"{name} was {then.get(name, 'not set')} and is now {now.get(name, 'not set')}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.output} has an unfinished conversion of other settings in it: {'; '.join(changed)}. Repeat the command with "
                f"those of then, convert to another folder, or remove {self.folder} to begin anew."
            )


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


def fingerprints(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """By path in `folder`, what tells each of `files` from other files: its size, and a digest of samples of it."""
    found = {}
    for file in files:
        size, digest = file.stat().st_size, hashlib.sha256()
        with open(file, "rb") as stream:
            digest.update(stream.read(SAMPLE * SAMPLES))  # with the names and shapes of tensors
            for index in range(1, SAMPLES + 1):
                stream.seek(max(size - SAMPLE, 0) * index // SAMPLES)
                digest.update(stream.read(SAMPLE))
        found[str(file.relative_to(folder))] = f"{size} bytes {digest.hexdigest()[:16]}"
    return found


def versions() -> dict[str, str]:
    """The versions of what the result depends on."""
    return {"transformers": __version__, "torch": torch.__version__}
