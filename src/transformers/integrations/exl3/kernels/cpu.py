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
The door to the compiled CPU kernels of `cpu.cpp`, a plain C library beside this file that is loaded with ctypes.

`setup.py` compiles it. Where it is missing, `is_available()` says so once and everything runs on the torch reference.
What is passed to the library is checked here. The environment variable `EXL3_CPU_ISA` (`avx512`, `avx2` or `base`) forces
an instruction set, otherwise the best that the machine has is taken. Results are the same bytes on all of them.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

from ....utils import logging
from .. import format


logger = logging.get_logger(__name__)

LIBRARY = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")
ABI_VERSION = 1  # as in cpu.cpp

_STATUS = {
    1: "it knows no such rate",
    2: "the memory for its scratch is missing",
    3: "EXL3_CPU_ISA names an instruction set that this machine or this build lacks",
}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "exl3_search": [_POINTER, _LONG, _INT, _POINTER, _POINTER, _INT],
    "exl3_decode": [_POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT, _POINTER, _LONG, _INT],
}


@lru_cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.is_file():
        logger.warning(
            "The compiled CPU kernels of EXL3 are missing, so the much slower torch reference is used. They are built when "
            f"transformers is installed from source on a machine with a C++ compiler; they would stand in {LIBRARY}."
        )
        return None
    library = ctypes.CDLL(str(LIBRARY))
    if (found := library.exl3_abi_version()) != ABI_VERSION:
        raise ImportError(
            f"{LIBRARY} has version {found} of the EXL3 kernels, this transformers needs {ABI_VERSION}: install it again "
            "from source to compile them anew"
        )
    library.exl3_isa.restype = ctypes.c_char_p
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def is_available() -> bool:
    """Whether the compiled kernels are there. Warns the first time when they are not.

    Raises:
        ImportError: If those that are there belong to another version.
    """
    return _library() is not None


def isa() -> str:
    """The instruction set in use: `avx512`, `avx2` or `base`, the one that every machine of the architecture has."""
    name = _loaded().exl3_isa()
    if name is None:
        raise ValueError(f"EXL3_CPU_ISA={os.environ.get('EXL3_CPU_ISA')}: {_STATUS[3]}")
    return name.decode()


def search(tiles: torch.Tensor, bits: float, codebook: str) -> torch.Tensor:
    """The same as `encoder.search_reference`, to the byte.

    Args:
        tiles (`torch.Tensor`): fp32 `[n, 256]` on the CPU, in stream order and in units of the codebook's values, finite.
        bits (`float`): Bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.

    Returns:
        `torch.Tensor`: int32 `[n, 256]`.

    Raises:
        ValueError: For tiles of another dtype, shape or device or with values that are not finite, and for an unknown rate
            or codebook.
        RuntimeError: If the kernels are missing.
    """
    bits = format.check_bits(bits)
    values = _values(codebook, torch.float32)
    if tiles.dtype is not torch.float32 or tiles.device.type != "cpu" or tiles.shape[1:] != (format.TILE_SIZE,):
        raise ValueError(f"tiles must be float32 [n, 256] on the CPU: {_describe(tiles)}")
    if not torch.isfinite(tiles).all():
        raise ValueError("tiles must be finite")
    tiles = tiles.contiguous()
    states = torch.empty(tiles.shape, dtype=torch.int32)
    _call(
        "exl3_search",
        tiles.data_ptr(),
        tiles.shape[0],
        int(2 * bits),
        values.data_ptr(),
        states.data_ptr(),
        torch.get_num_threads(),
    )
    return states


def decode(trellis: torch.Tensor, codebook: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same as `format.decode(trellis, codebook).to(dtype)`, to the byte.

    Args:
        trellis (`torch.Tensor`): int16 `[in/16, out/16, 16K]` on the CPU. A slice of another's rows and columns is fine.
        codebook (`str`): One of `format.CODEBOOKS`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): float32, float16 or bfloat16.

    Returns:
        `torch.Tensor`: `[in, out]`, of `dtype`.

    Raises:
        ValueError: For a trellis of another dtype, shape or device, and for an unknown codebook or another `dtype`.
        RuntimeError: If the kernels are missing.
    """
    if trellis.dtype is not torch.int16 or trellis.device.type != "cpu" or trellis.dim() != 3:
        raise ValueError(f"a trellis is int16 [in/16, out/16, 16K], here on the CPU: {_describe(trellis)}")
    bits = format.bits_of(trellis)
    values = _values(codebook, dtype)
    rows, columns, words = trellis.shape
    if trellis.stride(2) != 1 or (columns > 1 and trellis.stride(1) != words):
        trellis = trellis.contiguous()
    inner = torch.empty(rows * format.TILE, columns * format.TILE, dtype=dtype)
    _call(
        "exl3_decode",
        trellis.data_ptr(),
        trellis.stride(0),
        rows,
        columns,
        int(2 * bits),
        values.data_ptr(),
        dtype.itemsize,
        inner.data_ptr(),
        inner.stride(0),
        torch.get_num_threads(),
    )
    return inner


@lru_cache
def _values(codebook, dtype):
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the values of a codebook are float32, float16 or bfloat16 here, not {dtype}")
    return format.codebook_values(codebook).to(dtype)


def _describe(tensor):
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _loaded():
    if not is_available():
        raise RuntimeError(f"the compiled CPU kernels of EXL3 are not there: {LIBRARY}")
    return _library()


def _call(name, *arguments):
    status = getattr(_loaded(), name)(*arguments)
    if status:
        raise RuntimeError(f"the compiled EXL3 kernel {name} failed: {_STATUS[status]}")
