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
"""The Triton kernels, compiled for GPUs that are not there: what the compiled code needs, and what its assembly computes."""

import re
import unittest

import numpy as np
import torch
from parameterized import parameterized

from transformers.integrations.exl3 import format, search
from transformers.testing_utils import slow

from .triton_cases import all_codes, require_compiler, triton


if triton:
    from transformers.integrations.exl3.kernels.triton import codes as triton_codes
    from transformers.integrations.exl3.kernels.triton import linear as triton_linear
    from transformers.integrations.exl3.kernels.triton import search as triton_search
    from transformers.integrations.exl3.kernels.triton.linear import choose_product

    from . import aot

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
MAX_INSTRUCTIONS = 6.5  # a weight, in the product of few rows
MAX_SEARCH_INSTRUCTIONS = 4.5  # a state and step, in the search at 4 bits
# Bytes that a thread of the search spills at a rate with costs of a dtype: there LLVM keeps to 64 registers on gfx1100.
UNAVOIDABLE_SPILLS = {("gfx1100", 2.5, torch.float32): 16}


class PtxEmulator:
    """Runs the few instructions of PTX that the kernels use, on arrays: PTX ISA 9, "Instruction Set"."""

    def __init__(self, text: str):
        lines = [line.strip().rstrip(";") for line in re.split(r"[;{}]", text)]
        self.instructions = [line for line in lines if line and not line.startswith(".reg")]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        self.registers = {f"${index}": value for index, value in enumerate(inputs, 1)}
        for instruction in self.instructions:
            name, operands = instruction.split(maxsplit=1)
            target, *sources = (operand.strip() for operand in operands.split(","))
            self.registers[target] = getattr(self, name.replace(".", "_"))(*(self._value(s) for s in sources))
        return self.registers["$0"]

    def _value(self, operand):
        return self.registers[operand] if operand in self.registers else np.uint32(int(operand, 0))

    def mov_b32(self, a):
        return a

    def mul_lo_u32(self, a, b):
        return ((a.astype(np.uint64) * np.uint64(b)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    def mad_lo_u32(self, a, b, c):
        return (self.mul_lo_u32(a, b).astype(np.uint64) + np.uint64(c)).astype(np.uint32)

    def dp4a_u32_u32(self, a, b, c):
        for byte in range(0, 32, 8):
            c = c + ((a >> np.uint32(byte)) & np.uint32(255)) * ((b >> np.uint32(byte)) & np.uint32(255))
        return c

    def lop3_b32(self, a, b, c, table):
        result = np.zeros_like(a)
        for row in range(8):
            if int(table) >> row & 1:
                terms = [value if row >> bit & 1 else ~value for value, bit in ((a, 2), (b, 1), (c, 0))]
                result |= terms[0] & terms[1] & terms[2]
        return result

    def prmt_b32(self, a, b, selector):
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        result = np.zeros_like(a)
        for place in range(4):
            chosen = int(selector) >> (4 * place) & 15
            assert chosen < 8, "sign replication is not used"
            result |= ((both >> np.uint64(8 * chosen)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * place)
        return result

    def fma_rz_f32(self, a, b, c):
        """Of numbers that are not negative, and exact in float64."""
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        rounded = exact.astype(np.float32)
        return np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)

    def add_rn_f16x2(self, a, b):
        return self._by_halves(lambda x, y: x + y, a, b)

    def fma_rn_f16x2(self, a, b, c):
        return self._by_halves(lambda x, y, z: x * y + z, a, b, c)

    @staticmethod
    def _by_halves(function, *registers):
        """Of float16 numbers, exact in float64 and then rounded once."""
        halves = np.stack(np.broadcast_arrays(*registers)).astype(np.uint32).view(np.float16)
        return function(*halves.astype(np.float64)).astype(np.float16).view(np.uint32)


@require_compiler
class Exl3TritonCompilerTest(unittest.TestCase):
    @parameterized.expand([(codebook,) for codebook in format.CODEBOOKS])
    def test_assembly_computes_the_codebook(self, codebook):
        """Every state, in both halves of the register."""
        emulate = PtxEmulator(getattr(triton_codes, f"_PTX_{codebook.upper()}").value)
        states = np.arange(format.NUM_STATES, dtype=np.uint32)
        expected = format.codebook_values(codebook).numpy()
        pairs = emulate(states, states[::-1].copy()).view(np.float16).reshape(-1, 2)
        self.assertTrue((pairs[:, 0] == expected).all() and (pairs[:, 1] == expected[::-1]).all())

    @parameterized.expand([(4,), (6,)])
    def test_assembly_computes_integer_costs(self, bits):
        """Every difference of words, added to the least and the largest cost that is none of a saturated node's."""
        limit = search.saturated_cost(bits)
        difference = torch.arange(1 << 16, dtype=torch.int32)
        words = triton_search._as_numbers(torch.arange(-(1 << 15), 1 << 15).short(), 2.0**15 if bits <= 4 else 2.0**23)
        for weight in (words[0], words[-1]):
            for cost in (0, 1, limit - 1):
                before = np.full(1 << 16, 0x4B000000 + cost, np.uint32).view(np.float32)
                emulate = PtxEmulator(triton_search._PTX_COST.value)
                extended = emulate((words - weight).numpy(), before).view(np.uint32).astype(np.int64) - 0x4B000000
                away = difference if weight == words[0] else difference.flip(0)
                metric = search._squared_differences(away.clamp(max=32767).short(), torch.zeros(()).short(), limit)
                expected = (metric + cost).clamp(max=limit)
                self.assertTrue((np.minimum(extended, limit) == expected.numpy()).all())

    @parameterized.expand([(arch,) for arch in ARCHITECTURES])
    def test_search_compiles_without_spills(self, arch):
        for bits, dtype in ((4, torch.int16), (8, torch.int16), (3.5, torch.float32)):
            if bits == 4 or arch in ("sm_90", "gfx942"):
                self._check_search(arch, bits, dtype)

    @parameterized.expand([(arch,) for arch in ARCHITECTURES + ("sm_86", "sm_89", "sm_120")])
    @slow
    def test_every_search_compiles_without_spills(self, arch):
        for bits in format.BITS:
            for dtype in (torch.int16, torch.float32):
                self._check_search(arch, bits, dtype)

    @parameterized.expand([("sm_80",), ("sm_90",), ("sm_100",)])
    def test_instructions_a_state_of_the_search(self, arch):
        launch = aot.search_launch(arch, 4, torch.int16)
        self.assertLess(aot.search_instructions(launch, aot.compiled(launch, arch))[1], MAX_SEARCH_INSTRUCTIONS)

    @parameterized.expand([(arch,) for arch in ARCHITECTURES])
    def test_kernels_compile_without_spills(self, arch):
        for rows, bits, dtype in ((1, 4, torch.bfloat16), (16, 2.5, torch.float16), (128, 3, torch.float32)):
            for launch in self._launches(arch, rows, bits, "mul1", dtype):
                self._check(launch, arch)

    @parameterized.expand([(arch,) for arch in ARCHITECTURES])
    def test_products_of_experts_compile_without_spills(self, arch):
        for rows, bits in ((8, 4), (4096, 3.5)):
            for launch in self._expert_launches(arch, rows, bits, "mul1", torch.bfloat16):
                self._check(launch, arch)

    @parameterized.expand([(arch,) for arch in ARCHITECTURES + ("sm_86", "sm_89", "sm_120")])
    @slow
    def test_every_product_of_experts_compiles_without_spills(self, arch):
        for bits, codebook in all_codes():
            for rows in (8, 1000, 4096):
                for launch in self._expert_launches(arch, rows, bits, codebook, torch.bfloat16):
                    self._check(launch, arch)

    @parameterized.expand([(arch,) for arch in ARCHITECTURES + ("sm_86", "sm_89", "sm_120")])
    @slow
    def test_every_configuration_compiles_without_spills(self, arch):
        for bits, codebook in all_codes():
            for rows in (1, 2, 9, 17, 64, 128, 129):
                for launch in self._launches(arch, rows, bits, codebook, torch.bfloat16):
                    self._check(launch, arch)
        for dtype in (torch.float32, torch.float16):
            for rows in (1, 2, 5, 9, 17, 64, 128, 129):
                for launch in self._launches(arch, rows, 4, "mul1", dtype):
                    self._check(launch, arch)

    @parameterized.expand([("sm_80",), ("sm_90",), ("sm_100",)])
    def test_instructions_a_weight_of_the_product_of_one_row(self, arch):
        bits = (1, 2, 3.5, 4, 8) if arch == "sm_90" else (3.5,)  # of all rates, 3.5 needs most
        for rate in bits:
            self.assertLess(self._instructions(arch, rate), MAX_INSTRUCTIONS, f"K = {rate}")

    @parameterized.expand([(arch,) for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")])
    @slow
    def test_instructions_a_weight_for_all_rates(self, arch):
        for bits in format.BITS:
            self.assertLess(self._instructions(arch, bits), MAX_INSTRUCTIONS, f"K = {bits}")

    def test_the_choice_of_kernels(self):
        h100, a100, t4 = aot.target("sm_90"), aot.target("sm_80"), aot.Target("cuda", "sm_75", 40)
        self.assertEqual(
            [choose_product(rows, h100).operand_rows for rows in (1, 8, 9, 17, 33, 128)], [8, 8, 16, 32, 64, 64]
        )
        self.assertEqual(
            [choose_product(rows, a100).operand_rows for rows in (1, 8, 9, 17, 33, 128)], [8, 8, 16, 32, 32, 32]
        )
        for target in (h100, a100):
            self.assertIsNone(choose_product(129, target))
        self.assertIsNone(choose_product(1, t4))
        self.assertEqual([choose_product(rows, aot.target("gfx1100")).operand_rows for rows in (1, 64)], [16, 16])
        self.assertIsNone(choose_product(65, aot.target("gfx1100")))

    def test_large_tensors_have_wide_offsets(self):
        """A trellis of 2^32 words, whose tiles' addresses need 64 bits, and a product with them."""
        launch = self._launches("sm_90", 1, 8, "mul1", torch.float16, features=(65536, 262144))[-1]
        self.assertGreater(launch.arguments["trellis"].numel(), (1 << 32) - 1)
        text = aot.compiled(launch, "sm_90").asm["ttir"]
        self.assertIn("i64", re.search(r"tt\.addptr %trellis[^\n]*", text)[0])

    def _launches(self, arch, rows, bits, codebook, dtype, features=(4096, 14336)):
        def empty(*shape, dtype=torch.float16):
            return torch.empty(shape, dtype=dtype, device="meta")

        inputs, outputs = features
        trellis = empty(inputs // 16, outputs // 16, int(16 * bits), dtype=torch.int16)
        return aot.launches(
            lambda: triton_linear.linear(
                empty(rows, inputs, dtype=dtype),
                trellis,
                empty(inputs),
                empty(outputs),
                empty(outputs),
                codebook,
                outputs,
                aot.target(arch),
            )
        )

    def _expert_launches(self, arch, rows, bits, codebook, dtype):
        def empty(*shape, dtype=torch.float16):
            return torch.empty(shape, dtype=dtype, device="meta")

        experts, inputs, outputs = 128, 2048, 768
        trellis = empty(experts, inputs // 16, outputs // 16, int(16 * bits), dtype=torch.int16)
        ranges = empty(experts, 2, dtype=torch.int32)
        tensors = (trellis, empty(experts, inputs), empty(experts, outputs), empty(experts, outputs))
        x, y = empty(rows, inputs, dtype=dtype), empty(rows, outputs, dtype=dtype)
        return aot.launches(lambda: triton_linear.grouped_linear(x, ranges, *tensors, codebook, y, aot.target(arch)))

    def _check(self, launch, arch, spills=0):
        kernel = aot.compiled(launch, arch)
        what = f"{launch.kernel.__name__} for {arch}, {launch.arguments}"
        self.assertLessEqual(kernel.spilled, spills, what)
        self.assertLessEqual(kernel.shared, aot.SHARED_LIMITS[arch], what)
        # The hint in `word_offsets` that words are contiguous is to lay out lanes, not to load vectors.
        if "trellis" in launch.arguments:
            self.assertEqual(kernel.weight_loads(), {"[1, 1, 1]"}, what)
        return kernel

    def _check_search(self, arch, bits, dtype):
        launch = aot.search_launch(arch, bits, dtype)
        kernel = self._check(launch, arch, UNAVOIDABLE_SPILLS.get((arch, bits, dtype), 0))
        if arch.startswith("sm_") and dtype is torch.int16:
            programs = triton_search.choose_search(bits, 1, aot.target(arch)).programs
            registers = kernel.registers * launch.arguments["THREADS"] * programs
            self.assertLessEqual(registers, 1 << 16, f"K = {bits}")

    def _instructions(self, arch, bits):
        """Instructions a weight in the main loop of the product of one row, whose turns are blocks of 128 x 128."""
        kernel = aot.compiled(self._launches(arch, 1, bits, "mul1", torch.float16)[-1], arch)
        return kernel.loop().total() * 32 * kernel.warps / 128**2
