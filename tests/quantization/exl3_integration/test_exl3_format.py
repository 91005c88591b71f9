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

import hashlib
import unittest
from pathlib import Path
from unittest.mock import patch

from parameterized import parameterized

from transformers.testing_utils import require_torch
from transformers.utils import is_torch_available


if is_torch_available():
    import torch
    from safetensors import safe_open

    from transformers.integrations.exl3 import format, grouped, ops
    from transformers.integrations.exl3.format import hadamard

    from .synthetic import random_linear


VECTORS = Path(__file__).parent / "fixtures" / "vectors"
LINEARS = sorted(path.stem for path in VECTORS.glob("k*.safetensors"))
CODEBOOKS = ("3inst", "mcg", "mul1")
BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)


def read_vector(name):
    with safe_open(VECTORS / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def read_linear(name):
    """Trellis, both scales, bias (or None), codebook: the arguments of the operators. And all that the vector holds."""
    tensors, metadata = read_vector(name)
    suh, svh = (
        tensors[scale] if scale in tensors else format.unpack_signs(tensors[sign])
        for scale, sign in (("suh", "su"), ("svh", "sv"))
    )
    return (tensors["trellis"], suh, svh, tensors.get("bias"), metadata["codebook"]), tensors


def assert_same_bits(result, expected):
    assert result.dtype == expected.dtype, (result.dtype, expected.dtype)
    torch.testing.assert_close(result.view(torch.int16), expected.view(torch.int16), rtol=0, atol=0)


def rms_error(result, expected):
    return float(((result.float() - expected) ** 2).mean().sqrt() / (expected**2).mean().sqrt())


@require_torch
class Exl3VectorsTest(unittest.TestCase):
    """What the reference implementation decodes, bit for bit."""

    def test_all_vectors_are_there(self):
        self.assertEqual(len(LINEARS), 19)

    @parameterized.expand(LINEARS)
    def test_decodes_to_the_same_bits(self, name):
        tensors, metadata = read_vector(name)
        inner = format.decode(tensors["trellis"], metadata["codebook"])
        assert_same_bits(inner, tensors["inner"])
        self.assertEqual(hashlib.sha256(inner.numpy().tobytes()).hexdigest(), metadata["inner_sha256"])
        self.assertEqual(format.bits_of(tensors["trellis"]), float(metadata["K"]))
        self.assertEqual([str(size) for size in inner.shape], [metadata["in_features"], metadata["out_features"]])

    @parameterized.expand(LINEARS)
    def test_states(self, name):
        tensors, metadata = read_vector(name)
        states = format.unpack_states(tensors["trellis"])
        torch.testing.assert_close(states[0, 0], tensors["states_first"], rtol=0, atol=0)
        torch.testing.assert_close(states[-1, -1], tensors["states_last"], rtol=0, atol=0)
        packed = format.pack_states(states, float(metadata["K"]))
        self.assertEqual(packed.dtype, torch.int16)
        torch.testing.assert_close(packed, tensors["trellis"], rtol=0, atol=0)

    @parameterized.expand(LINEARS)
    def test_codebook_markers(self, name):
        tensors, metadata = read_vector(name)
        marker = format.marker(metadata["codebook"])
        stored = {key: tensors[key] for key in format.MARKERS if key in tensors}
        self.assertEqual(set(stored), {metadata["codebook"]} & set(format.MARKERS))
        for value in stored.values():
            self.assertEqual((value.dtype, value.shape), (marker.dtype, marker.shape))
            self.assertEqual(value.item(), marker.item())

    @parameterized.expand(LINEARS)
    def test_outputs(self, name):
        arguments, tensors = read_linear(name)
        x, y = tensors["x"], tensors["y"]
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
            result = ops.linear(x.to(dtype), *arguments, y.shape[-1])
            self.assertEqual((result.dtype, result.shape), (dtype, y.shape))
            self.assertLessEqual(rms_error(result, y), tolerance, dtype)

    @parameterized.expand(LINEARS)
    def test_the_dequantized_weight_gives_the_same_outputs(self, name):
        (trellis, suh, svh, bias, codebook), tensors = read_linear(name)
        weight = ops.dequantize(trellis, suh, svh, codebook)
        self.assertEqual((weight.dtype, weight.shape), (torch.float32, (svh.shape[0], suh.shape[0])))
        if "W" in tensors:
            difference = (weight - tensors["W"].T).abs().max()
            self.assertLessEqual(float(difference / tensors["W"].abs().max()), 1e-6)
        result = torch.nn.functional.linear(tensors["x"], weight, None if bias is None else bias.float())
        self.assertLessEqual(rms_error(result, tensors["y"]), 1e-5)

    def test_two_vectors_have_the_whole_weight(self):
        self.assertEqual(sum("W" in read_vector(name)[0] for name in LINEARS), 2)

    @parameterized.expand(CODEBOOKS)
    def test_codebooks(self, codebook):
        expected, _ = read_vector("codebooks")
        assert_same_bits(format.codebook_values(codebook), expected[codebook])

    def test_packed_signs(self):
        name = next(name for name in LINEARS if name.endswith("_legacy"))
        tensors, _ = read_vector(name)
        for sign in ("su", "sv"):
            features = torch.arange(16 * tensors[sign].shape[0])
            words = tensors[sign].to(torch.int32) & 0xFFFF
            expected = 1.0 - 2.0 * ((words[features // 16] >> (features % 16)) & 1)
            assert_same_bits(format.unpack_signs(tensors[sign]), expected.half())

    def test_embedding_table(self):
        tensors, _ = read_vector("embed_ring_k4_6x640")
        expected = tensors["embedding"]
        self.assertEqual(format.embedding_bits(tensors["trellis"], tensors["signs"]), 4)
        for ids in (
            torch.arange(6),
            torch.tensor([[5, 0], [3, 3]]),
            torch.tensor(2),
            torch.empty(0, dtype=torch.int32),
        ):
            rows = ops.embedding(ids, tensors["trellis"], tensors["signs"], 640)
            self.assertEqual((rows.dtype, rows.shape), (torch.float32, (*ids.shape, 640)))
            if ids.numel():
                self.assertLessEqual(float((rows - expected[ids.long()]).abs().max() / expected.abs().max()), 1e-6)


@require_torch
class Exl3FormatTest(unittest.TestCase):
    @parameterized.expand(BITS)
    def test_any_codes_are_a_ring_that_packs_again(self, bits):
        for dtype in (torch.int16, torch.uint16):
            generator = torch.Generator().manual_seed(0)
            words = torch.randint(-(1 << 15), 1 << 15, (2, 3, int(16 * bits)), generator=generator).to(torch.int16)
            trellis = words.view(dtype)
            states = format.unpack_states(trellis)
            self.assertEqual((states.dtype, states.shape), (torch.int32, (2, 3, 256)))
            torch.testing.assert_close(format.pack_states(states, bits), words, rtol=0, atol=0)
            ends = torch.tensor(format.stream_ends(bits))
            added = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
            self.assertEqual(ends[-1].item(), 256 * bits)
            self.assertEqual(sorted(set(added.tolist())), sorted({int(bits), int(bits + 0.5)}))
            shifted = (states.roll(1, -1) << added) & 0xFFFF
            torch.testing.assert_close(states >> added << added, shifted, rtol=0, atol=0)

    def test_no_other_rates(self):
        for bits in (0, 0.5, 4.5, 5.5, 9, 16, 3.25):
            with self.assertRaisesRegex(ValueError, f"no rate of {bits:g} bits per weight, it has 1, 1.5, 2"):
                format.check_bits(bits)
        self.assertIsInstance(format.check_bits(4.0), int)
        self.assertEqual(format.check_bits(2.5), 2.5)

    def test_rates_are_those_of_the_config(self):
        self.assertEqual(format.BITS, BITS)
        self.assertEqual(format.CODEBOOKS, CODEBOOKS)

    def test_tiles_make_up_a_matrix(self):
        matrix = torch.arange(48 * 32).view(48, 32)
        tiles = format.matrix_to_tiles(matrix)
        self.assertEqual(tiles.shape, (3, 2, 256))
        torch.testing.assert_close(format.tiles_to_matrix(tiles), matrix, rtol=0, atol=0)
        for t in (0, 1, 2, 7, 8, 100, 255):
            lane, j = t >> 3, t & 7
            row = 2 * (lane % 4) + (j & 1) + 8 * ((j >> 1) & 1)
            column = (lane >> 2) + 8 * (j >> 2)
            self.assertEqual(tiles[2, 1, t].item(), matrix[32 + row, 16 + column].item())

    def test_unknown_codebook(self):
        with self.assertRaisesRegex(ValueError, "'qtip'.*3inst, mcg, mul1"):
            format.codebook_values("qtip")
        self.assertIsNone(format.marker("3inst"))

    @parameterized.expand([(1, 128), (127, 128), (128, 128), (129, 256), (2880, 2944), (0, 0)])
    def test_padded_sizes(self, features, expected):
        self.assertEqual(format.padded(features), expected)

    @parameterized.expand(
        [((6, 50), (3, 256)), ((6, 51), (3, 255)), ((6, 48), (3, 256)), ((6, 3), (3, 256)), ((6,), (3, 256))]
    )
    def test_shapes_that_are_no_embedding_table(self, trellis, signs):
        with self.assertRaisesRegex(ValueError, r"no EXL3 embedding table, whose shapes are \[vocab"):
            format.embedding_bits(torch.empty(trellis, dtype=torch.int16), torch.empty(signs))

    @parameterized.expand([2, 128, 256])
    def test_hadamard_rotation(self, block):
        identity = torch.eye(block, dtype=torch.float64)
        matrix = hadamard(identity, block)
        index = torch.arange(block)
        parity = (index[:, None] & index).apply_(lambda value: value.bit_count() & 1)
        torch.testing.assert_close(matrix, (1.0 - 2.0 * parity).double() * block**-0.5, rtol=1e-14, atol=0)
        torch.testing.assert_close(matrix @ matrix, identity, rtol=0, atol=1e-14)
        x = torch.randn(3, 2, 2 * block, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(hadamard(hadamard(x, block), block), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(hadamard(x, block)[..., block:], hadamard(x[..., block:], block), rtol=0, atol=0)

    def test_hadamard_keeps_dtype_and_gives_the_same_bits_each_time(self):
        x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(hadamard(x)[3], hadamard(x[3]), rtol=0, atol=0)
        torch.testing.assert_close(hadamard(x.T.contiguous().T), hadamard(x), rtol=0, atol=0)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            self.assertEqual(hadamard(x.to(dtype)).dtype, dtype)


@require_torch
class Exl3OperatorsTest(unittest.TestCase):
    def layer(self, in_features, out_features, bias=False, dtype=None, **kwargs):
        """Arguments of `ops.linear` after `x`, and the dense weight."""
        values = torch.linspace(-1, 1, out_features) if bias else None
        tensors, weight = random_linear(out_features, in_features, bias=values, **kwargs)
        codebook = next((name for name in format.MARKERS if name in tensors), "3inst")
        scales = (tensors["suh"], tensors["svh"])
        bias = None if values is None else tensors["bias"].to(dtype or torch.float16)
        return (tensors["trellis"], *scales, bias, codebook, out_features), weight

    def assert_close(self, result, expected, tolerance=1e-5):
        self.assertEqual(result.shape, expected.shape)
        result, expected = result.detach(), expected.detach()
        self.assertLessEqual(float((result - expected).abs().max()), tolerance * float(expected.abs().max()))

    @parameterized.expand([(128, 128), (100, 128), (128, 100), (130, 257), (1, 1), (300, 5)])
    def test_padding_on_both_sides(self, in_features, out_features):
        arguments, weight = self.layer(in_features, out_features, bias=True)
        x = torch.randn(5, in_features)
        result = ops.linear(x, *arguments)
        bias = arguments[3][:out_features].float()
        self.assert_close(result, x @ weight.T + bias)
        grad = torch.randn(5, out_features)
        result = ops.linear_input_grad(grad, *arguments[:3], arguments[4], in_features)
        self.assert_close(result, grad @ weight)

    def test_a_bias_without_padding(self):
        arguments, _ = self.layer(130, 100, bias=True)
        x = torch.randn(2, 130)
        unpadded = (*arguments[:3], arguments[3][:100].clone(), *arguments[4:])
        torch.testing.assert_close(ops.linear(x, *unpadded), ops.linear(x, *arguments), rtol=0, atol=0)

    @parameterized.expand([((),), ((1,),), ((4,),), ((2, 3, 4),), ((0,),), ((2, 0, 3),)])
    def test_leading_dimensions(self, leading):
        arguments, weight = self.layer(200, 140)
        x = torch.randn(*leading, 200)
        result = ops.linear(x, *arguments)
        self.assertEqual((result.shape, result.dtype), ((*leading, 140), x.dtype))
        grad = ops.linear_input_grad(result, *arguments[:3], arguments[4], 200)
        self.assertEqual((grad.shape, grad.dtype), (x.shape, x.dtype))
        if x.numel():
            self.assert_close(result, x @ weight.T)

    @parameterized.expand([(1,), (ops.FEW_ROWS,)])
    def test_inputs_that_are_not_contiguous(self, rows):
        arguments, _ = self.layer(256, 128)
        x = torch.randn(256, 4, rows).permute(2, 1, 0)
        self.assertFalse(x.is_contiguous())
        expanded = torch.randn(1, 256).expand(3 * rows, 256)
        for x in (x, x[:, 1], torch.randn(256, 5 * rows).T, expanded):
            torch.testing.assert_close(
                ops.linear(x, *arguments), ops.linear(x.clone().contiguous(), *arguments), rtol=0, atol=0
            )

    def test_strides_of_sizes_of_one_do_not_matter(self):
        arguments, weight = self.layer(1, 1)
        for x in (torch.randn(2, 5).T[:, :1], torch.randn(7, 3)[:1, :1], torch.randn(1).expand(4, 1)):
            self.assert_close(ops.linear(x, *arguments), x @ weight.T)
        x = torch.randn(1, 1, requires_grad=True)
        ops.linear(x, *arguments).sum().backward()  # an expanded gradient
        self.assert_close(x.grad, weight)

    def test_activations_beyond_float16(self):
        arguments, weight = self.layer(128, 128)
        x = torch.randn(3, 128).bfloat16() * 1e6
        result = ops.linear(x, *arguments)
        self.assertTrue(result.isfinite().all())
        self.assertLessEqual(rms_error(result, x.float() @ weight.T), 6e-3)

    @parameterized.expand(
        [(bits, codebook) for bits in BITS for codebook in CODEBOOKS if bits == int(bits) or codebook == "mul1"]
    )
    def test_every_rate_and_codebook(self, bits, codebook):
        arguments, weight = self.layer(256, 128, bits=bits, codebook=codebook)
        x = torch.randn(3, 256)
        self.assert_close(ops.linear(x, *arguments), x @ weight.T)
        self.assert_close(ops.dequantize(*arguments[:3], codebook), weight)

    @parameterized.expand([1, 1 << 15, 3 << 15])
    def test_strips_change_nothing(self, elements):
        arguments, _ = self.layer(256, 640, bias=True)
        rows = ops.FEW_ROWS + 3
        x, grad = torch.randn(rows, 256), torch.randn(rows, 640)

        def results():
            trellis, suh, svh, _, codebook, _ = arguments
            yield ops.linear(x, *arguments)
            yield ops.linear_input_grad(grad, trellis, suh, svh, codebook, 256)
            yield ops.dequantize(trellis, suh, svh, codebook)

        whole = list(results())
        with patch.object(ops, "STRIP_ELEMENTS", elements):
            self.assertEqual(len(ops._strips(40, 16)), {1: 5, 1 << 15: 5, 3 << 15: 2}[elements])
            cut = list(results())
        for result, expected in zip(cut, whole):
            self.assert_close(result, expected, 1e-6)
        torch.testing.assert_close(cut[2], whole[2], rtol=0, atol=0)

    @parameterized.expand([(1,), (ops.FEW_ROWS + 1,)])
    def test_arguments_that_do_not_fit_are_an_error(self, rows):
        (trellis, suh, svh, bias, codebook, out), _ = self.layer(256, 128, bias=True)
        x = torch.randn(rows, 256)

        def call(x=x, trellis=trellis, suh=suh, svh=svh, bias=bias, codebook=codebook, out=out):
            return ops.linear(x, trellis, suh, svh, bias, codebook, out)

        self.assertEqual(call().shape, (rows, 128))
        refused = {
            r"the input is torch.float32 \[\d+, (100|257)\], the quantized weight has 256 input features": [
                {"x": x[:, :100]},
                {"x": torch.randn(rows, 257)},
            ],
            r"the input is torch.float32 \[\]": [{"x": torch.tensor(1.0)}],
            "the input is torch.(int32|complex64|bool)": [{"x": x.int()}, {"x": x.to(torch.complex64)}, {"x": x > 0}],
            "do not fit a trellis of": [
                {"svh": svh[:64]},
                {"suh": suh[None]},
                {"suh": suh[0]},
                {"trellis": trellis[0]},
                {"trellis": trellis[:8]},
                {"trellis": trellis[None]},
            ],
            "output features of a quantized weight that has 128": [{"out": out} for out in (129, 0, -1, 1 << 40)],
            "a bias .* for 128 output features": [{"bias": bias[:127]}, {"bias": bias[None]}],
            "are on different devices: cpu, meta": [
                {name: value.to("meta")}
                for name, value in (("x", x), ("trellis", trellis), ("suh", suh), ("svh", svh), ("bias", bias))
            ],
            "a trellis is int16|trellis is torch.int32": [{"trellis": trellis.int()}],
            "unknown EXL3 codebook": [{"codebook": "mul2"}],
        }
        for message, cases in refused.items():
            for case in cases:
                with self.subTest(case=list(case)), self.assertRaisesRegex(ValueError, message):
                    call(**case)

    def test_other_operators_refuse_what_does_not_fit(self):
        (trellis, suh, svh, _, codebook, _), _ = self.layer(256, 128)
        grad, meta = torch.randn(2, 128), trellis.to("meta")
        with self.assertRaisesRegex(ValueError, "257 output features of a quantized weight that has 256"):
            ops.linear_input_grad(grad, trellis, suh, svh, codebook, 257)
        with self.assertRaisesRegex(
            ValueError, r"the input is torch.float32 \[2, 130\], the quantized weight has 128 input features"
        ):
            ops.linear_input_grad(torch.randn(2, 130), trellis, suh, svh, codebook, 256)
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            ops.linear_input_grad(grad, meta, suh, svh, codebook, 256)
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            ops.dequantize(meta, suh, svh, codebook)
        with self.assertRaisesRegex(ValueError, "do not fit a trellis of"):
            ops.dequantize(trellis, suh, torch.cat((svh, svh)), codebook)
        stacks = [torch.stack((tensor, tensor)) for tensor in (trellis, suh, svh)]
        x, ranges = torch.randn(5, 256), torch.tensor([[0, 2], [2, 5]])
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            grouped.grouped_linear(x, ranges, stacks[0].to("meta"), *stacks[1:], None, codebook, 128)

    def test_an_embedding_refuses_what_does_not_fit(self):
        table, _ = read_vector("embed_ring_k4_6x640")
        trellis, signs = table["trellis"], table["signs"]
        for ids in (6, -1, 1 << 40):
            with self.assertRaises(IndexError):
                ops.embedding(torch.tensor([ids]), trellis, signs, 640)
        for width in (512, 769, 0, -1):
            with self.assertRaisesRegex(ValueError, f"rows of {width} elements do not fit a table of 768"):
                ops.embedding(torch.tensor([1]), trellis, signs, width)
        with self.assertRaisesRegex(ValueError, "are no EXL3 embedding table"):
            ops.embedding(torch.tensor([1]), trellis[:, 1:], signs, 640)
        with self.assertRaisesRegex(ValueError, "different devices: cpu, meta"):
            ops.embedding(torch.tensor([1]), trellis.to("meta"), signs, 640)

    @parameterized.expand([(256, 128), (200, 130)])
    def test_gradients_are_those_of_the_dense_layer(self, in_features, out_features):
        arguments, weight = self.layer(in_features, out_features, bias=True, dtype=torch.float32)
        trellis, suh, svh, bias, *rest = arguments
        inputs = [torch.randn(2, 3, in_features), bias]
        x, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        dense_x, dense_bias = (tensor.clone().requires_grad_() for tensor in inputs)
        y = ops.linear(x, trellis, suh, svh, bias, *rest)
        dense_y = torch.nn.functional.linear(dense_x, weight, dense_bias[:out_features])
        self.assert_close(y, dense_y)
        target = torch.randn(2, 3, out_features)
        (y * target).tanh().sum().backward()
        (dense_y * target).tanh().sum().backward()
        self.assert_close(x.grad, dense_x.grad)
        self.assert_close(bias.grad, dense_bias.grad)

    def test_gradients_of_expanded_outputs_and_other_dtypes(self):
        arguments, weight = self.layer(128, 128)
        x = torch.randn(3, 128, requires_grad=True)
        ops.linear(x, *arguments).sum().backward()
        self.assert_close(x.grad, weight.sum(0).expand(3, 128))
        x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
        ops.linear(x, *arguments).sum().backward()
        self.assertEqual(x.grad.dtype, torch.bfloat16)
        self.assertLessEqual(rms_error(x.grad, weight.sum(0).expand(3, 128)), 6e-3)

    def test_quantized_tensors_need_no_gradient(self):
        arguments, _ = self.layer(128, 128)
        self.assertFalse(ops.linear(torch.randn(3, 128), *arguments).requires_grad)

    @parameterized.expand([(True, True), (True, False), (False, True), (False, False)])
    def test_linear_is_a_proper_operator(self, with_bias, requires_grad):
        (trellis, suh, svh, bias, *rest), _ = self.layer(200, 130, bias=with_bias, dtype=torch.float32)
        x = torch.randn(2, 200, requires_grad=requires_grad)
        bias = bias.requires_grad_(requires_grad) if with_bias else None
        torch.library.opcheck(ops.linear, (x, trellis, suh, svh, bias, *rest))

    def test_other_operators_are_proper_ones(self):
        (trellis, suh, svh, _, codebook, _), _ = self.layer(200, 130)
        torch.library.opcheck(ops.linear_input_grad, (torch.randn(2, 130), trellis, suh, svh, codebook, 200))
        torch.library.opcheck(ops.dequantize, (trellis, suh, svh, codebook))
        table, _ = read_vector("embed_ring_k4_6x640")
        ids = torch.tensor([[5, 0], [3, 3]])
        torch.library.opcheck(ops.embedding, (ids, table["trellis"], table["signs"], 640))
