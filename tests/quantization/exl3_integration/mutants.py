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
Damaged checkpoints: a seeded generator of them, and a process that loads them and tells what came of it.

What is damaged is the structure: names, dtypes, shapes, offsets, lengths, JSON, sizes, markers, and values that the format does not
have (scales that are not finite). Left alone is what nothing in a checkpoint can tell from the right thing: codes, finite numbers,
tensors that another layer could have, a codebook that is another one without its marker, sizes that are padded to the same one, what
config.json says beside sizes, and whether it says that the model is quantized and by which method, which Transformers asks first.
"""

import json
import os
import random
import resource
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers import AutoModelForCausalLM, Exl3Config, LlamaForCausalLM, logging
from transformers.integrations.exl3 import format
from transformers.integrations.exl3.saving import tensor_storage

from .processes import copies
from .synthetic import SyntheticCheckpoint
from .tiny_models import MODELS, tiny_model


LAYOUTS = ("dense", "sharded", "experts", "split", "sliced", "embedding")
INDEX = "model.safetensors.index.json"
BESIDE = "quantization_config.json"  # is written for other programs, and never read
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL"}
DTYPES |= {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.uint16: "U16", torch.int32: "I32"}
DTYPES |= {torch.int64: "I64"}

# Fields of config.json that shapes depend on. The others are believed, whatever they say.
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads", "num_experts", "moe_intermediate_size", "model_type", "architectures")
SIZES += ("quantization_config",)
ABSURD = (-1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), None, True)
ABSURD += ("", "128", "\ud800", "\0", "é" * 1000, [], [128], {}, {"a": 1})

MEMORY = 2 << 30  # bytes beyond what the process has when it starts
PATIENCE = 60  # seconds for one mutant


def _layout(name: str) -> SyntheticCheckpoint:
    """A valid checkpoint of this layout."""
    if name == "experts":
        checkpoint = SyntheticCheckpoint(tiny_model("qwen3_moe")[0])
        checkpoint.quantize_all("layers.0")
    elif name == "split":
        checkpoint = SyntheticCheckpoint(tiny_model("phi3")[0])
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        sizes = {f"{attention}.{part}_proj": size for part, size in zip("qkv", (128, 64, 64))}
        checkpoint.quantize(f"{attention}.qkv_proj", sizes, bits=3)
        checkpoint.quantize(f"{mlp}.gate_up_proj", {f"{mlp}.gate_proj": 100, f"{mlp}.up_proj": 100}, bits=2)
    elif name == "sliced":
        config = type(MODELS["llama_tied"][1])(**MODELS["llama_tied"][1].to_dict() | {"intermediate_size": 192})
        torch.manual_seed(0)
        checkpoint = SyntheticCheckpoint(LlamaForCausalLM(config).eval())
        mlp = "model.layers.0.mlp"
        for projection, sign in (("gate_proj", 1), ("up_proj", 1), ("down_proj", -1)):
            parts = {f"{mlp}.{projection}.slice.{index}": sign * size for index, size in enumerate((128, 64))}
            checkpoint.quantize(f"{mlp}.{projection}", parts)
    elif name == "embedding":
        checkpoint = SyntheticCheckpoint(tiny_model("gemma3_text")[0])
        trellis = torch.randint(-(1 << 15), 1 << 15, (100, 65), generator=torch.Generator().manual_seed(0)).short()
        trellis[:, 0] = torch.full((100,), 0.1).half().view(torch.int16)
        del checkpoint.tensors["model.embed_tokens.weight"]
        checkpoint.tensors |= {
            "model.embed_tokens.trellis": trellis,
            "model.embed_tokens.signs": torch.ones(1, 256).half(),
        }
        checkpoint.tensors["lm_head.weight"] = torch.randn(100, 128, generator=torch.Generator().manual_seed(1))
        checkpoint.quantize("lm_head")
        checkpoint.config["tie_word_embeddings"] = False
    else:
        checkpoint = SyntheticCheckpoint(tiny_model("qwen2")[0])  # which has biases
        checkpoint.quantize("model.layers.0.self_attn.q_proj", codebook="mcg", bits=3)
        checkpoint.quantize("model.layers.0.self_attn.k_proj", codebook="3inst", signs=("su",))
        checkpoint.quantize_all("layers.0")
        checkpoint.quantize("lm_head", bits=6)
    return checkpoint


@dataclass
class Files:
    """The files of a checkpoint, taken apart: JSON files, and of safetensors files the tensors."""

    json: dict[str, dict]
    tensors: dict[str, dict[str, torch.Tensor]]

    @staticmethod
    def of(layout: str) -> "Files":
        checkpoint = _layout(layout)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors, shards=3 if layout == "sharded" else 1)
            parts = {path.name: path for path in Path(folder).iterdir()}
            parsed = {
                name: json.loads(path.read_text("utf-8")) for name, path in parts.items() if path.suffix == ".json"
            }
            weights = sorted(str(path) for path in parts.values() if path.suffix == ".safetensors")
            parsed[BESIDE] = parsed["config.json"]["quantization_config"] | {"tensor_storage": tensor_storage(weights)}
        weight_map = parsed.get(INDEX, {}).get("weight_map") or dict.fromkeys(checkpoint.tensors, "model.safetensors")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, file in weight_map.items():
            tensors.setdefault(file, {})[name] = checkpoint.tensors[name].contiguous()
        return Files(parsed, tensors)

    def copy(self) -> "Files":
        return Files(
            json.loads(json.dumps(self.json)), {file: dict(tensors) for file, tensors in self.tensors.items()}
        )

    def packed(self) -> dict[str, bytes]:
        packed = {name: json.dumps(content, indent=2).encode() for name, content in self.json.items()}
        return packed | {file: join(*header_and_data(tensors)) for file, tensors in self.tensors.items()}


def header_and_data(tensors: dict[str, torch.Tensor]) -> tuple[dict, bytes]:
    header, data = {}, b""
    for name, tensor in tensors.items():
        start = len(data)
        data += tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [start, len(data)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
    return header, data


def join(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file, whose header may say another length than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) if isinstance(header, dict) else b""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


def _any_tensor(rng, files, match=lambda name, tensor: True):
    """File, name and value of a tensor for which `match(name, tensor)`, None where there is none."""
    found = [
        (f, n, t) for f, tensors in sorted(files.tensors.items()) for n, t in sorted(tensors.items()) if match(n, t)
    ]
    return rng.choice(found) if found else None


def _leaf(name):
    return name.rpartition(".")[2]


def _is_quantized(name, tensor):
    return _leaf(name) in ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "signs")


# Mutations of tensors change `files`; those of bytes return changed files by name.
@kind
def drop(rng, files):
    file, name, _ = _any_tensor(rng, files, lambda name, _: _leaf(name) not in ("mcg", "mul1"))
    del files.tensors[file][name]


@kind
def drop_module(rng, files):
    _, name, _ = _any_tensor(rng, files)
    module = name.rpartition(".")[0]
    for tensors in files.tensors.values():
        for name in [name for name in tensors if name.rpartition(".")[0] == module]:
            del tensors[name]


@kind
def rename(rng, files):
    file, name, tensor = _any_tensor(rng, files, lambda name, _: _leaf(name) not in ("mcg", "mul1"))
    position = rng.randrange(len(name))
    others = [
        name[:position] + rng.choice("abc.é0 \0\U0001f600") + name[position + 1 :],
        name + "x",
        name[1:],
        "",
        name.upper(),
    ]
    others += [name.replace("layers.0", "layers.7"), name.rpartition(".")[0] + ".scale", "a." * 2000 + name]
    del files.tensors[file][name]
    files.tensors[file][rng.choice(sorted({other for other in others if other != name}))] = tensor


@kind
def duplicate(rng, files):
    file, name, tensor = _any_tensor(rng, files)
    others = [
        f"{name.rpartition('.')[0]}.{leaf}"
        for leaf in ("weight", "trellis", "suh", "su", "sv", "signs", "scale", "mul1", "mcg")
    ]
    target = rng.choice(sorted(files.tensors) + ["model-00009-of-00009.safetensors"])
    if target == file or target not in files.tensors:
        name = rng.choice([other for other in others if other != name])
        if _leaf(name) in ("mul1", "mcg") and f"{name.rpartition('.')[0]}.trellis" not in files.tensors[file]:
            name += "x"
        target = file
    if target != file or name not in files.tensors[file]:
        files.tensors[target][name] = tensor


@kind
def truncate(rng, files):
    file, name, tensor = _any_tensor(rng, files, lambda _, tensor: tensor.dim() > 0)
    dim = rng.randrange(tensor.dim())
    _put(files, file, name, tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim])))


def _put(files, file, name, tensor):
    """Put a tensor of another shape in a place, but for what might stand there: another rate, or the padding of converters."""
    before = files.tensors[file][name]
    rates = [tensor.shape[-1] // 16, (tensor.shape[-1] - 1) // 16]
    is_trellis = (
        _leaf(name) == "trellis" and tensor.shape[:-1] == before.shape[:-1] and not {*rates}.isdisjoint(format.BITS)
    )
    if not is_trellis and list(tensor.shape) != [format.padded(size) for size in before.shape]:
        files.tensors[file][name] = tensor


@kind
def lengthen(rng, files):
    file, name, tensor = _any_tensor(rng, files, lambda _, tensor: tensor.dim() > 0)
    dim = rng.randrange(tensor.dim())
    copies = torch.cat([tensor] * rng.choice((2, 3)), dim)
    size = rng.choice((tensor.shape[dim] + 1, tensor.shape[dim] + 16, copies.shape[dim]))
    _put(files, file, name, copies.narrow(dim, 0, min(size, copies.shape[dim])))


@kind
def swap(rng, files):
    def form(name, tensor):
        shape = tensor.shape[:-1] if _leaf(name) == "trellis" else tensor.shape
        return tensor.is_floating_point(), shape

    file, name, tensor = _any_tensor(rng, files, lambda name, _: _leaf(name) not in format.MARKERS)
    other = _any_tensor(rng, files, lambda n, t: form(n, t) != form(name, tensor) and _leaf(n) not in format.MARKERS)
    files.tensors[file][name], files.tensors[other[0]][other[1]] = other[2], tensor


@kind
def retype_quantized(rng, files):
    file, name, tensor = _any_tensor(rng, files, _is_quantized)
    same = {tensor.dtype} | ({torch.int16, torch.uint16} if tensor.dtype is torch.int16 else set())
    dtypes = [dtype for dtype in DTYPES if dtype not in same]
    files.tensors[file][name] = tensor.to(rng.choice(dtypes))


@kind
def retype_plain(rng, files):
    file, name, tensor = _any_tensor(rng, files, lambda name, tensor: not _is_quantized(name, tensor))
    dtype = rng.choice((torch.float64, torch.int8, torch.int32, torch.int64))  # exact, or no weights at all
    files.tensors[file][name] = tensor.view(torch.int32) if dtype is torch.int32 else tensor.to(dtype)


@kind
def reshape(rng, files):
    file, name, tensor = _any_tensor(rng, files, lambda _, t: t.dim() > 0 and _leaf(_) not in ("mcg", "mul1"))
    shapes = [tensor.shape[::-1], (tensor.numel(),), (1, *tensor.shape), (*tensor.shape, 1), (tensor.numel(), 1, 1)]
    if tensor.dim() > 1 and tensor.shape[-1] % 2 == 0:
        shapes += [
            (2 * tensor.shape[0], *tensor.shape[1:-1], tensor.shape[-1] // 2),
            (*tensor.shape[:-1], 2, tensor.shape[-1] // 2),
        ]
    shapes = [shape for shape in shapes if tuple(shape) != tuple(tensor.shape)]
    if shapes:
        files.tensors[file][name] = tensor.reshape(rng.choice(shapes))


@kind
def scale_not_finite(rng, files):
    file, name, tensor = _any_tensor(
        rng, files, lambda name, t: _leaf(name) in ("suh", "svh", "signs", "bias") or "embed_tokens.tr" in name
    )
    if _leaf(name) == "bias" and f"{name[:-4]}trellis" not in {
        n for tensors in files.tensors.values() for n in tensors
    }:
        return
    value = torch.tensor(rng.choice((float("nan"), float("inf"), float("-inf"))))
    tensor = files.tensors[file][name] = tensor.clone()
    if _leaf(name) == "trellis":
        tensor[rng.randrange(100), 0] = value.half().view(torch.int16)
    else:
        tensor.view(-1)[rng.randrange(tensor.numel())] = value


@kind
def marker_bits(rng, files):
    found = _any_tensor(rng, files, lambda name, _: _leaf(name) in format.MARKERS)
    files.tensors[found[0]][found[1]] = found[2] ^ torch.tensor(1 << rng.randrange(31), dtype=torch.int32)


def _weights(rng, files):
    """The name of a safetensors file, its header and its data."""
    file = rng.choice(sorted(files.tensors))
    return file, *header_and_data(files.tensors[file])


@kind
def header_bits(rng, files):
    file, header, data = _weights(rng, files)
    text = bytearray(json.dumps(header).encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    return {file: join(bytes(text), data)}


@kind
def header_length(rng, files):
    file, header, data = _weights(rng, files)
    true = len(join(header, b"")) - 8
    lengths = (
        0,
        1,
        2,
        7,
        true - 1,
        true + 1,
        true + 8,
        2 * true,
        len(data),
        len(data) + true,
        100_000_000,
        100_000_001,
    )
    lengths += (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, rng.getrandbits(64), rng.getrandbits(16))
    return {file: join(header, data, rng.choice(lengths))}


@kind
def header_entry(rng, files):
    file, header, data = _weights(rng, files)
    name = rng.choice(sorted(header))
    entry, before = header[name], list(header[name]["data_offsets"])
    field = rng.choice(("dtype", "shape", "data_offsets", "data_offsets"))
    if field == "dtype":
        dtypes = {"F7", "", "f16", "I4", "U64", "F64", "F8_E4M3", "C64", "BOOL", None, 16, "\u0000", "I16" * 999}
        entry[field] = rng.choice(sorted(dtypes, key=str))
    elif field == "shape":
        shape = list(entry["shape"]) or [1]
        shape[rng.randrange(len(shape))] = rng.choice(ABSURD)
        entry[field] = rng.choice((shape, shape, "128", None, [[128]], [1] * 5000, [0, 2**63], [2**32, 2**32], {}))
    else:
        end = len(data)
        some = rng.randrange(end)
        choices = [
            [0, before[1] - before[0]],
            [some, some + before[1] - before[0]],
            [before[0] - 1, before[1] - 1],
            before[::-1],
        ]
        choices += [
            [end, end + before[1] - before[0]],
            [2**63, 2**63 + 8],
            [-8, before[1]],
            [0],
            [0, 1, 2],
            None,
            [None, None],
        ]
        choices += [[before[0], before[1] + 1], [0.0, 8.0], ["0", "8"], [before[0], 10**30], [before[0], before[0]]]
        entry[field] = rng.choice([choice for choice in choices if choice != before])
    if rng.random() < 0.1:
        del entry[rng.choice(sorted(entry))]
    return {file: join(header, data)}


@kind
def header_json(rng, files):
    file, header, data = _weights(rng, files)
    text = json.dumps(header)
    name = rng.choice(sorted(header))
    entry = json.dumps({name: header[name] | {"shape": [1, 2, 3]}})[1:-1]
    texts = [
        f"{text[:-1]}, {entry}}}".encode(),
        f"{{{entry}, {text[1:]}".encode(),
        text.encode()[: rng.randrange(len(text))],
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace(name, "\\ud800" + name).encode(),
        text.encode().replace(b"model", b"mod\xffl", 1),
        ('{"a":' + "[" * 5000 + "]" * 5000 + "," + text[1:]).encode(),
        ('{"__metadata__":{"format":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}," + text[1:]).encode(),
        (
            '{"__metadata__":' + rng.choice(("1", "null", '{"format":1}', '{"format":"tf"}', "[]")) + "," + text[1:]
        ).encode(),
        b"[]",
        b"null",
        b"{}",
        b"",
        text.encode() * 2,
        text.replace('"F16"', "NaN").encode(),
    ]
    return {file: join(rng.choice(texts), data)}


@kind
def file_bytes(rng, files):
    file = rng.choice(sorted(files.tensors))
    content = files.packed()[file]
    place = rng.randrange(len(content))
    contents = [
        b"",
        content[:place],
        content[: place % 1000],
        content + b"\0",
        content + content,
        content[1:],
        b"\0" * len(content),
    ]
    contents += [
        b"<!DOCTYPE html>" * 100,
        b"version https://git-lfs.github.com/spec/v1\n",
        rng.randbytes(1000),
        content[:-1],
        content[::-1],
    ]
    return {file: rng.choice((*contents, None))}  # None: a folder stands there


def _damaged_json(rng, content) -> bytes:
    """The JSON text of `content`, no longer JSON or no longer what it was as a whole."""
    text = json.dumps(content, indent=2)
    place = rng.randrange(len(text))
    deep = "[" * 100_000 + "]" * 100_000
    texts = [
        text[:place].encode(),
        b"",
        b"\0" * 64,
        rng.randbytes(200),
        text.encode("utf-16"),
        text.encode("utf-32-be"),
        b"null",
    ]
    texts += [
        b"[]",
        b"{}",
        b"1e999",
        b'"a"',
        text.encode()[:place] + b"\xff\xfe" + text.encode()[place:],
        text.encode() * 2,
        deep.encode(),
    ]
    texts += [
        ('{"a":' + deep + "," + text[1:]).encode(),
        b"9" * 5000,
        text.replace('"', "'").encode(),
        text.replace(":", "=").encode(),
    ]
    return rng.choice(texts)


@kind
def config_text(rng, files):
    return {"config.json": _damaged_json(rng, files.json["config.json"])}


@kind
def config_size(rng, files):
    config = files.json["config.json"]
    name = rng.choice([name for name in SIZES if name in config])
    number = config[name] if isinstance(config[name], int) else 0
    values = [value for value in ABSURD if not isinstance(value, int) or not 0 < value <= 128 or value is True]
    if name == "quantization_config":
        values = [value for value in values if value]
    elif name in ("num_hidden_layers", "num_experts"):
        values += [number + 1, number - 1]
    elif name in ("model_type", "architectures"):
        values += ["gpt2", "bert", ["GPT2LMHeadModel"], ["LlamaForCausalLM", 3]]
    else:
        values += [128 * number]
    if name == "num_hidden_layers":  # upstream builds as many before anything else looks at them
        values = [value for value in values if not isinstance(value, (int, float)) or value != value or value < 64]
    config[name] = rng.choice([value for value in values if value != number])


@kind
def quantization_field(rng, files):
    config = files.json["config.json"]["quantization_config"]
    name = rng.choice(
        (
            *sorted({*config} - {"quant_method"}),
            "codebook",
            "modules_to_not_convert",
            "dequantize",
            "effort",
            "\ud800",
            "self",
            "cls",
            "kwargs",
        )
    )
    config[name] = rng.choice((*ABSURD, "gptq", "fast", ["q_proj"], {"rows": -1}, -1e308))
    if rng.random() < 0.1:
        del config[name]


@kind
def index_text(rng, files):
    return {INDEX: _damaged_json(rng, files.json[INDEX])}


@kind
def index_entry(rng, files):
    index = files.json[INDEX]
    weights = index["weight_map"]
    name, shards = rng.choice(sorted(weights)), sorted(files.tensors)
    action = rng.randrange(8)
    if action == 0:
        weights[name] = rng.choice(
            ("missing.safetensors", "../model.safetensors", "/etc/passwd", "", ".", "config.json", "a\0b", "\ud800")
        )
    elif action == 1:
        weights[name] = rng.choice(ABSURD)
    elif action == 2:
        weights[name] = rng.choice(shards)
    elif action == 3:
        gone = rng.choice(shards)
        index["weight_map"] = {name: file for name, file in weights.items() if file != gone}
    elif action == 4:
        index["weight_map"] = dict.fromkeys(weights, rng.choice(shards))
    elif action == 5:
        index[rng.choice(("weight_map", "metadata"))] = rng.choice(ABSURD)
    elif action == 6:
        del index[rng.choice(("weight_map", "metadata"))]
    else:
        weights["another.weight"] = rng.choice(shards)


@kind
def file_beside(rng, files):
    return {BESIDE: _damaged_json(rng, files.json[BESIDE])}


class Mutants:
    """Mutants of valid checkpoints by their number: the same number, the same bytes."""

    def __init__(self):
        self.valid = {layout: Files.of(layout) for layout in LAYOUTS}

    def write(self, seed: int, folder: Path) -> tuple[str, str]:
        """Write mutant `seed` to the empty `folder`; returns its layout and its kind."""
        kinds = sorted(KINDS)
        name, rng = kinds[seed % len(kinds)], random.Random(seed)
        while True:
            layout = "sharded" if name.startswith("index") else rng.choice(LAYOUTS)
            files = self.valid[layout].copy()
            before = files.packed()
            changed = KINDS[name](rng, files) or {}
            after = files.packed() | changed
            if after != before:
                break
        for file, content in after.items():
            if content is None:
                Path(folder, file).mkdir()
            else:
                Path(folder, file).write_bytes(content)
        return layout, name


def is_ours(frame) -> bool:
    """Whether a frame of a traceback is code of this repository."""
    file = frame.f_code.co_filename.replace(os.sep, "/")
    return (
        "/integrations/exl3/" in file
        or file.endswith("/quantizer_exl3.py")
        or frame.f_code.co_qualname.startswith("Exl3")
    )


@torch.no_grad()
def outputs(folder, dequantize: bool) -> torch.Tensor:
    kwargs = {"quantization_config": Exl3Config(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    return model(ids).logits


def describe(error: BaseException) -> dict:
    return {
        "error": type(error).__name__,
        "bases": [base.__name__ for base in type(error).__mro__],
        "message": str(error),
        "ours": any(is_ours(frame) for frame, _ in traceback.walk_tb(error.__traceback__)),
    }


def serve(connection, memory=MEMORY):
    """Load the mutants whose numbers come through `connection`, and send back what came of each."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Memory that nobody wrote to holds NaN.
    torch.use_deterministic_algorithms(True)
    mutants = Mutants()
    expected = {}
    for layout, files in mutants.valid.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.packed().items():
                Path(folder, file).write_bytes(content)
            for dequantize in (False, True):
                expected[layout, dequantize] = outputs(folder, dequantize)
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        dequantize = seed % 4 == 3
        with tempfile.TemporaryDirectory() as folder:
            layout, name = mutants.write(seed, Path(folder))
            result = {"seed": seed, "layout": layout, "kind": name, "dequantize": dequantize}
            try:
                same = torch.equal(outputs(folder, dequantize), expected[layout, dequantize])
                result |= {"outcome": "same outputs" if same else "OTHER OUTPUTS"}
            except Exception as error:
                result |= {"outcome": "error", **describe(error)}
        connection.send(result)


class Loader:
    """A process that loads mutants. What it dies of, and what takes it too long, is an outcome as well."""

    def __enter__(self):
        context = copies()
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.is_ready = False
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self.connection.close()

    def load(self, seed: int) -> dict:
        try:
            if not self.is_ready:
                self.connection.recv()
                self.is_ready = True
            self.connection.send(seed)
            if self.connection.poll(PATIENCE):
                return self.connection.recv()
            outcome = "HANG"
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = f"CRASH {self.process.exitcode}"
        self.__exit__()
        self.__enter__()
        return {"seed": seed, "kind": sorted(KINDS)[seed % len(KINDS)], "outcome": outcome}
