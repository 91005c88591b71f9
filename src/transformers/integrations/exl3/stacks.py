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
Stacks of experts between a model and files, where each expert has tensors of its own.

Upstream goes through all tensors of a checkpoint in many steps of Python for each. It is shown one tensor of each stack, which
tells the device; what the stack holds is read from the files straight into its place. Saving splits the stacks.
"""

from concurrent.futures import Future
from itertools import count, islice
from typing import NamedTuple

import torch
from safetensors import safe_open

from ...core_model_loading import ConversionOps, WeightConverter, WeightRenaming, log_conversion_errors
from ...distributed.sharding_utils import DtensorShardOperation
from ...distributed.utils import is_dtensor
from . import ops
from .experts import Exl3Experts
from .modules import local
from .stored import StoredTensor, read_stack


# Where upstream's transforms have patterns, those here have a word with a space, which matches no tensor: they go by name.
_BY_NAME = "exl3 stack names"


class Exl3AsStored(ConversionOps):
    """Leaves one tensor under its name, in the dtype that the format has: PEFT casts scales to fp32 for training."""

    def convert(self, input_dict, **kwargs):
        scales = ("suh", "svh", "signs")
        return {
            name: tensor.half() if name.rpartition(".")[2] in scales else tensor for name, tensor in input_dict.items()
        }


class StackMembers(NamedTuple):
    """
    Where the entries of a stack are.

    Args:
        experts (`Exl3Experts`): The module that the stack is in.
        numbers (`list[int]`): The experts that it has when no process has them to itself.
        stored (`list[StoredTensor]`): What it holds of each of these.
    """

    experts: Exl3Experts
    numbers: list[int]
    stored: list[StoredTensor]

    def own(self) -> list[StoredTensor]:
        """What is of experts that this process has."""
        first, last = self.experts.first, self.experts.first + self.experts.num_experts
        return [stored for number, stored in zip(self.numbers, self.stored) if first <= number < last]


# What stands for a stack while upstream renames tensors, and after it: the stack's number, or nothing for what upstream is not to read.
# It is found wherever upstream's renamings leave it.
_STACK = "exl3 stack "


class Exl3StackNames(WeightRenaming):
    """
    Has upstream see one tensor of each stack in the place of hundreds: tensors of stacks are given the stack's name before
    upstream's renamings, and on saving their own after these.

    Args:
        stacks (`Exl3Stacks`): Has the stacks.
    """

    __slots__ = ("stacks", "names", "stored_names")

    def __init__(self, stacks: "Exl3Stacks"):
        super().__init__(_BY_NAME, _BY_NAME)
        self.stacks, self.names = stacks, None
        self.stored_names = [stored.name for members in stacks.members.values() for stored in members.stored]

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self.names is None:  # now it is known what this process has
            self.names = dict.fromkeys(self.stored_names, _STACK)
            for number, members in enumerate(self.stacks.members.values()):
                self.names |= {stored.name: f"{_STACK}{number}" for stored in members.own()[:1]}
        name = self.names.get(source_key)
        return (source_key, None) if name is None else (name, _BY_NAME)

    def was_used(self) -> bool:
        return True  # what it undoes on saving does not depend on what was loaded

    def reverse_transform(self) -> "Exl3StackEntryNames":
        return Exl3StackEntryNames(self.stored_names)


class Exl3StackEntryNames(WeightRenaming):
    """
    Gives entries of stacks the names that they have in files.

    Args:
        names (`list[str]`): By the number of an entry, counted through all stacks.
    """

    __slots__ = ("names",)

    def __init__(self, names: list[str]):
        super().__init__(_BY_NAME, _BY_NAME)
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        _, is_entry, number = source_key.rpartition(_STACK)
        return (self.names[int(number)], _BY_NAME) if is_entry else (source_key, None)


class Exl3Stacks(WeightConverter):
    """
    Fills stacks with the tensors of experts, and splits them on saving.

    Args:
        names (`dict[str, list[str]]`): Tensor name in the model, to those that its entries have in files before upstream's
            renamings for saving.
        members (`dict[str, StackMembers]`, *optional*): Tensor name in the model, to where its entries are, for loading.
    """

    __slots__ = ("names", "members")

    def __init__(self, names: dict[str, list[str]], members: dict[str, StackMembers] | None = None):
        super().__init__("exl3 stacks", "exl3 stacks", [Exl3AsStored()])
        self.names, self.members = names, members or {}

    def __deepcopy__(self, memo):
        return Exl3Stacks(self.names, self.members)  # upstream copies it for each stack

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        _, is_stack, number = source_key.rpartition(_STACK)
        if not is_stack or not number:
            return source_key, None
        return next(islice(self.members, int(number), None)), self.source_patterns[0]

    def was_used(self) -> bool:
        return True  # what it undoes on saving does not depend on what was loaded

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        ((first,),) = self.collected_tensors.values()
        self.collected_tensors.clear()
        loading_info.unexpected_keys -= {key for key in loading_info.unexpected_keys if key.endswith(_STACK)}
        stored, placeholder = self.members[layer_name].own(), model.get_parameter_or_buffer(layer_name)
        with log_conversion_errors(layer_name, loading_info, (len(stored), layer_name), self.operations[0]):
            if is_dtensor(placeholder):
                return {layer_name: _part_of_stack(stored, placeholder)}
            # Where something goes to the disk, upstream reads in this thread, and writes contiguous tensors only.
            is_ordered = placeholder.dim() == 4 and isinstance(first, Future)
            first = first.result() if isinstance(first, Future) else first()
            empty = ops.new_trellis if is_ordered and first.device.type == "cpu" else torch.empty
            stack = empty(placeholder.shape, dtype=stored[0].meta.dtype, device=torch.device("cpu"))
            read_stack(stored, stack)
            return {layer_name: stack.to(first.device)}

    def reverse_transform(self) -> "Exl3Unstack":
        return Exl3Unstack(self.names)


def _part_of_stack(stored: list[StoredTensor], placeholder: torch.Tensor) -> torch.Tensor:
    """This process's part of the stack, for the parameter `placeholder`, of tensors in files."""
    device, operation = placeholder.device_mesh.device_type, DtensorShardOperation(placeholder)
    files = {path: safe_open(path, framework="pt") for path in {tensor.file for tensor in stored}}
    entries = (
        operation.shard_tensor(
            files[tensor.file].get_slice(tensor.name), tensor_idx=index, device=device, dtype=placeholder.dtype
        )
        for index, tensor in enumerate(stored)
    )
    stack, filled = torch.empty(local(placeholder).shape, dtype=placeholder.dtype, device=device), 0
    for entry in entries:
        if entry is not None:  # and not with another process
            stack[filled] = entry
            filled += 1
    if filled != len(stack):
        raise ValueError(f"a part of a stack of {len(stack)} entries got {filled}")
    return stack


class Exl3Unstack(WeightConverter):
    """
    Splits stacks into the tensors of experts, by name.

    Args:
        names (`dict[str, list[str]]`): Tensor name in the model, to those of its entries, in order.
    """

    __slots__ = ("names",)

    def __init__(self, names: dict[str, list[str]]):
        super().__init__("exl3 unstack", "exl3 unstack", [Exl3AsStored()])
        self.names = names

    def __deepcopy__(self, memo):
        return Exl3Unstack(self.names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, self.source_patterns[0] if source_key in self.names else None

    def convert(self, layer_name, **kwargs):
        ((stack,),) = self.collected_tensors.values()
        entries = self.operations[0].convert({layer_name: stack})[layer_name].unbind()
        return dict(zip(self.names[layer_name], entries, strict=True))


def stacks_of(placement, experts: dict[str, Exl3Experts]) -> Exl3Stacks:
    """What fills the stacks of `experts`, given by path."""
    layers = {layer: name for name, layer in placement.layers.items() if layer[0] in experts}
    members = {}
    for path, module in experts.items():
        for holder, stack in module.stacks():
            role = holder.partition(".")[0].removeprefix("stacked_")
            owners = [layers[path, f"{expert}.expert_{role}"] for expert in stack.members]
            for leaf in stack.stored:
                stored = [placement.checkpoint.stored[f"{owner}.{leaf}"] for owner in owners]
                members[f"{path}.{holder}.{leaf}"] = StackMembers(module, [*stack.members], stored)
    numbers = count()
    names = {name: [f"{_STACK}{next(numbers)}" for _ in found.stored] for name, found in members.items()}
    return Exl3Stacks(names, members)
