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
"""The Triton kernels where they belong, and what happens on a GPU without a working Triton (for which none is needed)."""

import copy
import sys
import unittest
from unittest import mock

import torch
from parameterized import parameterized

from transformers.integrations.exl3 import encoder, encoding, format, ops, search
from transformers.integrations.exl3.format import hadamard
from transformers.integrations.exl3.kernels import DTYPES, cpu
from transformers.integrations.exl3.kernels.triton import gpu
from transformers.testing_utils import require_torch, require_torch_accelerator, slow, torch_device

from .triton_cases import (
    TOLERANCE,
    Layer,
    all_codes,
    experts_of_a_model,
    grouped_linear,
    random_trellis,
    relative_error,
    require_compiler,
    require_triton,
    search_case,
    stack_of,
)


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
        for function in (gpu.kernels, gpu._imports, gpu._works, gpu._warn, gpu.has_search):
            function.cache_clear()

    def test_missing_triton_is_told_once(self):
        missing = {name: None for name in list(sys.modules) if name.startswith("triton.")} | {"triton": None}
        package = sys.modules["transformers.integrations.exl3.kernels.triton"]
        ours = {name for name in sys.modules if name.startswith(f"{package.__name__}.")} - {
            gpu.__name__,
        }
        kept = {name: sys.modules.pop(name) for name in ours}
        attributes = {name.rpartition(".")[2]: module for name, module in kept.items()}
        for name in attributes:
            delattr(package, name)
        try:
            with (
                mock.patch.dict(sys.modules, missing),
                self.assertLogs("transformers.integrations.exl3.kernels.triton.gpu", "WARNING") as logs,
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
        with broken, self.assertLogs("transformers.integrations.exl3.kernels.triton.gpu", "WARNING") as logs:
            self.assertFalse(gpu.is_available(torch.device("cuda:0")))
            self.assertFalse(gpu.is_available(torch.device("cuda:1")))
        self.assertEqual(len(logs.output), 1)
        self.assertIn("RuntimeError: no C compiler", logs.output[0])

    @require_triton
    def test_broken_search_is_told_once(self):
        device = torch.device("cpu")  # instead of a GPU
        for broken, message in (
            ({"side_effect": RuntimeError("no assembler")}, "RuntimeError: no assembler"),
            ({"return_value": torch.zeros(2, format.TILE_SIZE, dtype=torch.int32)}, "other states than the reference"),
        ):
            self._forget()
            with (
                mock.patch.object(gpu.kernels(), "search", **broken) as broken_search,
                self.assertLogs("transformers.integrations.exl3.kernels.triton.gpu", "WARNING") as logs,
            ):
                self.assertFalse(gpu.has_search(device) or gpu.has_search(device))
            self.assertEqual((len(logs.output), broken_search.call_count), (1, 1))
            self.assertIn(message, logs.output[0])

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
        for dtype in DTYPES:
            expected = format.decode(trellis, codebook).to(dtype)
            torch.testing.assert_close(gpu.kernels().decode(trellis, codebook, dtype), expected, rtol=0, atol=0)
            stored = trellis.transpose(0, 1).contiguous().transpose(0, 1)
            torch.testing.assert_close(
                gpu.kernels().decode(stored[:, 8:], codebook, dtype), expected[:, 128:], rtol=0, atol=0
            )

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
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=0, atol=0)

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
                torch.testing.assert_close(y, expected, rtol=0, atol=0)
                static.zero_()

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA graphs")
    def test_experts_in_a_graph(self):
        """One graph for any distribution of rows over experts; nothing has to run before it but the compiler."""
        experts, rows = 16, 64
        layers = [Layer(1024, 512, 4, bias=True, device=torch_device, seed=i) for i in range(experts)]
        x = layers[0].inputs(rows, torch.bfloat16)
        bounds = torch.zeros(experts + 1, dtype=torch.long, device=torch_device)
        grouped_linear(layers, x, bounds)
        stacks = stack_of(layers)  # these have not been multiplied before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gpu.kernels().grouped_linear(x, bounds.unfold(0, 2, 1), *stacks, "mul1", 512)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            owners = torch.randint(0, (1, 3, experts)[seed % 3], (rows,), generator=generator).sort().values
            bounds.copy_(torch.searchsorted(owners, torch.arange(experts + 1)))
            graph.replay()
            exact = torch.cat([layers[owner].exact(x[row : row + 1]) for row, owner in enumerate(owners)])
            self.assertLess(relative_error(y, exact), TOLERANCE[torch.bfloat16])

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA graphs")
    @torch.no_grad()
    def test_experts_of_a_model_in_a_graph(self):
        module = experts_of_a_model()
        on_device = copy.deepcopy(module).to(torch_device)
        x, index, weights = torch.randn(9, 128), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
        static = [tensor.to(torch_device) for tensor in (x, index, weights)]
        on_device(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = on_device(*static)
        for experts in (4, 3, 1):
            index %= experts
            static[1].copy_(index)
            graph.replay()
            self.assertLess(relative_error(y.cpu(), module(x, index, weights).double()), 1e-5)

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA graphs")
    @torch.no_grad()
    def test_experts_of_a_model_compile_to_graphs(self):
        module = experts_of_a_model().to(torch_device)
        x, index, weights = torch.randn(9, 128), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
        inputs = [tensor.to(torch_device) for tensor in (x, index, weights)]
        compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
        found = [compiled(*inputs).clone() for _ in range(4)]
        for y in found:
            self.assertLess(relative_error(y, module(*inputs).double()), 1e-5)

    @parameterized.expand(all_codes())
    def test_search_finds_the_states_of_the_cpu(self, bits, codebook):
        tiles = torch.randn(300, format.TILE_SIZE, generator=torch.Generator().manual_seed(0))
        tiles *= search.INPUT_RMS[codebook][bits]
        tiles[::7, ::37] *= 5  # some saturate
        for effort in search.EFFORTS:
            expected = self._search_on_cpu(tiles[:40] if effort == "exact" else tiles, bits, codebook, effort)
            found = gpu.kernels().search(tiles[: len(expected)].to(torch_device), bits, codebook, effort)
            with self.subTest(effort=effort):
                torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)

    @parameterized.expand([(bits, cost) for bits in (1, 2.5, 4, 8) for cost in ("integer", "fp32")])
    def test_search_on_less_scratch(self, bits, cost):
        """More tiles than there are programs for, whose number does not change the states."""
        from transformers.integrations.exl3.kernels.triton import search as triton_search
        from transformers.integrations.exl3.kernels.triton.target import target_of

        case = search_case(37, bits, "mul1", cost, device=torch_device)
        expected = search.reference_kernel(*case)
        for scratch in (1, 1 << 24, triton_search.SCRATCH_BYTES):
            with mock.patch.object(triton_search, "SCRATCH_BYTES", scratch):
                triton_search.choose_search.cache_clear()
                self.addCleanup(triton_search.choose_search.cache_clear)
                found = triton_search.kernel(*case, target_of(case[0].device))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_quantized_weights_have_the_bytes_of_the_cpu(self):
        """What surrounds the search, too: elementwise operations in a fixed order, each of them rounded as IEEE 754 says."""
        weight = torch.randn(1000, 700, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        expected = encoding.encode(weight, 3, "mul1", 7)
        with mock.patch.object(encoder, "search_reference", side_effect=AssertionError("the reference was used")):
            found = encoding.encode(weight.to(torch_device), 3, "mul1", 7)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)

    @unittest.skipUnless(torch.cuda.is_available(), "needs the allocator's statistics")
    def test_memory_of_quantizing(self):
        from transformers.integrations.exl3.kernels.triton import search as triton_search

        weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device=torch_device)
        encoding.encode(weight[:128], 4, "mul1", 0)
        for bits in (1, 4, 8):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            encoding.encode(weight, bits, "mul1", 0)
            strip = encoder.ACCELERATOR_STRIP_ELEMENTS * torch.float64.itemsize
            limit = triton_search.SCRATCH_BYTES + 12 * strip + weight.numel() * bits // 8
            self.assertLess(torch.cuda.max_memory_allocated() - before, limit)

    @staticmethod
    def _search_on_cpu(tiles, *arguments):
        kernel = cpu.kernels().search if cpu.is_available() else search.search_reference
        return kernel(tiles, *arguments)

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
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_several_devices(self):
        if self.module.device_count() < 2:
            self.skipTest("needs two devices")
        kind = torch.device(torch_device).type
        results = []
        for index in (1, 0):  # the current device is 0
            layer = Layer(4096, 1024, 4, device=f"{kind}:{index}")
            results.append(layer.linear(layer.inputs(1)).cpu())
        torch.testing.assert_close(*results, rtol=0, atol=0)
        tiles = torch.randn(8, format.TILE_SIZE)
        found = [gpu.kernels().search(tiles.to(f"{kind}:{index}"), 4, "mul1").cpu() for index in (1, 0)]
        torch.testing.assert_close(*found, rtol=0, atol=0)

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
        torch.testing.assert_close(
            gpu.kernels().decode(trellis, "mul1", torch.float16)[-128:, -128:], expected, rtol=0, atol=0
        )
        suh, svh = (torch.ones(n * 16, device=torch_device) for n in trellis.shape[:2])
        x = torch.zeros(1, suh.shape[0], device=torch_device)
        x[:, -128:] = 1
        y = gpu.kernels().linear(x, trellis, suh, svh, None, "mul1", svh.shape[0])[:, -128:]
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
