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
The Triton kernels, in three ways: run by Triton's interpreter on the CPU and compared with the reference (in a process of
its own, since the interpreter is chosen when Triton is imported), compiled for GPUs that are not there, and run on a GPU.

The interpreter cuts float32 off where it converts to bfloat16, GPUs round: what it computes in bfloat16 is allowed twice the error.
"""

import os
import re
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
import torch
from parameterized import parameterized

from transformers.integrations.exl3 import format, ops
from transformers.integrations.exl3.hadamard import hadamard
from transformers.integrations.exl3.kernels import gpu
from transformers.testing_utils import require_torch, require_torch_accelerator, slow, torch_device


try:
    import triton

    from transformers.integrations.exl3.kernels import triton_codes, triton_hadamard, triton_linear
    from transformers.integrations.exl3.kernels.triton_linear import Options, choose

    from . import aot
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
# Largest error of a product over the norm of the exact one: FORMAT.md 2.7, bfloat16 as measured and rounded up.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
MAX_INSTRUCTIONS = 6.5  # a weight, in the product of few rows

require_triton = unittest.skipUnless(triton, "needs Triton")
require_interpreter = unittest.skipUnless(triton and INTERPRETED, "needs Triton's interpreter, TRITON_INTERPRET=1")
require_compiler = unittest.skipIf(triton is None or INTERPRETED, "needs Triton's compiler")


def all_codes():
    return [(bits, codebook) for bits in format.BITS for codebook in format.CODEBOOKS]


def random_trellis(rows, columns, bits, seed=0):
    """A trellis of `rows` x `columns` tiles with random codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, (rows, columns, int(16 * bits)), generator=generator).to(torch.int16)


class Layer:
    """A random quantized layer and what it computes, in float64."""

    def __init__(self, in_features, out_features, bits=4, codebook="mul1", bias=False, device="cpu"):
        generator = torch.Generator().manual_seed(1)
        rows, columns = format.padded(in_features), format.padded(out_features)
        self.in_features, self.out_features, self.codebook = in_features, out_features, codebook
        self.trellis = random_trellis(rows // 16, columns // 16, bits).to(device)
        self.suh = torch.randn(rows, generator=generator).half().to(device)
        self.svh = torch.randn(columns, generator=generator).half().to(device)
        self.bias = torch.randn(columns, generator=generator).half().to(device) if bias else None

    def inputs(self, rows, dtype=torch.float32):
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.in_features, generator=generator).to(self.trellis.device, dtype)

    def linear(self, x):
        return gpu.linear(x, self.trellis, self.suh, self.svh, self.bias, self.codebook, self.out_features)

    def exact(self, x):
        x = torch.nn.functional.pad(x.double(), (0, self.suh.shape[0] - self.in_features)) * self.suh.double()
        y = hadamard(hadamard(x) @ format.decode(self.trellis, self.codebook).double()) * self.svh.double()
        y = y if self.bias is None else y + self.bias.double()
        return y[..., : self.out_features]


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@require_triton
class Exl3TritonProcessTest(unittest.TestCase):
    @unittest.skipIf(INTERPRETED, "this is that process")
    def test_kernels_under_the_interpreter(self):
        """Runs `Exl3TritonInterpreterTest` in a process where Triton interprets."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "InterpreterTest"]
        run = subprocess.run(
            command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        self.assertEqual(run.returncode, 0, run.stdout[-8000:] + run.stderr[-4000:])
        self.assertRegex(run.stdout, r"\d\d passed")
        self.assertNotIn("skipped", run.stdout)


@require_interpreter
class Exl3TritonInterpreterTest(unittest.TestCase):
    @parameterized.expand(all_codes())
    def test_decode_is_the_reference_to_the_byte(self, bits, codebook):
        trellis = random_trellis(8, 16, bits)
        expected = format.decode(trellis, codebook)
        self.assertTrue(torch.equal(gpu.decode(trellis, codebook, torch.float16), expected))
        # Tiles in the other order in memory, as a slice of more columns
        stored = trellis.transpose(0, 1).contiguous().transpose(0, 1)
        self.assertFalse(stored.is_contiguous())
        found = gpu.decode(stored[:, 8:], codebook, torch.float32)
        self.assertTrue(torch.equal(found, expected[:, 128:].float()))

    @parameterized.expand(all_codes())
    def test_product_of_one_row(self, bits, codebook):
        layer = Layer(256, 128, bits, codebook)
        x = layer.inputs(1)
        self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.float32])

    @parameterized.expand(
        [(rows, dtype) for rows in (1, 2, 7, 8, 9, 17, 33) for dtype in TOLERANCE] + [(130, torch.bfloat16)],
        name_func=lambda f, _, p: f"{f.__name__}_{p[0][0]}_{str(p[0][1])[6:]}",
    )
    def test_product_of_rows_with_padding(self, rows, dtype):
        layer = Layer(200, 100, 3, bias=True)
        x = layer.inputs(rows, dtype)
        y = layer.linear(x)
        self.assertEqual((y.shape, y.dtype), ((rows, 100), dtype))
        self.assertLess(relative_error(y, layer.exact(x)), TOLERANCE[dtype])

    @parameterized.expand([(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
    def test_product_after_decoding_in_strips(self, dtype, tolerance):
        layer = Layer(200, 300, 3.5, "mcg", bias=True)
        x = layer.inputs(6, dtype)
        with (
            mock.patch.object(triton_linear, "choose", lambda *_: None),
            mock.patch.object(triton_linear, "DENSE_ELEMENTS", 256 * 128),
        ):
            y = layer.linear(x)
        self.assertLess(relative_error(y, layer.exact(x)), tolerance)

    @parameterized.expand(
        [
            (rows, order, dtype)
            for rows in (8, 16, 32, 64)
            for order, dtype in (("pairs", torch.float16), ("fours", torch.float32), ("natural", torch.bfloat16))
        ],
        name_func=lambda f, _, p: f"{f.__name__}_{p[0][0]}_{p[0][1]}",
    )
    def test_every_way_to_compile_the_product(self, operand_rows, order, dtype):
        layer = Layer(256, 128, 2.5, bias=True)
        for rows in (1, operand_rows + 1):
            x = layer.inputs(rows, dtype)
            with mock.patch.object(triton_linear, "choose", lambda *_: Options(operand_rows, 4, order)):
                self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[dtype])

    @parameterized.expand([(1,), (2,), (3,), (5,), (64,)])
    def test_any_split_of_the_input(self, programs):
        layer = Layer(640, 256, 4)
        x = layer.inputs(3)
        with mock.patch.object(triton_linear, "PROGRAMS_PER_PROCESSOR", programs):
            self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.float32])

    def test_tiles_in_either_order_in_memory_give_the_same_product(self):
        layer = Layer(256, 256, 3)
        x = layer.inputs(2)
        expected = layer.linear(x)
        layer.trellis = layer.trellis.transpose(0, 1).contiguous().transpose(0, 1)
        self.assertTrue(torch.equal(layer.linear(x), expected))

    @parameterized.expand([(1e30,), (1e-30,)])
    def test_activations_beyond_float16(self, factor):
        layer = Layer(256, 128, 4)
        for rows in (1, 130):
            x = layer.inputs(rows, torch.bfloat16) * factor
            self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.bfloat16])
            self.assertTrue((layer.linear(x * 0) == 0).all())

    def test_blocks_of_unlike_magnitude(self):
        layer = Layer(512, 128, 4)
        x = layer.inputs(1)
        x[:, 128:] *= 1e-20
        self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.float32])
        x[:, :128] = 0
        self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.float32])

    def test_what_is_not_finite_stays_in_its_row(self):
        layer = Layer(256, 128, 4)
        for rows in (3, 130):
            x = layer.inputs(rows, torch.float16)
            expected = layer.linear(x)
            x[1, 5], x[2, 200] = float("nan"), float("inf")
            y = layer.linear(x)
            self.assertTrue(y[1:3].isnan().all())
            self.assertTrue(torch.equal(y[0], expected[0]) and torch.equal(y[3:], expected[3:]))

    @parameterized.expand([("natural",), ("pairs",), ("fours",)])
    def test_operands_stand_for_the_rotated_activations(self, order):
        rows = torch.tensor([triton_codes.band_row.fn(position, order) for position in range(64)])
        x, suh = Layer(256, 128).inputs(3), torch.rand(256) + 0.5
        exact = hadamard(x.double() * suh.double()).unflatten(1, (-1, 64))[..., rows].flatten(1)
        for by_block in (True, False):
            operand, scales = triton_hadamard.rotate_input(x, suh, by_block=by_block, terms=2, order=order)
            self.assertLess(operand.abs().max().item(), 1)
            values = operand.double() * scales.double().repeat_interleave(256 // scales.shape[1], 1)
            self.assertLess(relative_error(values[::2], exact), 1e-3)
            self.assertLess(relative_error(values[::2] + values[1::2], exact), 1e-6)

    def test_rotation_of_outputs(self):
        inner, svh, bias = torch.randn(5, 256), torch.randn(256).half(), torch.randn(200).half()
        scales = torch.rand(5) + 1
        exact = hadamard(inner.double() * scales.double()[:, None]) * svh.double()
        y = torch.full((5, 300), 7.0)
        triton_hadamard.rotate_output(inner, svh, y[:, 50:250], scales=scales, bias=bias)
        self.assertLess(relative_error(y[:, 50:250], exact[:, :200] + bias.double()), 1e-6)
        self.assertTrue((y[:, :50] == 7).all() and (y[:, 250:] == 7).all())
        y = torch.empty(5, 256)
        triton_hadamard.rotate_output(inner.T.contiguous().T, svh, y)
        self.assertTrue(torch.equal(y, hadamard(inner) * svh.float()))

    def test_operators(self):
        """`exl3::linear` with its gradients and `exl3::dequantize`, on the kernels."""
        layer = Layer(200, 100, 3, bias=True)
        layer.bias.requires_grad_(True)
        x = layer.inputs(3).requires_grad_(True)
        arguments = (layer.trellis, layer.suh, layer.svh)

        def run():
            y = ops.linear(x, *arguments, layer.bias, "mul1", 100)
            return [y, *torch.autograd.grad(y.square().sum(), (x, layer.bias)), ops.dequantize(*arguments, "mul1")]

        expected = run()
        with (
            mock.patch.object(gpu, "is_available", lambda device: True),
            mock.patch.object(ops, "STRIP_ELEMENTS", 1),
            mock.patch.object(format, "decode", side_effect=AssertionError("the reference was used")),
        ):
            found = run()
        for ours, reference in zip(found, expected):
            self.assertLess(relative_error(ours, reference.double()), 1e-6)

    def test_no_rows_and_more_dimensions(self):
        layer = Layer(200, 100, 3)
        self.assertEqual(layer.linear(layer.inputs(0)).shape, (0, 100))
        x = layer.inputs(6)
        self.assertTrue(torch.equal(layer.linear(x.view(2, 3, 200)), layer.linear(x).view(2, 3, 100)))
        strided = x.T.contiguous().T
        self.assertTrue(torch.equal(layer.linear(strided), layer.linear(x)))

    def test_the_check_before_the_first_use(self):
        gpu.check(torch.device("cpu"))
        for name, message in (("decode", "decode wrongly"), ("linear", "multiply wrongly")):
            kernel = getattr(gpu, name)
            with mock.patch.object(gpu, name, lambda *args, kernel=kernel: kernel(*args) + 1):
                with self.assertRaisesRegex(RuntimeError, message):
                    gpu.check(torch.device("cpu"))

    def test_bad_input_is_refused(self):
        layer = Layer(256, 128, 4)
        with self.assertRaisesRegex(ValueError, "must be float32, float16, bfloat16, not float64"):
            layer.linear(layer.inputs(1).double())
        with self.assertRaisesRegex(ValueError, "must be float32, float16, bfloat16, not int8"):
            gpu.decode(layer.trellis, "mul1", torch.int8)
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook 'mul2'"):
            gpu.decode(layer.trellis, "mul2", torch.float16)
        for trellis, message in (
            (layer.trellis.int(), "int16"),
            (layer.trellis[:4], "whole blocks"),
            (layer.trellis[:, :4], "whole blocks"),
            (layer.trellis[..., :60], "no rate of 3.75 bits"),
            (layer.trellis.repeat_interleave(2, -1)[..., ::2], "one after the other"),
            (torch.zeros(8 * 8 * 64 + 1, dtype=torch.int16)[1:].view(8, 8, 64), "multiples of 4"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                gpu.decode(trellis, "mul1", torch.float16)
        layer.svh = layer.svh.to("meta")
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            layer.linear(layer.inputs(1))


class PtxEmulator:
    """Runs the few instructions of PTX that the codebooks use, on arrays: PTX ISA 9, "Instruction Set"."""

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

    @parameterized.expand([(arch,) for arch in ARCHITECTURES])
    def test_kernels_compile_without_spills(self, arch):
        for rows, bits, dtype in ((1, 4, torch.bfloat16), (16, 2.5, torch.float16), (128, 3, torch.float32)):
            for launch in self._launches(arch, rows, bits, "mul1", dtype):
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
        self.assertEqual([choose(rows, h100).operand_rows for rows in (1, 8, 9, 17, 33, 128)], [8, 8, 16, 32, 64, 64])
        self.assertEqual([choose(rows, a100).operand_rows for rows in (1, 8, 9, 17, 33, 128)], [8, 8, 16, 32, 32, 32])
        for target in (h100, a100):
            self.assertIsNone(choose(129, target))
        self.assertIsNone(choose(1, t4))
        self.assertEqual([choose(rows, aot.target("gfx1100")).operand_rows for rows in (1, 64)], [16, 16])
        self.assertIsNone(choose(65, aot.target("gfx1100")))

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

    def _check(self, launch, arch):
        kernel = aot.compiled(launch, arch)
        what = f"{launch.kernel.__name__} for {arch}, {launch.arguments}"
        self.assertEqual(kernel.spilled, 0, what)
        self.assertLessEqual(kernel.shared, aot.SHARED_LIMITS[arch], what)
        # The hint in `word_offsets` that words are contiguous is to lay out lanes, not to load vectors.
        if "trellis" in launch.arguments:
            self.assertEqual(kernel.weight_loads(), {"[1, 1, 1]"}, what)

    def _instructions(self, arch, bits):
        """Instructions a weight in the main loop of the product of one row, whose turns are blocks of 128 x 128."""
        kernel = aot.compiled(self._launches(arch, 1, bits, "mul1", torch.float16)[-1], arch)
        return kernel.loop().total() * 32 * kernel.warps / 128**2


@require_torch
class Exl3TritonFallbackTest(unittest.TestCase):
    """What happens on a GPU where Triton is missing or broken; no GPU is needed for that."""

    def setUp(self):
        device = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
        device.start()
        self.addCleanup(device.stop)
        self._forget()
        self.addCleanup(self._forget)

    @staticmethod
    def _forget():
        for function in (gpu._imports, gpu._works, gpu._warn):
            function.cache_clear()

    def test_missing_triton_is_told_once(self):
        missing = {name: None for name in list(sys.modules) if name.startswith("triton.")} | {"triton": None}
        ours = {name for name in sys.modules if ".exl3.kernels.triton_" in name}
        kept = {name: sys.modules.pop(name) for name in ours}
        package = sys.modules["transformers.integrations.exl3.kernels"]
        attributes = {name.rpartition(".")[2]: module for name, module in kept.items()}
        for name in attributes:
            delattr(package, name)
        try:
            with (
                mock.patch.dict(sys.modules, missing),
                self.assertLogs("transformers.integrations.exl3.kernels.gpu", "WARNING") as logs,
            ):
                self.assertFalse(gpu.is_available(torch.device("cuda:0")))
                self.assertFalse(gpu.is_available(torch.device("cuda:1")))
        finally:
            sys.modules.update(kept)
            for name, module in attributes.items():
                setattr(package, name, module)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("Triton cannot be imported", logs.output[0])
        self.assertIn("pip install triton", logs.output[0])

    @require_triton
    def test_broken_triton_is_told_once(self):
        broken = mock.patch.object(gpu, "check", side_effect=RuntimeError("no C compiler"))
        with broken, self.assertLogs("transformers.integrations.exl3.kernels.gpu", "WARNING") as logs:
            self.assertFalse(gpu.is_available(torch.device("cuda:0")))
            self.assertFalse(gpu.is_available(torch.device("cuda:1")))
        self.assertEqual(len(logs.output), 1)
        self.assertIn("RuntimeError: no C compiler", logs.output[0])

    @require_triton
    def test_working_triton_is_checked_once_for_each_device(self):
        with mock.patch.object(gpu, "check") as check:
            for device in ("cuda:0", "cuda:1", "cuda:0", "xpu:0"):
                self.assertTrue(gpu.is_available(torch.device(device)))
        self.assertEqual([str(call.args[0]) for call in check.call_args_list], ["cuda:0", "cuda:1", "xpu:0"])

    @require_triton
    def test_no_check_while_a_graph_is_captured(self):
        capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
        with mock.patch.object(gpu, "check") as check, capturing:
            self.assertTrue(gpu.is_available(torch.device("cuda:0")))
        check.assert_not_called()

    def test_other_devices_have_the_reference(self):
        for device in ("cpu", "meta", "mps"):
            self.assertFalse(gpu.is_available(torch.device(device)))


@require_compiler
@require_torch_accelerator
@unittest.skipUnless(torch.device(torch_device or "cpu").type in gpu.DEVICE_TYPES, "no device that Triton is for")
class Exl3TritonGpuTest(unittest.TestCase):
    """The kernels where they belong. Nobody has run these yet."""

    def setUp(self):
        self.module = torch.get_device_module(torch_device)

    @parameterized.expand(all_codes())
    def test_decode_is_the_reference_to_the_byte(self, bits, codebook):
        trellis = random_trellis(64, 40, bits).to(torch_device)
        for dtype in gpu.DTYPES:
            expected = format.decode(trellis, codebook).to(dtype)
            self.assertTrue(torch.equal(gpu.decode(trellis, codebook, dtype), expected))
            stored = trellis.transpose(0, 1).contiguous().transpose(0, 1)
            self.assertTrue(torch.equal(gpu.decode(stored[:, 8:], codebook, dtype), expected[:, 128:]))

    @parameterized.expand(all_codes())
    def test_product(self, bits, codebook):
        for size in ((128, 128), (1000, 2500), (4096, 1024)):
            layer = Layer(*size, bits, codebook, bias=True, device=torch_device)
            for dtype, tolerance in TOLERANCE.items():
                for rows in (1, 2, 8, 9, 16, 17, 64, 65, 128, 129, 300):
                    with self.subTest(size=size, dtype=dtype, rows=rows):
                        x = layer.inputs(rows, dtype)
                        # Many rows of float32 are PyTorch's to multiply, perhaps in TF32
                        many = rows > 64 and dtype is torch.float32
                        self.assertLess(relative_error(layer.linear(x), layer.exact(x)), 1e-3 if many else tolerance)

    def test_the_reference_is_not_what_runs(self):
        layer = Layer(512, 256, device=torch_device)
        self.assertTrue(gpu.is_available(layer.trellis.device))
        with mock.patch.object(format, "decode", side_effect=AssertionError("the reference was used")):
            ops.linear(layer.inputs(1), layer.trellis, layer.suh, layer.svh, None, "mul1", 256)
            ops.dequantize(layer.trellis, layer.suh, layer.svh, "mul1")

    def test_dequantized_weight(self):
        layer = Layer(1024, 512, 4, device=torch_device)
        weight = ops.dequantize(layer.trellis, layer.suh, layer.svh, "mul1")
        inner = format.decode(layer.trellis, "mul1").double()
        exact = hadamard(hadamard(inner).T) * layer.suh.double() * layer.svh.double()[:, None]
        self.assertLess((weight - exact).abs().max().item(), 1e-6 * exact.abs().max().item())

    def test_the_same_bytes_every_time(self):
        """Also with 64 products under way at once, whose parts arrive in any order."""
        layer = Layer(8192, 512, 4, device=torch_device)
        for rows in (1, 16, 100):
            x = layer.inputs(rows, torch.float16)
            results = [layer.linear(x) for _ in range(64)]
            self.assertTrue(all(torch.equal(result, results[0]) for result in results))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA graphs")
    def test_capture_in_a_graph(self):
        layer = Layer(4096, 1024, 4, bias=True, device=torch_device)
        for rows in (1, 16, 100, 300):
            x = layer.inputs(rows, torch.bfloat16)
            arguments = (layer.trellis, layer.suh, layer.svh, layer.bias, "mul1", 1024)
            expected = ops.linear(x, *arguments)
            graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
            with torch.cuda.graph(graph):
                y = ops.linear(static, *arguments)
            for _ in range(3):
                static.copy_(x)
                graph.replay()
                self.assertTrue(torch.equal(y, expected))
                static.zero_()

    def test_several_streams(self):
        layers = [Layer(4096, 1024, bits, device=torch_device) for bits in (2, 3, 4, 5)]
        x = layers[0].inputs(1, torch.float16)
        expected = [layer.linear(x) for layer in layers]
        self.module.synchronize()
        streams = [self.module.Stream() for _ in layers]
        for _ in range(20):
            found = []
            for layer, stream in zip(layers, streams):
                with self.module.stream(stream):
                    found.append(layer.linear(x))
            self.module.synchronize()
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(found, expected)))

    def test_several_devices(self):
        if self.module.device_count() < 2:
            self.skipTest("needs two devices")
        kind = torch.device(torch_device).type
        results = []
        for index in (1, 0):  # the current device is 0
            layer = Layer(4096, 1024, 4, device=f"{kind}:{index}")
            results.append(layer.linear(layer.inputs(1)).cpu())
        self.assertTrue(torch.equal(*results))

    @unittest.skipUnless(torch.cuda.is_available(), "needs the allocator's statistics")
    def test_memory(self):
        """A product needs no memory of the size of a dense weight."""
        layer = Layer(8192, 16384, 4, device=torch_device)
        for rows, limit in ((1, 8 << 20), (2048, 4 * 2048 * 16384 * 2)):
            x = layer.inputs(rows, torch.float16)
            layer.linear(x)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer.linear(x)
            self.assertLess(torch.cuda.max_memory_allocated() - before, limit)

    @slow
    def test_trellis_beyond_32_bit_offsets(self):
        """2^31 words: the last block of rows and columns, by itself and as part of the whole."""
        trellis = random_trellis(2048, 8, 8).to(torch_device).repeat(1, 2048, 1)
        trellis[-8:, -8:] = random_trellis(8, 8, 8, seed=1).to(torch_device)
        expected = format.decode(trellis[-8:, -8:].contiguous(), "mul1")
        self.assertTrue(torch.equal(gpu.decode(trellis, "mul1", torch.float16)[-128:, -128:], expected))
        suh, svh = (torch.ones(n * 16, device=torch_device) for n in trellis.shape[:2])
        x = torch.zeros(1, suh.shape[0], device=torch_device)
        x[:, -128:] = 1
        y = gpu.linear(x, trellis, suh, svh, None, "mul1", svh.shape[0])[:, -128:]
        exact = hadamard(hadamard(x[:, -128:].double()) @ expected.double())
        self.assertLess(relative_error(y, exact), TOLERANCE[torch.float32])

    def test_compiled_model_code(self):
        layer = Layer(512, 256, device=torch_device)

        @torch.compile(fullgraph=True)
        def run(x):
            return ops.linear(x * 2, layer.trellis, layer.suh, layer.svh, None, "mul1", 256) + 1

        x = layer.inputs(1)
        self.assertLess(relative_error(run(x), layer.exact(x * 2) + 1), 1e-5)

    @parameterized.expand([(bits,) for bits in (2, 3, 4, 6)])
    def test_against_exllamav3(self, bits):
        """A second oracle: the kernels that the format comes from, which round activations to float16 in between."""
        try:
            from exllamav3.modules.quant.exl3 import LinearEXL3
        except ImportError:
            self.skipTest("needs exllamav3")
        layer = Layer(1024, 512, bits, device=torch_device)
        other = LinearEXL3(
            None,
            1024,
            512,
            suh=layer.suh,
            svh=layer.svh,
            trellis=layer.trellis,
            mul1=format.marker("mul1").to(torch_device),
            out_dtype=torch.float16,
        )
        x = layer.inputs(1, torch.float16)
        self.assertLess(relative_error(layer.linear(x), other.forward(x, {}).double()), 2e-3)
