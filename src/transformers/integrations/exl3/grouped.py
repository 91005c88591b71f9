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
The operators of experts: products of groups of rows, each group with a quantized weight of its own out of a stack.

| operator                          | computes                                                                    |
|-----------------------------------|-----------------------------------------------------------------------------|
| `exl3::grouped_linear`            | `exl3::linear` of each group, differentiable in `x`                         |
| `exl3::grouped_linear_input_grad` | its gradient in `x`                                                         |

Experts with few rows, which is what a mixture has while it generates, are multiplied in one call of a kernel; those with
many are large enough each for the matrix products of `ops.py`.
"""

import torch

from . import ops
from .kernels import cpu
from .kernels.triton import gpu


def _check_stack(x, ranges, trellis, suh, svh, bias, out_features, is_transposed=False):
    """Raise `ValueError` where `x` cannot be multiplied by stacked quantized weights to `out_features`."""
    counts = [tensor.shape[0] for tensor in (ranges, trellis, suh, svh, bias) if tensor is not None and tensor.dim()]
    if (
        len(set(counts)) > 1
        or trellis.dim() != 4
        or ranges.shape[1:] != (2,)
        or ranges.dtype.is_floating_point
        or ranges.is_complex()
    ):
        shapes = [None if tensor is None else [*tensor.shape] for tensor in (ranges, trellis, suh, svh, bias)]
        raise ValueError(
            f"EXL3 grouped linear: ranges, trellis, suh, svh and bias of {shapes} are of no stack of weights"
        )
    if x.dim() != 2:
        raise ValueError(f"EXL3 grouped linear: the input is {[*x.shape]}, not [rows, features]")
    if counts[0]:
        one = None if bias is None else bias[0]
        ops.check_product(x, trellis[0], suh[0], svh[0], one, out_features, is_transposed)


@torch.library.custom_op("exl3::grouped_linear", mutates_args=())
def grouped_linear(
    x: torch.Tensor,
    ranges: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    out_features: int,
) -> torch.Tensor:
    """
    The products of groups of rows, each group with its own quantized weight out of a stack: of the experts of a mixture.

    Args:
        x (`torch.Tensor`): `[rows, in_features]`, floating, the rows of a group next to each other.
        ranges (`torch.Tensor`): Integer `[groups, 2]`: rows `ranges[g, 0]` to `ranges[g, 1]` are those of group `g`.
        trellis (`torch.Tensor`): int16 `[groups, in/16, out/16, 16K]`.
        suh (`torch.Tensor`): `[groups, in]`.
        svh (`torch.Tensor`): `[groups, out]`.
        bias (`torch.Tensor`, *optional*): `[groups, out_features]` or more.
        codebook (`str`): One of `format.CODEBOOKS`.
        out_features (`int`): Output features without their padding.

    Returns:
        `torch.Tensor`: `[rows, out_features]`, of the dtype of `x`, with zeros in rows that are of no group.

    Raises:
        `ValueError`: Where the tensors do not fit each other.
    """
    return _grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features)


def grouped_linear_directly(x, ranges, trellis, suh, svh, bias, codebook, out_features) -> torch.Tensor:
    """`grouped_linear`, without the dispatcher where on the CPU the result is all that is asked for."""
    tensors = [tensor for tensor in (x, ranges, trellis, suh, svh, bias) if tensor is not None]
    if (
        ops.is_watched()
        or not all(type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features)
    return _grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features)


class DirectStack:
    """
    The weights of a stack for `multiply_rows`: each is checked and packed when it is first asked for, and again where the stack has
    other tensors.
    """

    def __init__(self):
        self._found = None, {}  # in one, so that each thread has the weights of the tensors that it asks for

    def __call__(
        self, entries, trellis, suh, svh, bias, codebook, in_features, out_features
    ) -> list[cpu.Weight | None]:
        """Those of `entries`, other arguments as of `grouped_linear`. None for one that no compiled kernel takes."""
        tensors = (trellis, suh, svh) if bias is None else (trellis, suh, svh, bias)
        key = ops.identity(tensors)
        known, weights = self._found
        if key != known:
            weights = {}
            self._found = key, weights
        for entry in entries:
            if entry not in weights:
                one = [tensor[entry] for tensor in tensors]
                addend = None if bias is None else one[3]
                weights[entry] = ops.packed(one, addend, codebook, in_features, out_features)
        return [weights[entry] for entry in entries]


multiply_rows = cpu.multiply_rows


def _grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features):
    _check_stack(x, ranges, trellis, suh, svh, bias, out_features)
    suh, svh, bias = map(_as_rows, (suh, svh, bias))
    if gpu.is_available(x.device) and gpu.has_grouped_linear(x.device):
        return gpu.grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features)
    y = x.new_zeros(x.shape[0], out_features)
    few = ops.most_rows(x)
    if few:
        cpu.grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, y, few)
        if x.shape[0] <= few:
            return y
    for group, rows in _groups(ranges, x.shape[0]):
        if rows.stop - rows.start > few:
            layer = (trellis[group], suh[group], svh[group], None if bias is None else bias[group], codebook)
            if gpu.is_available(x.device):
                y[rows] = gpu.linear(x[rows], *layer, out_features)
            else:
                ops.multiply_in_strips(x[rows], *layer, y[rows])
    return y


@grouped_linear.register_fake
def _(x, ranges, trellis, suh, svh, bias, codebook, out_features):
    gpu.check_devices(x, ranges, trellis, suh, svh, bias)
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("exl3::grouped_linear_input_grad", mutates_args=())
def grouped_linear_input_grad(
    grad: torch.Tensor,
    ranges: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    in_features: int,
) -> torch.Tensor:
    """The gradient of `grouped_linear` in its input: `grad` `[rows, out_features]` to `[rows, in_features]`."""
    _check_stack(grad, ranges, trellis, suh, svh, None, in_features, is_transposed=True)
    suh, svh = map(_as_rows, (suh, svh))
    x = grad.new_zeros(grad.shape[0], in_features)
    for group, rows in _groups(ranges, grad.shape[0]):
        ops.multiply_transposed(grad[rows], trellis[group], suh[group], svh[group], codebook, x[rows])
    return x


@grouped_linear_input_grad.register_fake
def _(grad, ranges, trellis, suh, svh, codebook, in_features):
    gpu.check_devices(grad, ranges, trellis, suh, svh)
    return grad.new_empty(grad.shape[0], in_features)


def _as_rows(stack: torch.Tensor | None) -> torch.Tensor | None:
    """A stack of scales or biases with the numbers of each group next to each other, as all kernels read them."""
    return stack if stack is None or stack.stride(-1) == 1 else stack.contiguous()


def _groups(ranges: torch.Tensor, rows: int) -> list[tuple[int, slice]]:
    """The groups that have rows, with these."""
    found = ranges.tolist()
    ends = sorted(end for pair in found for end in pair)
    if any(start > stop for start, stop in found) or (ends and not 0 <= ends[0] <= ends[-1] <= rows):
        raise ValueError(f"EXL3 grouped linear: {found} are no ranges among {rows} rows")
    return [(group, slice(start, stop)) for group, (start, stop) in enumerate(found) if start < stop]


def _save_for_grouped_backward(ctx, inputs, output):
    x, ranges, trellis, suh, svh, bias, codebook, _ = inputs
    ctx.save_for_backward(ranges, trellis, suh, svh)
    ctx.codebook, ctx.in_features = codebook, x.shape[-1]
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _grouped_linear_backward(ctx, grad):
    ranges, *tensors = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_linear_input_grad(grad.contiguous(), ranges, *tensors, ctx.codebook, ctx.in_features)
    if ctx.needs_input_grad[5]:
        shape, dtype = ctx.bias
        sums = torch.nn.functional.pad(grad.double().cumsum(0), (0, shape[1] - grad.shape[1], 1, 0))
        grad_bias = (sums[ranges[:, 1]] - sums[ranges[:, 0]]).to(dtype)
    return grad_x, None, None, None, None, grad_bias, None, None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_for_grouped_backward)
