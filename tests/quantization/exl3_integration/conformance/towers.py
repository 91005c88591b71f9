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
"""Tiny models of text and images."""

from .rows import (
    DEEPSEEK_MTP,
    DELTA,
    GLM_ROPE,
    MLA,
    MOE,
    MROPE,
    ONE_LAYER,
    PARTIAL,
    ROUTED,
    VOCAB,
    Row,
    images,
    like,
    sets,
    text,
)


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

GEMMA4 = text(head_dim=32, num_hidden_layers=3, sliding_window=64, hidden_size_per_layer_input=0, global_head_dim=64)
GEMMA4 |= {"vocab_size_per_layer_input": VOCAB}
GEMMA4 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


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


GLM5 = text(num_key_value_heads=4, intermediate_size=256, **MLA | {"qk_rope_head_dim": 0}, **ROUTED, index_topk=32)
GLM5 |= {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["linear_attention", "full_attention"]}
GLM5 |= {"index_head_dim": 32, "index_n_heads": 2, "linear_head_dim": 32, "linear_num_heads": 4}
GLM5_TOWER = {"image_size": 56, "patch_size": 14, "projection_intermediate_size": 256}


def glm5(config):
    linear = {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0}
    config["text_config"] |= {"index_kpool_compress": True, "mhc": True, "linear_attn_config": linear}
    config["text_config"] |= {
        "layer_types": ["linear_attention", "deepseek_sparse_attention"],
        "num_nextn_predict_layers": 1,
    }


HEADS = {"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32}
STEP = {
    "model_type": "step3p7",
    "text_config": {"model_type": "step3p5", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {**HEADS, "vocab_size": VOCAB, "max_position_embeddings": 512, "moe_num_experts": 4, "moe_top_k": 2}
    | {"moe_intermediate_size": 64, "share_expert_dim": 64, "moe_layers_enum": "1", "sliding_window": 64}
    | {"layer_types": ["full_attention", "sliding_attention"], "attention_other_setting": HEADS}
    | {"rope_theta": [1e4, 1e4], "partial_rotary_factors": [0.5, 1.0], "swiglu_limits": [0.0, 0.0]}
    | {"swiglu_limits_shared": [0.0, 0.0], "norm_expert_weight": True, "use_moe_router_bias": True}
    | {"moe_router_scaling_factor": 3.0, "rms_norm_eps": 1e-5, "pad_token_id": 0, "tie_word_embeddings": False},
    "vision_config": {"width": 128, "layers": 2, "heads": 4, "image_size": 56, "patch_size": 14, "mlp_ratio": 2.0},
    "image_token_id": 95,
    "projector_bias": False,
}
OMNI = {name: value for name, value in text(head_dim=32).items() if name != "num_hidden_layers"}
OMNI |= {**ROUTED, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1, "ssm_state_size": 16}
OMNI |= {"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2}
OMNI |= {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}


def omni(config):
    """As the Hub has it: other names of parts and blocks."""
    config["llm_config"] = config.pop("text_config") | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
    config["llm_config"].pop("mtp_layers_block_type", None)


def flat(config):
    """As Qwen2.5-VL's file is on the Hub: the fields of text are not in a part of their own."""
    config |= {name: value for name, value in config["text_config"].items() if name not in config}
    config["vision_config"] |= {"model_type": "qwen2_5_vl", "spatial_patch_size": 14}


def gemma4(config):
    config.setdefault("vision_soft_tokens_per_image", 16)
    config["text_config"]["global_head_dim"] = 64
    config["text_config"].pop("per_layer_config", None)


def qwen4(config):
    config["text_config"] |= {
        "layer_types": DELTA["layer_types"],
        "num_experts": 4,
        "ple_embed_dim": 320,
        "ngram_size": 3,
    }
    config["text_config"] |= {"heads_per_ngram": 1}
    config["vision_config"]["deepstack_visual_indexes"] = []


ROWS = [
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
        "Glm5NextForConditionalGeneration",
        {"text_config": GLM5, "vision_config": QWEN_TOWER | GLM5_TOWER, **GLM_TOKENS},
        glm5,
        adds=like("model.language_model.layers.1.", "model.language_model.layers.2.", **DEEPSEEK_MTP),
        processor=images("Glm5NextImageProcessor", min_image_tokens=4, max_image_tokens=64),
        differs=r"self_attn\.(qkv|q|k|v)_proj$",
        why="exllamav3 writes query, key and value as one layer, the model has three",
        unreadable=ONE_LAYER,
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
        "Step3p7ForConditionalGeneration",
        STEP,
        lambda config: config.update(STEP),
        processor=images("Step3p7ImageProcessor"),
        differs=r"resblocks\.\d+\.attn\.([qkv]_proj(\.|$)|in_proj)",
        why="query, key and value of the tower are decoded: rows stand in files in another order, which codes cannot be put into",
    ),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        {
            "text_config": OMNI,
            "vision_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16}
            | {"image_size": 64, "max_img_size": 64, "patch_dim": 768, "num_cls_tokens": 3, "num_registers": 7}
            | {"video_temporal_patch_size": 2, "video_patch_dim": 1536},
            "vision_hidden_size": 128,
            "projector_hidden_size": 128,
        },
        omni,
        processor=images("NemotronHOmniImageProcessor", norm_mean=[0.5] * 3, norm_std=[0.5] * 3, min_num_patches=4)
        | {"max_num_patches": 64, "video_target_num_patches": 16},
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
