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
The experts of a mixture, fused into 3-D parameters in the model: stacks of quantized layers, one tensor for all experts.

| module              | stands for                          | holds                                           |
|---------------------|-------------------------------------|-------------------------------------------------|
| `Exl3Experts`       | experts fused into 3-D parameters   | `stacked_gate`, ...: a projection of all experts |
| `Exl3Projection`    |                                     | a stack for each rate and codebook               |
| `Exl3StackedLinear` |                                     | `[experts, ...]` tensors                         |
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from . import format, grouped, ops
from .modules import Exl3Linear, Exl3Module, is_unhooked


class Exl3StackedLinear(Exl3Module):
    """
    Quantized linear layers of the same sizes, rate and codebook, whose tensors are stacked: a projection of experts.

    Args:
        in_features (`int`): Input features without padding, of each.
        out_features (`int`): Output features without padding, of each.
        tensors (`dict[str, torch.Tensor]`): What an `Exl3Linear` holds, with a first dimension for the experts.
        members (`list[int]`): The number of the expert that each entry of the stack is for, ascending.
    """

    def __init__(self, in_features: int, out_features: int, tensors: dict[str, torch.Tensor], members: list[int]):
        super().__init__()
        self.in_features, self.out_features, self.members = in_features, out_features, members
        self.codebook = next((name for name in format.MARKERS if name in tensors), "3inst")
        self.bits = format.bits_of(tensors["trellis"])
        self.register_parameter("bias", None)
        self.store(tensors)
        self.place_numbers()
        self._packed = grouped.PackedStack()

    scales, codes, check_width = Exl3Linear.scales, Exl3Linear.codes, Exl3Linear.check_width

    def forward(self, x: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): `[rows, in_features]`.
            ranges (`torch.Tensor`): Integer `[experts, 2]`, the first of the rows of each expert and the one after the last.

        Returns:
            `torch.Tensor`: `[rows, out_features]`, zeros in rows of experts that are not in this stack.
        """
        suh, svh = self.scales
        self.check_width(x, suh)
        tensors = self.codes, suh, svh, self.bias
        return grouped.grouped_linear(x, self.ranges_of(ranges), *tensors, self.codebook, self.out_features)

    def ranges_of(self, ranges: torch.Tensor) -> torch.Tensor:
        """Those of the experts in this stack."""
        if len(self.members) == ranges.shape[0]:
            return ranges
        is_here = self._numbers.device == ranges.device  # and not where the weights are offloaded to
        return ranges[self._numbers if is_here else torch.tensor(self.members, device=ranges.device)]

    def packed(self):
        """What the kernel takes for this stack, None where it is not to be used: something is hooked to it, or it has gradients."""
        own = self._parameters
        if "suh" not in own or "svh" not in own or not is_unhooked(self):
            return None
        bias = own["bias"]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        return self._packed(
            own["trellis"], own["suh"], own["svh"], bias, self.codebook, self.in_features, self.out_features
        )

    def place_numbers(self):
        """Have the numbers of the members on this module's device: a CUDA graph cannot copy them there."""
        self._numbers = torch.tensor(self.members, device=self.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.place_numbers()
        return self

    def keep(self, first: int, count: int):
        """Keep what is of `count` experts from number `first` on, which are counted from there from now on."""
        kept = [index for index, member in enumerate(self.members) if first <= member < first + count]
        part = slice(kept[0], kept[-1] + 1) if kept else slice(0)
        self.members = [self.members[index] - first for index in kept]
        self.store({name: getattr(self, name).detach()[part] for name in self.stored})
        self.place_numbers()

    def extra_repr(self) -> str:
        return f"experts={len(self.members)}, {Exl3Linear.extra_repr(self)}"


class Exl3ExpertLinear(Exl3Linear):
    """
    One of the layers of an `Exl3StackedLinear` as a layer of its own: a view, which holds no tensors.

    Args:
        stack (`Exl3StackedLinear`): What holds the tensors.
        index (`int`): The layer's place in the stack.
    """

    def __init__(self, stack: Exl3StackedLinear, index: int):
        nn.Module.__init__(self)
        self._stack, self.index = (stack,), index  # in a tuple, so that it is no submodule
        self.in_features, self.out_features = stack.in_features, stack.out_features
        self.bits, self.codebook = stack.bits, stack.codebook
        plain = nn.Linear(self.in_features, self.out_features, stack.bias is not None, device="meta")
        self._stand_for(plain)

    @property
    def trellis(self) -> torch.Tensor:
        return self._stack[0].trellis[self.index]

    @property
    def stored_bias(self) -> torch.Tensor | None:
        bias = self._stack[0].bias
        return None if bias is None else bias[self.index]

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(scale[self.index] for scale in self._stack[0].scales)

    @property
    def device(self) -> torch.device:
        return self._stack[0].device


class Exl3Projection(nn.Module):
    """
    One projection of all experts: a stack for each kind of them, those with the same rate, codebook and tensors.

    Args:
        in_features (`int`): Input features without padding.
        out_features (`int`): Output features without padding.
        experts (`list[dict[str, torch.Tensor]]`): The tensors of each expert, as an `Exl3Linear` takes them.
    """

    def __init__(self, in_features: int, out_features: int, experts: list[dict[str, torch.Tensor]]):
        super().__init__()
        described, kinds = {}, defaultdict(list)
        for number, tensors in enumerate(experts):
            if id(tensors) not in described:  # experts that are alike may share one
                described[id(tensors)] = tuple((name, t.shape, t.dtype) for name, t in sorted(tensors.items()))
            kinds[described[id(tensors)]].append(number)
        for index, members in enumerate(kinds.values()):
            tensors = {
                name: tensor.new_empty(len(members), *tensor.shape)
                if tensor.is_meta
                else torch.stack([experts[number][name] for number in members])
                for name, tensor in experts[members[0]].items()
            }
            self.add_module(str(index), Exl3StackedLinear(in_features, out_features, tensors, members))

    def places(self) -> dict[int, tuple[str, int]]:
        """For each expert the name of the stack that it is in, and its place there."""
        return {
            member: (name, index)
            for name, stack in self.named_children()
            for index, member in enumerate(stack.members)
        }

    def keep(self, first: int, count: int):
        """Keep `count` experts from number `first` on, which are counted from there from now on."""
        for name, stack in list(self.named_children()):
            stack.keep(first, count)
            if not stack.members:
                del self._modules[name]

    def packed(self) -> list | None:
        """The stacks, each with what the kernel takes for it. None where they are not all to be used like that."""
        found = [(stack, stack.packed()) for stack in self._modules.values()]
        return found if is_unhooked(self) and all(packed for _, packed in found) else None

    def forward(self, x: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        """What the stacks compute together, see `Exl3StackedLinear.forward`."""
        return sum(stack(x, ranges) for stack in self.children())


class Exl3Expert(nn.Module):
    """
    One expert: its projections, `expert_gate` (if there is one), `expert_up` and `expert_down`.

    Checkpoints have other names for them, by architecture. PEFT takes those, as targets of LoRA, for parameters of upstream's
    fused experts.
    """

    def __init__(self, projections: dict[str, Exl3Linear]):
        super().__init__()
        for role, projection in projections.items():
            self.add_module(f"expert_{role}", projection)


class Exl3Experts(Exl3Module):
    """
    Experts of a mixture, each with its own quantized projections.

    The modules of one expert, `experts.3` with `experts.3.expert_up` for instance, are views that are made when they are asked
    for. `separate` makes them modules that can be replaced.

    Args:
        projections (`dict[str, Exl3Projection]`): Of all experts: `gate` (if there is one), `up`, `down`.
        plain (`nn.Module`): The model's own experts, whose gating function is used.
    """

    def __init__(self, projections: dict[str, Exl3Projection], plain: nn.Module):
        super().__init__()
        self._stand_for(plain)
        self.roles = tuple(projections)
        for role, projection in projections.items():
            self.add_module(f"stacked_{role}", projection)
        self._find_places()
        self.num_experts, self.first, self.is_part = len(self._places[self.roles[0]]), 0, False

    def _find_places(self):
        self._places = {role: getattr(self, f"stacked_{role}").places() for role in self.roles}

    def keep(self, first: int, count: int):
        """
        Keep `count` experts from number `first` on, and leave the others to other processes. From here on, `forward` takes
        the numbers of experts less `first`.
        """
        for role in self.roles:
            getattr(self, f"stacked_{role}").keep(first, count)
        self._find_places()
        self.num_experts, self.first, self.is_part = count, first, True

    def projection(self, expert: int, role: str) -> Exl3Linear:
        """The projection of an expert as a layer of its own: a view, or what has been put in its place."""
        separate = self._modules.get(str(expert))
        if separate is not None:
            return separate._modules[f"expert_{role}"]
        stack, index = self._places[role][expert - self.first]
        return Exl3ExpertLinear(self._modules[f"stacked_{role}"]._modules[stack], index)

    def stacks(self) -> Iterator[tuple[str, Exl3StackedLinear]]:
        """The stacks with their names."""
        for role in self.roles:
            for name, stack in getattr(self, f"stacked_{role}").named_children():
                yield f"stacked_{role}.{name}", stack

    def layer(self, name):
        expert, _, role = name.partition(".expert_")
        return self.projection(int(expert), role)

    def holder(self, name):
        expert, _, role = name.partition(".expert_")
        place = self._places[role].get(int(expert) - self.first)
        return None if place is None else f"stacked_{role}.{place[0]}"

    def __getattr__(self, name: str):
        if name.isdecimal() and name not in self._modules and 0 <= int(name) - self.first < self.num_experts:
            return Exl3Expert({role: self.projection(int(name), role) for role in self.roles})
        return super().__getattr__(name)

    def separate(self):
        """
        Have the views of all experts among the modules, for PEFT to find and to put adapters on.

        Raises:
            `RuntimeError`: Where the tensors are divided among processes, or offloaded.
        """
        if self.is_part or any(hasattr(p, "to_local") or p.is_meta for p in self.parameters()):
            raise RuntimeError(
                "Experts that are divided among processes or offloaded cannot be separated for adapters: load the model "
                "without `distributed_config`, on devices that hold it."
            )
        for expert in range(self.num_experts):
            setattr(self, str(expert), getattr(self, str(expert)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): `[tokens, hidden]`.
            top_k_index (`torch.Tensor`): Integer `[tokens, k]`, the experts of each token; `num_experts` stands for none.
            top_k_weights (`torch.Tensor`): `[tokens, k]`, what their outputs are weighted by.

        Returns:
            `torch.Tensor`: `[tokens, hidden]`.
        """
        mixed = self._directly(hidden_states, top_k_index, top_k_weights)
        if mixed is not None:
            return mixed
        rows, ranges, places = grouped.routed(top_k_index, self.num_experts)
        x = hidden_states.index_select(0, rows)
        if self._has_adapters():
            output = self._one_by_one(x, ranges)
        else:
            output = self._expert(lambda role, x: getattr(self, f"stacked_{role}")(x, ranges), x)
        weighted = output.index_select(0, places).float() * top_k_weights.reshape(-1, 1).float()
        return weighted.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _directly(self, x, top_k_index, top_k_weights) -> torch.Tensor | None:
        """
        What `forward` returns, on a CPU in a few calls of its kernel. None where something is to see operators or modules, or where
        matrix products are faster.
        """
        if not ops.is_direct(x, top_k_weights) or len(self._modules) > len(self.roles):
            return None
        packed = {role: self._modules[f"stacked_{role}"].packed() for role in self.roles}
        if not all(packed.values()):
            return None
        kernels = grouped.compiled()
        order, ranges, routed = kernels.route(top_k_index.reshape(-1).long(), self.num_experts)
        rows = order.shape[0]
        few = ops.most_rows(x)
        if routed > few and (ranges[:, 1] - ranges[:, 0]).max() > few:
            return None

        def multiply(roles, x, sharing=1):
            y = x.new_empty(rows, len(roles), packed[roles[0]][0][1].out_features)
            if routed < rows:
                y[order[routed:]] = 0  # of no expert
            products = [
                (stack, own.ranges_of(ranges), y[:, index])
                for index, role in enumerate(roles)
                for own, stack in packed[role]
            ]
            kernels.grouped_linear(products, x.contiguous(), order, sharing)
            return y

        hidden = multiply([role for role in self.roles if role != "down"], x, top_k_index.shape[-1])
        return kernels.mix(multiply(["down"], self._activated(hidden))[:, 0], top_k_weights.float())

    def _has_adapters(self) -> bool:
        """Whether something has been put in the place of separated layers, or hooks on them."""
        return len(self._modules) > len(self.roles) and not all(
            type(layer) is Exl3ExpertLinear and is_unhooked(layer)
            for expert in self.children()
            if isinstance(expert, Exl3Expert)
            for layer in expert.children()
        )

    def _one_by_one(self, x: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        """The outputs for `x`, whose rows `ranges[e, 0]` to `ranges[e, 1]` are those of expert `e`, through adapters."""
        output = x.new_zeros(x.shape)
        for expert, (start, stop) in enumerate(ranges.tolist()):
            if start < stop:
                rows = x[start:stop]
                output[start:stop] = self._expert(lambda role, rows: self.projection(expert, role)(rows), rows)
        return output

    def hidden_of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What the `down` projection of an expert takes where the expert takes rows `x` `[rows, hidden]`."""
        return self._expert(lambda role, rows: rows if role == "down" else self.projection(expert, role)(rows), x)

    def _expert(self, project: Callable[[str, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What experts compute of rows `x`, where `project(role, rows)` are their projections."""
        projected = torch.stack([project(role, x) for role in self.roles if role != "down"], dim=1)
        return project("down", self._activated(projected))

    def _activated(self, projected: torch.Tensor) -> torch.Tensor:
        """What `down` takes, of the outputs `[rows, 1 or 2, features]` of `gate`, if there is one, and `up`."""
        if not getattr(self.plain, "is_concatenated", True):
            projected = projected.transpose(1, 2)
        joined = projected.flatten(1)
        return self.plain._apply_gate(joined) if "gate" in self.roles else self.plain.act_fn(joined)

    def plain_views(self, name, tensor):
        leaf = "bias" if name.endswith("_bias") else "weight"
        if leaf == "weight" and getattr(self.plain, "is_transposed", False):
            tensor = tensor.transpose(1, 2)
        for expert in range(self.first, self.first + self.num_experts):
            view = tensor[expert]
            if name.startswith("down_proj"):
                pieces = {"down": view}
            elif "gate" not in self.roles:
                pieces = {"up": view}
            elif getattr(self.plain, "is_concatenated", True):
                pieces = dict(zip(("gate", "up"), view.chunk(2)))
            else:
                pieces = {"gate": view[::2], "up": view[1::2]}
            for role, piece in pieces.items():
                yield f"{expert}.expert_{role}", leaf, piece

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


def separate_experts(model: nn.Module):
    """
    Have each projection of each expert of a model among its modules, so that LoRA can have adapters there: with the target
    modules `expert_gate`, `expert_up` and `expert_down`. They are views, and need no memory.

    Args:
        model (`PreTrainedModel`): Quantized; call this before `get_peft_model`.

    Raises:
        `RuntimeError`: Where experts are divided among processes, or offloaded.
    """
    for module in list(model.modules()):
        if isinstance(module, Exl3Experts):
            module.separate()
