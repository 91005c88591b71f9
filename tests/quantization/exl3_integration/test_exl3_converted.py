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

"""What exllamav3's converter writes otherwise than a model has it, and what it leaves out: each kind on a tiny model."""

import os
import tempfile
import unittest
import unittest.mock

import torch
from parameterized import parameterized

from transformers import (
    ApertusConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV4Config,
    Ernie4_5_MoeConfig,
    Exl3Config,
    MiniMaxM2Config,
    OlmoHybridConfig,
)
from transformers.integrations.exl3.experts import Exl3Experts
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.testing_utils import require_accelerate, require_torch

from .synthetic import SyntheticCheckpoint, random_linear, read_tensors
from .tiny_models import TEXT, tiny_inputs, tiny_model


KIMI = TEXT | {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
KIMI |= {"qk_nope_head_dim": 32, "linear_head_dim": 32, "linear_num_heads": 4, "num_experts": 4}
KIMI |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse"]}
KIMI |= {"layer_types": ["linear_attention", "full_attention"]}
RADIO = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 16, "image_size": 32}
RADIO |= {"max_img_size": 32, "patch_dim": 768, "num_cls_tokens": 3, "num_registers": 7}
IDS = torch.arange(3, 24).view(3, 7)
STEP_EXPERTS = "model.language_model.layers.1.mlp.experts"


def step_config():
    """Step-3.7: its second layer is a mixture."""
    heads = {"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32}
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64, "share_expert_dim": 64}
    experts |= {"moe_layers_enum": "1", "norm_expert_weight": True, "use_moe_router_bias": True}
    layers = {"layer_types": ["full_attention", "sliding_attention"], "attention_other_setting": heads}
    layers |= {"sliding_window": 64, "rope_theta": [1e4, 1e4], "partial_rotary_factors": [0.5, 1.0]}
    layers |= {"swiglu_limits": [0.0, 0.0], "swiglu_limits_shared": [0.0, 0.0]}
    text = {
        "model_type": "step3p5",
        **{k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size", "pad_token_id")},
    }
    vision = {"width": 128, "layers": 1, "heads": 4, "image_size": 56, "patch_size": 14, "mlp_ratio": 2.0}
    return CONFIG_MAPPING["step3p7"](
        text_config=text | heads | experts | layers | {"intermediate_size": 256},
        vision_config=vision,
        image_token_id=95,
    )


def random_model(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer)
    return model


def deepseek_config():
    sizes = {"moe_intermediate_size": 128, "head_dim": 64, "q_lora_rank": 128, "o_groups": 2, "o_lora_rank": 64}
    experts = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
    index = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "qk_rope_head_dim": 16, "sliding_window": 64}
    layers = {"layer_types": ["heavily_compressed_attention"], "mlp_layer_types": ["moe"], "num_hidden_layers": 1}
    text = {name: TEXT[name] for name in ("hidden_size", "num_attention_heads", "vocab_size", "pad_token_id")}
    return DeepseekV4Config(**text, **sizes, **experts, **index, **layers)


@require_torch
@require_accelerate
class Exl3ConvertedTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def assert_loads(self, checkpoint, inputs=None, auto=AutoModelForCausalLM):
        """The checkpoint as it is and as a plain model means what its dense weights mean, also saved and loaded again."""
        inputs = inputs or {"input_ids": IDS}
        found = {}
        for kind in ("quantized", "dense"):
            os.makedirs(path := os.path.join(self.folder, kind))
            tensors = checkpoint.tensors if kind == "quantized" else checkpoint.dense
            checkpoint.save(path, tensors, quantized=kind == "quantized")
            found[kind] = auto.from_pretrained(path, dtype=torch.float32).eval()
        path = os.path.join(self.folder, "quantized")
        found["plain"] = auto.from_pretrained(
            path, dtype=torch.float32, quantization_config=Exl3Config(dequantize=True)
        )
        found["quantized"].save_pretrained(os.path.join(self.folder, "again"))
        found["again"] = auto.from_pretrained(os.path.join(self.folder, "again"), dtype=torch.float32)
        expected = found["dense"].state_dict()
        self.assertEqual(found["plain"].state_dict().keys(), expected.keys())
        for name, tensor in found["plain"].state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        with torch.no_grad():
            logits = {kind: model.eval()(**inputs).logits for kind, model in found.items()}
        for kind, result in logits.items():
            self.assertLess(float((result - logits["dense"]).abs().max() / logits["dense"].std()), 1e-4, kind)
        return found["quantized"]

    def test_constants_of_activations_are_what_their_constructors_make_them(self):
        checkpoint = SyntheticCheckpoint(random_model(ApertusConfig(**TEXT)))
        checkpoint.quantize_all()
        lost = [name for name in checkpoint.tensors if name.endswith(("act_fn.beta", "act_fn.eps"))]
        self.assertEqual(len(lost), 4)
        for name in lost:
            del checkpoint.tensors[name]
        model = self.assert_loads(checkpoint)
        self.assertEqual(float(model.model.layers[0].mlp.act_fn.beta), 0.5)

    @parameterized.expand(
        [
            ("buffers", MiniMaxM2Config(**TEXT, head_dim=32, num_local_experts=4, num_experts_per_tok=2)),
            (
                "parameters",
                Ernie4_5_MoeConfig(
                    **TEXT,
                    moe_num_experts=4,
                    moe_k=2,
                    moe_intermediate_size=64,
                    moe_layer_start_index=1,
                    moe_num_shared_experts=1,
                ),
            ),
        ]
    )
    def test_corrections_of_routers_that_are_lost_are_zero_and_told_of(self, _, config):
        checkpoint = SyntheticCheckpoint(random_model(config))
        checkpoint.quantize_all()
        lost = [name for name in checkpoint.tensors if name.endswith("e_score_correction_bias")]
        self.assertTrue(lost)
        for name in lost:
            del checkpoint.tensors[name]
            checkpoint.dense[name] = torch.zeros_like(checkpoint.dense[name])
        with self.assertLogs("transformers", "WARNING") as logs:
            self.assert_loads(checkpoint)
        self.assertRegex("".join(logs.output), rf"lacks {len(lost)} corrections of routers.*original checkpoint")
        self.assertNotIn("MISSING", "".join(logs.output))  # in the loading report, as newly initialized

    def test_other_buffers_that_no_constructor_tells_are_an_error(self):
        model = random_model(ApertusConfig(**TEXT))
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize_all()
        checkpoint.save(self.folder, {n: t for n, t in checkpoint.tensors.items() if not n.endswith("act_fn.beta")})
        with unittest.mock.patch(
            "transformers.integrations.exl3.restoring._constructed", side_effect=RuntimeError("on the meta device")
        ):
            with self.assertRaisesRegex(ValueError, "act_fn.beta is a buffer that is not in the checkpoint"):
                AutoModelForCausalLM.from_pretrained(self.folder)

    @parameterized.expand([("as_it_was", False), ("with_the_tower", True)])
    def test_a_parameter_that_is_written_as_a_weight(self, _, is_tower):
        """Of a quantized tower it is stored transposed, as that of a linear layer."""
        model, auto = tiny_model("gemma3")
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize_all("model.layers" if not is_tower else "layers")
        (name,) = [name for name in checkpoint.tensors if name.endswith("mm_input_projection_weight")]
        weight = torch.randn_like(checkpoint.dense[name])
        checkpoint.dense[name] = weight
        del checkpoint.tensors[name]
        checkpoint.tensors[name.replace("_weight", ".weight")] = weight.T.contiguous() if is_tower else weight
        self.assert_loads(checkpoint, tiny_inputs("gemma3"), auto)

    def test_layers_with_a_product_of_their_own_are_dequantized(self):
        """A subclass of `nn.Linear`, whose groups the converter quantizes one by one as slices."""
        checkpoint = SyntheticCheckpoint(random_model(deepseek_config()))
        (name,) = [
            name.removesuffix(".weight")
            for name in checkpoint.dense
            if name.endswith("o_a_proj.weight") or name.endswith("wo_a.weight")
        ]
        checkpoint.quantize_all("wo_b")
        checkpoint.quantize(name, parts={f"{name}.slice.0": 64, f"{name}.slice.1": 64})
        model = self.assert_loads(checkpoint)
        module = model.model.layers[0].self_attn.o_a_proj
        self.assertNotIsInstance(module, Exl3Linear)

    def test_what_is_saved_under_a_name_that_a_pattern_for_files_matches(self):
        """`model.norm.weight`, which the patterns for DeepSeek-V4's files would rename."""
        model = random_model(deepseek_config())
        model.save_pretrained(os.path.join(self.folder, "float"))
        quantized = AutoModelForCausalLM.from_pretrained(
            os.path.join(self.folder, "float"), quantization_config=Exl3Config(bits=1, effort="fast")
        )
        quantized.save_pretrained(os.path.join(self.folder, "quantized"))
        loaded = AutoModelForCausalLM.from_pretrained(os.path.join(self.folder, "quantized"))
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, quantized(IDS).logits, rtol=0, atol=0)

    @parameterized.expand(
        [
            ("in_blocks", 128, 256),
            ("across_blocks", 2 * 48, 4 * 48),  # Olmo-Hybrid 7B: 2880, 2880 and 5760
            ("within_a_block", 4 * 12, 4 * 12),
            ("padded", 80, 176),
        ]
    )
    def test_parts_of_a_model_that_are_one_layer_in_the_checkpoint_are_cut_out_of_it(self, _, key, value):
        linear = {"linear_key_head_dim": key // 4, "linear_value_head_dim": value // 4, "linear_num_key_heads": 4}
        config = OlmoHybridConfig(
            **{**TEXT, "num_key_value_heads": 4},
            **linear,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        )
        checkpoint = SyntheticCheckpoint(random_model(config))
        checkpoint.quantize_all("up_proj")
        prefix = "model.layers.0.linear_attn"
        tensors, weight = random_linear(2 * key + value, 128, seed=5)
        for part, rows in zip("qkv", weight.split([key, key, value])):
            del checkpoint.tensors[f"{prefix}.{part}_proj.weight"]
            checkpoint.dense[f"{prefix}.{part}_proj.weight"] = rows.contiguous()
        checkpoint.tensors |= {f"{prefix}.in_proj_qkv.{leaf}": tensor for leaf, tensor in tensors.items()}
        parts = [f"{prefix}.{part}_conv1d.weight" for part in "qkv"]
        checkpoint.tensors[f"{prefix}.None.weight"] = torch.cat([checkpoint.tensors.pop(part) for part in parts])
        model = self.assert_loads(checkpoint)
        self.assertIsInstance(model.model.layers[0].linear_attn.v_proj, Exl3Linear)
        again = read_tensors(os.path.join(self.folder, "again"))
        self.assertEqual(again.keys(), checkpoint.tensors.keys())
        for leaf, tensor in tensors.items():
            torch.testing.assert_close(again[f"{prefix}.in_proj_qkv.{leaf}"], tensor, rtol=0, atol=0)
        layer = model.model.layers[0].linear_attn
        layer.q_proj = layer.q_proj.dequantize()  # not of one layer any more
        path = os.path.join(self.folder, "apart")
        if key % 128:
            with self.assertRaisesRegex(ValueError, "k_proj.* cannot be saved alone"):
                model.save_pretrained(path)
            self.assertEqual(os.listdir(path), [])
            layer.k_proj, layer.v_proj = layer.k_proj.dequantize(), layer.v_proj.dequantize()
        model.save_pretrained(path)
        self.assertEqual(f"{prefix}.v_proj.trellis" in read_tensors(path), key % 128 == 0)
        apart = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(apart(IDS).logits, model(IDS).logits)

    def test_dimensions_of_size_one_that_are_left_out(self):
        """`A_log` of Kimi-Linear, four numbers of `[1, 1, 4, 1]`."""
        config = CONFIG_MAPPING["kimi_linear"](**KIMI)
        checkpoint = SyntheticCheckpoint(random_model(config))
        checkpoint.quantize_all("o_proj")
        (name,) = [name for name in checkpoint.tensors if name.endswith("A_log")]
        checkpoint.tensors[name] = checkpoint.tensors[name].flatten()
        self.assert_loads(checkpoint)

    @parameterized.expand(
        [
            # Upstream saves its dense layers under the name that only its mixtures have in files.
            ("kimi_linear", lambda name: name.replace("layers.0.block_sparse_moe", "layers.0.mlp"), "mlp"),
            # The same without the prefix of the base model.
            (
                "kimi_linear",
                lambda name: name.replace("layers.0.block_sparse_moe", "layers.0.mlp").removeprefix("model."),
                "mlp",
            ),
            # Upstream saves it with a prefix that files do not have, and norms by the wrong one of two names.
            ("deepseek_v4", lambda name: name.removeprefix("model.").replace("attn.norm", "attn.kv_norm"), "wo_b"),
        ]
    )
    def test_names_of_files_are_saved_again(self, architecture, in_files, match):
        config = CONFIG_MAPPING["kimi_linear"](**KIMI) if architecture == "kimi_linear" else deepseek_config()
        checkpoint = SyntheticCheckpoint(random_model(config))
        for tensors in (checkpoint.tensors, checkpoint.dense):
            for name in [name for name in tensors if in_files(name) != name]:
                tensors[in_files(name)] = tensors.pop(name)
        checkpoint.quantize_all(match)
        self.assert_loads(checkpoint)
        self.assertEqual(read_tensors(os.path.join(self.folder, "again")).keys(), checkpoint.tensors.keys())
        again = os.path.join(self.folder, "on_the_fly")
        AutoModelForCausalLM.from_pretrained(
            os.path.join(self.folder, "dense"), quantization_config=Exl3Config(bits=1, effort="fast")
        ).save_pretrained(again)
        names = {name.rpartition(".")[0] for name in read_tensors(again)}
        self.assertEqual(names, {name.rpartition(".")[0] for name in checkpoint.dense})

    def test_a_bias_that_files_name_by_itself_is_saved_beside_the_codes(self):
        """`query.bias` of VideoMAE is `q_bias` in files."""
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
        video = {"image_size": 16, "patch_size": 8, "num_frames": 2}
        model = random_model(CONFIG_MAPPING["videomae"](**sizes, **video), AutoModel)
        model.save_pretrained(self.folder)
        asked = Exl3Config(bits=1, effort="fast")
        quantized = AutoModel.from_pretrained(self.folder, quantization_config=asked)
        for _ in range(2):
            quantized.save_pretrained(self.folder)
            names = {name for name in read_tensors(self.folder) if name.endswith("bias")}
            self.assertIn("encoder.layer.0.attention.attention.query.bias", names)
            again = AutoModel.from_pretrained(self.folder)
            torch.testing.assert_close(dict(again.state_dict()), dict(quantized.state_dict()), rtol=0, atol=0)
            quantized = again

    def test_parts_of_what_upstream_splits_while_loading(self):
        """The tower of Nemotron Omni: `attn.qkv` of its files is `attention.q_proj` and two more in the model."""
        config = CONFIG_MAPPING["radio"](**RADIO)
        checkpoint = SyntheticCheckpoint(random_model(config, AutoModel))
        (name,) = [name.removesuffix(".weight") for name in checkpoint.dense if name.endswith("attn.qkv.weight")]
        parts = {f"{name.removesuffix('.qkv')}.{part}_proj": 128 for part in "qkv"}
        checkpoint.quantize(name, parts=parts)
        found = []
        for folder, tensors in (("quantized", checkpoint.tensors), ("dense", checkpoint.dense)):
            os.makedirs(path := os.path.join(self.folder, folder))
            checkpoint.save(path, tensors, quantized=folder == "quantized")
            found.append(AutoModel.from_pretrained(path, dtype=torch.float32).eval())
        self.assertIsInstance(found[0].get_submodule("encoder.layer.0.attention.v_proj"), Exl3Linear)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            result, expected = (model(pixels).last_hidden_state for model in found)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        found[0].save_pretrained(path := os.path.join(self.folder, "again"))
        self.assertEqual(read_tensors(path).keys(), checkpoint.tensors.keys())
        config = Exl3Config(bits=1, effort="fast")
        quantized = AutoModel.from_pretrained(os.path.join(self.folder, "dense"), quantization_config=config)
        quantized.save_pretrained(path := os.path.join(self.folder, "on_the_fly"))
        self.assertLessEqual(
            {f"{part}.{leaf}" for part in parts for leaf in ("trellis", "bias")}, {*read_tensors(path)}
        )
        AutoModel.from_pretrained(path)

    def test_plain_weights_beside_their_quantized_parts_give_way(self):
        model, auto = tiny_model("qwen2_5_vl")
        checkpoint = SyntheticCheckpoint(model)
        (name,) = [name.removesuffix(".weight") for name in checkpoint.dense if name.endswith("attn.qkv.weight")]
        parent = name.rpartition(".")[0]
        plain = {leaf: checkpoint.tensors[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
        checkpoint.quantize(name, parts={f"{parent}.{part}_proj": 128 for part in "qkv"})
        checkpoint.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in plain.items()}
        self.assert_loads(checkpoint, tiny_inputs("qwen2_5_vl"), auto)
        checkpoint.save(self.folder, checkpoint.tensors)
        _, info = auto.from_pretrained(self.folder, output_loading_info=True)
        self.assertEqual(info["unexpected_keys"], set())

    def test_parts_without_the_bias_of_their_projection_are_an_error(self):
        model, auto = tiny_model("qwen2_5_vl")
        checkpoint = SyntheticCheckpoint(model)
        (name,) = [name.removesuffix(".weight") for name in checkpoint.dense if name.endswith("attn.qkv.weight")]
        parent = name.rpartition(".")[0]
        checkpoint.quantize(name, parts={f"{parent}.{part}_proj": 128 for part in "qkv"})
        del checkpoint.tensors[f"{parent}.k_proj.bias"]
        checkpoint.save(self.folder, checkpoint.tensors)
        with self.assertRaisesRegex(ValueError, "attn.qkv has a bias, and .*k_proj in the checkpoint have none"):
            auto.from_pretrained(self.folder)

    def test_layers_after_the_last_one_are_left_out(self):
        """Those that predict more tokens, and those of a model that is to be loaded in part."""
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all()
        checkpoint.save(self.folder, checkpoint.tensors)
        model, info = AutoModelForCausalLM.from_pretrained(self.folder, num_hidden_layers=1, output_loading_info=True)
        self.assertEqual(len(model.model.layers), 1)
        self.assertIn("model.layers.1.mlp.up_proj.trellis", info["unexpected_keys"])  # upstream's report tells of them
        whole = AutoModelForCausalLM.from_pretrained(self.folder)
        torch.testing.assert_close(
            model.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight, rtol=0, atol=0
        )

    def test_experts_of_sources_that_have_one_tensor_for_all(self):
        model = random_model(step_config(), AutoModelForImageTextToText)
        checkpoint = SyntheticCheckpoint(model)
        checkpoint.quantize_all("self_attn")
        prefix = "model.layers.1.moe"
        for index, (part, sizes) in enumerate({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}.items()):
            dense = checkpoint.dense[f"{prefix}.{part}_proj.weight"]
            del checkpoint.tensors[f"{prefix}.{part}_proj.weight"]
            for expert in range(4):
                tensors, dense[expert] = random_linear(*sizes, seed=10 * index + expert)
                name = f"{prefix}.experts.{expert}.{part}_proj"
                checkpoint.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        # The tower is not quantized. The converter writes a dot where the source has `in_proj_weight`.
        for name in [name for name in checkpoint.tensors if "in_proj_" in name]:
            checkpoint.tensors[name.replace("in_proj_", "in_proj.")] = checkpoint.tensors.pop(name)
        loaded = self.assert_loads(checkpoint, auto=AutoModelForImageTextToText)
        self.assertIsInstance(loaded.get_submodule(STEP_EXPERTS), Exl3Experts)
        quantized = AutoModelForImageTextToText.from_pretrained(
            os.path.join(self.folder, "dense"), quantization_config=Exl3Config(bits=1, effort="fast")
        )
        quantized.save_pretrained(path := os.path.join(self.folder, "on_the_fly"))
        names = {name for name in checkpoint.tensors if ".experts." in name}
        self.assertEqual({name for name in read_tensors(path) if ".experts." in name}, names)

    def test_rows_that_upstream_permutes_are_not_quantized_on_the_fly(self):
        model = random_model(step_config(), AutoModelForImageTextToText)
        model.save_pretrained(os.path.join(self.folder, "dense"))
        config = Exl3Config(bits=1, effort="fast", modules_to_not_convert=["language_model", "multi_modal_projector"])
        quantized = AutoModelForImageTextToText.from_pretrained(
            os.path.join(self.folder, "dense"), quantization_config=config
        )
        block = quantized.model.vision_model.layers[0]
        self.assertNotIsInstance(block.self_attn.q_proj, Exl3Linear)
        self.assertIsInstance(block.mlp.fc1, Exl3Linear)
        quantized.save_pretrained(path := os.path.join(self.folder, "again"))
        AutoModelForImageTextToText.from_pretrained(path)
        (name,) = [name for name in read_tensors(path) if name.endswith("0.attn.in_proj_weight")]
        torch.testing.assert_close(
            read_tensors(path)[name], read_tensors(os.path.join(self.folder, "dense"))[name], rtol=0, atol=0
        )

    def test_codes_of_rows_that_upstream_permutes_are_decoded_and_permuted(self):
        """The tower of Step-3.7: rows of query and key stand in files in another order than in the model."""
        checkpoint = SyntheticCheckpoint(random_model(step_config(), AutoModelForImageTextToText))
        checkpoint.quantize_all("self_attn.o_proj")
        (name,) = [name for name in checkpoint.tensors if name.endswith("in_proj_weight")]
        parent, made = name.rpartition(".")[0], {"weight": [], "bias": []}
        for seed, part in enumerate(("q_proj", "k_proj", "v_proj")):
            bias = torch.randn(128, generator=torch.Generator().manual_seed(seed)).half()
            tensors, weight = random_linear(128, 128, bias=bias, seed=seed)
            checkpoint.tensors |= {f"{parent}.{part}.{leaf}": tensor for leaf, tensor in tensors.items()}
            made["weight"].append(weight)
            made["bias"].append(bias.float())
        for leaf, parts in made.items():
            del checkpoint.tensors[f"{parent}.in_proj_{leaf}"]
            checkpoint.dense[f"{parent}.in_proj_{leaf}"] = torch.cat(parts)
        model = self.assert_loads(checkpoint, auto=AutoModelForImageTextToText)
        again = read_tensors(os.path.join(self.folder, "again"))
        torch.testing.assert_close(again[f"{parent}.in_proj_weight"], torch.cat(made["weight"]), rtol=1e-5, atol=1e-6)
        found = model.model.vision_model.layers[0].self_attn.k_proj.weight
        self.assertNotEqual(float(found[1, 0]), float(made["weight"][1][1, 0]))  # it has another place
        self.assertIn(float(made["bias"][1][1]), model.model.vision_model.layers[0].self_attn.k_proj.bias.tolist())
