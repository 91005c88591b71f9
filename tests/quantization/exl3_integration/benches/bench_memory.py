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
Peak memory of quantizing a whole model on the fly, against the quantized model and its largest tensor, and of loading and
running what was saved, against the bytes of the checkpoint (Linux).

    python tests/quantization/exl3_integration/benches/bench_memory.py [--hidden 1024] [--layers 8] [--convert]

With `--convert`, the peak memory of the command that converts such a model, against its largest tensor. Of layers of one size it
encodes the first, and has zeros for the others, so that a billion weights take minutes: they are files all the same.

The model is a Llama in bfloat16 with random weights, saved in shards. Anonymous memory is sampled every two milliseconds: the
pages of the mapped source files are not the process's own. The search is a stand-in, since memory does not depend on it. glibc is
told to return what is freed, of which it otherwise keeps up to 64 MiB.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from unittest import mock


if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    limits = {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "262144"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)

import torch

from transformers import AutoModelForCausalLM, Exl3Config, LlamaConfig, LlamaForCausalLM, logging
from transformers.integrations.exl3 import encoding
from transformers.integrations.exl3.checkpoint import linear_tensors
from transformers.integrations.exl3.convert import convert


def anonymous() -> int:
    """Bytes of anonymous memory that this process has now."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


def peak_while(call):
    """What `call` returns, and the most anonymous memory that the process had meanwhile."""
    peak, done = anonymous(), threading.Event()

    def sample():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        return call(), peak
    finally:
        done.set()
        sampler.join()


def save_float_model(hidden: int, layers: int, folder: str):
    """Save a float model of these sizes to `folder`."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=16 * hidden,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")


def in_a_process(function, *arguments):
    """Call `function` in a process of its own, whose memory is no longer there afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def load(hidden: int, layers: int, folder: str):
    """Quantize a float model while it is loaded."""
    in_a_process(save_float_model, hidden, layers, folder)
    before = anonymous()
    model, peak = peak_while(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=Exl3Config(bits=4, head_bits=6)
        )
    )
    return model, peak - before + mapped(model)


def of_first_sizes(encode):
    """`encode` that encodes the first weight of each size, and returns zeros of the same shapes for others."""
    seen = set()

    def encode_or_not(weight, bits, codebook, seed, *others):
        if (weight.shape, bits) not in seen:
            seen.add((weight.shape, bits))
            return encode(weight, bits, codebook, seed, *others)
        tensors = linear_tensors(weight.shape[1], weight.shape[0], bits, codebook, False)
        return [torch.zeros_like(tensors[name], device="cpu") for name in ("trellis", "suh", "svh")]

    return encode_or_not


def convert_model(hidden: int, layers: int, folder: str):
    """Convert a float model by the command."""
    source, output = os.path.join(folder, "float"), os.path.join(folder, "converted")
    in_a_process(save_float_model, hidden, layers, source)
    before = anonymous()
    with mock.patch.object(encoding, "encode", of_first_sizes(encoding.encode)):
        _, peak = peak_while(lambda: convert(source, output, Exl3Config(bits=4, head_bits=6)))
    made, written = checkpoint_bytes(source), checkpoint_bytes(output)
    largest = 2 * 16 * hidden * hidden
    print(
        f"float model {made / 2**20:.0f} MiB, converted {written / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB"
    )
    print(f"peak {(peak - before) / 2**20:.0f} MiB = {(peak - before) / largest:.2f} * largest tensor")


def checkpoint_bytes(folder: str) -> int:
    names = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return sum(os.path.getsize(os.path.join(folder, name)) for name in names)


@torch.inference_mode()
def run_checkpoint(folder: str, small: str):
    """Load a quantized checkpoint in this process, which holds no other, and run it on one row and on many."""

    def load_and_run(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for length in (1, 256):
            model.model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
        return model

    load_and_run(small)  # what is allocated once
    before = anonymous()
    model, peak = peak_while(lambda: load_and_run(folder))
    used = peak - before + mapped(model)
    checkpoint = checkpoint_bytes(folder)
    print(f"checkpoint {checkpoint / 2**20:.0f} MiB, loaded and run on 1 and on 256 tokens")
    print(f"peak {used / 2**20:.0f} MiB = checkpoint + {(used - checkpoint) / 2**20:.0f} MiB")


def mapped(model) -> int:
    """Bytes of the parameters of `model` that are pages of its files, which safetensors maps."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        ranges = [line.split()[0].split("-") for line in file if line.rstrip().endswith(".safetensors")]
    return sum(
        parameter.nbytes
        for parameter in model.parameters()
        if any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in ranges)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--convert", action="store_true")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with (
        mock.patch.object(encoding, "search_on", lambda device: lambda tiles, *_: tiles.int() & 0xFFFF),
        tempfile.TemporaryDirectory() as folder,
    ):
        if arguments.convert:
            with contextlib.redirect_stdout(None):
                convert_model(256, 1, folder + "/small")  # what is allocated once
            convert_model(arguments.hidden, arguments.layers, folder)
            return
        model, _ = load(256, 1, folder + "/float-small")  # what is allocated once
        model.save_pretrained(folder + "/small")
        model, used = load(arguments.hidden, arguments.layers, folder + "/float")
        report(model, used)
        model.save_pretrained(folder + "/model", max_shard_size="100MB")
        in_a_process(run_checkpoint, folder + "/model", folder + "/small")


def report(model, used: int):
    """Print the memory that quantizing `model` took."""
    largest = 2 * model.model.embed_tokens.weight.numel()
    quantized = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    print(f"quantized model {quantized / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB (bfloat16)")
    print(f"peak {used / 2**20:.0f} MiB = quantized model + {(used - quantized) / largest:.2f} * largest tensor")


if __name__ == "__main__":
    main()
