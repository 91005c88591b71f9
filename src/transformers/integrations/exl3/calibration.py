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
Quantizing with data: the float model reads text, and each layer that waits is quantized when its input arrives.

One forward pass over all windows of tokens quantizes a model in the order in which it computes, whatever its architecture: a layer
sees the inputs that those before it give when they are quantized. A second copy of the batch goes the same way through the float
weights: what its activations are like where the quantized ones have drifted to is what layers aim at.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from ...utils import logging
from .experts import Exl3Experts
from .feedback import Moments, product
from .finished import layers
from .modules import Exl3Module
from .progress import Progress
from .quantizing import late_parameters, put, quantize_in_place, settle
from .sensitivity import sensitivities
from .text import windows_of


logger = logging.get_logger(__name__)

MEASURED = "measured for bits"  # among the layers that are kept, none of which has spaces in its name
MOMENT_ROWS = 1 << 12  # as many rows of activations are in fp32 at a time
MOMENT_COLUMNS = 1 << 8  # as many columns of a symmetric matrix are computed at a time, from the diagonal on


class _HeadReached(Exception):
    """Nothing after the head's input is of interest, and logits for all tokens would take gigabytes."""


def calibrate(model: nn.Module, paths: list[str], config, progress: Progress, plan) -> tuple[int, int]:
    """
    Quantize the modules at `paths` with data, as far as text reaches them.

    Args:
        model (`PreTrainedModel`): All of whose modules have their weights, those at `paths` float ones. Changed in place.
        paths (`list[str]`): Of modules that wait for weights which have come.
        config (`Exl3Config`): Tells the data.
        progress (`Progress`): Of the model.
        plan (`Plan`): Of the model. Where it leaves a choice, bits are spent by what text tells.

    Returns:
        `tuple(int, int)`: Rows and columns of the data: how many windows, of how many tokens each.

    Raises:
        `ValueError`: Where the model takes no text, the data does not do, or activations are not finite.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    for path, module in modules.items():
        put(model, path, module.with_plain(late_parameters(model, path, module)))
    ids = windows_of(model, config)
    if plan.leaves_choice:
        head = model.get_output_embeddings()
        choices = {path: module for path, module in modules.items() if model.get_submodule(path) is not head}
        plan.spend(_sensitivities(model, choices, ids, config.calibration_seed))
    run = _Pass(model, modules, progress, ids)
    try:
        run.forward()
    finally:
        run.remove_hooks()
        for path, module in modules.items():
            model.set_submodule(path, module)
    if run.unrouted:
        logger.warning(
            f"{run.unrouted} experts had no token of the `dataset`: their `down` is quantized without data, and the rest with what "
            "the other experts of their layer had."
        )
    missed = [path for path, module in modules.items() if module.pending]
    if missed:
        logger.warning(
            f"{len(missed)} of {len(paths)} modules were not reached by the `dataset` and are quantized without data: "
            f"{', '.join(missed[:3])}{', ...' if len(missed) > 3 else ''}."
        )
    return tuple(ids.shape)


def _sensitivities(model: nn.Module, modules: dict[str, Exl3Module], ids: torch.Tensor, seed: int) -> dict[str, float]:
    """What `sensitivities` measures. With the layers it is kept: those that were quantized before have rates that go by it."""
    kept = layers().find(MEASURED)
    if kept is None:
        found = sensitivities(model, modules, lambda some: _arguments(model, some), ids, seed)
        kept = layers().keep(
            MEASURED, {unit: torch.tensor(value, dtype=torch.float64) for unit, value in found.items()}
        )
    return {unit: float(value) for unit, value in kept.items()}


def _arguments(model: nn.Module, ids: torch.Tensor) -> dict:
    """What has `model` read `ids` `[windows, length]`."""
    ids = ids.to(next(model.get_input_embeddings().parameters()).device)
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return arguments


class _Pass:
    """
    One forward pass that quantizes.

    Args:
        model (`PreTrainedModel`): With plain modules in the places of `modules`.
        modules (`dict[str, Exl3Module]`): By path, what waits.
        progress (`Progress`): Of the model.
        ids (`torch.Tensor`): `[windows, length]`.
    """

    def __init__(self, model: nn.Module, modules: dict[str, Exl3Module], progress: Progress, ids: torch.Tensor):
        self.model, self.modules, self.progress, self.ids = model, modules, progress, ids
        self._sizes: dict[str, int] = {}  # by path, the first dimension of what a layer is given for one window
        self._input = self._version = self._moments = None  # the last layer's: several layers read the same tensor
        self._hooks, self.unrouted = [], 0

    def remove_hooks(self):
        for hook in self._hooks:
            hook.remove()

    def forward(self):
        """Read the windows twice in one batch: the first half of it goes through the weights that are quantized on the way."""
        head = self.model.get_output_embeddings()
        plain = {path: self.model.get_submodule(path) for path in self.modules}
        self._read_one_window(plain, head)
        if head is not None and head not in plain.values():
            self._hooks.append(head.register_forward_pre_hook(_stop))
        for path, module in self.modules.items():
            if plain[path] is head:
                hook = self._stopping(path, module)
                self._hooks.append(head.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                plain[path].forward = self._quantizing(path, module, plain[path])
        self._read(torch.cat((self.ids, self.ids)))

    def _read_one_window(self, plain: dict[str, nn.Module], head: nn.Module | None):
        """Learn from the float model how large what each layer is given is for a batch of one."""

        def telling(path: str) -> Callable:
            def hook(module, args, kwargs):
                self._sizes.setdefault(path, _bound(module, args, kwargs)[0].shape[0])

            return hook

        hooks = [m.register_forward_pre_hook(telling(path), with_kwargs=True) for path, m in plain.items()]
        if head is not None:
            hooks.append(head.register_forward_pre_hook(_stop))
        try:
            self._read(self.ids[:1])
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _read(self, ids: torch.Tensor):
        try:
            self.model(**_arguments(self.model, ids))
        except _HeadReached:
            pass

    def _stopping(self, path: str, module: Exl3Module) -> Callable:
        def hook(plain, args, kwargs):
            self.model.set_submodule(path, module)
            self._quantize_linear(path, module, _bound(plain, args, kwargs)[0])
            raise _HeadReached

        return hook

    def _quantizing(self, path: str, module: Exl3Module, plain: nn.Module) -> Callable:
        """What takes the place of `plain.forward`."""
        float_forward = plain.forward

        def forward(*args, **kwargs):
            inputs = _bound(plain, args, kwargs)
            self.model.set_submodule(path, module)
            quantize = self._quantize_experts if isinstance(module, Exl3Experts) else self._quantize_linear
            count = quantize(path, module, *inputs)
            for part in module.modules():
                settle(part)
            output = module(*(x[:count] for x in inputs))
            if count == inputs[0].shape[0]:
                return output
            return torch.cat((output, float_forward(*(x[count:] for x in inputs))))

        return forward

    def _quantize_linear(self, path: str, module: Exl3Module, x: torch.Tensor) -> int:
        """Returns how many of the first dimension of `x` are of the quantized stream."""
        count = self._count(path, x)
        version = None if x.is_inference() else x._version  # of inference tensors it is not known whether they changed
        if version is None or x is not self._input or version != self._version:
            self._input, self._version = x, version
            self._moments = moments(path, *(rows.reshape(-1, x.shape[-1]) for rows in (x[:count], x[count:])))
        quantize_in_place(self.model, path, self.progress, lambda layer: self._moments)
        return count

    def _quantize_experts(self, path: str, module: Exl3Experts, x, index, weights) -> int:
        count = self._count(path, x)
        mixture = _Mixture(path, module, x[:count], x[count:], index[:count])
        into = [name for name in module.pending if not name.startswith("down_proj")]
        quantize_in_place(self.model, path, self.progress, mixture.into, into)
        quantize_in_place(self.model, path, self.progress, mixture.down)
        self.unrouted += mixture.unrouted
        return count

    def _count(self, path: str, x: torch.Tensor) -> int:
        """
        Half of the first dimension where that grows with the batch; all of it where the streams are mixed: in tables of no batch,
        and where the batch is another dimension.
        """
        return x.shape[0] // 2 if x.shape[0] == 2 * self.ids.shape[0] * self._sizes.get(path, 0) else x.shape[0]


def _stop(*_):
    raise _HeadReached


def _bound(module: nn.Module, args, kwargs) -> tuple:
    """The arguments of `module.forward` in its order."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]


def moments(path: str, x: torch.Tensor, floats: torch.Tensor | None = None) -> Moments:
    """
    Args:
        path (`str`): Of the layer, for errors.
        x (`torch.Tensor`): `[rows, in]`, its inputs.
        floats (`torch.Tensor`, *optional*): `[rows, in]`, what they are in the model that is not quantized; none without rows.

    Returns:
        `Moments`: fp32.

    Raises:
        `ValueError`: Where a mean is not finite.
    """
    has_floats = floats is not None and floats.shape == x.shape
    sums = [x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32) for _ in range(1 + has_floats)]
    for start in range(0, x.shape[0], MOMENT_ROWS):
        rows = x[start : start + MOMENT_ROWS]
        if has_floats:
            sums[1] += product(rows, floats[start : start + MOMENT_ROWS] - rows)
        rows = rows.float()
        for column in range(0, x.shape[1], MOMENT_COLUMNS):
            block = slice(column, column + MOMENT_COLUMNS)
            sums[0][column:, block].addmm_(rows[:, column:].T, rows[:, block])
    sums[0] = sums[0].tril() + sums[0].tril(-1).T
    means = [total / max(x.shape[0], 1) for total in sums]
    if not all(mean.isfinite().all() for mean in means):
        raise ValueError(
            f"The inputs of {path} are not finite, or too large, for the `dataset` in {x.dtype}: load the model in another `dtype` "
            "(`torch.bfloat16`, `torch.float32`)."
        )
    return Moments(*means)


class _Mixture:
    """
    The moments of experts' inputs, each from the rows that are routed to it.

    Args:
        path (`str`): Of the experts, for errors.
        module (`Exl3Experts`): These.
        x (`torch.Tensor`): `[tokens, hidden]`.
        floats (`torch.Tensor`): The same of the float stream, or empty.
        index (`torch.Tensor`): `[tokens, k]`, the experts of each token.
    """

    def __init__(self, path, module, x, floats, index):
        self.path, self.module, self.x, self.floats, self.index = path, module, x, floats, index
        self._all = moments(path, x, floats)
        self._expert = self._last = None
        self.unrouted = 0  # experts of whose `down` nothing is known

    def _rows(self, expert: int) -> torch.Tensor:
        return (self.index == expert - self.module.first).any(-1).nonzero().flatten()

    def into(self, layer: str) -> Moments:
        """Of the inputs of `gate` and `up` of an expert: of its rows, and as if `in` more were like those of all experts."""
        expert = int(layer.partition(".")[0])
        if expert != self._expert:
            rows = self._rows(expert)
            own = moments(self.path, self.x[rows], self.floats[rows] if self.floats.numel() else None)
            share = rows.shape[0] / (rows.shape[0] + self.x.shape[1])
            self._expert = expert
            self._last = Moments(
                *(torch.lerp(every, one, share) for every, one in zip(self._all, own) if one is not None)
            )
        return self._last

    def down(self, layer: str) -> Moments | None:
        """Of the inputs of `down` of an expert, whose `gate` and `up` are quantized; None where nothing is routed to it."""
        expert = int(layer.partition(".")[0])
        rows = self._rows(expert)
        if not rows.shape[0]:
            self.unrouted += 1
            return None
        hidden = self.module.hidden_of(expert, self.x[rows])
        hessian = moments(self.path, hidden).hessian
        # As if as many rows as there are inputs were independent: few rows say little about what goes with what.
        share = rows.shape[0] / (rows.shape[0] + hidden.shape[1])
        return Moments(torch.lerp(hessian.diagonal().diag(), hessian, share))
