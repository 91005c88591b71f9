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
How much the noise of quantizing each layer counts, measured on the float model: what bits are spent by where there is data.

A layer whose outputs err by `e_t` moves what the model says by `1/2 (sum_t g_t . e_t)^2` (KL divergence, to second order), where
`g_t` are the gradients of the log-probability of labels that are sampled from what the model says: samples of the Fisher
information. Noise of a quantized matrix is white where it is searched, so that its element `[i, j]` has a variance that goes with
`svh_i^2 suh_j^2`, the RMS of row and of column. The mean over this noise is the sum of the squares of the weight's gradient
`sum_t g_ti x_tj`, weighted by these. Feedback takes away most of what tokens have in common, and were there nothing of it, the
mean were the sum of the squares `(g_ti x_tj)^2`. The truth lies between, and so does what is used: the geometric mean.

Gemma 3 270M, an average of 3 bits, simulated (KL divergence on text of the data's domain and of another): .72 and .139 with the
same bits for all layers, .67 and .131 by the geometric mean, .71 and .128 by the first, .66 and .134 by the second.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ...utils import logging
from .experts import Exl3Expert, Exl3Experts
from .feedback import product
from .modules import Exl3Module


logger = logging.get_logger(__name__)

TOKENS = 1 << 11  # as many are read, at most
LENGTH = 1 << 9  # as many at a time: what their backward pass needs is in memory at once
ROWS = 1 << 6  # as many distributions over labels are in fp32 at a time


def sensitivities(
    model: nn.Module, modules: dict[str, Exl3Module], arguments_of: Callable, ids: torch.Tensor, seed: int
) -> dict[str, float]:
    """
    What the divergence of a model from itself would be, but for a common factor, if one layer had noise of its weight's energy.

    Args:
        model (`PreTrainedModel`): With plain modules of float weights in the places of `modules`.
        modules (`dict[str, Exl3Module]`): By path, what is to be quantized.
        arguments_of (`Callable`): Takes token ids to the arguments of `model`.
        ids (`torch.Tensor`): `[windows, length]`.
        seed (`int`): Of the labels.

    Returns:
        `dict[str, float]`: By path, with the name of a part that has a rate of its own. Without those that no gradient reaches;
            empty where there are no gradients at all, which a warning tells.
    """
    meter = _Meter()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    generator = torch.Generator(model.device).manual_seed(seed)
    try:
        for path, module in modules.items():
            meter.watch(model, path, module)
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # those of activations are all that is asked for
        with torch.inference_mode(False), torch.enable_grad():
            for some in logging.tqdm(_some(ids), desc="Measuring what layers' errors count"):
                try:
                    _backward(model(**arguments_of(some)), generator)
                except RuntimeError as error:  # of the forward pass as well, which is to come again
                    return _unmeasured(f"the gradients of {type(model).__name__} cannot be had: {error}")
        totals = {unit: float(total.sqrt().prod()) for unit, total in meter.totals.items()}
    finally:
        meter.remove(model)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
    wrong = next((unit for unit, total in totals.items() if not math.isfinite(total)), None)
    if wrong is not None:
        return _unmeasured(f"the gradients of {wrong} are not finite")
    return {unit: total for unit, total in totals.items() if total} or _unmeasured("no gradient reaches a layer")


def _unmeasured(why: str) -> dict[str, float]:
    logger.warning(f"`bits` of Exl3Config are spent without regard to the `dataset`: {why}.")
    return {}


def _some(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`TOKENS` of `ids` `[windows, length]`, from windows that are far from each other, `LENGTH` at a time."""
    ids = ids[:, :LENGTH]
    count = min(max(TOKENS // ids.shape[1], 1), ids.shape[0])
    return ids[:: ids.shape[0] // count][:count].split(max(LENGTH // ids.shape[1], 1))


def _backward(output, generator: torch.Generator):
    """
    Gradients for labels drawn from the distributions in `output`: from softmax of logits, and around hidden states from the normal
    distribution.
    """
    values = output[0]
    gradient = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if "logits" not in output:
        gradient.copy_(torch.randn(values.shape, generator=generator, device=generator.device))
    else:
        pairs = zip(values.detach().flatten(0, -2).split(ROWS), gradient.flatten(0, -2).split(ROWS))
        for logits, rows in pairs:
            rates = logits.float().softmax(-1)
            sums = rates.cumsum(-1)  # `multinomial` draws a random number for each of them
            draws = torch.rand((len(rates), 1), generator=generator, device=generator.device).to(rates.device)
            labels = torch.searchsorted(sums, draws * sums[:, -1:])
            rows.copy_(rates.scatter_add_(1, labels, rates.new_full(labels.shape, -1.0)))
    values.backward(gradient)


class _Meter:
    """
    Hooks on the float layers of a model that add up what is measured.

    Attributes:
        totals (`dict[str, torch.Tensor]`): By path and part, fp32 `[2]`: if tokens' errors go with each other, and if not.
        hooks (`list`): To be removed.
    """

    def __init__(self):
        self.totals, self.hooks, self._experts = defaultdict(float), [], {}

    def watch(self, model: nn.Module, path: str, module: Exl3Module):
        """Measure the plain module at `path`, which `module` stands for."""
        plain = model.get_submodule(path)
        views = defaultdict(dict)
        for name, parameter in plain.named_parameters(recurse=False):
            for layer, leaf, view in module.plain_views(name, parameter.detach()):
                views[layer][leaf] = view
        if not isinstance(module, Exl3Experts):
            parts = [(f"{path}.{layer}" if layer else path, leaves["weight"]) for layer, leaves in views.items()]
            self._hook(plain, parts)
            return
        # Their own code multiplies all experts at once. That of quantized ones takes layers in their places: float ones here.
        self._experts[path] = module, plain
        model.set_submodule(path, module)
        for expert in range(module.num_experts):
            layers = {role: _linear(**views[f"{expert}.expert_{role}"]) for role in module.roles}
            for role, layer in layers.items():
                self._hook(layer, [(f"{path}.{role}", layer.weight)])
            setattr(module, str(expert), Exl3Expert(layers))

    def remove(self, model: nn.Module):
        for hook in self.hooks:
            hook.remove()
        for path, (module, plain) in self._experts.items():
            for name in [name for name in module._modules if name.isdecimal()]:
                del module._modules[name]
            model.set_submodule(path, plain)

    def _hook(self, layer: nn.Module, parts: Iterable[tuple[str, torch.Tensor]]):
        """Measure `layer`, which has `parts`: their names and weights `[out, in]`, in the order of its outputs."""
        scales = [(unit, *_noise(weight)) for unit, weight in parts]

        def hook(layer, args, kwargs, output):
            is_first = not output.requires_grad
            output.requires_grad_()
            x = next(iter((*args, *kwargs.values()))).detach()

            def add(gradient):
                inputs = x.flatten(0, -2)
                pieces = gradient.flatten(0, -2).split([len(rows) for _, rows, _ in scales], -1)
                for (unit, rows, columns), piece in zip(scales, pieces):
                    together = rows @ product(piece, inputs).square_() @ columns
                    apart = (piece.float().square() @ rows) @ (inputs.float().square() @ columns)
                    self.totals[unit] += torch.stack((together, apart))

            output.register_hook(add)
            return output.clone() if is_first else None  # nobody may change a leaf in place

        self.hooks.append(layer.register_forward_hook(hook, with_kwargs=True))


def _noise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    fp32 `[out]` and `[in]`, whose products are the variances of noise that has the energy of `weight` `[out, in]` and is spread as
    that of quantizing is.
    """
    rows, columns = (torch.linalg.vector_norm(weight.float(), dim=dim) for dim in (1, 0))
    energy = rows.square().sum()
    return rows * (energy / (rows.sum() * columns.sum()).clamp_min(torch.finfo(torch.float32).tiny)), columns


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A float layer of these values, the same memory."""
    layer = nn.Linear(*weight.shape[::-1], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
