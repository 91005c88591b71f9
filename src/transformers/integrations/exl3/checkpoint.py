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

from dataclasses import dataclass, field

import torch

from . import format
from .stored import Exl3CheckpointError, Reader, StoredTensor, not_finite, read, stored_tensors


WORDS = (torch.int16, torch.uint16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

LINEAR_TENSORS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias")
EMBEDDING_TENSORS = ("trellis", "signs")
AGAIN = "It is damaged or no EXL3 checkpoint: download or convert it again."
FINITE = ("suh", "svh", "signs", "bias")  # tensors of numbers; all others are bits


@dataclass
class Checkpoint:
    """
    The tensors of a checkpoint, on the meta device but for the codebook markers, whose values are read. Those that are alike are
    the same objects, and so are modules that are.

    Args:
        stored (`dict[str, StoredTensor]`): By tensor name, where they are.
        linears (`dict[str, dict[str, torch.Tensor]]`): By module name, the tensors of quantized linear layers.
        embeddings (`dict[str, dict[str, torch.Tensor]]`): By module name, those of quantized embedding tables.
        others (`dict[str, torch.Tensor]`): By tensor name, all that is not quantized.
    """

    stored: dict[str, StoredTensor] = field(default_factory=dict)
    linears: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def read_checkpoint(files: list[str]) -> Checkpoint:
    """
    Read the headers of all files of a checkpoint and sort their tensors into modules.

    Raises:
        `Exl3CheckpointError`: Where a file is no whole safetensors file, for tensors that stand twice, and for a quantized module
            with a tensor missing, of a shape, dtype or marker that the format does not have, or with numbers that are not finite.
    """
    found, problems, modules = Checkpoint(), [], {}
    for tensor in stored_tensors(files):
        if tensor.name in found.stored:
            problems.append(f"{tensor.name} stands in {found.stored[tensor.name].file} and in {tensor.file}")
        found.stored[tensor.name] = tensor
    markers = _marker_values(found.stored)
    for name, tensor in found.stored.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = markers.get(name, tensor.meta)
    sorted_by_kind: dict[frozenset, tuple] = {}
    for module, leaves in modules.items():
        kind = frozenset((leaf, id(tensor)) for leaf, tensor in leaves.items())
        if kind not in sorted_by_kind:
            sorted_by_kind[kind] = _sorted(leaves)
        embedding, linear, others, problem = sorted_by_kind[kind]
        if problem:
            problems.append(f"{module}: {problem}")
        if embedding:
            found.embeddings[module] = embedding
        if linear:
            found.linears[module] = linear
        found.others |= {f"{module}.{leaf}" if module else leaf: tensor for leaf, tensor in others.items()}
    if not problems:
        problems = _not_finite(found)
    if problems:
        raise Exl3CheckpointError(problems, AGAIN)
    return found


def _marker_values(stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The codebook markers among `stored` with their values, equal ones being the same tensor, and those of odd shapes left out."""
    values, alike = {}, {}
    with Reader() as reader:
        for name, tensor in stored.items():
            if name.rpartition(".")[2] in format.MARKERS and tensor.nbytes:
                content = bytearray(tensor.nbytes)
                reader.fill(memoryview(content), tensor.file, tensor.start)
                kind = id(tensor.meta), bytes(content)
                if kind not in alike:
                    alike[kind] = torch.frombuffer(content, dtype=tensor.meta.dtype).view(tensor.meta.shape)
                values[name] = alike[kind]
    return values


def _sorted(leaves: dict[str, torch.Tensor]) -> tuple:
    """Of the tensors of a module: those of a quantized table, of a quantized linear layer, all others, and what is wrong with them."""
    is_embedding = "signs" in leaves and "trellis" in leaves
    known = EMBEDDING_TENSORS if is_embedding else LINEAR_TENSORS
    if not leaves.keys() & set(LINEAR_TENSORS[:-1]):  # a bias alone is of a float module
        known = ()
    quantized = {leaf: tensor for leaf, tensor in leaves.items() if leaf in known}
    others = {leaf: leaves[leaf] for leaf in leaves.keys() - set(known)}
    if is_embedding:
        return quantized, {}, others, _embedding_problem(quantized, leaves)
    return {}, quantized, others, _linear_problem(quantized, leaves) if quantized else None


def _not_finite(found: Checkpoint) -> list[str]:
    """Which tensors of quantized modules have numbers that are not finite."""
    plain, scaled = [], []
    for module, tensors in (found.linears | found.embeddings).items():
        for leaf in tensors:
            stored = found.stored[f"{module}.{leaf}" if module else leaf]
            if leaf in FINITE:
                plain.append(stored)
            elif leaf == "trellis" and "signs" in tensors:
                scales = format.embedding_scales(read(stored).view(torch.int16), len(tensors["signs"]))
                if not scales.isfinite().all():
                    scaled.append(stored)
    bad = {(stored.file, stored.name) for stored in [*not_finite(plain), *scaled]}
    return [
        f"{t.file}: {t.name} has numbers that are not finite" for t in found.stored.values() if (t.file, t.name) in bad
    ]


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


# The dimension in which a tensor of a layer goes by output features, and how many of them one entry there is for.
_BY_COLUMNS = {"trellis": (1, format.TILE), "svh": (0, 1), "sv": (0, format.TILE), "bias": (0, 1)}


def _in_blocks(columns: range) -> range:
    return range(columns.start // format.BLOCK * format.BLOCK, format.padded(columns.stop))


def cut_columns(tensors: dict[str, torch.Tensor], columns: range) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer for the whole blocks of 128 output features that `columns` stand in."""
    blocks, cut = _in_blocks(columns), {}
    for leaf, tensor in tensors.items():
        if leaf in _BY_COLUMNS:
            dim, features = _BY_COLUMNS[leaf]
            tensor = tensor.transpose(0, dim)[blocks.start // features : blocks.stop // features].transpose(0, dim)
        cut[leaf] = tensor.clone()
    return cut


def join_columns(parts: list[dict[str, torch.Tensor]], columns: list[range]) -> dict[str, torch.Tensor] | None:
    """The tensors of the layer that `cut_columns` made `parts` of, in order and each with its columns, None if they are not of one."""
    if any("trellis" not in part for part in parts) or len({part["trellis"].shape[::2] for part in parts}) > 1:
        return None
    joined, end = {}, 0
    for part, own in zip(parts, columns):
        first = _in_blocks(own).start
        for leaf, tensor in part.items():
            if leaf in _BY_COLUMNS and leaf in joined:
                dim, features = _BY_COLUMNS[leaf]
                new = tensor.narrow(dim, skipped := (end - first) // features, tensor.shape[dim] - skipped)
                tensor = torch.cat([joined[leaf], new], dim)
            joined[leaf] = tensor
        end = _in_blocks(own).stop
    for part, own in zip(parts, columns):
        again = cut_columns(joined, own)
        if again.keys() != part.keys() or not all(torch.equal(again[leaf], part[leaf]) for leaf in part):
            return None
    return joined


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
