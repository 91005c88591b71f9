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
"""What else the converter can be asked for, and models can be like: the same architectures again."""

from dataclasses import replace

from . import texts, towers
from .rows import DEEPSEEK_MTP, MOE, like, sets, text


BASES = {row.architecture: row for row in texts.ROWS + towers.ROWS if not row.variant}


def variant(architecture: str, name: str, **changes):
    """The row of `architecture` with other arguments; `fields` are added to those of its config."""
    base = BASES[architecture]
    changes["fields"] = base.fields | changes.get("fields", {})
    return replace(base, variant=name, **changes)


def both(*functions):
    """Both changes of a config, one after the other."""

    def change(config):
        for function in functions:
            function(config)

    return change


def parts(*functions):
    """What all of `functions` add."""
    return lambda tensors: {name: shape for function in functions for name, shape in function(tensors).items()}


HY_MTP = {name: shape for name, shape in DEEPSEEK_MTP.items() if "shared" not in name} | {
    "final_layernorm__weight": (128,)
}
QWEN_MTP_OWN = {"fc__weight": (128, 256), "norm__weight": (128,)}
QWEN_MTP_OWN |= {"pre_fc_norm_hidden__weight": (128,), "pre_fc_norm_embedding__weight": (128,)}
QWEN_MTP = parts(
    like("model.language_model.layers.1.", "mtp.layers.0."),
    lambda _: {f"mtp.{name.replace('__', '.')}": shape for name, shape in QWEN_MTP_OWN.items()},
)

ROWS = [
    # Rings of 256 elements: a row of one that is padded, of one that is full, and of two.
    variant("LlamaForCausalLM", "embeddings of 5 bits", embedding_bits=5),
    variant("Qwen3ForCausalLM", "embeddings of 8 bits", fields=text(hidden_size=256, head_dim=32), embedding_bits=8),
    variant(
        "Qwen2ForCausalLM",
        "embeddings of 1 bit, head that was tied",
        fields=text(hidden_size=320, tie_word_embeddings=True),
        embedding_bits=1,
    ),
    variant("LlamaForCausalLM", "codebook mcg", codebook="mcg"),
    variant("LlamaForCausalLM", "codebook 3inst", codebook="3inst"),
    variant("LlamaForCausalLM", "2.5 bits", bits=2.5),
    variant(
        "Qwen3ForCausalLM",
        "odd sizes, tied head",
        fields=text(hidden_size=160, intermediate_size=200, head_dim=64, tie_word_embeddings=True),
    ),
    variant(
        "Qwen3MoeForCausalLM",
        "odd sizes",
        fields=text(hidden_size=160, head_dim=40, **MOE | {"moe_intermediate_size": 72}),
    ),
    variant("NemotronHForCausalLM", "latent experts", fields={"moe_latent_size": 96}),
    variant(
        "OlmoHybridForCausalLM",
        "odd sizes",
        fields={
            "linear_key_head_dim": 24,
            "linear_value_head_dim": 48,
        },  # 2880, 2880 and 5760 columns in the model of 7B
    ),
    variant(
        "NemotronHForCausalLM",
        "MTP",
        config=both(
            BASES["NemotronHForCausalLM"].config, sets(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
        ),
        adds=parts(
            like(
                "backbone.layers.2.",
                "mtp.layers.0.",
                **{name: shape for name, shape in HY_MTP.items() if "final" not in name},
            ),
            like("backbone.layers.1.", "mtp.layers.1.", final_layernorm__weight=(128,)),
        ),
    ),
    *(
        variant(
            name,
            "MTP",
            config=sets(num_nextn_predict_layers=1),
            adds=like("model.layers.1.", "model.layers.2.", **tensors),
        )
        for name, tensors in (
            ("Glm4MoeLiteForCausalLM", DEEPSEEK_MTP),
            ("GlmMoeDsaForCausalLM", DEEPSEEK_MTP),
            ("HYV3ForCausalLM", HY_MTP),
        )
    ),
    *(
        variant(
            f"{name}ForConditionalGeneration",
            "MTP",
            config=both(BASES[f"{name}ForConditionalGeneration"].config, sets(text__mtp_num_hidden_layers=1)),
            adds=QWEN_MTP,
        )
        for name in ("Qwen3_5", "Qwen3_5Moe")
    ),
    variant(
        "Gemma4ForConditionalGeneration",
        "dense",
        fields={"text_config": towers.GEMMA4},
    ),
    variant(
        "Mistral3ForConditionalGeneration",
        "Ministral 3, tied head",
        fields={"text_config": text(head_dim=32, model_type="ministral3", tie_word_embeddings=True)}
        | {"tie_word_embeddings": True},
    ),
    *(
        variant(f"{name}ForConditionalGeneration", "tower of 16 bits", vision_bits=16, refused=None)
        for name in (
            "Gemma3",
            "Glm4v",
            "Mistral3",
            "Qwen2_5_VL",
            "Step3p7",
            "Lfm2Vl",
            "MuseGlimmer",
            "Gemma4Unified",
        )
    ),
    variant(
        "NemotronH_Omni_Reasoning_V3",
        "tower of 6 bits",
        vision_bits=6,
        differs=r"^mlp1\.3$",
        why="the last layer of a model stays, as upstream has it for all methods",
    ),
    variant(
        "Qwen3VLForConditionalGeneration",
        "tower of 16 bits, tied head",
        fields={"tie_word_embeddings": True},
        vision_bits=16,
    ),
]
