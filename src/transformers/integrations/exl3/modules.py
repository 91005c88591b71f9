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
The modules of a quantized model: their tensors, under the names that checkpoints have, and their forward.

A module of the model (`nn.Linear`, `Conv1D`, experts with fused 3-D weights, an embedding) is replaced by one that holds
quantized linear layers: itself, or the parts that the format splits the module into. `plain_views` tells which piece of
which plain parameter each part stands for; quantizing reads through these views and dequantizing writes through them.

| module             | stands for                          | holds                                          |
|--------------------|-------------------------------------|------------------------------------------------|
| `Exl3Linear`       | `nn.Linear`, `Conv1D`                | itself                                         |
| `Exl3SplitLinear`  | a fused projection (`qkv_proj`, ...) | its parts by name (`q_proj`, `k_proj`, ...)     |
| `Exl3SlicedLinear` | a very wide MLP projection          | `slice.0`, `slice.1`, ...                      |
| `Exl3Experts`      | experts fused into 3-D parameters   | `stacked_gate`, ...: stacks of all experts     |
| `Exl3Embedding`    | `nn.Embedding`                      | itself                                         |
| `Exl3TiedHead`     | a head tied to such an embedding     | nothing: its weight is decoded from there      |
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from . import format, ops


EMBEDDING_STRIP_ELEMENTS = 1 << 16  # of a table that are decoded at a time, all of whose intermediates a cache holds


def _with_parameters(module: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `module` that shares all but its own parameters, which are `values`."""
    module = copy.copy(module)
    module._parameters = {**module._parameters, **{name: nn.Parameter(value) for name, value in values.items()}}
    return module


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that may be divided among several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be divided among several processes, each of which has to call this."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    # Communication libraries know no 16-bit integers, and Gloo no float16. The wider types hold the same values.
    if tensor.element_size() == 2:
        wide = torch.float32 if tensor.is_floating_point() else torch.int32
        return tensor.to(wide).full_tensor().to(tensor.dtype)
    return tensor.full_tensor()


def _refuse_gradients(requires_grad: bool = True):
    if requires_grad:
        raise RuntimeError(
            "The weights of a quantized EXL3 layer cannot be trained, and `modules_to_save` would train a copy of one. Name it in "
            "`target_modules` to train an adapter on it, or quantize the model without it: `modules_to_not_convert`, and no "
            "`head_bits` for a head."
        )


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A trellis as int16, whichever 16-bit type its file had. `torch.jit` does not know views of other dtypes: none without need."""
    return tensor if tensor.dtype is torch.int16 else tensor.view(torch.int16)


class Exl3Module(nn.Module):
    """
    What the modules here share.

    Args:
        plain (`nn.Module`): The module that this one stands for. It is kept, without memory, to be restored.
    """

    _is_hf_initialized = True  # upstream is not to initialise weights here: there are none
    _hf_quantized_needs_local_tp = True  # under tensor parallelism the operators take each rank's own tensors
    pending: set[str] = frozenset()  # names of the plain module's parameters that are still to be quantized
    stored: tuple[str, ...] = ()  # names of the parameters that hold what is quantized

    def _stand_for(self, plain: nn.Module):
        # In a tuple, so that it is no submodule: it has no tensors to load, move or save.
        self._plain = (
            _with_parameters(plain, {name: p.to("meta") for name, p in plain.named_parameters(recurse=False)}),
        )
        self.plain_dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
        self.train(plain.training)

    def store(self, tensors: dict[str, torch.Tensor]):
        """Hold `tensors`, which are of the names, shapes and dtypes of a checkpoint."""
        self.stored = tuple(tensors)
        for name, tensor in tensors.items():
            # FSDP shards parameters and takes no scalars.
            if name in format.MARKERS:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def plain(self) -> nn.Module:
        """The module that this one stands for, on the meta device."""
        return self._plain[0]

    def plain_views(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
        """
        The pieces of one parameter of the plain module.

        Args:
            name (`str`): The parameter's name in the plain module.
            tensor (`torch.Tensor`): Its value, or the memory for it.

        Yields:
            `tuple(str, str, torch.Tensor)`: The name of an `Exl3Linear` in this module (empty for itself), `weight` or
            `bias`, and the view of `tensor` that is this layer's, `[out, in]` or `[out]`.
        """
        raise NotImplementedError

    def wait_for_plain(self):
        """
        Have the parameters of the plain module as well, on the meta device, so that a checkpoint's weights find them, and
        upstream's conversions, which ask for a parameter to read its shape or dtype. They stand among the buffers, which are
        read whole where parameters are divided among processes.
        """
        plain = {
            name: nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in self.plain.named_parameters(recurse=False)
        }
        self._buffers.update({name: value for name, value in plain.items() if name not in self.stored})
        self.pending = set(plain)

    def arrived(self, name: str):
        """Wait no longer for the parameter `name` of the plain module."""
        self.pending.discard(name)
        if name not in self.stored:
            del self._buffers[name]

    def empty_plain(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        """The plain module with parameters of zeros, on `device` or on this module's."""
        dtype = dtype or self.plain_dtype
        values = {
            name: torch.zeros(parameter.shape, dtype=dtype, device=device or self.device)
            for name, parameter in self.plain.named_parameters(recurse=False)
        }
        return _with_parameters(self.plain, values).train(self.training)

    @torch.no_grad()
    def dequantize(
        self, dtype: torch.dtype | None = None, tensors: dict[str, dict[str, torch.Tensor]] | None = None
    ) -> nn.Module:
        """
        The plain module with the weights that this one's stand for.

        Args:
            dtype (`torch.dtype`, *optional*): Of the weights, by default as the model has it.
            tensors (`dict[str, dict[str, torch.Tensor]]`, *optional*): What the layers of `plain_views` hold, by their names, by
                default what they have.

        Returns:
            `nn.Module`: On the device of the tensors.
        """
        device = self.device if tensors is None else next(iter(next(iter(tensors.values())).values())).device
        plain = self.empty_plain(dtype, device)
        for name, parameter in plain.named_parameters(recurse=False):
            for layer, leaf, view in self.plain_views(name, parameter.detach()):
                stored = self.layer(layer)
                view.copy_((stored if tensors is None else stored.with_tensors(tensors[layer])).dequantized(leaf))
        return plain

    def __setstate__(self, state):
        super().__setstate__(state)
        # PEFT trains copies of what `modules_to_save` names. Torch's error would name neither the layer nor a remedy.
        for parameter in self._parameters.values():
            if parameter is not None and not parameter.is_floating_point():
                parameter.requires_grad_ = _refuse_gradients

    def layer(self, name: str) -> nn.Module:
        """The layer that `plain_views` calls `name`."""
        return self.get_submodule(name)

    def holder(self, name: str) -> str | None:
        """
        The name of the module in this one that has the tensors of the layer that `plain_views` calls `name`, None where another
        process has them.
        """
        return name

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _apply(self, fn, recurse=True):
        """Moves, and does not cast: the dtypes of quantized tensors are part of the format."""

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


_IN_PLACE = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class DequantizedWeight(torch.Tensor):
    """
    A weight that was dequantized to be read. Changing it in place would change nothing, and is an error; whatever is
    computed from it is a plain tensor.
    """

    _is_hf_initialized = True  # some models initialise the weights of their children

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        is_in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        first = next(iter((*args, *(kwargs or {}).values())), None)
        if is_in_place and isinstance(first, cls):
            raise RuntimeError(
                "The weight of an Exl3Linear is quantized and cannot be changed in place, adapters cannot be merged into it. "
                "Make the model plain with `model.dequantize()` first."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # What is the same memory under another name is as little to be changed.
        return result.as_subclass(cls) if name == "__get__" and isinstance(result, torch.Tensor) else result


class Exl3Linear(Exl3Module, nn.Linear):
    """
    A quantized linear layer, `y = x @ W + bias`, on the tensors that a checkpoint has for it.

    Args:
        in_features (`int`): Input features without padding.
        out_features (`int`): Output features without padding.
        tensors (`dict[str, torch.Tensor]`): What the layer holds: `trellis` int16 `[in/16, out/16, 16K]`; `suh` fp16 `[in]`
            or `su` int16 `[in/16]`; `svh` fp16 `[out]` or `sv` int16 `[out/16]`; `mcg` or `mul1`, int32 `[]`, or neither;
            `bias` `[out]` or none. `in` and `out` are the sizes with padding.
        plain (`nn.Module`, *optional*): The module that this layer stands for, a `nn.Linear` of these sizes if not given.
    """

    def __init__(
        self, in_features: int, out_features: int, tensors: dict[str, torch.Tensor], plain: nn.Module | None = None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.codebook = next((name for name in format.MARKERS if name in tensors), "3inst")
        self.bits = format.bits_of(tensors["trellis"])
        if plain is None:
            plain = nn.Linear(in_features, out_features, "bias" in tensors, device="meta")
        self._stand_for(plain)
        self.register_parameter("bias", None)
        self.store(tensors)
        self._directly = ops.DirectLinear()

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out_features, in_features]`, dequantized anew at each access, to be read only."""
        pending = self._buffers.get("weight")
        if pending is not None:
            return pending
        return self.dequantized("weight").to(self.plain_dtype).as_subclass(DequantizedWeight)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`suh` and `svh` of this process, from the packed signs where an old file has these."""
        return tuple(
            local(getattr(self, scale))
            if scale in self._parameters
            else format.unpack_signs(local(getattr(self, sign)))
            for scale, sign in (("suh", "su"), ("svh", "sv"))
        )

    @property
    def codes(self) -> torch.Tensor:
        """The trellis of this process as int16, whichever 16-bit type the file had."""
        return _words(local(self.trellis))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self._parameters
        if "suh" in own and "svh" in own:
            tensors = own["trellis"], own["suh"], own["svh"], own["bias"]
            y = self._directly(x, *tensors, self.codebook, self.in_features, self.out_features)
            if y is not None:
                return y
        suh, svh = self.scales
        self.check_width(x, suh)
        return ops.linear(x, self.codes, suh, svh, self.bias, self.codebook, self.out_features)

    def check_width(self, x: torch.Tensor, suh: torch.Tensor):
        """Raise `ValueError` where `x` `[..., in_features]` is of another width; operators see but the one with padding."""
        width = min(self.in_features, suh.shape[0])  # of a divided layer the part that this process has
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(f"EXL3 linear: the input is {x.dtype} {[*x.shape]}, the layer has {width} input features")

    def encoded(self, weight: torch.Tensor, seed: int, effort: str, progress=None) -> dict[str, torch.Tensor]:
        """What stores `weight` `[out_features, in_features]` here: tensors by name. Arguments as of `ops.encode`."""
        tensors = ops.encode_with_progress(weight, self.bits, self.codebook, seed, effort, progress)
        stored = dict(zip(("trellis", "suh", "svh"), tensors))
        if self.codebook in format.MARKERS:
            stored[self.codebook] = format.marker(self.codebook).to(weight.device)
        return stored

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight` `[out_features, in_features]` in fp32, or `bias` `[out_features]`."""
        if hasattr(self.trellis, "to_local"):
            raise RuntimeError(
                "This Exl3Linear is divided among processes and has no weight as a whole. Add adapters before `fully_shard`; with "
                "`tp_size` there are none. Load the checkpoint with `Exl3Config(dequantize=True)` for a plain model."
            )
        if leaf == "bias":
            return self.bias[: self.out_features]
        weight = ops.dequantize(self.codes, *self.scales, self.codebook)
        return weight[: self.out_features, : self.in_features]

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Exl3Linear":
        """A layer of the same sizes that holds `tensors`."""
        return Exl3Linear(self.in_features, self.out_features, tensors)

    def plain_views(self, name, tensor):
        is_transposed = name == "weight" and not isinstance(self.plain, nn.Linear)  # Conv1D keeps [in, out]
        yield "", name, tensor.T if is_transposed else tensor

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, codebook={self.codebook}"
        )


class Exl3SplitLinear(Exl3Module):
    """
    A fused projection whose parts were quantized each on its own; their outputs are concatenated.

    Args:
        parts (`dict[str, Exl3Linear]`): In the order of the fused projection's rows.
        plain (`nn.Module`): The fused projection.
    """

    def __init__(self, parts: dict[str, Exl3Linear], plain: nn.Module):
        super().__init__()
        self._stand_for(plain)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def plain_views(self, name, tensor):
        sizes = [part.out_features for part in self.children()]
        for (part, _), view in zip(self.named_children(), tensor.split(sizes)):
            yield part, name, view


class Exl3SlicedLinear(Exl3Module):
    """
    A projection cut along its wide side into slices that were quantized each on its own.

    Args:
        slices (`list[Exl3Linear]`): In order. Where their inputs are narrower than the projection's, their outputs are
            summed, else concatenated.
        plain (`nn.Module`): The projection.
    """

    def __init__(self, slices: list[Exl3Linear], plain: nn.Module):
        super().__init__()
        self._stand_for(plain)
        self.slice = nn.ModuleList(slices)

    @property
    def cuts_input(self) -> bool:
        return self.slice[0].in_features < self.plain.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.cuts_input:
            return torch.cat([part(x) for part in self.slice], dim=-1)
        inputs = x.split([part.in_features for part in self.slice], dim=-1)
        return sum(part(piece) for part, piece in zip(self.slice, inputs))

    def plain_views(self, name, tensor):
        if self.cuts_input and name == "bias":
            yield "slice.0", name, tensor
            return
        sizes = [part.in_features if self.cuts_input else part.out_features for part in self.slice]
        for index, view in enumerate(tensor.split(sizes, dim=1 if self.cuts_input else 0)):
            yield f"slice.{index}", name, view


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

    scales, codes = Exl3Linear.scales, Exl3Linear.codes

    def forward(self, x: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): `[rows, in_features]`.
            ranges (`torch.Tensor`): Integer `[experts, 2]`, the first of the rows of each expert and the one after the last.

        Returns:
            `torch.Tensor`: `[rows, out_features]`, zeros in rows of experts that are not in this stack.
        """
        if len(self.members) < len(ranges):
            is_here = self._numbers.device == ranges.device  # and not where the weights are offloaded to
            ranges = ranges[self._numbers if is_here else torch.tensor(self.members, device=ranges.device)]
        return ops.grouped_linear(x, ranges, self.codes, *self.scales, self.bias, self.codebook, self.out_features)

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
    def bias(self) -> torch.Tensor | None:
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
        kinds = defaultdict(list)
        for number, tensors in enumerate(experts):
            kinds[tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(tensors.items()))].append(number)
        for index, members in enumerate(kinds.values()):
            tensors = {
                name: torch.stack([experts[number][name] for number in members]) for name in experts[members[0]]
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
        # Nothing is asked of the data: a graph stays whole, a GPU is not waited for.
        routed, order = top_k_index.flatten().sort(stable=True)
        bounds = torch.searchsorted(routed, torch.arange(self.num_experts + 1, device=routed.device))
        x = hidden_states[order // top_k_index.shape[-1]]
        if self._has_adapters():
            output = self._one_by_one(x, bounds)
        else:
            ranges = bounds.unfold(0, 2, 1)
            output = self._expert(lambda role, rows: getattr(self, f"stacked_{role}")(rows, ranges), x)
        weighted = output.new_empty(output.shape, dtype=torch.float32)
        weighted[order] = output.float() * top_k_weights.flatten()[order, None].float()
        return weighted.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _has_adapters(self) -> bool:
        """Whether something has been put in the place of separated layers, or hooks on them."""
        return len(self._modules) > len(self.roles) and not all(
            type(layer) is Exl3ExpertLinear
            and "forward" not in vars(layer)
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
            for expert in self.children()
            if isinstance(expert, Exl3Expert)
            for layer in expert.children()
        )

    def _one_by_one(self, x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The outputs for `x`, whose rows `bounds[e]` to `bounds[e + 1]` are those of expert `e`, through adapters."""
        output, ends = x.new_zeros(x.shape), bounds.tolist()
        for expert, (start, stop) in enumerate(zip(ends, ends[1:])):
            if start < stop:
                rows = x[start:stop]
                output[start:stop] = self._expert(lambda role, rows: self.projection(expert, role)(rows), rows)
        return output

    def _expert(self, project: Callable[[str, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What experts compute of rows `x`, where `project(role, rows)` are their projections."""
        hidden = project("up", x)
        if "gate" in self.roles:
            gate = project("gate", x)
            if getattr(self.plain, "is_concatenated", True):
                hidden = self.plain._apply_gate(torch.cat((gate, hidden), dim=-1))
            else:
                hidden = self.plain._apply_gate(torch.stack((gate, hidden), dim=-1).flatten(-2))
        else:
            hidden = self.plain.act_fn(hidden)
        return project("down", hidden)

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


class Exl3Embedding(Exl3Module):
    """
    A quantized embedding table, whose rows are decoded when they are looked up. It is no `nn.Embedding`: nothing else
    may be tied to its weight.

    An embedding often has a model's first float parameter, whose dtype upstream takes for the model's. Hence `signs` are of the
    model's dtype here, which every dtype has, and rows are as well. In checkpoints they are fp16.

    Args:
        tensors (`dict[str, torch.Tensor]`): `trellis` int16 `[vocab, G(1+16K)]` and `signs` fp16 `[G, 256]`.
        plain (`nn.Embedding`): The table that this one stands for.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], plain: nn.Embedding):
        super().__init__()
        self._stand_for(plain)
        self.num_embeddings, self.embedding_dim = plain.num_embeddings, plain.embedding_dim
        self.store(tensors | {"signs": tensors["signs"].to(self.plain_dtype)})
        # The one thing that upstream's subclasses of `nn.Embedding` add: Gemma's scale.
        scale = getattr(plain, "scalar_embed_scale", None)
        self.embed_scale = float(plain.embed_scale) if scale is None and hasattr(plain, "embed_scale") else scale

    def empty_plain(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        plain = super().empty_plain(dtype, device)
        if "embed_scale" in plain._buffers:  # on the meta device still, as the rest of the table is kept
            scale = torch.tensor(self.embed_scale, device=device or self.device)
            plain._buffers = {**plain._buffers, "embed_scale": scale}
        return plain

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self._rows(ids).to(self.signs.dtype)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale).to(rows)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise AttributeError(
                "The embeddings are quantized (Exl3Embedding) and have no `weight` to be read, tied or resized. Make the model plain with "
                "`model.dequantize()` first."
            ) from error

    def to_plain_dtype(self):
        """Have the signs in the model's dtype, as they are to be once they are there."""
        if self.signs.dtype != self.plain_dtype:
            self.signs = nn.Parameter(self.signs.detach().to(self.plain_dtype), requires_grad=False)

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)  # casts what is floating, the signs alone

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}signs"] = destination[f"{prefix}signs"].half()

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, _words(self.trellis), self.signs, self.embedding_dim)

    def encoded(self, weight: torch.Tensor, seed: int, effort: str, progress=None) -> dict[str, torch.Tensor]:
        """What stores `weight` `[num_embeddings, embedding_dim]` here: tensors by name. Arguments as of `ops.encode_embedding`."""
        bits = format.embedding_bits(self.trellis, self.signs)
        return dict(
            zip(("trellis", "signs"), ops.encode_embedding_with_progress(weight, bits, seed, effort, progress))
        )

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Exl3Embedding":
        """A table of the same sizes that holds `tensors`."""
        return Exl3Embedding(tensors, self.plain)

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight`, fp32 `[num_embeddings, embedding_dim]`."""
        return self.decode_into(torch.empty(self.num_embeddings, self.embedding_dim, device=self.device))

    def decode_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Write the whole table to `weight` `[num_embeddings, embedding_dim]`, of any floating dtype, and return that."""
        trellis, signs = whole(self.trellis).view(torch.int16), whole(self.signs)
        rows = max(EMBEDDING_STRIP_ELEMENTS // signs.numel(), 1)
        for start in range(0, self.num_embeddings, rows):
            stop = min(start + rows, self.num_embeddings)
            ids = torch.arange(start, stop, device=self.device)
            weight[start:stop] = ops.embedding(ids, trellis, signs, self.embedding_dim)
        return weight

    def plain_views(self, name, tensor):
        yield "", name, tensor

    def extra_repr(self) -> str:
        bits = format.embedding_bits(self.trellis, self.signs)
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, bits={bits}"


class Exl3TiedHead(Exl3Module, nn.Linear):
    """
    A head that is tied to a quantized embedding table: a plain layer, whose weight is not saved but decoded from the table.

    Args:
        plain (`nn.Linear`): The head, without a bias.
    """

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self._stand_for(plain)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        weight = torch.empty(plain.weight.shape, dtype=self.plain_dtype, device="meta")
        self.register_buffer("weight", weight, persistent=False)

    def decode(self, table: nn.Module):
        """Take the weight from the quantized `table`, once its tensors are there."""
        if not isinstance(table, Exl3Embedding):
            raise ValueError(
                "The head is tied to quantized embeddings, and the checkpoint lacks these: leave `embedding_bits` unset."
            )
        if table.trellis.is_meta:
            raise ValueError(
                "The head is tied to quantized embeddings, which are offloaded to disk: keep them in memory (`device_map`), or "
                "quantize the model with `head_bits`."
            )
        table.decode_into(self.weight)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)  # a weight like that of other plain layers

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight` `[out_features, in_features]`, as it is."""
        return self.weight

    def plain_views(self, name, tensor):
        yield "", name, tensor
