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
Speed, error and memory of quantizing to EXL3 on this machine's CPU.

    python tests/quantization/exl3_integration/benches/bench_encoder.py [--tiles 1024] [--codebook mul1] [--memory 4096]

Speeds are medians of three. The gap is that of the mean squared error on N(0, 1) to the least possible, `2 ** (-2 * K)`,
the loss what the error exceeds that of the exact search by.
Without OMP_PROC_BIND=true some virtual machines run both threads on one core.
"""

import argparse
import math
import resource
import subprocess
import sys
import time

import torch

from transformers.integrations.exl3 import encoder, format, search
from transformers.integrations.exl3.kernels import cpu


def timed(call):
    """The result of `call()`, and the median of three times that it took."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, sorted(times)[1]


def search_table(count, codebook):
    values = format.codebook_values(codebook).float()
    threads = sorted({1, torch.get_num_threads()})
    header = "".join(f" | k weights/s, {number} threads" for number in threads)
    print(
        f"instruction set: {cpu.kernels().isa()}, codebook: {codebook}\n\n| K | effort{header} | gap to the bound (dB) | loss (dB) |"
    )
    print("|---" * (len(threads) + 4) + "|")
    for bits in format.BITS:
        scale = search.INPUT_RMS[codebook][bits]
        tiles = torch.randn(count, format.TILE_SIZE, generator=torch.Generator().manual_seed(0)) * scale
        exact = cpu.kernels().search(tiles, bits, codebook, "exact")
        for effort in ("default", "fast"):
            speeds = []
            for number in threads:
                torch.set_num_threads(number)
                states, seconds = timed(lambda: cpu.kernels().search(tiles, bits, codebook, effort))
                speeds.append(f" | {tiles.numel() / seconds / 1e3:.0f}")
            errors = [(values[some] - tiles).double().square().mean().item() / scale**2 for some in (states, exact)]
            gap, loss = 10 * math.log10(errors[0] * 4**bits), 10 * math.log10(errors[0] / errors[1])
            print(f"| {bits:g} | {effort}{''.join(speeds)} | {gap:.2f} | {loss:.3f} |", flush=True)


def encode_table(features, codebook):
    """A whole layer, with what comes before and after the search."""
    weight = torch.randn(features, features)
    print("\n| K | effort | layer, k weights/s |\n|---|---|---|")
    for effort in ("default", "fast"):
        start = time.perf_counter()
        encoder.quantize_weight(weight, 4, codebook, effort=effort, search=cpu.kernels().search)
        print(f"| 4 | {effort} | {weight.numel() / (time.perf_counter() - start) / 1e3:.0f} |", flush=True)


def decode_table(codebook):
    print("\n| K | decoded M weights/s |\n|---|---|")
    for bits in (2, 3, 4, 8):
        trellis = torch.randint(-(2**15), 2**15, (256, 256, 16 * bits)).to(torch.int16)
        _, seconds = timed(lambda: cpu.kernels().decode(trellis, codebook))
        print(f"| {bits} | {trellis.shape[0] * trellis.shape[1] * format.TILE_SIZE / seconds / 1e6:.0f} |")


def peak():
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(features, codebook):
    """In a process of its own, after all that is loaded and allocated once."""
    encoder.quantize_weight(torch.randn(128, 128), 4, codebook, search=cpu.kernels().search)
    weight = torch.empty(features, features, dtype=torch.bfloat16).normal_()
    before = peak()
    tensors = encoder.quantize_weight(weight, 4, codebook, search=cpu.kernels().search)
    quantized = sum(tensor.nbytes for tensor in tensors)
    print(
        f"quantizing a bfloat16 weight of {weight.nbytes / 2**20:.0f} MiB took {(peak() - before) / 2**20:.0f} MiB: the "
        f"quantized one's {quantized / 2**20:.0f} MiB + {(peak() - before - quantized) / weight.nbytes:.2f} * the weight\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1024)
    parser.add_argument("--codebook", default="mul1", choices=format.CODEBOOKS)
    parser.add_argument("--memory", type=int, default=4096, help="features of the weight that is quantized as a whole")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_only:
        measure_memory(arguments.memory, arguments.codebook)
    else:
        # First: a process starts with the peak of the one that it comes from.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory-only"], check=True)
        search_table(arguments.tiles, arguments.codebook)
        encode_table(arguments.memory, arguments.codebook)
        decode_table(arguments.codebook)
