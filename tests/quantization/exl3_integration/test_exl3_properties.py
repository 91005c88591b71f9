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
"""What holds for every rate, size, config and layout, on examples that hypothesis looks for (the same ones each time)."""

import json
import random
import tempfile
import unittest
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transformers import AutoModelForCausalLM, Exl3Config, Qwen3MoeConfig
from transformers.integrations.exl3 import format, ops
from transformers.integrations.exl3.checkpoint import read_checkpoint
from transformers.quantizers import AutoQuantizationConfig
from transformers.testing_utils import require_accelerate, require_torch

from .synthetic import SyntheticCheckpoint, random_linear, read_tensors
from .tiny_models import ONE_LAYER, tiny_inputs, tiny_model


hypothesis = pytest.importorskip("hypothesis")  # which upstream's tests do without
given, st = hypothesis.given, hypothesis.strategies


def examples(count):
    return hypothesis.settings(max_examples=count, deadline=None, derandomize=True, database=None)


seeds = st.integers(0, 2**31)
rates = st.sampled_from(
    [(bits, book) for bits in format.BITS for book in format.CODEBOOKS if bits == int(bits) or book == "mul1"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OWN_FIELDS = {
    "bits",
    "head_bits",
    "codebook",
    "modules_to_not_convert",
    "effort",
    "dequantize",
    "quant_method",
    "self",
}


def random_trellis(seed, rows, columns, bits):
    shape = (rows, columns, int(16 * bits))
    return torch.randint(-(1 << 15), 1 << 15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)


@require_torch
class Exl3FormatPropertiesTest(unittest.TestCase):
    @given(seeds, st.sampled_from(format.BITS))
    @examples(60)
    def test_states_are_windows_of_the_stream_of_bits(self, seed, bits):
        words = [word & 0xFFFF for word in random_trellis(seed, 1, 1, bits)[0, 0].tolist()]
        pairs = [words[i + 1] << 16 | words[i] for i in range(0, len(words), 2)]  # little-endian 32-bit words
        stream = "".join(f"{pair:032b}" for pair in pairs)
        ends = [int(bits * (index + 1)) for index in range(256)]
        windows = [(stream + stream)[len(stream) + end - 16 : len(stream) + end] for end in ends]
        states = format.unpack_states(random_trellis(seed, 1, 1, bits))[0, 0]
        self.assertEqual(states.tolist(), [int(window, 2) for window in windows])

    @given(seeds, st.integers(1, 4), st.integers(1, 4), st.sampled_from(format.BITS))
    @examples(40)
    def test_what_is_unpacked_packs_again(self, seed, rows, columns, bits):
        trellis = random_trellis(seed, rows, columns, bits)
        torch.testing.assert_close(format.pack_states(format.unpack_states(trellis), bits), trellis, rtol=0, atol=0)
        self.assertEqual(format.bits_of(trellis), bits)

    @given(seeds, st.integers(1, 5), st.integers(1, 5))
    @examples(30)
    def test_the_order_of_tiles_is_that_of_the_tensor_core(self, seed, rows, columns):
        matrix = torch.randn(16 * rows, 16 * columns, generator=torch.Generator().manual_seed(seed))
        tiles = format.matrix_to_tiles(matrix)
        torch.testing.assert_close(format.tiles_to_matrix(tiles), matrix, rtol=0, atol=0)
        row, column, place = seed % rows, seed % columns, seed % 256
        lane, register = place // 8, place % 8  # two operands of 16 x 8, four registers of a lane each
        inner_row = lane % 4 * 2 + register % 2 + register // 2 % 2 * 8
        inner_column = lane // 4 + register // 4 * 8
        self.assertEqual(tiles[row, column, place], matrix[16 * row + inner_row, 16 * column + inner_column])

    @given(st.integers(1, 10**9))
    @examples(50)
    def test_padded_is_the_next_multiple_of_a_block(self, features):
        padded = format.padded(features)
        self.assertEqual((padded % 128, 0 <= padded - features < 128), (0, True))

    @given(seeds, st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), rates)
    @examples(15)
    def test_padding_changes_nothing(self, seed, in_features, out_features, rows, rate):
        tensors, weight = random_linear(out_features, in_features, *rate, seed=seed)
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
        arguments = (tensors["trellis"], tensors["suh"], tensors["svh"])
        y = ops.linear(x, *arguments, None, rate[1], out_features)
        torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-4)
        wide = torch.nn.functional.pad(x, (0, format.padded(in_features) - in_features))
        padded = ops.linear(wide, *arguments, None, rate[1], format.padded(out_features))
        torch.testing.assert_close(padded[:, :out_features], y, rtol=0, atol=0)

    @given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8).filter(lambda bits: bits in format.BITS))
    @examples(30)
    def test_rows_of_an_embedding_table_have_their_scales(self, seed, rows, groups, bits):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.randn(rows, groups, 1, generator=generator).half()
        rings = torch.randint(-(1 << 15), 1 << 15, (rows, groups, 16 * bits), generator=generator).short()
        trellis = torch.cat((scales.view(torch.int16), rings), -1).flatten(1)
        torch.testing.assert_close(format.embedding_scales(trellis, groups), scales, rtol=0, atol=0)
        self.assertEqual(format.embedding_bits(trellis, torch.ones(groups, 256)), bits)


@require_torch
class Exl3ConfigPropertiesTest(unittest.TestCase):
    @given(
        st.floats(1, 8) | st.integers(1, 8),
        st.sampled_from([None, 16, *format.BITS]),
        st.sampled_from([None, *format.CODEBOOKS]),
        st.none() | st.lists(st.text(), max_size=3),
        st.dictionaries(st.text().filter(lambda name: name not in OWN_FIELDS), json_values, max_size=4),
    )
    @examples(100)
    def test_what_is_written_is_read_again(self, bits, head_bits, codebook, skipped, fields):
        given_fields = {"bits": bits, "head_bits": head_bits, "codebook": codebook, "modules_to_not_convert": skipped}
        config = Exl3Config.from_dict(given_fields | fields)
        written = config.to_dict()
        self.assertEqual({name: written[name] for name in fields}, fields)
        for text in (json.dumps(written), config.to_json_string()):
            read = AutoQuantizationConfig.from_dict(json.loads(text))
            self.assertEqual((read, read.to_dict()), (config, written))
        self.assertEqual(Exl3Config.from_dict(written), config)


@require_torch
@require_accelerate
class Exl3LayoutPropertiesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        cls.checkpoint.quantize_all()
        with tempfile.TemporaryDirectory() as folder:
            cls.checkpoint.save(folder, cls.checkpoint.tensors)
            cls.expected = cls.outputs(folder)

    @staticmethod
    @torch.no_grad()
    def outputs(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**tiny_inputs("llama")).logits

    @given(seeds, st.integers(2, 9))
    @examples(6)
    def test_tensors_may_stand_in_any_file(self, seed, count):
        rng = random.Random(seed)
        files = [f"{rng.getrandbits(32):x}.safetensors" for _ in range(count)]
        weight_map = {name: rng.choice(files) for name in self.checkpoint.tensors}
        with tempfile.TemporaryDirectory() as folder:
            self.checkpoint.save(folder, {})
            Path(folder, "model.safetensors").unlink()
            for file in set(weight_map.values()):
                tensors = {name: self.checkpoint.tensors[name] for name in weight_map if weight_map[name] == file}
                save_file(tensors, Path(folder, file))
            index = {"metadata": {}, "weight_map": weight_map}
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
            torch.testing.assert_close(self.outputs(folder), self.expected, rtol=0, atol=0)

    @given(st.integers(1000, 300_000))
    @examples(6)
    def test_shards_of_any_size_are_saved(self, size):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
            self.checkpoint.save(folder, self.checkpoint.tensors)
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(
                saved, max_shard_size=size
            )
            self.assertEqual(read_tensors(saved).keys(), self.checkpoint.tensors.keys())
            torch.testing.assert_close(self.outputs(saved), self.expected, rtol=0, atol=0)
            files = sorted(str(path) for path in Path(saved).glob("*.safetensors"))
            read_checkpoint(files)
            self.assertGreater(len(files), 1)
            beside = json.loads(Path(saved, "quantization_config.json").read_text(encoding="utf-8"))
            stored = {name for module in beside["tensor_storage"].values() for name in module["stored_tensors"]}
            self.assertEqual(stored, set(self.checkpoint.tensors))

    @given(seeds, st.integers(1, 6), st.data())
    @examples(8)
    def test_experts_may_each_have_their_own_rates(self, seed, count, data):
        sizes = {
            "num_experts": count,
            "num_experts_per_tok": min(2, count),
            "moe_intermediate_size": 4 + 4 * (seed % 50),
            "head_dim": 32,
        }
        torch.manual_seed(0)
        checkpoint = SyntheticCheckpoint(AutoModelForCausalLM.from_config(Qwen3MoeConfig(**ONE_LAYER, **sizes)))
        for name in sorted(name.removesuffix(".weight") for name in checkpoint.dense if ".experts." in name):
            bits, codebook = data.draw(rates)
            checkpoint.quantize(name, bits=bits, codebook=codebook)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as dense:
            checkpoint.save(folder, checkpoint.tensors, shards=data.draw(st.integers(1, 4)))
            checkpoint.save(dense, checkpoint.dense, quantized=False)
            result, expected = self.outputs(folder), self.outputs(dense)
            self.assertLess(float((result - expected).abs().max() / expected.abs().max()), 1e-5)


if __name__ == "__main__":
    unittest.main()
