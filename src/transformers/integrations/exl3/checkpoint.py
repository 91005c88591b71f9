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
What an EXL3 checkpoint holds, read from the headers of its safetensors files: nothing needed to decode it stands elsewhere.

Bits and codebook differ from tensor to tensor, and the JSON files beside may be missing or wrong; names and shapes are
not. Everything here is checked before any memory is allocated, and every misfit found is one line of one error.
"""

import os
from dataclasses import dataclass, field
from functools import cache

import torch
from safetensors import SafetensorError, safe_open

from . import format


# Data types of safetensors headers (little-endian), as far as checkpoints of models have them.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

WORDS = (torch.int16, torch.uint16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

LINEAR_TENSORS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias")
EMBEDDING_TENSORS = ("trellis", "signs")
FINITE = ("suh", "svh", "signs", "bias")  # tensors of numbers; all others are bits

AGAIN = "It is damaged or no EXL3 checkpoint: download or convert it again."


class Exl3CheckpointError(ValueError):
    """A checkpoint that is not what the format says, with every misfit found."""

    def __init__(self, problems: list[str], remedy: str):
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__("This EXL3 checkpoint cannot be loaded:\n  " + "\n  ".join(shown) + f"\n{remedy}")


@dataclass
class Checkpoint:
    """
    The tensors of a checkpoint, on the meta device.

    Args:
        linears (`dict[str, dict[str, torch.Tensor]]`): By module name, the tensors of quantized linear layers.
        embeddings (`dict[str, dict[str, torch.Tensor]]`): By module name, those of quantized embedding tables.
        others (`dict[str, torch.Tensor]`): By tensor name, all that is not quantized.
    """

    linears: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def read_header(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file by name, on the meta device but for the codebook markers, whose values are read.

    Raises:
        `Exl3CheckpointError`: Where the file is no safetensors file, is truncated, or its header does not fit its data.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                if (dtype := DTYPES.get(entry.get_dtype())) is None:
                    raise Exl3CheckpointError([f"{path}: {name} has the dtype {entry.get_dtype()}"], AGAIN)
                tensors[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
                if name.rpartition(".")[2] in format.MARKERS:
                    tensors[name] = file.get_tensor(name)
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        TypeError,
    ) as error:  # the last two for sizes that torch cannot count
        reason = str(error).partition("\n")[0]
        problem = f"{path}: no whole safetensors file ({reason})"
        raise Exl3CheckpointError([problem], AGAIN) from error
    return tensors


def read_checkpoint(files: list[str]) -> Checkpoint:
    """
    Read the headers of all files of a checkpoint and sort their tensors into modules.

    Raises:
        `Exl3CheckpointError`: For tensors that stand twice, and for a quantized module with a tensor missing, of a shape,
            dtype or marker that the format does not have, or with numbers that are not finite.
    """
    tensors, origin, problems = {}, {}, []
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                problems.append(f"{name} stands in {origin[name]} and in {file}")
            tensors[name], origin[name] = tensor, file
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    found = Checkpoint()
    for module, leaves in modules.items():
        is_embedding = "signs" in leaves and "trellis" in leaves
        known = EMBEDDING_TENSORS if is_embedding else LINEAR_TENSORS
        if not leaves.keys() & set(LINEAR_TENSORS[:-1]):  # a bias alone is of a float module
            known = ()
        quantized = {leaf: tensor for leaf, tensor in leaves.items() if leaf in known}
        if quantized:
            problem = (_embedding_problem if is_embedding else _linear_problem)(quantized, leaves)
            if problem:
                problems.append(f"{module}: {problem}")
            (found.embeddings if is_embedding else found.linears)[module] = quantized
        found.others |= {f"{module}.{leaf}" if module else leaf: leaves[leaf] for leaf in leaves.keys() - set(known)}
    if not problems:
        problems = _not_finite(found.linears | found.embeddings, origin)
    if problems:
        raise Exl3CheckpointError(problems, AGAIN)
    return found


def _not_finite(quantized: dict[str, dict[str, torch.Tensor]], origin: dict[str, str]) -> list[str]:
    """Which tensors of quantized modules, in the files that `origin` tells, have numbers that are not finite."""
    problems, opened = [], cache(lambda path: safe_open(path, framework="pt"))
    for module, tensors in quantized.items():
        for leaf in tensors:
            name = f"{module}.{leaf}" if module else leaf
            if leaf in FINITE or (leaf == "trellis" and "signs" in tensors):
                numbers = opened(origin[name]).get_tensor(name)
                if leaf == "trellis":
                    numbers = format.embedding_scales(numbers.view(torch.int16), len(tensors["signs"]))
                if not numbers.isfinite().all():
                    problems.append(f"{origin[name]}: {name} has numbers that are not finite")
    return problems


def _embedding_problem(tensors, leaves) -> str | None:
    if "weight" in leaves:
        return "has both `trellis` and `weight`"
    if tensors["trellis"].dtype not in WORDS or tensors["signs"].dtype is not torch.float16:
        return f"`trellis` is {tensors['trellis'].dtype} and `signs` {tensors['signs'].dtype}, not int16 and float16"
    try:
        format.embedding_bits(tensors["trellis"], tensors["signs"])
    except ValueError as error:
        return str(error)


def _linear_problem(tensors, leaves) -> str | None:
    """What is wrong with the tensors of a quantized linear layer, None if nothing is."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    trellis, left, right = tensors.get("trellis"), _one(tensors, "suh", "su"), _one(tensors, "svh", "sv")
    if trellis is None:
        return f"has {', '.join(f'`{name}`' for name in tensors)} but no `trellis`"
    if left is None or right is None:
        side, names = ("input", "`suh` or `su`") if left is None else ("output", "`svh` or `sv`")
        return f"has a `trellis` but not one scale or sign tensor of the {side} side ({names})"
    if "weight" in leaves:
        return "has both `trellis` and `weight`"
    if "scale" in leaves:
        return "has a `scale` tensor, which no released version of the format has"
    if trellis.dtype not in WORDS or trellis.dim() != 3:
        return f"`trellis` is {trellis.dtype} {shapes['trellis']}, not int16 with three dimensions"
    try:
        bits = format.bits_of(trellis)
    except ValueError as error:
        return f"`trellis` {shapes['trellis']}: {error}"
    sizes = {"suh": trellis.shape[0] * format.TILE, "svh": trellis.shape[1] * format.TILE}
    sizes |= {"su": trellis.shape[0], "sv": trellis.shape[1]}
    if sizes["suh"] % format.BLOCK or sizes["svh"] % format.BLOCK or not (sizes["suh"] and sizes["svh"]):
        return f"`trellis` {shapes['trellis']} is of {sizes['suh']} x {sizes['svh']} features, not multiples of {format.BLOCK}"
    for name in (left, right):
        dtypes = WORDS if name in ("su", "sv") else (torch.float16,)
        if shapes[name] != [sizes[name]] or tensors[name].dtype not in dtypes:
            return f"`{name}` is {tensors[name].dtype} {shapes[name]}, not {dtypes[0]} [{sizes[name]}]"
    if "bias" in tensors and (tensors["bias"].dim() != 1 or tensors["bias"].dtype not in FLOATS):
        return f"`bias` is {tensors['bias'].dtype} {shapes['bias']}, not float16 [{sizes['svh']}]"
    if "bias" in tensors and format.padded(shapes["bias"][0]) != sizes["svh"]:
        return f"`bias` has {shapes['bias'][0]} elements for {sizes['svh']} output features"
    markers = [name for name in format.MARKERS if name in tensors]
    if len(markers) > 1:
        return "has both codebook markers, `mcg` and `mul1`"
    for name in markers:
        if tensors[name].dtype is not torch.int32 or tensors[name].numel() != 1:
            return f"`{name}` is {tensors[name].dtype} {shapes[name]}, not one int32"
        if (value := tensors[name].item() & 0xFFFFFFFF) != format.MARKERS[name]:
            return (
                f"`{name}` is 0x{value:08X} and not 0x{format.MARKERS[name]:08X}: an experimental version of the converter "
                "wrote it, convert the model again"
            )
    if bits != int(bits) and markers != ["mul1"]:
        return f"has {bits:g} bits per weight, which only the mul1 codebook has"


def cut_columns(tensors: dict[str, torch.Tensor], columns: range) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer without bias for some of its output features, in whole blocks of 128."""
    first, last = columns.start // format.TILE, columns.stop // format.TILE
    cut = {
        "trellis": lambda tensor: tensor[:, first:last],
        "svh": lambda tensor: tensor[columns.start : columns.stop],
        "sv": lambda tensor: tensor[first:last],
    }
    return {leaf: (cut[leaf](tensor) if leaf in cut else tensor).clone() for leaf, tensor in tensors.items()}


def _one(tensors, *names) -> str | None:
    found = [name for name in names if name in tensors]
    return found[0] if len(found) == 1 else None


def embedding_tensors(rows: int, width: int, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a quantized embedding table of `rows` rows of `width` (unpadded) elements, on the meta device."""
    groups = -(-width // format.EMBEDDING_GROUP)
    with torch.device("meta"):
        return {
            "trellis": torch.empty(rows, groups * (1 + format.TILE * bits), dtype=torch.int16),
            "signs": torch.empty(groups, format.EMBEDDING_GROUP, dtype=torch.float16),
        }


def linear_tensors(
    in_features: int, out_features: int, bits: float, codebook: str, bias: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer of these (unpadded) sizes, on the meta device."""
    rows, columns = format.padded(in_features), format.padded(out_features)
    with torch.device("meta"):
        tensors = {
            "trellis": torch.empty(
                rows // format.TILE, columns // format.TILE, int(bits * format.TILE), dtype=torch.int16
            ),
            "suh": torch.empty(rows, dtype=torch.float16),
            "svh": torch.empty(columns, dtype=torch.float16),
        }
        if codebook in format.MARKERS:
            tensors[codebook] = torch.empty((), dtype=torch.int32)
        if bias:
            tensors["bias"] = torch.empty(columns, dtype=torch.float16)
    return tensors
