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
"""
Whole mixtures of experts of random codes: loading, saving, tokens, compiling, and how many modules and parameters they have.

    python tests/quantization/exl3_integration/benches/bench_experts.py [--shape narrow] [--layers N] [--threads 1]

| shape           | what                                                                                         |
|-----------------|----------------------------------------------------------------------------------------------|
| `narrow`        | 24 layers of 128 experts of 128x128 in fp32: what Python costs, since there is little else    |
| `qwen3-30b-a3b` | 48 layers of 128 experts of 2048x768 in bf16, at 3 bits 11.7 GB                              |
| `glm-4.5-air`   | 46 layers of 128 experts of 4096x1408 in bf16                                                |
| `gpt-oss-20b`   | 24 layers of 32 experts of 2880x2880 with biases in bf16                                     |

The head has 6 bits, as converters give it. The checkpoint is written to `--folder`, which is kept if it is given, and not written again if it is there. `--parts` are run in
the order given, so that a large shape can be measured in pieces. Times are of the processor and of the clock; memory is anonymous memory,
sampled while the checkpoint is loaded (Linux). `compile` takes a model of two layers, saved beside.
"""

import argparse
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from transformers import AutoModelForCausalLM, Glm4MoeConfig, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig, logging
from transformers.integrations.exl3 import format
from transformers.integrations.exl3.architecture import expert_sizes, is_experts
from transformers.integrations.exl3.checkpoint import linear_tensors


CONFIGS = {
    "narrow": lambda layers: Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=layers or 24,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        dtype="float32",
    ),
    "qwen3-30b-a3b": lambda layers: Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers or 48,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        dtype="bfloat16",
    ),
    "glm-4.5-air": lambda layers: Glm4MoeConfig(
        hidden_size=4096,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=layers or 46,
        n_routed_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151552,
        dtype="bfloat16",
    ),
    "gpt-oss-20b": lambda layers: GptOssConfig(
        num_hidden_layers=layers or 24, num_local_experts=32, num_experts_per_tok=4, dtype="bfloat16"
    ),
}
PARTS = ("load", "save", "token", "prompt", "compile")
BITS, HEAD_BITS = 3, 6
COMPILED_LAYERS = 2


def random_linear(
    name: str, in_features: int, out_features: int, bias: bool, bits: int = BITS
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized layer with random codes, whose outputs are as large as its inputs."""
    tensors = {}
    for leaf, tensor in linear_tensors(in_features, out_features, bits, "mul1", bias).items():
        if leaf == "trellis":
            tensor = torch.randint(-(1 << 15), 1 << 15, tensor.shape, dtype=torch.int16)
        elif leaf in format.MARKERS:
            tensor = format.marker(leaf)
        elif leaf == "bias":
            tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
        else:
            value = in_features**-0.5 if leaf == "suh" else 1.0
            tensor = torch.full(tensor.shape, value, dtype=tensor.dtype)
        tensors[f"{name}.{leaf}"] = tensor
    return tensors


def random_tensors(path: str, module: torch.nn.Module, is_head: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint has for a module of a model on the meta device."""
    if is_experts(module):
        count, hidden, intermediate = expert_sizes(module)
        bias = hasattr(module, "down_proj_bias")
        sizes = {
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }
        tensors = {}
        for expert in range(count):
            for role, size in sizes.items():
                tensors |= random_linear(f"{path}.{expert}.{role}", *size, bias)
        return tensors
    if type(module) is torch.nn.Linear:
        bits = HEAD_BITS if is_head else BITS
        return random_linear(path, module.in_features, module.out_features, module.bias is not None, bits)
    state = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    kept = {name: tensor for name, tensor in state.items() if name not in module._non_persistent_buffers_set}
    return {
        f"{path}.{name}": (
            torch.ones(tensor.shape, dtype=tensor.dtype)
            if tensor.dim() == 1
            else torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02)
        )
        for name, tensor in kept.items()
    }


def write(config: PreTrainedConfig, folder: Path):
    """Write a checkpoint of random codes to `folder`, a file for each layer and one for the rest."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    weight_map, files = {}, {}
    for path, module in model.named_modules():
        layer = re.match(r"model\.layers\.(\d+)\.", path)
        files.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", []).append((path, module))
    for name, modules in files.items():
        tensors = {}
        for path, module in modules:
            tensors |= random_tensors(path, module, module is model.get_output_embeddings())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = config.to_dict() | {"architectures": [type(model).__name__]}
    content["quantization_config"] = {"quant_method": "exl3", "bits": float(BITS), "version": "1.6.5"}
    content["quantization_config"]["head_bits"] = HEAD_BITS
    (folder / "config.json").write_text(json.dumps(content))


def anonymous() -> int:
    """Bytes of anonymous memory that this process has now."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


def peak_while(call):
    """What `call` returns, and the most anonymous memory that the process had meanwhile, beyond what it had before."""
    before, done = anonymous(), threading.Event()
    peak = before

    def sample():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        return call(), max(peak, anonymous()) - before
    finally:
        done.set()
        sampler.join()


class Clock:
    """Times what is done in its context, by the processor and by the clock."""

    def __enter__(self):
        self._cpu, self._wall = self.used(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = self.used() - self._cpu, time.perf_counter() - self._wall

    @staticmethod
    def used() -> float:
        """Seconds of the processor that this process has used, and those that it waited for: the C++ compiler."""
        return time.process_time() + sum(os.times()[2:4])

    def __str__(self):
        return f"{self.cpu:.2f} s of the processor, {self.wall:.2f} s"


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def measure_load(folder: Path):
    """Load the model, and print what that took."""
    files = [*folder.glob("*.safetensors")]
    tensors = len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    size = sum(file.stat().st_size for file in files)
    with Clock() as clock:
        model, peak = peak_while(lambda: load(folder))
    print(f"load: {tensors} tensors in {len(files)} files: {clock}")
    print(f"peak of anonymous memory: {peak / 2**20:.0f} MiB, the files have {size / 2**20:.0f}")
    print(f"modules {len([*model.modules()])}, parameters {len([*model.parameters()])}", flush=True)
    return model


def measure_save(model):
    with tempfile.TemporaryDirectory() as folder:
        with Clock() as clock:
            model.save_pretrained(folder)
    print(f"save: {clock}", flush=True)


def best(call, turns: int = 7) -> Clock:
    """The turn of `call` that took the least time of the processor."""
    clocks = []
    call()
    for _ in range(turns):
        with Clock() as clock:
            call()
        clocks.append(clock)
    return min(clocks, key=lambda clock: clock.cpu)


@torch.inference_mode()
def measure_token(model):
    """One token after 16 others, and generation of 16."""
    ids = torch.arange(16)[None] % model.config.vocab_size
    clock = best(lambda: model(ids[:, :1], use_cache=False))
    print(f"one token: {clock.cpu * 1e3:.1f} ms of the processor, {clock.wall * 1e3:.1f} ms")
    count = 16
    with Clock() as clock:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    print(f"generation: {count / clock.wall:.2f} tokens per second, the prompt of 16 included", flush=True)


@torch.inference_mode()
def measure_prompt(model):
    for length in (64, 512):
        ids = torch.arange(length)[None] % model.config.vocab_size
        clock = best(lambda: model(ids, use_cache=False, logits_to_keep=1), turns=5 if length == 64 else 2)
        print(f"{length} tokens: {clock.cpu * 1e3:.0f} ms of the processor, {clock.wall * 1e3:.0f} ms", flush=True)


@torch.inference_mode()
def measure_compile(model):
    """Compile a model of two layers, and compare it with itself."""
    inputs = []

    def counting(graph, example_inputs):
        inputs.append(len(example_inputs))
        return torch._inductor.compile(graph, example_inputs)

    ids = torch.arange(1)[None]
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # in this process, whose time is taken
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend=counting)
    torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(3))  # what is loaded once
    with Clock() as clock:
        compiled(ids)
    print(f"compile, {len(model.model.layers)} layers: {clock}; inputs of the graph: {inputs}")
    for name, call in (("eager", lambda: model(ids, use_cache=False).logits), ("compiled", lambda: compiled(ids))):
        clock = best(call, turns=20)
        print(f"one token, {name}: {clock.cpu * 1e3:.2f} ms of the processor, {clock.wall * 1e3:.2f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CONFIGS, default="narrow")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none to write the checkpoint alone")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        config = CONFIGS[arguments.shape](arguments.layers)
        large = folder / f"{arguments.shape}-{config.num_hidden_layers}"
        small = folder / f"{arguments.shape}-{COMPILED_LAYERS}"
        for path, layers in ((large, config.num_hidden_layers), (small, COMPILED_LAYERS)):
            if not path.exists():
                write(CONFIGS[arguments.shape](layers), path)
        if not arguments.parts:
            return
        print(f"{large.name}, torch {torch.__version__}, {arguments.threads} threads")
        two_layers = load(small)  # and what is imported once
        if set(arguments.parts) - {"compile"}:
            model = measure_load(large)
        if "save" in arguments.parts:
            measure_save(model)
        if "token" in arguments.parts:
            measure_token(model)
        if "prompt" in arguments.parts:
            measure_prompt(model)
        if "compile" in arguments.parts:
            measure_compile(two_layers)


if __name__ == "__main__":
    main()
