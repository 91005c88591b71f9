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
Speed of the kernels for GPUs against a float linear layer in bfloat16, and against exllamav3 where it is installed.

    python tests/quantization/exl3_integration/benches/bench_triton.py [--no-model]
    TRITON_INTERPRET=1 python tests/quantization/exl3_integration/benches/bench_triton.py --tiny   # shows that it runs
    python tests/quantization/exl3_integration/benches/bench_triton.py --static sm_90   # from compiled code, without a GPU

Figures are medians, and ratios those of medians taken in turns in one run. Products are replayed from a CUDA graph that goes through copies
of the layer, more of them than the cache holds.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig
from transformers.integrations.exl3 import encoding, format, search
from transformers.integrations.exl3.experts import Exl3Experts, Exl3Projection
from transformers.integrations.exl3.kernels.triton import gpu
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


ROUNDS = 9
CACHE_BYTES = 256 << 20  # more than any GPU's last cache
LANE_INSTRUCTIONS = 3.35e13  # a second on an H200: 132 processors of 128 lanes at 1.98 GHz


class Timer:
    """Seconds of a call on the device: from events around the replay of a graph on CUDA, else by the clock."""

    def __init__(self, device):
        self.module = torch.get_device_module(device) if device.type != "cpu" else None
        self.has_graphs = device.type == "cuda"

    def prepare(self, call):
        """`call`, warmed up and captured, as something to be timed."""
        call()
        self.wait()
        if not self.has_graphs:
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def wait(self):
        if self.module:
            self.module.synchronize()

    def compare(self, *calls, rounds=ROUNDS):
        """Median seconds of each call, run in turns."""
        prepared = [self.prepare(call) for call in calls]
        times = [[] for _ in calls]
        for _ in range(rounds if self.module else 1):
            for call, seconds in zip(prepared, times):
                self.wait()
                start = time.perf_counter()
                call()
                self.wait()
                seconds.append(time.perf_counter() - start)
        return [statistics.median(seconds) for seconds in times]


def quantized_layer(in_features, out_features, bits, device):
    """A layer of random codes."""
    shape = (in_features // format.TILE, out_features // format.TILE, int(bits * format.TILE))
    tensors = {
        "trellis": torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device),
        "suh": torch.rand(in_features, device=device).half() * 0.02,
        "svh": torch.ones(out_features, device=device).half(),
        "mul1": format.marker("mul1").to(device),
    }
    return Exl3Linear(in_features, out_features, tensors)


def exllamav3_layer(layer):
    """The same layer of exllamav3's, None where that is not installed."""
    try:
        from exllamav3.modules.quant.exl3 import LinearEXL3
    except ImportError:
        return None
    return LinearEXL3(
        None,
        layer.in_features,
        layer.out_features,
        suh=layer.suh.data,
        svh=layer.svh.data,
        trellis=layer.trellis.data,
        mul1=layer.mul1.data,
        out_dtype=torch.float16,
    )


def through(layers, x):
    """A call that runs all `layers` on `x`."""
    return lambda: [layer(x) for layer in layers]


@torch.no_grad()
def product_row(timer, device, rows, size, bits):
    """A line of the table: speed over bfloat16, and over exllamav3."""
    in_features, out_features = size
    copies = 1 if device.type == "cpu" else 1 + CACHE_BYTES // (in_features * out_features * bits // 8)
    ours = [quantized_layer(in_features, out_features, bits, device) for _ in range(copies)]
    plain = [
        torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16, device=device)
        for _ in range(min(copies, 1 + CACHE_BYTES // (2 * in_features * out_features)))
    ]
    x = torch.randn(rows, in_features, dtype=torch.bfloat16, device=device)
    calls = [through(ours, x), through(plain, x)]
    others = [exllamav3_layer(layer) for layer in ours] if device.type == "cuda" else [None]
    if others[0]:
        half = x.half()
        calls.append(lambda: [other.forward(half, {}) for other in others])
    seconds = timer.compare(*calls)
    each = [total / len(layers) for total, layers in zip(seconds, (ours, plain, others))]
    over_other = f"{each[2] / each[0]:.2f}" if others[0] else "-"
    name = f"{rows} x {in_features}x{out_features}, K={bits}"
    print(f"| {name} | {each[0] * 1e6:.1f} | {each[1] / each[0]:.2f} | {over_other} |", flush=True)


def product_table(device, sizes, row_counts, rates):
    print("| rows x in x out | us | speed over bfloat16 Linear | over exllamav3 |\n|---|---|---|---|")
    timer = Timer(device)
    for rows, size in itertools.product(row_counts, sizes):
        for bits in rates if rows == 1 else (4,):
            product_row(timer, device, rows, size, bits)


@torch.no_grad()
def experts_table(device, hidden, width, count, row_counts, implementation):
    """Experts of a mixture, 8 to a token (as in Qwen3 30B-A3B), against Transformers' own in bfloat16."""
    print(f"\n| tokens, {count} experts | us | speed over bfloat16, {implementation} |\n|---|---|---|")
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count)
    config._experts_implementation = implementation
    with device:
        plain = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in plain.parameters():
        parameter.normal_(std=0.02)
    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    experts = [{role: quantized_layer(*size, 4, device) for role, size in sizes.items()} for _ in range(count)]
    stacks = {r: Exl3Projection(*s, [layers[r].state_dict() for layers in experts]) for r, s in sizes.items()}
    ours, timer = Exl3Experts(stacks, plain), Timer(device)
    for rows in row_counts:
        # Each token goes through all experts in turn, so that the cache does not hold the next ones.
        turns = [torch.randperm(count, device=device).view(-1, 8) for _ in range(rows)]
        indices = torch.stack(turns, dim=1)
        x = torch.randn(rows, hidden, dtype=torch.bfloat16, device=device)
        weights = torch.rand(rows, 8, dtype=torch.bfloat16, device=device)
        calls = [lambda m=module: [m(x, index, weights) for index in indices] for module in (ours, plain)]
        seconds = [total / len(indices) for total in timer.compare(*calls)]
        print(f"| {rows} | {seconds[0] * 1e6:.1f} | {seconds[1] / seconds[0]:.2f} |", flush=True)


def encoder_table(device, size, rates, efforts, tiles=None):
    """A whole layer, and the search alone: of all its tiles at once, or of as many as `tiles`."""
    weight = torch.randn(size[::-1], device=device).bfloat16()
    print("\n| in x out, K, effort | quantizing, M weights/s | search alone, M weights/s |\n|---|---|---|")
    timer = Timer(device)
    timer.has_graphs = False  # the host is asked which tiles saturated
    for bits, effort in itertools.product(rates, efforts):
        some = torch.randn(tiles or weight.numel() // format.TILE_SIZE, format.TILE_SIZE, device=device)
        some *= search.INPUT_RMS["mul1"][bits]
        calls = [lambda: gpu.kernels().search(some, bits, "mul1", effort)]
        if not tiles:
            calls.append(lambda: encoding.encode(weight, bits, "mul1", 0, effort))
        seconds = timer.compare(*calls, rounds=3)
        alone, *whole = [count / each / 1e6 for count, each in zip((some.numel(), weight.numel()), seconds)]
        quantizing = f"{whole[0]:.2f}" if whole else "-"
        print(f"| {size[0]}x{size[1]}, {bits}, {effort} | {quantizing} | {alone:.2f} |", flush=True)


@torch.no_grad()
def tokens_a_second(model, tokens):
    """Of generating greedily with a static cache and compiled, after one run to warm up."""
    prompt = torch.ones(1, 16, dtype=torch.long, device=model.device)
    options = {
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "do_sample": False,
        "cache_implementation": "static",
    }
    model.generate(prompt, **options)
    torch.get_device_module(model.device).synchronize()
    start = time.perf_counter()
    model.generate(prompt, **options)
    torch.get_device_module(model.device).synchronize()
    return tokens / (time.perf_counter() - start)


def model_line(device, bits, tokens):
    """A Llama of the size of an 8B one, random, before and after its linear layers are quantized to random codes."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype=torch.bfloat16,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    before = tokens_a_second(model, tokens)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = quantized_layer(module.in_features, module.out_features, bits, device)
            model.model.set_submodule(name, layer)
    torch.compiler.reset()
    after = tokens_a_second(model, tokens)
    print(
        f"\nLlama 8B, K={bits}: {before:.1f} tokens/s in bfloat16, {after:.1f} quantized: {after / before:.2f} times"
    )


def static_table(arch):
    """What compiled code tells: instructions a weight, registers, and how many weights a second an H200 could decode."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from exl3_integration import aot

    from transformers.integrations.exl3.kernels.triton import linear as triton_linear

    def empty(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def launches(rows, bits, codebook):
        trellis = empty(256, 896, int(16 * bits), dtype=torch.int16)
        x, y = empty(rows, 4096, dtype=torch.bfloat16), 14336
        arguments = (x, trellis, empty(4096), empty(y), None, codebook, y, aot.target(arch))
        return aot.launches(lambda: triton_linear.linear(*arguments))

    print("| rows | K | codebook | instructions a weight | registers | 1e12 weights/s at most | the most frequent |")
    print("|---|---|---|---|---|---|---|")
    cases = [(1, bits, "mul1") for bits in format.BITS] + [(1, 4, "mcg"), (1, 4, "3inst")]
    for rows, bits, codebook in cases + [(rows, 4, "mul1") for rows in (16, 32, 64)]:
        kernel = aot.compiled(launches(rows, bits, codebook)[-1], arch)
        loop = kernel.loop()
        each = loop.total() * 32 * kernel.warps / format.BLOCK**2
        classes = ", ".join(
            f"{name} {count * 32 * kernel.warps / format.BLOCK**2:.2f}" for name, count in loop.most_common(7)
        )
        ceiling = LANE_INSTRUCTIONS / each / 1e12
        print(f"| {rows} | {bits:g} | {codebook} | {each:.2f} | {kernel.registers} | {ceiling:.1f} | {classes} |")

    print("\n| search at K | effort | instructions a state | registers | 1e6 weights/s at most | the inner loop |")
    print("|---|---|---|---|---|---|")
    for bits, effort in itertools.product((1, 2, 3, 4, 5, 6, 7, 8), ("default", "exact")):
        launch = aot.search_launch(arch, bits, torch.float32 if effort == "exact" else torch.int16)
        kernel = aot.compiled(launch, arch)
        loop, each = aot.search_instructions(launch, kernel)
        states = format.NUM_STATES * (1 + 2 * search.window_of(bits, effort) / format.TILE_SIZE)
        classes = ", ".join(f"{name} {count}" for name, count in loop.most_common(5))
        ceiling = LANE_INSTRUCTIONS / each / states / 1e6
        print(f"| {bits} | {effort} | {each:.2f} | {kernel.registers} | {ceiling:.0f} | {classes} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--no-model", action="store_true", help="products only")
    parser.add_argument("--static", metavar="ARCH", help="figures of the code compiled for this architecture")
    arguments = parser.parse_args()
    if arguments.static:
        static_table(arguments.static)
        return
    if arguments.tiny:
        with mock.patch.object(gpu, "is_available", lambda device: True):
            product_table(torch.device("cpu"), [(256, 128), (128, 384)], (1, 16, 130), (2, 3, 4))
            experts_table(torch.device("cpu"), 128, 128, 16, (1, 3), "eager")
            encoder_table(torch.device("cpu"), (128, 128), (1,), ("fast",), tiles=1)
        print("\nThese times are the interpreter's and mean nothing.")
        return
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    if not gpu.is_available(device):
        sys.exit("The kernels need a GPU that Triton works on; --tiny and --static do not.")
    name = torch.get_device_module(device).get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {torch.version.cuda or torch.version.hip or torch.version.xpu}\n")
    product_table(device, [(4096, 14336), (8192, 28672)], (1, 16, 2048), (2, 3, 4))
    experts_table(device, 2048, 768, 128, (1, 16, 512), "grouped_mm")
    encoder_table(device, (4096, 14336), (1, 2, 3, 4, 6, 8), ("default", "fast"))
    if not arguments.no_model:
        model_line(device, 4, 256)


if __name__ == "__main__":
    main()
