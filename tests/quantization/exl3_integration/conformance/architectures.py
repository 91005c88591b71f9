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
"""Tiny models of all architectures that exllamav3 1.6.5 and Transformers both have, and what their files are like on the Hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field


VOCAB = 100
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32}
DELTA = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
DELTA |= {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
PARTIAL = MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
GLM_ROPE = {name: value for name, value in PARTIAL.items() if name != "mrope_interleaved"}
QWEN_TOKENS = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
GLM_TOKENS = {"image_token_id": 95, "video_token_id": 94, "image_start_token_id": 93, "image_end_token_id": 92}
GLM_TOKENS |= {"video_start_token_id": 91, "video_end_token_id": 90}
GEMMA_TOKENS = {"image_token_index": 95, "boi_token_index": 93, "eoi_token_index": 92, "mm_tokens_per_image": 4}
GEMMA4_TOKENS = {"image_token_id": 95, "video_token_id": 94, "boi_token_id": 93, "eoi_token_id": 92}
GEMMA4_TOKENS |= {"boa_token_id": 91, "audio_token_id": 89}
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_TOWER = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128}
QWEN3_TOWER = QWEN_TOWER | {"patch_size": 16, "num_position_embeddings": 16, "spatial_merge_size": 2}
SIGLIP2 = TOWER | {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 16, "vision_use_head": False}


def text(**fields) -> dict:
    """Fields of a config of text, with `fields` for its own."""
    return {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
    } | fields


def images(kind: str, **fields) -> dict:
    """What a processor of images writes into its file."""
    return {
        "image_processor_type": kind,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    } | fields


GEMMA4 = text(head_dim=32, num_hidden_layers=3, sliding_window=64, hidden_size_per_layer_input=0, global_head_dim=64)
GEMMA4 |= {"vocab_size_per_layer_input": VOCAB}
GEMMA4 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


def like(layer: str, other: str, **more) -> Callable[[dict], dict]:
    """Shapes of tensors under the name `other` as those of `layer`, and `more`, under it too."""

    def shapes(tensors):
        found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(layer)}
        return {name.replace(layer, other, 1): shape for name, shape in found.items()} | {
            other + name.replace("__", "."): shape for name, shape in more.items()
        }

    return shapes


@dataclass
class Row:
    """
    One architecture.

    Args:
        architecture (`str`): The class, as both sides call it.
        fields (`dict`): Of its config.
        variant (`str`, *optional*): What sets the row apart from others of the same architecture.
        config (`Callable`, *optional*): Gives config.json, changed in place, what exllamav3 reads and Transformers 5 writes otherwise.
        names (`Callable`, *optional*): From a name that Transformers 5 saves to the one that the Hub's files have.
        transposed (`str`, *optional*): Pattern for tensors that the Hub's files have transposed.
        adds (`Callable`, *optional*): Shapes of tensors that the Hub's files have and Transformers does not save, from those that it does.
        processor (`dict`, *optional*): Contents of preprocessor_config.json.
        vision_bits (`int`, *optional*): Of exllamav3's converter; its default where not given.
        lost (`str`, *optional*): Pattern for tensors that the converter drops; they are zero then, with a warning.
        refused (`str`, *optional*): What the error says where the converted checkpoint is refused, a pattern.
        differs (`str`, *optional*): Pattern for layers that are quantized by one of both, and
        why (`str`): the reason.
        unreadable (`str`, *optional*): Why exllamav3 does not read what is quantized on the fly.
    """

    architecture: str
    fields: dict
    config: Callable[[dict], None] | None = None
    names: Callable[[str], str] | None = None
    transposed: str | None = None
    adds: Callable[[dict], dict] | None = None
    processor: dict = field(default_factory=dict)
    vision_bits: int | None = None
    lost: str | None = None
    refused: str | None = None
    differs: str | None = None
    why: str = ""
    unreadable: str | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.architecture} ({self.variant})" if self.variant else self.architecture


def sets(**fields) -> Callable[[dict], None]:
    """Sets fields of config.json, of its parts by `text__name` and `vision__name`."""

    def change(config):
        for name, value in fields.items():
            part, _, inner = name.rpartition("__")
            (config[f"{part}_config"] if part else config)[inner] = value

    return change


def flat(config):
    """As Qwen2.5-VL's file is on the Hub: the fields of text are not in a part of their own."""
    config |= {name: value for name, value in config["text_config"].items() if name not in config}
    config["vision_config"] |= {"model_type": "qwen2_5_vl", "spatial_patch_size": 14}


def gemma4(config):
    config.setdefault("vision_soft_tokens_per_image", 16)
    config["text_config"]["global_head_dim"] = 64
    config["text_config"].pop("per_layer_config", None)


def nemotron(config):
    """As the Hub has it: a letter for each block."""
    for name in ("layers_block_type", "mtp_layers_block_type"):
        config.pop(name, None)
    config |= {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4}


def kimi(config):
    kinds = {"kda_layers": "linear_attention", "full_attn_layers": "full_attention"}
    config["linear_attn_config"] = {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4} | {
        name: [i + 1 for i, kind in enumerate(config["layer_types"]) if kind == of] for name, of in kinds.items()
    }
    config |= {"first_k_dense_replace": 1, "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1}


def qwen4(config):
    config["text_config"] |= {
        "layer_types": DELTA["layer_types"],
        "num_experts": 4,
        "ple_embed_dim": 320,
        "ngram_size": 3,
    }
    config["text_config"] |= {"heads_per_ngram": 1}
    config["vision_config"]["deepstack_visual_indexes"] = []


ONE_LAYER = "exllamav3 reads query, key and value quantized as one layer only"
QWEN = images("Qwen2VLImageProcessorFast")
QWEN4 = {
    "text_config": text(rope_parameters=PARTIAL, shared_expert_intermediate_size=64, head_dim=32, **MOE, **DELTA)
    | {"hc_count": 2, "hc_lowrank": 16, "output_gate_type": "sigmoid", "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 32, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "vision_config": QWEN3_TOWER,
    **QWEN_TOKENS,
}
NGRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 320, "ngram_size": 3, "heads_per_ngram": 1, "split_ngram_parts": 2}
NGRAMS |= {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8}
ROWS = [
    Row("AfmoeForCausalLM", text(num_hidden_layers=4, head_dim=32, **MOE, num_shared_experts=1, num_dense_layers=1)),
    Row("ApertusForCausalLM", text()),
    Row("ArceeForCausalLM", text(head_dim=32)),
    Row("CohereForCausalLM", text(use_qk_norm=False)),
    Row("Cohere2ForCausalLM", text(num_hidden_layers=4, sliding_window=64)),
    Row(
        "DeepseekV3ForCausalLM",
        text(num_key_value_heads=4, **MLA, **ROUTED, first_k_dense_replace=1, n_group=1, topk_group=1),
    ),
    Row(
        "Dots1ForCausalLM",
        text(head_dim=32, **ROUTED, first_k_dense_replace=1, norm_topk_prob=True),
        differs=r"self_attn\.o_proj",
        why="exllamav3 leaves `o_proj` of this architecture alone; it reads it quantized, too",
    ),
    Row(
        "Ernie4_5_MoeForCausalLM",
        text(head_dim=32, moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1)
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        lost="e_score_correction_bias",
    ),
    Row(
        "Exaone4ForCausalLM",
        text(num_hidden_layers=4, sliding_window=64, head_dim=32),
        sets(sliding_window_pattern="LLLG"),
    ),
    Row("Gemma2ForCausalLM", text(head_dim=32)),
    Row("Glm4ForCausalLM", text(intermediate_size=256, head_dim=32, attention_bias=True)),
    Row("Glm4MoeForCausalLM", text(head_dim=32, **ROUTED, first_k_dense_replace=1, use_qk_norm=True)),
    Row("Glm4MoeLiteForCausalLM", text(num_key_value_heads=4, **MLA, **ROUTED, mlp_layer_types=["dense", "sparse"])),
    Row(
        "GlmMoeDsaForCausalLM",
        text(num_key_value_heads=4, **MLA, **ROUTED, mlp_layer_types=["dense", "sparse"])
        | {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 8},
    ),
    Row("HYV3ForCausalLM", text(head_dim=32, **MOE, num_shared_experts=1, mlp_layer_types=["dense", "sparse"])),
    Row("HyperCLOVAXForCausalLM", text(head_dim=32)),
    Row(
        "LagunaForCausalLM",
        text(head_dim=32, **MOE, shared_expert_intermediate_size=64, num_attention_heads_per_layer=[4, 4])
        | {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
        sets(gating="per-head", norm_topk_prob=True, mlp_only_layers=[0]),
        refused="`laguna` are not supported",
    ),
    Row("Lfm2ForCausalLM", text(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    Row(
        "Lfm2MoeForCausalLM",
        text(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, **MOE),
    ),
    Row(
        "LlamaForCausalLM",
        text(head_dim=32, hidden_size=192, intermediate_size=200, num_attention_heads=6)
        | {"num_key_value_heads": 3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    Row(
        "MiniMaxM2ForCausalLM",
        text(head_dim=32, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2),
        lost="e_score_correction_bias",
    ),
    Row("Ministral3ForCausalLM", text(head_dim=32)),
    Row("MistralForCausalLM", text(head_dim=32)),
    Row("MixtralForCausalLM", text(num_local_experts=4, head_dim=32)),
    Row("Olmo3ForCausalLM", text(num_hidden_layers=4, sliding_window=64)),
    Row("Phi3ForCausalLM", text(intermediate_size=256, hidden_size=256)),
    Row("Qwen2ForCausalLM", text(tie_word_embeddings=True)),
    Row("Qwen3ForCausalLM", text(head_dim=32)),
    Row("Qwen3MoeForCausalLM", text(head_dim=32, **MOE, norm_topk_prob=True), sets(num_experts=4)),
    Row(
        "Qwen3NextForCausalLM",
        text(shared_expert_intermediate_size=64, head_dim=32, **MOE, **DELTA, norm_topk_prob=True),
        sets(num_experts=4, full_attention_interval=2),
    ),
    Row("SeedOssForCausalLM", text(head_dim=32)),
    Row("SmolLM3ForCausalLM", text(num_hidden_layers=4)),
    Row("SolarOpenForCausalLM", text(head_dim=32, **ROUTED)),
    Row(
        "Gemma3ForConditionalGeneration",
        {"text_config": text(head_dim=32, num_hidden_layers=3, sliding_window=64), **GEMMA_TOKENS}
        | {"vision_config": TOWER | {"image_size": 56, "patch_size": 14, "vision_use_head": False}},
        names=lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        processor=images("Gemma3ImageProcessor", size={"height": 56, "width": 56}, image_seq_length=4),
        vision_bits=6,
        differs=r"mm_input_projection\.weight",
        why="exllamav3 writes `mm_input_projection_weight` as the weight of a linear layer; here it has its own name again",
    ),
    Row(
        "Glm4vForConditionalGeneration",
        {"text_config": text(intermediate_size=256, rope_parameters=GLM_ROPE), **GLM_TOKENS}
        | {"vision_config": QWEN_TOWER | {"image_size": 56, "patch_size": 14}},
        processor=images("Glm4vImageProcessor"),
    ),
    Row(
        "Glm4vMoeForConditionalGeneration",
        {"text_config": text(head_dim=32, rope_parameters=GLM_ROPE, **ROUTED, first_k_dense_replace=1), **GLM_TOKENS}
        | {"vision_config": QWEN_TOWER | {"image_size": 56, "patch_size": 14}},
        processor=images("Glm4vImageProcessor"),
    ),
    Row(
        "Mistral3ForConditionalGeneration",
        {"text_config": text(head_dim=32, model_type="mistral"), "image_token_index": 95, "tie_word_embeddings": False}
        | {"vision_config": TOWER | {"model_type": "pixtral", "head_dim": 32, "image_size": 56, "patch_size": 14}},
        processor=images("PixtralImageProcessorFast", size={"longest_edge": 56}, patch_size=14, do_convert_rgb=True),
        vision_bits=6,
    ),
    Row(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": text(rope_parameters=MROPE), **QWEN_TOKENS}
        | {"vision_config": QWEN_TOWER | {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112}},
        flat,
        processor=images("Qwen2VLImageProcessor"),
        vision_bits=6,
    ),
    Row(
        "Qwen3VLForConditionalGeneration",
        {"text_config": text(head_dim=32, rope_parameters=MROPE), **QWEN_TOKENS}
        | {"vision_config": QWEN3_TOWER | {"deepstack_visual_indexes": [0]}},
        sets(vision__model_type="qwen3_vl"),
        processor=QWEN,
    ),
    Row(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": text(
                head_dim=32, rope_parameters=MROPE, **MOE | {"moe_intermediate_size": 96}, norm_topk_prob=True
            ),
            **QWEN_TOKENS,
        }
        | {"vision_config": QWEN3_TOWER | {"deepstack_visual_indexes": [0]}},
        sets(text__num_experts=4, vision__model_type="qwen3_vl_moe"),
        transposed=r"experts\.(gate_up|down)_proj",
        processor=QWEN,
    ),
    Row(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": text(rope_parameters=PARTIAL, head_dim=32, **DELTA),
            "vision_config": QWEN3_TOWER,
            **QWEN_TOKENS,
        },
        sets(vision__deepstack_visual_indexes=[]),
        processor=QWEN,
    ),
    Row(
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": text(rope_parameters=PARTIAL, shared_expert_intermediate_size=64, head_dim=32, **MOE, **DELTA)}
        | {"vision_config": QWEN3_TOWER, **QWEN_TOKENS},
        sets(text__num_experts=4, vision__deepstack_visual_indexes=[]),
        processor=QWEN,
    ),
    Row(
        "Qwen3_5ForCausalLM",
        text(rope_parameters=PARTIAL, head_dim=32, **DELTA),
        names=lambda name: re.sub(r"^model\.", "model.language_model.", name),
    ),
    Row(
        "Qwen3_5MoeForCausalLM",
        text(rope_parameters=PARTIAL, shared_expert_intermediate_size=64, head_dim=32, **MOE, **DELTA),
        sets(num_experts=4),
        names=lambda name: re.sub(r"^model\.", "model.language_model.", name),
    ),
    Row(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": text(
                layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, model_type="lfm2"
            )
        }
        | {"vision_config": SIGLIP2, "image_token_id": 95, "projector_hidden_size": 256},
        names=lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
        processor=images("Lfm2VlImageProcessorFast", encoder_patch_size=16, downsample_factor=2, min_image_tokens=4)
        | {"max_image_tokens": 16, "min_tiles": 1, "max_tiles": 2, "tile_size": 64},
    ),
    Row(
        "Gemma4ForConditionalGeneration",
        {"text_config": GEMMA4 | {**MOE, "top_k_experts": 2, "enable_moe_block": True}, **GEMMA4_TOKENS}
        | {"vision_config": TOWER | {"num_key_value_heads": 4, "head_dim": 32, "patch_size": 16}},
        gemma4,
        processor=images("Gemma4ImageProcessor", do_convert_rgb=True, max_soft_tokens=16, pooling_kernel_size=3),
        differs=r"patch_embedder\.input_proj",
        why="patch embeddings stay plain here as in other towers; exllamav3 reads them either way",
    ),
    Row(
        "OlmoHybridForCausalLM",
        text(num_key_value_heads=4, **DELTA | {"linear_num_key_heads": 4, "linear_value_head_dim": 64}),
        names=lambda name: name.replace("attention_layer_norm", "input_layernorm").replace(
            "feedforward_layer_norm", "post_attention_layernorm"
        ),
        differs=r"linear_attn\.(in_proj_qkv$|[qkv]_proj$)",
        why="exllamav3 writes query, key and value as one layer, the model has three",
        unreadable=ONE_LAYER,
    ),
    Row(
        "NemotronHForCausalLM",
        {name: value for name, value in text(head_dim=32).items() if name != "num_hidden_layers"}
        | {**ROUTED, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1, "ssm_state_size": 16}
        | {"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2}
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        nemotron,
    ),
    Row(
        "DeepseekV4ForCausalLM",
        {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"head_dim": 64, "q_lora_rank": 128, "num_experts_per_tok": 2, "n_routed_experts": 4, "vocab_size": VOCAB}
        | {"max_position_embeddings": 512, "o_groups": 2, "o_lora_rank": 64, "qk_rope_head_dim": 16}
        | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "sliding_window": 64, "pad_token_id": 0}
        | {"num_nextn_predict_layers": 0, "mlp_layer_types": ["hash_moe", "moe", "moe"]}
        | {"layer_types": [f"{kind}_attention" for kind in ("heavily_compressed", "compressed_sparse", "sliding")]},
        sets(num_hash_layers=1, compress_ratios=[128, 4, 0]),
        names=lambda name: (
            name.removeprefix("model.")
            .replace("embed_tokens", "embed")
            .replace("hc_head.hc_", "hc_head_")
            .replace(".attn.norm.", ".attn.kv_norm.")
        ),
        differs=r"wo_a(\.|$)|compressor\.(wgate|wkv)$",
        why="groups of `wo_a` are dequantized, since the model's own class multiplies with them; Transformers keeps compressors in "
        "float32",
    ),
    Row(
        "KimiLinearForCausalLM",
        text(num_key_value_heads=4, **MLA | {"q_lora_rank": None}, **MOE, n_shared_experts=1)
        | {"linear_head_dim": 32, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
        | {"layer_types": DELTA["layer_types"], "n_group": 1},
        kimi,
        names=lambda name: re.sub(r"block_sparse_moe\.(\w+_proj\.)", r"mlp.\1", name),
        differs=r"self_attn\.(qkv|q|k|v)_proj$",
        why="exllamav3 writes query, key and value as one layer, the model has three",
        unreadable=ONE_LAYER,
    ),
    Row(
        "MuseGlimmerForConditionalGeneration",
        {
            "text_config": text(intermediate_size=256, head_dim=32, num_hidden_layers=3, sliding_window=64)
            | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
            | {"layer_rope_theta": [1e4, 1e4, 0.0]},
            "vision_config": TOWER
            | {"patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4}
            | {"layer_types": ["window_attention", "full_attention"]},
            "image_token_id": 95,
            "video_token_id": 94,
            "out_hidden_size": 512,
            "projector_hidden_size": 128,
        },
        processor=images("MuseGlimmerImageProcessor", patch_size=14, max_image_tokens=16),
    ),
    Row(
        "Gemma4UnifiedForConditionalGeneration",
        {"text_config": {name: value for name, value in GEMMA4.items() if "per_layer" not in name}, **GEMMA4_TOKENS}
        | {
            "vision_config": {"mm_embed_dim": 128, "output_proj_dims": 128, "patch_size": 16, "pooling_kernel_size": 3}
        },
        lambda config: (gemma4(config), config["vision_config"].update(model_patch_size=48)),
        processor=images("Gemma4ImageProcessor", do_convert_rgb=True, max_soft_tokens=16, pooling_kernel_size=3),
    ),
    Row(
        "Qwen4ExpForConditionalGeneration",
        QWEN4 | {"text_config": QWEN4["text_config"] | NGRAMS},
        qwen4,
        processor=QWEN,
        refused="with a table of hashed n-grams are not supported",
        differs=r"\.ple\.",
        why="exllamav3 leaves the projections of n-grams alone; it reads them quantized, too",
    ),
    Row(
        "Qwen4ExpForConditionalGeneration",
        QWEN4,
        qwen4,
        variant="without n-grams",
        processor=QWEN,
    ),
]

# Architectures that both have and that are in no row, with the reason.
NOT_HELD = {
    "Gemma3ForCausalLM": "exllamav3 reads it only from files of the model for images",
    "Gemma4AssistantForCausalLM": "a draft model for speculative decoding, which exllamav3 does not convert",
    "Glm5NextForConditionalGeneration": "exllamav3 needs layers for speculative decoding that Transformers does not save",
    "GptOssForCausalLM": "exllamav3 converts it from MXFP4 alone; the tests have a checkpoint of it",
    "MuseGlimmerAssistantModel": "a draft model for speculative decoding, which exllamav3 does not convert",
    "NemotronH_Omni_Reasoning_V3": "its config on the Hub is another than that of Transformers",
    "Step3p7ForConditionalGeneration": "its config on the Hub is another than that of Transformers; quantized towers are refused",
}
