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
"""What is quantized on the fly of architectures of all kinds, and what upstream's conversions find while it is."""

import ast
import inspect
import json
import os
import tempfile
import textwrap
import unittest

import torch
from parameterized import parameterized

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    Exl3Config,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.core_model_loading import ConversionOps
from transformers.integrations.exl3.loading import replace_with_exl3_modules
from transformers.integrations.exl3.modules import Exl3Module
from transformers.integrations.exl3.planning import Plan
from transformers.testing_utils import require_accelerate, require_torch

from .tiny_models import ENCODER, MODELS, ONE_LAYER


# Upstream's conversions that read the model they load into, and what they read of a parameter there.
READS_THE_MODEL = {
    "Split": "shape",
    "Transpose": "shape",
    "Inkling2LoopDequantizeExperts": "dtype",
    "Inkling2UnpadVocab": "dtype",
}

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 96}
QWEN_VL = {
    "text_config": {
        **{**ONE_LAYER, **EXPERTS, "head_dim": 32},
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    },
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128}
    | {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}

LARA = {"layer_types": ["linear_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
LARA |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 32}

MOLMO = {
    "text_config": {**ONE_LAYER, "additional_vocab_size": 2},
    "vision_config": {
        **ONE_LAYER,
        "hidden_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    | {"image_size": [28, 28], "patch_size": 14, "num_position_embeddings": 4},
    "adapter_config": {"vision_feature_layer": [-1], "hidden_size": 32, "num_attention_heads": 1, "head_dim": 32}
    | {"num_key_value_heads": 1, "intermediate_size": 32, "text_hidden_size": 128},
}


def planned(name_or_model, config=None):
    """A model on the meta device and its plan."""
    model = name_or_model
    if isinstance(name_or_model, str):
        auto_class, model_config = MODELS[name_or_model]
        with torch.device("meta"):
            model = auto_class.from_config(model_config)
    config = config or Exl3Config(bits=2)
    config.codebook = config.codebook or "mul1"
    return model, Plan(model, config, ["lm_head"])


def conversions_that_read_the_model():
    """Names of the operations, upstream's, whose code uses what is passed to it as `model`."""

    def subclasses(kind):
        for subclass in kind.__subclasses__():
            yield subclass
            yield from subclasses(subclass)

    for kind in subclasses(ConversionOps):
        if ".exl3" in kind.__module__ or ".integrations." in kind.__module__:
            continue
        names = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))
        if any(
            (isinstance(node, ast.Name) and node.id == "model")
            or (isinstance(node, ast.Constant) and node.value == "model")
            for node in names
        ):
            yield kind.__name__


@require_torch
@require_accelerate
class Exl3ConversionsThatReadTheModelTest(unittest.TestCase):
    def test_all_are_known(self):
        """Of another one it has to be seen whether it finds what it reads while parameters wait to be quantized."""
        self.assertEqual(set(conversions_that_read_the_model()), set(READS_THE_MODEL))

    @parameterized.expand(sorted(MODELS))
    def test_parameters_that_wait_are_found(self, name):
        auto_class, config = MODELS[name]
        with torch.device("meta"):
            expected = {key: (p.shape, p.dtype) for key, p in auto_class.from_config(config).named_parameters()}
        model, plan = planned(name)
        replace_with_exl3_modules(model, plan.modules)
        found = {key: model.get_parameter(key) for key in expected}
        self.assertEqual(
            {key: (p.shape, p.dtype) for key, p in found.items() if not self._is_stored(model, key)},
            {key: value for key, value in expected.items() if not self._is_stored(model, key)},
        )

    @staticmethod
    def _is_stored(model, name):
        """Whether a parameter has the name of a quantized layer's, a bias: then it has that one's shape and dtype."""
        module = model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, Exl3Module) and name.rpartition(".")[2] in module.stored

    @parameterized.expand(
        [
            # Rows of query, key and value in one tensor, and as many of each as the model has.
            ("sarvam_moe", AutoModelForCausalLM, {**ONE_LAYER, **EXPERTS, "head_dim": 32}, ["mlp"], 4),
            # The same with two that stay plain.
            ("lara_mini", AutoModelForCausalLM, {**ONE_LAYER, **EXPERTS, **LARA, "head_dim": 32}, ["mlp"], 3),
            # The same with one that was asked to stay plain: it is not joined with nothing on saving.
            ("sarvam_moe", AutoModelForCausalLM, {**ONE_LAYER, **EXPERTS, "head_dim": 32}, ["mlp", "v_proj"], 3),
            # Experts in either orientation.
            ("qwen3_vl_moe", AutoModelForImageTextToText, QWEN_VL, ["visual", "self_attn"], 1),
            # Rows of different numbers in one tensor.
            ("molmo2", AutoModelForImageTextToText, MOLMO, ["vision_tower", "multi_modal_projector", "mlp"], 4),
        ]
    )
    def test_models(self, architecture, auto_class, fields, skip, modules):
        torch.manual_seed(0)
        model = auto_class.from_config(AutoConfig.for_model(architecture, **fields)).eval()
        config = Exl3Config(bits=8, effort="fast", modules_to_not_convert=skip)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            quantized = auto_class.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
            quantized.save_pretrained(folder)
            again = auto_class.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(dict(again.state_dict()), dict(quantized.state_dict()), rtol=0, atol=0)
        found = {path: module for path, module in quantized.named_modules() if isinstance(module, Exl3Module)}
        inner = {path for path in found if any(path.startswith(f"{other}.") for other in found)}
        self.assertEqual(len(found.keys() - inner), modules)
        for path in found.keys() - inner:
            plain = found[path].dequantize()
            for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
                expected, result = parameter.detach(), plain.get_parameter(name).detach()
                error = (result - expected).pow(2).mean() / expected.pow(2).mean()
                self.assertLess(float(error), 1e-3, f"{path}.{name}")


# Of architectures that have such, the linear layers that stay as they are; all others are quantized, but for the head.
MLA = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32}
ONE_KIND = {**ONE_LAYER, "head_dim": 32}
DELTA = {"layer_types": ["linear_attention"], "linear_num_value_heads": 4, "linear_key_head_dim": 32}
DELTA |= {"linear_num_key_heads": 4, "linear_value_head_dim": 32}
SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
SIGLIP2 |= {"num_attention_heads": 2, "patch_size": 16, "num_patches": 16, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 32, "image_size": 56, "patch_size": 14}
NEMOTRON = {name: value for name, value in ONE_KIND.items() if name != "num_hidden_layers"}
NEMOTRON |= {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2}
NEMOTRON |= {"layers_block_type": ["linear_attention", "full_attention"]}


def _letters(config):
    for name in ("layers_block_type", "mtp_layers_block_type", "layer_types"):
        config.pop(name, None)
    config |= {"hybrid_override_pattern": "M*", "num_hidden_layers": 2}


MUSE_TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MUSE_TOWER |= {"patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["full_attention"]}
HEADS = {"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32}
STEP = {**HEADS, "attention_other_setting": HEADS, "model_type": "step3p5", "hidden_size": 128, "num_hidden_layers": 1}
STEP |= {"intermediate_size": 256, "vocab_size": 64, "layer_types": ["full_attention"], "rope_theta": [1e4]}
STEP |= {
    "partial_rotary_factors": [0.5],
    "swiglu_limits": [0.0],
    "swiglu_limits_shared": [0.0],
    "moe_layers_enum": "8",
}
STEP_TOWER = {"width": 128, "layers": 1, "heads": 4, "image_size": 56, "patch_size": 14, "mlp_ratio": 2.0}
PLAIN_LAYERS = {
    "llama": (ONE_KIND, set()),
    "gemma4_text": (
        {**ONE_KIND, **EXPERTS, "top_k_experts": 1, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
        {"router.proj"},
    ),
    "laguna": ({**ONE_KIND, **EXPERTS, "gating": "per-head"}, {"self_attn.g_proj"}),
    "olmo_hybrid": (
        {
            **ONE_KIND,
            **DELTA,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {"linear_attn.a_proj", "linear_attn.b_proj"},
    ),
    "qwen3_next": (
        {**ONE_KIND, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 64},
        {"linear_attn.in_proj_ba", "mlp.shared_expert_gate"},
    ),
    "kimi_linear": (
        {**ONE_LAYER, **MLA, **EXPERTS, **DELTA, "mlp_layer_types": ["dense"], "linear_num_heads": 4}
        | {"linear_head_dim": 32, "num_key_value_heads": 4},
        {f"self_attn.{name}" for name in ("b_proj", "g_a_proj", "g_b_proj")}
        | {f"self_attn.forget_gate.{name}" for name in ("f_a_proj", "f_b_proj")},
    ),
    "glm_moe_dsa": (
        {**ONE_LAYER, **MLA, "num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1}
        | {"moe_intermediate_size": 64, "mlp_layer_types": ["dense"], "index_head_dim": 32, "index_n_heads": 2},
        {"self_attn.kv_b_proj", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"},
    ),
    "qwen4_exp_text": (
        {**ONE_KIND, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 64, "hc_count": 2, "hc_lowrank": 160},
        {"linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.shared_expert_gate"}
        | {f"hyper_connection_mixer.input_mix_weight_{side}" for side in ("down", "up")}
        | {
            f"{block}_hyper_connection.{name}"
            for block in ("attn", "mlp")
            for name in ("input_mix_weight_down", "input_mix_weight_up", "block_inject_weight")
        },
    ),
    "lfm2_vl": (
        {
            "text_config": {**ONE_LAYER, "model_type": "lfm2", "layer_types": ["conv"]},
            "vision_config": SIGLIP2,
            "projector_hidden_size": 96,
        },
        {"vision_tower.embeddings.patch_embedding"},
    ),
    "muse_glimmer": (
        {
            "text_config": {**ONE_KIND, "layer_types": ["full_attention"], "layer_rope_theta": [1e4]},
            "out_hidden_size": 256,
        }
        | {"vision_config": MUSE_TOWER, "projector_hidden_size": 128},
        {"vision_tower.patch_embedder.patch_embedding"},
    ),
    "step3p7": (
        {"text_config": STEP, "vision_config": STEP_TOWER},
        {"self_attn.g_proj"}
        | {f"self_attn.{part}_proj" for part in "qkv"},  # these of the tower: in files in another order
    ),
    "mistral3": (
        {"text_config": {**ONE_KIND, "model_type": "mistral"}, "vision_config": PIXTRAL},
        {"multi_modal_projector.patch_merger.merging_layer"},
    ),
}


@require_torch
@require_accelerate
class Exl3PlainLayersTest(unittest.TestCase):
    @parameterized.expand(sorted(PLAIN_LAYERS))
    def test_layers_that_decide_much_with_few_weights_stay(self, architecture):
        fields, expected = PLAIN_LAYERS[architecture]
        auto_class = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto_class.from_config(AutoConfig.for_model(architecture, **fields))
        linear = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
        _, plan = planned(model)
        left = {path for path in linear if path not in plan.modules and path != "lm_head"}
        self.assertEqual({path.rpartition("layers.0.")[2].removeprefix("model.") for path in left}, expected)

    def test_experts_of_an_unknown_layout_stay_and_are_named(self):
        fields = {**ONE_LAYER, "num_local_experts": 2, "intermediate_size_mlp": 96, "moe_layers": [0]}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **fields))
        with self.assertLogs("transformers.integrations.exl3.planning", "WARNING") as logs:
            _, plan = planned(model)
        self.assertIn("model.layers.0.feed_forward.experts (Llama4TextExperts)", logs.output[0])
        self.assertNotIn("model.layers.0.feed_forward.experts", plan.modules)

    def test_a_head_with_a_bias_does_not_stay_tied_to_quantized_embeddings(self):
        """It would be decoded from them alone."""
        with torch.device("meta"):
            model = XLNetLMHeadModel(XLNetConfig(vocab_size=100, d_model=128, n_layer=1, n_head=4, d_inner=100))
        self.assertEqual({**model.all_tied_weights_keys}, {"lm_loss.weight": "transformer.word_embedding.weight"})
        self.assertIsNotNone(model.lm_loss.bias)
        _, plan = planned(model, Exl3Config(bits=2, embedding_bits=2))
        self.assertFalse(plan.has_tied_head)
        self.assertNotIn("lm_loss", plan.modules)
        self.assertEqual({**model.all_tied_weights_keys}, {})

    def test_a_head_whose_bias_is_tied_too_is_not_untied(self):
        for option in ({"embedding_bits": 2}, {"head_bits": 2}):
            with torch.device("meta"):
                model = BertForMaskedLM(BertConfig(**ENCODER))
            message = "decoder.bias are tied as well .* Leave `head_bits` and `embedding_bits` unset"
            with self.assertRaisesRegex(ValueError, message):
                planned(model, Exl3Config(bits=2, **option))


def _common(content, other):
    """`content` with the fields that `other` has, too."""
    if not isinstance(content, dict) or not isinstance(other, dict):
        return content
    return {name: _common(content[name], other[name]) for name in content.keys() & other.keys()}


@require_torch
@require_accelerate
class Exl3SavedConfigTest(unittest.TestCase):
    @parameterized.expand([("nested", "qwen3_vl_moe", QWEN_VL), ("flat", "qwen3_moe", {**ONE_KIND, **EXPERTS})])
    def test_fields_are_there_under_older_names_too(self, _, architecture, fields):
        """Other programs know `num_local_experts` of these as `num_experts`."""
        auto_class = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
        model = auto_class.from_config(AutoConfig.for_model(architecture, **fields))
        skip = ["mlp", "visual"] if "vision_config" in fields else ["mlp"]
        config = Exl3Config(bits=1, effort="fast", modules_to_not_convert=skip)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            quantized = auto_class.from_pretrained(folder, quantization_config=config)
            quantized.save_pretrained(folder)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                content = json.load(file)
            loaded = AutoConfig.from_pretrained(folder)
        text = content.get("text_config", content)
        self.assertEqual((text["num_experts"], text["num_local_experts"]), (2, 2))
        self.assertEqual(loaded.get_text_config().to_dict(), quantized.config.get_text_config().to_dict())

    @parameterized.expand(
        [
            (
                "the_kind_of_a_tower",
                "qwen3_vl",
                QWEN_VL,
                lambda config: config["vision_config"].update(model_type="qwen3_vl"),
            ),
            ("letters_of_blocks", "nemotron_h", NEMOTRON, _letters),
        ]
    )
    def test_what_the_loaded_file_says_stays(self, _, architecture, fields, publish):
        """Transformers reads a field and writes another, or another value: other programs know the first."""
        auto_class = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
        model = auto_class.from_config(AutoConfig.for_model(architecture, **fields))
        config = Exl3Config(
            bits=1, effort="fast", modules_to_not_convert=["mlp", "visual"] if "vision_config" in fields else None
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = os.path.join(folder, "config.json")
            with open(path, encoding="utf-8") as file:
                published = json.load(file)
            publish(published)
            for name in ("architectures", "dtype", "transformers_version"):
                published.pop(name)
            published.get("text_config", published).pop("use_cache", None)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(published, file)
            quantized = auto_class.from_pretrained(folder, quantization_config=config)
            quantized.config.get_text_config().use_cache = False
            quantized.save_pretrained(folder)
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
            loaded = AutoConfig.from_pretrained(folder)
            again = auto_class.from_pretrained(folder)
            again.save_pretrained(folder)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(json.load(file), saved)
        self.assertIs(saved.get("text_config", saved)["use_cache"], False)
        self.assertEqual(_common(saved, published), published)
        self.assertEqual("layers_block_type" in saved, "layers_block_type" in published)
        self.assertEqual(loaded.get_text_config().to_dict(), quantized.config.get_text_config().to_dict())

    def test_a_loaded_file_that_means_another_model_is_not_believed(self):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ONE_KIND))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = os.path.join(folder, "config.json")
            with open(path, encoding="utf-8") as file:
                published = json.load(file)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(published | {"head_dim": "of another"}, file)
            quantized = AutoModelForCausalLM.from_pretrained(
                folder, config=model.config, quantization_config=Exl3Config(bits=1, effort="fast")
            )
            with self.assertLogs("transformers.integrations.exl3.saving", "WARNING") as logged:
                quantized.save_pretrained(folder)
            self.assertRegex(logged.output[0], "the fields of then cannot be read .*head_dim")
            self.assertEqual(AutoConfig.from_pretrained(folder).head_dim, model.config.head_dim)
