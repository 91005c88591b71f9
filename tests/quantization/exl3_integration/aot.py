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
Compiling Triton kernels ahead of time, for GPUs that are not there, and reading what came out.

What is compiled is what would be launched: `launches` runs the code that launches, on tensors without memory, and keeps
kernels and arguments. `compiled` gives the same hints about them as a launch does.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from transformers.integrations.exl3 import format
from transformers.integrations.exl3.kernels.triton import search as triton_search
from transformers.integrations.exl3.kernels.triton.target import Target


# Bytes of shared memory that a block of threads may have: CUDA C++ programming guide, compute capabilities; LDS of a
# workgroup from AMD's instruction set guides.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx1100": 64 * 1024,
}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
}
_PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx1100": 96,
}
_BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def target(arch: str) -> Target:
    return Target("cuda" if arch.startswith("sm_") else "hip", arch, _PROCESSORS[arch])


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict
    warps: int
    extra: dict  # further options of the compiler


def launches(call) -> list[Launch]:
    """The kernels that `call()` would launch. Its tensors should be on the meta device."""
    found = []

    def record(kernel, grid):
        def launch(*arguments, num_warps, **keywords):
            names = [parameter.name for parameter in kernel.params]
            found.append(
                Launch(
                    kernel,
                    dict(zip(names, arguments)) | {name: keywords[name] for name in names if name in keywords},
                    num_warps,
                    {name: value for name, value in keywords.items() if name not in names},
                )
            )

        return launch

    with mock.patch.object(JITFunction, "__getitem__", record):
        call()
    return found


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its intermediate texts by the names of the stages, registers, spilled bytes and shared memory."""

    asm: dict
    registers: int
    spilled: int
    shared: int
    warps: int

    def weight_loads(self) -> set[str]:
        """How many elements of each dimension a thread gets in one go, in all loads of the trellis."""
        text = self.asm["ttgir"]
        layouts = set(re.findall(r"tt\.load .*tensor<32x\d+x\d+x!tt\.ptr<i32>, #(\w+)>", text))
        return {re.search(rf"#{name} = .*sizePerThread = (\[[\d, ]+\])", text)[1] for name in layouts}

    def loop(self) -> Counter:
        """The instructions of NVIDIA's machine code in the loop that has most matrix instructions, by class."""
        return max(self._loops(), key=lambda body: (sum(body[name] for name in body if "MMA" in name), -body.total()))

    def nest(self, products: int, trips: list[int]) -> tuple[Counter, float]:
        """
        The shortest loop with at least `products` multiplications of floating point numbers, and how many instructions all
        its rounds take with those of the loops around it, which make `trips` rounds from the innermost on. The last is for
        one round. Where the compiler has unrolled the innermost it has a multiple of `products`.
        """

        def count(body):
            pairs = body["FFMA2"] + body["FMUL2"]
            return body["FFMA"] + body["FMUL"] + 2 * pairs

        around = sorted((body for body in self._loops() if count(body) >= products), key=Counter.total)
        total, unrolled = around[0].total(), count(around[0]) // products
        for rounds, inner, outer in zip(trips, around, around[1:]):
            total = total * rounds / unrolled + outer.total() - inner.total()
            unrolled = 1
        return around[0], total

    def _loops(self) -> list[Counter]:
        """The instructions of NVIDIA's machine code in each loop, by class, with those of the loops inside."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _cuobjdump(self.asm["cubin"], "-sass"))
        code = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text.strip())) for address, text in lines]
        bodies = []
        for address, text in code:
            jump = re.match(r"BRA\b.*?(0x[0-9a-f]+)", text)
            if jump and (start := int(jump[1], 16)) < address:
                bodies.append(Counter(_class(text) for at, text in code if start <= at <= address))
        return bodies


def compiled(launch: Launch, arch: str) -> Compiled:
    """Compile `launch` for `arch`."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialized and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            is_divisible = not parameter.do_not_specialize_on_alignment
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
            is_divisible = specialized and value % 16 == 0
        if is_divisible:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    if arch.startswith("sm_"):
        gpu = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    kernel = triton.compile(source, target=gpu, options={"num_warps": launch.warps, **launch.extra})
    read = _nvidia if arch.startswith("sm_") else _amd
    return Compiled(dict(kernel.asm), *read(kernel.asm), kernel.metadata.shared, launch.warps)


def search_launch(arch: str, bits: float, dtype: torch.dtype) -> Launch:
    """The trellis search of a large matrix, with costs of fp32 or, for `torch.int16`, with integer ones."""
    tiles, values = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((1 << 16, 256), format.NUM_STATES))
    return launches(lambda: triton_search.kernel(tiles, values, None, bits, 48, target(arch)))[0]


def search_instructions(launch: Launch, kernel: Compiled) -> tuple[Counter, float]:
    """The inner loop of a search at a whole rate, by class, and instructions a state of a step as a whole."""
    options = launch.arguments
    bits, tiles, threads = (options[name] for name in ("EVEN", "TILES", "THREADS"))
    ahead, outputs = min(triton_search._AHEAD.value, 1 << bits), 1 << options["EVEN_OUTPUT_BITS"]
    parts = format.NUM_STATES >> bits
    trips = [trip for trip in ((1 << bits) // ahead, parts // (threads * outputs)) if trip > 1]
    inner, total = kernel.nest(tiles * outputs * ahead, trips)
    return inner, total * threads / (tiles * format.NUM_STATES)


def _nvidia(asm):
    usage = _cuobjdump(asm["cubin"], "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd(asm):
    found = {
        name: int(re.search(rf"{name}:?\s+(\d+)", asm["amdgcn"])[1])
        for name in ("private_segment_fixed_size", "NumVgprs")
    }
    return found["NumVgprs"], found["private_segment_fixed_size"]


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [os.path.join(_BINARIES, "cuobjdump"), option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _class(instruction: str) -> str:
    name = instruction.split()[0]
    return ".".join(name.split(".")[:2]) if name.startswith(("IMAD.MOV", "IMAD.SHL")) else name.split(".")[0]
