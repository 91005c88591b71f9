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

"""What upstream's renamings and conversions do not lead back to: names that tensors have in files, and weights in another order."""

import copy
from collections.abc import Container, Iterable

import torch
from torch import Tensor

from ...core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PermuteForRope,
    Split,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    rename_source_key,
)


# Operations of upstream's that take weights apart or put them together and change nothing in them.
RESHAPING = (Chunk, Concatenate, MergeModulelist, Split, SplitModulelist)


def changing_operations(path: str, converters: list[WeightConverter]) -> list[str]:
    """The names of upstream's operations that make the float weight of the layer at `path` another than files have."""
    used = [entry for entry in converters if apply_converters(f"{path}.weight", [entry.reverse_transform()])[1]]
    return [type(op).__name__ for entry in used for op in entry.operations if type(op) not in RESHAPING]


def row_order(path: str, rows: int, converters: list[WeightConverter], config) -> Tensor | None:
    """
    The order in which upstream puts the rows that files have for a layer.

    Args:
        path (`str`): Of the layer in the model.
        rows (`int`): How many it has.
        converters (`list[WeightConverter]`): Upstream's.
        config (`PreTrainedConfig`): Of the model.

    Returns:
        `torch.Tensor` or `None`: By row in the model, int64 `[rows]`, the row in files, counted from the layer's first. None where
        something else is done to them.
    """
    for entry in converters:
        if not apply_converters(f"{path}.weight", [entry.reverse_transform()])[1]:
            continue
        if len(entry.source_patterns) > 1 or any(type(op) not in (Chunk, PermuteForRope) for op in entry.operations):
            return None
        patterns = {"source_patterns": entry.source_patterns, "target_patterns": entry.target_patterns}
        # On the CPU, and not where the model is made.
        numbers = torch.arange(rows * len(entry.target_patterns), device="cpu")[:, None]
        found = {entry.source_patterns[0]: numbers}
        for operation in entry.operations:
            found = operation.convert(found, **patterns, config=config)
        order = next(numbers[:, 0] for target, numbers in found.items() if target in f"{path}.weight")
        order = order - order.min()
        return order if order.sort()[0].tolist() == [*range(rows)] else None
    return None


class Exl3FileNames(WeightRenaming):
    """
    Does nothing on loading, and on saving, after all of upstream's renamings, gives tensors the names that files had.

    Args:
        names (`dict[str, str]`): By the name that upstream would save it by, the name of a tensor in the files; that of a `weight`
            stands for its module.
    """

    __slots__ = ("names", "on_loading")

    def __init__(self, names: dict[str, str], on_loading: bool = True):
        super().__init__("exl3 file names", "exl3 file names")  # with spaces: patterns that match no tensor
        self.names, self.on_loading = names, on_loading

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self.on_loading or not self.names:
            return source_key, None
        owner, _, leaf = source_key.rpartition(".")
        name, weight = self.names.get(source_key), self.names.get(f"{owner}.weight")
        if not (name or weight):
            return source_key, None
        return name or weight.removesuffix("weight") + leaf, self.source_patterns[0]

    def was_used(self) -> bool:
        return True

    def reverse_transform(self) -> "Exl3FileNames":
        return Exl3FileNames(self.names, on_loading=False)


def names_in_files(
    names: Iterable[str],
    transforms: list[WeightTransform],
    prefix: str,
    parameters: dict[str, Tensor],
    kept: Container[str] = (),
    known: dict[str, str] | None = None,
    layers: Container[str] = (),
) -> dict[str, str]:
    """
    The names in files that saving would not bring back: where upstream renames two to one, or finds the prefix of the base model
    missing.

    Args:
        names (`Iterable[str]`): Of tensors in the files.
        transforms (`list[WeightTransform]`): Upstream's.
        prefix (`str`): Of the base model.
        parameters (`dict[str, torch.Tensor]`): The model's, which tell whether the prefix is added or removed.
        kept (`Container[str]`, *optional*): Those of `names` that are saved without it if the files have them without.
        known (`dict[str, str]`, *optional*): Those of `names` that upstream does not find a parameter for, with it.
        layers (`Container[str]`, *optional*): Paths of layers that are quantized: a bias of these is saved beside the codes.

    Returns:
        `dict[str, str]`: By the name that upstream would save it by, the name in the files.
    """
    transforms = copy.deepcopy(transforms)  # they remember whether they were used
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    inside = {}
    for name in sorted(names):
        inside[name] = renamed = apply_renamings(name, renamings)
        if prefix and name not in kept:
            target, _ = rename_source_key(name, renamings, converters, prefix, parameters)
            bare = renamed.removeprefix(f"{prefix}.")
            inside[name] = f"{prefix}.{bare}" if target.startswith(f"{prefix}.") else bare
    inside |= known or {}
    back = [entry.reverse_transform() for entry in renamings[::-1] if entry.was_used()]
    saved = {name: apply_renamings(renamed, back) for name, renamed in inside.items()}
    result = {other: name for name, other in saved.items() if other != name}
    for name, (path, _, leaf) in ((name, renamed.rpartition(".")) for name, renamed in inside.items()):
        if leaf == "bias" and path in layers and not saved[name].endswith(".bias"):
            weight = apply_renamings(f"{path}.weight", back)
            result[saved[name]] = result.get(weight, weight).removesuffix("weight") + leaf
    return result
