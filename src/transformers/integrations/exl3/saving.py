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
"""The file that EXL3 checkpoints have beside what every checkpoint has: `quantization_config.json`."""

import inspect
import json
import math
import os

from . import format
from .checkpoint import read_checkpoint, read_header


def tensor_storage(files: list[str]) -> dict[str, dict]:
    """
    The map of modules to their stored tensors that `quantization_config.json` holds, made from the files themselves.

    Args:
        files (`list[str]`): The safetensors files of a checkpoint.

    Returns:
        `dict[str, dict]`: For each module its tensors with shape, bytes and dtype, and for quantized linear layers the
        bits per weight and the multiplier of their codebook.
    """
    linears = read_checkpoint(files).linears
    storage: dict[str, dict] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            stored = storage.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})["stored_tensors"]
            size = math.prod(tensor.shape) * tensor.element_size()
            stored[name] = {"shape": list(tensor.shape), "n_bytes": size, "dtype": str(tensor.dtype)}
    for module, tensors in linears.items():
        storage[module] |= {"quant_format": "exl3", "bits_per_weight": format.bits_of(tensors["trellis"])}
        storage[module] |= {f"{name}_multiplier": format.MARKERS[name] for name in format.MARKERS if name in tensors}
    return storage


class SaveWithTensorStorage:
    """
    Stands for a quantized model's `save_pretrained` and writes `quantization_config.json` after it.

    Upstream's quantizers see the tensors that are saved, but not where: hence this wrapper, an attribute of the model
    that is copied and pickled with it.

    Args:
        model (`PreTrainedModel`): The model whose class's `save_pretrained` does the rest.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        model = self.model
        save = type(model).save_pretrained
        call = inspect.signature(save).bind(model, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["distributed_checkpoint"]:
            raise ValueError("EXL3 models are not saved with `distributed_checkpoint=True`: leave it out.")
        folder, hub_arguments = call.arguments["save_directory"], call.arguments["kwargs"]
        push_to_hub, call.arguments["push_to_hub"] = call.arguments["push_to_hub"], False
        before = _files(folder)
        asked = getattr(model.config, "distributed_config", None)
        model.config.distributed_config = None  # the quantizer gathers the state: upstream is to write what it gets
        try:
            save(*call.args, **call.kwargs)
        finally:
            model.config.distributed_config = asked
        if model.should_save_on_this_rank(call.arguments["is_main_process"]):
            written = [path for path, written_at in _files(folder).items() if before.get(path) != written_at]
            is_adapter = getattr(model, "_hf_peft_config_loaded", False)
            if written and not is_adapter:
                storage = {"tensor_storage": tensor_storage(sorted(written))}
                with open(os.path.join(folder, "quantization_config.json"), "w", encoding="utf-8") as file:
                    json.dump(model.config.quantization_config.to_dict() | storage, file, indent=4)
            if push_to_hub:  # after that file is written, too
                hub_arguments.setdefault("repo_id", os.path.basename(os.path.abspath(folder)))
                model.push_to_hub(token=call.arguments["token"], **hub_arguments)
        model.barrier_after_gathered_checkpoint_save(asked)


def _files(folder: str | os.PathLike) -> dict[str, int]:
    """The safetensors files in `folder`, with the times at which they were written."""
    if not os.path.isdir(folder):
        return {}
    paths = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")]
    return {path: os.stat(path).st_mtime_ns for path in paths}
