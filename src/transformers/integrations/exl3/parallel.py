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
Tensor parallelism: quantized linear layers cut along upstream's own plans.

| style    | trellis       | suh           | svh           | bias                  | the layer computes          |
|----------|---------------|---------------|---------------|-----------------------|-----------------------------|
| colwise  | cut, columns  | whole         | cut           | cut                   | its part of the outputs     |
| rowwise  | cut, rows     | cut           | whole         | whole, added once     | a summand of all outputs    |

A rotation never crosses a block of 128 features, so any cut between blocks is exact (FORMAT section 2.6).
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ...distributed.parallel_utils import replace_layer_number_by_wildcard
from ...distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel
from . import format
from .modules import Exl3Linear, Exl3Module


def _cut(module: nn.Module, name: str, mesh, dims: dict[str, int]):
    """Cut the parameter `name` of a quantized layer along its dimension in `dims`; what is not in there stays whole."""
    if module.pending:
        module.cut_later = mesh, dims
        return
    parameter = module._parameters.get(name)
    if parameter is not None and name in dims:
        cut = distribute_tensor(parameter, mesh, [Shard(dims[name])], src_data_rank=None)
        module._parameters[name] = nn.Parameter(cut, requires_grad=False)


def cut_quantized(model: nn.Module):
    """Cut the layers that were quantized on the fly, which every rank does as a whole: the same weights, the same bytes."""
    for module in model.modules():
        if hasattr(module, "cut_later"):
            mesh, dims = module.cut_later
            del module.cut_later
            for name in dims:
                _cut(module, name, mesh, dims)


class Exl3Colwise(ColwiseParallel):
    """Upstream's style for layers whose outputs are divided among the ranks, for quantized layers too."""

    def shard_param(self, module, param, mesh):
        if not isinstance(module, Exl3Linear):
            return super().shard_param(module, param, mesh)
        _cut(module, param, mesh, {"trellis": 1, "svh": 0, "sv": 0, "bias": 0})

    @contextmanager
    def context_around_forward(self, module, mesh):
        whole = module.out_features
        try:
            with super().context_around_forward(module, mesh):
                if isinstance(module, Exl3Linear):
                    module.out_features = whole // mesh.size()
                yield
        finally:
            module.out_features = whole


class Exl3Rowwise(RowwiseParallel):
    """Upstream's style for layers whose inputs are divided among the ranks, for quantized layers too."""

    def shard_param(self, module, param, mesh):
        if not isinstance(module, Exl3Linear):
            return super().shard_param(module, param, mesh)
        _cut(module, param, mesh, {"trellis": 0, "suh": 0, "su": 0})

    def transform_output_post_forward(self, module, output, mesh):
        if not isinstance(module, Exl3Linear):
            return super().transform_output_post_forward(module, output, mesh)
        bias, module._parameters["bias"] = module._parameters["bias"], None
        try:
            output = super().transform_output_post_forward(module, output, mesh)
        finally:
            module._parameters["bias"] = bias
        return output if bias is None else output + bias[: module.out_features].to(output.dtype)


# Upstream's styles by name, with those that take quantized layers as well.
STYLES = {
    "colwise": Exl3Colwise(input_layouts=Replicate(), output_layouts=Shard(-1)),
    "colwise_gather_output": Exl3Colwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "colwise_rep": Exl3Colwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "rowwise": Exl3Rowwise(input_layouts=Shard(-1), output_layouts=Replicate()),
    "rowwise_split_input": Exl3Rowwise(input_layouts=Replicate(), output_layouts=Replicate()),
    "rowwise_rep": Exl3Rowwise(input_layouts=Replicate(), output_layouts=Replicate()),
}
GATHERED = ("colwise_gather_output", "colwise_rep")  # all ranks have all outputs: the layer may as well stay whole
for _name, _style in STYLES.items():
    ALL_PARALLEL_STYLES.register(f"exl3_{_name}", _style)


def adapt_plan(model: nn.Module, plan: dict[str, str], ranks: int):
    """
    Give the quantized layers of a tensor parallel plan the styles above.

    Args:
        model (`PreTrainedModel`): With its quantized modules, on the meta device.
        plan (`dict[str, str]`): Styles by module name, `*` for numbers, changed in place.
        ranks (`int`): How many parts to cut into.

    Raises:
        `ValueError`: Where a quantized layer cannot be cut as planned, with the names of all such layers.
    """
    problems = []
    for path, module in model.named_modules():
        rule = replace_layer_number_by_wildcard(path)
        style = plan.get(rule, "").removeprefix("exl3_")
        if not style or not any(isinstance(child, Exl3Module) for child in module.modules()):
            continue
        problem = _misfit(path, module, style, ranks)
        if problem is None:
            plan[rule] = f"exl3_{style}"
        elif style in GATHERED:
            del plan[rule]
        else:
            problems.append(problem)
    if problems:
        raise ValueError(
            "\n".join(problems)
            + f"\nThis EXL3 model cannot be spread over {ranks} ranks by tensor parallelism. Use fewer ranks, "
            "or `device_map`."
        )


def _misfit(path: str, module: nn.Module, style: str, ranks: int) -> str | None:
    """Why `module` cannot be cut in the style `style`, None if it can."""
    if style not in STYLES or not isinstance(module, Exl3Linear):
        return f"{path}: an {type(module).__name__} cannot be cut in the style `{style}`"
    side = "in" if style.startswith("rowwise") else "out"
    features = getattr(module, f"{side}_features")
    if features % (format.BLOCK * ranks):
        return f"{path}: its {features} {side}put features are no {ranks} parts of whole blocks of {format.BLOCK}"
    return None


def gathered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A state with the cut tensors of quantized layers put together, on every rank; all ranks have to call this.

    Upstream gathers what else is cut. Communication libraries know no 16-bit integers, and Gloo does not gather float16
    either, so two elements of 16 bits go as one of 32.
    """

    def whole(tensor):
        if not isinstance(tensor, DTensor) or tensor.element_size() != 2 or tensor.to_local().shape[-1] % 2:
            return tensor
        shape = (*tensor.shape[:-1], tensor.shape[-1] // 2)
        pairs = DTensor.from_local(
            tensor.to_local().contiguous().view(torch.int32),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return pairs.full_tensor().view(tensor.dtype)

    return {name: whole(tensor) for name, tensor in state.items()}
