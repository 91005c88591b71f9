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
"""The weight of a quantized layer as others see it: a tensor that is decoded when its values are first needed."""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


_T = torch.Tensor
# What is known of a weight without its values. What is missing here is decoded for, and right as well.
_PROPERTIES = (_T.shape, _T.dtype, _T.device, _T.layout, _T.ndim, _T.requires_grad, _T.grad, _T.grad_fn, _T.is_leaf)
_PROPERTIES += (_T.is_meta, _T.is_cpu, _T.is_cuda, _T.is_xpu, _T.is_sparse, _T.is_quantized, _T.itemsize, _T.nbytes)
_METHODS = (_T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.get_device, _T.__len__)
_METHODS += (_T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex)
_KNOWN = {*_METHODS, *(entry.__get__ for entry in _PROPERTIES)}
_SAME = {_T.data.__get__, _T.detach}  # the same values; they need no gradient anyway
_FREEZING = {_T.requires_grad_, _T.requires_grad.__set__}
_OF_PARAMETERS = {_T.requires_grad.__get__, _T.grad.__get__, _T.grad.__set__, _T.is_leaf.__get__, *_FREEZING}
_IN_PLACE = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class DequantizedWeight(torch.Tensor):
    """
    A weight to be read. Its values are decoded when they are first needed, and kept as long as this tensor is.

    Changing them would change nothing in the layer, and is an error, also by a view of them. What is computed from them is a plain
    tensor.

    Args:
        decode (`Callable`): Returns the weight as a plain tensor.
        shape (`tuple[int]`): Of the weight.
        dtype (`torch.dtype`): Of the weight.
        device (`torch.device`): Of the weight.
    """

    _is_hf_initialized = True  # some models initialise the weights of their children

    @staticmethod
    def __new__(
        cls, decode: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._decode, self._values, self._parameter = decode, None, None
        return self

    def of(self, parameter: torch.Tensor) -> "DequantizedWeight":
        """Itself, as what modules give out for `parameter`, which it is decoded from: gradients are asked of that."""
        self._parameter, self._is_param = parameter, True
        return self

    @property
    def values(self) -> torch.Tensor:
        """The weight as a plain tensor."""
        decode = self._decode  # another thread may be done meanwhile
        if self._values is None:
            self._values, self._decode = decode(), None
        return self._values

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first, *others = (*args, *kwargs.values())
        if func in _OF_PARAMETERS and isinstance(first, cls) and first._parameter is not None:
            return func(first._parameter, *others)
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _FREEZING and isinstance(first, cls) and False in others:
            return first
        name = getattr(func, "__name__", "")
        is_in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        _refuse_change([kwargs.get("out"), first if is_in_place else None])
        return first if func in _SAME else _called(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """For what calls operators beside Python."""
        _refuse_change([arg for arg, known in zip(args, func._schema.arguments) if known.is_write])
        return _called(func, args, kwargs or {})


def _refuse_change(changed: list):
    if any(isinstance(leaf, DequantizedWeight) for leaf in tree_leaves(changed)):
        refuse_change()


def refuse_change(*_):
    """Raises `RuntimeError`."""
    raise RuntimeError(
        "The weight of an Exl3Linear is quantized: it cannot be trained, pruned, replaced or changed in place, adapters cannot be merged into "
        "it. Make the model plain with `model.dequantize()` first."
    )


def _called(func: Callable, args: tuple, kwargs: dict):
    """What `func` returns for the decoded values. What shares their memory is as little to be changed as they are."""
    values = [leaf.values for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DequantizedWeight)]

    def read_only(result: torch.Tensor) -> torch.Tensor:
        if not any(torch._C._is_alias_of(result, value) for value in values):
            return result
        return DequantizedWeight(lambda: result, result.shape, result.dtype, result.device)

    args, kwargs = tree_map_only(DequantizedWeight, lambda weight: weight.values, (args, kwargs))
    return tree_map_only(torch.Tensor, read_only, func(*args, **kwargs))
