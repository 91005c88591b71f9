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
"""GPTQ and AWQ, by GPT-QModel: methods that need text to calibrate on, which here is like the text that they are measured on."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open


os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, torch.get_num_threads())))  # with one it does not start


def quantize(folder: Path, names: list[str], method: str, bits: int, windows: list[torch.Tensor]):
    """The model in `folder`, its linear layers `names` quantized with `windows`, `[1, tokens]` each, saved and loaded again."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    packing = {"AWQ": {"backend": BACKEND.AWQ_TORCH}, "GPTQ": {}}[method]  # AWQ's default packs on GPUs only
    config = QuantizeConfig(bits=bits, group_size=128, method=method.lower(), offload_to_disk=False, device="cpu")
    if method == "AWQ":
        config.format = "gemm"
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs):
        start = time.perf_counter()
        model = GPTQModel.load(str(folder), config)
        examples = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in windows]
        model.quantize(examples, batch_size=1, **packing)
        facts = {"quantize_s": time.perf_counter() - start}
        model.save(saved)
        facts["disk_mb"] = sum(file.stat().st_size for file in Path(saved).iterdir()) / 1e6
        size = 0
        with safe_open(Path(saved, "model.safetensors"), "pt") as file:
            for name in file.keys():
                if name.rpartition(".")[0] in names:
                    size += file.get_tensor(name).nbytes
        start = time.perf_counter()
        model = GPTQModel.load(saved, device="cpu").model
        model.facts = facts | {"load_s": time.perf_counter() - start}
    weights = sum(model.get_submodule(name).in_features * model.get_submodule(name).out_features for name in names)
    model.facts["bits"] = 8 * size / weights
    return model
