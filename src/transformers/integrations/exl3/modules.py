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

Experts are in experts.py, embeddings in embeddings.py.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from . import encoding, format, ops
from .weight import DequantizedWeight, refuse_change


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


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` is no more than its class's `forward`: nothing is hooked to it, or stands in its place."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or nn.modules.module._has_any_global_hook()
    return not (is_hooked or "forward" in vars(module))


def words(tensor: torch.Tensor) -> torch.Tensor:
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
    plain_dtype = torch.float32  # of the plain module
    casts = False  # whether its floating tensors are of the model's dtype

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

    def with_plain(self, parameters: dict[str, torch.Tensor]) -> nn.Module:
        """The plain module with these parameters, the same memory."""
        return _with_parameters(self.plain, parameters).train(self.training)

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
        """Casts what this module is dequantized to. Its own tensors are only moved, unless `casts`: their dtypes are part of the format."""
        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype
        if self.casts:
            return super()._apply(fn, recurse)

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


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
        skipped (`int`, *optional*, defaults to 0): How many output features there are in the tensors, which are whole blocks of 128,
            before those of this layer: it is a part of a layer that was quantized as a whole.
    """

    skipped = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensors: dict[str, torch.Tensor],
        plain: nn.Module | None = None,
        skipped: int = 0,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.skipped = in_features, out_features, skipped
        self.codebook = next((name for name in format.MARKERS if name in tensors), "3inst")
        self.bits = format.bits_of(tensors["trellis"])
        if plain is None:
            plain = nn.Linear(in_features, out_features, "bias" in tensors, device="meta")
        self._stand_for(plain)
        self._parameters["bias"] = None
        self.store(tensors)
        self._directly = ops.DirectLinear()

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out_features, in_features]`, to be read only. Each access dequantizes it anew, once its values are needed."""
        pending = self._buffers.get("weight")
        if pending is not None:
            return pending
        self.check_whole()
        return self._read_only("weight", (self.out_features, self.in_features))

    @weight.setter
    def weight(self, value):
        refuse_change()

    @property
    def stored_bias(self) -> torch.Tensor | None:
        """The bias as files have it: fp16, with padding."""
        return self._parameters["bias"]

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias `[out_features]` as others read it, in the dtype of `weight`: to be read only where it is stored otherwise."""
        stored = self.stored_bias
        is_moved = hasattr(stored, "to_local") or hasattr(self, "_hf_hook")  # by what takes the parameter itself
        if stored is None or stored.is_meta or self.pending or is_moved:
            return stored
        is_same = stored.dtype is self.plain_dtype and len(stored) <= self.out_features
        return stored if is_same else self._read_only("bias", (self.out_features,))

    def _read_only(self, leaf: str, shape: tuple[int, ...]) -> torch.Tensor:
        decode = lambda: self.dequantized(leaf).to(self.plain_dtype)  # noqa: E731
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return decode()
        read = DequantizedWeight(decode, shape, self.plain_dtype, self.device)
        return read.of(self.stored_bias) if leaf == "bias" else read

    def register_parameter(self, name: str, param: nn.Parameter | None):
        if name == "weight" or isinstance(param, DequantizedWeight):  # as what prunes or normalizes weights has it
            refuse_change()
        super().register_parameter(name, param)

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
        return words(local(self.trellis))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x, self.skipped + self.out_features)
        return y[..., self.skipped :].contiguous() if self.skipped else y

    def _product(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        own = self._parameters
        if "suh" in own and "svh" in own:
            tensors = own["trellis"], own["suh"], own["svh"], own["bias"]
            y = self._directly(x, *tensors, self.codebook, self.in_features, columns)
            if y is not None:
                return y
        suh, svh = self.scales
        self.check_width(x, suh)
        return ops.linear(x, self.codes, suh, svh, self.stored_bias, self.codebook, columns)

    def check_width(self, x: torch.Tensor, suh: torch.Tensor):
        """Raise `ValueError` where `x` `[..., in_features]` is of another width; operators see but the one with padding."""
        width = min(self.in_features, suh.shape[-1])  # of a divided layer the part that this process has
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(f"EXL3 linear: the input is {x.dtype} {[*x.shape]}, the layer has {width} input features")

    def encoded(
        self, weight: torch.Tensor, seed: int, effort: str, progress=None, moments=None
    ) -> dict[str, torch.Tensor]:
        """What stores `weight` `[out_features, in_features]` here: tensors by name. Arguments as of `encoding.encode`."""
        tensors = encoding.encode(weight, self.bits, self.codebook, seed, effort, progress, moments)
        stored = dict(zip(("trellis", "suh", "svh"), tensors))
        if self.codebook in format.MARKERS:
            stored[self.codebook] = format.marker(self.codebook).to(weight.device)
        return stored

    def check_whole(self):
        """Raise `RuntimeError` where the weight is divided among processes."""
        if hasattr(self.trellis, "to_local"):
            raise RuntimeError(
                "This Exl3Linear is divided among processes and has no weight as a whole. Add adapters before `fully_shard`; with "
                "`tp_size` there are none. Load the checkpoint with `Exl3Config(dequantize=True)` for a plain model."
            )

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight` `[out_features, in_features]` in fp32, or `bias` `[out_features]`."""
        self.check_whole()
        columns = slice(self.skipped, self.skipped + self.out_features)
        if leaf == "bias":
            return self.stored_bias[columns]
        weight = ops.dequantize(self.codes, *self.scales, self.codebook)
        return weight[columns, : self.in_features]

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Exl3Linear":
        """A layer of the same sizes that holds `tensors`."""
        return Exl3Linear(self.in_features, self.out_features, tensors, skipped=self.skipped)

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
