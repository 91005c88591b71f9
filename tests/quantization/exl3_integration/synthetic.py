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
"""Checkpoints made in memory: the layout of EXL3 converters with random codes, and the dense weights that these mean."""

import json
import os
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from transformers.integrations.exl3 import format
from transformers.integrations.exl3.experts import Exl3Experts, Exl3Projection
from transformers.integrations.exl3.format import hadamard
from transformers.integrations.exl3.modules import Exl3Linear


def save_quantized(model, folder: str, match: str = ""):
    """Write a checkpoint of `model` with random codes for its linear layers, those whose names have `match`."""
    checkpoint = SyntheticCheckpoint(model)
    checkpoint.quantize_all(match)
    checkpoint.save(folder, checkpoint.tensors)


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def random_linear(out_features, in_features, bits=4, codebook="mul1", bias=None, signs=(), scale=0.05, seed=0):
    """
    A quantized linear layer with random codes.

    Args:
        signs (`tuple[str]`): Which sides have packed signs, as old files do: `su`, `sv`.

    Returns:
        The tensors of a checkpoint by their leaf names, and the weight fp32 `[out_features, in_features]` they mean,
        computed in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = format.padded(in_features), format.padded(out_features)
    shape = (rows // 16, columns // 16, int(16 * bits))
    trellis = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    tensors = {"trellis": trellis}
    for side, size in (("u", rows), ("v", columns)):
        if f"s{side}" in signs:
            words = torch.randint(-(1 << 15), 1 << 15, (size // 16,), generator=generator).to(torch.int16)
            tensors[f"s{side}"] = words
    if "su" not in signs:
        tensors["suh"] = ((0.5 + torch.rand(rows, generator=generator)) * scale).half()
    if "sv" not in signs:
        magnitude = scale if "su" in signs else 1
        tensors["svh"] = (torch.randn(columns, generator=generator).sign() * magnitude).half()
    suh, svh = (
        tensors[f"{sign}h"] if f"{sign}h" in tensors else format.unpack_signs(tensors[sign]) for sign in ("su", "sv")
    )
    if codebook in format.MARKERS:
        tensors[codebook] = format.marker(codebook)
    if bias is not None:
        tensors["bias"] = torch.nn.functional.pad(bias, (0, columns - out_features)).half()
    inner = format.decode(trellis, codebook).double()
    weight = hadamard(hadamard(inner).T)  # [out, in]
    weight = weight * suh.double() * svh.double()[:, None]
    return tensors, weight[:out_features, :in_features].float()


class SyntheticCheckpoint:
    """
    A float checkpoint of a tiny model turned into an EXL3 one, tensor by tensor.

    Args:
        model (`PreTrainedModel`): The model; its random weights are what is not quantized.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): Of the EXL3 checkpoint.
        dense (`dict[str, torch.Tensor]`): Of the float checkpoint that means the same.
    """

    def __init__(self, model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.dense = read_tensors(folder)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                self.config = json.load(file)
        self.tensors = dict(self.dense)
        self._seed = 0

    def quantize(self, name, parts=None, **kwargs):
        """
        Quantize the linear layer `name`, or the rows of its weight as parts of their own.

        Args:
            name (`str`): Of the layer in the checkpoint.
            parts (`dict[str, int]`, *optional*): Names of the parts and their rows (or, negative, their columns).
        """
        weight = self.tensors.pop(f"{name}.weight")
        bias = self.tensors.pop(f"{name}.bias", None)
        dense, start = torch.empty_like(weight), 0
        for part, size in (parts or {name: weight.shape[0]}).items():
            self._seed += 1
            piece = slice(start, start + abs(size))
            start = piece.stop
            if size > 0:
                own = None if bias is None else bias[piece]
                tensors, dense[piece] = random_linear(size, weight.shape[1], bias=own, seed=self._seed, **kwargs)
            else:
                tensors, dense[:, piece] = random_linear(weight.shape[0], -size, seed=self._seed, **kwargs)
            self.tensors |= {f"{part}.{leaf}": tensor for leaf, tensor in tensors.items()}
        self.dense[f"{name}.weight"] = dense
        if bias is not None:
            self.dense[f"{name}.bias"] = bias.half().float()

    def quantize_all(self, match="", **kwargs):
        """Quantize every 2-D weight whose name has `match` and is no embedding, norm or router."""
        for key in list(self.tensors):
            name, _, leaf = key.rpartition(".")
            skipped = ("embed", "norm", "gate", "wte", "wpe", "shared", "lm_head", "router", "bias")
            last = name.rpartition(".")[2]
            if leaf == "weight" and match in name and self.tensors[key].dim() == 2:
                if not any(word in last for word in skipped) or last in ("gate_proj", "gate_up_proj"):
                    self.quantize(name, **kwargs)

    def save(self, folder, tensors, quantized=True, shards=1):
        """Write a checkpoint folder, as a converter does: no `format` in the files' metadata."""
        config = dict(self.config)
        if quantized:
            config["quantization_config"] = {"quant_method": "exl3", "version": "1.6.5", "bits": 4.0, "head_bits": 6}
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file)
        names = sorted(tensors)
        if shards == 1:
            save_file({name: tensors[name].contiguous() for name in names}, os.path.join(folder, "model.safetensors"))
            return folder
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            weight_map |= dict.fromkeys(names[index::shards], file)
            save_file({n: tensors[n].contiguous() for n in names[index::shards]}, os.path.join(folder, file))
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": 0}, "weight_map": weight_map}, file)
        return folder


def stacked(experts: list[dict[str, Exl3Linear]], plain) -> Exl3Experts:
    """`Exl3Experts` with the tensors of layers, which are given for each expert by role."""
    projections = {
        role: Exl3Projection(layer.in_features, layer.out_features, [expert[role].state_dict() for expert in experts])
        for role, layer in experts[0].items()
    }
    return Exl3Experts(projections, plain)
