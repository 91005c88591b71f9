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
Holds EXL3 checkpoints of all architectures against exllamav3's own code, and prints a table.

    python -m tests.quantization.exl3_integration.conformance [ARCHITECTURE ...] [--json FILE]

Of each architecture a tiny float model is converted by exllamav3, and loaded here, quantized and dequantized; the same float
model with the weights that the codes mean is what both have to agree with. Then it is quantized on the fly, saved, loaded
here, and loaded by exllamav3. Towers for images are compared as weights, models by the logits of text.
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import warnings
from unittest import mock

import torch
from safetensors.torch import save_file

import transformers
from transformers import Exl3Config
from transformers.integrations.exl3.embeddings import Exl3Embedding
from transformers.integrations.exl3.modules import Exl3Linear

from . import exllamav3_on_cpu as exllamav3
from .architectures import ROWS
from .rows import VOCAB, Row


TOLERANCE = 2e-5  # largest difference, of the root mean square
HALF_TOLERANCE = 8 * 2**-11  # the same of values that are rounded to fp16 and are at most 8 of it
TWICE = re.compile(
    r"\.attn\.qkv\.(weight|bias)$"
)  # the converter leaves these of towers beside the parts it quantizes
_inputs = {"input_ids": torch.randint(3, VOCAB - 10, (2, 9), generator=torch.Generator().manual_seed(1))}


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the root mean square of `expected`; infinite where something is not finite."""
    rms = expected.float().square().mean().sqrt().clamp_min(1e-30)
    return float(((result.float() - expected.float()).abs().max() / rms).nan_to_num(float("inf")))


def in_short(names) -> list[str]:
    """`names` with layers and experts as N."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names})


class Case:
    """
    What is found of one row.

    Attributes:
        found (`dict[str, str]`): What was looked at, to `ok`, to a reason that the row gives, or to what is wrong.
        problems (`list[str]`): What is wrong.
    """

    def __init__(self, row: Row, folder: str):
        self.row, self.folder = row, folder
        self.kind = getattr(transformers, row.kind or row.architecture)
        self.found: dict[str, str] = {}
        self.problems: list[str] = []

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def note(self, what: str, problem: str = "", reason: str = ""):
        self.found[what] = problem or reason or "ok"
        self.problems += [f"{what}: {problem}"] if problem else []

    def load(self, name: str, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.kind.from_pretrained(self.path(name), dtype=torch.float32, **kwargs).eval()

    def attempt(self, what: str, function, *args) -> bool:
        """Whether `function` comes to an end."""
        try:
            function(*args)
        except Exception as error:
            self.note(what, f"{type(error).__name__}: {error}"[:500])
            return False
        return True

    @torch.no_grad()
    def run(self) -> "Case":
        if not self.attempt("convert", self.convert):
            return self
        if self.row.refused:
            self.refuse()
        else:
            self.attempt("load", self.hold)
        self.attempt("on the fly", self.quantize)
        return self

    def convert(self):
        """Make the source, convert it, and make of it what the codes mean."""
        self.make_source()
        source, row = self.path("source"), self.row
        self.conversion = exllamav3.Conversion(source, row.vision_bits, row.bits, row.codebook)
        self.conversion.write(source, self.path("exl3"), self.path("work"))
        found, first = exllamav3.places(source, row.vision_bits)
        tensors = exllamav3.read_folder(source)
        flat = torch.cat([torch.zeros(1), *(tensor.flatten().float() for tensor in tensors.values())])
        heads = {}
        for layer, weight in self.conversion.decoded.items():
            place = found[layer]
            numbers = place[place > 0]
            owner = next(name for name in reversed(first) if first[name] < int(numbers.min()))
            if "embed" in owner:  # a head that is tied in the source, and is not any more
                heads[f"{layer}.weight"] = weight[: tensors[owner].shape[1], : tensors[owner].shape[0]].T.contiguous()
            else:
                flat[numbers] = weight[place > 0].float()
        sizes = [tensor.numel() for tensor in tensors.values()]
        parts = zip(tensors, flat[1:].split(sizes), strict=True)
        dense = {name: part.view(tensors[name].shape).clone() for name, part in parts} | heads
        lost = [name for name in dense if row.lost and re.search(row.lost, name)]
        self.write("dense", dense | {name: torch.zeros_like(dense[name]) for name in lost}, _untied(self.config))

    def make_source(self):
        """A float checkpoint as the Hub has it, with weights that bfloat16 and float16 hold alike."""
        torch.manual_seed(0)
        model = self.kind(self.kind.config_class(**copy.deepcopy(self.row.fields))).float().eval()
        generator = torch.Generator().manual_seed(0)
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("bias")]
        for name, tensor in [*model.named_parameters(), *biases]:  # other buffers are constants
            drawn = torch.randn(tensor.shape, generator=generator)
            wide = tensor.dim() > 1 and "embed" not in name
            value = drawn / tensor.shape[-1] ** 0.5 if wide else drawn if tensor.dim() > 1 else tensor + 0.1 * drawn
            value = value.bfloat16().float()
            tensor.data.copy_(torch.where(value.abs() < 2**-14, 0, value))
        model.save_pretrained(self.path("saved"))
        with open(os.path.join(self.path("saved"), "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.config["architectures"] = [self.row.architecture]
        if self.row.config:
            self.row.config(self.config)
        rename = self.row.names or (lambda name: name)
        constants = {name for name, _ in model.named_buffers()} - {name for name, _ in biases}
        tensors = exllamav3.read_folder(self.path("saved"))
        turned = [name for name in tensors if self.row.transposed and re.search(self.row.transposed, name)]
        tensors |= {name: tensors[name].mT.contiguous() for name in turned}
        halved = {name: t.bfloat16() for name, t in tensors.items() if t.is_floating_point() and name not in constants}
        source = {rename(name): tensor for name, tensor in (tensors | halved).items()}
        for name, shape in self.row.adds(source).items() if self.row.adds else ():
            drawn = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            source[name] = (drawn if len(shape) > 1 else 1 + drawn).bfloat16()
        self.write("source", source, self.config)

    def write(self, name: str, tensors: dict[str, torch.Tensor], config: dict):
        os.makedirs(self.path(name))
        files = {"config.json": config}
        if self.row.processor:
            files["preprocessor_config.json"] = self.row.processor
            files["processor_config.json"] = {"image_processor": self.row.processor}
        for file_name, content in files.items():
            with open(os.path.join(self.path(name), file_name), "w", encoding="utf-8") as file:
                json.dump(content, file)
        save_file(tensors, os.path.join(self.path(name), "model.safetensors"), metadata={"format": "pt"})

    def refuse(self):
        try:
            self.load("exl3")
        except ValueError as error:
            matches = re.search(self.row.refused, str(error))
            self.note("load", "" if matches else f"refused for another reason: {error}"[:500], "refused")
        else:
            self.note("load", "is to be refused, and loads")

    def hold(self):
        """Logits, weights and buffers of the converted checkpoint against what its codes mean; and what is saved of it."""
        dense, quantized = self.load("dense"), self.load("exl3")
        self.note("load")
        worst = difference(quantized(**_inputs).logits, dense(**_inputs).logits)
        self.note("logits", f"differ by {worst:.2g}" if worst > TOLERANCE else "")
        plain = self.load("exl3", quantization_config=Exl3Config(dequantize=True)).state_dict()
        expected = dense.state_dict()
        wrong = plain.keys() ^ expected.keys()
        wrong |= {name for name in plain.keys() & expected.keys() if plain[name].shape != expected[name].shape}
        both = (plain.keys() & expected.keys()) - wrong
        wrong |= {name for name in both if difference(plain[name], expected[name]) > TOLERANCE}
        self.note("weights and buffers", f"differ: {in_short(wrong)[:8]}" if wrong else "")
        quantized.save_pretrained(self.path("resaved"))
        old, new = (exllamav3.read_folder(self.path(folder)) for folder in ("exl3", "resaved"))
        extra = new.keys() - old.keys() - exllamav3.read_folder(self.path("source")).keys()  # constants that were lost
        lost = {name for name in old.keys() - new.keys() if not name.startswith(self.conversion.beside)}
        extra, lost = (
            {name for name in names if not (pattern and re.search(pattern, name))}
            for names, pattern in ((extra, self.row.lost), (lost, TWICE))
        )
        changed = {name for name in old.keys() & new.keys() if not _same(old[name], new[name])}
        listed = {name for name in extra | lost | changed if self.row.differs and re.search(self.row.differs, name)}
        wrong = in_short((extra | lost | changed) - listed)
        self.note("saved again", f"other names or values: {wrong[:8]}" if wrong else "", listed and self.row.why)
        again = self.load("resaved")
        if difference(again(**_inputs).logits, quantized(**_inputs).logits) > TOLERANCE:
            self.note("saved again", "loads as another model")
        differing = {
            name for name in self.conversion.of_text if self.row.differs and re.search(self.row.differs, name)
        }
        self.read_back("resaved", self.conversion.of_text - differing)

    def quantize(self):
        """What is quantized on the fly, and who reads it."""

        def encoded(layer, weight, seed, *args):
            scale = weight.float().std().item() or 0.05
            return exllamav3.drawn_codes(layer.trellis.shape, str(seed), scale, layer.codebook)

        config = {"bits": 4, "codebook": self.row.codebook, "embedding_bits": self.row.embedding_bits}
        if self.row.embedding_bits:
            config["head_bits"] = 6  # exllamav3 knows no head that is tied to a quantized table
        with mock.patch.object(Exl3Linear, "encoded", encoded):
            model = self.load("source", quantization_config=Exl3Config(**config))
        model.save_pretrained(self.path("quantized"))
        again = self.load("quantized")
        same = difference(again(**_inputs).logits, model(**_inputs).logits) <= TOLERANCE
        self.note("on the fly", "" if same else "loads as another model")
        saved = exllamav3.read_folder(self.path("quantized"))
        ours = {name.removesuffix(".suh") for name in saved if name.endswith(".suh")}
        head = {name for name in self.conversion.of_text if re.search(r"(^|\.)(lm_)?head$", name)}
        others = (ours ^ self.conversion.of_text) - head - self.conversion.left
        listed = {name for name in others if self.row.differs and re.search(self.row.differs, name)}
        self.note(
            "same layers", f"not: {in_short(others - listed)[:8]}" if others - listed else "", listed and self.row.why
        )
        tables = self.read_back("quantized", ours, self.row.unreadable)
        if self.row.embedding_bits:
            self.note("embeddings", self.hold_table(again.get_input_embeddings(), tables))

    def hold_table(self, ours: Exl3Embedding, tables: dict[str, torch.Tensor]) -> str:
        """What is wrong with exllamav3's rows of the one quantized table, which it rounds to fp16."""
        if not isinstance(ours, Exl3Embedding) or len(tables) != 1:
            return f"quantized tables: {type(ours).__name__} here, {[*tables]} there"
        (theirs,) = tables.values()
        rows = ours(torch.arange(ours.num_embeddings))
        if rows.shape != theirs.shape:
            return f"{[*rows.shape]} here, {[*theirs.shape]} there"
        worst = difference(theirs, rows)
        return f"differ by {worst:.2g}" if worst > HALF_TOLERANCE else ""

    def read_back(self, folder: str, ours: set[str], unreadable: str | None = None) -> dict[str, torch.Tensor]:
        """
        Whether exllamav3 reads what is saved in `folder`, and the layers `ours` of it as quantized ones; its quantized tables
        of embeddings.
        """
        what = {"resaved": "read again", "quantized": "exllamav3 reads it"}[folder]
        for name in ("preprocessor_config.json", "processor_config.json"):
            if self.row.processor:
                os.link(os.path.join(self.path("source"), name), os.path.join(self.path(folder), name))
        try:
            read, tables, problems = exllamav3.read_back(self.path(folder))
        except Exception as error:
            problems, read, tables = [f"{type(error).__name__}: {error}"[:300]], ours, {}
        problems += [f"not read as quantized: {in_short(ours - read)[:8]}"] if ours - read else []
        if unreadable:
            problems = [] if problems else ["it does, and the row says that it does not"]
        self.note(what, "; ".join(problems)[:500], unreadable and f"no: {unreadable}")
        return tables


def _same(stored: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether both have the same numbers. Plain tensors were loaded in float32, and the converter drops dimensions of size 1."""
    return torch.equal(stored.flatten().to(saved.dtype), saved.flatten())


def _untied(config):
    """`config` with no head that is tied to embeddings, at any depth."""
    if not isinstance(config, dict):
        return config
    return {key: False if key == "tie_word_embeddings" else _untied(value) for key, value in config.items()}


def table(cases: list[dict]) -> str:
    """The matrix of what was found, a line for each architecture."""
    columns = list(dict.fromkeys(what for case in cases for what in case["found"]))
    width = max(len(case["name"]) for case in cases)
    lines = [f"{'':{width}}  {'  '.join(columns)}"]
    for case in cases:
        words = {what: "ok" if found == "ok" else "listed" for what, found in case["found"].items()}
        words |= {problem.partition(":")[0]: "WRONG" for problem in case["problems"]}
        cells = "  ".join(f"{words.get(what, ''):{len(what)}}" for what in columns)
        lines.append(f"{case['name']:{width}}  {cells}".rstrip())
        lines += [f"    {problem}" for problem in case["problems"]]
        lines += [f"    {what}: {found}" for what, found in case["found"].items() if words[what] == "listed"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("architectures", nargs="*", help="all if none is named")
    parser.add_argument("--json", help="file for what was found")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = []
    for row in ROWS:
        if not arguments.architectures or {row.architecture, row.name} & {*arguments.architectures}:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(row, folder).run()
            cases.append({"name": row.name, "found": case.found, "problems": case.problems})
            print(row.name, case.problems or "ok", file=sys.stderr, flush=True)
    print(table(cases))
    if arguments.json:
        known = sorted(exllamav3.ARCHITECTURES)
        here = [name for name in known if hasattr(transformers, name)]
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"known": known, "here": here, "cases": cases}, file)
    sys.exit(any(case["problems"] for case in cases))


if __name__ == "__main__":
    main()
