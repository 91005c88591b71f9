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
Qwen3-30B-A3B's shape as a GGUF file in llama.cpp, timed as `bench_experts.py` times it in EXL3.

    python tests/quantization/exl3_integration/benches/peers/gguf_experts.py --threads 2 [--layers N] [--kind Q3_K]

All linear layers are of `--kind`, the head is Q6_K, routers are floats and embeddings bfloat16. Each matrix repeats 256 rounded rows of
normal numbers, since only the time counts; the routers are random. llama.cpp maps the file: what "load" takes is little, and pages are
read when a product first needs them.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import libgguf
import numpy as np
import torch

from transformers import Qwen3MoeConfig


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import bench_experts  # noqa: E402
import gguf_peer  # noqa: E402


SHAPE = "qwen3-30b-a3b"
SAMPLE = 256  # rows that are rounded, and repeated
WINDOW = 512


def layout(config: Qwen3MoeConfig, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and kinds of a model's tensors."""
    hidden, intermediate, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (config.vocab_size, hidden), "BF16"
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (config.vocab_size, hidden), "Q6_K"
    for layer in range(config.num_hidden_layers):
        for name, shape, of_kind in (
            ("attn_norm", (hidden,), "F32"),
            ("attn_q", (queries, hidden), kind),
            ("attn_q_norm", (config.head_dim,), "F32"),
            ("attn_k", (keys, hidden), kind),
            ("attn_k_norm", (config.head_dim,), "F32"),
            ("attn_v", (keys, hidden), kind),
            ("attn_output", (hidden, queries), kind),
            ("ffn_norm", (hidden,), "F32"),
            ("ffn_gate_inp", (experts, hidden), "F32"),
            ("ffn_gate_exps", (experts, intermediate, hidden), kind),
            ("ffn_up_exps", (experts, intermediate, hidden), kind),
            ("ffn_down_exps", (experts, hidden, intermediate), kind),
        ):
            yield f"blk.{layer}.{name}.weight", shape, of_kind


def values(shape: tuple[int, ...], kind: str, random: np.random.Generator) -> np.ndarray:
    """A tensor of this kind: bytes, or floats."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    *rows, columns = shape
    count = int(np.prod(rows))
    sample = random.standard_normal((count if kind == "F32" else SAMPLE, columns), np.float32) * columns**-0.5
    if kind == "F32":
        return sample
    rounded = libgguf.quantize_rows(sample, libgguf.GGMLQuantizationType[kind]).view(np.uint8)
    return np.resize(rounded, (count, rounded.shape[1])).reshape(*rows, -1)


def write(config: Qwen3MoeConfig, kind: str, file: Path):
    """Write the model, of which one tensor at a time is in memory."""
    writer = gguf_peer.writer_of(file, "qwen3moe", config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    tensors = [*layout(config, kind)]
    for name, shape, of_kind in tensors:
        of_kind = gguf.GGMLQuantizationType[of_kind]
        weights, size = gguf.GGML_QUANT_SIZES[of_kind]
        writer.add_tensor_info(name, shape, np.float32, int(np.prod(shape)) // weights * size, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, shape, of_kind in tensors:
        writer.write_tensor_data(values(shape, of_kind, random))
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--kind", choices=gguf_peer.KINDS, default="Q3_K")
    parser.add_argument("--folder", type=Path, help="where the file is kept")
    parser.add_argument("--parts", nargs="*", choices=("token", "prompt"), default=("token", "prompt"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = bench_experts.CONFIGS[SHAPE](arguments.layers)
    with tempfile.TemporaryDirectory() as scratch:
        file = (arguments.folder or Path(scratch)) / f"{SHAPE}-{config.num_hidden_layers}-{arguments.kind}.gguf"
        if not file.exists():
            write(config, arguments.kind, file)
        with bench_experts.Clock() as clock:
            model = gguf_peer.Opened(file, config, WINDOW)
        print(f"{file.name}, {file.stat().st_size / 2**20:.0f} MiB, {arguments.threads} threads; load: {clock}")
        if "token" in arguments.parts:
            bench_experts.measure_token(model)
        if "prompt" in arguments.parts:
            bench_experts.measure_prompt(model)


if __name__ == "__main__":
    main()
