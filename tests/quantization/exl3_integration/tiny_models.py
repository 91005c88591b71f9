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
"""Tiny models of many architectures, with random weights, and inputs for them."""

import torch

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Dinov2Config,
    Exl3Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    NomicBertConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
)


VOCAB = 100
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_LAYER = {**TEXT, "num_hidden_layers": 1}
ENCODER = {key: ONE_LAYER[key] for key in TEXT if key != "num_key_value_heads"}
IMAGE_TOKEN = 95
VISION = {
    "hidden_size": 128,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 128,
    "intermediate_size": 100,
    "num_heads": 4,
    "out_hidden_size": 128,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
    "window_size": 16,
}
QWEN_ROPE = {"type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}


def _configs():
    yield "llama", AutoModelForCausalLM, LlamaConfig(**TEXT)
    yield "llama_tied", AutoModelForCausalLM, LlamaConfig(**ONE_LAYER, tie_word_embeddings=True)
    yield "llama_base", AutoModel, LlamaConfig(**ONE_LAYER)
    yield "llama_classifier", AutoModelForSequenceClassification, LlamaConfig(**ONE_LAYER)
    yield "qwen2", AutoModelForCausalLM, Qwen2Config(**ONE_LAYER)
    yield "gemma3_text", AutoModelForCausalLM, Gemma3TextConfig(**ONE_LAYER, head_dim=32)
    gpt2 = {"n_embd": 128, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    yield "gpt2", AutoModelForCausalLM, GPT2Config(**gpt2)
    yield "bert", AutoModel, BertConfig(**ENCODER)
    yield "bert_classifier", AutoModelForSequenceClassification, BertConfig(**ENCODER)
    yield "nomic_bert", AutoModel, NomicBertConfig(**ENCODER, head_dim=32)  # its files have fused projections
    yield "dinov2", AutoModel, Dinov2Config(**VISION, use_swiglu_ffn=True)
    t5 = {"d_model": 128, "d_ff": 100, "d_kv": 32, "num_heads": 4, "num_layers": 1, "vocab_size": VOCAB}
    yield "t5", AutoModelForSeq2SeqLM, T5Config(**t5, decoder_start_token_id=0)
    yield "mixtral", AutoModelForCausalLM, MixtralConfig(**ONE_LAYER, num_local_experts=4)
    qwen3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    yield "qwen3_moe", AutoModelForCausalLM, Qwen3MoeConfig(**ONE_LAYER, **qwen3)
    gpt_oss = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    yield "gpt_oss", AutoModelForCausalLM, GptOssConfig(**ONE_LAYER, **gpt_oss)
    yield "phi3", AutoModelForCausalLM, Phi3Config(**ONE_LAYER)
    yield "glm4", AutoModelForCausalLM, Glm4Config(**ONE_LAYER, head_dim=32)
    nemotron = {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    nemotron |= {
        "mamba_num_heads": 4,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "head_dim": 32,
        "n_group": 1,
    }
    yield "nemotron_h", AutoModelForCausalLM, NemotronHConfig(**{**TEXT, **nemotron, "topk_group": 1})
    tokens = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 96, "vision_end_token_id": 97}
    text = {**ONE_LAYER, "rope_parameters": QWEN_ROPE}
    qwen_vl = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION, **tokens)
    yield "qwen2_5_vl", AutoModelForImageTextToText, qwen_vl
    tokens = {"image_token_index": IMAGE_TOKEN, "boi_token_index": 96, "eoi_token_index": 97}
    text = {**ONE_LAYER, "head_dim": 32}
    gemma3 = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    yield "gemma3", AutoModelForImageTextToText, gemma3


MODELS = {name: (auto_class, config) for name, auto_class, config in _configs()}


def tiny_model(name: str):
    """
    A model with random weights, the same each time, and the class to load it with. Its biases are drawn, too: of zeros it would
    not be noticed if they were lost, doubled or exchanged.
    """
    auto_class, config = MODELS[name]
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model, auto_class


def tiny_inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs for the model: three short rows of tokens, and an image where it takes one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (3, 7), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if name == "dinov2":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name not in ("qwen2_5_vl", "gemma3"):
        return {"input_ids": ids}
    ids = torch.tensor([[1, 5, 96, *[IMAGE_TOKEN] * 4, 97, 7]])
    is_image = (ids == IMAGE_TOKEN).int()
    if name == "gemma3":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
            "token_type_ids": is_image,
        }
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image}


def quick_config(**arguments) -> Exl3Config:
    """Of a search that takes half of the time and finds a little less: for tests to which this is all the same."""
    return Exl3Config(**{"effort": "fast", **arguments})
