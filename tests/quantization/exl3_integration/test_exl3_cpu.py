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
"""The compiled CPU kernels against the reference in plain torch, on every instruction set that this machine has."""

import ctypes
import itertools
import mmap
import os
import sys
import threading
import unittest
from unittest.mock import patch

from parameterized import parameterized

from transformers.testing_utils import require_torch
from transformers.utils import is_torch_available


if is_torch_available():
    import torch

    from transformers.integrations.exl3 import format, grouped, ops
    from transformers.integrations.exl3.format import hadamard
    from transformers.integrations.exl3.kernels import cpu
    from transformers.integrations.exl3.kernels.cpu import reference

    from .processes import in_a_process
    from .synthetic import random_linear


VECTORS = ("avx512vnni", "avx512", "avx2", "base")  # with kernels of their own
# Those with products of one and two rows of their own, too, and of many rows.
ISAS = (*VECTORS, "avx512vlvnni", "avxvnni", "i8mm", "dotprod", "amx")
RATES = [
    (isa, bits, codebook)
    for isa in ISAS
    for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
    for codebook in ("3inst", "mcg", "mul1")
    if codebook == "mul1" or bits == int(bits)
]
DTYPES = ("float32", "float16", "bfloat16")
# Relative RMS errors: of fp32 sums, and of what 16-bit inputs and results are rounded to.
TOLERANCES = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 2.5e-3}


BYTE_INPUTS = 8e-3  # the same, of inputs of 8 bits
MATRICES = 3.5e-3  # of inputs and weights that are rounded to bfloat16


def goes_by_matrices(rows, dtype):
    return cpu.kernels().isa() == "amx" and rows >= reference.MATRIX_ROWS and dtype == "bfloat16"


def tolerance(rows, dtype, bits, codebook):
    if goes_by_matrices(rows, dtype):
        return MATRICES
    is_byte = rows <= 2 and dtype != "float32" and codebook == "mul1" and bits <= 4
    return BYTE_INPUTS if is_byte else TOLERANCES[dtype]


def rms_error(result, expected):
    result, expected = result.double(), expected.double()
    return ((result - expected).square().mean() / expected.square().mean()).sqrt().item()


@require_torch
class KernelTest(unittest.TestCase):
    def setUp(self):
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.manual_seed(0)

    def force(self, isa):
        """Compute on one instruction set until the end of the test, which is skipped where the machine lacks it."""
        forced = patch.dict(os.environ, EXL3_CPU_ISA=isa)
        forced.start()
        self.addCleanup(forced.stop)
        try:
            self.assertEqual(cpu.kernels().isa(), isa)
        except ValueError:
            self.skipTest(f"this machine has no {isa}")

    def layer(self, in_features=256, out_features=384, bits=4, codebook="mul1", bias=True):
        """Arguments of a product with a quantized weight after `x`, and the weight `[out_features, in_features]`."""
        values = torch.randn(out_features) if bias else None
        tensors, weight = random_linear(out_features, in_features, bits, codebook, values)
        arguments = (tensors["trellis"], tensors["suh"], tensors["svh"], tensors.get("bias"), codebook)
        return arguments, weight

    def multiply(self, x, arguments, out_features):
        y = torch.full((x.shape[0], out_features), float("nan"), dtype=x.dtype)
        cpu.kernels().linear([(x, *arguments)], [y])
        return y


class Exl3LinearKernelTest(KernelTest):
    @parameterized.expand(RATES)
    def test_product(self, isa, bits, codebook):
        self.force(isa)
        arguments, weight = self.layer(249, 381, bits, codebook)
        bias = arguments[3][:381].float()
        for rows, dtype in itertools.product((1, 3), DTYPES):
            x = torch.randn(rows, 249).to(getattr(torch, dtype))
            y = self.multiply(x, arguments, 381)
            self.assertLess(
                rms_error(y, x.float() @ weight.T + bias), tolerance(rows, dtype, bits, codebook), (rows, dtype)
            )

    @parameterized.expand(DTYPES)
    def test_every_instruction_set_and_number_of_threads_gives_the_same_bytes(self, dtype):
        for rows, codebook in ((19, "mcg"), (1, "mul1"), (2, "mul1")):
            self._check_bytes(torch.randn(rows, 640).to(getattr(torch, dtype)), dtype, codebook)

    def _check_bytes(self, x, dtype, codebook):
        arguments, _ = self.layer(640, 896, 3, codebook)
        results = [] if goes_by_matrices(len(x), dtype) else [self.multiply(x, arguments, 896)]
        for isa, threads in itertools.product(ISAS, (1, 2, 3)):
            with patch.dict(os.environ, EXL3_CPU_ISA=isa):
                try:
                    if goes_by_matrices(len(x), dtype):
                        continue
                except ValueError:
                    continue
                torch.set_num_threads(threads)
                results.append(self.multiply(x, arguments, 896))
        self.assertGreater(len(results), 3)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)

    @parameterized.expand(itertools.product((1, 2, 3, 15, 16, 17, 40), DTYPES, ("mcg", "mul1")))
    def test_every_number_of_rows(self, rows, dtype, codebook):
        arguments, weight = self.layer(codebook=codebook, bias=False)
        x = torch.randn(rows, 256).to(getattr(torch, dtype))
        y = self.multiply(x, arguments, 384)
        self.assertLess(rms_error(y, x.float() @ weight.T), tolerance(rows, dtype, 4, codebook))
        # Each row gives the same bytes whichever others it is among, but for the few that are fused.
        alone = 1 if rows <= 2 or codebook == "mcg" or dtype == "float32" else 3
        if goes_by_matrices(rows, dtype):
            alone = reference.MATRIX_ROWS
        for row in range(rows - alone + 1):
            torch.testing.assert_close(
                self.multiply(x[row : row + alone], arguments, 384), y[row : row + alone], rtol=0, atol=0
            )

    @parameterized.expand(itertools.product(ISAS, (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)))
    def test_few_rows_are_the_reference_to_the_byte(self, isa, bits):
        self.force(isa)
        arguments, _ = self.layer(512, 384, bits)
        for rows, input_bits, dtype in itertools.product((1, 2), (8, 16), DTYPES[1:]):
            x = torch.randn(rows, 512).to(getattr(torch, dtype))
            expected = reference.linear(x, *arguments, input_bits)
            with patch.dict(os.environ, EXL3_CPU_INPUT_BITS=str(input_bits)):
                y = self.multiply(x, arguments, 384)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)

    @parameterized.expand(itertools.product(ISAS, format.CODEBOOKS))
    def test_more_rows_are_the_reference_to_the_byte(self, isa, codebook):
        self.force(isa)
        for bits, rows, dtype in ((4, 3, "float16"), (2, 14, "bfloat16"), (7, 25, "float16")):
            arguments, _ = self.layer(256, 384, bits, codebook)
            x = torch.randn(rows, 256).to(getattr(torch, dtype))
            x[0, :128], x[1, 128:] = 0, 1e3
            y = self.multiply(x, arguments, 384)
            torch.testing.assert_close(y, reference.linear(x, *arguments), rtol=0, atol=0)

    @parameterized.expand(itertools.product((1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), format.CODEBOOKS))
    def test_many_rows_are_those_of_rounded_matrices(self, bits, codebook):
        self.force("amx")
        arguments, _ = self.layer(640, 384, bits, codebook)
        for rows in (16, 40):
            x = torch.randn(rows, 640).bfloat16()
            y, expected = self.multiply(x, arguments, 384), reference.matrix_linear(x, *arguments)
            self.assertLess(rms_error(y, expected), 5e-4)  # of the last bits, where sums are rounded otherwise
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-8 * expected.float().std().item())

    @parameterized.expand([(128, 128), (256, 1152), (384, 4736), (128, 33024)])
    def test_many_rows_give_the_same_bytes_however_they_are_divided(self, in_features, out_features):
        """Single columns, one block or two at a time and parts of unequal size, chunks of rows, and several threads."""
        self.force("amx")
        arguments, _ = self.layer(in_features, out_features, 2)
        x = torch.randn(540, in_features).bfloat16()
        torch.set_num_threads(1)
        expected = self.multiply(x, arguments, out_features)
        self.assertTrue(expected.isfinite().all())
        for rows, threads in ((540, 2), (540, 3), (512, 7), (520, 1), (17, 2), (33, 3)):
            torch.set_num_threads(threads)
            torch.testing.assert_close(
                self.multiply(x[:rows], arguments, out_features), expected[:rows], rtol=0, atol=0
            )

    def test_many_rows_that_are_not_finite_are_alone(self):
        self.force("amx")
        arguments, _ = self.layer(bias=False)
        for value in (float("nan"), float("inf"), float("-inf")):
            x = torch.randn(18, 256).bfloat16()
            x[16, 200] = value
            y = self.multiply(x, arguments, 384)
            self.assertFalse(y[16].isfinite().any())
            self.assertTrue(y[:16].isfinite().all() and y[17].isfinite().all())

    @parameterized.expand(format.CODEBOOKS)
    def test_the_largest_sums_are_exact(self, codebook):
        (trellis, suh, svh, bias, _), _ = self.layer(128, 128, 8, codebook)
        for codes in (
            trellis,
            torch.zeros_like(trellis),
        ):  # all of mul1's codes are as far from their middle as can be there
            # Inputs as large as they can be, all of the sign of their codes.
            x = hadamard(format.decode(codes, codebook).float()[:, :3].T.sign() * 8).bfloat16()
            layer = (codes, torch.ones_like(suh), svh, bias, codebook)
            torch.testing.assert_close(self.multiply(x, layer, 128), reference.linear(x, *layer), rtol=0, atol=0)

    def test_bits_of_inputs_follow_the_rate(self):
        x = torch.randn(1, 256).bfloat16()
        for bits in format.BITS:
            arguments, _ = self.layer(bits=bits)
            expected = reference.linear(x, *arguments, 8 if bits <= 4 else 16)
            with self.subTest(bits=bits):
                torch.testing.assert_close(self.multiply(x, arguments, 384), expected, rtol=0, atol=0)

    def test_other_bits_of_inputs_are_an_error(self):
        arguments, _ = self.layer()
        for wanted in ("4", "08", "sixteen", "-1"):
            with patch.dict(os.environ, EXL3_CPU_INPUT_BITS=wanted):
                with self.assertRaisesRegex(RuntimeError, "EXL3_CPU_INPUT_BITS is neither 8 nor 16"):
                    self.multiply(torch.randn(1, 256), arguments, 384)

    @parameterized.expand(["float32", "float16", "bfloat16"])
    def test_every_dtype_of_scales(self, dtype):
        (trellis, suh, svh, bias, codebook), weight = self.layer()
        x = torch.randn(2, 256)
        scales = [tensor.to(getattr(torch, dtype)) for tensor in (suh, svh, bias)]
        expected = ops.dequantize(trellis, *scales[:2], codebook)
        y = self.multiply(x, (trellis, *scales, codebook), 384)
        self.assertLess(rms_error(y, x @ expected.T + scales[2].float()), 1e-6)

    def test_any_order_of_tiles(self):
        (trellis, *others), _ = self.layer()
        x = torch.randn(3, 256)
        orders = [
            trellis,
            trellis.transpose(0, 1).contiguous().transpose(0, 1),
            torch.cat((trellis, trellis), 1)[:, :24],
            torch.stack((trellis, trellis), 1)[:, 1],
            trellis.movedim(2, 0).contiguous().movedim(0, 2),
        ]
        for order in orders[1:]:
            torch.testing.assert_close(order, trellis, rtol=0, atol=0)
            torch.testing.assert_close(
                self.multiply(x, (order, *others), 384), self.multiply(x, (trellis, *others), 384), rtol=0, atol=0
            )

    def test_any_layout_of_rows(self):
        arguments, _ = self.layer()
        x = torch.randn(3, 256)
        expected = self.multiply(x, arguments, 384)
        for layout in (x.T.contiguous().T, torch.randn(3, 512).index_copy_(1, torch.arange(256), x)[:, :256]):
            torch.testing.assert_close(layout, x, rtol=0, atol=0)
            torch.testing.assert_close(self.multiply(layout, arguments, 384), expected, rtol=0, atol=0)
        wide = torch.zeros(3, 400)
        cpu.kernels().linear([(x, *arguments)], [wide[:, 5:389]])
        torch.testing.assert_close(wide[:, 5:389], expected, rtol=0, atol=0)
        self.assertEqual((wide[:, :5].abs().sum(), wide[:, 389:].abs().sum()), (0, 0))

    def test_several_layers_at_once(self):
        sizes = ((128, 256, 1), (256, 128, 17), (384, 384, 0), (100, 70, 3))
        layers, outs, expected = [], [], []
        for in_features, out_features, rows in sizes:
            arguments, _ = self.layer(in_features, out_features)
            layers.append((torch.randn(rows, in_features), *arguments))
            outs.append(torch.empty(rows, out_features))
            expected.append(self.multiply(layers[-1][0], arguments, out_features))
        cpu.kernels().linear(layers, outs)
        for result, single in zip(outs, expected):
            torch.testing.assert_close(result, single, rtol=0, atol=0)

    @parameterized.expand(DTYPES)
    def test_what_is_not_finite_goes_on(self, dtype):
        arguments, _ = self.layer(bias=False)
        for value in (float("nan"), float("inf"), float("-inf")):
            x = torch.randn(3, 256).to(getattr(torch, dtype))
            x[1, 200] = value
            y = self.multiply(x, arguments, 384)
            self.assertFalse(y[1].isfinite().any())
            self.assertTrue(y[::2].isfinite().all())

    @parameterized.expand(
        [("bfloat16", 1e30), ("bfloat16", 1e-30), ("float32", 1e30), ("float32", 1e-30), ("float16", 1e-4)]
    )
    def test_magnitudes(self, dtype, magnitude):
        arguments, weight = self.layer(bias=False)
        x = (torch.randn(2, 256) * magnitude).to(getattr(torch, dtype))
        y = self.multiply(x, arguments, 384).double()
        self.assertLess(rms_error(y, x.double() @ weight.double().T), 10 * tolerance(2, dtype, 4, "mul1"))

    def test_blocks_of_unequal_magnitude_keep_their_precision(self):
        arguments, weight = self.layer(bias=False)
        x = torch.randn(1, 256).bfloat16()
        x[:, :128] = 0
        x[0, 0] = 1e4
        other = x.clone()
        other[:, 128:] = 0
        arguments = (*arguments[:2], arguments[2], None, arguments[4])
        difference = self.multiply(x.float(), arguments, 384) - self.multiply(other.float(), arguments, 384)
        self.assertLess(rms_error(difference, x[:, 128:].float() @ weight[:, 128:].T), 1e-2)

    def test_zeros(self):
        arguments, _ = self.layer(bias=False)
        for dtype in DTYPES:
            x = torch.zeros(2, 256, dtype=getattr(torch, dtype))
            self.assertEqual(self.multiply(x, arguments, 384).abs().sum(), 0)

    def test_from_many_python_threads(self):
        arguments, _ = self.layer(512, 512)
        inputs = [torch.randn(1 + i % 5, 512).to(getattr(torch, DTYPES[i % 3])) for i in range(12)]
        expected = [self.multiply(x, arguments, 512) for x in inputs]
        wrong = []

        def work(index):
            for _ in range(20):
                if not torch.equal(self.multiply(inputs[index], arguments, 512), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_without_openmp(self):
        arguments, _ = self.layer(512, 512)
        x = torch.randn(4, 512)
        expected = self.multiply(x, arguments, 512)
        self.addCleanup(cpu.kernels().load, cpu.LIBRARY)
        cpu.kernels()._library.exl3_use_openmp(None)
        torch.testing.assert_close(self.multiply(x, arguments, 512), expected, rtol=0, atol=0)

    def test_refuses_what_it_cannot_read(self):
        (trellis, suh, svh, bias, codebook), _ = self.layer()
        x, y = torch.randn(2, 256), torch.empty(2, 384)

        def call(x=x, trellis=trellis, suh=suh, svh=svh, bias=bias, codebook=codebook, y=y):
            cpu.kernels().linear([(x, trellis, suh, svh, bias, codebook)], [y])

        call()
        refused = {
            "contiguous rows of float32": [
                {"x": x.double(), "y": y.double()},
                {"x": x.to("meta")},
                {"y": torch.empty(384, 2).T},
                {"suh": suh.int()},
                {"svh": torch.empty(768).half()[::2]},
                {"bias": torch.empty(768)[::2]},
            ],
            "a trellis is int16": [
                {"trellis": trellis.int()},
                {"trellis": trellis.to("meta")},
                {"trellis": trellis[0]},
            ],
            "no rate of": [{"trellis": trellis[..., :50]}],
            "unknown EXL3 codebook": [{"codebook": "mul2"}],
            "do not fit": [
                {"x": x[:, :128]},
                {"x": x[0]},
                {"suh": suh[:255]},
                {"svh": svh[:128]},
                {"bias": bias[:383]},
                {"y": y[:1]},
                {"y": y[:, :200]},
                {"y": y.bfloat16()},
                {"trellis": trellis[:12]},
            ],
        }
        for message, cases in refused.items():
            for case in cases:
                with self.subTest(case=list(case)), self.assertRaisesRegex(ValueError, message):
                    call(**case)


class Exl3OtherKernelsTest(KernelTest):
    @parameterized.expand(RATES)
    def test_decoding_and_dequantizing(self, isa, bits, codebook):
        self.force(isa)
        (trellis, suh, svh, _, _), _ = self.layer(256, 384, bits, codebook)
        inner = format.decode(trellis, codebook)
        for dtype in DTYPES:
            decoded = cpu.kernels().decode(trellis, codebook, getattr(torch, dtype))
            torch.testing.assert_close(decoded, inner.to(decoded.dtype), rtol=0, atol=0)
        expected = hadamard(hadamard(inner.float()).T) * suh.float() * svh[:, None].float()
        torch.testing.assert_close(cpu.kernels().dequantize(trellis, suh, svh, codebook), expected, rtol=0, atol=0)

    @parameterized.expand([(slice(2, 5), slice(3, 9)), (slice(0, 8, 2), slice(0, 16)), (slice(0, 8), slice(0, 16, 3))])
    def test_decoding_slices(self, rows, columns):
        trellis = torch.randint(-(2**15), 2**15, (8, 16, 48)).to(torch.int16)[rows, columns]
        torch.testing.assert_close(
            cpu.kernels().decode(trellis, "mcg"), format.decode(trellis, "mcg").float(), rtol=0, atol=0
        )

    def test_decoding_nothing(self):
        self.assertEqual(cpu.kernels().decode(torch.empty(0, 8, 48, dtype=torch.int16), "mul1").shape, (0, 128))

    def test_decoding_refuses_what_it_cannot_read(self):
        for trellis in (
            torch.zeros(8, 8, 64),
            torch.zeros(8, 64).short(),
            torch.zeros(8, 8, 64, device="meta").short(),
        ):
            with self.assertRaisesRegex(ValueError, "a trellis is int16"):
                cpu.kernels().decode(trellis, "mul1")
        with self.assertRaisesRegex(ValueError, "no rate"):
            cpu.kernels().decode(torch.zeros(8, 8, 50).short(), "mul1")
        with self.assertRaisesRegex(ValueError, "contiguous rows of float32, float16 or bfloat16"):
            cpu.kernels().decode(torch.zeros(8, 8, 64).short(), "mul1", torch.float64)

    @parameterized.expand(itertools.product(VECTORS, DTYPES, DTYPES))
    def test_rotating(self, isa, source, target):
        self.force(isa)
        x = torch.randn(5, 200).to(getattr(torch, source))
        before, after, bias = torch.randn(256), torch.randn(256), torch.randn(130)
        out = torch.empty(5, 256, dtype=getattr(torch, target))
        cpu.kernels().rotate(x, before, after, None, out)
        padded = torch.nn.functional.pad(x.float(), (0, 56))
        expected = hadamard(padded * before) * after
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0)
        cut = torch.empty(5, 130, dtype=out.dtype)
        cpu.kernels().rotate(x, None, None, bias, cut)
        torch.testing.assert_close(cut, (hadamard(padded)[:, :130] + bias).to(out.dtype), rtol=0, atol=0)

    def test_rotating_any_layout(self):
        x = torch.randn(5, 200)
        for layout in (x.T.contiguous().T, torch.cat((x, x), 1)[:, :200], x[:1].expand(5, -1)):
            torch.testing.assert_close(
                cpu.kernels().rotate(layout),
                cpu.kernels().rotate(layout.clone(memory_format=torch.contiguous_format)),
                rtol=0,
                atol=0,
            )

    def test_rotating_refuses_what_it_cannot_read(self):
        x = torch.randn(5, 200)
        for arguments in ((x.int(),), (x[0],), (x, torch.randn(200)), (x, None, torch.randn(128))):
            with self.assertRaises(ValueError):
                cpu.kernels().rotate(*arguments)
        for out in (torch.empty(4, 256), torch.empty(5, 128), torch.empty(5, 257), torch.empty(256, 5).T):
            with self.assertRaises(ValueError):
                cpu.kernels().rotate(x, out=out)
        with self.assertRaises(ValueError):
            cpu.kernels().rotate(x, bias=torch.randn(100), out=torch.empty(5, 130))

    @parameterized.expand(VECTORS)
    def test_conversions_of_every_half(self, isa):
        """Scales of all 65 536 bit patterns, and results that fall between two numbers of 16 bits."""
        self.force(isa)
        halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
        x = torch.zeros(1, 128)
        x[0, 0] = 128**0.5  # a rotation of it is 1 everywhere
        scales = halves[halves.isfinite()].view(-1, 128)
        for scale in scales:
            out = cpu.kernels().rotate(x, after=scale)
            torch.testing.assert_close(out[0], hadamard(x)[0] * scale.float(), rtol=0, atol=0)
        values = torch.cat((torch.randn(256) * 1e-6, torch.randn(256) * 1e4, torch.randn(256), torch.zeros(128)))
        for dtype in (torch.float16, torch.bfloat16):
            for some in values.view(-1, 128):
                out = cpu.kernels().rotate(x, after=some, out=torch.empty(1, 128, dtype=dtype))
                torch.testing.assert_close(out[0], (hadamard(x)[0] * some).to(dtype), rtol=0, atol=0)


def guarded(tensor, at_end):
    """A copy of `tensor` beside a page that nothing may be read from: after its end or before its start."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        address = ctypes.c_void_p(base + page * mmap.PAGESIZE)
        if libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages + 1) * mmap.PAGESIZE - tensor.nbytes if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


def use_guarded_memory():
    """All kernels on every instruction set and rate, in a process of its own, which a wrong access kills."""
    for isa, bits, codebook in RATES:
        os.environ["EXL3_CPU_ISA"] = isa
        try:
            cpu.kernels().isa()
        except ValueError:
            continue
        tensors, _ = random_linear(256, 128, bits, codebook)
        for at_end in (False, True):
            trellis, suh, svh = (guarded(tensors[name], at_end) for name in ("trellis", "suh", "svh"))
            for dtype in (torch.float32, torch.bfloat16):
                x, y = (guarded(torch.ones(2, size, dtype=dtype), at_end) for size in (128, 250))
                cpu.kernels().linear([(x, trellis, suh, svh, guarded(torch.ones(250), at_end), codebook)], [y])
                cpu.kernels().rotate(x, suh, suh, None, guarded(torch.empty(2, 128, dtype=dtype), at_end))
            cpu.kernels().decode(trellis, codebook)
            cpu.kernels().dequantize(trellis, suh, svh, codebook)


@unittest.skipUnless(sys.platform == "linux", "guards memory with mprotect")
class Exl3GuardedMemoryTest(KernelTest):
    def test_nothing_beyond_the_tensors_is_touched(self):
        in_a_process(self, (use_guarded_memory,))


@require_torch
class Exl3GroupedLinearTest(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def groups(self, sizes, bits=2.5, codebook="mul1", bias=True):
        """`ranges` of rows, stacked layers for them, and their weights."""
        layers, weights = [], []
        for seed in range(len(sizes)):
            tensors, weight = random_linear(130, 200, bits, codebook, torch.randn(130) if bias else None, seed=seed)
            layers.append(tensors)
            weights.append(weight)
        stacks = [torch.stack([layer[leaf] for layer in layers]) for leaf in ("trellis", "suh", "svh")]
        stacks.append(torch.stack([layer["bias"] for layer in layers]) if bias else None)
        return torch.tensor([0, *itertools.accumulate(sizes)]).unfold(0, 2, 1), (*stacks, codebook), weights

    @parameterized.expand(
        [
            (sizes, *kind)
            for sizes in ([1, 0, 3, 70], [0, 0, 2], [1], [0])
            for kind in ((4, "mul1"), (2, "mcg"), (3, "3inst"), (2.5, "mul1"))
        ]
    )
    def test_each_group_has_its_weight(self, sizes, bits, codebook):
        ranges, stacks, weights = self.groups(sizes, bits, codebook)
        x = torch.randn(sum(sizes) + 2, 200)
        y = grouped.grouped_linear(x, ranges, *stacks, 130)
        expected = torch.zeros(x.shape[0], 130)
        for group, weight in enumerate(weights):
            rows = slice(*ranges[group])
            expected[rows] = x[rows] @ weight.T + stacks[3][group, :130].float()
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        self.assertEqual(y[ranges[-1, 1] :].abs().sum(), 0)
        with patch.object(cpu, "is_available", lambda: False):
            torch.testing.assert_close(grouped.grouped_linear(x, ranges, *stacks, 130), expected, rtol=0, atol=1e-5)

    @parameterized.expand(["float32", "bfloat16"])
    def test_a_stack_gives_what_its_layers_give_to_the_byte(self, dtype):
        """In any order of tiles, as a part of another stack, and where only some of the rows are of its groups."""
        sizes = [2, 1, 0, 60, 5]
        ranges, (trellis, suh, svh, bias, codebook), _ = self.groups(sizes)
        dtype = getattr(torch, dtype)
        x = torch.randn(sum(sizes), 200, dtype=dtype)
        expected = torch.zeros(len(x), 130, dtype=dtype)
        for group in (1, 3, 4):
            rows = slice(*ranges[group])
            layer = (trellis[group], suh[group], svh[group], bias[group], codebook)
            expected[rows] = ops.linear(x[rows], *layer, 130)
        some = torch.tensor([1, 3, 4])
        stacks = [tensor[some].repeat_interleave(2, 0)[::2] for tensor in (trellis, suh, svh, bias)]
        by_column = [tensor.T.contiguous().T for tensor in stacks[1:]]  # such scales are not rows
        for codes, others in itertools.product((stacks[0], ops.ordered(stacks[0])), (stacks[1:], by_column)):
            y = grouped.grouped_linear(x, ranges[some], codes, *others, codebook, 130)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)

    @parameterized.expand(["float32", "bfloat16"])
    def test_several_stacks_read_rows_in_any_places(self, dtype):
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        ranges, (*tensors, codebook), _ = self.groups([2, 0, 5])
        x, places = torch.randn(4, 200, dtype=getattr(torch, dtype)), torch.tensor([6, 0, 3, 2, 5, 7, 1, 4])
        y, halves = torch.zeros(8, 2, 130, dtype=x.dtype), (slice(0, 1), slice(1, 3))
        products = [
            (cpu.kernels().Stack(*(tensor[half] for tensor in tensors), codebook, 200, 130), ranges[half], y[:, index])
            for half in halves
            for index in range(2)
        ]
        cpu.kernels().grouped_linear(products, x, places, sharing=2)
        expected = torch.zeros(8, 130, dtype=x.dtype)
        expected[places] = grouped.grouped_linear(x[places // 2], ranges, *tensors, codebook, 130)
        torch.testing.assert_close(y, expected[:, None].expand(8, 2, 130), rtol=0, atol=0)
        wrong = [
            (x, places + 1, ranges, "none of rows"),
            (x, places - 1, ranges, "none of rows"),
            (x, places.int(), ranges, "numbers of rows are int64"),
            (x, places, ranges.int(), "numbers of rows are int64"),
            (x, places[1:], ranges, "do not fit places"),
            (x[1:], places, ranges, "do not fit places"),
            (x, None, ranges, "do not fit places None"),
            (x[:, 1:], places, ranges, "does not fit"),
            (x.half(), places, ranges, "does not fit"),
            (x, places, ranges[1:], "does not fit"),
            (x, places, ranges + 2, "none of rows"),
        ]
        stack = cpu.kernels().Stack(*tensors, codebook, 200, 130)
        for rows, numbers, groups, message in wrong:
            with self.assertRaisesRegex(ValueError, message):
                cpu.kernels().grouped_linear([(stack, groups, y[:, 0])], rows, numbers, sharing=2)
        with self.assertRaisesRegex(ValueError, "no stacks of one size"):
            cpu.kernels().Stack(tensors[0][:2], *tensors[1:], codebook, 200, 130)

    def test_rows_are_sorted_as_by_torch(self):
        """Those of no expert are behind the others here."""
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        for experts, count in ((5, 0), (1, 3), (5, 40), (128, 8), (128, 4096)):
            numbers = torch.randint(-2, experts + 2, (count, 1))
            order, ranges, routed = cpu.kernels().route(numbers[:, 0], experts)
            rows, expected, _ = grouped.route(numbers, experts)
            self.assertEqual(routed, (expected[-1, 1] - expected[0, 0]).item())
            torch.testing.assert_close(ranges, expected - expected[0, 0], rtol=0, atol=0)
            begin, end = expected[0, 0].item(), expected[-1, 1].item()
            torch.testing.assert_close(order[:routed], rows[begin:end], rtol=0, atol=0)
            self.assertEqual(sorted(order[routed:].tolist()), sorted([*rows[:begin].tolist(), *rows[end:].tolist()]))
        with self.assertRaisesRegex(ValueError, "numbers of rows are int64"):
            cpu.kernels().route(numbers[:, 0].int(), experts)

    @parameterized.expand([(x, w) for x in ("float32", "float16", "bfloat16") for w in ("float32", "bfloat16")])
    def test_rows_are_mixed_as_by_torch(self, dtype, weights_dtype):
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        for tokens, count, features in ((0, 2, 128), (1, 1, 3), (3, 8, 200), (2, 150, 128), (300, 4, 130)):
            x = torch.randn(tokens * count, 2, features, dtype=getattr(torch, dtype))[:, 0]
            weights = torch.rand(tokens, count, dtype=getattr(torch, weights_dtype))
            expected = torch.zeros(tokens, features)
            for rows, weight in zip(x.unflatten(0, (tokens, count)).unbind(1), weights.float().unbind(1)):
                expected += rows.float() * weight[:, None]
            torch.testing.assert_close(cpu.kernels().mix(x, weights), expected.to(x.dtype), rtol=0, atol=0)
        for wrong, message in (
            (weights[1:], "are not those"),
            (weights.double(), "contiguous rows"),
            (weights.T, "contiguous"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                cpu.kernels().mix(x, wrong)

    def test_gradients(self):
        ranges, stacks, weights = self.groups([2, 0, 60])
        bias = stacks[3].float().requires_grad_()
        x = torch.randn(64, 200, requires_grad=True)
        grad = torch.randn(64, 130)
        grouped.grouped_linear(x, ranges, *stacks[:3], bias, stacks[4], 130).backward(grad)
        expected, of_bias = torch.zeros(64, 200), torch.zeros(3, 256)
        for group, weight in enumerate(weights):
            rows = slice(*ranges[group])
            expected[rows] = grad[rows] @ weight
            of_bias[group, :130] = grad[rows].sum(0)
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias.grad, of_bias, rtol=0, atol=1e-5)

    def test_is_an_operator(self):
        ranges, stacks, _ = self.groups([2, 1])
        x = torch.randn(4, 200, requires_grad=True)
        torch.library.opcheck(grouped.grouped_linear, (x, ranges, *stacks, 130))
        grad = torch.randn(4, 130)
        torch.library.opcheck(grouped.grouped_linear_input_grad, (grad, ranges, *stacks[:3], stacks[4], 200))

    def test_sizes_that_do_not_fit_are_an_error(self):
        ranges, stacks, _ = self.groups([2, 1])
        with self.assertRaisesRegex(
            ValueError, r"the input is torch.float32 \[3, 100\], the quantized weight has 256"
        ):
            grouped.grouped_linear(torch.randn(3, 100), ranges, *stacks, 130)
        for index in range(4):
            fewer = [tensor[:1] if i == index else tensor for i, tensor in enumerate(stacks[:4])]
            with self.assertRaisesRegex(ValueError, r"ranges, trellis, suh, svh and bias of .* are of no stack"):
                grouped.grouped_linear(torch.randn(3, 200), ranges, *fewer, stacks[4], 130)
        for wrong in ([0, 2], [[0, 2]], [[0.0, 1.0], [1.0, 2.0]], [[0j, 1], [1, 2]]):
            with self.assertRaisesRegex(ValueError, "are of no stack"):
                grouped.grouped_linear(torch.randn(3, 200), torch.tensor(wrong), *stacks, 130)

    def test_ranges_that_are_none_are_an_error(self):
        _, stacks, _ = self.groups([2, 1])
        x = torch.randn(3, 200)
        for wrong in ([[0, 2], [2, 4]], [[0, 2], [3, 2]], [[-1, 2], [2, 3]]):
            for is_available in (True, False):
                with patch.object(cpu, "is_available", lambda: is_available):
                    with self.assertRaisesRegex(ValueError, "ranges"):
                        grouped.grouped_linear(x, torch.tensor(wrong), *stacks, 130)


if __name__ == "__main__":
    unittest.main()
