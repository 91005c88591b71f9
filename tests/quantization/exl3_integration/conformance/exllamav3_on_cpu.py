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
"""exllamav3's own converter and loader on a CPU: its config, model tree, names and files; codes are drawn, not searched."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
import types
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from transformers.integrations.exl3 import format, ops


class _Extension(types.ModuleType):
    """Stands for the compiled extension, which nothing here calls."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


_extension = types.ModuleType("exllamav3.ext")
_extension.exllamav3_ext = _Extension("exllamav3_ext")
sys.modules |= {"exllamav3.ext": _extension, "exllamav3_ext": _extension.exllamav3_ext}

from exllamav3 import Config, Model  # noqa: E402
from exllamav3.architecture.architectures import ARCHITECTURES  # noqa: E402, F401
from exllamav3.conversion.allocation import create_q_strategy  # noqa: E402
from exllamav3.conversion.compile import compile_model  # noqa: E402
from exllamav3.loader.safetensors import SafetensorsCollection  # noqa: E402
from exllamav3.modules import Embedding, Linear  # noqa: E402
from exllamav3.modules.embedding import TableEmbedding  # noqa: E402
from exllamav3.modules.quant import LinearEXL3  # noqa: E402


CPU = torch.device("cpu")
DIGIT = 256  # whole numbers below this are exact in every dtype of a checkpoint
_open = SafetensorsCollection.__init__


def _open_in_python(self, directory, load_method=None, tensor_name_fixes=None):
    _open(self, directory, "python", tensor_name_fixes)


SafetensorsCollection.__init__ = _open_in_python


def read_folder(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(os.path.join(folder, file)).items()}


def drawn_codes(shape, name: str, scale: float, codebook: str = "mul1") -> dict[str, torch.Tensor]:
    """Tensors of a quantized layer `name` of this trellis shape: any bits are codes, so none have to be searched."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
    trellis = torch.randint(-(1 << 15), 1 << 15, tuple(shape), generator=generator).to(torch.int16)
    signs = [torch.randn(size * format.TILE, generator=generator).sign() for size in trellis.shape[:2]]
    spread = [0.75 + 0.5 * torch.rand(sign.shape, generator=generator) for sign in signs]
    tensors = {"trellis": trellis, "suh": (signs[0] * spread[0] * scale).half(), "svh": (signs[1] * spread[1]).half()}
    return tensors | ({codebook: format.marker(codebook)} if codebook in format.MARKERS else {})


class Conversion:
    """
    A float checkpoint, as exllamav3 1.6.5 converts it.

    Args:
        source (`str`): Folder of the checkpoint.
        vision_bits (`int`, *optional*): As its command has it; 16 leaves towers, and nothing takes what it has for one.
        bits (`float`, *optional*, defaults to 4), codebook (`str`, *optional*, defaults to `mul1`): As its command has them.

    Attributes:
        decoded (`dict[str, torch.Tensor]`): The weight `[in, out]`, padded, of each layer that is quantized.
        of_text (`set[str]`): Those of them that are not of layers for speculative decoding.
        beside (`tuple[str, ...]`): What names of layers for speculative decoding begin with.
        left (`set[str]`): Layers of a tower that is not quantized.
    """

    def __init__(self, source: str, vision_bits: int | None = None, bits: float = 4, codebook: str = "mul1"):
        self.config = Config.from_directory(source)
        self.text = Model.from_config(self.config)
        self.mtp = self._part("mtp")
        self.vision = self._part("vision")
        if vision_bits is None:
            vision_bits = self.vision.caps.get("default_vision_bits", 16) if self.vision else 16
        modules = self.vision.modules if self.vision and vision_bits == 16 else ()
        self.left = {layer.key for module in modules for layer in module if isinstance(layer, Linear)}
        if vision_bits == 16:
            self.vision = None
        self.bits, self.codebook = bits, codebook
        self.vision_bits, self.decoded, self.of_text = vision_bits, {}, set()
        self.beside = tuple(f"{module.key}." for module in self.mtp.modules) if self.mtp else ()

    def _part(self, name):
        return Model.from_config(self.config, component=name) if name in self.config.model_classes else None

    def layers(self):
        """All that can be quantized, each loaded: the module to be stored with it, and what holds its weight."""
        for part in filter(None, (self.text, self.mtp, self.vision)):
            for module in part.modules:
                for index in range(module.num_slices):
                    module.load(CPU, load_slice=index if module.num_slices > 1 else None, keep_source_weights=True)
                    loaded = [m for m in module if isinstance(m, Linear) and m.qmap and m.device is not None]
                    yield part, module, loaded
                    module.unload()

    @torch.inference_mode()
    def write(self, source: str, target: str, work: str):
        """Write the converted checkpoint to `target`."""
        stored = os.path.join(work, "qtensors")
        os.makedirs(stored)
        os.makedirs(target)
        args = (self.text, self.mtp, self.config, self.bits, 6, 4, 0)
        steps = {"half_steps": self.codebook == "mul1"}
        bits, average = create_q_strategy(*args, vision_model=self.vision, vision_bpw=self.vision_bits, **steps)
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for part, module, layers in self.layers():
            for layer in layers:
                if bits[layer.key] != 16:
                    self._quantize(layer, bits[layer.key])
                    self.of_text |= set() if part is self.mtp else {layer.key}
            kept = tensors.setdefault(module.key, {})
            for inner in module:
                kept |= {name: tensor.clone().contiguous() for name, tensor in inner.get_tensors().items()}
        for key, kept in tensors.items():
            if kept:
                save_file(kept, os.path.join(stored, f"{key}.safetensors"))
        compile_args = {
            "in_dir": source, "out_dir": target, "work_dir": work, "shard_size": 8192, "head_bits": 6,
            "final_bits": round(average, 2), "cal_rows": 250, "cal_cols": 2048, "apply_out_scales": None,
            "codebook": self.codebook, "vision_bits": self.vision_bits, "mtp_bits": 4,
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            compile_model(compile_args, self.text, self.config, None, self.mtp, self.vision)

    def _quantize(self, layer, bits):
        weight, bias = layer.inner.get_weight_tensor(), layer.inner.get_bias_tensor()
        shape = (weight.shape[0] // format.TILE, weight.shape[1] // format.TILE, int(format.TILE * bits))
        codes = drawn_codes(shape, layer.key, weight.float().std().item() or 0.05, self.codebook)
        weight = ops.dequantize(codes["trellis"], codes["suh"], codes["svh"], self.codebook)
        self.decoded[layer.key] = weight.T.contiguous()
        layer.inner = LinearEXL3(
            layer.config, layer.in_features, layer.out_features, None, None, None, codes["suh"], codes["svh"],
            codes["trellis"], codes.get("mcg"), codes.get("mul1"), bias, layer.out_dtype, key=layer.key,
        )  # fmt: skip


def places(source: str, vision_bits: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """
    Where the weights of each layer that exllamav3 quantizes stand in the source.

    The source's elements are counted from 1, and it is loaded with the digits of these numbers in place of weights: what
    is cut, transposed, permuted, gathered or padded (with zeros) on the way shows where it came from.

    Returns:
        `tuple`: By layer, int64 `[in, out]`, 0 where there is padding; and the number before the first element of each tensor.
    """
    tensors, first, count = read_folder(source), {}, 0
    for name, tensor in tensors.items():
        first[name], count = count, count + tensor.numel()
    found: dict[str, torch.Tensor] = {}
    for power in (1, DIGIT, DIGIT * DIGIT):
        folder = f"{source}.digits"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        digits = {
            name: (torch.arange(first[name] + 1, first[name] + 1 + t.numel()) // power % DIGIT)
            .view(t.shape)
            .to(t.dtype)
            if t.is_floating_point()
            else t
            for name, t in tensors.items()
        }
        save_file(digits, os.path.join(folder, "model.safetensors"))
        with torch.inference_mode():
            for _, _, layers in Conversion(folder, vision_bits).layers():
                for layer in layers:
                    digit = layer.inner.get_weight_tensor().round().long()
                    found[layer.key] = found.get(layer.key, 0) + digit * power
        shutil.rmtree(folder)
    return found, first


def read_back(folder: str) -> tuple[set[str], dict[str, torch.Tensor], list[str]]:
    """
    Load a checkpoint as exllamav3 does.

    Returns:
        `tuple`: Names of its quantized layers, by name the tables of embeddings that are quantized, fp16 `[vocab, hidden]` as they
        are decoded, and what went wrong.
    """
    quantized, tables, problems = set(), {}, []
    with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
        config = Config.from_directory(folder)
        for part in {"text", "vision"} & set(config.model_classes):
            for module in Model.from_config(config, component=part).modules:
                for index in range(module.num_slices):
                    try:
                        module.load(CPU, load_slice=index if module.num_slices > 1 else None)
                    except Exception as error:
                        problems.append(f"{module.key}: {type(error).__name__}: {error}"[:200])
                        continue
                    layers = [m for m in module if isinstance(m, Linear) and m.inner is not None]
                    quantized |= {layer.key for layer in layers if layer.quant_type == "exl3"}
                    for table in (m for m in module if isinstance(m, Embedding)):
                        if isinstance(table.embedding, TableEmbedding):
                            tables[table.key] = _decoded(table.embedding)
                    module.unload()
    return quantized, tables, problems


def _decoded(embedding) -> torch.Tensor:
    """All rows of a quantized table, without its lookup, which stages rows for a GPU."""
    rows = embedding.table.stores[0]
    return embedding.decode(rows, None, len(rows))
