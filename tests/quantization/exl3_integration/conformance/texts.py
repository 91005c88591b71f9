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
"""Tiny models of text."""

import re

from .rows import DELTA, MLA, MOE, ONE_LAYER, PARTIAL, ROUTED, VOCAB, Row, sets, text


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
    Row("Ernie4_5_ForCausalLM", text(head_dim=32), kind="Ernie4_5ForCausalLM"),
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
    Row("IQuestCoderForCausalLM", text(head_dim=32), sets(model_type="iquestcoder"), kind="LlamaForCausalLM"),
    Row(
        "BailingMoeV3ForCausalLM",
        text(num_key_value_heads=4, head_dim=32, **MLA | {"q_lora_rank": None}, **MOE, num_shared_experts=1)
        | {"first_k_dense_replace": 1, "layer_group_size": 2, "n_group": 1, "topk_group": 1},
        sets(
            head_dim=32,
            no_kda_lora=True,
            score_function="sigmoid",
            norm_topk_prob=True,
            num_experts=4,
            num_experts_per_tok=2,
            num_nextn_predict_layers=0,
            gated_attention_proj_granularity_type="head_wise",
        ),
        names=lambda name: name.replace("layers.0.attention.dense", "layers.0.attention.o_proj"),
        differs=r"attention\.(qkv|q|k|v)_proj$",
        why="exllamav3 writes query, key and value as one layer, the model has three",
        unreadable=ONE_LAYER,
        kind="BailingHybridForCausalLM",
    ),
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
]
