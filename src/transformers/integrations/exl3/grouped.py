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
| `exl3::route`                     | which rows are those of which expert                                        |

Experts with few rows, which is what a mixture has while it generates, are multiplied in one call of a kernel; those with
many are large enough each for the matrix products of `ops.py`.
"""

import functools

import torch

from . import ops
from .kernels import check_devices, cpu
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


@torch.library.custom_op("exl3::route", mutates_args=())
def route(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The rows of a mixture, those of each expert next to each other. Nothing is asked of the data: a GPU is not waited for.

    Args:
        top_k_index (`torch.Tensor`): Integer `[tokens, k]`, the experts of each token; `experts` stands for none.
        experts (`int`): How many there are.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`: int64 `[tokens k]`, the token of each row; `[experts, 2]`, the first row
        of each expert and the one after its last; `[tokens k]`, for each number in `top_k_index` which row is its.
    """
    rows, ranges, places = _route(top_k_index, experts)
    return rows, ranges.clone(), places


@route.register_fake
def _(top_k_index, experts):
    count = top_k_index.numel()
    new_empty = functools.partial(top_k_index.new_empty, dtype=torch.int64)
    return new_empty(count), new_empty(experts, 2), new_empty(count)


def _route(top_k_index, experts):
    routed, order = top_k_index.flatten().sort(stable=True)
    bounds = torch.searchsorted(routed, torch.arange(experts + 1, device=routed.device))
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order // top_k_index.shape[-1], bounds.unfold(0, 2, 1), places


def routed(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route`, without the dispatcher where no program is compiled."""
    return (route if torch.compiler.is_compiling() else _route)(top_k_index, experts)


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
    _check_stack(x, ranges, trellis, suh, svh, bias, out_features)
    suh, svh, bias = map(_as_rows, (suh, svh, bias))
    if gpu.is_available(x.device) and gpu.kernels().has_grouped_linear(x.device):
        return gpu.kernels().grouped_linear(x, ranges, trellis, suh, svh, bias, codebook, out_features)
    y = x.new_zeros(x.shape[0], out_features)
    few = ops.most_rows(x)
    if few and len(ranges):
        trellis = trellis if trellis.stride(-1) == 1 else trellis.contiguous()
        stack = cpu.kernels().Stack(trellis, suh, svh, bias, codebook, x.shape[1], out_features)
        cpu.kernels().grouped_linear([(stack, ranges.long(), y)], x if x.stride(1) == 1 else x.contiguous(), most=few)
        if x.shape[0] <= few:
            return y
    for group, rows in _groups(ranges, x.shape[0]):
        if rows.stop - rows.start > few:
            layer = (trellis[group], suh[group], svh[group], None if bias is None else bias[group], codebook)
            if gpu.is_available(x.device):
                y[rows] = gpu.kernels().linear(x[rows], *layer, out_features)
            else:
                ops.multiply_in_strips(x[rows], *layer, y[rows])
    return y


@grouped_linear.register_fake
def _(x, ranges, trellis, suh, svh, bias, codebook, out_features):
    check_devices(x, ranges, trellis, suh, svh, bias)
    return x.new_empty(x.shape[0], out_features)


class PackedStack(ops.Packed):
    """What the compiled kernel takes for stacked tensors."""

    kind = "Stack"


# For experts where nothing is to see operators: the compiled kernels' `route`, `grouped_linear` and `mix`.
compiled = cpu.kernels


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
    check_devices(grad, ranges, trellis, suh, svh)
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
