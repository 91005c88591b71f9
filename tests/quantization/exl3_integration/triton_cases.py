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
"""What the tests of the Triton kernels share: random layers, what they compute exactly, and which tests run where."""

import os
import unittest
from dataclasses import replace

import numpy
import torch
from packaging.version import parse

from transformers.integrations.exl3 import format, search
from transformers.integrations.exl3.format import hadamard
from transformers.integrations.exl3.kernels.triton import gpu
from transformers.integrations.exl3.modules import Exl3Linear

from .synthetic import random_linear, stacked
from .tiny_models import tiny_model


try:
    import triton
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Largest error of a product over the norm of the exact one, bfloat16 as measured and rounded up.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

require_triton = unittest.skipUnless(triton, "needs Triton")
require_interpreter_that_runs = unittest.skipIf(
    triton and parse(triton.__version__) < parse("3.7") and parse(numpy.__version__) >= parse("2.4"),
    "Triton 3.6 does not interpret with NumPy 2.4 and newer, which make no int of an array of one element",
)
require_interpreter = unittest.skipUnless(triton and INTERPRETED, "needs Triton's interpreter, TRITON_INTERPRET=1")
require_compiler = unittest.skipIf(triton is None or INTERPRETED, "needs Triton's compiler")


def interpret_faster():
    """
    Leave out what takes most of the time of Triton's interpreter and changes nothing: computing integers in 64 bits once more, for a
    check that only its option `debug` makes, and looking through `triton.language` again at each call of a function.
    """
    from triton.runtime import interpreter

    builder, known = interpreter.interpreter_builder, set()
    builder.options = replace(builder.options, sanitize_overflow=False)

    def call(function, *args, **kwargs):
        if function.fn.__module__ not in known:
            known.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def all_codes():
    return [(bits, codebook) for bits in format.BITS for codebook in format.CODEBOOKS]


def random_trellis(rows, columns, bits, seed=0):
    """A trellis of `rows` x `columns` tiles with random codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, (rows, columns, int(16 * bits)), generator=generator).to(torch.int16)


def search_case(count, bits, codebook, cost, weights=None, device="cpu"):
    """
    Arguments of `search.reference_kernel`: `count` rings of `weights` weights, by default as many as two states hold, with
    `integer` costs of the kind that this rate has or `fp32` ones. The last ring has weights far out.
    """
    weights = weights or 2 * int(format.STATE_BITS / bits)
    rings = torch.randn(count, weights, generator=torch.Generator().manual_seed(int(2 * bits)))
    rings[-1, ::3] *= 4
    rings = rings.to(device) * search.INPUT_RMS[codebook][bits]
    values = format.codebook_values(codebook, rings.device).float()
    if cost == "integer":
        ranges = search.BYTE_COST_RANGES if bits <= search.BYTE_COST_BITS else search.WORD_COST_RANGES
        scale = search.word_scale(bits, codebook, ranges[0])
        rings, values = search._to_words(rings, scale), search._to_words(values, scale)
    return rings, values, None, bits, weights // 2


class Layer:
    """A random quantized layer and what it computes, in float64."""

    def __init__(self, in_features, out_features, bits=4, codebook="mul1", bias=False, device="cpu", seed=1):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = format.padded(in_features), format.padded(out_features)
        self.in_features, self.out_features, self.codebook = in_features, out_features, codebook
        self.trellis = random_trellis(rows // 16, columns // 16, bits, seed).to(device)
        self.suh = torch.randn(rows, generator=generator).half().to(device)
        self.svh = torch.randn(columns, generator=generator).half().to(device)
        self.bias = torch.randn(columns, generator=generator).half().to(device) if bias else None

    def inputs(self, rows, dtype=torch.float32):
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.in_features, generator=generator).to(self.trellis.device, dtype)

    def linear(self, x):
        return gpu.kernels().linear(x, self.trellis, self.suh, self.svh, self.bias, self.codebook, self.out_features)

    def exact(self, x):
        x = torch.nn.functional.pad(x.double(), (0, self.suh.shape[0] - self.in_features)) * self.suh.double()
        y = hadamard(hadamard(x) @ format.decode(self.trellis, self.codebook).double()) * self.svh.double()
        y = y if self.bias is None else y + self.bias.double()
        return y[..., : self.out_features]


def grouped_linear(layers, x, bounds):
    """What `grouped.grouped_linear` has the kernels compute with `layers`, all of one kind."""
    return gpu.kernels().grouped_linear(
        x, bounds.unfold(0, 2, 1), *stack_of(layers), layers[0].codebook, layers[0].out_features
    )


def stack_of(layers):
    """`trellis`, `suh`, `svh` and `bias` of `layers`, stacked."""
    tensors = ([getattr(layer, leaf) for layer in layers] for leaf in ("trellis", "suh", "svh", "bias"))
    return [None if some[0] is None else torch.stack(some) for some in tensors]


def experts_of_a_model():
    """The four experts of a tiny model, of two rates, as a module."""
    own = tiny_model("qwen3_moe")[0].model.layers[0].mlp.experts
    hidden, width = own.gate_up_proj.shape[2], own.gate_up_proj.shape[1] // 2
    experts = []
    for seed in range(own.num_experts):
        sizes = {role: (hidden, width) if role != "down" else (width, hidden) for role in ("gate", "up", "down")}
        bits = 2 if seed == 1 else 4
        experts.append(
            {
                role: Exl3Linear(*size, random_linear(*size[::-1], bits, seed=10 * seed + size[1])[0])
                for role, size in sizes.items()
            }
        )
    return stacked(experts, own)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()
