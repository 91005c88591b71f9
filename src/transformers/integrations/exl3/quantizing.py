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
"""Quantizing on the fly: the operation on load, what is left to do when all tensors are in place, and the way back."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from ...core_model_loading import ConversionOps, WeightRenaming
from ...distributed.sharding_utils import _dtensor_from_local_like
from ...distributed.utils import is_dtensor
from . import encoder, finished, format, ops
from .embeddings import Exl3Embedding, Exl3TiedHead
from .experts import Exl3Experts, Exl3StackedLinear
from .loading import own_part
from .modules import Exl3Linear, Exl3Module, whole
from .progress import Progress
from .stacks import Exl3StackNames, Exl3Stacks


LEFT_OUT = "Download the weights again, or leave the layer as it is by `modules_to_not_convert`."


class Exl3Quantize(ConversionOps):
    """Quantizes a parameter of a float checkpoint for the module that waits for it."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        quantizer, result = self.hf_quantizer, {}
        try:
            for name, value in input_dict.items() if quantizer.failure is None else ():
                result |= self._quantized(name, value[0] if isinstance(value, list) else value, model, missing_keys)
        except Exception as error:
            # Upstream would go through all parameters, for hours, and then raise an error that does not say what is wrong.
            quantizer.failure = error
        if quantizer.failure is not None:
            missing_keys.clear()
            return {}
        return result

    def _quantized(self, name, value, model, missing_keys):
        """What the parameter `name` becomes: itself where nothing waits for it."""
        result, quantizer = {}, self.hf_quantizer
        path, _, parameter = name.rpartition(".")
        waiting = [(path, parameter)] if parameter in getattr(model.get_submodule(path), "pending", ()) else []
        if not waiting:
            result[name] = value
        # The embeddings last: when they have come, the name that the value is for is gone.
        waiting = [(head, "weight") for head in quantizer.heads_tied_to(name)] + waiting
        for path, parameter in waiting:
            module = model.get_submodule(path)
            # A head that is not quantized, and no longer tied to what is; or what is quantized when its inputs arrive.
            if not isinstance(module, Exl3Module) or quantizer.waits_for_data(module):
                result[f"{path}.{parameter}"] = value
                continue
            gathered = _gathered(
                value, model.get_parameter_or_buffer(name), module.plain.get_parameter(parameter).shape
            )
            made = quantize_parameter(path, module, parameter, gathered, quantizer.progress)
            result |= {name: own_part(tensor, model.get_parameter_or_buffer(name)) for name, tensor in made.items()}
            missing_keys.discard(f"{path}.{parameter}")
        return result


class Exl3Failure(WeightRenaming):
    """
    Renames nothing. When all parameters are through, upstream asks its transforms whether they were used: here the error of a
    parameter that could not be quantized is raised then, before anything is done with a model that is not whole.
    """

    __slots__ = ("hf_quantizer",)

    def __init__(self, hf_quantizer):
        super().__init__("exl3 failure", "exl3 failure")  # with a space: a pattern that matches no tensor
        self.hf_quantizer = hf_quantizer

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, None

    def was_used(self) -> bool:
        if self.hf_quantizer.failure is not None:
            raise self.hf_quantizer.failure
        return False


def _gathered(value: torch.Tensor, placeholder: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The tensor of shape `shape` of which this process has read `value`, its part of the parameter `placeholder`."""
    if not is_dtensor(placeholder):
        return value
    from torch.distributed.tensor import DTensor

    parts = DTensor.from_local(
        value.contiguous(),
        placeholder.device_mesh,
        placeholder.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole(parts)


def quantize_parameter(
    path: str,
    module: Exl3Module,
    parameter: str,
    value: torch.Tensor,
    progress: Progress,
    moments_of: Callable = lambda layer: None,
) -> dict[str, torch.Tensor]:
    """
    Quantize one parameter that a module waits for.

    Args:
        path (`str`): Of the module in the model.
        module (`Exl3Module`): Waits for `parameter`, and no longer after this.
        parameter (`str`): Name of the parameter in the plain module.
        value (`torch.Tensor`): The parameter, floating.
        progress (`Progress`): Of the model; tells the effort, too.
        moments_of (`Callable`, *optional*): Takes the names that `module.plain_views` has for layers to the `Moments` of their
            inputs, or to None where there is no data.

    Returns:
        `dict[str, torch.Tensor]`: By name in the model, the tensors that the parameter became.

    Raises:
        `ValueError`: Where the value cannot be quantized, with the name of the tensor.
    """
    expected = module.plain.get_parameter(parameter).shape
    if value.shape != expected:
        raise ValueError(f"{path}.{parameter} has the shape {list(value.shape)}, the model's is {list(expected)}")
    name, kept = f"{path}.{parameter}", finished.layers()
    is_stacked = isinstance(module, Exl3Experts)
    tensors = kept.find(name) if is_stacked else None
    if tensors is None:
        made, layers = _encoded(path, module, parameter, value, progress, moments_of)
        if is_stacked:
            stacks = {tensor: torch.stack(encoded) for tensor, encoded in made.items()}
            del made
            tensors = kept.keep(name, stacks, layers)
        else:
            tensors = {tensor: encoded for tensor, (encoded,) in made.items()}
    else:
        views = module.plain_views(parameter, value)
        progress.skip(sum(view.numel() for _, leaf, view in views if leaf != "bias"))
    module.arrived(parameter)
    return {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _encoded(path, module, parameter, value, progress, moments_of):
    """
    What a parameter becomes, as `quantize_parameter` takes it: by name in the module, the tensors of its layers, in order; and the
    names under which the layers were kept.
    """
    made, names, kept = defaultdict(list), [], finished.layers()
    for layer, leaf, view in module.plain_views(parameter, value):
        linear = module.layer(layer)
        name = f"{path}.{layer}" if layer else path
        holder = module.holder(layer)
        before = f"{holder}." if holder else ""
        if leaf == "bias":
            made[f"{before}bias"].append(_stored_bias(name, view, linear))
            continue
        tensors = kept.find(name)
        if tensors is None:
            view = view.to(device=kept.device)
            try:
                with progress.shown(view.device) as update:
                    data = () if isinstance(linear, Exl3Embedding) else (moments_of(layer),)
                    tensors = linear.encoded(view, encoder.seed_of(name), progress.effort, update, *data)
            except ValueError as error:
                raise ValueError(f"{name}.weight cannot be quantized: {error}. {LEFT_OUT}") from error
            tensors = kept.keep(name, tensors)
        else:
            progress.skip(view.numel())
        names.append(name)
        for tensor, encoded in tensors.items():
            made[f"{before}{tensor}"].append(encoded)
    return made, names


def _stored_bias(name: str, bias: torch.Tensor, linear: Exl3Linear) -> torch.Tensor:
    """`bias` as the format stores it: fp16, padded."""
    stored = torch.nn.functional.pad(bias, (0, format.padded(linear.out_features) - bias.shape[0])).half()
    if not stored.isfinite().all():
        raise ValueError(
            f"{name}.bias cannot be stored: it is not finite in float16 (the largest is {bias.abs().max()}). {LEFT_OUT}"
        )
    return stored


def quantize_in_place(
    model: nn.Module,
    path: str,
    progress: Progress,
    moments_of: Callable = lambda layer: None,
    names: list[str] | None = None,
):
    """
    Quantize the parameters that the module at `path` has and waits for, or those of them that `names` has. Other arguments are
    as of `quantize_parameter`.
    """
    module = model.get_submodule(path)
    for name, value in late_parameters(model, path, module).items():
        if names is not None and name not in names:
            continue
        for tensor, result in quantize_parameter(path, module, name, value, progress, moments_of).items():
            owner, _, leaf = tensor.rpartition(".")
            _set(model.get_submodule(owner), leaf, result)


def finish_modules(model: nn.Module, progress: Progress | None = None, calibrate: Callable | None = None):
    """
    What is left to do when all tensors are in place: quantize the parameters that did not come by themselves (one converter
    of upstream's may yield several), leave plain the modules whose weights did not come at all, freeze, align, and put tiles in
    order.

    Args:
        model (`PreTrainedModel`): The model, changed in place.
        progress (`Progress`, *optional*): Of a model that is quantized.
        calibrate (`Callable`, *optional*): Takes the paths of modules that wait, when all others are as they are to be, to
            quantize with data what it can.
    """
    for entry in getattr(model, "_weight_conversions", None) or ():
        if isinstance(entry, Exl3Stacks):
            entry.members.clear()  # with the modules: saving goes by the names
        elif isinstance(entry, Exl3StackNames):
            entry.names = {}
    waiting, parts = [], set()
    for path, module in list(model.named_modules()):
        if isinstance(module, Exl3TiedHead):
            module.decode(model.get_input_embeddings())
        if module in parts:
            continue
        if getattr(module, "pending", None):
            if any(is_dtensor(getattr(module, name)) for name in module.pending):
                raise ValueError(
                    f"{path} cannot be quantized on the fly by several processes: its parameters do not come one by one. Quantize "
                    "the model in one process, save it, and load that."
                )
            if _is_new(module):
                put(model, path, _initialized(model, path, module))
                continue
            if calibrate is not None and not isinstance(module, Exl3Embedding):
                waiting.append(path)
                parts.update(module.modules())
                continue
            quantize_in_place(model, path, progress)
        settle(module)
    if waiting:
        calibrate(waiting)
    for path in waiting:
        if model.get_submodule(path).pending:
            quantize_in_place(model, path, progress)
        for module in model.get_submodule(path).modules():
            settle(module)


def settle(module: nn.Module):
    """Freeze, align, and put in order what `module` itself holds, once it is there."""
    if isinstance(module, Exl3Embedding):
        module.to_plain_dtype()
    if isinstance(module, Exl3Module):
        module.requires_grad_(False)
    if isinstance(module, Exl3StackedLinear):
        module.place_numbers()
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.device.type != "cpu" or hasattr(parameter, "device_mesh"):
            continue
        is_run = not finished.layers().are_files
        if isinstance(module, (Exl3Linear, Exl3StackedLinear)) and name == "trellis" and is_run:
            parameter.data = ops.ordered(parameter.data)
        # Files written without padding of their header leave tensors at addresses that no vector code expects.
        if parameter.data_ptr() % parameter.element_size():
            parameter.data = parameter.data.clone()


def _set(module: nn.Module, name: str, value: torch.Tensor):
    """Give `module` what it holds of the tensor `name`."""
    placeholder = getattr(module, name)
    if is_dtensor(placeholder):
        value = _dtensor_from_local_like(own_part(value, placeholder), placeholder)
    setattr(module, name, value if name in module._buffers else nn.Parameter(value, requires_grad=False))


def _lacking(module: Exl3Module) -> list[str]:
    """Those of the parameters that `module` waits for that the checkpoint lacks."""
    return [name for name in sorted(module.pending) if not getattr(getattr(module, name), "_is_hf_initialized", False)]


def _is_new(module: Exl3Module) -> bool:
    """Whether the checkpoint lacks a weight of `module`: it is to be trained, and nothing is gained by quantizing it."""
    return any(not name.endswith("bias") for name in _lacking(module))


@torch.no_grad()
def _initialized(model: nn.Module, path: str, module: Exl3Module) -> nn.Module:
    """The plain module that `module` stands for, with what came and what its model initialises the rest to."""
    plain = module.empty_plain()
    ancestors = [path.rsplit(".", up)[0] for up in range(path.count(".") + 1)] + [""]
    owner = next(m for m in map(model.get_submodule, ancestors) if hasattr(m, "_init_weights"))
    owner._init_weights(plain)
    lacking = _lacking(module)
    for name, parameter in plain.named_parameters(recurse=False):
        if name in lacking:
            continue
        if name in module.pending:
            parameter.data.copy_(getattr(module, name))
            continue
        for layer, leaf, view in module.plain_views(name, parameter.data):
            view.copy_(module.layer(layer).dequantized(leaf))
    return plain


def late_parameters(model: nn.Module, path: str, module: Exl3Module) -> dict[str, torch.Tensor]:
    """The parameters that `module` waits for: as they came, and biases that did not as its model initialises them."""
    values = {name: getattr(module, name).detach() for name in sorted(module.pending)}
    lacking = _lacking(module)
    if lacking:
        plain = _initialized(model, path, module)
        values |= {name: plain.get_parameter(name).detach() for name in lacking}
    return values


def put(model: nn.Module, path: str, plain: nn.Module):
    """Put `plain` in the place of the module at `path`, with what moves its inputs."""
    module = model.get_submodule(path)
    if hasattr(module, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, module._hf_hook)
    model.set_submodule(path, plain)


def dequantize_modules(model: nn.Module, dtype: torch.dtype | None = None):
    """
    Replace every quantized module of a model by the plain one that it stands for.

    Args:
        model (`nn.Module`): The model, changed in place.
        dtype (`torch.dtype`, *optional*): Of the weights, by default what the model is in.

    Raises:
        `ValueError`: Where weights are offloaded, or divided among processes.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, Exl3Module)]
    modules = {path: model.get_submodule(path) for path in paths}
    outermost = {path: m for path, m in modules.items() if not any(path.startswith(f"{other}.") for other in paths)}
    for path, module in outermost.items():
        is_divided = getattr(module, "is_part", False) or any(map(is_dtensor, module.parameters()))
        if is_divided or any(parameter.is_meta for parameter in module.parameters()):
            where = "divided among processes" if is_divided else "offloaded"
            raise ValueError(f"{path} is {where}: load the checkpoint with `Exl3Config(dequantize=True)` instead.")
    for path, module in outermost.items():
        put(model, path, module.dequantize(dtype))
