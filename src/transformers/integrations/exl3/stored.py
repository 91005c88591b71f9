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
Safetensors files: what they hold, as their headers tell, and their tensors, read straight to where they are to be.

A mixture has tens of thousands of tensors, most of them alike: what is done here for each of them is a few steps.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ...modeling_utils import str_to_torch_dtype


RUN_BYTES = 1 << 16  # that are read at a time where many tensors are: few enough for torch to take one thread
WORKERS = 4  # that read at most

DAMAGED = "It is damaged, or of another format: download or convert it again."


class Exl3CheckpointError(ValueError):
    """A checkpoint that is not what the format says, with every misfit found."""

    def __init__(self, problems: list[str], remedy: str):
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__("This checkpoint cannot be loaded:\n  " + "\n  ".join(shown) + f"\n{remedy}")


class StoredTensor(NamedTuple):
    """
    A tensor in a safetensors file.

    Args:
        file (`str`): Path of the file.
        name (`str`): The tensor's name there.
        meta (`torch.Tensor`): One of its shape and dtype on the meta device, the same for all tensors of these.
        start (`int`): The number of its first byte in the file.
        nbytes (`int`): How many bytes it has.
    """

    file: str
    name: str
    meta: torch.Tensor
    start: int
    nbytes: int


def stored_tensors(files: Iterable[str | os.PathLike]) -> Iterator[StoredTensor]:
    """
    The tensors of safetensors files.

    Raises:
        `Exl3CheckpointError`: Where a file is no safetensors file, is truncated, or its header does not fit its data.
    """
    alike = {}
    for path in map(os.fspath, files):
        try:
            with safe_open(path, framework="pt"):  # it checks the header
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                kind = entry["dtype"], *entry["shape"]
                if kind not in alike:
                    if entry["dtype"] not in str_to_torch_dtype:
                        raise Exl3CheckpointError([f"{path}: {name} has the dtype {entry['dtype']}"], DAMAGED)
                    alike[kind] = torch.empty(entry["shape"], dtype=str_to_torch_dtype[entry["dtype"]], device="meta")
                start, stop = entry["data_offsets"]
                yield StoredTensor(path, name, alike[kind], 8 + length + start, stop - start)
        # The last two are for sizes that torch cannot count.
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            problem = f"{path}: no whole safetensors file ({reason})"
            raise Exl3CheckpointError([problem], DAMAGED) from error


class Reader:
    """Reads tensors out of files, of which it keeps the last one open."""

    def __init__(self):
        self._file = self._path = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()

    def fill(self, buffer: memoryview, path: str, start: int):
        """Fill `buffer` with what the file at `path` has from byte `start` on."""
        if path != self._path:
            self.__exit__()
            self._file, self._path = open(path, "rb", buffering=0), path
        self._file.seek(start)
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:])
            if not count:
                raise Exl3CheckpointError([f"{path}: ends at byte {start + done}, and did not before"], DAMAGED)
            done += count

    def numbers(self, run: list[StoredTensor]) -> torch.Tensor:
        """What neighbours of one dtype hold, in one dimension."""
        data = torch.empty(sum(stored.nbytes for stored in run), dtype=torch.uint8, device="cpu")
        self.fill(bytes_of(data), run[0].file, run[0].start)
        return data.view(run[0].meta.dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU that is not empty."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read(stored: StoredTensor) -> torch.Tensor:
    """A tensor of a file."""
    with Reader() as reader:
        return reader.numbers([stored]).view(stored.meta.shape)


def not_finite(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Those of `tensors` that have numbers that are not finite."""
    found = []
    with Reader() as reader:
        for run in _runs(tensors):
            if not reader.numbers(run).isfinite().all():
                found += [stored for stored in run if not reader.numbers([stored]).isfinite().all()]
    return found


def _runs(tensors: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """`tensors` in lists of neighbours in a file, of one dtype."""
    run, dtype, size = [], None, 0
    for stored in sorted(tensors, key=lambda stored: (stored.file, stored.start)):
        if not stored.nbytes:
            continue
        if run:
            last = run[-1]
            is_next = last.file == stored.file and last.start + last.nbytes == stored.start
            if not is_next or stored.meta.dtype != dtype or size + stored.nbytes > RUN_BYTES:
                yield run
                run, size = [], 0
        dtype = dtype if run else stored.meta.dtype
        run.append(stored)
        size += stored.nbytes
    if run:
        yield run


def read_stack(members: list[StoredTensor], stack: torch.Tensor):
    """
    Read tensors of files into the entries of `stack`, which is on the CPU, of their dtype, and of any strides with the last
    dimension in one piece.

    As many threads read and copy as torch has, each for itself: torch's own, which all wait for each other at every tensor, take
    many times as long where others use the processor, too.
    """
    workers = max(1, min(torch.get_num_threads(), WORKERS, len(members)))
    with ThreadPoolExecutor(workers) as pool:
        parts = [range(start, len(members), workers) for start in range(workers)]
        list(pool.map(lambda part: _read_entries([(members[index], stack[index]) for index in part]), parts))


def _read_entries(entries: list[tuple[StoredTensor, torch.Tensor]]):
    scratch = np.empty(0, dtype=np.uint8)
    with Reader() as reader:
        for stored, entry in entries:
            place = entry.reshape(1) if entry.dim() == 0 else entry
            place = place.view(torch.uint8).numpy()
            if place.flags.c_contiguous:
                reader.fill(memoryview(place).cast("B"), stored.file, stored.start)
                continue
            if scratch.shape != place.shape:
                scratch = np.empty(place.shape, dtype=np.uint8)
            reader.fill(memoryview(scratch).cast("B"), stored.file, stored.start)
            np.copyto(place, scratch)
