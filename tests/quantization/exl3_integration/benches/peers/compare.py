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
EXL3 beside other methods that run on CPUs: error, speed, time, memory and size.

    pip install -r tests/quantization/exl3_integration/benches/peers/requirements.txt
    python tests/quantization/exl3_integration/benches/peers/compare.py --out build/peers

All quantize the linear layers of the decoder and leave embeddings and head in bfloat16. Those of `from_pretrained(...,
quantization_config=...)` go through it; HQQ, GGUF's kinds (llama.cpp runs them), GPTQ and AWQ, which alone need data, through
packages of their own. Each method runs in a process of its own. Speeds are medians of turns that alternate with the bf16 model in
that process; `--turns` times several methods in turns in one process. A later call with other methods adds to the results in the
folder, if machine and versions are the same.

What is measured, of the models of `models.py`:

- `bits`: bits per quantized weight, of all tensors that the quantized layers keep, scales, zero points and biases included
  (of GGUF, GPTQ and AWQ in their files); `disk_mb` has embeddings and head too.
- `error`: the RMS of the error of all quantized weights over the RMS of these weights.
- `perplexity`, `divergence` (KL, nats a token, from the model in float32), `agreement` (the share of tokens whose most likely
  successor is the float32 model's); `similarity`: mean cosine of sentence embeddings with the float32 model's.
- `quantize_s`, `load_s` (of what was saved), `peak_mib` (resident memory while quantizing), `disk_mb`.
- `tokens_s`, `tokens_s_8`, `prefill_s`: tokens a second generating one and eight texts, and reading one of 512 tokens; and their
  ratios to bf16.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Exl3Config, logging
from transformers.integrations.exl3 import encoding
from transformers.integrations.exl3.kernels import cpu


sys.path.insert(0, str(Path(__file__).parent))

import gguf_peer  # noqa: E402
import gptqmodel_peer  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402


PROMPT, NEW_TOKENS, PREFILL = 16, 16, 512
TURNS = 3  # after one to warm up
PATIENCE = 60  # seconds after which no more turns begin
CHUNK = 64  # positions whose probabilities, over the whole vocabulary, are held at a time


def plain(auto, folder):
    return auto.from_pretrained(folder, dtype=torch.bfloat16)


def configured(make):
    """Quantizing with the config that `make` makes."""
    return lambda auto, folder: auto.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=make())


def _exl3(bits, head_bits=None):
    return Exl3Config(bits=bits, head_bits=head_bits)


def _exl3_with_data(bits, is_own):
    """Of text before that which is measured on, or that the model writes itself."""

    def load(auto, folder):
        dataset = "self" if is_own else [window[0].tolist() for window in models.calibration(folder)]
        config = Exl3Config(bits=bits, dataset=dataset)
        return auto.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)

    return load


def _bitsandbytes(**options):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4", **options)


def _quanto(weights):
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


def _torchao(bits):
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=128))


def hqq(bits):
    """By its own package: Transformers does not quantize with it on the fly."""

    def load(auto, folder):
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model = plain(auto, folder)
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        for name in linears(model):
            layer = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.bfloat16, device="cpu")
            model.set_submodule(name, layer)
        return model

    return load


def gguf(kind):
    def load(auto, folder):
        model = plain(auto, folder)
        return gguf_peer.LlamaCpp(model, linears(model), kind, PREFILL)

    return load


def calibrated(method, bits):
    def load(auto, folder):
        return gptqmodel_peer.quantize(folder, linears(plain(auto, folder)), method, bits, models.calibration(folder))

    return load


METHODS: dict[str, Callable] = {
    "bf16": plain,
    **{f"EXL3 {bits:g}": configured(functools.partial(_exl3, bits)) for bits in (2, 2.5, 3, 3.5, 4, 5, 6)},
    "EXL3 4, head 6": configured(functools.partial(_exl3, 4, 6)),
    **{f"EXL3 {bits}, own text": _exl3_with_data(bits, True) for bits in (2, 3, 4)},
    **{f"EXL3 {bits}, data": _exl3_with_data(bits, False) for bits in (2, 3, 4)},
    "bitsandbytes nf4": configured(lambda: _bitsandbytes(load_in_4bit=True)),
    "bitsandbytes nf4, double": configured(lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True)),
    "bitsandbytes int8": configured(lambda: _bitsandbytes(load_in_8bit=True)),
    **{f"HQQ {bits}": hqq(bits) for bits in (2, 3, 4)},
    **{f"quanto {weights}": configured(functools.partial(_quanto, weights)) for weights in ("int4", "int8")},
    **{f"torchao int{bits}": configured(functools.partial(_torchao, bits)) for bits in (4, 8)},
    **{f"GGUF {kind}": gguf(kind) for kind in gguf_peer.KINDS},
    **{f"GPTQ {bits}": calibrated("GPTQ", bits) for bits in (2, 3, 4)},
    "AWQ 4": calibrated("AWQ", 4),
}
SPEEDS_LIKE_OTHERS = (
    *(f"EXL3 {bits}, {data}" for bits in (2, 3, 4) for data in ("own text", "data")),
    *("EXL3 2.5", "EXL3 3.5", "EXL3 5", "HQQ 2", "HQQ 3", "bitsandbytes nf4, double"),
    *("GGUF IQ3_S", "GGUF Q5_K", "GGUF Q6_K", "GPTQ 2", "GPTQ 3", "GPTQ 4", "AWQ 4"),
)
STATES = ("bitsandbytes", "hqq", "optimum", "torchao")  # packages whose objects in a layer hold tensors
PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "hqq", "optimum-quanto", "torchao"),
    *("libgguf", "llama-cpp-python", "gptqmodel"),
)


def tensors_of(*roots) -> list[torch.Tensor]:
    """The plain tensors that layers keep: parameters, buffers, and what subclasses of tensors and states of packages hold."""
    left, met, found = list(roots), set(), {}
    while left:
        thing = left.pop()
        if id(thing) in met:
            continue
        met.add(id(thing))
        if isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, (list, tuple)):
            left += thing
        elif isinstance(thing, torch.nn.Module) or type(thing).__module__.partition(".")[0] in STATES:
            left += getattr(thing, "__dict__", {}).values()
        if isinstance(thing, torch.Tensor):
            left += thing.__dict__.values()
            if hasattr(thing, "__tensor_flatten__") and type(thing) is not torch.nn.Parameter:
                left += [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
            elif thing.numel() and not thing.is_meta:
                found[thing.data_ptr()] = thing
    return list(found.values())


def nbytes(thing) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(thing))


def auto_class(name: str):
    return AutoModel if name == "minilm" else AutoModelForCausalLM


def linears(reference) -> list[str]:
    """The layers that all methods quantize: the linear ones without the head."""
    head = reference.get_output_embeddings()
    return [
        name for name, module in reference.named_modules() if type(module) is torch.nn.Linear and module is not head
    ]


def load(name: str, method: str, folder: Path):
    # A model of random weights only has to have some code.
    any_code = mock.patch.object(encoding, "search_on", lambda device: lambda tiles, *_: tiles.int() & 0xFFFF)
    with any_code if name == "llama" else contextlib.nullcontext():
        return METHODS[method](auto_class(name), folder).eval()


def measure(name: str, method: str, work: Path) -> dict:
    """One row of the table."""
    folder = models.checkpoint(name, work)
    row = {"model": name, "method": method}
    before = peak_memory()
    start = time.perf_counter()
    model = load(name, method, folder)
    if name != "llama" or not method.startswith("EXL3"):
        row["quantize_s"] = time.perf_counter() - start
    row["peak_mib"] = (peak_memory() - before) / 2**20
    if method == "bf16" or hasattr(model, "hf_quantizer"):
        row |= stored(name, model)
    facts = getattr(model, "facts", {})  # what its maker knows better
    if name == "llama":
        own, bf16 = speeds([model, load(name, "bf16", folder)])
        row |= own | {f"{measure}_over_bf16": own[measure] / bf16[measure] for measure in own}
    else:
        reference = auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()
        row |= errors(model, reference)
        row |= similarity(model, reference, folder) if name == "minilm" else predictions(model, reference, folder)
    return row | facts


def peak_memory() -> int:
    """The most memory in bytes that was resident in this process, pages of mapped files included."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1])


def stored(name, model) -> dict:
    """Size on disk and the time to load what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            start = time.perf_counter()
            auto_class(name).from_pretrained(folder, dtype=torch.bfloat16)
        except Exception as error:
            return {"not_saved": f"{type(error).__name__}: {str(error)[:200]}"}
        return {"disk_mb": size / 1e6, "load_s": time.perf_counter() - start}


@torch.inference_mode()
def errors(model, reference) -> dict:
    """Bits and weight error of the quantized layers, by multiplying the identity."""
    size = weights = 0
    error = energy = torch.zeros(())
    for name in linears(reference):
        layer, plain = model.get_submodule(name), reference.get_submodule(name)
        identity = torch.eye(plain.in_features, dtype=torch.bfloat16)
        found = (layer(identity).float() - (0 if plain.bias is None else plain.bias)).T
        error = error + (found - plain.weight).square().sum()
        energy = energy + plain.weight.square().sum()
        size += nbytes(layer)
        weights += plain.weight.numel()
    return {"error": float((error / energy).sqrt()), "bits": 8 * size / weights}


@torch.inference_mode()
def predictions(model, reference, folder) -> dict:
    count, loss, divergence, agreement = 0, 0.0, 0.0, 0
    for ids in models.windows(folder):
        targets = ids[0, 1:]
        logits = [candidate(ids).logits[0, :-1] for candidate in (reference, model)]
        for chunk in torch.arange(len(targets)).split(CHUNK):
            expected, found = (values[chunk].float().log_softmax(-1) for values in logits)
            loss -= float(found.gather(1, targets[chunk, None]).sum())
            divergence += float((expected.exp() * (expected - found)).sum())
            agreement += int((expected.argmax(1) == found.argmax(1)).sum())
        count += len(targets)
    perplexity = float(torch.tensor(loss / count).exp())
    return {"perplexity": perplexity, "divergence": divergence / count, "agreement": agreement / count}


@torch.inference_mode()
def similarity(model, reference, folder) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cosines = []
    for text in models.sentences():
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        means = [candidate(**inputs).last_hidden_state.float().mean(1) for candidate in (reference, model)]
        cosines.append(float(torch.nn.functional.cosine_similarity(*means)))
    return {"similarity": statistics.mean(cosines), "least_similarity": min(cosines)}


@torch.inference_mode()
def speeds(candidates: list) -> list[dict]:
    """Tokens a second of models that take turns."""

    def generating(candidate, texts):
        ids = torch.arange(PROMPT).repeat(texts, 1) + 5
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        candidate.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return texts * NEW_TOKENS / (time.perf_counter() - start)

    def reading(candidate):
        ids = torch.arange(PREFILL)[None] + 5
        start = time.perf_counter()
        candidate(ids, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    measures = {
        "tokens_s": lambda candidate: generating(candidate, 1),
        "tokens_s_8": lambda candidate: generating(candidate, 8),
        "prefill_s": reading,
    }
    rows = [{} for _ in candidates]
    for name, call in measures.items():
        turns = []
        start = time.perf_counter()
        while len(turns) <= TURNS and time.perf_counter() - start < PATIENCE:
            turns.append([call(candidate) for candidate in candidates])
        for row, values in zip(rows, zip(*(turns[1:] or turns))):
            row[name] = statistics.median(values)
    return rows


def machine() -> dict:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", file.read(), re.MULTILINE))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family": f"{fields.get('cpu family')}/{fields.get('model')}",
        "threads": torch.get_num_threads(),
        "isa": cpu.kernels().isa() if cpu.is_available() else None,
        "versions": versions,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/peers"), help="where models, results and plots go")
    parser.add_argument("--models", nargs="+", choices=models.MAKERS, default=list(models.MAKERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--turns", action="store_true", help="time the methods on `llama` in turns, all in this process"
    )
    parser.add_argument("--one", action="store_true", help="measure one method of one model in this process")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        print(json.dumps(measure(arguments.models[0], arguments.methods[0], arguments.out)))
        return
    if arguments.turns:
        folder = models.checkpoint("llama", arguments.out)
        rows = speeds([load("llama", method, folder) for method in arguments.methods])
        print(*(json.dumps({"method": method} | row) for method, row in zip(arguments.methods, rows)), sep="\n")
        return
    for name in arguments.models:
        models.checkpoint(name, arguments.out)
        for method in arguments.methods:
            if not skipped(name, method):
                keep(in_process(name, method, arguments.out), arguments.out / f"{name}.json")
    report.write(arguments.out)


def keep(row: dict, file: Path):
    """Print a row and add it to the results of its model, of which those stay that other methods had on this machine."""
    print(json.dumps(row), flush=True)
    results = {"machine": machine(), "rows": []}
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["machine"] == results["machine"]:
            results = earlier
    rows = [row, *(other for other in results["rows"] if other["method"] != row["method"])]
    results["rows"] = sorted(rows, key=lambda row: list(METHODS).index(row["method"]))
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def skipped(name: str, method: str) -> bool:
    """What a method cannot do, or what is no news: `llama` is for speeds, and that of GPTQ and AWQ is PyTorch's int4."""
    family = method.split()[0]
    if name != "llama" and method.endswith("head 6"):
        return True  # it is for speed
    if name == "minilm" and method.endswith("own text"):
        return True  # it writes none
    if name == "llama":
        return method in SPEEDS_LIKE_OTHERS
    if name == "bible":
        return False
    # The weights of `gemma` were made by kinds of GGUF, and not all rows of either are of `256 n`; the others want a decoder.
    return family == "GGUF" or (name == "minilm" and family in ("GPTQ", "AWQ"))


def in_process(name: str, method: str, out: Path) -> dict:
    """`measure` in a process of its own; what failed is a row, too."""
    command = [sys.executable, __file__, "--one", "--out", str(out), "--models", name, "--methods", method]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_PROC_BIND": "true"})
    if done.returncode:
        return {"model": name, "method": method, "failed": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
