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
"""What a row of the table is made of: a tiny model, and what its files are like on the Hub."""

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
        architecture (`str`): The class, as exllamav3 and files call it.
        fields (`dict`): Of its config.
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
        kind (`str`, *optional*): The class as Transformers calls it, where that is another name.
        variant (`str`, *optional*): What sets the row apart from others of the same architecture.
        bits (`float`), codebook (`str`): Of exllamav3's converter.
        embedding_bits (`int`, *optional*): Of the table of embeddings that is quantized on the fly; the converter leaves tables plain.
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
    bits: float = 4
    codebook: str = "mul1"
    embedding_bits: int | None = None
    kind: str | None = None

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


DEEPSEEK_MTP = {"eh_proj__weight": (128, 256), "enorm__weight": (128,), "hnorm__weight": (128,)}
DEEPSEEK_MTP |= {"shared_head__norm__weight": (128,)}
ONE_LAYER = "exllamav3 reads query, key and value quantized as one layer only"
