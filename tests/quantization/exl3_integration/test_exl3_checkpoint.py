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

import json
import os
import re
import shutil
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from parameterized import parameterized

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Exl3Config, GPTQConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.testing_utils import require_accelerate, require_torch
from transformers.utils import is_torch_available


if is_torch_available():
    import torch
    from safetensors.torch import save_file

    from transformers.core_model_loading import Transpose, WeightConverter
    from transformers.integrations.exl3.architecture import check_architecture
    from transformers.integrations.exl3.checkpoint import (
        Exl3CheckpointError,
        cut_columns,
        join_columns,
        read_checkpoint,
    )
    from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module

    from .synthetic import random_linear, read_tensors
    from .tiny_models import tiny_model


FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, QWEN = FIXTURES / "tiny-llama-exl3", FIXTURES / "tiny-qwen3moe-exl3"
Q, UP, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
QUANTIZED = [f"model.layers.0.{name}" for name in LINEARS] + [HEAD]

AGAIN = "[Dd]ownload or convert it again"
NAMES = {"int16": "I16", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "int32": "I32", "uint16": "U16"}


def write_file(path, tensors, header_length=None, **entries):
    """
    A safetensors file as the format's own converters write it: no metadata, no spaces, no padding of the header.

    Args:
        path (`str`): Of the file.
        tensors (`dict[str, torch.Tensor]`): Its tensors.
        header_length (`int`, *optional*): What the file says that its header has, by default the truth.
        entries: Changed entries of the header, by tensor.
    """
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data + content)]}
        header[name] |= entries.get(name, {})
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length: nothing is aligned
    length = len(text) if header_length is None else header_length
    Path(path).write_bytes(length.to_bytes(8, "little") + text + data)


def moved(tensors, old, new):
    for name in [name for name in tensors if name.startswith(f"{old}.")]:
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


def replaced(tensors, module, out_features, in_features, **kwargs):
    for name in [name for name in tensors if name.startswith(f"{module}.")]:
        del tensors[name]
    tensors |= {
        f"{module}.{leaf}": value for leaf, value in random_linear(out_features, in_features, **kwargs)[0].items()
    }


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def with_(name, make):
    """An edit that puts what `make` returns for the tensor `name` (None if there is none) in its place."""
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


# What is wrong, what makes it so, what the error says of it (the tensor or the module, and more).
MALFORMED = [
    ("no_trellis", without(f"{Q}.trellis"), rf"{Q}: has `mcg`, `suh`, `svh` but no `trellis`"),
    ("no_suh", without(f"{Q}.suh"), rf"{Q}: has a `trellis` but not one .* input side \(`suh` or `su`\)"),
    ("no_svh", without(f"{Q}.svh"), rf"{Q}: has a `trellis` but not one .* output side \(`svh` or `sv`\)"),
    ("suh_and_su", with_(f"{Q}.su", lambda _: torch.zeros(16, dtype=torch.int16)), f"{Q}: .* not one .* input side"),
    ("trellis_alone", without(f"{Q}.suh", f"{Q}.svh", f"{Q}.mcg"), f"{Q}: has a `trellis` but not one"),
    ("trellis_and_weight", with_(f"{Q}.weight", lambda _: torch.zeros(256, 256)), f"{Q}: has both `trellis` and `weight`"),
    ("scale", with_(f"{Q}.scale", lambda _: torch.ones(1)), f"{Q}: has a `scale` tensor"),
    ("dtype_of_trellis", with_(f"{Q}.trellis", lambda t: t.int()), f"{Q}: `trellis` is torch.int32 .* not int16"),
    ("float_trellis", with_(f"{Q}.trellis", lambda t: t.half()), f"{Q}: `trellis` is torch.float16 .* not int16"),
    ("dtype_of_suh", with_(f"{Q}.suh", lambda t: t.to(torch.int16)), f"{Q}: `suh` is torch.int16 .* not torch.float16"),
    ("dtype_of_svh", with_(f"{Q}.svh", lambda t: t.double()), f"{Q}: `svh` is torch.float64 .* not torch.float16"),
    ("flat_trellis", with_(f"{Q}.trellis", lambda t: t.flatten(1)), f"{Q}: `trellis` is .* three dimensions"),
    ("long_suh", with_(f"{Q}.suh", lambda t: torch.cat((t, t))), rf"{Q}: `suh` is .* \[512\], not .* \[256\]"),
    ("short_svh", with_(f"{Q}.svh", lambda t: t[:128]), rf"{Q}: `svh` is .* \[128\], not .* \[256\]"),
    ("two_dimensional_suh", with_(f"{Q}.suh", lambda t: t[None]), rf"{Q}: `suh` is .* \[1, 256\], not .* \[256\]"),
    ("no_bits", with_(f"{Q}.trellis", lambda t: t[..., :0]), rf"{Q}: `trellis` \[16, 16, 0\]: EXL3 has no rate of 0 bits"),
    ("9_bits", with_(f"{Q}.trellis", lambda t: t.repeat(1, 1, 3)[..., :144]), f"{Q}: `trellis` .* no rate of 9 bits"),
    ("4.5_bits", with_(f"{Q}.trellis", lambda t: t.repeat(1, 1, 2)[..., :72]), f"{Q}: `trellis` .* no rate of 4.5 bits"),
    ("odd_tile", with_(f"{Q}.trellis", lambda t: t[..., :63]), f"{Q}: `trellis` .* no rate of 3.9375 bits"),
    ("no_multiple_of_128", with_(f"{Q}.trellis", lambda t: t[:15]), f"{Q}: `trellis` .* 240 x 256 .* multiples of 128"),
    ("no_tiles", with_(f"{Q}.trellis", lambda t: t[:, :0]), f"{Q}: `trellis` .* 256 x 0 .* multiples of 128"),
    ("marker_value", with_(f"{Q}.mcg", lambda t: t + 1), f"{Q}: `mcg` is 0xCBAC1FEE and not 0xCBAC1FED.*convert the model again"),
    ("both_markers", with_(f"{Q}.mul1", lambda _: torch.tensor(1).int()), f"{Q}: has both codebook markers"),
    ("marker_dtype", with_(f"{Q}.mcg", lambda t: t.long()), f"{Q}: `mcg` is torch.int64"),
    ("marker_shape", with_(f"{Q}.mcg", lambda t: t.repeat(2)), rf"{Q}: `mcg` is .*\[2\], not one int32"),
    ("half_bit", with_(f"{Q}.trellis", lambda t: t[..., :40]), f"{Q}: has 2.5 bits per weight, which only the mul1 codebook has"),
    ("bias_dtype", with_(f"{Q}.bias", lambda _: torch.zeros(256).int()), f"{Q}: `bias` is torch.int32"),
    ("bias_shape", with_(f"{Q}.bias", lambda _: torch.zeros(1, 256)), rf"{Q}: `bias` is .*\[1, 256\], not float16 \[256\]"),
    ("scale_dtype", with_(f"{Q}.suh", lambda t: t.bfloat16()), f"{Q}: `suh` is torch.bfloat16 .* not torch.float16"),
    ("scale_nan", with_(f"{Q}.suh", lambda t: t.index_fill(0, torch.tensor(7), float("nan"))), f"{Q}.suh has numbers that are not finite"),
    ("scale_inf", with_(f"{Q}.svh", lambda t: t * float("inf")), f"model.safetensors: {Q}.svh has numbers that are not finite"),
    ("bias_nan", with_(f"{Q}.bias", lambda _: torch.full((256,), float("nan"))), f"{Q}.bias has numbers that are not finite"),
    ("bias_length", with_(f"{Q}.bias", lambda _: torch.zeros(128)), f"{Q}: `bias` has 128 elements for 256 output features"),
]  # fmt: skip

MISFITS = [
    ("unknown_module", lambda t: moved(t, UP, "model.layers.1.mlp.wide_proj"), "model.layers.1.mlp.wide_proj is a quantized"),
    ("neither_weight_nor_trellis", lambda t: moved(t, UP, "other"), f"{UP} has neither a `weight` nor a `trellis`"),
    ("input_size", lambda t: replaced(t, UP, 512, 384), f"{UP} is quantized with 384 x 512 .* has 256 x 512"),
    ("output_size", lambda t: replaced(t, UP, 256, 256), f"{UP} is quantized with 256 x 256 .* has 256 x 512"),
    ("transposed", lambda t: replaced(t, UP, 256, 512), f"{UP} is quantized with 512 x 256 .* has 256 x 512"),
    ("head_size", lambda t: replaced(t, HEAD, 640, 256), f"{HEAD} is quantized with 256 x 640 .* has 256 x 512"),
    ("bias_too_many", with_(f"{Q}.bias", lambda _: torch.zeros(256).half()), f"{Q} has a bias in the checkpoint and none in the model"),
    ("bias_of_padding", lambda t: t.update({f"{HEAD}.bias": torch.zeros(500)}), f"{HEAD} has a bias in the checkpoint"),
    ("integers_for_floats", with_("model.norm.weight", lambda t: t.int()), "model.norm.weight is torch.int32, and the model's .* is torch.float"),
    ("expert_in_another_spelling", lambda t: replaced(t, "model.layers.0.mlp.experts.00.up_proj", 128, 128), "experts.00.up_proj is a quant"),
    ("quantized_norm", lambda t: replaced(t, "model.norm", 256, 256), "model.norm is a quantized linear layer .* LlamaRMSNorm at"),
    ("quantized_part_of_nothing", lambda t: replaced(t, "model.layers.0.mlp.up_proj.slice.0", 512, 256), "up_proj.*too"),
]  # fmt: skip


@require_torch
class Exl3CheckpointTestCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.file = os.path.join(folder.name, "model.safetensors")
        self.use(LLAMA)

    def use(self, source):
        self.source = source
        self.tensors = read_tensors(source)
        self.config = json.loads((source / "config.json").read_text(encoding="utf-8"))

    def load(self, auto_class=AutoModelForCausalLM, **kwargs):
        Path(self.folder, "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        if not any(name.startswith(("model", "pytorch_model")) for name in os.listdir(self.folder)):
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.file)
        return auto_class.from_pretrained(self.folder, dtype=torch.float32, **kwargs)

    def assert_error(self, *patterns, error=ValueError, **kwargs):
        """Loading is an error whose message, which is returned, has all `patterns`."""
        with self.assertRaises(error) as caught:
            self.load(**kwargs)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)
        return str(caught.exception)

    @torch.no_grad()
    def assert_expected_logits(self, model):
        expected = read_tensors(self.source / "expected")
        logits = model(expected["input_ids"]).logits
        error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
        self.assertLessEqual(float(error), 1e-5)


@require_torch
@require_accelerate
class Exl3FixturesTest(Exl3CheckpointTestCase):
    """Whole checkpoints, against outputs and weights of the reference implementation's decoder."""

    @parameterized.expand([("llama", LLAMA), ("qwen3moe", QWEN)])
    def test_outputs_weights_and_report(self, _, source):
        self.use(source)
        model, info = self.load(output_loading_info=True)
        self.assertFalse({key: value for key, value in info.items() if value})
        self.assert_expected_logits(model)
        rows = read_tensors(source / "expected")
        names = {name.removesuffix(".trellis") for name in self.tensors if name.endswith(".trellis")}
        self.assertEqual({f"{name}.weight" for name in names}, {name for name in rows if name.endswith(".weight")})
        for name in names:
            path = re.sub(r"(experts\.\d+\.)(gate|up|down)_proj", r"\1expert_\2", name)
            weight = model.get_submodule(path).dequantized("weight")
            expected = rows[f"{name}.weight"]
            self.assertLessEqual(float((weight[:4] - expected).abs().max() / expected.abs().max()), 1e-6, name)
        for module in model.modules():
            for parameter in module.parameters():
                self.assertFalse(parameter.is_meta)
                self.assertFalse(isinstance(module, Exl3Module) and parameter.requires_grad)
        self.assertEqual(model.config.quantization_config.to_dict(), self.config["quantization_config"])

    @parameterized.expand([("llama", LLAMA), ("qwen3moe", QWEN)])
    def test_as_plain_models(self, _, source):
        self.use(source)
        model, info = self.load(output_loading_info=True, quantization_config=Exl3Config(dequantize=True))
        self.assertFalse({key: value for key, value in info.items() if value})
        self.assertFalse(any(isinstance(module, Exl3Module) for module in model.modules()))
        self.assertFalse(any(parameter.is_meta for parameter in model.parameters()))
        self.assertTrue(all(parameter.requires_grad for parameter in model.parameters()))
        self.assert_expected_logits(model)

    @parameterized.expand([("llama", LLAMA), ("qwen3moe", QWEN)])
    def test_saved_again_every_tensor_is_the_same(self, _, source):
        self.use(source)
        model = self.load()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = read_tensors(folder)
            config, beside, expected = (
                json.loads(path.read_text(encoding="utf-8"))
                for path in (
                    Path(folder, "config.json"),
                    Path(folder, "quantization_config.json"),
                    source / "quantization_config.json",
                )
            )
        self.assertEqual(saved.keys(), self.tensors.keys())
        for name, tensor in self.tensors.items():
            # What is not quantized has the dtype that the model was loaded in.
            dtype = tensor.dtype if name.rpartition(".")[2] != "weight" else torch.float32
            self.assertEqual(saved[name].dtype, dtype, name)
            torch.testing.assert_close(saved[name], tensor.to(dtype), rtol=0, atol=0, msg=name)
        self.assertEqual(config["quantization_config"], self.config["quantization_config"])
        # The converter's own file says the same of every module, but for that dtype.
        for storage in (beside["tensor_storage"], expected["tensor_storage"]):
            for stored in [stored for module in storage.values() for stored in module["stored_tensors"].items()]:
                if stored[0].endswith(".weight"):
                    del stored[1]["dtype"], stored[1]["n_bytes"]
        self.assertEqual(beside, expected)

    def test_files_without_metadata_and_alignment(self):
        write_file(self.file, self.tensors)
        self.assertEqual(int.from_bytes(Path(self.file).read_bytes()[:8], "little") % 2, 1)
        model = self.load()
        self.assert_expected_logits(model)
        for name, parameter in model.named_parameters():
            self.assertEqual(parameter.data_ptr() % parameter.element_size(), 0, name)

    def test_files_without_metadata_and_alignment_as_plain_models(self):
        write_file(self.file, self.tensors)
        self.assert_expected_logits(self.load(quantization_config=Exl3Config(dequantize=True)))

    @parameterized.expand([("safetensors",), ("by_hand",)])
    def test_unsigned_words(self, writer):
        for name, tensor in self.tensors.items():
            if name.endswith(".trellis"):
                self.tensors[name] = tensor.view(torch.uint16)
        if writer == "by_hand":
            write_file(self.file, self.tensors)
        self.assert_expected_logits(self.load())

    @parameterized.expand(
        [("none", None), ("empty", "{}"), ("no_json", "\0"), ("of_another", '{"quant_method": "gptq"}')]
    )
    def test_the_file_beside_is_not_read(self, _, content):
        if content is not None:
            Path(self.folder, "quantization_config.json").write_text(content, encoding="utf-8")
        self.assert_expected_logits(self.load())

    @parameterized.expand(
        [
            ("no", {}),
            ("codebook", {"codebook": "3inst"}),
            ("bits", {"bits": 8, "head_bits": 16}),
            ("null", {"version": None}),
        ]
    )
    def test_what_the_config_says_beside_the_method_is_not_needed(self, _, fields):
        self.config["quantization_config"] = {"quant_method": "exl3", **fields}
        self.assert_expected_logits(self.load())

    def test_the_tie_of_a_quantized_head_is_not_believed(self):
        self.config["tie_word_embeddings"] = True
        model = self.load()
        self.assertFalse(model.config.tie_word_embeddings)
        self.assert_expected_logits(model)


@require_torch
@require_accelerate
class Exl3BadCheckpointTest(Exl3CheckpointTestCase):
    """What is wrong with a checkpoint is an error that names it and says what to do."""

    @parameterized.expand(MALFORMED)
    def test_malformed(self, _, edit, message):
        edit(self.tensors)
        self.assert_error(message, AGAIN, error=Exl3CheckpointError)

    @parameterized.expand(MISFITS)
    def test_misfits(self, _, edit, message):
        edit(self.tensors)
        told = self.assert_error(message, "its config.json names .*LlamaForCausalLM", AGAIN, error=Exl3CheckpointError)
        if " is quantized with " in message:
            self.assertNotIn("has neither", told)  # it is there, and does not fit

    @parameterized.expand([entry[:2] for entry in MALFORMED + MISFITS])
    def test_the_same_with_dequantize(self, _, edit):
        edit(self.tensors)
        self.assert_error(AGAIN, error=Exl3CheckpointError, quantization_config=Exl3Config(dequantize=True))

    def test_layers_whose_weights_upstream_changes(self):
        mapping = [WeightConverter("self_attn.q_proj.", "self_attn.q_proj.", [Transpose()])]
        with patch("transformers.integrations.exl3.placement.get_model_conversion_mapping", lambda model: mapping):
            message = f"{Q} is quantized, and its weight would become that of {Q} through Transpose"
            self.assert_error(message, error=Exl3CheckpointError)

    def test_all_that_is_wrong_is_told_at_once(self):
        del self.tensors[f"{Q}.suh"]
        self.tensors[f"{UP}.trellis"] = self.tensors[f"{UP}.trellis"].int()
        self.assert_error(f"{Q}: .*input side", f"{UP}: `trellis` is", AGAIN, error=Exl3CheckpointError)

    def test_a_bias_too_few(self):
        self.config["attention_bias"] = True
        self.assert_error(f"{Q} has a bias in the model and none in the checkpoint", AGAIN, error=Exl3CheckpointError)

    def test_another_architecture(self):
        self.config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        self.assert_error(f"{Q} is a quantized linear layer", "loaded as GPT2LMHeadModel", error=Exl3CheckpointError)

    def test_a_missing_expert(self):
        self.use(QWEN)
        for name in [name for name in self.tensors if ".layers.1.mlp.experts.3.up_proj." in name]:
            del self.tensors[name]
        self.assert_error(
            r"layers.1.mlp.experts has 4 experts .*lacks \['3.up_proj'\]", AGAIN, error=Exl3CheckpointError
        )

    def test_an_expert_too_many(self):
        self.use(QWEN)
        replaced(self.tensors, "model.layers.1.mlp.experts.4.up_proj", 128, 128)
        self.assert_error(r"layers.1.mlp.experts has 4 experts .*has \['4.up_proj'\]", error=Exl3CheckpointError)

    def test_a_tensor_in_two_files(self):
        names = sorted(self.tensors)
        files = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
        for file, part in zip(files, (names[:31], names[30:])):
            save_file({name: self.tensors[name] for name in part}, os.path.join(self.folder, file))
        weight_map = {name: files[index > 30] for index, name in enumerate(names)}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        Path(self.folder, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        self.assert_error(f"{names[30]} stands in .*{files[0]} and in .*{files[1]}", AGAIN, error=Exl3CheckpointError)

    @parameterized.expand(
        [
            ("truncated", lambda data: data[:-1]),
            ("cut_in_the_header", lambda data: data[:1000]),
            ("empty", lambda data: b""),
            ("seven_bytes", lambda data: data[:7]),
            ("long_header", lambda data: b"\xff" * 8 + data[8:]),
            ("garbage", lambda data: data[:8] + b"\xff" * (len(data) - 8)),
            ("no_object", lambda data: (2).to_bytes(8, "little") + b"[]"),
            ("deep", lambda data: (9999).to_bytes(8, "little") + b"{" * 9999),
            ("entry_without_fields", lambda data: (8).to_bytes(8, "little") + b'{"a":{}}'),
            ("html", lambda data: b"<!DOCTYPE html><html>" * 20),
        ]
    )
    def test_damaged_files(self, _, edit):
        write_file(self.file, self.tensors)
        Path(self.file).write_bytes(edit(Path(self.file).read_bytes()))
        self.assert_error("model.safetensors: no whole safetensors file", AGAIN, error=Exl3CheckpointError)

    @parameterized.expand(
        [
            ("dtype", {"dtype": "F7"}),
            ("negative_shape", {"shape": [-16, 16, 64]}),
            ("absurd_shape", {"shape": [1 << 60, 1 << 60]}),
            ("fractional_shape", {"shape": [16.0, 16, 64]}),
            ("text_shape", {"shape": "16"}),
            ("other_shape", {"shape": [16, 16, 48]}),
            ("other_dtype", {"dtype": "I32"}),
            ("one_offset", {"data_offsets": [0]}),
            ("turned_offsets", {"data_offsets": [32768, 0]}),
            ("far_offsets", {"data_offsets": [1 << 40, (1 << 40) + 32768]}),
        ]
    )
    def test_damaged_headers(self, _, entry):
        write_file(self.file, self.tensors, **{f"{Q}.trellis": entry})
        self.assert_error("model.safetensors: no whole safetensors file", AGAIN, error=Exl3CheckpointError)

    @parameterized.expand([([0, 1 << 63],), ([0, 1 << 62, 1 << 62],)])
    def test_sizes_that_nothing_can_count(self, shape):
        write_file(self.file, self.tensors | {"x.weight": torch.empty(0)}, **{"x.weight": {"shape": shape}})
        self.assert_error("model.safetensors: no whole safetensors file", AGAIN, error=Exl3CheckpointError)

    def test_a_dtype_that_no_model_has(self):
        entry = {"dtype": "F8_E8M0", "shape": [16, 16, 128]}  # as many bytes
        write_file(self.file, self.tensors, **{f"{Q}.trellis": entry})
        self.assert_error(f"{Q}.trellis has the dtype F8_E8M0", AGAIN, error=Exl3CheckpointError)

    def test_a_float_checkpoint_that_says_exl3(self):
        with tempfile.TemporaryDirectory() as folder:
            tiny_model("llama")[0].save_pretrained(folder)
            self.tensors = read_tensors(folder)
            self.config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        self.config["quantization_config"] = {"quant_method": "exl3", "bits": 4.0}
        self.assert_error(
            r"model.safetensors has no quantized tensor \(`\*.trellis`\)", "Remove `quantization_config`"
        )

    def test_an_exl3_checkpoint_that_says_another_method(self):
        with self.assertRaises((ValueError, ImportError)):
            self.config["quantization_config"]["quant_method"] = "gptq"
            self.load()

    def test_the_config_of_another_method(self):
        self.assert_error(
            "quantized with Exl3Config but you are passing a GPTQConfig", quantization_config=GPTQConfig(4)
        )

    def test_an_unknown_codebook(self):
        self.config["quantization_config"]["codebook"] = "qtip"
        self.assert_error("`codebook` of Exl3Config .*`mul1`, `mcg` or `3inst`, got 'qtip'")

    def test_other_files(self):
        torch.save(self.tensors, os.path.join(self.folder, "pytorch_model.bin"))
        self.assert_error("EXL3 checkpoints are safetensors files, got .*pytorch_model.bin: pass their folder or repo")

    def test_an_empty_device_map(self):
        self.assert_error("`device_map` is an empty dict.*pass `auto`", device_map={})

    def test_missing_packages(self):
        with patch("transformers.quantizers.quantizer_exl3.is_accelerate_available", lambda: False):
            self.assert_error("EXL3 needs torch and accelerate: `pip install accelerate`", error=ImportError)

    @parameterized.expand([("laguna", "divided by 128"), ("mistral4", "divided by 128"), ("mimo_v2_flash", "o_proj")])
    def test_architectures_whose_weights_have_a_constant_folded_in(self, model_type, constant):
        message = f"`{model_type}` are not supported.*{constant}.*quantize it on the fly with `Exl3Config`"
        config = CONFIG_MAPPING[model_type]()
        self.assertRaisesRegex(ValueError, message, check_architecture, config)
        if model_type == "mistral4":
            return  # by itself it is no model, only a part of Mistral 3
        self.config = config.to_dict() | {"quantization_config": self.config["quantization_config"]}
        for kwargs in ({}, {"quantization_config": Exl3Config(dequantize=True)}):
            self.assert_error(message, **kwargs)

    def test_a_folded_architecture_within_another(self):
        text = CONFIG_MAPPING["mistral4"]()
        outer = SimpleNamespace(model_type="mistral3", get_text_config=lambda: text)
        self.assertRaisesRegex(ValueError, "`mistral4` are not supported", check_architecture, outer)
        check_architecture(CONFIG_MAPPING["llama"]())

    def test_tables_of_n_grams(self):
        config = CONFIG_MAPPING["qwen4_exp"](text_config={"ple_layer_ids": [1], "eos_token_id": 2})
        self.assertRaisesRegex(ValueError, "table of hashed n-grams are not supported", check_architecture, config)
        check_architecture(CONFIG_MAPPING["qwen4_exp"]())


@require_torch
@require_accelerate
class Exl3MissingTensorsTest(Exl3CheckpointTestCase):
    """A model never has weights that nobody gave it."""

    @parameterized.expand([f"{module}.{leaf}" for module in QUANTIZED for leaf in ("trellis", "suh", "svh")])
    def test_of_quantized_layers(self, name):
        del self.tensors[name]
        module, _, leaf = name.rpartition(".")
        self.assert_error(f"{module}: .*`{leaf}`", AGAIN, error=Exl3CheckpointError)

    @parameterized.expand(QUANTIZED)
    def test_whole_layers(self, name):
        for key in [key for key in self.tensors if key.startswith(f"{name}.")]:
            del self.tensors[key]
        self.assert_error(f"{name} has neither a `weight` nor a `trellis`", AGAIN, error=Exl3CheckpointError)

    def test_embeddings(self):
        del self.tensors["model.embed_tokens.weight"]
        self.assert_error(
            "model.embed_tokens has neither a `weight` nor a `trellis`", AGAIN, error=Exl3CheckpointError
        )

    @parameterized.expand(
        [
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.norm.weight",
        ]
    )
    def test_norms(self, name):
        del self.tensors[name]
        self.assert_error(f"{name} is not in the checkpoint", AGAIN, error=Exl3CheckpointError)

    @parameterized.expand(["mcg", "mul1"])
    def test_a_marker_is_the_one_tensor_that_may_lack(self, marker):
        # Nothing else tells the codebook: without a marker it is 3inst.
        replaced(self.tensors, UP, 512, 256, codebook=marker)
        self.assertEqual(self.load().get_submodule(UP).codebook, marker)
        os.remove(self.file)
        del self.tensors[f"{UP}.{marker}"]
        self.assertEqual(self.load().get_submodule(UP).codebook, "3inst")

    def test_tensors_of_experts(self):
        self.use(QWEN)
        for leaf in ("trellis", "suh", "svh"):
            name = f"model.layers.1.mlp.experts.2.down_proj.{leaf}"
            kept = self.tensors.pop(name)
            self.assert_error(f"experts.2.down_proj: .*`{leaf}`", AGAIN, error=Exl3CheckpointError)
            os.remove(self.file)
            self.tensors[name] = kept


@require_torch
@require_accelerate
class Exl3BadRequestTest(unittest.TestCase):
    """What cannot be quantized on the fly is an error that says what to do."""

    def assert_error(self, name, message, auto_class=None, **kwargs):
        model, own_class = tiny_model(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with self.assertRaisesRegex(ValueError, message):
                (auto_class or own_class).from_pretrained(folder, quantization_config=Exl3Config(**kwargs))

    def test_nothing_left(self):
        self.assert_error(
            "llama",
            r"nothing to quantize in LlamaForCausalLM.*`modules_to_not_convert` \(.*'model'.*without `quantization_config`",
            modules_to_not_convert=["model"],
        )

    def test_bits_for_a_head_that_is_not_there(self):
        message = "`head_bits` is set and LlamaModel has no linear output embeddings. Unset it"
        self.assert_error("llama", message, AutoModel, head_bits=6)

    def test_bits_for_a_head_that_is_tied_to_more_than_one(self):
        message = (
            "lm_head.weight.* cannot be quantized: .*are tied as well.*Leave `head_bits` and `embedding_bits` unset"
        )
        self.assert_error("t5", message, AutoModelForSeq2SeqLM, head_bits=6)

    def test_a_float_checkpoint_cannot_be_dequantized(self):
        message = "`dequantize=True` is for EXL3 checkpoints.*load it without `quantization_config`"
        self.assert_error("llama", message, dequantize=True)

    def test_an_empty_device_map(self):
        model, auto_class = tiny_model("llama")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with self.assertRaisesRegex(ValueError, "`device_map` is an empty dict.*pass `auto`"):
                auto_class.from_pretrained(folder, quantization_config=Exl3Config(), device_map={})


@require_torch
class Exl3ReadCheckpointTest(unittest.TestCase):
    def test_tensors_are_sorted_into_modules_and_take_no_memory(self):
        found = read_checkpoint([str(QWEN / "model.safetensors")])
        self.assertFalse(found.embeddings)
        self.assertEqual(len(found.linears), 2 * (4 + 4 * 3) + 1)
        self.assertEqual(set(found.linears["lm_head"]), {"trellis", "suh", "svh", "mul1"})
        for tensors in found.linears.values():
            self.assertTrue(all(tensor.is_meta for name, tensor in tensors.items() if name != "mul1"))
            self.assertEqual(tensors["mul1"].item() & 0xFFFFFFFF, 0x83DCD12D)
        expected = read_tensors(QWEN)
        for name, tensor in found.others.items():
            self.assertEqual((tensor.shape, tensor.dtype), (expected[name].shape, expected[name].dtype))
        quantized = {f"{module}.{leaf}" for module, tensors in found.linears.items() for leaf in tensors}
        self.assertEqual(quantized | set(found.others), set(expected))

    @parameterized.expand([("scales", ()), ("packed_signs", ("su", "sv"))])
    def test_what_is_cut_by_columns_is_joined_again(self, _, signs):
        bias = torch.randn(400, generator=torch.Generator().manual_seed(0)).half()
        tensors, weight = random_linear(400, 128, bias=bias, signs=signs)
        columns = [range(0, 96), range(96, 112), range(112, 400)]
        parts = [cut_columns(tensors, own) for own in columns]
        for part, own in zip(parts, columns):
            layer = Exl3Linear(128, len(own), part, skipped=own.start % 128)
            torch.testing.assert_close(layer.dequantized("weight"), weight[own.start : own.stop], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.dequantized("bias"), bias[own.start : own.stop], rtol=0, atol=0)
        joined = join_columns(parts, columns)
        self.assertEqual(joined.keys(), tensors.keys())
        for leaf, tensor in tensors.items():
            torch.testing.assert_close(joined[leaf], tensor, rtol=0, atol=0)
        for leaf in parts[1]:  # of the block that all of them share
            odd = {**parts[1], leaf: parts[1][leaf] + 1}
            self.assertIsNone(join_columns([parts[0], odd, parts[2]], columns), leaf)
        self.assertIsNone(join_columns([parts[0], {}, parts[2]], columns))

    def test_embedding_tables_are_told_by_their_signs(self):
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "model.safetensors")
            shutil.copy(FIXTURES / "vectors" / "embed_ring_k4_6x640.safetensors", file)
            tensors = read_tensors(folder)
            good = {"e.trellis": tensors["trellis"], "e.signs": tensors["signs"]}
            save_file(good, file)
            self.assertEqual(set(read_checkpoint([file]).embeddings), {"e"})
            for message, bad in (
                ("e: has both `trellis` and `weight`", {"e.weight": torch.zeros(6, 640)}),
                ("e: `trellis` is torch.int32", {"e.trellis": tensors["trellis"].int()}),
                (r"e: .*\[6, 194\].* are no EXL3 embedding table", {"e.trellis": tensors["trellis"][:, :-1].clone()}),
            ):
                save_file(good | bad, file)
                with self.assertRaisesRegex(Exl3CheckpointError, f"{message}(.|\n)*{AGAIN}"):
                    read_checkpoint([file])
