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
"""Quantizing float checkpoints on the fly, and saving what comes out of it."""

import copy
import gc
import json
import os
import re
import shutil
import tempfile
import unittest
import warnings
from unittest import mock

import torch
from parameterized import parameterized
from safetensors.torch import save_file
from torch import nn

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Exl3Config,
    LagunaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.exl3 import encoder, encoding, format, separate_experts
from transformers.integrations.exl3.embeddings import Exl3Embedding, Exl3TiedHead
from transformers.integrations.exl3.experts import Exl3Experts
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module, Exl3SplitLinear
from transformers.testing_utils import require_accelerate, require_torch
from transformers.utils import logging

from .synthetic import read_tensors
from .tiny_models import MODELS, ONE_LAYER, quick_config, tiny_inputs, tiny_model


# Exl3Linear, Exl3SplitLinear, Exl3Experts, and nn.Linear or Conv1D that are left, of each model quantized by default.
EXPECTED_MODULES = {
    "llama": (14, 0, 0, 1),
    "llama_tied": (7, 0, 0, 1),
    "llama_base": (7, 0, 0, 0),
    "llama_classifier": (7, 0, 0, 1),
    "qwen2": (7, 0, 0, 1),
    "gemma3_text": (7, 0, 0, 1),
    "gpt2": (4, 0, 0, 1),
    "bert": (6, 0, 0, 1),
    "bert_classifier": (7, 0, 0, 1),
    "nomic_bert": (7, 0, 0, 0),
    "dinov2": (7, 0, 0, 0),
    "t5": (14, 0, 0, 3),
    "mixtral": (4, 0, 1, 1),
    "qwen3_moe": (4, 0, 1, 1),
    "gpt_oss": (4, 0, 1, 1),
    "phi3": (7, 2, 0, 1),
    "glm4": (7, 1, 0, 1),
    "nemotron_h": (6, 0, 1, 1),
    "qwen2_5_vl": (16, 1, 0, 1),
    "gemma3": (15, 0, 0, 1),
}


@torch.no_grad()
def outputs(model, name):
    return model(**tiny_inputs(name))[0]


def error(result, expected):
    return float((result - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def count(model):
    kinds = (Exl3Linear, Exl3SplitLinear, Exl3Experts)
    found = [sum(isinstance(module, kind) for module in model.modules()) for kind in kinds]
    return (*found, sum(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules()))


@require_torch
@require_accelerate
class Exl3QuantizingTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.verbosity = logging.get_verbosity()

    def source(self, name):
        """A float checkpoint of the model `name`, and its model."""
        folder = os.path.join(self.folder.name, name)
        model, auto_class = tiny_model(name)
        if not os.path.isdir(folder):
            model.save_pretrained(folder)
        return folder, model, auto_class

    def quantize(self, name, config=None, **kwargs):
        folder, model, auto_class = self.source(name)
        config = config or quick_config(bits=8)
        return auto_class.from_pretrained(
            folder, quantization_config=config, **{"dtype": torch.float32, **kwargs}
        ), model

    @parameterized.expand(sorted(MODELS))
    def test_models(self, name):
        """Quantized at 8 bits a model stays close; saved, sharded, loaded and dequantized it stays the same."""
        quantized, model = self.quantize(name)
        auto_class = MODELS[name][0]
        self.assertEqual(count(quantized), EXPECTED_MODULES[name])
        result = outputs(quantized, name)
        self.assertLess(error(result, outputs(model, name)), 0.05)
        self.assertFalse(
            any(
                p.is_meta or p.requires_grad
                for m in quantized.modules()
                if isinstance(m, Exl3Module)
                for p in m.parameters()
            )
        )
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            quantized.save_pretrained(first)
            loaded, info = auto_class.from_pretrained(first, dtype=torch.float32, output_loading_info=True)
            self.assertFalse(info["missing_keys"] or info["unexpected_keys"])
            torch.testing.assert_close(outputs(loaded, name), result, rtol=0, atol=0)
            loaded.save_pretrained(second, max_shard_size="100kB")
            self.assertGreater(len([file for file in os.listdir(second) if file.endswith(".safetensors")]), 1)
            saved, again = read_tensors(first), read_tensors(second)
            torch.testing.assert_close(again, saved, rtol=0, atol=0)
            self.check_layout(first, saved)
            self.check_layout(second, again)
            plain = auto_class.from_pretrained(
                second, dtype=torch.float32, quantization_config=Exl3Config(dequantize=True)
            )
        loaded.dequantize()
        for other in (plain, loaded):
            self.assertFalse(any(isinstance(module, Exl3Module) for module in other.modules()))
            self.assertEqual(
                {k: v.shape for k, v in other.state_dict().items()},
                {k: v.shape for k, v in model.state_dict().items()},
            )
            self.assertLess(error(outputs(other, name), result), 1e-5)
        with tempfile.TemporaryDirectory() as folder:  # what is plain again is saved as a float checkpoint
            loaded.save_pretrained(folder)
            self.assertEqual(read_tensors(folder).keys(), read_tensors(self.source(name)[0]).keys())
            self.assertFalse(os.path.exists(os.path.join(folder, "quantization_config.json")))

    def check_layout(self, folder, tensors):
        """The files of `folder` hold what the format says, and `quantization_config.json` tells what they hold."""
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)["quantization_config"]
        with open(os.path.join(folder, "quantization_config.json"), encoding="utf-8") as file:
            beside = json.load(file)
        storage = beside.pop("tensor_storage")
        self.assertEqual(beside, config)
        self.assertEqual(config["quant_method"], "exl3")
        described = {name: tensor for module in storage.values() for name, tensor in module["stored_tensors"].items()}
        self.assertEqual(described.keys(), tensors.keys())
        for name, tensor in tensors.items():
            expected = {"shape": list(tensor.shape), "n_bytes": tensor.nbytes, "dtype": str(tensor.dtype)}
            self.assertEqual(described[name], expected)
        for name in [name for name in tensors if name.endswith(".trellis")]:
            module = name.removesuffix(".trellis")
            rows, columns, _ = tensors[name].shape
            self.assertEqual((rows % 8, columns % 8, tensors[name].dtype), (0, 0, torch.int16))
            for leaf, size in (("suh", 16 * rows), ("svh", 16 * columns)):
                scale = tensors[f"{module}.{leaf}"]
                self.assertEqual((scale.dtype, list(scale.shape)), (torch.float16, [size]))
            self.assertEqual(tensors[f"{module}.mul1"].item(), -2082680531)
            self.assertEqual(tensors[f"{module}.mul1"].shape, ())
            self.assertNotIn(f"{module}.weight", tensors)
            if f"{module}.bias" in tensors:
                bias = tensors[f"{module}.bias"]
                self.assertEqual((bias.dtype, list(bias.shape)), (torch.float16, [16 * columns]))
            self.assertEqual(storage[module]["quant_format"], "exl3")
            self.assertEqual(storage[module]["bits_per_weight"], tensors[name].shape[2] / 16)
            self.assertEqual(storage[module]["mul1_multiplier"], 0x83DCD12D)

    @parameterized.expand(
        [
            ("phi3", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"),
            ("glm4", "model.layers.0.mlp.gate_proj"),
            (
                "mixtral",
                "model.layers.0.block_sparse_moe.experts.3.w1",
                "model.layers.0.block_sparse_moe.experts.0.w2",
            ),
            ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj"),
            ("gpt_oss", "model.layers.0.mlp.experts.3.down_proj"),
            ("qwen2_5_vl", "visual.blocks.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
            ("gemma3", "language_model.model.layers.0.mlp.up_proj"),
            ("nomic_bert", "encoder.layers.0.self_attn.q_proj"),
            ("dinov2", "encoder.layer.0.mlp.up_proj"),
        ]
    )
    def test_files_have_the_names_that_converters_use(self, name, *modules):
        quantized, _ = self.quantize(name, quick_config(bits=1))
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            names = read_tensors(folder)
        for module in modules:
            self.assertIn(f"{module}.trellis", names)
        fused = [key for key in names if "qkv" in key or ("gate_up" in key and not key.endswith("weight"))]
        self.assertFalse(fused)

    @parameterized.expand([("v_proj", ["self_attn.v_proj"]), ("all_but_one", ["q_proj", "v_proj", "o_proj", "mlp"])])
    def test_parts_of_what_files_have_fused_are_saved_one_by_one(self, _, skip):
        """Of a fused projection that this architecture splits on loading, some parts are quantized and some are not."""
        quantized, _ = self.quantize("nomic_bert", quick_config(bits=2, modules_to_not_convert=skip))
        result = outputs(quantized, "nomic_bert")
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            names = read_tensors(folder)
            loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
            self.assertFalse(info["missing_keys"] or info["unexpected_keys"])
            torch.testing.assert_close(outputs(loaded, "nomic_bert"), result, rtol=0, atol=0)
        attention = "encoder.layers.0.self_attn"
        self.assertIn(f"{attention}.v_proj.weight", names)
        self.assertIn(f"{attention}.k_proj.trellis", names)

    @parameterized.expand(format.CODEBOOKS)
    def test_codebooks(self, codebook):
        quantized, model = self.quantize("llama", Exl3Config(bits=4, codebook=codebook))
        self.assertEqual({m.codebook for m in quantized.modules() if isinstance(m, Exl3Linear)}, {codebook})
        self.assertLess(error(outputs(quantized, "llama"), outputs(model, "llama")), 0.2)

    def test_more_bits_are_closer(self):
        errors = []
        for bits in (2, 3, 4, 6):
            quantized, model = self.quantize("llama", Exl3Config(bits=bits))
            errors.append(error(outputs(quantized, "llama"), outputs(model, "llama")))
        self.assertEqual(errors, sorted(errors, reverse=True))
        self.assertLess(errors[-1], errors[0] / 5)

    def test_fast_effort_is_nearly_as_close(self):
        states, errors = [], []
        for effort in ("default", "fast"):
            quantized, model = self.quantize("llama", Exl3Config(bits=4, effort=effort))
            states.append(quantized.state_dict())
            errors.append(error(outputs(quantized, "llama"), outputs(model, "llama")))
        self.assertLess(errors[1], 1.2 * errors[0])
        self.assertTrue(any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()))

    def test_a_tied_head_that_is_quantized_is_untied(self):
        quantized, model = self.quantize("llama_tied", quick_config(bits=6, head_bits=8))
        self.assertEqual((quantized.lm_head.bits, quantized.config.tie_word_embeddings), (8, False))
        self.assertIs(type(quantized.model.embed_tokens), nn.Embedding)
        torch.testing.assert_close(
            quantized.model.embed_tokens.weight, model.model.embed_tokens.weight, rtol=0, atol=0
        )
        self.assertLess(error(quantized.lm_head.weight, model.lm_head.weight), 0.01)
        result = outputs(quantized, "llama_tied")
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                self.assertFalse(json.load(file)["tie_word_embeddings"])
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            torch.testing.assert_close(outputs(loaded, "llama_tied"), result, rtol=0, atol=0)
        plain = loaded.dequantize()
        self.assertFalse(torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight))
        self.assertLess(error(outputs(plain, "llama_tied"), result), 1e-5)

    def test_a_tied_head_of_a_nested_model_is_untied(self):
        quantized, model = self.quantize("gemma3", quick_config(bits=6, head_bits=8))
        self.assertTrue(model.config.tie_word_embeddings)
        self.assertIsInstance(quantized.lm_head, Exl3Linear)
        result = outputs(quantized, "gemma3")
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            for part in (config, config["text_config"]):
                self.assertFalse(part["tie_word_embeddings"])
            loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(outputs(loaded, "gemma3"), result, rtol=0, atol=0)

    def test_an_untied_head_by_its_bits(self):
        quantized, _ = self.quantize("llama", quick_config(bits=2, head_bits=6))
        self.assertEqual((quantized.lm_head.bits, quantized.model.layers[0].mlp.up_proj.bits), (6, 2))
        quantized, _ = self.quantize("llama", quick_config(bits=2, head_bits=16))
        self.assertIs(type(quantized.lm_head), nn.Linear)

    @parameterized.expand(
        [
            ("llama", None, Exl3Embedding, nn.Linear),
            ("llama", 6, Exl3Embedding, Exl3Linear),
            ("llama_tied", 8, Exl3Embedding, Exl3Linear),
            ("llama_tied", 16, Exl3Embedding, nn.Linear),
            ("llama_tied", None, Exl3Embedding, Exl3TiedHead),
            ("gemma3", None, Exl3Embedding, Exl3TiedHead),
            ("gpt2", None, Exl3Embedding, Exl3TiedHead),
            ("gemma3_text", 8, Exl3Embedding, Exl3Linear),  # scales its rows
            ("gemma3", 16, Exl3Embedding, nn.Linear),
            ("gpt2", 8, Exl3Embedding, Exl3Linear),
            ("bert", None, Exl3Embedding, type(None)),
        ]
    )
    def test_embeddings(self, name, head_bits, *kinds):
        """Quantized, saved, loaded and dequantized embeddings, and what becomes of the head."""
        config = {"head_bits": head_bits, "embedding_bits": 8, "modules_to_not_convert": [r".*\.\d\."]}  # layers
        quantized, model = self.quantize(name, quick_config(bits=8, **config))
        found = (type(quantized.get_input_embeddings()), type(quantized.get_output_embeddings()))
        self.assertEqual(found, kinds)
        result = outputs(quantized, name)
        self.assertLess(error(result, outputs(model, name)), 0.05)
        table = model.get_input_embeddings().weight
        for layer in quantized.get_input_embeddings(), quantized.get_output_embeddings():
            if isinstance(layer, Exl3Module):
                self.assertFalse(layer.pending)
        if name == "llama_tied" and head_bits == 16:
            torch.testing.assert_close(quantized.lm_head.weight, table, rtol=0, atol=0)
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            tensors = read_tensors(folder)
            loaded, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        self.assertFalse(info["missing_keys"] or info["unexpected_keys"])
        self.assertEqual(loaded.config.quantization_config.embedding_bits, 8)
        (path,) = [tensor.removesuffix(".signs") for tensor in tensors if tensor.endswith(".signs")]
        trellis, signs = tensors[f"{path}.trellis"], tensors[f"{path}.signs"]
        self.assertEqual((trellis.dtype, list(trellis.shape)), (torch.int16, [len(table), 1 + 16 * 8]))
        self.assertEqual((signs.dtype, list(signs.shape)), (torch.float16, [1, 256]))
        self.assertNotIn(f"{path}.weight", tensors)
        torch.testing.assert_close(outputs(loaded, name), result, rtol=0, atol=0)
        if kinds[1] is Exl3TiedHead:  # follows the table that a state brings, in each copy by itself
            other, state = copy.deepcopy(loaded), loaded.state_dict()
            other.load_state_dict(
                {key: value.flip(0) if key.endswith(".trellis") else value for key, value in state.items()}
            )
            torch.testing.assert_close(outputs(loaded, name), result, rtol=0, atol=0)
            weight = other.get_input_embeddings().dequantized("weight")
            torch.testing.assert_close(other.get_output_embeddings().weight, weight, rtol=0, atol=0)
            self.assertGreater(error(weight, table), 0.1)
        plain = loaded.dequantize()
        self.assertLess(error(plain.get_input_embeddings().weight, table), 0.006)
        self.assertLess(error(outputs(plain, name), result), 1e-5)

    @parameterized.expand(
        [
            (
                "t5",
                "decoder.embed_tokens.weight, encoder.embed_tokens.weight, lm_head.weight of T5.* are tied to the input",
            ),
            ("dinov2", "the input embeddings of Dinov2Model are Dinov2PatchEmbeddings, no plain table. Unset it"),
        ]
    )
    def test_embeddings_that_cannot_be_quantized_are_an_error(self, name, message):
        with self.assertRaisesRegex(ValueError, f"`embedding_bits` is set.*{message}"):
            self.quantize(name, quick_config(bits=1, embedding_bits=4))

    @parameterized.expand(["llama_tied", "gemma3_text"])
    def test_a_head_that_stays_tied_to_quantized_embeddings(self, name):
        """It has their weight, is not saved, and becomes a plain layer with them; whatever casts the model casts it."""
        with self.assertLogs("transformers", "INFO"):
            quantized, model = self.quantize(name, quick_config(bits=8, embedding_bits=6), dtype=torch.bfloat16)
        table = quantized.get_input_embeddings().dequantized("weight")
        torch.testing.assert_close(quantized.lm_head.weight, table.bfloat16(), rtol=0, atol=0)
        self.assertLess(error(table, model.lm_head.weight), 0.02)
        quantized.tie_weights()  # nothing to tie
        with self.assertRaisesRegex(AttributeError, r"embeddings are quantized .* `model.dequantize\(\)` first"):
            quantized.resize_token_embeddings(110)
        self.assertEqual(quantized.dtype, torch.bfloat16)
        result = outputs(quantized, name)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as again:
            quantized.save_pretrained(folder)
            self.assertFalse([tensor for tensor in read_tensors(folder) if "lm_head" in tensor])
            loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
            self.assertFalse(info["missing_keys"] or info["unexpected_keys"])
            torch.testing.assert_close(outputs(loaded, name), result, rtol=0, atol=0)
            torch.testing.assert_close(outputs(copy.deepcopy(loaded), name), result, rtol=0, atol=0)
            self.assertEqual(loaded.dtype, torch.bfloat16)
            self.assertEqual(loaded.to(torch.float32).lm_head.weight.dtype, torch.float32)
            self.assertEqual((loaded.dtype, outputs(loaded, name).dtype), (torch.float32, torch.float32))
            loaded.save_pretrained(again)
            expected = read_tensors(folder)
            for key, tensor in read_tensors(again).items():
                torch.testing.assert_close(tensor.to(expected[key].dtype), expected[key], rtol=0, atol=0)
            base = AutoModel.from_pretrained(folder)
            self.assertIsInstance(base.get_input_embeddings(), Exl3Embedding)
            plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Exl3Config(dequantize=True))
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            del config["quantization_config"]["tied_head"]
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump(config, file)
            with self.assertRaisesRegex(ValueError, "lm_head has neither a `weight` nor a `trellis`"):
                AutoModelForCausalLM.from_pretrained(folder)
        for other in (plain, quantized.dequantize()):
            self.assertIs(type(other.lm_head), nn.Linear)
            torch.testing.assert_close(other.lm_head.weight, table.to(other.dtype), rtol=0, atol=0)
            torch.testing.assert_close(other.get_input_embeddings().weight, other.lm_head.weight, rtol=0, atol=0)

    def test_a_config_may_be_used_again(self):
        config = quick_config(bits=1, embedding_bits=1)
        for name in ("llama_tied", "llama"):
            self.quantize(name, config)

    def test_embeddings_to_be_quantized_and_left_are_an_error(self):
        config = quick_config(bits=1, embedding_bits=4, modules_to_not_convert=["embed_tokens"])
        with self.assertRaisesRegex(
            ValueError, "`embedding_bits` of 4 asks for model.embed_tokens to be quantized, and"
        ):
            self.quantize("llama", config)

    @parameterized.expand([(1.5, "mcg"), (2.5, "3inst")])
    def test_half_a_bit_for_the_head_needs_its_codebook(self, bits, codebook):
        with self.assertRaisesRegex(ValueError, f"`head_bits` of {bits} needs the codebook `mul1`"):
            self.quantize("llama", quick_config(bits=2, head_bits=bits, codebook=codebook))

    def test_a_push_to_the_hub_comes_after_the_last_file(self):
        quantized, _ = self.quantize("bert", quick_config(bits=1))
        with tempfile.TemporaryDirectory() as folder:

            def push(repo_id, **kwargs):
                self.assertTrue(os.path.isfile(os.path.join(folder, "quantization_config.json")))
                pushed.append((repo_id, kwargs))

            pushed = []
            with mock.patch.object(quantized, "push_to_hub", push):
                quantized.save_pretrained(folder, push_to_hub=True, repo_id="me/model", private=True)
        self.assertEqual(pushed, [("me/model", {"token": None, "private": True})])

    def test_folded_architectures_load_what_was_quantized_here(self):
        """Converters fold a constant into weights of this architecture, and their checkpoints are refused; ours have none."""
        sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LagunaConfig(**ONE_LAYER, **sizes, head_dim=32)).eval()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as quantized:
            model.save_pretrained(folder)
            config = quick_config(bits=6)
            result = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
            result.save_pretrained(quantized)
            loaded = AutoModelForCausalLM.from_pretrained(quantized)
            self.assertEqual(loaded.config.quantization_config.to_dict()["quantized_by"], "transformers")
            torch.testing.assert_close(outputs(loaded, "llama"), outputs(result, "llama"), rtol=0, atol=0)
            self.assertLess(error(outputs(loaded, "llama"), outputs(model, "llama")), 0.1)
            path = os.path.join(quantized, "config.json")
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            del content["quantization_config"]["quantized_by"]
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file)
            with self.assertRaisesRegex(ValueError, "`laguna` are not supported"):
                AutoModelForCausalLM.from_pretrained(quantized)

    def test_names_and_patterns_of_modules_that_stay(self):
        skip = ["down_proj", r"model.layers.0.self_attn", r"layers.*.mlp.up_proj"]
        quantized, model = self.quantize("llama", quick_config(bits=2, modules_to_not_convert=skip))
        left = {name for name, module in quantized.named_modules() if type(module) is nn.Linear}
        attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
        mlp = {f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "down")}
        self.assertEqual(left, {"lm_head", *attention, *mlp})
        weight = quantized.model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(weight, model.model.layers[0].self_attn.q_proj.weight, rtol=0, atol=0)

    @parameterized.expand(
        [
            ("qwen2_5_vl", "visual", "model.visual."),
            ("qwen2_5_vl", "model.visual", "model.visual."),
            ("gemma3", "vision_tower", "model.vision_tower."),
            ("llama", "mlp", ".mlp."),
            ("llama", "layers.0", "layers.0."),
            ("llama", "layers.[01].mlp", ".mlp."),
        ]
    )
    def test_a_name_leaves_all_that_is_in_modules_of_this_name(self, architecture, name, part):
        quantized, _ = self.quantize(architecture, Exl3Config(bits=1, effort="fast", modules_to_not_convert=[name]))
        layers = [path for path, module in quantized.named_modules() if isinstance(module, Exl3Linear)]
        self.assertTrue(layers)
        self.assertEqual([path for path in layers if part in path], [])

    @parameterized.expand(
        [
            ("vision", "`vision` is the name of no module, there is `lm_head`, `model`"),
            ("mpl", "`mpl` is the name of no module, there is `mlp`"),
            ("q_porj", "no module, there is .*`q_proj`"),
            ("model.layers.7", "no module, there is .*`model.layers.1`"),
            ("(", "is not a regular expression"),
        ]
    )
    def test_names_of_no_module_are_an_error(self, name, message):
        with self.assertRaisesRegex(ValueError, message):
            self.quantize("llama", Exl3Config(modules_to_not_convert=["mlp", name]))

    def test_a_field_of_a_dict_that_is_no_argument(self):
        with self.assertRaisesRegex(TypeError, "no argument `bit`.*`bits`"):
            self.quantize("llama", {"quant_method": "exl3", "bit": 3})

    def test_a_dict_without_a_codebook_means_the_default(self):
        config = {"quant_method": "exl3", "bits": 1, "modules_to_not_convert": ["mlp"]}
        quantized, _ = self.quantize("llama_tied", config)
        self.assertEqual(quantized.model.layers[0].self_attn.q_proj.codebook, "mul1")

    def test_names_of_modules_that_stay_anyway_are_none(self):
        quantized, _ = self.quantize("llama", quick_config(bits=1, modules_to_not_convert=["lm_head", "embed_tokens"]))
        self.assertIs(type(quantized.lm_head), nn.Linear)

    def test_a_head_that_is_to_be_quantized_and_to_stay(self):
        with self.assertRaisesRegex(ValueError, "`head_bits` of 6 .*lm_head.*Unset one"):
            self.quantize("llama", Exl3Config(head_bits=6, modules_to_not_convert=["lm_head"]))

    @parameterized.expand([1.25, 2.25, 3.3, 4.5, 6.7])
    def test_fractional_bits_meet_the_average(self, bits):
        quantized, _ = self.quantize("llama", quick_config(bits=bits))
        layers = [module for module in quantized.modules() if isinstance(module, Exl3Linear)]
        weights = [layer.in_features * layer.out_features for layer in layers]
        average = sum(layer.bits * weight for layer, weight in zip(layers, weights)) / sum(weights)
        self.assertLessEqual(average, bits)
        self.assertGreater(average, bits - 0.1)
        self.assertGreater(len({layer.bits for layer in layers}), 1)

    def test_overrides(self):
        """Layers that overrides name have those rates, the others the average; both come back from a checkpoint."""
        overrides = {"*.down_proj": 6, "model.layers.1.self_attn.*": 5, "*.1.self_attn.q_proj": 16}
        with self.assertLogs("transformers", "INFO") as logs:
            quantized, model = self.quantize("llama", quick_config(bits=2.25, overrides=overrides))
        layers = {name: module.bits for name, module in quantized.named_modules() if isinstance(module, Exl3Linear)}
        for name, bits in layers.items():
            if name.endswith("down_proj"):
                self.assertEqual(bits, 6)
            elif "layers.1.self_attn" in name:
                self.assertEqual(bits, 5)
            else:
                self.assertIn(bits, (2, 2.5, 3))
        free = {name: bits for name, bits in layers.items() if bits <= 3}
        weights = {name: quantized.get_submodule(name).plain.weight.numel() for name in layers}
        average = sum(bits * weights[name] for name, bits in free.items()) / sum(weights[name] for name in free)
        self.assertTrue(2.15 < average <= 2.25)
        q_proj = "model.layers.1.self_attn.q_proj"
        torch.testing.assert_close(
            quantized.get_submodule(q_proj).weight, model.get_submodule(q_proj).weight, rtol=0, atol=0
        )
        self.assertIs(type(quantized.get_submodule(q_proj)), nn.Linear)
        (table,) = [record.getMessage() for record in logs.records if "Quantizing LlamaForCausalLM" in record.msg]
        self.assertIn("5 bits: model.layers.1.self_attn.k_proj, ", table)
        self.assertIn("6 bits: model.layers.0-1.mlp.down_proj", table)
        result = outputs(quantized, "llama")
        with tempfile.TemporaryDirectory() as folder:
            quantized.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(outputs(loaded, "llama"), result, rtol=0, atol=0)
        self.assertEqual(loaded.config.quantization_config.overrides, overrides)

    @parameterized.expand(
        [
            ("phi3", {"*.q_proj": 6, "*.gate_up_proj": 3, "*.up_proj": 4}, {"q": 6, "k": 2, "gate": 3, "up": 4}),
            ("mixtral", {"*.down_proj": 6, "*.w1": 3}, {"down": 6, "gate": 3, "up": 2}),
            ("gpt_oss", {"*.experts": 1, "*.experts.gate_up_proj": 4}, {"down": 1, "gate": 4, "up": 4, "q": 2}),
            ("nemotron_h", {"*.experts.up_proj": 4}, {"expert_up": 4, "expert_down": 2}),
        ]
    )
    def test_overrides_of_parts(self, name, overrides, expected):
        """Parts of fused projections, and projections of all experts of a layer, by the names that files have for them."""
        quantized, _ = self.quantize(name, quick_config(bits=2, overrides=overrides))
        separate_experts(quantized)
        for part, bits in expected.items():
            ending = (part, f"{part}_proj", f"expert_{part}")
            layers = [
                m for path, m in quantized.named_modules() if path.endswith(ending) and isinstance(m, Exl3Linear)
            ]
            self.assertEqual({layer.bits for layer in layers}, {bits}, part)

    @parameterized.expand(
        [
            ("llama", {"down_proj": 4}, r"'down_proj' matches no layer .* such as '\*\.down_proj'"),
            ("llama", {"lm_head": 4}, r"'lm_head' matches only modules that are not quantized .*`head_bits`"),
            ("llama", {"*.up_proj": 4}, r"'\*\.up_proj' matches only modules .*`modules_to_not_convert`"),
            ("phi3", {"*.q_proj": 16}, r"of model.layers.0.self_attn.qkv_proj some parts .*'q_proj': 16, 'k_proj': 2"),
            ("qwen3_moe", {"*.mlp.gate": 4}, r"'\*\.mlp\.gate' matches only modules that are not quantized"),
            ("llama", {"*": 16}, r"There is nothing to quantize in LlamaForCausalLM: .*`overrides` \({'\*': 16}\)"),
        ]
    )
    def test_overrides_that_cannot_be_followed_are_errors(self, name, overrides, message):
        skip = ["mlp.up_proj"] if name == "llama" else None
        config = quick_config(bits=2, overrides=overrides, modules_to_not_convert=skip)
        with self.assertRaisesRegex(ValueError, message):
            self.quantize(name, config)

    @parameterized.expand([(torch.bfloat16,), (torch.float16,)])
    def test_other_dtypes(self, dtype):
        quantized, model = self.quantize("llama", dtype=dtype)
        layer = quantized.model.layers[0].mlp.up_proj
        self.assertEqual((layer.suh.dtype, layer.svh.dtype, layer.weight.dtype), (torch.float16, torch.float16, dtype))
        result = outputs(quantized, "llama")
        self.assertEqual(result.dtype, dtype)
        self.assertLess(error(result.float(), outputs(model, "llama")), 0.06)

    def test_the_same_weights_give_the_same_bytes_on_any_number_of_threads(self):
        states, threads = [], torch.get_num_threads()
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                states.append(self.quantize("gpt_oss", Exl3Config(bits=2.3, head_bits=3))[0].state_dict())
        finally:
            torch.set_num_threads(threads)
        for state in states[1:]:
            torch.testing.assert_close(state, states[0], rtol=0, atol=0)

    def test_signs_come_from_the_name_of_a_layer(self):
        quantized, _ = self.quantize("llama_tied", Exl3Config(bits=1, effort="fast", modules_to_not_convert=["mlp"]))
        layers = {path: module for path, module in quantized.named_modules() if isinstance(module, Exl3Linear)}
        for path, layer in layers.items():
            signs = encoder.random_signs(128, encoder.seed_of(path), 0)
            torch.testing.assert_close(layer.suh.data.sign().float(), signs.float(), rtol=0, atol=0)
        self.assertEqual(len(layers), 4)

    def test_a_layer_has_the_tensors_of_its_weight_and_its_name(self):
        config = Exl3Config(bits=2, effort="fast", modules_to_not_convert=["mlp"])
        quantized, plain = self.quantize("llama_tied", config)
        path = "model.layers.0.self_attn.o_proj"
        made = encoder.quantize_weight(
            plain.get_submodule(path).weight.detach(),
            2,
            seed=encoder.seed_of(path),
            search=encoding.search_on(torch.device("cpu")),
            effort="fast",
        )
        layer = quantized.get_submodule(path)
        torch.testing.assert_close([layer.trellis.data, layer.suh.data, layer.svh.data], [*made], rtol=0, atol=0)

    @parameterized.expand([("alone", None), ("with_data", [[3, 4, 5, 6]])])
    def test_there_is_nothing_to_quantize_on_the_meta_device(self, _, dataset):
        folder, _, auto_class = self.source("llama")
        for device_map in ("meta", {"": "meta"}):
            with self.assertRaisesRegex(ValueError, "on the meta device.*leave it out"):
                config = Exl3Config(dataset=dataset)
                auto_class.from_pretrained(folder, quantization_config=config, device_map=device_map)

    def test_what_moves_inputs_stays_where_a_module_is_replaced(self):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        quantized, _ = self.quantize("llama_tied", Exl3Config(bits=1, effort="fast", modules_to_not_convert=["mlp"]))
        path, hook = "model.layers.0.self_attn.q_proj", AlignDevicesHook(execution_device="cpu")
        add_hook_to_module(quantized.get_submodule(path), hook)
        self.assertIs(quantized.dequantize().get_submodule(path)._hf_hook, hook)

    def test_biases_that_float16_cannot_hold_are_an_error(self):
        folder, model, auto_class = self.source("qwen2")
        model.model.layers[0].self_attn.v_proj.bias.data[3] = 1e6
        with tempfile.TemporaryDirectory() as other:
            model.save_pretrained(other)
            with self.assertRaisesRegex(ValueError, "model.layers.0.self_attn.v_proj.bias cannot be stored"):
                auto_class.from_pretrained(other, quantization_config=quick_config(bits=1))

    @parameterized.expand(
        [
            ("llama", "model.layers.0.mlp.up_proj", (100, 120), (100, 128)),  # after padding they are alike
            ("gpt2", "transformer.h.0.attn.c_attn", (100, 384), (128, 384)),
            ("llama_tied", "model.embed_tokens", (90, 128), (100, 128)),
        ]
    )
    def test_a_weight_of_another_shape_is_an_error(self, name, path, shape, expected):
        folder, _, auto_class = self.source(name)
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, other, dirs_exist_ok=True)
            tensors = read_tensors(other) | {f"{path}.weight": torch.zeros(shape)}
            save_file(tensors, os.path.join(other, "model.safetensors"), metadata={"format": "pt"})
            config = quick_config(bits=1, embedding_bits=1 if "embed" in path else None)
            message = f"{path}.weight has the shape {[*shape]}, the model's is {[*expected]}"
            with self.assertRaisesRegex(ValueError, re.escape(message)):
                auto_class.from_pretrained(other, quantization_config=config)

    def test_nothing_is_quantized_after_the_first_error(self):
        folder, _, auto_class = self.source("llama")
        with mock.patch.object(Exl3Linear, "encoded", side_effect=ValueError("no")) as encoded:
            with self.assertRaisesRegex(ValueError, "no. Download"):
                auto_class.from_pretrained(folder, quantization_config=quick_config(bits=1))
        self.assertEqual(encoded.call_count, 1)

    def test_the_first_error_is_told_where_layers_are_offloaded(self):
        """And not what moving a model that is not whole ends in."""
        folder, _, auto_class = self.source("llama")
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        with tempfile.TemporaryDirectory() as other, self.assertRaisesRegex(ValueError, "no. Download"):
            with mock.patch.object(Exl3Linear, "encoded", side_effect=ValueError("no")):
                auto_class.from_pretrained(
                    folder, quantization_config=quick_config(bits=1), device_map=places, offload_folder=other
                )

    @parameterized.expand(
        [
            ("llama", "model.layers.0.mlp.up_proj.weight", float("nan"), "model.layers.0.mlp.up_proj.weight"),
            ("gpt2", "transformer.h.0.mlp.c_fc.weight", float("-inf"), "transformer.h.0.mlp.c_fc.weight"),
            ("phi3", "model.layers.0.mlp.gate_up_proj.weight", float("inf"), "mlp.gate_up_proj.gate_proj.weight"),
            ("mixtral", "model.layers.0.mlp.experts.down_proj", float("nan"), "mlp.experts.0.expert_down.weight"),
        ]
    )
    def test_weights_that_are_not_finite_are_an_error_that_names_them(self, name, parameter, value, message):
        folder, model, auto_class = self.source(name)
        model.get_parameter(parameter).data.view(-1)[5] = value
        with tempfile.TemporaryDirectory() as other:
            model.save_pretrained(other)
            with self.assertRaisesRegex(ValueError, f"{message} cannot be quantized(.*)modules_to_not_convert"):
                auto_class.from_pretrained(other, quantization_config=quick_config(bits=1))

    def test_float_weights_that_are_cut_short_are_an_error_that_names_the_file(self):
        folder, _, auto_class = self.source("llama")
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, other, dirs_exist_ok=True)
            file = os.path.join(other, "model.safetensors")
            os.truncate(file, os.path.getsize(file) - 1)
            with self.assertRaisesRegex(
                ValueError, f"This checkpoint cannot be loaded:\n  {file}: no whole safetensors"
            ) as caught:
                auto_class.from_pretrained(other, quantization_config=quick_config(bits=1))
        self.assertNotIn("EXL3", str(caught.exception))

    def test_experts_that_the_checkpoint_has_but_in_part_stay_plain(self):
        """What came is as it was, what did not is initialised."""
        folder, model, auto_class = self.source("gpt_oss")
        state = {name: value for name, value in model.state_dict().items() if not name.endswith("gate_up_proj")}
        with tempfile.TemporaryDirectory() as other:
            model.save_pretrained(other, state_dict=state)
            quantized = auto_class.from_pretrained(other, quantization_config=quick_config(bits=8))
        experts, expected = (m.model.layers[0].mlp.experts for m in (quantized, model))
        self.assertIs(type(experts), type(expected))
        error_of_coding = error(experts.down_proj.detach(), expected.down_proj.detach())
        self.assertLess(error_of_coding, 0.01)
        torch.testing.assert_close(experts.down_proj_bias, expected.down_proj_bias, rtol=0, atol=1e-3)
        self.assertGreater(float(experts.gate_up_proj.detach().std()), 0)

    def test_weights_that_the_checkpoint_lacks_are_initialised_and_stay_plain(self):
        folder, model, auto_class = self.source("llama")
        state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
        with tempfile.TemporaryDirectory() as other:
            model.save_pretrained(other, state_dict=state)
            quantized, info = auto_class.from_pretrained(
                other, quantization_config=quick_config(bits=4), output_loading_info=True
            )
        self.assertIn("model.layers.1.mlp.up_proj.weight", info["missing_keys"])
        layer = quantized.model.layers[1].mlp.up_proj
        self.assertIs(type(layer), nn.Linear)
        self.assertTrue(layer.weight.requires_grad)
        self.assertTrue(0.01 < float(layer.weight.detach().std()) < 0.04)  # `initializer_range` is 0.02
        self.assertIsInstance(quantized.model.layers[0].mlp.up_proj, Exl3Linear)
        self.assertTrue(outputs(quantized, "llama").isfinite().all())

    def test_odd_sizes_and_extreme_matrices(self):
        config = copy.deepcopy(MODELS["llama"][1])
        config.hidden_size, config.intermediate_size, config.head_dim = 72, 37, 18
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
            model.model.layers[0].mlp.gate_proj.weight.fill_(0.5)
            model.model.layers[1].mlp.up_proj.weight[:, 3] = 0
            model.model.layers[1].mlp.down_proj.weight[7] = 0
            model.model.layers[1].self_attn.q_proj.weight.mul_(1e-40)  # denormal
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quick_config(bits=8))
        layers = quantized.model.layers
        torch.testing.assert_close(layers[0].mlp.up_proj.weight, torch.zeros(37, 72), rtol=0, atol=0)
        self.assertLess(error(layers[0].mlp.gate_proj.weight, torch.full((37, 72), 0.5)), 0.1)
        self.assertEqual(float(layers[1].mlp.up_proj.weight[:, 3].abs().max()), 0)
        self.assertEqual(float(layers[1].mlp.down_proj.weight[7].abs().max()), 0)
        self.assertLess(error(outputs(quantized, "llama"), outputs(model, "llama")), 0.1)

    def test_empty_matrices_stay(self):
        config = copy.deepcopy(MODELS["llama"][1])
        config.intermediate_size = 0
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch: initialising nothing
            model = LlamaForCausalLM(config)
            model.save_pretrained(folder)
            quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quick_config(bits=8))
        self.assertIs(type(quantized.model.layers[0].mlp.up_proj), nn.Linear)
        self.assertEqual(count(quantized)[0], 2 * 4)
        self.assertLess(error(outputs(quantized, "llama"), outputs(model, "llama")), 0.05)

    def test_on_the_fly_with_a_device_map(self):
        folder, _, auto_class = self.source("llama")
        expected = outputs(self.quantize("llama", quick_config(bits=2))[0], "llama")
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
        for placed in ("auto", device_map):
            with tempfile.TemporaryDirectory() as offload:
                model = auto_class.from_pretrained(
                    folder, quantization_config=quick_config(bits=2), device_map=placed, offload_folder=offload
                )
                torch.testing.assert_close(outputs(model, "llama"), expected, rtol=0, atol=0)
                del model
                gc.collect()
