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
The calls of the compiled CPU kernels, the plain C library of `cpu.cpp`, which is loaded with ctypes.

What is passed to the library is checked here. Its structures are those of `common.h`. `reference.py` says what is computed.
This file is the hub kernel's as well, beside the library.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

import torch

from ... import format
from ... import search as trellis_search
from .. import DTYPES


ABI_VERSION = 8  # as in cpu.cpp

_STATUS = {
    1: "it knows no such rate",
    2: "the memory for its scratch is missing",
    3: "EXL3_CPU_ISA names an instruction set that this machine or this build lacks",
    4: "EXL3_CPU_INPUT_BITS is neither 8 nor 16",
    5: "its ranges are none of rows of the input",
}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_DTYPES = {dtype: number for number, dtype in enumerate(DTYPES)}

# The structures of common.h, which `struct` fills faster than ctypes: rows of numbers are a pointer, a stride and a dtype.
_ROWS, _NO_ROWS = "Pqi", (0, 0, 0)
_TRELLIS = "Pqqqqii"  # as `_trellis` returns it
_LINEAR_CALL = struct.Struct("@" + 5 * _ROWS + _TRELLIS + "qqqPq")
_OPERANDS, _SIZES = struct.Struct("@" + 2 * _ROWS + "0P"), struct.Struct("@qqqPq")  # where that starts and ends
_GROUPS = struct.Struct("@Pqqqq")  # what a grouped call has then, before the strides of a stack
_MIX_CALL = struct.Struct("@" + 3 * _ROWS + "qqq")
_ROTATE_CALL = struct.Struct("@" + 5 * _ROWS + "qqq0P")
_DECODE_CALL = struct.Struct("@" + 3 * _ROWS + _TRELLIS + "0P")

_SIGNATURES = {
    "exl3_search": [_POINTER, _LONG, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT],
    "exl3_linear": [_POINTER, _LONG, _INT],
    "exl3_grouped_linear": [_POINTER, _LONG, _INT],
    "exl3_route": [_POINTER, _LONG, _LONG, _POINTER, _POINTER],
    "exl3_mix": [_POINTER, _INT],
    "exl3_rotate": [_POINTER, _INT],
    "exl3_decode": [_POINTER, _INT],
    "exl3_dequantize": [_POINTER, _INT],
}


_library: ctypes.CDLL | None = None


def load(path: Path):
    """
    Call the library in this file from now on.

    Raises:
        ImportError: If it belongs to another version of this file.
    """
    global _library
    library = ctypes.CDLL(str(path))
    if (found := library.exl3_abi_version()) != ABI_VERSION:
        raise ImportError(
            f"{path} has version {found} of the EXL3 kernels, this transformers needs {ABI_VERSION}: install it again from "
            "source to compile them anew"
        )
    library.exl3_isa.restype = ctypes.c_char_p
    library.exl3_use_openmp.argtypes = [_POINTER]
    # In the process itself, where torch has put its OpenMP library, if it has one with GCC's names.
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name != "nt" else None
    library.exl3_use_openmp(ctypes.cast(region, _POINTER) if region else None)
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.exl3_route.restype = _LONG
    _library = library


def isa() -> str:
    """The instruction set in use, as `EXL3_CPU_ISA` would name it; every machine of the architecture has `base`."""
    name = _library.exl3_isa()
    if name is None:
        raise ValueError(f"EXL3_CPU_ISA={os.environ.get('EXL3_CPU_ISA')}: {_STATUS[3]}")
    return name.decode()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers, which torch's matrix products use then."""
    return bool(_library.exl3_multiplies_bfloat16())


def multiplies_many_rows() -> bool:
    """Whether `linear` is faster than a product with a decoded weight for any number of rows of 16 bits."""
    return bool(_library.exl3_multiplies_many_rows())


def search(tiles: torch.Tensor, bits: float, codebook: str, effort: str = "default") -> torch.Tensor:
    """The same as `search.search_reference`, to the byte.

    Args:
        tiles (`torch.Tensor`): fp32 `[n, 256]` on the CPU, in stream order and in units of the codebook's values, finite.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.
        effort (`str`, *optional*, defaults to `"default"`): One of `search.EFFORTS`.

    Returns:
        `torch.Tensor`: int32 `[n, 256]`.

    Raises:
        ValueError: For tiles of another dtype, shape or device or with values that are not finite, and for an unknown rate,
            codebook or effort.
    """
    if tiles.dtype is not torch.float32 or tiles.device.type != "cpu" or tiles.shape[1:] != (format.TILE_SIZE,):
        raise ValueError(f"tiles must be float32 [n, 256] on the CPU: {_describe(tiles)}")
    if not torch.isfinite(tiles).all():
        raise ValueError("tiles must be finite")
    return trellis_search.search(tiles, bits, codebook, effort, _search_kernel)


def _search_kernel(tiles, values, levels, bits, window):
    tiles, values = tiles.contiguous(), values.contiguous()
    states = torch.empty(tiles.shape, dtype=torch.int32)
    _call(
        "exl3_search",
        tiles.data_ptr(),
        tiles.shape[0],
        int(2 * bits),
        values.data_ptr(),
        values.dtype is torch.int16,
        None if levels is None else levels.data_ptr(),
        window,
        states.data_ptr(),
        torch.get_num_threads(),
    )
    return states


def linear(layers: list[tuple], out: list[torch.Tensor]):
    """Products of rows and quantized weights, of several layers on all threads together.

    Args:
        layers (`list[tuple]`): For each `x` `[rows, in_features]`, float32, float16 or bfloat16, then `trellis`, `suh`,
            `svh`, `bias` and `codebook` as in `ops.linear`, on sizes that fit each other.
        out (`list[torch.Tensor]`): For each where to write: `[rows, out_features]`, rows contiguous each, of `x`'s dtype.

    Raises:
        ValueError: For tensors of other dtypes, layouts or devices, and for an unknown rate or codebook.
    """
    calls, kept = bytearray(_LINEAR_CALL.size * len(layers)), []
    for index, ((x, trellis, suh, svh, bias, codebook), y) in enumerate(zip(layers, out, strict=True)):
        trellis, x = _tiles(trellis), x.contiguous()
        _check_sizes(x, trellis, suh, svh, bias, y)
        _LINEAR_CALL.pack_into(
            calls,
            index * _LINEAR_CALL.size,
            *_rows(x),
            *_rows(y),
            *_rows(suh),
            *_rows(svh),
            *_rows(bias),
            *_trellis(trellis, codebook),
            *x.shape,
            y.shape[1],
            0,
            1,
        )
        kept.append((x, trellis))  # until the calls are done
    _call("exl3_linear", _address(calls), len(layers), torch.get_num_threads())


class Weight:
    """
    A quantized weight that is checked once, and multiplied with little effort for a call.

    Args:
        trellis, suh, svh, bias, codebook: As in `ops.linear`, on sizes that fit each other. They are not kept: the address of
            each must be the same, and its memory alive, at every call.
        in_features, out_features (`int`): Without padding.

    Raises:
        ValueError: As of `linear`.
    """

    def __init__(self, trellis, suh, svh, bias, codebook, in_features, out_features):
        x, y = torch.empty(0, in_features), torch.empty(0, out_features)
        _check_sizes(x, trellis, suh, svh, bias, y)
        if trellis.stride(2) != 1:
            raise ValueError(f"the tiles of a trellis are to be contiguous each: {_describe(trellis)}")
        call = _LINEAR_CALL.pack(
            *_rows(x),
            *_rows(y),
            *_rows(suh),
            *_rows(svh),
            *_rows(bias),
            *_trellis(_tiles(trellis), codebook),
            *(0, 0, 0, 0, 0),
        )
        self._constant = call[_OPERANDS.size : -_SIZES.size]
        self.in_features, self.out_features = in_features, out_features

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ W + bias` for `x` `[..., in_features]` on the CPU, contiguous, of a dtype of `DTYPES`."""
        into, out = self.in_features, self.out_features
        y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
        dtype = _DTYPES[x.dtype]
        operands = _OPERANDS.pack(x.data_ptr(), into, dtype, y.data_ptr(), out, dtype)
        call = operands + self._constant + _SIZES.pack(x.numel() // into, into, out, 0, 1)
        _call("exl3_linear", call, 1, torch.get_num_threads())
        return y


class Stack:
    """
    Stacked quantized weights that are checked once, and multiplied with little effort for a call.

    Args:
        trellis, suh, svh, bias, codebook: As in `grouped.grouped_linear`, on sizes that fit each other. They are not kept: the
            address of each must be the same, and its memory alive, at every call.
        in_features, out_features (`int`): Without padding.

    Raises:
        ValueError: As of `linear`.
    """

    def __init__(self, trellis, suh, svh, bias, codebook, in_features, out_features):
        stacks = [trellis, suh, svh] + ([] if bias is None else [bias])
        if not len(trellis) or any(len(stack) != len(trellis) for stack in stacks):
            raise ValueError(f"no stacks of one size: {', '.join(map(_describe, stacks))}")
        one = Weight(
            *(stack[0] for stack in stacks), *([None] if bias is None else []), codebook, in_features, out_features
        )
        strides = [stack.stride(0) for stack in stacks] + ([0] if bias is None else [])
        self._constant, self._strides = one._constant, struct.pack("@qqqq", *strides)
        self.count, self.in_features, self.out_features = len(trellis), in_features, out_features


def grouped_linear(
    products: list[tuple[Stack, torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    places: torch.Tensor | None = None,
    sharing: int = 1,
    most: int = sys.maxsize,
):
    """Products of groups of rows and stacked quantized weights, of all groups on all threads together.

    Args:
        products (`list[tuple]`): For each stack int64 `ranges` `[groups, 2]`, as in `grouped.grouped_linear`, and where to write:
            `[rows, out_features]`, rows contiguous each, of `x`'s dtype. Written in rows of groups.
        x (`torch.Tensor`): `[rows / sharing, in_features]` on the CPU, rows contiguous each, of a dtype of `DTYPES`.
        places (`torch.Tensor`, *optional*): int64 `[rows]`, in which row of a product each row of the groups is, the same if not
            given. None is there twice.
        sharing (`int`, *optional*, defaults to 1): How many rows of a product, one after the other, are of the same row of `x`. If
            there are several, with `places` only.
        most (`int`, *optional*): Groups of more rows are left out.

    Raises:
        ValueError: For tensors of other sizes, dtypes, layouts or devices, and for ranges and places that are none.
    """
    rows, into = x.shape[0] * sharing, x.shape[1]
    at = 0 if places is None else _numbers(places)
    if not (sharing == 1 if places is None else places.shape == (rows,)):
        found = None if places is None else _describe(places)
        raise ValueError(f"{sharing} rows of products for each of x {_describe(x)} do not fit places {found}")
    operand, calls = _rows(x), []
    for stack, ranges, y in products:
        fits = into == stack.in_features and y.shape == (rows, stack.out_features) and y.dtype is x.dtype
        if not fits or ranges.shape != (stack.count, 2):
            raise ValueError(
                f"a stack of {stack.count} weights [{stack.in_features}, {stack.out_features}] does not fit x {_describe(x)}, "
                f"y {_describe(y)} and ranges {_describe(ranges)}"
            )
        calls += (
            _OPERANDS.pack(*operand, *_rows(y)),
            stack._constant,
            _SIZES.pack(rows, into, y.shape[1], at, sharing),
        )
        calls += (_GROUPS.pack(_numbers(ranges), *ranges.stride(), stack.count, most), stack._strides)
    _call("exl3_grouped_linear", b"".join(calls), len(products), torch.get_num_threads())


def route(numbers: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A stable sort of the rows of a mixture by their experts.

    Args:
        numbers (`torch.Tensor`): int64 `[rows]` on the CPU, the expert of each; other numbers than 0 to `experts` stand for none.
        experts (`int`): How many there are.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, int)`: int64 `[rows]`, the rows of each expert in order and then those of none; int64
        `[experts, 2]`, where among them those of each expert begin and end; how many are of an expert.
    """
    rows = numbers.shape[0]
    order, ranges = torch.empty(rows, dtype=torch.int64), torch.empty(experts, 2, dtype=torch.int64)
    tensors = order.data_ptr(), ranges.data_ptr()
    return order, ranges, _library.exl3_route(_numbers(numbers), rows, experts, *tensors)


def mix(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sums in fp32 of the rows of each token times their weights, in order: `(x.view(*weights.shape, -1) * weights).sum(1)`.

    Args:
        x (`torch.Tensor`): `[tokens k, features]` on the CPU, rows contiguous each, of a dtype of `DTYPES`.
        weights (`torch.Tensor`): `[tokens, k]`, the same.

    Returns:
        `torch.Tensor`: `[tokens, features]`, of the dtype of `x`.

    Raises:
        ValueError: For tensors of other sizes, dtypes, layouts or devices.
    """
    tokens, count = weights.shape
    if x.shape[0] != tokens * count:
        raise ValueError(f"rows of {_describe(x)} are not those of weights {_describe(weights)}")
    y = x.new_empty(tokens, x.shape[1])
    call = _MIX_CALL.pack(*_rows(x), *_rows(y), *_rows(weights), tokens, count, x.shape[1])
    _call("exl3_mix", call, torch.get_num_threads())
    return y


def _numbers(tensor):
    """Pointer to the numbers of a tensor of int64, contiguous if it has one dimension."""
    if (
        tensor.dtype is not torch.int64
        or not tensor.is_cpu
        or (tensor.dim() == 1 and tensor.numel() > 1 and tensor.stride(0) != 1)
    ):
        raise ValueError(f"numbers of rows are int64 on the CPU: {_describe(tensor)}")
    return tensor.data_ptr()


def rotate(
    x: torch.Tensor,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `hadamard(x * before) * after + bias` in fp32, with `x` padded with zeros, cut to the size of `out`.

    Args:
        x (`torch.Tensor`): `[rows, n]`, float32, float16 or bfloat16 on the CPU.
        before, after (`torch.Tensor`, *optional*): `[n]`, padded to a multiple of 128.
        bias (`torch.Tensor`, *optional*): At least as long as a row of `out`.
        out (`torch.Tensor`, *optional*): Where to write: `[rows, m]` with the same number of 128-blocks as `x`, rows
            contiguous each. By default float32, with the padding.

    Returns:
        `torch.Tensor`: `out`.
    """
    padded = format.padded(x.shape[-1])
    if out is None:
        out = x.new_empty(x.shape[0], padded, dtype=torch.float32)
    fits = x.dim() == out.dim() == 2 and x.shape[0] == out.shape[0] and format.padded(out.shape[1]) == padded
    fits = fits and all(scale is None or scale.shape == (padded,) for scale in (before, after))
    if not fits or (bias is not None and (bias.dim() != 1 or bias.shape[0] < out.shape[1])):
        tensors = {"x": x, "before": before, "after": after, "bias": bias, "out": out}
        raise ValueError(f"the sizes of a rotation do not fit each other: {_shapes(tensors)}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = (*_rows(x), *_rows(out), *_rows(before), *_rows(after), *_rows(bias))
    call = bytearray(_ROTATE_CALL.pack(*rows, x.shape[0], x.shape[1], out.shape[1]))
    _call("exl3_rotate", _address(call), torch.get_num_threads())
    return out


def decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same as `format.decode(trellis, codebook).to(dtype)`, to the byte.

    Args:
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]` on the CPU, in any order of tiles in memory.
        codebook (`str`): One of `format.CODEBOOKS`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): float32, float16 or bfloat16.

    Returns:
        `torch.Tensor`: `[in, out]`, of `dtype`, with the columns contiguous.

    Raises:
        ValueError: For a trellis of another dtype, shape or device, and for an unknown codebook or another `dtype`.
    """
    trellis = _tiles(trellis)
    inner = torch.empty(trellis.shape[1] * format.TILE, trellis.shape[0] * format.TILE, dtype=dtype)
    call = bytearray(_DECODE_CALL.pack(*_rows(inner), *_NO_ROWS, *_NO_ROWS, *_trellis(trellis, codebook)))
    _call("exl3_decode", _address(call), torch.get_num_threads())
    return inner.T


def dequantize(trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str) -> torch.Tensor:
    """What `ops.dequantize` computes, to the byte: see there for arguments, result and errors."""
    trellis = _tiles(trellis)
    sizes = (trellis.shape[0] * format.TILE, trellis.shape[1] * format.TILE)
    if (suh.shape, svh.shape) != (sizes[:1], sizes[1:]) or any(size % format.BLOCK for size in sizes):
        tensors = {"trellis": trellis, "suh": suh, "svh": svh}
        raise ValueError(f"the sizes of a weight do not fit each other: {_shapes(tensors)}")
    weight = torch.empty(svh.shape[0], suh.shape[0], dtype=torch.float32)
    call = bytearray(_DECODE_CALL.pack(*_rows(weight), *_rows(suh), *_rows(svh), *_trellis(trellis, codebook)))
    _call("exl3_dequantize", _address(call), torch.get_num_threads())
    return weight


def _tiles(trellis):
    """`trellis` in some order of tiles, each tile contiguous."""
    if trellis.dtype is not torch.int16 or trellis.device.type != "cpu" or trellis.dim() != 3:
        raise ValueError(f"a trellis is int16 [in/16, out/16, 16K], here on the CPU: {_describe(trellis)}")
    format.bits_of(trellis)
    return trellis if trellis.stride(2) == 1 else trellis.contiguous()


def _check_sizes(x, trellis, suh, svh, bias, y):
    sizes = (trellis.shape[0] * format.TILE, trellis.shape[1] * format.TILE)
    fits = x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0] and x.dtype is y.dtype
    fits = fits and (format.padded(x.shape[1]), format.padded(y.shape[1])) == sizes
    fits = fits and (suh.shape, svh.shape) == (sizes[:1], sizes[1:])
    if not fits or (bias is not None and (bias.dim() != 1 or bias.shape[0] < y.shape[1])):
        tensors = {"x": x, "trellis": trellis, "suh": suh, "svh": svh, "bias": bias, "y": y}
        raise ValueError(f"the tensors of a product do not fit each other: {_shapes(tensors)}")


def _shapes(tensors):
    return ", ".join(f"{name} {_describe(tensor)}" for name, tensor in tensors.items() if tensor is not None)


def _trellis(trellis, codebook):
    """A trellis for the library: where it is, its strides, its size in tiles, twice its bits per weight, its codebook."""
    format.check_codebook(codebook)
    rows, columns, words = trellis.shape
    row_stride, column_stride, _ = trellis.stride()
    codebook = format.CODEBOOKS.index(codebook)
    return trellis.data_ptr(), row_stride, column_stride, rows, columns, words // 8, codebook


def _rows(tensor):
    """A tensor for the library: rows of numbers, contiguous each and evenly spaced."""
    if tensor is None:
        return _NO_ROWS
    is_contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0
    if not tensor.is_cpu or tensor.dtype not in _DTYPES or not is_contiguous:
        raise ValueError(
            f"the EXL3 kernels take contiguous rows of float32, float16 or bfloat16 on the CPU: {_describe(tensor)}"
        )
    return tensor.data_ptr(), tensor.stride(-2) if tensor.dim() > 1 else 0, _DTYPES[tensor.dtype]


def _address(structures):
    """Pointer to the bytes of a `bytearray`, which lives as long as this."""
    return (ctypes.c_char * len(structures)).from_buffer(structures)


def _describe(tensor):
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _call(name, *arguments):
    status = getattr(_library, name)(*arguments)
    if status:
        raise (ValueError if status == 5 else RuntimeError)(
            f"the compiled EXL3 kernel {name} failed: {_STATUS[status]}"
        )
