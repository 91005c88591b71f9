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

import os
import unittest
from pathlib import Path
from unittest.mock import patch

from parameterized import parameterized

from transformers.testing_utils import CaptureLogger, require_torch, slow
from transformers.utils import is_torch_available, logging


if is_torch_available():
    import torch

    from transformers.integrations.exl3 import encoder, format, ops, search
    from transformers.integrations.exl3.format import hadamard
    from transformers.integrations.exl3.kernels import cpu


CODEBOOKS = ("3inst", "mcg", "mul1")
BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
ISAS = ("avx512vnni", "avx512", "avx2", "base")
RATES_AND_CODEBOOKS = [(bits, codebook) for bits in BITS for codebook in CODEBOOKS]
# To the search codebooks are tables: every rate with the default one, and with one of the others.
EACH_RATE = [(bits, "mul1") for bits in BITS] + [(bits, CODEBOOKS[index % 2]) for index, bits in enumerate(BITS)]

# Mean squared errors of an exact search for N(0, 1), each at the best of five scales, on 16 384 samples (about 1 %).
EXACT_ERRORS = {
    "3inst": {1: 0.2654, 2: 0.0686, 3: 0.01755, 4: 0.004576, 5: 1.183e-3, 6: 3.062e-4, 7: 8.43e-5, 8: 2.20e-5},
    "mcg": {1: 0.2644, 2: 0.0682, 3: 0.01726, 4: 0.004566, 5: 1.167e-3, 6: 3.027e-4, 7: 8.42e-5, 8: 2.20e-5},
    "mul1": {1: 0.2701, 2: 0.0682, 3: 0.01718, 4: 0.004434, 5: 1.142e-3, 6: 2.920e-4, 7: 7.62e-5, 8: 2.08e-5},
}


def setUpModule():
    # Many small operations: on a busy machine threads would wait for each other.
    global threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)


def tearDownModule():
    torch.set_num_threads(threads)


def require_compiled(test):
    return unittest.skipUnless(cpu.LIBRARY.is_file(), f"the compiled kernels are not built: no {cpu.LIBRARY}")(test)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codable_tiles(count, bits, codebook):
    return normal(count, format.TILE_SIZE) * search.INPUT_RMS[codebook][bits]


def dequantize(trellis, suh, svh, codebook, shape):
    """The weight `[out, in]` in float64, in the original shape."""
    inner = hadamard(hadamard(format.decode(trellis, codebook).double()).T)
    return (inner * suh.double() * svh.double()[:, None])[: shape[0], : shape[1]]


def relative_error(quantized, weight, codebook="mul1"):
    weight = weight.double()
    return float((dequantize(*quantized, codebook, weight.shape) - weight).square().sum() / weight.square().sum())


def squared_error(tiles, states, codebook):
    """In each tile."""
    return (format.codebook_values(codebook).float()[states] - tiles).double().square().sum(1)


def quantize(weight, bits=3, codebook="mul1", **options):
    best = cpu.kernels().search if cpu.LIBRARY.is_file() else search.search_reference
    return encoder.quantize_weight(weight, bits, codebook, search=best, **options)


@require_torch
class Exl3SearchReferenceTest(unittest.TestCase):
    def test_decoded_tile_is_found_again(self):
        trellis = torch.randint(-(2**15), 2**15, (1, 64), generator=torch.Generator().manual_seed(1)).to(torch.int16)
        states = format.unpack_states(trellis)
        tiles = format.codebook_values("mcg")[states].float()
        torch.testing.assert_close(search.search_reference(tiles, 4, "mcg"), states, rtol=0, atol=0)

    def test_equal_costs_take_the_smallest_state(self):
        # A weight that is infinitely far from everything leaves nothing to choose by.
        states = search.search_reference(torch.full((1, format.TILE_SIZE), 3e38), 2, "mul1")
        self.assertEqual(states.unique().tolist(), [0])

    @parameterized.expand(BITS)
    def test_states_are_a_ring_whose_values_are_found_again(self, bits):
        states = search.search_reference(codable_tiles(1, bits, "mul1"), bits, "mul1", "exact")
        tiles = format.codebook_values("mul1").float()[states]
        again = search.search_reference(tiles, bits, "mul1")
        self.assertEqual(squared_error(tiles, again, "mul1").item(), 0)
        for ring in (states, again):
            torch.testing.assert_close(format.unpack_states(format.pack_states(ring, bits)), ring, rtol=0, atol=0)

    def test_unknown_rate_codebook_and_effort(self):
        with self.assertRaisesRegex(ValueError, "no rate of 9 bits"):
            search.search_reference(normal(1, format.TILE_SIZE), 9, "mul1")
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook 'no'"):
            search.search_reference(normal(1, format.TILE_SIZE), 2, "no")
        with self.assertRaisesRegex(ValueError, "unknown effort 'no': there are default, fast, exact"):
            search.search_reference(normal(1, format.TILE_SIZE), 2, "mul1", "no")


@require_torch
@require_compiled
class Exl3CompiledSearchTest(unittest.TestCase):
    @parameterized.expand(EACH_RATE)
    def test_search_is_the_reference_on_every_instruction_set(self, bits, codebook):
        tiles = codable_tiles(2, bits, codebook)
        tiles[1, ::37] *= 5  # far outside the codebook: integer costs saturate, and fp32 ones take over
        efforts = ["default"]
        if codebook == "mul1":  # efforts differ in the window, which is a number, and in which costs a rate has
            efforts += ["fast"] * (2 < bits <= 4 or bits in (1, 5)) + ["exact"] * (bits in (1.5, 4, 8))
        expected = {effort: search.search_reference(tiles, bits, codebook, effort) for effort in efforts}
        for isa in ISAS:
            with self.subTest(isa=isa), patch.dict(os.environ, EXL3_CPU_ISA=isa):
                try:
                    cpu.kernels().isa()
                except ValueError:
                    continue  # not of this machine
                found = {effort: cpu.kernels().search(tiles, bits, codebook, effort) for effort in efforts}
                torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @parameterized.expand([(2, 1), (3, 2.5), (5, 4), (9, 6)])
    def test_tiles_do_not_depend_on_their_neighbours_or_threads(self, count, bits):
        tiles = codable_tiles(count, bits, "mcg")
        tiles[0, 0] = 1e30
        expected = torch.cat([cpu.kernels().search(tile[None], bits, "mcg") for tile in tiles])
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(cpu.kernels().search(tiles, bits, "mcg"), expected, rtol=0, atol=0)

    @parameterized.expand(RATES_AND_CODEBOOKS)
    def test_search_error_is_near_that_of_an_exact_search(self, bits, codebook):
        """And that one's near the figures of others."""
        tiles = codable_tiles(
            96 if bits < 5 else 256, bits, codebook
        )  # few weights at the ends weigh most at high rates
        exact = squared_error(tiles, cpu.kernels().search(tiles, bits, codebook, "exact"), codebook)
        if bits in EXACT_ERRORS[codebook]:
            decibel = 10 * torch.log10(exact.sum() / tiles.square().sum() / EXACT_ERRORS[codebook][bits])
            # What 16 384 samples leave open: at high rates the few beyond the codebook's end weigh most.
            self.assertLess(decibel.item(), 0.15 if bits < 6 else 0.4)
        tiles, exact = tiles[:96], exact[:96]
        default, fast = (
            squared_error(tiles, cpu.kernels().search(tiles, bits, codebook, effort), codebook)
            for effort in ("default", "fast")
        )
        self.assertLess(10 * torch.log10(default.sum() / exact.sum()).item(), 0.05)
        self.assertLess(10 * torch.log10(fast.sum() / exact.sum()).item(), 0.5 if bits <= 4 else 0.2)
        self.assertLess(10 * torch.log10(default / exact).max().item(), 0.5)  # of the worst tile

    @parameterized.expand([(bits, outlier) for bits in (1, 2, 4, 5, 8) for outlier in (4, 10, 1e4, 1e30)])
    def test_outliers_do_not_spoil_a_tile(self, bits, outlier):
        tiles = codable_tiles(16, bits, "mul1")
        tiles[:, 100] = outlier
        default, exact = (
            squared_error(tiles, cpu.kernels().search(tiles, bits, "mul1", effort), "mul1")
            for effort in ("default", "exact")
        )
        self.assertLess(10 * torch.log10(default.sum() / exact.sum()).item(), 0.1)

    def test_nothing_to_do(self):
        self.assertEqual(cpu.kernels().search(torch.empty(0, 256), 3, "mul1").shape, (0, 256))

    @parameterized.expand([(5,), (0,)])
    def test_search_takes_any_layout(self, count):
        tiles = normal(256, 2 * count)[:, ::2].T
        torch.testing.assert_close(
            cpu.kernels().search(tiles, 4, "mul1"), cpu.kernels().search(tiles.contiguous(), 4, "mul1"), rtol=0, atol=0
        )

    def test_search_refuses_what_it_cannot_read(self):
        for tiles in (normal(2, 256).double(), normal(2, 128), normal(256), torch.empty(2, 256, device="meta")):
            with self.assertRaisesRegex(ValueError, "tiles must be float32"):
                cpu.kernels().search(tiles, 4, "mul1")
        with self.assertRaisesRegex(ValueError, "finite"):
            cpu.kernels().search(torch.full((1, 256), float("nan")), 4, "mul1")
        with self.assertRaisesRegex(ValueError, "no rate"):
            cpu.kernels().search(normal(1, 256), 4.5, "mul1")
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook"):
            cpu.kernels().search(normal(1, 256), 4, "mul2")

    def test_stale_library_is_named(self):
        with patch.object(cpu.kernels(), "ABI_VERSION", -1), self.assertRaisesRegex(ImportError, "install it again"):
            cpu.kernels().load(cpu.LIBRARY)

    @parameterized.expand(RATES_AND_CODEBOOKS)
    @slow
    def test_search_error_on_many_weights(self, bits, codebook):
        tiles = codable_tiles(2048, bits, codebook)
        error = (
            squared_error(tiles, cpu.kernels().search(tiles, bits, codebook), codebook).sum() / tiles.square().sum()
        )
        gap = 10 * torch.log10(error * 4**bits)
        if bits in EXACT_ERRORS[codebook]:
            exact = 10 * torch.log10(torch.tensor(EXACT_ERRORS[codebook][bits] * 4**bits))
            # The figures come from few samples, which miss what is rarely far out and weighs most at high rates.
            self.assertLess((gap - exact).item(), 0.1 if bits < 6 else 0.3)
        else:
            self.assertLess(gap.item(), 0.7)


@require_torch
class Exl3MissingKernelsTest(unittest.TestCase):
    def test_missing_library_is_told_once(self):
        cpu._found.cache_clear()
        self.addCleanup(cpu._found.cache_clear)
        logger = logging.get_logger(cpu.__name__)
        with patch.object(cpu, "LIBRARY", Path("nowhere", "_cpu.so")), CaptureLogger(logger) as captured:
            self.assertFalse(cpu.is_available())
            self.assertFalse(cpu.is_available())
            with self.assertRaisesRegex(RuntimeError, "not there"):
                cpu.kernels().search(normal(1, 256), 4, "mul1")
        self.assertEqual(captured.out.count("compiled CPU kernels of EXL3 are missing"), 1)
        self.assertIn("C++ compiler", captured.out)


@require_torch
class Exl3QuantizeWeightTest(unittest.TestCase):
    def test_shapes_and_dtypes(self):
        trellis, suh, svh = quantize(normal(130, 200), 2.5)
        self.assertEqual((trellis.dtype, *trellis.shape), (torch.int16, 16, 16, 40))
        self.assertEqual((suh.dtype, *suh.shape, svh.dtype, *svh.shape), (torch.float16, 256, torch.float16, 256))
        self.assertEqual((suh[200:].count_nonzero(), svh[130:].count_nonzero()), (0, 0))

    @parameterized.expand([(2, 0.07), (3, 0.018), (4, 0.0046)])
    @require_compiled
    def test_error_is_near_that_of_the_search(self, bits, bound):
        weight = normal(512, 512) * normal(512, seed=1).abs().add(0.2) * 0.02
        self.assertLess(relative_error(quantize(weight, bits), weight), bound)

    @require_compiled
    def test_blocks_of_unequal_magnitude_are_evened_out(self):
        weight = normal(256, 256)
        weight[:128] *= 100
        weight[:, :128] *= 0.01
        quantized = quantize(weight, 4)
        for rows in (slice(0, 128), slice(128, 256)):
            for columns in (slice(0, 128), slice(128, 256)):
                difference = dequantize(*quantized, "mul1", weight.shape)[rows, columns] - weight[rows, columns]
                error = difference.square().mean() / weight[rows, columns].square().mean()
                self.assertLess(error.item(), 0.005)

    @parameterized.expand(["float64", "float32", "float16", "bfloat16"])
    def test_every_dtype(self, dtype):
        weight = normal(20, 30).to(getattr(torch, dtype))
        self.assertLess(relative_error(quantize(weight), weight), 0.03)

    @parameterized.expand([(1, 1), (1, 300), (129, 1), (127, 257)])
    def test_every_size(self, out, into):
        weight = normal(out, into)
        self.assertLess(relative_error(quantize(weight), weight), 0.03)

    def test_threads_do_not_change_the_bytes(self):
        weight = normal(200, 300)
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize(weight, 3))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)

    def test_strips_do_not_change_the_bytes(self):
        weight = normal(300, 100)
        expected = quantize(weight)
        done = []
        with patch.object(encoder, "STRIP_ELEMENTS", 1):
            result = quantize(weight, progress=done.append)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        self.assertEqual(done, [12800, 12800, 4400])

    def test_layout_of_the_weight_does_not_matter(self):
        weight = normal(100, 300)
        expected = quantize(weight)
        result = quantize(weight.T.contiguous().T.requires_grad_())
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        self.assertFalse(any(tensor.requires_grad for tensor in result))

    def test_zeros(self):
        trellis, suh, svh = quantize(torch.zeros(100, 200))
        self.assertEqual((suh.count_nonzero(), svh.count_nonzero()), (0, 0))
        torch.testing.assert_close(format.pack_states(format.unpack_states(trellis), 3), trellis, rtol=0, atol=0)

    def test_channels_of_zeros_stay_zero(self):
        weight = normal(140, 150)
        weight[5], weight[:, 9] = 0, 0
        _, suh, svh = quantized = quantize(weight)
        self.assertEqual((svh[5], suh[9]), (0, 0))
        self.assertEqual((svh[:140].count_nonzero(), suh[:150].count_nonzero()), (139, 149))
        self.assertLess(relative_error(quantized, weight), 0.03)

    def test_constant_matrix(self):
        weight = torch.ones(128, 256)
        self.assertLess(relative_error(quantize(weight), weight), 0.1)

    @parameterized.expand([(1e-7,), (1e-3,), (1e4,), (1e8,)])
    def test_scales_share_the_magnitude(self, magnitude):
        weight = normal(128, 128) * magnitude
        _, suh, svh = quantized = quantize(weight)
        self.assertLess(relative_error(quantized, weight), 0.02)
        for scale in (suh, svh):
            self.assertTrue(torch.isfinite(scale).all())
            self.assertGreaterEqual(scale.abs().min().item(), torch.finfo(torch.float16).smallest_normal)

    @parameterized.expand([("float32", 1e-30), ("float32", 1e-44), ("float64", 1e-310)])
    def test_too_small_for_fp16_becomes_zero(self, dtype, magnitude):
        weight = normal(16, 16).to(getattr(torch, dtype)) * magnitude
        _, suh, svh = quantize(weight)
        self.assertEqual((suh.count_nonzero(), svh.count_nonzero()), (0, 0))

    @parameterized.expand([("float32", 1e30), ("float64", 1e300)])
    def test_too_large_for_fp16(self, dtype, magnitude):
        with self.assertRaisesRegex(ValueError, "too large for fp16"):
            quantize(normal(16, 16).to(getattr(torch, dtype)) * magnitude)

    def test_values_that_are_not_finite_are_located(self):
        weight = normal(300, 70)
        weight[129, 3], weight[130, 0], weight[299, 69] = float("inf"), float("nan"), float("-inf")
        with self.assertRaisesRegex(ValueError, r"3 of 21000 values are not finite, the first of them at \[129, 3\]"):
            quantize(weight)

    def test_what_is_no_matrix(self):
        for weight in (torch.empty(0, 5), torch.empty(5, 0), normal(5), normal(2, 3, 4), torch.ones(5, 5).int()):
            with self.assertRaisesRegex(ValueError, "matrices of floating point numbers"):
                quantize(weight)

    def test_unknown_rate_and_codebook(self):
        with self.assertRaisesRegex(ValueError, "no rate of 0.5 bits"):
            quantize(normal(5, 5), 0.5)
        with self.assertRaisesRegex(ValueError, "unknown EXL3 codebook 'no'"):
            quantize(normal(5, 5), 2, "no")


@require_torch
class Exl3EmbeddingEncoderTest(unittest.TestCase):
    def quantize(self, table, bits=4, **options):
        best = cpu.kernels().search if cpu.LIBRARY.is_file() else search.search_reference
        return encoder.quantize_embedding(table, bits, search=best, **options)

    def rows(self, quantized, width):
        return ops.embedding(torch.arange(len(quantized[0])), *quantized, width)

    @parameterized.expand([bits for bits in BITS if bits == int(bits)])
    def test_the_error_is_that_of_the_search(self, bits):
        """On rows whose rings are whole; with scales of their own rings have less error at 8 bits than tiles have by one for all."""
        table = normal(48, 512)
        trellis, signs = quantized = self.quantize(table, bits)
        self.assertEqual((trellis.dtype, list(trellis.shape)), (torch.int16, [48, 2 * (1 + 16 * bits)]))
        self.assertEqual((signs.dtype, list(signs.shape)), (torch.float16, [2, 256]))
        self.assertEqual(signs.abs().unique().tolist(), [1])
        relative = float((self.rows(quantized, 512) - table).square().sum() / table.square().sum())
        self.assertLess(relative, (0.96 if bits == 8 else 1.02) * EXACT_ERRORS["mul1"][bits])
        self.assertGreater(relative, 4.0**-bits)

    def test_states_pack_and_unpack(self):
        for bits in (1, 3, 8):
            states = search.search_reference(codable_tiles(2, bits, "mul1"), bits, "mul1")
            words = format.pack_embedding_states(states, bits)
            self.assertEqual((words.dtype, list(words.shape)), (torch.int16, [2, 16 * bits]))
            torch.testing.assert_close(format.unpack_embedding_states(words), states, rtol=0, atol=0)

    def test_scales_are_those_of_the_least_squared_error(self):
        table = normal(5, 256)
        trellis, signs = self.quantize(table, 2)
        rings = hadamard(table * signs.float(), 256).double()
        values = format.codebook_values("mul1")[format.unpack_embedding_states(trellis[:, 1:])].double()
        best = (rings * values).sum(1) / values.square().sum(1)
        torch.testing.assert_close(format.embedding_scales(trellis, 1).flatten(), best.half(), rtol=0, atol=0)

    @parameterized.expand([1, 100, 255, 256, 257, 640])
    def test_any_width(self, width):
        table = normal(7, width).bfloat16()
        rows = self.rows(self.quantize(table, 6), width)
        self.assertLess(float((rows - table).norm() / table.float().norm()), 0.02)

    def test_each_row_has_its_own_magnitude(self):
        table = normal(6, 300) * torch.tensor([1e-3, 1, 1e3, 0, 1e-30, 1e-5])[:, None]
        rows = self.rows(self.quantize(table, 6), 300)
        for row in (0, 1, 2, 5):
            self.assertLess(float((rows[row] - table[row]).norm() / table[row].norm()), 0.03)
        self.assertEqual(int(rows[3:5].count_nonzero()), 0)  # zeros, and what fp16 has no scale for
        with self.assertRaisesRegex(ValueError, "too large for fp16"):
            self.quantize(normal(2, 300) * 1e30)

    def test_threads_and_strips_do_not_change_the_bytes(self):
        table, results, done = normal(20, 300), [], []
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        for count, strip in ((1, 1 << 19), (2, 1), (3, 3000)):
            torch.set_num_threads(count)
            with patch.object(encoder, "STRIP_ELEMENTS", strip):
                results.append(self.quantize(table, 3, progress=done.append))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)
        self.assertEqual((sum(done), len(done)), (3 * 20 * 300, 1 + 20 + 4))

    def test_what_cannot_be_quantized(self):
        for table, bits, message in (
            (normal(5), 4, "matrices of floating point numbers"),
            (torch.full((2, 2), float("nan")), 4, r"4 of 4 values are not finite"),
            (normal(5, 5), 2.5, "no embedding tables of 2.5 bits"),
            (normal(5, 5), 9, "no rate of 9 bits"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                self.quantize(table, bits)


@require_torch
class Exl3SignsTest(unittest.TestCase):
    def test_signs_never_change(self):
        # Golden: other signs would give other files for the same model.
        signs = [encoder.random_signs(32, seed, side) for seed in (0, encoder.seed_of("lm_head")) for side in (0, 1)]
        self.assertEqual(
            [sum(1 << i for i in range(32) if row[i] < 0) for row in signs],
            [0x08E90AD6, 0x9B131735, 0x9F8CE05A, 0xC264A6B0],
        )

    def test_signs_are_balanced_and_differ(self):
        rows = torch.stack([encoder.random_signs(4096, seed, side) for seed in range(8) for side in (0, 1)])
        products = rows @ rows.T / 4096
        self.assertLess((products - torch.eye(16)).abs().max().item(), 0.08)
        self.assertLess(rows.mean(1).abs().max().item(), 0.08)

    def test_seed_comes_from_the_name(self):
        self.assertEqual(encoder.seed_of("model.layers.0.self_attn.q_proj"), 3874122413)


if __name__ == "__main__":
    unittest.main()
