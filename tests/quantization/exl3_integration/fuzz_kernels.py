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
Random calls of the compiled kernels and of the operators: with arguments that fit, what the reference computes; with others, an
error before anything is read.

    make fuzz SECONDS=600       # under the sanitizers of addresses and of undefined behaviour
    python -m tests.quantization.exl3_integration.fuzz_kernels 60 [SEED]

Arguments have many layouts: slices, transposed, expanded, read-only maps of files, no rows at all. One call in two has one argument
that was damaged: in size, number of dimensions, dtype or device. The number of the call is its seed, and is printed where it fails.
"""

import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter

import numpy as np
import torch

from transformers.integrations.exl3 import encoding, format, grouped, ops
from transformers.integrations.exl3.format import hadamard
from transformers.integrations.exl3.kernels import cpu

from .synthetic import random_linear


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ERRORS = (ValueError, TypeError, RuntimeError, IndexError)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}
BYTE_INPUTS = 2e-2  # the same of 16-bit numbers, where one or two rows are rounded to 8 bits


def weight_of(trellis, suh, svh, codebook):
    """The weight `[out, in]` in float64, by the definition of the format."""
    return (
        hadamard(hadamard(format.decode(trellis.contiguous(), codebook).double()).T)
        * suh.double()
        * svh.double()[:, None]
    )


def byte_rounding(x, suh):
    """
    How far 8 bits put rotated rows at most, relative to them: each number by half a step of 1/127 of the largest of its block.
    4.5 % of a block in which one stands out, as in the rotation of a constant.
    """
    suh = suh.double().reshape(-1, suh.shape[-1])[0]
    rotated = hadamard(torch.nn.functional.pad(x.double(), (0, len(suh) - x.shape[-1])) * suh)
    steps = rotated.unflatten(-1, (-1, format.BLOCK)).abs().amax(-1) / 127
    return float((format.BLOCK**0.5 * steps / 2).norm() / rotated.norm().clamp_min(1e-300))


def laid_out(rng, tensor):
    """`tensor` in some other layout."""
    choice = rng.randrange(6)
    if choice == 0 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if choice == 1 and tensor.dim() > 1:
        return torch.cat((tensor, tensor), 1)[:, : tensor.shape[1]]
    if choice == 2 and tensor.dim() > 0:
        return torch.cat((tensor, tensor))[len(tensor) :]
    if choice == 3 and tensor.numel() and tensor.dtype is not torch.bfloat16:
        with tempfile.NamedTemporaryFile() as file:
            file.write(tensor.contiguous().numpy().tobytes())
            file.flush()
            values = np.memmap(file.name, tensor.numpy().dtype, "r", shape=tuple(tensor.shape))
        return torch.from_numpy(values)
    if choice == 4 and tensor.dim() > 2:
        return tensor.movedim(2, 0).contiguous().movedim(0, 2)
    return tensor.clone()


def damaged(rng, value, largest):
    """Something that is no longer what `value` was; if it is expanded, to at most `largest` of a dimension."""
    if isinstance(value, str):
        return rng.choice(("mul2", "", "MUL1", "mcg "))
    if isinstance(value, (int, float)):
        return rng.choice((-1, 0, value + 128, value + 1000, 1 << 40, -(1 << 40)))
    if isinstance(value, list):
        return value[:-1] if rng.random() < 0.5 else [*value, *value[-1:]]
    choice = rng.randrange(9)
    if choice == 0:
        return value.to("meta")
    if choice == 1:
        return value.to(rng.choice((torch.int32, torch.int8, torch.float64, torch.complex64, torch.bool)))
    if choice == 2 or value.dim() == 0:
        return value[None]
    if choice == 3:
        return value[0] if len(value) else value[None]
    dim = rng.randrange(value.dim())
    if choice == 4:
        return value.narrow(dim, 0, rng.randrange(value.shape[dim] + 1))
    if choice == 5:
        return torch.cat([value] * rng.choice((2, 3)), dim)
    if choice == 6 and value.shape[dim]:
        return value.narrow(dim, 0, 1).expand(
            [-1 if i != dim else rng.choice((1, 7, 128, largest)) for i in range(value.dim())]
        )
    if choice == 7:
        return value.transpose(0, -1)
    return value.new_empty(0)


def layer(rng):
    """Sizes, tensors, rate and codebook of some layer."""
    into, out = rng.randrange(1, 300), rng.randrange(1, 300)
    bits, codebook = rng.choice([(b, c) for b in format.BITS for c in format.CODEBOOKS if b == int(b) or c == "mul1"])
    tensors, _ = random_linear(
        out, into, bits, codebook, torch.randn(out) if rng.random() < 0.5 else None, seed=rng.getrandbits(31)
    )
    if rng.random() < 0.3:
        tensors = {name: t.to(rng.choice(DTYPES)) if t.is_floating_point() else t for name, t in tensors.items()}
    return into, out, tensors, bits, codebook


def rows_of(rng, width, most=60):
    return torch.randn(rng.choice((0, 1, 2, 7, most)), width).to(rng.choice(DTYPES))


# For each call: its arguments that fit, the function, and what it is to return of arguments that were accepted.
def linear(rng):
    into, out, t, _, codebook = layer(rng)
    arguments = {
        "x": rows_of(rng, into),
        "trellis": t["trellis"],
        "suh": t["suh"],
        "svh": t["svh"],
        "bias": t.get("bias"),
    }

    def reference(x, trellis, suh, svh, bias, codebook, out_features):
        y = torch.nn.functional.pad(x.double(), (0, len(suh) - x.shape[-1])) @ weight_of(trellis, suh, svh, codebook).T
        y = y[..., :out_features]
        return y if bias is None else y + bias[:out_features].double()

    return arguments | {"codebook": codebook, "out_features": out}, ops.linear, reference


def linear_kernel(rng):
    arguments, _, reference = linear(rng)
    out = arguments.pop("out_features")
    arguments["x"] = arguments["x"][:48]
    arguments["y"] = torch.full((len(arguments["x"]), out), float("nan"), dtype=arguments["x"].dtype)

    def call(x, trellis, suh, svh, bias, codebook, y):
        cpu.kernels().linear([(x, trellis, suh, svh, bias, codebook)], [y])
        return y

    return arguments, call, lambda *args: reference(*args[:-1], args[-1].shape[1])


def input_grad(rng):
    into, out, t, _, codebook = layer(rng)
    arguments = {"grad": rows_of(rng, out), "trellis": t["trellis"], "suh": t["suh"], "svh": t["svh"]}

    def reference(grad, trellis, suh, svh, codebook, in_features):
        weight = weight_of(trellis, suh, svh, codebook)
        return torch.nn.functional.pad(grad.double(), (0, len(svh) - grad.shape[-1])) @ weight[:, :in_features]

    return arguments | {"codebook": codebook, "in_features": into}, ops.linear_input_grad, reference


def grouped_linear(rng):
    into, out, t, _, codebook = layer(rng)
    count = rng.randrange(1, 4)
    ends = [0]
    for _ in range(count):
        ends.append(ends[-1] + rng.choice((0, 1, 5, 60)))
    x = torch.randn(ends[-1] + rng.randrange(3), into).to(rng.choice(DTYPES))
    arguments = {"x": x, "ranges": torch.tensor(ends).unfold(0, 2, 1)} | {
        name: torch.stack([t[name]] * count) for name in ("trellis", "suh", "svh")
    }
    arguments |= {"bias": torch.stack([t["bias"]] * count) if "bias" in t else None, "codebook": codebook}

    def reference(x, ranges, trellis, suh, svh, bias, codebook, out_features):
        y = torch.zeros(len(x), out_features, dtype=torch.float64)
        for group, (start, stop) in enumerate(ranges.tolist()):
            if start < stop:
                weight = weight_of(trellis[group], suh[group], svh[group], codebook)[:out_features, : x.shape[1]]
                y[start:stop] = x[start:stop].double() @ weight.T + (
                    0 if bias is None else bias[group, :out_features].double()
                )
        return y

    return arguments | {"out_features": out}, grouped.grouped_linear, reference


def dequantize(rng):
    _, _, t, _, codebook = layer(rng)
    arguments = {"trellis": t["trellis"], "suh": t["suh"], "svh": t["svh"], "codebook": codebook}
    return arguments, rng.choice((ops.dequantize, cpu.kernels().dequantize)), weight_of


def decode(rng):
    _, _, t, _, codebook = layer(rng)
    arguments = {"trellis": t["trellis"], "codebook": codebook}
    return arguments, cpu.kernels().decode, lambda trellis, codebook: format.decode(trellis, codebook).double()


def rotate(rng):
    width = rng.randrange(1, 300)
    padded = format.padded(width)
    x = rows_of(rng, width)
    cut = rng.randrange(padded - 127, padded + 1)
    scales = {name: torch.randn(padded).to(rng.choice(DTYPES)) for name in ("before", "after")}
    arguments = {"x": x} | {name: scale if rng.random() < 0.7 else None for name, scale in scales.items()}
    arguments["bias"] = torch.randn(cut) if rng.random() < 0.5 else None
    arguments["out"] = torch.empty(len(x), cut, dtype=rng.choice(DTYPES))

    def reference(x, before, after, bias, out):
        y = torch.nn.functional.pad(x.double(), (0, format.padded(x.shape[1]) - x.shape[1]))
        y = hadamard(y if before is None else y * before.double())
        y = (y if after is None else y * after.double())[:, : out.shape[1]]
        return y if bias is None else y + bias[: out.shape[1]].double()

    return arguments, cpu.kernels().rotate, reference


def embedding(rng):
    groups, rows, bits = rng.randrange(1, 4), rng.randrange(1, 9), rng.choice((1, 2, 3, 4, 5, 6, 7, 8))
    trellis = torch.randint(-(1 << 15), 1 << 15, (rows, groups * (1 + 16 * bits))).short()
    trellis.view(rows, groups, -1)[..., 0] = torch.rand(rows, groups).half().view(torch.int16)
    arguments = {
        "ids": torch.randint(0, rows, (rng.randrange(5),)),
        "trellis": trellis,
        "signs": torch.randn(groups, 256).sign().half(),
    }

    def reference(ids, trellis, signs, embedding_dim):
        rings = trellis[ids.long()].unflatten(-1, (len(signs), -1))
        values = format.codebook_values("mul1")[format.unpack_embedding_states(rings[..., 1:])].double()
        scale = rings[..., :1].contiguous().view(torch.float16).double()
        return (signs.double() * hadamard(values * scale, 256)).flatten(-2)[..., :embedding_dim]

    return arguments | {"embedding_dim": 256 * groups - rng.randrange(256)}, ops.embedding, reference


def search(rng):
    bits, codebook = rng.choice([(b, c) for b in format.BITS for c in format.CODEBOOKS if b == int(b) or c == "mul1"])
    arguments = {"tiles": torch.randn(rng.randrange(4), 256), "bits": bits, "codebook": codebook}

    def call(tiles, bits, codebook):
        states = cpu.kernels().search(tiles, bits, codebook)
        return format.unpack_states(format.pack_states(states, bits)).double() - states  # zeros: the states are a ring

    return arguments, call, lambda tiles, bits, codebook: torch.zeros(len(tiles), 256)


def encode(rng):
    bits, codebook = rng.choice([(8, "mul1"), (6, "mcg"), (7, "3inst")])
    weight = torch.randn(rng.randrange(1, 140), rng.randrange(1, 140)).to(rng.choice(DTYPES))

    def call(weight, bits, codebook):
        trellis, suh, svh = encoding.encode(weight, bits, codebook, 0)
        found = ops.dequantize(trellis, suh, svh, codebook)[: weight.shape[0], : weight.shape[1]].double()
        return (found - weight).norm() / weight.double().norm() < 0.1

    return {"weight": weight, "bits": bits, "codebook": codebook}, call, lambda *_: torch.tensor(True)


def encode_embedding(rng):
    weight = torch.randn(rng.randrange(1, 6), rng.randrange(1, 600)).to(rng.choice(DTYPES))

    def call(weight, bits):
        found = ops.embedding(torch.arange(len(weight)), *encoding.encode_embedding(weight, bits, 0), weight.shape[1])
        return (found - weight).norm() / weight.double().norm() < 0.1

    return {"weight": weight, "bits": rng.choice((6, 7, 8))}, call, lambda *_: torch.tensor(True)


CALLS = (
    *(linear, linear_kernel, input_grad, grouped_linear, dequantize, decode, rotate),
    *(embedding, search, encode, encode_embedding),
)


def described(value):
    if isinstance(value, list):
        return [described(item) for item in value]
    return (
        f"{value.dtype} {list(value.shape)} {value.stride()} {value.device}"
        if isinstance(value, torch.Tensor)
        else value
    )


def fuzz(seed: int) -> tuple[str, str]:
    """Make call number `seed`: its name, and `right` or `refused`. Raises `AssertionError` where it is neither."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice((1, 2, 3)))
    os.environ["EXL3_CPU_INPUT_BITS"] = input_bits = rng.choice(("8", "16"))
    make = rng.choice(CALLS)
    arguments, call, reference = make(rng)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in ("y", "out"):
            arguments[name] = laid_out(rng, value)
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            arguments[name] = [laid_out(rng, item) for item in value]
    broken = (
        rng.choice([name for name, value in arguments.items() if value is not None]) if rng.random() < 0.5 else None
    )
    if broken:
        # Any size can be encoded, and 2**33 rows in days.
        arguments[broken] = damaged(rng, arguments[broken], 1 if make in (encode, encode_embedding) else 1 << 33)
    kept = [
        value.clone() if isinstance(value, torch.Tensor) and value.numel() < 1 << 24 else value
        for value in arguments.values()
    ]
    shown = {name: described(value) for name, value in arguments.items()}
    where = f"call {seed}, {make.__name__} with {shown}, damaged: {broken}"
    try:
        result = call(*arguments.values())
    except ERRORS as error:
        assert broken, f"{where}: {type(error).__name__} {error}"
        return make.__name__, "refused"
    if result.is_meta and all(value.is_meta for value in arguments.values() if isinstance(value, torch.Tensor)):
        return make.__name__, "right"  # nothing, of nothing
    try:
        expected = reference(*kept)
    except Exception as error:
        raise AssertionError(f"{where}: accepted, and the reference says {type(error).__name__} {error}") from error
    assert result.device.type == "cpu" and result.shape == expected.shape, (
        f"{where}: {result.device} {list(result.shape)}"
    )
    error = float((result.double() - expected.double()).norm())
    tolerance = TOLERANCES.get(result.dtype, 0)
    if input_bits == "8" and result.dtype in (torch.float16, torch.bfloat16):
        named = dict(zip(arguments, kept))
        bound = byte_rounding(named["x"], named["suh"]) if {"x", "suh"} <= named.keys() else 0
        tolerance = max(BYTE_INPUTS, 1.5 * bound)
    tolerance *= float(expected.double().norm())
    assert error <= tolerance, f"{where}: off by {error}, of {tolerance}"
    return make.__name__, "right"


def main(seconds: float, seed: int = 0):
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    outcomes, end = Counter(), time.monotonic() + seconds
    first = seed
    while time.monotonic() < end:
        outcomes[fuzz(seed)] += 1
        seed += 1
    for make in CALLS:
        print(
            f"{make.__name__:16}{outcomes[make.__name__, 'right']:8} right{outcomes[make.__name__, 'refused']:8} refused"
        )
    print(f"{cpu.kernels().isa()}: calls {first} to {seed - 1}")


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
