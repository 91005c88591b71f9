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
"""What EXL3 knows about the modules of models: which it can stand for, their sizes, names and ties."""

from torch import nn

from ...pytorch_utils import Conv1D
from . import format


# Fused projections by name, with the names that their parts go by in checkpoints, in the order of their rows.
FUSED = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "q_k_v_proj": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}

# What the projections of one expert are called, and what they do.
EXPERT_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
EXPERT_PARAMETERS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}

# Converters fold a constant into weights of these architectures, which their runtime takes out again (by `model_type`).
FOLDED_ARCHITECTURES = {
    "laguna": "up projections of experts divided by 128",
    "mistral4": "up projections of experts divided by 128",
    "mimo_v2": "`o_proj` multiplied by `attention_value_scale`",
    "mimo_v2_flash": "`o_proj` multiplied by `attention_value_scale`",
}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is one that `Exl3Linear` can stand for: a plain linear layer or a `Conv1D`."""
    return type(module) in (nn.Linear, Conv1D)  # of subclasses nobody knows what they do with their weight


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a module for which `is_linear` holds."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` is one that `Exl3Embedding` can stand for: a plain table, or one that only scales its rows."""
    return isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or hasattr(module, "embed_scale"))


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is experts with fused 3-D weights of a layout that `Exl3Experts` can stand for."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        own <= EXPERT_PARAMETERS
        and "down_proj" in own
        and len({"gate_up_proj", "up_proj"} & own) == 1
        and module.down_proj.dim() == 3
        and (hasattr(module, "is_transposed") or _has_usual_layout(module))
        and len(own) == len(list(module.parameters()))
    )


def _has_usual_layout(module: nn.Module) -> bool:
    """Whether experts that do not say so are of upstream's usual layout: gates over up projections, rows of outputs."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "gate_up_proj"):
        return False
    experts, out, into = module.down_proj.shape
    return module.gate_up_proj.shape == (experts, 2 * into, out)


def expert_roles(module: nn.Module) -> tuple[str, ...]:
    """What the projections of one expert are, of a module for which `is_experts` holds."""
    return ("gate", "up", "down") if hasattr(module, "gate_up_proj") else ("up", "down")


def expert_sizes(module: nn.Module) -> tuple[int, int, int]:
    """Number of experts, their hidden size and their intermediate size, of a module for which `is_experts` holds."""
    experts, out, into = module.down_proj.shape
    return (experts, into, out) if getattr(module, "is_transposed", False) else (experts, out, into)


def check_architecture(config):
    """Raise `ValueError` for architectures whose checkpoints hold weights that have to be corrected, or tables in another format."""
    for model_type in {config.model_type, config.get_text_config().model_type}:
        if model_type in FOLDED_ARCHITECTURES:
            raise ValueError(
                f"EXL3 checkpoints of the architecture `{model_type}` are not supported: their weights have a constant folded "
                f"in ({FOLDED_ARCHITECTURES[model_type]}), which this loader does not take out. Load the original checkpoint "
                "and quantize it on the fly with `Exl3Config`."
            )
    text = config.get_text_config()
    if getattr(text, "ple_layer_ids", None):
        raise ValueError(
            f"EXL3 checkpoints of the architecture `{text.model_type}` with a table of hashed n-grams are not supported: the "
            "converter writes the table in a format of its own, to a file of its own. Load the original checkpoint and quantize "
            "it on the fly with `Exl3Config`, which leaves the table as it is."
        )


def part_sizes(fused: nn.Module, parent: nn.Module, config, parts: int, stored: list[int] | None = None):
    """
    How the output features of a fused projection are divided among its parts.

    Args:
        fused (`nn.Module`): The projection.
        parent (`nn.Module`): Its module, an attention layer or an MLP.
        config (`PreTrainedConfig`): Tells the heads of attention where `parent` has no config of its own.
        parts (`int`): 2 for gate and up, 3 for query, key and value.
        stored (`list[int]`, *optional*): The sizes that a checkpoint stores the parts with, padding included.

    Returns:
        `list[int]` or `None`: The parts' output features, None if no division is known to fit.
    """
    total = linear_sizes(fused)[1]
    candidates = []
    if parts == 3:
        config = getattr(parent, "config", None) or config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if heads:
            head_dim = getattr(parent, "head_dim", None) or getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // heads
            key_heads = getattr(config, "num_key_value_heads", None) or heads
            candidates.append([heads * head_dim, key_heads * head_dim, key_heads * head_dim])
    candidates.append([total // parts] * parts)
    candidates.append(stored)
    for sizes in candidates:
        if sizes and sum(sizes) == total and (stored is None or [format.padded(size) for size in sizes] == stored):
            return sizes


def untie(model, paths):
    """
    Declare the weights of the modules at `paths` to be their own.

    Raises:
        `ValueError`: Where the ties of other modules stand and fall with these.
    """
    weights = {f"{path}.weight" for path in paths}
    tied = model.all_tied_weights_keys
    touched = {target for target, source in tied.items() if {target, source} & weights}
    head = model.get_output_embeddings()
    if not touched and not any(model.get_submodule(path) is head for path in paths):
        return
    if touched and set(tied) - touched:
        raise ValueError(
            f"{', '.join(sorted(weights & {*tied, *tied.values()}))} cannot be quantized: {', '.join(sorted(set(tied) - touched))} "
            f"are tied as well in {type(model).__name__}, and its config has one switch for all of them. Leave `head_bits` and "
            "`embedding_bits` unset."
        )
    for target in touched:
        del tied[target]
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
