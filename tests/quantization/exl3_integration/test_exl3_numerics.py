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
"""Products and quantizing at the ends of what numbers can be, against exact arithmetic; and many products at once."""

import itertools
import math
import operator
import os
import random
import re
import sys
import threading
import unittest
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import torch
from parameterized import parameterized

from transformers.integrations.exl3 import encoding, format, ops
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.testing_utils import require_torch, slow

from .synthetic import random_linear


DTYPES = ("float32", "bfloat16", "float16")
# Relative RMS errors: of fp32 sums, and of what 16-bit inputs and results are rounded to.
TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
BYTE_INPUTS = 1e-2  # the same, of inputs of 8 bits: one or two rows of 16-bit numbers, mul1, up to 4 bits
# Smaller numbers lose digits: float16's own, and those that become too small for fp32 on the way.
FLOORS = {torch.float32: 1e-33, torch.bfloat16: 1e-33, torch.float16: 2**-14}
ROWS = (1, 60)  # few are multiplied where weights are decoded, many by PyTorch


def tolerance(rows, dtype):
    return BYTE_INPUTS if rows <= 2 and dtype != "float32" else TOLERANCES[dtype]


def exact_product(x, tensors, codebook, out_features):
    """The product of `x` `[rows, in_features]` and a quantized weight, computed with fractions: `[rows][out_features]`."""
    inner = [
        [int(value * 2**24) for value in column] for column in format.decode(tensors["trellis"], codebook).T.tolist()
    ]
    signs = [[(-1) ** (i & j).bit_count() for j in range(format.BLOCK)] for i in range(format.BLOCK)]
    suh, svh = ([Fraction(value) for value in tensors[name].tolist()] for name in ("suh", "svh"))

    def rotated(values):
        blocks = [values[start : start + format.BLOCK] for start in range(0, len(values), format.BLOCK)]
        return [sum(map(operator.mul, row, block)) for block in blocks for row in signs]

    products = []
    for row in x.double().tolist():
        scaled = [Fraction(value) * scale for value, scale in zip(row + [0.0] * (len(suh) - len(row)), suh)]
        unit = max(value.denominator for value in scaled)  # all are powers of two
        left = rotated([int(value * unit) for value in scaled])
        right = rotated([sum(map(operator.mul, column, left)) for column in inner])
        factor = unit * 2**24 * format.BLOCK
        products.append([value * scale / factor for value, scale in zip(right, svh)][:out_features])
    return products


def relative_error(result, exact):
    """RMS of the error over that of the exact numbers, or over `FLOORS` where these are smaller."""
    exact = [value for row in exact for value in row]
    unit = max(*map(abs, exact), Fraction(FLOORS[result.dtype]))
    wrong = [float((Fraction(found) - value) / unit) for found, value in zip(result.flatten().tolist(), exact)]
    right = [float(value / unit) for value in exact]
    return math.hypot(*wrong) / max(math.hypot(*right), math.sqrt(len(exact)) * FLOORS[result.dtype] / float(unit))


def anonymous_memory() -> int:
    """Bytes of memory of this process that no file is behind."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@require_torch
class Exl3NumericsTest(unittest.TestCase):
    @parameterized.expand(itertools.product(DTYPES, ROWS))
    def test_products_of_any_magnitude(self, dtype, rows):
        tensors, _ = random_linear(150, 200, bits=3, codebook="mcg")
        arguments = (tensors["trellis"], tensors["suh"], tensors["svh"], None, "mcg", 150)
        exponents = (-7, -4, 0, 4) if dtype == "float16" else (-45, -38, -30, 0, 30, 34, 36, 38)
        for exponent in exponents:
            torch.manual_seed(0)
            x = (torch.randn(rows, 200, dtype=torch.float64) * 10.0**exponent).to(getattr(torch, dtype))
            x = x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
            y = ops.linear(x, *arguments)
            if exponent > 34 and not y.isfinite().all():  # sums of so large numbers may overflow, which is seen
                continue
            exact = exact_product(x[:3], tensors, "mcg", 150)
            self.assertLess(relative_error(y[:3], exact), TOLERANCES[dtype], exponent)

    @parameterized.expand(itertools.product(DTYPES, ROWS))
    def test_large_and_small_numbers_in_one_row(self, dtype, rows):
        tensors, _ = random_linear(128, 256)
        torch.manual_seed(0)
        x = torch.randn(rows, 256) * 10.0 ** torch.randint(-4, 4, (rows, 256))
        x = x.to(getattr(torch, dtype))
        y = ops.linear(x, tensors["trellis"], tensors["suh"], tensors["svh"], None, "mul1", 128)
        self.assertLess(relative_error(y[:3], exact_product(x[:3], tensors, "mul1", 128)), tolerance(rows, dtype))

    def test_long_rows(self):
        tensors, weight = random_linear(128, 1 << 16, bits=1)
        for rows, dtype in itertools.product(ROWS, DTYPES):
            torch.manual_seed(0)
            x = torch.randn(rows, 1 << 16).to(getattr(torch, dtype))
            y = ops.linear(x, tensors["trellis"], tensors["suh"], tensors["svh"], None, "mul1", 128).double()
            expected = x[:3].double() @ weight.double().T
            self.assertLess(
                float((y[:3] - expected).norm() / expected.norm()), 2 * tolerance(rows, dtype), (rows, dtype)
            )

    @parameterized.expand(DTYPES)
    @patch.dict(os.environ, EXL3_CPU_INPUT_BITS="16")
    def test_all_sizes_up_to_300(self, dtype):
        """Each size with one of the dtypes."""
        tensors, weight = random_linear(384, 384, bits=4)
        torch.manual_seed(0)
        for into in range(DTYPES.index(dtype) + 1, 301, 3):
            out, rows = 301 - into, 1 + into % 5
            rows_of_tiles, columns_of_tiles = format.padded(into) // 16, format.padded(out) // 16
            trellis = tensors["trellis"][:rows_of_tiles, :columns_of_tiles]
            scales = tensors["suh"][: format.padded(into)], tensors["svh"][: format.padded(out)]
            x = torch.randn(rows, into).to(getattr(torch, dtype))
            y = ops.linear(x, trellis, *scales, None, "mul1", out).double()
            expected = x.double() @ weight[:out, :into].double().T
            self.assertLess(float((y - expected).norm() / expected.norm()), 2 * TOLERANCES[dtype], (into, out))

    def test_weights_of_any_magnitude(self):
        torch.manual_seed(0)
        weight = torch.randn(128, 128, dtype=torch.float64)
        for exponent in range(-30, 31, 3):
            scaled = weight * 10.0**exponent
            try:
                trellis, suh, svh = encoding.encode(scaled, 4, "mul1", 0)
            except ValueError as error:
                self.assertRegex(str(error), "too large for fp16")
                self.assertGreater(exponent, 8)
                continue
            found = ops.dequantize(trellis, suh, svh, "mul1").double()
            self.assertLess(exponent, 10)
            error = float((found - scaled).norm() / scaled.norm())
            if exponent < -16:  # what fp16 scales cannot hold becomes zero
                self.assertEqual(float(found.abs().max()), 0, exponent)
            elif exponent > -10:
                self.assertLess(error, 0.08, exponent)


@require_torch
@unittest.skipUnless(sys.platform == "linux", "reads the memory of the process")
class Exl3SoakTest(unittest.TestCase):
    """Products of changing shapes from eight threads: the same bytes as alone, and no more memory in the end."""

    def soak(self, calls):
        torch.manual_seed(0)
        cases = []
        for index, (into, out, bits, codebook) in enumerate(
            ((200, 300, 4, "mul1"), (512, 128, 2, "3inst"), (130, 640, 6, "mcg"))
        ):
            tensors, _ = random_linear(out, into, bits, codebook, torch.randn(out), seed=index)
            layer = Exl3Linear(into, out, tensors)
            for rows, dtype in itertools.product((0, 1, 2, 7, 16, 49, 70), DTYPES):
                x = torch.randn(rows, into).to(getattr(torch, dtype))
                cases.append((layer, x, layer(x)))
        wrong, memory = [], []

        def work(seed):
            rng = random.Random(seed)
            for call in range(calls // 8):
                layer, x, expected = rng.choice(cases)
                if not torch.equal(layer(x), expected):
                    wrong.append((layer, x.shape, x.dtype))
                if seed == 0 and call % (calls // 80) == 0:
                    memory.append(anonymous_memory())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertLess(
            max(memory[5:]) - max(memory[:5]), 16 << 20, memory
        )  # after the start, in which threads get their own

    def test_four_hundred_calls(self):
        self.soak(400)

    @slow
    def test_ten_thousand_calls(self):
        self.soak(10_000)


if __name__ == "__main__":
    unittest.main()
