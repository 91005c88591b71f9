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
Cases of the compiled kernels for `check_cases.cpp`, in plain torch: products of one to three rows, and decoded weights.

    python tests/quantization/exl3_integration/cross/write_cases.py FILE

A case is eight int64 (is_linear, twice_bits, codebook, rows, in_features, out_features, dtype, input_bits), the tensors `x`,
`trellis`, `suh` and `svh` (of a decoded weight the trellis alone), and the result, each contiguous.
"""

import itertools
import struct
import sys

import torch

from transformers.integrations.exl3 import format
from transformers.integrations.exl3.kernels import DTYPES
from transformers.integrations.exl3.kernels.cpu import reference


IN, OUT = 384, 256


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def random_trellis(bits: float) -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, (IN // format.TILE, OUT // format.TILE, int(16 * bits))).to(torch.int16)


def linear_case(bits: float, codebook: str, rows: int, input_bits: int, dtype: torch.dtype) -> bytes:
    trellis, x = random_trellis(bits), torch.randn(rows, IN).to(dtype)
    suh, svh = torch.randn(IN).half(), torch.randn(OUT).half()
    y = reference.linear(x, trellis, suh, svh, None, codebook, input_bits)
    sizes = (int(2 * bits), format.CODEBOOKS.index(codebook), rows, IN, OUT, DTYPES.index(dtype), input_bits)
    return struct.pack("8q", 1, *sizes) + b"".join(map(raw, (x, trellis, suh, svh, y)))


def decode_case(bits: float, codebook: str, dtype: torch.dtype) -> bytes:
    trellis = random_trellis(bits)
    inner = format.decode(trellis, codebook).to(dtype).T
    sizes = (int(2 * bits), format.CODEBOOKS.index(codebook), 0, IN, OUT, DTYPES.index(dtype), 0)
    return struct.pack("8q", 0, *sizes) + raw(trellis) + raw(inner)


def main(path: str):
    torch.manual_seed(0)
    fused = itertools.product(format.BITS, ("mul1",), (1, 2), (8, 16), (torch.float16, torch.bfloat16))
    products = itertools.product(format.BITS, format.CODEBOOKS, (3,), (16,), (torch.bfloat16,))
    weights = itertools.product(format.BITS, format.CODEBOOKS, DTYPES)
    with open(path, "wb") as file:
        for write, cases in ((linear_case, fused), (linear_case, products), (decode_case, weights)):
            file.writelines(write(*case) for case in cases if case[0] == int(case[0]) or case[1] == "mul1")


if __name__ == "__main__":
    main(sys.argv[1])
