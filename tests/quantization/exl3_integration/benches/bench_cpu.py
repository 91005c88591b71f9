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
Speed of the compiled CPU kernels against the peers that run on CPUs, each ratio from one run.

    python tests/quantization/exl3_integration/benches/bench_cpu.py [--layers 4096x14336 ...] [--rows 1 8 512] [--model]

A layer is `in x out`. Contenders take turns, times are medians; each has several copies of its weights, used one after the
other, so that they come from memory as in a model. The peers: torch's bf16 and fp32 linear layers, torch's int4 product
(groups of 128), and bitsandbytes' nf4 where it is installed. `--model` instead generates text with a Llama-shaped model of
about one billion parameters with random weights, in bf16 and at 4 bits; `--experts` compares a layer of experts with the sum
of the products that it consists of.

OpenMP's threads are bound to cores (`OMP_PROC_BIND=true`): virtual machines may otherwise put several on one.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time


if os.environ.get("OMP_PROC_BIND") is None:
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_PROC_BIND": "true"})

import torch
from peers.models import llama_config

from transformers import LlamaForCausalLM, Qwen3MoeConfig, logging
from transformers.integrations.exl3 import format, ops
from transformers.integrations.exl3.checkpoint import linear_tensors
from transformers.integrations.exl3.experts import Exl3Experts, Exl3Projection
from transformers.integrations.exl3.kernels import cpu
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


LAYERS = ("4096x4096", "4096x14336", "14336x4096", "896x4864")
EXL3 = (("mul1", 2), ("mul1", 3), ("mul1", 4), ("mul1", 6), ("mcg", 4), ("3inst", 4))
COLD_BYTES = 96 << 20  # of copies of a weight: three times a large cache
MAX_COPIES = 24
SECONDS = 0.4  # that each contender is timed for, at least, in as many turns as below
TURNS = 5


def copies_of(make, nbytes):
    return [make() for _ in range(min(MAX_COPIES, COLD_BYTES // nbytes + 1))]


def random_exl3_linear(in_features, out_features, bits, codebook="mul1", plain=None):
    """A quantized layer with random codes whose weights have an RMS of 0.02."""
    tensors = {}
    for name, tensor in linear_tensors(in_features, out_features, bits, codebook, False).items():
        if name == "trellis":
            codes = torch.randint(-(1 << 15), 1 << 15, tensor.shape, dtype=torch.int16)
            tensors[name] = ops.ordered(codes)
        elif name in format.MARKERS:
            tensors[name] = format.marker(name)
        else:
            tensors[name] = torch.full(tensor.shape, 0.02 if name == "suh" else 1.0, dtype=torch.float16)
    return Exl3Linear(in_features, out_features, tensors, plain)


def float_linear(in_features, out_features, dtype):
    layer = torch.nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    return lambda x: layer(x.to(dtype))


def int4_linear(in_features, out_features):
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((in_features // 128, out_features, 2), 0.01, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)


def nf4_linear(in_features, out_features):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    return layer.to(torch.bfloat16).to("cpu").eval()


def contenders(in_features, out_features):
    """For each contender its layers, all taking bf16 rows."""
    weights = in_features * out_features
    makers = {
        "bf16": (lambda: float_linear(in_features, out_features, torch.bfloat16), 2 * weights),
        "fp32": (lambda: float_linear(in_features, out_features, torch.float32), 4 * weights),
        "int4": (lambda: int4_linear(in_features, out_features), weights // 2),
    }
    if importlib.util.find_spec("bitsandbytes"):
        makers["nf4"] = (lambda: nf4_linear(in_features, out_features), weights // 2)
    for codebook, bits in EXL3:
        name = f"K={bits}" if codebook == "mul1" else f"{codebook} K={bits}"
        make = lambda bits=bits, codebook=codebook: random_exl3_linear(in_features, out_features, bits, codebook)  # noqa: E731
        makers[name] = (make, weights * bits // 8)
    return {name: copies_of(*maker) for name, maker in makers.items()}


def medians(layers, x):
    """Seconds of each contender on `x`."""
    times = {name: [] for name in layers}
    calls = {}
    for name, copies in layers.items():
        start = time.perf_counter()
        copies[0](x)
        copies[-1](x)
        calls[name] = max(2, min(200, int(2 * SECONDS / TURNS / (time.perf_counter() - start))))
    for _ in range(TURNS):
        for name, copies in layers.items():
            copies[0](x)
            for call in range(calls[name]):
                start = time.perf_counter()
                copies[(call + 1) % len(copies)](x)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in times.items()}


@torch.inference_mode()
def layer_table(layers, rows, threads):
    header = None
    for size in layers:
        in_features, out_features = map(int, size.split("x"))
        competing = contenders(in_features, out_features)
        if header is None:
            header = [name for name in competing if name != "bf16"]
            print("| layer | threads | rows | bf16 (ms) | " + " | ".join(header) + " |")
            print("|---" * (len(header) + 4) + "|")
        for number in threads:
            torch.set_num_threads(number)
            for count in rows:
                seconds = medians(competing, torch.randn(count, in_features, dtype=torch.bfloat16))
                ratios = " | ".join(f"{seconds['bf16'] / seconds[name]:.2f}" for name in header)
                print(f"| {size} | {number} | {count} | {1e3 * seconds['bf16']:.3f} | {ratios} |", flush=True)


def generated(model, tokens):
    """Tokens a second of greedy generation from a prompt of 16 tokens."""
    start = time.perf_counter()
    ids = torch.arange(16)[None]
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokens / (time.perf_counter() - start)


def model_table(bits):
    config = llama_config()
    models = {"bf16": LlamaForCausalLM(config).to(torch.bfloat16).eval()}
    models[f"K={bits}"] = quantized = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for path, module in list(quantized.named_modules()):
        if type(module) is torch.nn.Linear:
            quantized.set_submodule(
                path, random_exl3_linear(module.in_features, module.out_features, bits, plain=module)
            )
    count = models["bf16"].num_parameters() / 1e9
    speeds = {name: [] for name in models}
    for model in models.values():
        generated(model, 4)
    for _ in range(TURNS):
        for name, model in models.items():
            speeds[name].append(generated(model, 16))
    medians = {name: statistics.median(some) for name, some in speeds.items()}
    print(f"\n| Llama of {count:.2f} B parameters | tokens/s | over bf16 |\n|---|---|---|")
    for name, speed in medians.items():
        print(f"| {name} | {speed:.1f} | {speed / medians['bf16']:.2f} |")


@torch.inference_mode()
def experts_table(count=64, active=8, hidden=2048, intermediate=768):
    """A layer of experts as Qwen3-MoE has it, at 4 bits, on single tokens and on more."""
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=count, num_experts_per_tok=active
    )
    with torch.device("meta"):
        plain = Qwen3MoeExperts(config)
    shapes = {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
    layers = [{role: random_exl3_linear(*shape, 4) for role, shape in shapes.items()} for _ in range(count)]
    stacks = {r: Exl3Projection(*s, [layer[r].state_dict() for layer in layers]) for r, s in shapes.items()}
    experts = Exl3Experts(stacks, plain)
    print(
        f"\n| tokens | {active} of {count} experts, {hidden} x {intermediate} (ms) | the sum of their products (ms) |\n|---|---|---|"
    )
    for tokens in (1, 16, 128):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        chosen = torch.stack([torch.randperm(count)[:active] for _ in range(tokens)])
        weights = torch.full(chosen.shape, 1 / active, dtype=torch.bfloat16)
        inputs = {name: torch.randn(tokens, shape[0], dtype=torch.bfloat16) for name, shape in shapes.items()}
        rows = torch.bincount(chosen.flatten(), minlength=count).tolist()
        products = [
            (layer, inputs[name][:number])
            for number, parts in zip(rows, layers)
            if number
            for name, layer in parts.items()
        ]

        def one_by_one(_):
            for layer, some in products:
                layer(some)

        seconds = medians({"layer": [lambda x: experts(x, chosen, weights)], "sum": [one_by_one]}, x)
        print(f"| {tokens} | {1e3 * seconds['layer']:.3f} | {1e3 * seconds['sum']:.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 8, 512))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--model", action="store_true", help="generate with a whole model instead")
    parser.add_argument("--experts", action="store_true", help="measure a layer of experts instead")
    parser.add_argument("--bits", type=float, default=4, help="of that model")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    versions = [f"torch {torch.__version__}"]
    if importlib.util.find_spec("bitsandbytes"):
        versions.append(f"bitsandbytes {importlib.metadata.version('bitsandbytes')}")
    print(f"instruction set: {cpu.kernels().isa()}, {', '.join(versions)}; speeds over bf16\n")
    if arguments.model:
        model_table(format.check_bits(arguments.bits))
    elif arguments.experts:
        experts_table()
    else:
        layer_table(arguments.layers, arguments.rows, arguments.threads)
