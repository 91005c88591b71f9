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
The Triton kernels, run by Triton's interpreter on the CPU and compared with the reference. That needs a process of its own,
since the interpreter is chosen when Triton is imported.

The interpreter cuts float32 off where it converts to bfloat16, GPUs round: what it computes in bfloat16 is allowed twice the error.
"""

import os
import subprocess
import sys
import unittest
from unittest import mock

import torch
from parameterized import parameterized

from transformers.integrations.exl3 import encoding, format, grouped, ops, search
from transformers.integrations.exl3.format import hadamard
from transformers.integrations.exl3.kernels import cpu
from transformers.integrations.exl3.kernels.triton import gpu
from transformers.testing_utils import slow

from .triton_cases import (
    INTERPRETED,
    TOLERANCE,
    Layer,
    all_codes,
    experts_of_a_model,
    grouped_linear,
    interpret_faster,
    random_trellis,
    relative_error,
    require_interpreter,
    require_interpreter_that_runs,
    require_triton,
    search_case,
    stack_of,
    triton,
)


if triton:
    from transformers.integrations.exl3.kernels.triton import codes as triton_codes
    from transformers.integrations.exl3.kernels.triton import hadamard as triton_hadamard
    from transformers.integrations.exl3.kernels.triton import linear as triton_linear
    from transformers.integrations.exl3.kernels.triton import search as triton_search
    from transformers.integrations.exl3.kernels.triton import target as triton_target
    from transformers.integrations.exl3.kernels.triton.linear import ProductOptions

    if INTERPRETED:
        interpret_faster()


@require_triton
@require_interpreter_that_runs
class Exl3TritonProcessTest(unittest.TestCase):
    @parameterized.expand([("products", "product or experts"), ("all_else", "not product and not experts")])
    @unittest.skipIf(INTERPRETED, "this is that process")
    def test_kernels_under_the_interpreter(self, name, some):
        """Runs `Exl3TritonInterpreterTest` in processes where Triton interprets, which may run side by side."""
        self._interpret(f"InterpreterTest and {some}")

    @unittest.skipIf(INTERPRETED, "this is that process")
    @slow
    def test_search_of_whole_tiles_under_the_interpreter(self):
        self._interpret("WholeTilesTest")

    def _interpret(self, tests):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
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
        torch.testing.assert_close(gpu.kernels().decode(trellis, codebook, torch.float16), expected, rtol=0, atol=0)
        # Tiles in the other order in memory, as a slice of more columns
        stored = trellis.transpose(0, 1).contiguous().transpose(0, 1)
        self.assertFalse(stored.is_contiguous())
        found = gpu.kernels().decode(stored[:, 8:], codebook, torch.float32)
        torch.testing.assert_close(found, expected[:, 128:].float(), rtol=0, atol=0)

    @parameterized.expand(all_codes())
    def test_product_of_one_row(self, bits, codebook):
        layer = Layer(256, 128, bits, codebook)
        x = layer.inputs(1)
        self.assertLess(relative_error(layer.linear(x), layer.exact(x)), TOLERANCE[torch.float32])

    @parameterized.expand(
        [(rows, dtype) for rows in (1, 7, 8, 9) for dtype in TOLERANCE] + [(33, torch.float16), (130, torch.bfloat16)],
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
            mock.patch.object(triton_linear, "choose_product", lambda *_: None),
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
        # The order is of weights, whatever rows of activations there are.
        for rows in (1, operand_rows + 1) if order == "natural" else (3,):
            x = layer.inputs(rows, dtype)
            with mock.patch.object(triton_linear, "choose_product", lambda *_: ProductOptions(operand_rows, 4, order)):
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
        torch.testing.assert_close(layer.linear(x), expected, rtol=0, atol=0)

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
            torch.testing.assert_close(y[[0, *range(3, rows)]], expected[[0, *range(3, rows)]], rtol=0, atol=0)

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
        torch.testing.assert_close(y, hadamard(inner) * svh.float(), rtol=0, atol=0)

    @parameterized.expand(
        [
            ("one_row_each", torch.bfloat16, [1, 0, 1, 1, 0]),
            ("all_of_one", torch.float16, [0, 0, 0, 9, 0]),
            ("uneven", torch.float32, [3, 17, 0, 1, 40]),
            ("in_parts", torch.float16, [5, 0, 30, 2, 7]),
            ("none", torch.float32, [0, 0, 0, 0, 0]),
        ]
    )
    def test_experts(self, name, dtype, counts):
        layers = [Layer(200, 100, 2.5, bias=True, seed=seed) for seed in range(len(counts))]
        with mock.patch.object(triton_linear, "GROUPED_ROWS", 16 if name == "in_parts" else 4096):
            self._check_experts(layers, counts, dtype)

    @parameterized.expand(all_codes())
    def test_experts_of_every_rate_and_codebook(self, bits, codebook):
        self._check_experts([Layer(128, 128, bits, codebook, seed=seed) for seed in range(3)], [2, 0, 1])

    def test_experts_in_any_strides_and_some_of_them(self):
        """The stack may be a part of another one, in columns, and the rows of other experts may lie between those of its own."""
        layers = [Layer(100, 200, 3, bias=True, seed=seed) for seed in range(5)]
        trellis, *others = (torch.stack((tensor, tensor), 1)[:, 0] for tensor in stack_of(layers))
        trellis = trellis.transpose(1, 2).contiguous().transpose(1, 2)
        x, bounds = layers[0].inputs(16), torch.tensor([0, 1, 4, 4, 13, 15])
        for members in ([0, 1, 2, 3, 4], [1, 3], [2], [4], []):
            some = [tensor[members] for tensor in (trellis, *others)]
            some[0] = some[0].transpose(1, 2).contiguous().transpose(1, 2)
            y = gpu.kernels().grouped_linear(x, bounds.unfold(0, 2, 1)[members], *some, "mul1", 200)
            exact = torch.zeros(16, 200, dtype=torch.float64)
            for member in members:
                rows = slice(bounds[member], bounds[member + 1])
                exact[rows] = layers[member].exact(x[rows])
            self.assertLess((y - exact).norm(), 1e-6 * exact.norm() + 1e-30)
        y = gpu.kernels().grouped_linear(x, bounds.unfold(0, 2, 1), trellis, *others, "mul1", 200)
        self.assertLess(relative_error(y[1:4], layers[1].exact(x[1:4])), TOLERANCE[torch.float32])

    def _check_experts(self, layers, counts, dtype=torch.float32):
        """With two rows that are no expert's."""
        bounds = torch.tensor([0, *counts]).cumsum(0)
        x = layers[0].inputs(int(bounds[-1]) + 2, dtype)
        y = grouped_linear(layers, x, bounds)
        for layer, begin, end in zip(layers, bounds, bounds[1:]):
            if begin < end:
                self.assertLess(relative_error(y[begin:end], layer.exact(x[begin:end])), TOLERANCE[dtype])
        self.assertEqual((y.shape, y.dtype), (x.shape[:1] + (layers[0].out_features,), dtype))
        self.assertTrue((y[bounds[-1] :] == 0).all())

    def test_bad_experts_are_refused(self):
        layers = [Layer(256, 128, bias=True, seed=seed) for seed in range(3)]
        x, ranges, stacks = layers[0].inputs(3), torch.arange(4).unfold(0, 2, 1), stack_of(layers)
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook 'mul2'"):
            gpu.kernels().grouped_linear(x, ranges, *stacks, "mul2", 128)
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            gpu.kernels().grouped_linear(x, ranges, stacks[0].to("meta"), *stacks[1:], "mul1", 128)
        odd = torch.zeros(stacks[0].numel() + 1, dtype=torch.int16)[1:].view(stacks[0].shape)
        with self.assertRaisesRegex(ValueError, "multiples of 4"):
            gpu.kernels().grouped_linear(x, ranges, odd, *stacks[1:], "mul1", 128)
        with self.assertRaisesRegex(ValueError, "activations must be"):
            gpu.kernels().grouped_linear(x.double(), ranges, *stacks, "mul1", 128)

    def test_the_operator_of_experts(self):
        """`exl3::grouped_linear` on the kernels, which ask nothing of the host, and on a GPU that has no use for them."""
        layers = [Layer(200, 100, seed=seed) for seed in range(3)]
        x, ranges = layers[0].inputs(7), torch.tensor([[0, 4], [4, 4], [4, 6]])

        def run():
            return grouped.grouped_linear(x, ranges, *stack_of(layers), "mul1", 100)

        expected = run()
        with mock.patch.object(gpu, "is_available", lambda device: True):
            with mock.patch.object(grouped, "_groups", side_effect=AssertionError("the host was asked")):
                self.assertLess(relative_error(run(), expected.double()), 1e-6)
            turing = mock.patch.object(triton_linear, "row_tiles", lambda target: {})
            with (
                turing,
                mock.patch.object(
                    gpu.kernels(), "grouped_linear", side_effect=AssertionError("no matrix instruction")
                ),
            ):
                triton_linear.choose_product.cache_clear()
                self.addCleanup(triton_linear.choose_product.cache_clear)
                self.assertLess(relative_error(run(), expected.double()), 1e-6)

    def test_experts_of_a_model(self):
        """As on a GPU, of two rates: a launch for each, with bounds that are computed on the device."""
        module = experts_of_a_model()
        x, weights = torch.randn(5, 128), torch.rand(5, 2)
        index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 4], [4, 4]])  # 2 has no rows, 4 is nobody
        expected = module(x, index, weights)
        with (
            mock.patch.object(gpu, "is_available", lambda device: True),
            mock.patch.object(gpu.kernels(), "grouped_linear", wraps=gpu.kernels().grouped_linear) as launches,
            mock.patch.object(grouped, "_groups", side_effect=AssertionError("the host was asked")),
            mock.patch.object(ops, "is_direct", lambda *_: False),
        ):
            y = module(x, index, weights)
        self.assertEqual([len(call.args[2]) for call in launches.call_args_list], [3, 1, 3, 1, 3, 1])
        self.assertLess(relative_error(y, expected.double()), 1e-5)

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

    @parameterized.expand(
        [(bits, cost) for bits in format.BITS for cost in ("integer", "fp32") if bits < 6 or cost == "integer"]
    )
    def test_search_finds_the_states_of_the_reference(self, bits, cost):
        """In rings of two states, of which some saturate."""
        count = 2 if bits < 4 and cost == "integer" else 1
        self._check_search(search_case(count, bits, format.CODEBOOKS[int(2 * bits) % 3], cost))

    @parameterized.expand([(4, "integer", 4, 8), (2.5, "fp32", 2, 11), (1, "integer", 4, 12), (5, "integer", 2, 9)])
    def test_search_as_it_is_compiled(self, bits, cost, tiles, thread_bits):
        """Tiles side by side in a program, the last of them missing, runs of nodes, and several parts of them in turn."""
        even, odd = int(bits), int(2 * bits) - int(bits)
        output_bits = tuple(
            min(triton_search.MAX_OUTPUT_BITS, shift, 16 - choice_bits - thread_bits)
            for shift, choice_bits in ((even, odd), (odd, even))
        )
        options = triton_search.SearchOptions(tiles, 1 << thread_bits, output_bits)
        with mock.patch.object(triton_search, "choose_search", lambda *_: options):
            self._check_search(search_case(tiles - 1, bits, "mul1", cost, weights=4))

    def test_search_with_scratch_for_one_program(self):
        with mock.patch.object(triton_search, "SCRATCH_BYTES", 1):
            self._check_search(search_case(3, 2, "mcg", "integer", weights=4))

    def _check_search(self, case):
        expected = search.reference_kernel(*case)
        found = triton_search.kernel(*case, triton_target.target_of(torch.device("cpu")))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_search_of_a_whole_tile(self):
        tile = Layer(256, 128).inputs(1)
        found = gpu.kernels().search(tile, 1, "mul1", "fast")
        torch.testing.assert_close(found, search.search_reference(tile, 1, "mul1", "fast"), rtol=0, atol=0)

    def test_bad_tiles_are_refused(self):
        for tiles in (torch.zeros(2, 256).double(), torch.zeros(2, 128), torch.zeros(256)):
            with self.assertRaisesRegex(ValueError, r"tiles must be float32 \[n, 256\]"):
                gpu.kernels().search(tiles, 4, "mul1")
        with self.assertRaisesRegex(ValueError, "finite"):
            gpu.kernels().search(torch.full((1, 256), float("inf")), 4, "mul1")
        with self.assertRaisesRegex(ValueError, "no rate"):
            gpu.kernels().search(torch.zeros(1, 256), 4.5, "mul1")
        self.assertEqual(gpu.kernels().search(torch.empty(0, 256), 4, "mul1").shape, (0, 256))

    def test_encoding(self):
        """`encode` with the search of this door, whose kernel is another one here to save time."""
        weight = Layer(200, 100).inputs(100)
        expected = encoding.encode(weight, 3, "mul1", 5)
        other = cpu.kernels()._search_kernel if cpu.is_available() else search.reference_kernel
        self.addCleanup(gpu.has_search.cache_clear)
        with (
            mock.patch.object(gpu, "is_available", lambda device: True),
            mock.patch.object(triton_search, "kernel", lambda *args: other(*args[:-1])),
            mock.patch.object(gpu.kernels(), "search", wraps=gpu.kernels().search) as found,
        ):
            torch.testing.assert_close(encoding.encode(weight, 3, "mul1", 5), expected, rtol=0, atol=0)
        self.assertGreater(found.call_count, 1)

    def test_no_rows_and_more_dimensions(self):
        layer = Layer(200, 100, 3)
        self.assertEqual(layer.linear(layer.inputs(0)).shape, (0, 100))
        x = layer.inputs(6)
        torch.testing.assert_close(layer.linear(x.view(2, 3, 200)), layer.linear(x).view(2, 3, 100), rtol=0, atol=0)
        strided = x.T.contiguous().T
        torch.testing.assert_close(layer.linear(strided), layer.linear(x), rtol=0, atol=0)

    def test_the_check_before_the_first_use(self):
        gpu.check(torch.device("cpu"))
        for name, message in (("decode", "decode wrongly"), ("linear", "multiply wrongly")):
            kernel = getattr(gpu.kernels(), name)
            with mock.patch.object(gpu.kernels(), name, lambda *args, kernel=kernel: kernel(*args) + 1):
                with self.assertRaisesRegex(RuntimeError, message):
                    gpu.check(torch.device("cpu"))

    def test_bad_input_is_refused(self):
        layer = Layer(256, 128, 4)
        with self.assertRaisesRegex(ValueError, "must be float32, float16, bfloat16, not float64"):
            layer.linear(layer.inputs(1).double())
        with self.assertRaisesRegex(ValueError, "must be float32, float16, bfloat16, not int8"):
            gpu.kernels().decode(layer.trellis, "mul1", torch.int8)
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook 'mul2'"):
            gpu.kernels().decode(layer.trellis, "mul2", torch.float16)
        for trellis, message in (
            (layer.trellis.int(), "int16"),
            (layer.trellis[:4], "whole blocks"),
            (layer.trellis[:, :4], "whole blocks"),
            (layer.trellis[..., :60], "no rate of 3.75 bits"),
            (layer.trellis.repeat_interleave(2, -1)[..., ::2], "one after the other"),
            (torch.zeros(8 * 8 * 64 + 1, dtype=torch.int16)[1:].view(8, 8, 64), "multiples of 4"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                gpu.kernels().decode(trellis, "mul1", torch.float16)
        layer.svh = layer.svh.to("meta")
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            layer.linear(layer.inputs(1))


@require_interpreter
@slow
class Exl3TritonWholeTilesTest(unittest.TestCase):
    @parameterized.expand([(bits, format.CODEBOOKS[index % 3]) for index, bits in enumerate(format.BITS)])
    def test_search(self, bits, codebook):
        tiles = Layer(256, 128).inputs(2) * search.INPUT_RMS[codebook][bits]
        tiles[1, ::37] *= 5
        for effort in search.EFFORTS if bits <= 4 else ("default",):
            expected = search.search_reference(tiles, bits, codebook, effort)
            torch.testing.assert_close(gpu.kernels().search(tiles, bits, codebook, effort), expected, rtol=0, atol=0)
