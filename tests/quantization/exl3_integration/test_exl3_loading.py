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
"""Loading what converters write: every layout of the format, into every kind of module that models have."""

import copy
import tempfile
import unittest
from unittest.mock import Mock, patch

import torch
from parameterized import parameterized

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Exl3Config,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    core_model_loading,
)
from transformers.integrations.exl3 import format, ops
from transformers.integrations.exl3.checkpoint import Exl3CheckpointError
from transformers.integrations.exl3.embeddings import Exl3Embedding
from transformers.integrations.exl3.experts import Exl3Experts
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module, Exl3SlicedLinear, Exl3SplitLinear
from transformers.testing_utils import require_accelerate, require_torch

from .synthetic import SyntheticCheckpoint, random_linear, read_tensors
from .tiny_models import MODELS, tiny_inputs, tiny_model


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def parts(parent, sizes):
    return {f"{parent}.{name}": size for name, size in sizes.items()}


@require_torch
@require_accelerate
class Exl3LoadingTest(unittest.TestCase):
    def check(self, name, checkpoint, auto_class=None, shards=1, edit=None):
        """
        A checkpoint loads without anything missing, has the outputs of the dense weights that it means, is saved as it
        was, and loads as a plain model too. `edit` changes what only the quantized checkpoint has.
        """
        auto_class = auto_class or tiny_model(name)[1]
        inputs = tiny_inputs(name)
        with tempfile.TemporaryDirectory() as dense, tempfile.TemporaryDirectory() as folder:
            checkpoint.save(dense, checkpoint.dense, quantized=False)
            expected = self.outputs(auto_class.from_pretrained(dense, dtype=torch.float32), inputs)
            if edit is not None:
                edit(checkpoint)
            checkpoint.save(folder, checkpoint.tensors, shards=shards)
            model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            self.assertFalse(info["missing_keys"])
            self.assertFalse(info["unexpected_keys"])
            result = self.outputs(model, inputs)
            self.assert_close(result, expected)

            plain = auto_class.from_pretrained(
                folder, dtype=torch.float32, quantization_config=Exl3Config(dequantize=True)
            )
            self.assertEqual(count(plain, Exl3Module), 0)
            self.assertFalse(hasattr(plain.config, "quantization_config"))
            self.assert_close(self.outputs(plain, inputs), expected)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            torch.testing.assert_close(read_tensors(folder), checkpoint.tensors, rtol=0, atol=0)
            torch.testing.assert_close(
                self.outputs(auto_class.from_pretrained(folder), inputs), result, rtol=0, atol=0
            )
        return model

    @staticmethod
    @torch.no_grad()
    def outputs(model, inputs):
        return model(**inputs)[0]

    def assert_close(self, result, expected):
        self.assertLess(float((result - expected).abs().max() / expected.abs().max()), 1e-5)

    @parameterized.expand(format.BITS)
    def test_every_rate(self, bits):
        model, _ = tiny_model("llama")
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize_all("layers.0", bits=bits)
        loaded = self.check("llama", checkpoint)
        self.assertEqual(count(loaded, Exl3Linear), 7)
        self.assertEqual(loaded.model.layers[0].mlp.up_proj.bits, bits)

    def test_bits_codebooks_signs_and_head_differ_within_a_model(self):
        model, _ = tiny_model("llama")
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize("model.layers.0.self_attn.q_proj", codebook="3inst", signs=("su",))
        checkpoint.quantize("model.layers.0.self_attn.k_proj", codebook="mcg", bits=1)
        checkpoint.quantize("model.layers.0.self_attn.v_proj", bits=2.5)
        checkpoint.quantize_all("layers.0", bits=3)
        checkpoint.quantize("lm_head", bits=6)
        self.check("llama", checkpoint, shards=3)

    @parameterized.expand([("su",), ("sv",), ("su", "sv")])
    def test_packed_signs(self, *signs):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):  # the last two have padding on one side
            checkpoint.quantize(f"model.layers.0.{name}", signs=signs)
        loaded = self.check("llama", checkpoint)
        stored = set(loaded.model.layers[0].mlp.down_proj.state_dict())
        self.assertEqual(stored, {"trellis", "mul1", *signs, *({"suh", "svh"} - {f"{sign}h" for sign in signs})})

    @parameterized.expand([(torch.float16,), (torch.float32,), (torch.bfloat16,)])
    def test_biases(self, dtype):
        model, _ = tiny_model("qwen2")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.normal_()
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize_all()
        for name, tensor in checkpoint.tensors.items():
            if name.endswith("_proj.bias"):
                checkpoint.tensors[name] = tensor.to(dtype)
                checkpoint.dense[name] = tensor[: len(checkpoint.dense[name])].to(dtype).float()
        self.check("qwen2", checkpoint)

    @parameterized.expand(["bert", "t5"])
    def test_encoders(self, name):
        checkpoint = SyntheticCheckpoint(tiny_model(name)[0])
        checkpoint.quantize_all("encoder")
        self.check(name, checkpoint)

    def test_conv1d(self):
        checkpoint = SyntheticCheckpoint(tiny_model("gpt2")[0])
        name = next(key for key in checkpoint.dense if key.endswith("h.0.mlp.c_fc.weight")).removesuffix(".weight")
        weight = checkpoint.tensors.pop(f"{name}.weight")
        tensors, dense = random_linear(weight.shape[1], weight.shape[0], bias=checkpoint.tensors.pop(f"{name}.bias"))
        checkpoint.dense |= {
            f"{name}.weight": dense.T.contiguous(),
            f"{name}.bias": tensors["bias"][: weight.shape[1]].float(),
        }
        checkpoint.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        self.check("gpt2", checkpoint)

    @parameterized.expand([("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
    def test_experts_in_both_namings(self, *projections):
        name = "qwen3_moe" if projections[0] == "gate_proj" else "mixtral"
        checkpoint = SyntheticCheckpoint(tiny_model(name)[0])
        expert = next(key for key in checkpoint.tensors if f"experts.0.{projections[0]}" in key)
        checkpoint.quantize(expert.removesuffix(".weight"), bits=2)  # the experts of a layer may differ
        checkpoint.quantize_all("layers.0")
        loaded = self.check(name, checkpoint)
        self.assertEqual(count(loaded, Exl3Experts), 1)
        self.assertEqual(loaded.model.layers[0].mlp.experts.projection(0, "gate").bits, 2)

    def test_steps_of_loading_follow_stacks_and_not_experts(self):
        auto_class, config = MODELS["qwen3_moe"]
        steps = []
        for number in (2, 12):
            config = Qwen3MoeConfig(**config.to_dict() | {"num_experts": number})
            checkpoint = SyntheticCheckpoint(auto_class.from_config(config))
            checkpoint.quantize_all("layers.0")
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(folder, checkpoint.tensors, shards=3)
                read = Mock(wraps=core_model_loading.spawn_materialize)
                with patch.object(core_model_loading, "spawn_materialize", read):
                    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
            self.assertFalse(info["missing_keys"] | info["unexpected_keys"])
            steps.append(read.call_count)
            self.assertLessEqual(read.call_count, len(model.state_dict()))
        self.assertEqual(steps[0], steps[1])

    def test_stacks_are_saved_in_the_dtypes_of_the_format(self):
        checkpoint = SyntheticCheckpoint(tiny_model("qwen3_moe")[0])
        checkpoint.quantize_all("layers.0")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
            checkpoint.save(folder, checkpoint.tensors)
            model = AutoModelForCausalLM.from_pretrained(folder)
            for name, parameter in model.named_parameters():
                if name.endswith("suh"):
                    parameter.data = parameter.float()  # as PEFT does it for training
            model.save_pretrained(saved)
            torch.testing.assert_close(read_tensors(saved), checkpoint.tensors, rtol=0, atol=0)

    def test_experts_without_gate(self):
        checkpoint = SyntheticCheckpoint(tiny_model("nemotron_h")[0])
        checkpoint.quantize_all("experts.")
        self.assertEqual(count(self.check("nemotron_h", checkpoint), Exl3Experts), 1)

    def test_experts_that_the_source_kept_in_one_transposed_interleaved_tensor(self):
        checkpoint = SyntheticCheckpoint(tiny_model("gpt_oss")[0])
        prefix = "model.layers.0.mlp.experts"
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        gate_up, gate_up_bias, down, down_bias = (checkpoint.dense[f"{prefix}.{name}"] for name in names)
        for name in names:
            del checkpoint.tensors[f"{prefix}.{name}"]
        for expert in range(len(down)):
            pieces = {
                "gate_proj": (gate_up[expert, :, ::2], gate_up_bias[expert, ::2]),
                "up_proj": (gate_up[expert, :, 1::2], gate_up_bias[expert, 1::2]),
                "down_proj": (down[expert], down_bias[expert]),
            }
            for seed, (projection, (weight, bias)) in enumerate(pieces.items()):
                bias.normal_()
                tensors, dense = random_linear(weight.shape[1], weight.shape[0], bias=bias, seed=10 * expert + seed)
                weight.copy_(dense.T)
                bias.copy_(bias.half())
                checkpoint.tensors |= {f"{prefix}.{expert}.{projection}.{k}": tensor for k, tensor in tensors.items()}
        self.check("gpt_oss", checkpoint, shards=4)  # an expert's tensors stand in several files

    def test_parts_of_fused_projections(self):
        checkpoint = SyntheticCheckpoint(tiny_model("phi3")[0])
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        query_key_value = parts(attention, {"q_proj": 128, "k_proj": 64, "v_proj": 64})
        checkpoint.quantize(f"{attention}.qkv_proj", query_key_value, bits=3)
        checkpoint.quantize(f"{mlp}.gate_up_proj", parts(mlp, {"gate_proj": 100, "up_proj": 100}), bits=2)
        loaded = self.check("phi3", checkpoint, shards=3)
        self.assertEqual(count(loaded, Exl3SplitLinear), 2)

    def test_gate_and_up_of_glm4(self):
        checkpoint = SyntheticCheckpoint(tiny_model("glm4")[0])
        mlp = "model.layers.0.mlp"
        checkpoint.quantize(f"{mlp}.gate_up_proj", parts(mlp, {"gate_proj": 100, "up_proj": 100}))
        self.assertEqual(count(self.check("glm4", checkpoint), Exl3SplitLinear), 1)

    @parameterized.expand([("q_proj", "k_proj", "v_proj"), ("q", "k", "v")])
    def test_vision_towers(self, *names):
        checkpoint = SyntheticCheckpoint(tiny_model("qwen2_5_vl")[0])
        attention = "visual.blocks.0.attn"
        checkpoint.quantize(f"{attention}.qkv", parts(attention, dict.fromkeys(names, 128)), bits=6)
        checkpoint.quantize_all("visual.blocks")
        checkpoint.quantize_all("layers")
        checkpoint.quantize("lm_head", bits=6)
        self.check("qwen2_5_vl", checkpoint)

    def test_slices_of_wide_mlps(self):
        config = copy.deepcopy(MODELS["llama"][1])
        config.intermediate_size = 192
        checkpoint = SyntheticCheckpoint(LlamaForCausalLM(config))
        mlp = "model.layers.0.mlp"
        for projection, sign, bits in (("gate_proj", 1, 4), ("up_proj", 1, 3), ("down_proj", -1, 4)):
            sizes = {f"{projection}.slice.0": sign * 128, f"{projection}.slice.1": sign * 64}
            checkpoint.quantize(f"{mlp}.{projection}", parts(mlp, sizes), bits=bits)
        self.assertEqual(count(self.check("llama", checkpoint), Exl3SlicedLinear), 3)

    def test_slices_that_are_not_all_there_are_an_error(self):
        config = copy.deepcopy(MODELS["llama"][1])
        config.intermediate_size = 320
        checkpoint = SyntheticCheckpoint(LlamaForCausalLM(config))
        mlp = "model.layers.0.mlp"
        checkpoint.quantize(f"{mlp}.up_proj", parts(mlp, {"up_proj.slice.0": 128, "up_proj.slice.2": 192}))
        message = f"{mlp}.up_proj: of its slices the checkpoint has only {mlp}.up_proj.slice.0, {mlp}.up_proj.slice.2"
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            self.assertRaisesRegex(Exl3CheckpointError, message, LlamaForCausalLM.from_pretrained, folder)

    @parameterized.expand([(100,), (128,), (99,), (110,), (127,)])
    def test_a_bias_is_as_long_as_the_layer_or_as_its_codes(self, length):
        config = copy.deepcopy(MODELS["llama"][1])
        config.mlp_bias = True
        checkpoint = SyntheticCheckpoint(LlamaForCausalLM(config))
        name = "model.layers.0.mlp.up_proj"
        checkpoint.quantize(name)
        checkpoint.tensors[f"{name}.bias"] = torch.zeros(length, dtype=torch.float16)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            if length in (100, 128):
                LlamaForCausalLM.from_pretrained(folder)
                return
            message = f"{name}.* has (a bias of )?{length} (elements )?for (100|128) output features"
            self.assertRaisesRegex(Exl3CheckpointError, message, LlamaForCausalLM.from_pretrained, folder)

    def test_a_quantized_head_is_untied_whatever_the_config_says(self):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize("lm_head", bits=6)
        loaded = self.check("llama", checkpoint, edit=lambda c: c.config.update(tie_word_embeddings=True))
        self.assertFalse(loaded.config.tie_word_embeddings)
        loaded.tie_weights()
        self.assertIsInstance(loaded.lm_head, Exl3Linear)

    @parameterized.expand([(True, True), (True, False), (False, True), (None, True)])
    def test_a_quantized_head_is_untied_under_a_nested_text_config(self, outer, nested):
        """Whichever of the two configs says that it is tied; the outer one may say nothing."""
        checkpoint = SyntheticCheckpoint(tiny_model("gemma3")[0])
        head = "language_model.lm_head"  # the name in files of this architecture
        tensors, checkpoint.dense[f"{head}.weight"] = random_linear(100, 128, bits=6)

        def tie(outer, nested):
            for config, is_tied in ((checkpoint.config, outer), (checkpoint.config["text_config"], nested)):
                config["tie_word_embeddings"] = is_tied
                if is_tied is None:
                    del config["tie_word_embeddings"]

        def edit(checkpoint):
            checkpoint.tensors |= {f"{head}.{leaf}": tensor for leaf, tensor in tensors.items()}
            tie(outer, nested)

        tie(False, False)
        loaded = self.check("gemma3", checkpoint, edit=edit)
        self.assertFalse(loaded.config.get_text_config().tie_word_embeddings)
        self.assertFalse(loaded.config.tie_word_embeddings)
        loaded.tie_weights()
        self.assertIsInstance(loaded.lm_head, Exl3Linear)

    def test_renamed_prefixes(self):
        checkpoint = SyntheticCheckpoint(tiny_model("gemma3")[0])
        checkpoint.quantize_all("language_model.model.layers")
        loaded = self.check("gemma3", checkpoint)
        self.assertIsInstance(loaded.model.language_model.layers[0].mlp.up_proj, Exl3Linear)

    @parameterized.expand([False, True])
    def test_quantized_embeddings(self, says_tied):
        checkpoint = SyntheticCheckpoint(tiny_model("gemma3_text")[0])
        generator = torch.Generator().manual_seed(0)
        trellis = torch.randint(-(1 << 15), 1 << 15, (100, 65), generator=generator).to(torch.int16)
        trellis[:, 0] = torch.full((100,), 0.1).half().view(torch.int16)  # the scale of each ring
        signs = torch.randn(1, 256, generator=generator).sign().half()
        checkpoint.dense["model.embed_tokens.weight"] = ops.embedding(torch.arange(100), trellis, signs, 128)
        checkpoint.dense["lm_head.weight"] = torch.randn(100, 128, generator=generator)
        checkpoint.config["tie_word_embeddings"] = False
        checkpoint.tensors["lm_head.weight"] = checkpoint.dense["lm_head.weight"]
        checkpoint.quantize("lm_head")

        def edit(checkpoint):
            del checkpoint.tensors["model.embed_tokens.weight"]
            checkpoint.tensors |= {"model.embed_tokens.trellis": trellis, "model.embed_tokens.signs": signs}
            checkpoint.config["tie_word_embeddings"] = says_tied

        loaded = self.check("gemma3_text", checkpoint, edit=edit)
        self.assertEqual(count(loaded, Exl3Embedding), 1)

    @parameterized.expand(
        [
            ("rows", "model.embed_tokens", (101, 65), 1, "table of 101 x 256, the model's is 100 x 128"),
            ("columns", "model.embed_tokens", (100, 130), 2, "table of 100 x 512, the model's is 100 x 128"),
            ("kind", "model.norm", (100, 65), 1, "table, and the model has LlamaRMSNorm at"),
        ]
    )
    def test_tables_that_are_none_of_the_model_are_an_error(self, _, name, shape, groups, message):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        del checkpoint.tensors[f"{name}.weight"]
        checkpoint.tensors[f"{name}.trellis"] = torch.zeros(shape, dtype=torch.int16)
        checkpoint.tensors[f"{name}.signs"] = torch.ones(groups, 256, dtype=torch.float16)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            message = f"{name} is a quantized embedding {message}"
            with self.assertRaisesRegex(Exl3CheckpointError, message) as caught:
                LlamaForCausalLM.from_pretrained(folder)
        self.assertNotRegex(str(caught.exception), "has neither|is not in")  # what is there, and does not fit

    def test_padding_of_what_is_not_quantized_is_cut_off(self):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all("layers.0")
        down = "model.layers.1.mlp.down_proj.weight"
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as dense:
            checkpoint.save(dense, checkpoint.dense, quantized=False)
            head = checkpoint.tensors["lm_head.weight"]
            checkpoint.tensors["lm_head.weight"] = torch.nn.functional.pad(head, (0, 0, 0, 28), value=7.0)
            checkpoint.tensors[down] = torch.nn.functional.pad(checkpoint.tensors[down], (0, 28), value=7.0)
            checkpoint.save(folder, checkpoint.tensors)
            inputs = tiny_inputs("llama")
            expected = self.outputs(AutoModelForCausalLM.from_pretrained(dense), inputs)
            for kwargs in ({}, {"quantization_config": Exl3Config(dequantize=True)}):
                model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
                self.assertEqual(model.lm_head.weight.shape, head.shape)
                self.assert_close(self.outputs(model, inputs), expected)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
                torch.testing.assert_close(model.lm_head.weight.data, head.bfloat16(), rtol=0, atol=0)

    def test_the_base_model_loads_without_the_head(self):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all()
        checkpoint.quantize("lm_head")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as dense:
            checkpoint.save(dense, checkpoint.dense, quantized=False)
            checkpoint.save(folder, checkpoint.tensors)
            inputs = tiny_inputs("llama")
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
            self.assert_close(self.outputs(model, inputs), self.outputs(AutoModel.from_pretrained(dense), inputs))

    def test_the_dtypes_of_what_is_not_quantized_may_be_mixed(self):
        """Converters store linear layers in float16 and keep bfloat16 for the rest; the config tells the model's dtype."""
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all("layers.0")
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype is torch.float32:
                checkpoint.tensors[name] = tensor.to(torch.float16 if "proj" in name else torch.bfloat16)
        checkpoint.config["dtype"] = "bfloat16"
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                plain = {p.dtype for name, p in model.named_parameters() if name.endswith("weight")}
                self.assertEqual((model.dtype, plain), (expected, {expected}))
                self.assertEqual(self.outputs(model, tiny_inputs("llama")).dtype, expected)

    @parameterized.expand([torch.bfloat16, torch.float16, torch.float64])
    def test_a_plain_model_in_other_dtypes(self, dtype):
        checkpoint = SyntheticCheckpoint(tiny_model("phi3")[0])
        sizes = parts("model.layers.0.self_attn", {"q_proj": 128, "k_proj": 64, "v_proj": 64})
        checkpoint.quantize("model.layers.0.self_attn.qkv_proj", sizes)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            kwargs = {"dtype": dtype, "quantization_config": Exl3Config(dequantize=True)}
            plain = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
            self.assertEqual({parameter.dtype for parameter in plain.parameters()}, {dtype})
            weight = plain.model.layers[0].self_attn.qkv_proj.weight.detach()
            self.assertLess(
                float((weight.float() - checkpoint.dense["model.layers.0.self_attn.qkv_proj.weight"]).abs().max()),
                torch.finfo(dtype).eps + 1e-6,  # the largest weights are about 1
            )
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).dequantize()
            torch.testing.assert_close(loaded.model.layers[0].self_attn.qkv_proj.weight, weight, rtol=0, atol=0)

    @parameterized.expand(["llama", "mixtral"])
    def test_a_model_that_was_cast_is_dequantized_to_that_dtype(self, name):
        checkpoint = SyntheticCheckpoint(tiny_model(name)[0])
        checkpoint.quantize_all()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(torch.float32)
        plain = model.dequantize()
        self.assertEqual({parameter.dtype for parameter in plain.parameters()}, {torch.float32})
        plain(torch.tensor([[1, 2, 3]]))

    @parameterized.expand([(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-6)])
    def test_other_dtypes_keep_the_scales(self, dtype, tolerance):
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            inputs = tiny_inputs("llama")
            expected = self.outputs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), inputs)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            layer = model.model.layers[0].mlp.up_proj
            self.assertEqual((layer.suh.dtype, layer.weight.dtype), (torch.float16, dtype))
            result = self.outputs(model, inputs)
            self.assertEqual(result.dtype, dtype)
            error = (result.float() - expected).pow(2).mean().sqrt() / expected.std()
            self.assertLess(float(error), tolerance)

    def test_offloaded_and_mapped_models_have_the_same_outputs(self):
        checkpoint = SyntheticCheckpoint(tiny_model("phi3")[0])
        attention = "model.layers.0.self_attn"
        query_key_value = parts(attention, {"q_proj": 128, "k_proj": 64, "v_proj": 64})
        checkpoint.quantize(f"{attention}.qkv_proj", query_key_value)
        checkpoint.quantize_all("self_attn.o_proj")
        inputs = tiny_inputs("phi3")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as offload:
            checkpoint.save(folder, checkpoint.tensors)
            expected = self.outputs(AutoModelForCausalLM.from_pretrained(folder), inputs)
            on_disk = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
            on_disk |= {"model.layers.0": "disk"}
            for device_map in ("auto", on_disk):
                model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload)
                torch.testing.assert_close(self.outputs(model, inputs), expected, rtol=0, atol=0)
                with tempfile.TemporaryDirectory() as saved:
                    model.save_pretrained(saved)
                    torch.testing.assert_close(read_tensors(saved), checkpoint.tensors, rtol=0, atol=0)

    def test_images_only_need_their_own_class(self):
        checkpoint = SyntheticCheckpoint(tiny_model("qwen2_5_vl")[0])
        checkpoint.quantize_all("layers")
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            model = AutoModelForImageTextToText.from_pretrained(folder)
            self.assertGreater(count(model, Exl3Linear), 0)
