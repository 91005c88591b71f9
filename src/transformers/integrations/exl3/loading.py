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
What happens to the tensors of a checkpoint on their way into a model: the names, and the operations that stack and dequantize.

| loads                           | the model holds              | transforms                                             |
|---------------------------------|------------------------------|--------------------------------------------------------|
| an EXL3 checkpoint              | quantized modules            | `Exl3Names`, where the format splits what is fused,    |
|                                 |                              | and `Exl3Stacks`, where it splits experts              |
| the same with `dequantize=True` | its own modules              | `Exl3Dequantize`, all tensors of a module at a time    |
| a float checkpoint              | quantized modules, pending   | `Exl3Quantize` in quantizing.py                        |
"""

import re

import torch
from torch import nn

from ...core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    log_conversion_errors,
)
from ...distributed.sharding_utils import DtensorShardOperation
from ...distributed.utils import is_dtensor
from . import format
from .checkpoint import LINEAR_TENSORS, cut_columns, join_columns
from .embeddings import Exl3Embedding
from .experts import Exl3Experts, Exl3StackedLinear
from .modules import Exl3Module
from .naming import Exl3FileNames, names_in_files
from .stacks import Exl3AsStored, Exl3StackNames, stacks_of


# Where upstream's transforms have patterns, those here have a word with a space, which matches no tensor: they go by name.
_BY_NAME = "exl3 names"


def replace_with_exl3_modules(model: nn.Module, modules: dict[str, Exl3Module]) -> nn.Module:
    """
    Put quantized modules into a model.

    Args:
        model (`nn.Module`): The model, changed in place.
        modules (`dict[str, Exl3Module]`): The modules by their paths, from a `Placement` or a `Plan`.

    Returns:
        `nn.Module`: `model`.
    """
    for path, module in modules.items():
        model.set_submodule(path, module)
    return model


class Exl3Names(WeightRenaming):
    """
    Renames tensors one by one, here and back: parts that the format splits off stand beside the fused module in a
    checkpoint and inside of it in a model, and the projections of experts have other names there.

    Args:
        names (`dict[str, str]`): Tensor name in the checkpoint, after upstream's renamings, to tensor name in the model.
        on_loading (`bool`, *optional*, defaults to `True`): Whether what is loaded has these names, and not only what is saved.
    """

    __slots__ = ("names", "on_loading")

    def __init__(self, names: dict[str, str], on_loading: bool = True):
        super().__init__(_BY_NAME, _BY_NAME)
        self.names, self.on_loading = names, on_loading

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.names.get(source_key) if self.on_loading else None
        return (source_key, None) if target is None else (target, _BY_NAME)

    def was_used(self) -> bool:
        return True  # what it undoes on saving does not depend on what was loaded

    def reverse_transform(self) -> "Exl3Names":
        return Exl3Names({model: checkpoint for checkpoint, model in self.names.items()})


class Exl3Converter(WeightConverter):
    """
    Collects tensors by name for an operation that takes them by their names in the checkpoint.

    Args:
        targets (`dict[str, str]`): Tensor name in the checkpoint, after upstream's renamings, to the model's tensor
            under which it is collected.
        operation (`ConversionOps`): Returns tensors by their names in the model.
    """

    __slots__ = ("targets",)

    def __init__(self, targets: dict[str, str], operation: ConversionOps):
        kind = f"exl3 {type(operation).__name__}"  # upstream finds converters by their patterns
        super().__init__(kind, kind, [operation])
        self.targets = targets

    def __deepcopy__(self, memo):
        return type(self)(self.targets, self.operations[0])  # upstream copies it for each target

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.targets.get(source_key)
        return (source_key, None) if target is None else (target, self.source_patterns[0])

    def was_used(self) -> bool:
        return False  # nothing to undo on saving

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        names = sorted(self.layer_targets[layer_name], key=dot_natural_key)  # the order of collection
        tensors = dict(zip(names, self.materialize_tensors()[self.source_patterns[0]], strict=True))
        with log_conversion_errors(layer_name, loading_info, (len(tensors), layer_name), self.operations[0]):
            return self.operations[0].convert(
                tensors, full_layer_name=layer_name, model=model, loading_info=loading_info
            )


class Exl3OnSaving(Exl3Converter):
    """Does nothing on loading, and on saving what an `Exl3Converter` with these arguments does."""

    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, None

    def was_used(self) -> bool:
        return True

    def reverse_transform(self) -> Exl3Converter:
        return Exl3Converter(self.targets, self.operations[0])


def keeping_stored(
    modules: dict[str, Exl3Module], model: nn.Module, weight_conversions: list[WeightTransform]
) -> Exl3OnSaving:
    """
    What keeps quantized tensors, and what would be merged with their weights, from the converters that merge what upstream splits.

    Args:
        modules (`dict[str, Exl3Module]`): The quantized modules of a model, by path.
        model (`nn.Module`): The model.
        weight_conversions (`list[WeightTransform]`): Upstream's transforms for it.
    """
    names = {
        f"{path}.{name}.{leaf}".replace("..", ".")
        for path, module in modules.items()
        for name, layer in module.named_modules()
        for leaf in getattr(layer, "stored", ())
        if not isinstance(layer, Exl3StackedLinear)
    }
    merging = [entry for entry in _reversed_converters(weight_conversions) if len(entry.source_patterns) > 1]
    merged = {apply_converters(name, merging) for name in _plain_names(modules)}
    merged = {name for name, pattern in merged if pattern is not None}
    names |= {name for name, _ in model.named_parameters() if apply_converters(name, merging)[0] in merged}
    return Exl3OnSaving({name: name for name in names}, Exl3AsStored())


def _reversed_converters(weight_conversions: list[WeightTransform]) -> list[WeightConverter]:
    return [entry.reverse_transform() for entry in weight_conversions[::-1] if isinstance(entry, WeightConverter)]


def _plain_names(modules: dict[str, Exl3Module]) -> list[str]:
    """The names of the float parameters that `modules`, given by path, stand for."""
    return [f"{path}.{name}" for path, m in modules.items() for name, _ in m.plain.named_parameters(recurse=False)]


def own_part(tensor: torch.Tensor, placeholder: torch.Tensor) -> torch.Tensor:
    """What this process holds of `tensor`, which becomes the parameter `placeholder`: all of it, or a part."""
    return DtensorShardOperation(placeholder).shard_tensor(tensor) if is_dtensor(placeholder) else tensor


_AS_STORED = "_as_stored"


class Exl3Make(ConversionOps):
    """
    Makes parameters of the model from a checkpoint's tensors.

    These are collected under an empty buffer beside the first of the parameters: under a parameter that is divided among
    processes, upstream would read such parts of them as it has of the parameter.
    """

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def converter(self, targets: dict[str, str]) -> Exl3Converter:
        """What collects the tensors of a checkpoint, given by name with the parameters that they are for."""
        model = self.hf_quantizer.placement.model
        for parameter in set(targets.values()):
            path, _, name = parameter.rpartition(".")
            model.get_submodule(path)._buffers[name + _AS_STORED] = torch.empty(0, device="meta")
        return Exl3Converter({name: parameter + _AS_STORED for name, parameter in targets.items()}, self)

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, loading_info=None, **kwargs):
        path, _, name = full_layer_name.rpartition(".")
        del model.get_submodule(path)._buffers[name]
        loading_info.missing_keys.discard(full_layer_name)
        made = self.made(input_dict, full_layer_name.removesuffix(_AS_STORED))
        return {name: own_part(value, model.get_parameter_or_buffer(name)) for name, value in made.items()}

    def made(self, tensors: dict[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
        """The parameters, `parameter` among them, by name."""
        raise NotImplementedError


class Exl3Unpad(Exl3Make):
    """Gives a plain tensor the shape that the model has: without the format's padding, transposed back, with dimensions of size 1."""

    def made(self, tensors, parameter):
        (tensor,) = tensors.values()
        placement = self.hf_quantizer.placement
        tensor = tensor.T if parameter in placement.transposed else tensor
        shape = placement.model.get_parameter_or_buffer(parameter).shape
        dtype = self.hf_quantizer.float_dtype
        tensor = tensor.view(shape) if tensor.numel() == shape.numel() else tensor
        return {parameter: tensor[tuple(slice(size) for size in shape)].to(dtype).contiguous()}


class Exl3Cut(Exl3Make):
    """Cuts one quantized layer by its columns into those that the model has instead."""

    def made(self, tensors, parameter):
        placement = self.hf_quantizer.placement
        columns = next(parts for parts in placement.cut.values() if parameter.rpartition(".")[0] in parts)
        leaves = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        return {
            f"{path}.{leaf}": tensor
            for path, part in columns.items()
            for leaf, tensor in cut_columns(leaves, part).items()
        }


class Exl3Join(ConversionOps):
    """
    Makes on saving one quantized layer again of those that `Exl3Cut` made of it, if they are all there as they were.

    Args:
        joined (`dict[str, dict[str, range]]`): By the layer's name in the checkpoint, after upstream's renamings, the paths of its parts
            with their columns.

    Raises:
        `ValueError`: Where not all are as they were, and one shares a block of columns with another.
    """

    def __init__(self, joined: dict[str, dict[str, range]]):
        self.joined = joined

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        layer = full_layer_name.removesuffix(_AS_STORED)
        columns = self.joined[layer]
        parts = {
            path: {
                name.rpartition(".")[2]: tensor for name, tensor in input_dict.items() if name.startswith(f"{path}.")
            }
            for path in columns
        }
        whole = join_columns([*parts.values()], [*columns.values()])
        if whole is not None:
            input_dict = {f"{layer}.{leaf}": tensor for leaf, tensor in whole.items()}
        elif sharing := [path for path in columns if parts[path] and columns[path].start % format.BLOCK]:
            raise ValueError(
                f"{', '.join(columns)} are one quantized layer in the files, and not all of them are as they were loaded. "
                f"{', '.join(sharing)} cannot be saved alone: their first columns are in one block of {format.BLOCK} with others. "
                "Put what their `dequantize` returns in their places before you save."
            )
        return Exl3AsStored().convert(input_dict)

    def on_saving(self) -> Exl3OnSaving:
        """What collects the tensors of the parts."""
        layers = {path: layer for layer, paths in self.joined.items() for path in paths}
        targets = {f"{path}.{leaf}": layer + _AS_STORED for path, layer in layers.items() for leaf in LINEAR_TENSORS}
        return Exl3OnSaving(targets, self)


class Exl3Dequantize(Exl3Make):
    """Turns the tensors of one quantized module into the parameters of the plain one."""

    def made(self, tensors, parameter):
        placement = self.hf_quantizer.placement
        path = parameter.rpartition(".")[0]
        module = placement.modules[path]
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner not in placement.layers:
                continue  # superseded
            layers.setdefault(placement.layers[owner][1], {})[leaf] = tensor
        plain = module.dequantize(self.hf_quantizer.float_dtype, layers)
        del placement.modules[path]  # with the quantized tensors
        made = {f"{path}.{name}": value.detach() for name, value in plain.named_parameters(recurse=False)}
        if path in placement.row_order:
            made = {name: value[placement.row_order[path].to(value.device)] for name, value in made.items()}
        if placement.tied_head is not None and isinstance(module, Exl3Embedding):
            made[f"{placement.tied_head}.weight"] = made[parameter].clone()
        return made


class Exl3CutAndDequantize(Exl3Cut):
    """The same into the parameters of plain modules."""

    def made(self, tensors, parameter):
        placement, result = self.hf_quantizer.placement, {}
        cut = super().made(tensors, parameter)
        for path in {name.rpartition(".")[0] for name in cut}:
            module = placement.modules.pop(path)
            module.store({leaf: cut[f"{path}.{leaf}"] for leaf in module.stored})
            plain = module.dequantize(self.hf_quantizer.float_dtype)
            result |= {f"{path}.{name}": value.detach() for name, value in plain.named_parameters(recurse=False)}
        return result


def with_transforms(weight_conversions: list[WeightTransform], hf_quantizer) -> list[WeightTransform]:
    """Upstream's transforms for a model, and those that its EXL3 checkpoint needs beside them."""
    placement = hf_quantizer.placement
    renamings = [entry for entry in weight_conversions if isinstance(entry, WeightRenaming)]
    quantized = placement.checkpoint.linears | placement.checkpoint.embeddings
    experts = {path: module for path, module in placement.modules.items() if isinstance(module, Exl3Experts)}
    is_plain = hf_quantizer.quantization_config.dequantize
    tensors = {
        apply_renamings(f"{module}.{leaf}", renamings): (*layer, leaf)
        for module, layer in placement.layers.items()
        if is_plain or layer[0] not in experts
        for leaf in quantized[module]
    }
    unpad = {apply_renamings(name, renamings): parameter for name, parameter in placement.padded.items()}
    converters: list[WeightTransform] = [Exl3Unpad(hf_quantizer).converter(unpad)]
    plain_names = _plain_names(placement.modules)
    for entry in weight_conversions:
        # Quantized parts come by themselves, not through the converters that merge or split weights; what is dequantized
        # leaves through these.
        saving = _reversed_converters([entry])
        if any(apply_converters(name, saving)[1] for name in plain_names):
            entry._was_used = True
    spelled = [_file_names(placement, is_plain, weight_conversions), Exl3Names(placement.spelled)]
    decoded = placement.modules if is_plain else placement.decoded
    targets = {
        name: _first_plain_parameter(placement, path) for name, (path, _, _) in tensors.items() if path in decoded
    }
    targets |= {
        apply_renamings(name, renamings): _first_plain_parameter(placement, owner)
        for name, owner in placement.superseded.items()
        if owner in decoded
    }
    converters.insert(0, Exl3Dequantize(hf_quantizer).converter(targets))
    cut = {
        apply_renamings(f"{name}.{leaf}", renamings): f"{next(iter(parts))}.{'weight' if is_plain else 'trellis'}"
        for name, parts in placement.cut.items()
        for leaf in quantized[name]
    }
    converters.insert(0, (Exl3CutAndDequantize if is_plain else Exl3Cut)(hf_quantizer).converter(cut))
    if is_plain:
        return [*spelled, *converters, *weight_conversions]
    names = {
        name: f"{path}.{layer}.{leaf}" if layer else f"{path}.{leaf}"
        for name, (path, layer, leaf) in tensors.items()
        if name not in targets
    }
    stacks = stacks_of(placement, experts)
    kept = {path: module for path, module in placement.modules.items() if path not in decoded}
    stored = keeping_stored(kept, placement.model, weight_conversions)
    joined = {apply_renamings(name, renamings): parts for name, parts in placement.cut.items()}
    saving = [Exl3Names(names), stacks, stored, Exl3Join(joined).on_saving()]
    return [*spelled, Exl3StackNames(stacks), *converters, *weight_conversions, *saving]


def _file_names(placement, is_plain: bool, weight_conversions: list[WeightTransform]) -> Exl3FileNames:
    """
    What brings back the names of an EXL3 checkpoint, of which those of quantized modules are kept by `Exl3Names`, and those of
    experts by `Exl3StackNames`.
    """
    modules, kept, decoded = placement.modules, set(), set()
    for name, (path, _) in placement.layers.items():
        if is_plain or path in placement.decoded:
            decoded.add(re.sub(r"\.slice\.\d+$", "", name))
        elif not isinstance(modules[path], Exl3Experts):
            kept.add(f"{name}.weight")
    plain = {*placement.checkpoint.others, *(f"{name}.weight" for name in decoded)}
    model = placement.model
    known = {name: path for name, path in placement.padded.items() if path not in placement.transposed}
    return Exl3FileNames(
        names_in_files(plain | kept, weight_conversions, model.base_model_prefix, placement.plain, kept, known)
    )


def _first_plain_parameter(placement, path: str) -> str:
    """The parameter of the model under which all tensors of the module at `path` are collected."""
    name, _ = next(placement.modules[path].plain.named_parameters(recurse=False))
    return f"{path}.{name}"
