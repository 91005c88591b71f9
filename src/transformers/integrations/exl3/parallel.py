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
Quantized layers under upstream's plans for tensor and expert parallelism: its styles, for these layers too.

| style                      | trellis       | suh           | svh           | bias                  | a process computes       |
|----------------------------|---------------|---------------|---------------|-----------------------|--------------------------|
| colwise                    | cut, columns  | whole         | cut           | cut                   | its part of the outputs  |
| rowwise                    | cut, rows     | cut           | whole         | whole, added once     | a summand of all outputs |
| moe_tp_experts: gate, up   | cut, columns  | whole         | cut           | (refused)             | its part of the outputs  |
| moe_tp_experts: down       | cut, rows     | cut           | whole         | (refused)             | a summand of all outputs |
| ep_dispatch_experts        | whole, those of the experts that a process has                        | its experts' outputs     |

A rotation never crosses a block of 128 features, so any cut between blocks is exact.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ...distributed.expert_parallel import EpDispatchExpertsParallel
from ...distributed.parallel_utils import replace_layer_number_by_wildcard
from ...distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel, TensorParallelLayer
from . import format
from .experts import Exl3Experts, Exl3StackedLinear
from .modules import Exl3Linear, Exl3Module, whole


# The dimensions, from the last one, in which the tensors of a layer or a stack are cut; what is not in there stays whole.
COLUMNS = {"trellis": -2, "svh": -1, "sv": -1, "bias": -1}
ROWS = {"trellis": -3, "suh": -1, "su": -1}


def _cut(module: nn.Module, name: str, mesh, dims: dict[str, int]):
    parameter = module._parameters.get(name)
    if parameter is not None and name in dims:
        cut = distribute_tensor(parameter, mesh, [Shard(dims[name] + parameter.dim())], src_data_rank=None)
        module._parameters[name] = nn.Parameter(cut, requires_grad=False)


class Exl3Colwise(ColwiseParallel):
    """Layers whose outputs are divided."""

    def shard_param(self, module, param, mesh):
        if not isinstance(module, Exl3Linear):
            return super().shard_param(module, param, mesh)
        _cut(module, param, mesh, COLUMNS)

    def context_around_forward(self, module, mesh):
        context = super().context_around_forward(module, mesh)
        return self._own_outputs(module, mesh, context) if isinstance(module, Exl3Linear) else context

    @contextmanager
    def _own_outputs(self, module, mesh, context):
        whole = module.out_features
        module.out_features = whole // mesh.size()
        try:
            with context:
                yield
        finally:
            module.out_features = whole


class Exl3Rowwise(RowwiseParallel):
    """Layers whose inputs are divided."""

    def shard_param(self, module, param, mesh):
        if not isinstance(module, Exl3Linear):
            return super().shard_param(module, param, mesh)
        _cut(module, param, mesh, ROWS)

    def transform_output_post_forward(self, module, output, mesh):
        if not isinstance(module, Exl3Linear):
            return super().transform_output_post_forward(module, output, mesh)
        bias, module._parameters["bias"] = module._parameters["bias"], None
        try:
            output = super().transform_output_post_forward(module, output, mesh)
        finally:
            module._parameters["bias"] = bias
        return output if bias is None else output + bias[: module.out_features].to(output.dtype)


class Exl3ExpertPart(TensorParallelLayer):
    """Projections of experts of which each process has a part: nothing is exchanged around each, `moe_tp_experts` does it once."""

    def __init__(self, dims: dict[str, int], size: str):  # `COLUMNS` or `ROWS`, and the attribute that tells how many
        self.dims, self.size = dims, size

    def shard_param(self, module, param, mesh):
        _cut(module, param, mesh, self.dims)

    def install_forward(self, module, mesh):
        setattr(module, self.size, getattr(module, self.size) // mesh.size())


class Exl3DispatchExperts(EpDispatchExpertsParallel):
    """Experts of which each process has some, and gets the rows for these."""

    def install_forward(self, module, ep_mesh, **kwargs):
        if isinstance(module, Exl3Experts):
            count = module.num_experts // ep_mesh.size()
            module.keep(ep_mesh.get_local_rank() * count, count)
        return super().install_forward(module, ep_mesh, **kwargs)


CUTTING = {
    "colwise": Exl3Colwise(input_layouts=Replicate(), output_layouts=Shard(-1)),
    "colwise_gather_output": Exl3Colwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "colwise_rep": Exl3Colwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "rowwise": Exl3Rowwise(input_layouts=Shard(-1), output_layouts=Replicate()),
    "rowwise_split_input": Exl3Rowwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "rowwise_rep": Exl3Rowwise(input_layouts=Replicate(), output_layouts=Replicate()),
}
# All processes need all outputs of these: a module that is not to be cut may as well stay whole.
GATHERED = ("colwise_gather_output", "colwise_rep", "embedding_rowwise", "embedding_colwise")
WHOLE = ("replicate", "mla_kv_a_proj")  # styles that leave tensors whole
EXPERTS_CUT, EXPERTS_DISPATCHED = "moe_tp_experts", "ep_dispatch_experts"
PROJECTIONS = {"gate": "exl3_expert_colwise", "up": "exl3_expert_colwise", "down": "exl3_expert_rowwise"}
# Under upstream's names where it has the style: plans stay as they are, and those that users pass mean the same.
for _name, _style in {
    **CUTTING,
    EXPERTS_DISPATCHED: Exl3DispatchExperts(),
    "exl3_expert_colwise": Exl3ExpertPart(COLUMNS, "out_features"),
    "exl3_expert_rowwise": Exl3ExpertPart(ROWS, "in_features"),
}.items():
    ALL_PARALLEL_STYLES.register(_name, _style)


def adapt_tensor_plan(model: nn.Module, own: dict[str, str] | None, ranks: int, dispatched: set[str] = frozenset()):
    """
    Make the tensor parallel plan of a model one for its quantized layers.

    Args:
        model (`PreTrainedModel`): With its quantized modules, on the meta device. Its `tp_plan`, styles by module name with `*`
            for numbers, is changed in place.
        own (`dict[str, str]`, *optional*): What a user wants otherwise.
        ranks (`int`): How many parts to cut into.
        dispatched (`set[str]`, *optional*): Names in plans of the experts that are divided by expert parallelism instead.

    Raises:
        `ValueError`: Where a quantized layer cannot be cut as planned, with the names of all such layers.
    """
    plan, problems = model.tp_plan, []
    wanted = plan | (own or {})
    tensors = {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, Exl3Module):
            continue
        rule = replace_layer_number_by_wildcard(path)
        if isinstance(module, Exl3Experts) and rule not in dispatched:
            for name in [name for name in plan if name.rpartition(".")[0] == rule and name not in tensors]:
                del plan[name]  # for a fused parameter
            if wanted.get(rule) == EXPERTS_CUT:
                plan.update({f"{rule}.stacked_{role}.*": PROJECTIONS[role] for role in module.roles})
        style = wanted.get(rule)
        problem = style and rule not in dispatched and _misfit(path, module, style, ranks)
        if problem and style in GATHERED and rule not in (own or {}):
            plan.pop(rule, None)
        elif problem:
            problems.append(problem)
        for name in module.stored:
            if f"{rule}.{name}" in wanted:
                problems.append(f"{path}.{name}: quantized tensors have no rules of their own, {path} has")
    if problems:
        raise ValueError(
            "\n".join(problems)
            + f"\nThis EXL3 model cannot be spread over {ranks} ranks by tensor parallelism. Use fewer "
            "ranks, `ep_size` for experts, or `device_map`."
        )


def _misfit(path: str, module: nn.Module, style: str, ranks: int) -> str | None:
    """Why `module` cannot be cut in the style `style`, None if it can."""
    if style in WHOLE:
        return None
    layers = [(path, module, "in" if style.startswith("rowwise") else "out")]
    if isinstance(module, Exl3Experts) and style == EXPERTS_CUT:
        layers = [
            (f"{path}.{name}", stack, "in" if name.startswith("stacked_down") else "out")
            for name, stack in module.named_modules()
            if isinstance(stack, Exl3StackedLinear)
        ]
        if any(layer.bias is not None for _, layer, _ in layers):
            return f"{path}: experts with biases are not cut"
    elif style not in CUTTING or not isinstance(module, Exl3Linear):
        return f"{path}: an {type(module).__name__} cannot be cut in the style `{style}`"
    for name, layer, side in layers:
        features = getattr(layer, f"{side}_features")
        if features % (format.BLOCK * ranks) or (side == "out" and getattr(layer, "skipped", 0)):
            return f"{name}: its {features} {side}put features are no {ranks} parts of whole blocks of {format.BLOCK}"
    return None


def adapt_expert_plan(model: nn.Module, own: dict[str, str] | None, ranks: int) -> set[str]:
    """
    Make the expert parallel plan of a model one for its quantized experts.

    Args:
        model (`PreTrainedModel`): With its quantized modules, on the meta device. Its `ep_plan` is changed in place.
        own (`dict[str, str]`, *optional*): What a user wants otherwise.
        ranks (`int`): How many processes the experts are divided among.

    Returns:
        `set[str]`: Names in plans of the quantized experts that are divided.

    Raises:
        `ValueError`: Where quantized experts cannot be divided as planned.
    """
    plan, problems, rules = model.ep_plan, [], set()
    wanted = plan | (own or {})
    for path, module in model.named_modules():
        if not isinstance(module, Exl3Module):
            continue
        rule = replace_layer_number_by_wildcard(path)
        style = wanted.get(rule)
        if style is None:
            continue
        rules.add(rule)
        if not isinstance(module, Exl3Experts) or style != EXPERTS_DISPATCHED:
            problems.append(f"{path}: an {type(module).__name__} cannot be divided in the style `{style}`")
        elif module.num_experts % ranks:
            problems.append(f"{path}: its {module.num_experts} experts are not divisible by {ranks}")
    if problems:
        raise ValueError(
            "\n".join(problems)
            + f"\nThe experts of this EXL3 model cannot be divided among {ranks} ranks. Use another "
            f"`ep_size`, and the style `{EXPERTS_DISPATCHED}` for each experts module."
        )
    tensors = {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
    for name in [name for name in plan if name.rpartition(".")[0] in rules and name not in tensors]:
        del plan[name]  # for a fused parameter
    return rules


def gathered(model: nn.Module, is_main: bool) -> dict[str, torch.Tensor]:
    """
    The state of a model that is divided among processes, whole; all of them have to call this.

    Args:
        model (`PreTrainedModel`): Of this process.
        is_main (`bool`): Whether this process wants the result.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU where `is_main`, else empty.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if is_main:
            state[name] = tensor.cpu()
    for path, module in model.named_modules():
        if isinstance(module, Exl3Experts) and module.is_part:
            group = model._mesh_manager.get_mesh("ep").get_group()
            own = {f"{path}.{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
            parts = [None] * torch.distributed.get_world_size(group) if is_main else None
            torch.distributed.gather_object(own, parts, group=group, group_dst=0)
            names = {name: None for part in parts or () for name in part}
            state |= {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
    return state
