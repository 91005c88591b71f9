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
The operators of EXL3, registered with `torch.library`, and the choice of what computes them.

| operator                    | computes                                                                          |
|-----------------------------|-----------------------------------------------------------------------------------|
| `exl3::linear`              | `y = x @ W + bias` for a quantized `W`, differentiable in `x`                      |
| `exl3::linear_input_grad`   | its gradient in `x`, `g @ W.T`                                                    |
| `exl3::dequantize`          | the weight as `nn.Linear` keeps it, `[out, in]`                                   |
| `exl3::embedding`           | rows of a quantized embedding table                                               |

`W = diag(suh) B inner B diag(svh)` with the names of `format.py`. Activations are rotated instead of weights, products are
accumulated in fp32, and a large `inner` is decoded in strips, so that no operator holds a dense copy of a weight.

What computes them: the Triton kernels of `kernels/triton` on GPUs, the compiled ones of `kernels/cpu` on the CPU, and where
these are missing plain torch, which defines what they all compute.
"""

import sys

import numpy as np
import torch

from . import format
from .format import hadamard
from .kernels import DTYPES, check_devices, cpu
from .kernels.triton import gpu


# Elements of `inner` that are decoded at a time: at most 16 MiB, enough columns for an efficient matrix product.
STRIP_ELEMENTS = 1 << 22

# Up to so many rows the compiled kernel of the CPU multiplies while it decodes. More are faster in a matrix product, unless
# the kernel has a fast one of its own.
FEW_ROWS = 48


def is_compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels of the CPU compute what `tensor` is the input of."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and cpu.is_available()


def most_rows(x: torch.Tensor) -> int:
    """Up to how many rows like those of `x` the compiled kernel of the CPU multiplies while it decodes."""
    if not is_compiled(x):
        return 0
    return sys.maxsize if x.dtype is not torch.float32 and cpu.kernels().multiplies_many_rows() else FEW_ROWS


def _decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype) -> torch.Tensor:
    """The inner matrix `[in, out]` of `trellis`, in `dtype`."""
    if gpu.is_available(trellis.device):
        return gpu.kernels().decode(trellis, codebook, dtype)
    if trellis.device.type == "cpu" and dtype in DTYPES and cpu.is_available():
        return cpu.kernels().decode(trellis, codebook, dtype)
    return format.decode(trellis, codebook).to(dtype)


def _rotate(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`hadamard(x * scale)` for `x` `[rows, n]` padded with zeros to the size of `scale`, in the dtype to multiply in."""
    dtype = _product_dtype(x)
    if is_compiled(x):
        return cpu.kernels().rotate(x, before=scale, out=x.new_empty(x.shape[0], scale.shape[0], dtype=dtype))
    padded = torch.nn.functional.pad(x.float(), (0, scale.shape[0] - x.shape[1]))
    return hadamard(padded * scale.float()).to(dtype)


def _rotate_back(product: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor):
    """Write `hadamard(product) * scale + bias` to `out`, cut to its width; `bias` is as long as that is wide."""
    if is_compiled(product) and out.dtype in DTYPES:
        cpu.kernels().rotate(product, after=scale, bias=bias, out=out)
        return
    y = (hadamard(product.float()) * scale.float())[:, : out.shape[1]]
    out.copy_(y if bias is None else y + bias.float())


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a product of `x` is computed in, whose sums are of fp32 then: fp32 on a CPU that has no bf16 products."""
    if x.device.type != "cpu":
        return x.dtype
    is_fast = x.dtype is torch.bfloat16 and cpu.is_available() and cpu.kernels().multiplies_bfloat16()
    return x.dtype if is_fast else torch.float32


def _strips(length: int, width: int):
    """Slices of `length` tiles, each of whole 128-blocks and of about `STRIP_ELEMENTS` elements, at `width` tiles across."""
    tiles_per_block = format.BLOCK // format.TILE
    step = max(1, STRIP_ELEMENTS // (width * format.TILE * format.BLOCK)) * tiles_per_block
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def ordered(trellis: torch.Tensor) -> torch.Tensor:
    """
    `trellis` in the order of tiles in memory that the kernels of its device read fastest.

    Those of the CPU go down the columns of tiles, and want each column in one piece. Only the strides change: shape and
    values stay, any order is computed with, and what is saved is contiguous again. Among several processes the order is
    left alone, since FSDP shards contiguous parameters only.
    """
    source = trellis.detach().transpose(-3, -2)
    if not _goes_down_columns(trellis.device) or source.is_contiguous():
        return trellis
    columns = torch.empty(source.shape, dtype=source.dtype)
    np.copyto(columns.numpy(), source.numpy())  # torch's threads would wait in a loop after it, longer than it takes
    return columns.transpose(-3, -2)


def _goes_down_columns(device: torch.device) -> bool:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return device.type == "cpu" and cpu.is_available() and not is_distributed


def new_trellis(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A stack of trellises, not initialised, in the order that `ordered` gives it."""
    experts, rows, columns, words = shape
    if not _goes_down_columns(device):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(experts, columns, rows, words, dtype=dtype, device=device).transpose(1, 2)


def _features(tiles: slice) -> slice:
    return slice(tiles.start * format.TILE, tiles.stop * format.TILE)


def _check_weight(trellis, suh, svh):
    """Raise `ValueError` where these are no quantized weight."""
    sizes = [(size * format.TILE,) for size in trellis.shape]
    if len(sizes) != 3 or suh.shape != sizes[0] or svh.shape != sizes[1]:
        raise ValueError(
            f"EXL3 scales of {[*suh.shape]} and {[*svh.shape]} features do not fit a trellis of {[*trellis.shape]}"
        )


def check_product(x, trellis, suh, svh, bias, out_features, is_transposed=False):
    """Raise `ValueError` where `x` cannot be multiplied by a quantized weight to `out_features`."""
    _check_weight(trellis, suh, svh)
    into, out = (svh.shape[0], suh.shape[0]) if is_transposed else (suh.shape[0], svh.shape[0])
    if x.dim() == 0 or format.padded(x.shape[-1]) != into or not x.is_floating_point():
        raise ValueError(
            f"EXL3 linear: the input is {x.dtype} {[*x.shape]}, the quantized weight has {into} input features"
        )
    if format.padded(out_features) != out:
        raise ValueError(f"EXL3 linear: {out_features} output features of a quantized weight that has {out}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < out_features):
        raise ValueError(f"EXL3 linear: a bias {[*bias.shape]} for {out_features} output features")


@torch.library.custom_op("exl3::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    out_features: int,
) -> torch.Tensor:
    """
    The product of activations and a quantized weight.

    Args:
        x (`torch.Tensor`): `[..., in_features]`, floating; `in_features` padded to a multiple of 128 is `in`.
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]`.
        suh (`torch.Tensor`): `[in]`.
        svh (`torch.Tensor`): `[out]`.
        bias (`torch.Tensor`, *optional*): `[out_features]` or more.
        codebook (`str`): One of `format.CODEBOOKS`.
        out_features (`int`): Output features without their padding.

    Returns:
        `torch.Tensor`: `[..., out_features]`, of the dtype of `x`.

    Raises:
        `ValueError`: Where the tensors do not fit each other.
    """
    check_product(x, trellis, suh, svh, bias, out_features)
    if gpu.is_available(x.device):
        return gpu.kernels().linear(x, trellis, suh, svh, bias, codebook, out_features)
    y = x.new_empty(*x.shape[:-1], out_features)
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, out_features)
    if rows.shape[0] <= most_rows(x):
        cpu.kernels().linear([(rows, trellis, suh, svh, bias, codebook)], [out])
    else:
        multiply_in_strips(rows, trellis, suh, svh, bias, codebook, out)
    return y


def multiply_in_strips(rows, trellis, suh, svh, bias, codebook, out):
    """`linear` for `rows` `[rows, in_features]` into `out` `[rows, out_features]`, by matrix products of decoded strips."""
    rotated = _rotate(rows, suh)
    for strip in _strips(trellis.shape[1], trellis.shape[0]):
        columns = _features(strip)
        product = rotated @ _decode(trellis[:, strip], codebook, rotated.dtype)
        _rotate_back(product, svh[columns], None if bias is None else bias[: out.shape[1]][columns], out[:, columns])


def is_watched() -> bool:
    """Whether something is to see which operators are called: a compiler, tracer, profiler, mode or transform."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd.profiler._is_profiler_enabled
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def is_direct(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """
    Whether of a product of `x` on the CPU, to which `others` are added or by which it is weighted, the result is all that is asked
    for: it may go without the dispatcher.
    """
    return not (
        is_watched()
        or type(x) is not torch.Tensor
        or not x.is_cpu
        or x.dtype not in DTYPES
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
    )


class Packed:
    """What the compiled kernel takes for a layer's tensors: made when it is first asked for, and again for other tensors."""

    kind = "Weight"  # among the kernels

    def __init__(self):
        self._found = None, None  # in one, so that each thread has the weight of the tensors that it asks for

    def __call__(self, trellis, suh, svh, bias, codebook, in_features, out_features):
        """Arguments as of `linear`. None for what the compiled kernel does not take."""
        tensors = (trellis, suh, svh) if bias is None else (trellis, suh, svh, bias)
        key = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        known, weight = self._found
        if key != known:
            are_rows = all(
                type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cpu and t.stride(-1) == 1 for t in tensors
            )
            is_taken = are_rows and trellis.dtype is torch.int16 and cpu.is_available()
            weight = None
            if is_taken:
                kind = getattr(cpu.kernels(), self.kind)
                weight = kind(trellis, suh, svh, bias, codebook, in_features, out_features)
            self._found = key, weight
        return weight


class DirectLinear:
    """
    `linear` with one layer's weight, without the dispatcher, whose share of a product of one row is larger than the product's: for few
    rows on the CPU where the result is all that is asked for.
    """

    def __init__(self):
        self._packed = Packed()

    def __call__(self, x, trellis, suh, svh, bias, codebook, in_features, out_features) -> torch.Tensor | None:
        """Arguments as of `linear`. None where that is to be called instead."""
        # First whether a compiler reads this: what it compares of shapes it would compile anew for.
        if not is_direct(x, bias) or x.dim() == 0 or x.shape[-1] != in_features or x.numel() > FEW_ROWS * in_features:
            return None
        weight = self._packed(trellis, suh, svh, bias, codebook, in_features, out_features)
        return None if weight is None else weight.multiply(x if x.is_contiguous() else x.contiguous())


@linear.register_fake
def _(x, trellis, suh, svh, bias, codebook, out_features):
    check_devices(x, trellis, suh, svh, bias)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("exl3::linear_input_grad", mutates_args=())
def linear_input_grad(
    grad: torch.Tensor, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str, in_features: int
) -> torch.Tensor:
    """The gradient of `linear` in its input: `grad` `[..., out_features]` to `[..., in_features]`, in the dtype of `grad`."""
    check_product(grad, trellis, suh, svh, None, in_features, is_transposed=True)
    rows = grad.reshape(-1, grad.shape[-1])
    x = rows.new_empty(rows.shape[0], in_features)
    multiply_transposed(rows, trellis, suh, svh, codebook, x)
    return x.view(*grad.shape[:-1], in_features)


def multiply_transposed(rows, trellis, suh, svh, codebook, x):
    """`linear_input_grad` for `rows` `[rows, out_features]` into `x` `[rows, in_features]`."""
    rotated = _rotate(rows, svh)
    for strip in _strips(*trellis.shape[:2]):
        features = _features(strip)
        _rotate_back(rotated @ _decode(trellis[strip], codebook, rotated.dtype).T, suh[features], None, x[:, features])


@linear_input_grad.register_fake
def _(grad, trellis, suh, svh, codebook, in_features):
    check_devices(grad, trellis, suh, svh)
    return grad.new_empty(*grad.shape[:-1], in_features)


def _save_for_backward(ctx, inputs, output):
    x, trellis, suh, svh, bias, codebook, _ = inputs
    ctx.save_for_backward(trellis, suh, svh)
    ctx.codebook, ctx.in_features = codebook, x.shape[-1]
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _linear_backward(ctx, grad):
    trellis, suh, svh = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_input_grad(grad.contiguous(), trellis, suh, svh, ctx.codebook, ctx.in_features)
    if ctx.needs_input_grad[4]:
        shape, dtype = ctx.bias
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0)
        grad_bias = torch.nn.functional.pad(grad_bias, (0, shape[0] - grad_bias.shape[0])).to(dtype)
    return grad_x, None, None, None, grad_bias, None, None


linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


@torch.library.custom_op("exl3::dequantize", mutates_args=())
def dequantize(trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str) -> torch.Tensor:
    """
    The weight that a quantized one stands for, with its padding.

    Args:
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]`.
        suh (`torch.Tensor`): `[in]`.
        svh (`torch.Tensor`): `[out]`.
        codebook (`str`): One of `format.CODEBOOKS`.

    Returns:
        `torch.Tensor`: fp32 `[out, in]`, as in `nn.Linear`.

    Raises:
        `ValueError`: Where the tensors do not fit each other.
    """
    _check_weight(trellis, suh, svh)
    if trellis.device.type == "cpu" and cpu.is_available():
        return cpu.kernels().dequantize(trellis, suh, svh, codebook)
    weight = torch.empty(svh.shape[0], suh.shape[0], dtype=torch.float32, device=trellis.device)
    for strip in _strips(trellis.shape[1], trellis.shape[0]):
        columns = _features(strip)
        if gpu.is_available(trellis.device):
            gpu.kernels().dequantize(trellis[:, strip], suh, svh[columns], codebook, weight[columns])
            continue
        inner = format.decode(trellis[:, strip], codebook).float()
        weight[columns] = hadamard(hadamard(inner).T) * suh.float() * svh[columns, None].float()
    return weight


@dequantize.register_fake
def _(trellis, suh, svh, codebook):
    check_devices(trellis, suh, svh)
    return torch.empty(svh.shape[0], suh.shape[0], dtype=torch.float32, device=trellis.device)


@torch.library.custom_op("exl3::embedding", mutates_args=())
def embedding(ids: torch.Tensor, trellis: torch.Tensor, signs: torch.Tensor, embedding_dim: int) -> torch.Tensor:
    """
    Rows of a quantized embedding table (each row: groups of 256 elements, each a ring with its own scale and rotation).

    Args:
        ids (`torch.Tensor`): Integer `[...]`, row numbers.
        trellis (`torch.Tensor`): int16 `[vocab, G(1+16K)]`.
        signs (`torch.Tensor`): fp16 `[G, 256]`.
        embedding_dim (`int`): Elements of a row without its padding.

    Returns:
        `torch.Tensor`: fp32 `[..., embedding_dim]`.

    Raises:
        `ValueError`: Where the tensors are no table of this width.
        `IndexError`: For numbers of rows that the table does not have, on a CPU.
    """
    format.embedding_bits(trellis, signs)
    if not 0 <= signs.numel() - embedding_dim < format.EMBEDDING_GROUP:
        raise ValueError(f"EXL3 embedding: rows of {embedding_dim} elements do not fit a table of {signs.numel()}")
    rows = torch.nn.functional.embedding(ids, trellis)
    rings = rows.unflatten(-1, (signs.shape[0], -1))[..., 1:]
    values = format.codebook_values("mul1", trellis.device)[format.unpack_embedding_states(rings)].float()
    values = values * format.embedding_scales(rows, signs.shape[0]).float()
    rows = signs.float() * hadamard(values, format.EMBEDDING_GROUP)
    return rows.flatten(-2)[..., :embedding_dim].contiguous()


@embedding.register_fake
def _(ids, trellis, signs, embedding_dim):
    check_devices(ids, trellis, signs)
    return torch.empty(*ids.shape, embedding_dim, dtype=torch.float32, device=trellis.device)
