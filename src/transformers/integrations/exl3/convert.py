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
A float checkpoint to an EXL3 checkpoint, in files all along: the command `python -m transformers.integrations.exl3`.

It is loading with a quantization config and saving, no second way of quantizing. What is added is that layers go to files as they
are done, which memory does not hold and a kill does not take, and that what belongs to a model beside its weights comes along.
"""

import copy
import gc
import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import transformers

from ...modeling_utils import PreTrainedModel
from ...models.auto import AutoConfig
from ...utils import (
    CHAT_TEMPLATE_DIR,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)
from ...utils.quantization_config import Exl3Config
from . import finished, format
from .conversion import PART, Conversion, LayerFiles, fingerprints, versions
from .embeddings import Exl3Embedding
from .experts import Exl3StackedLinear
from .modules import Exl3Linear
from .text import load_tokenizer, tokenized


logger = logging.get_logger(__name__)

README = "README.md"
# Files that hold weights, in any format, and what tells of such files.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".tflite",
    ".gguf",
    ".index.json",
)
NOT_DOWNLOADED = ["*" + suffix for suffix in WEIGHTS if suffix not in (".safetensors", ".index.json")]
NOT_DOWNLOADED += ["original/*", "consolidated*"]


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    config: Exl3Config,
    resume: bool = False,
    device: str | torch.device | None = None,
    max_shard_size: int | str = "50GB",
    revision: str | None = None,
    base_model: str | None = None,
) -> str:
    """
    Convert a float checkpoint to an EXL3 checkpoint. The files are those that `from_pretrained` with `config` and
    `save_pretrained` make of it; memory holds a few layers at a time.

    Args:
        source (`str` or `os.PathLike`): A folder, a repo of the Hub, or a GGUF file. The last is unpacked first, which takes the memory of
            the whole float model.
        output (`str` or `os.PathLike`): The folder for the result: new, empty, or with an unfinished conversion.
        config (`Exl3Config`): How to quantize.
        resume (`bool`, *optional*, defaults to `False`): Whether to go on with an unfinished conversion, if there is one.
        device (`str` or `torch.device`, *optional*): Where to quantize, layer by layer, by default on the CPU.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): As `save_pretrained` takes it.
        revision (`str`, *optional*): Of a repo: a branch, a tag or a commit.
        base_model (`str`, *optional*): The repo that the model card names as the source, by default `source` if that is one.

    Returns:
        `str`: A table of what was made.

    Raises:
        `ValueError` or `OSError`: Where the source is not a float checkpoint of a known model, the output folder is in use, the
            settings are not those of the conversion to be resumed, or the disk is too small.
    """
    if not isinstance(config, Exl3Config):
        raise TypeError(f"`config` has to be an Exl3Config, which tells how to quantize, and is {config!r}")
    begin, source, output = time.monotonic(), os.fspath(source), Path(output)
    device = _checked(torch.device(device)) if device is not None else None
    if device is not None and device.type != "cpu" and config.dataset is not None:
        raise ValueError(
            f"with data the model reads text and is on one device, here on the CPU: leave {str(device)!r} out, or quantize by "
            "`from_pretrained` with `device_map` and `save_pretrained`."
        )
    _check_size(max_shard_size)  # saving comes last, hours later
    folder = find_source(source, revision)
    if folder.is_file():
        weights, told = [folder], fingerprints([folder], folder.parent)
    else:
        weights = _weight_files(folder)
        told = fingerprints([folder / CONFIG_NAME, *_files_beside(folder), *weights], folder)
    before = _size(weights)
    if config.tokenizer is not None:  # what it makes of the texts is compared and read: it is asked once
        encoded = load_tokenizer(config.tokenizer)(config.dataset, return_special_tokens_mask=True)
        config = copy.copy(config)
        config.tokenizer = lambda *_, **__: encoded
    settings = {**_settings(config), **versions(), **told}
    if base_model is None and not Path(source).exists():
        base_model = source
    conversion = Conversion(output, settings)
    if folder.is_dir():
        _model_class(folder)  # no folder is made for what cannot be converted
    with conversion.running(resume):
        if not folder.is_dir():
            folder = unpack_gguf(folder, conversion.work / "float")
        model_class = _model_class(folder)
        beside = conversion.folder / "beside"
        shutil.rmtree(beside, ignore_errors=True)
        for file in _files_beside(folder):
            target = beside / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        _model_card(folder, output.resolve().name, model_class, config, base_model).save(beside / README)
        with finished.kept_as(LayerFiles(conversion.work / "layers", device)):
            model = model_class.from_pretrained(folder, dtype="auto", quantization_config=config)
        for file in sorted(beside.iterdir()):
            _move(file, output / file.name)
        model.save_pretrained(output, max_shard_size=max_shard_size)
        table = _table(model)
        del model
    after, seconds = _size(_weight_files(output)), time.monotonic() - begin
    return f"{table}\n{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB, in {seconds:,.0f} s: {output}"


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _settings(config: Exl3Config) -> dict:
    """What `config` says, as a file can hold it: of data a digest, of a tokenizer one of what it makes of the data."""
    settings = {name: getattr(config, name) for name in Exl3Config._arguments()}
    if config.tokenizer is not None:
        settings["tokenizer"] = _digest(tokenized(config.tokenizer, config.dataset))
    if isinstance(config.dataset, (list, tuple)):
        settings["dataset"] = _digest(config.dataset)
    return {name: value for name, value in settings.items() if value is not None}


def _digest(data: list | tuple) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _check_size(size: int | str):
    """Raises `ValueError` where files of at most `size` hold nothing."""
    two_bytes = {name: torch.empty(1, dtype=torch.uint8) for name in "ab"}
    try:
        is_less = split_torch_state_dict_into_shards(two_bytes, max_shard_size=size).is_sharded
    except ValueError as error:
        raise ValueError(f"{size!r} is no size of a file: {error}") from error
    if is_less:
        raise ValueError(f"{size!r} is no size of a file: give one like '5GB'")


def _checked(device: torch.device) -> torch.device:
    """`device`, if there is such a one."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {str(device)!r} to quantize on: {error}") from error
    return device


def find_source(source: str, revision: str | None = None) -> Path:
    """The folder, or GGUF file, that `source` means; a repo is downloaded. Raises `ValueError` where it means nothing."""
    path = Path(source)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        if revision is not None:
            raise ValueError(
                f"a revision ({revision}) is of a repo of the Hub, and {source} is on this disk: leave it out."
            )
        return path
    try:
        return Path(snapshot_download(source, revision=revision, ignore_patterns=NOT_DOWNLOADED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{source} is neither a folder, nor a .gguf file, nor a repo that the Hub gives out: {error}"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that a checkpoint's weights are loaded from."""
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if whole.exists() or not index.exists():
        files = [whole]
    else:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    for file in [folder / CONFIG_NAME, *files]:
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {file.name}: a checkpoint has config.json and its weights in safetensors files. Download it again, or "
                "load it as it is and write it with `save_pretrained`."
            )
    return files


def _model_class(folder: Path) -> type[PreTrainedModel]:
    """The class of the float model in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"{folder} is quantized already ({method}): convert the float model that it was made from.")
    name = next(iter(config.architectures or ()), None)
    found = _class_called(name, config) if name else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder / CONFIG_NAME} names {name or 'nothing'} under `architectures`, which has to be a model class of Transformers "
            f"{versions()['transformers']}."
        )
    return found


def _class_called(name: str, config) -> type | None:
    """What files call `name`, which upstream may spell another way, or have another name for that ends in the same `For...`."""
    from ...models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

    alike = {known.replace("_", ""): known for known in dir(transformers)}  # Ernie4_5_ForCausalLM: Ernie4_5ForCausalLM
    if (spelled := alike.get(name.replace("_", ""))) is not None:
        return getattr(transformers, spelled)
    # BailingMoeV3ForCausalLM is BailingHybridForCausalLM here, and IQuestCoderForCausalLM is LlamaForCausalLM.
    kinds = [
        auto._model_mapping.get(type(config), None) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)
    ]
    return next(
        (kind for kind in kinds if kind and kind.__name__.partition("For")[2] == name.partition("For")[2]), None
    )


def unpack_gguf(file: Path, folder: Path) -> Path:
    """The GGUF `file` as a plain checkpoint in `folder`, which is there whole or not at all."""
    from ...models.auto import AutoModelForCausalLM, AutoTokenizer
    from ...utils.quantization_config import GgufConfig

    if folder.exists():
        return folder
    logger.warning(
        f"Unpacking {file.name}, which takes the memory of the whole float model. Quantizing takes little then."
    )
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    named = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.bfloat16, quantization_config=plain)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(**named).save_pretrained(part)
    del model
    gc.collect()
    os.replace(part, folder)
    return folder


def _files_beside(source: Path) -> list[Path]:
    """
    What stands beside the weights in `source` and comes along: tokenizer, processor, chat templates, code, licenses. Of folders come
    chat templates, and the layers that sentence embeddings go through, with their weights.
    """
    files = [file for file in source.iterdir() if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if not file.name.endswith(WEIGHTS) and file.name not in (CONFIG_NAME, README)]
    folders, modules = [CHAT_TEMPLATE_DIR], source / "modules.json"
    if modules.is_file():
        folders += [module["path"] for module in json.loads(modules.read_text(encoding="utf-8")) if module["path"]]
    for name in folders:
        if (source / name).is_dir():
            if Path(name).name != name:
                raise ValueError(f"{modules} names the folder {name!r}, which is not one right in {source}.")
            files += [file for file in (source / name).rglob("*") if file.is_file()]
    return sorted(files)


def _move(path: Path, target: Path):
    """Have `path` stand at `target`, in place of what stands there."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)


def _model_card(source: Path, name: str, model_class, config: Exl3Config, base_model: str | None) -> ModelCard:
    """The card for the result, called `name`: its own, and the source's below it."""
    about, text = {}, ""
    if (source / README).is_file():
        try:
            card = ModelCard.load(source / README, ignore_metadata_errors=True)
            about, text = card.data.to_dict(), card.text
        except (ValueError, yaml.YAMLError) as error:
            logger.warning(f"The model card of {source} cannot be read, the new one does without it: {error}")
    about.pop("model-index", None)  # of what was measured with the float weights
    if base_model is not None:
        about |= {"base_model": base_model, "base_model_relation": "quantized"}
    else:
        about.pop("base_model", None)  # that of the source
    tags = about.get("tags") or []
    about |= {"library_name": "transformers", "tags": [*(tags if isinstance(tags, list) else [tags]), "exl3"]}
    about |= {"bits": config.bits}
    rates = [f"bits per weight | {config.bits:g}"]
    rates += [
        f"{label} | {bits:g}"
        for label, bits in (("head", config.head_bits), ("embeddings", config.embedding_bits))
        if bits
    ]
    rates += [f"`{pattern}` | {bits:g}" for pattern, bits in (config.overrides or {}).items()]
    rows = "\n".join(f"| {row} |" for row in rates)
    data = "without data" if config.dataset is None else f"with {len(config.dataset)} rows of data"
    data = "with text that the model wrote itself" if config.dataset == "self" else data
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    own = f"""# {name}

This is an EXL3 quantization{of}, made with Transformers {versions()["transformers"]} and codebook `{config.codebook}`, {data}.

| layers | bits |
|---|---|
{rows}

```py
from transformers import {model_class.__name__}

model = {model_class.__name__}.from_pretrained("{name}", dtype="auto", device_map="auto")
```
"""
    below = f"\n## The model card of the source\n\n{text.strip()}\n" if text.strip() else ""
    return ModelCard(f"---\n{ModelCardData(**about, ignore_metadata_errors=True).to_yaml()}\n---\n\n{own}{below}")


def _table(model: PreTrainedModel) -> str:
    """What `model` consists of: by kind of layer and rate the number, the weights and the bytes."""
    rows, quantized, plain = defaultdict(lambda: [0, 0, 0]), set(), defaultdict(lambda: [0, 0, 0])
    for path, module in model.named_modules():
        if isinstance(module, (Exl3Linear, Exl3StackedLinear)):
            number, bits = len(getattr(module, "members", "1")), module.bits
            weights = number * module.in_features * module.out_features
        elif isinstance(module, Exl3Embedding):
            number, weights = 1, module.num_embeddings * module.embedding_dim
            bits = format.embedding_bits(module.trellis, module.signs)
        else:
            continue
        stored = [getattr(module, name) for name in module.stored]
        quantized |= {id(tensor) for tensor in stored}
        kind = re.sub(r"\.stacked_(\w+)\.\*$", r".*.\1", re.sub(r"\.\d+(?=\.|$)", ".*", path))
        _add(rows[kind, bits], number, weights, sum(tensor.nbytes for tensor in stored))
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        if id(tensor) not in quantized:
            _add(plain[str(tensor.dtype).removeprefix("torch.")], 1, tensor.numel(), tensor.nbytes)
    kinds = list(dict.fromkeys(kind for kind, _ in rows))  # in the order of the model
    rates = sorted(rows, key=lambda row: (kinds.index(row[0]), row[1]))
    lines = [(kind, f"{bits:g}", rows[kind, bits]) for kind, bits in rates]
    lines += [("all quantized layers", "", [sum(column) for column in zip(*rows.values())])]
    lines += [(f"not quantized, {dtype}", "", row) for dtype, row in plain.items()]
    lines += [("all", "", [sum(column) for column in zip(*rows.values(), *plain.values())])]
    width = max(len(kind) for kind, _, _ in lines)
    text = [f"{'layers':{width}} {'number':>7} {'bits':>5} {'weights':>16} {'MB':>10} {'bits per weight':>16}"]
    for kind, bits, (number, weights, size) in lines:
        text.append(
            f"{kind:{width}} {number:7} {bits:>5} {weights:16,} {size / 1e6:10,.1f} {8 * size / weights:16.3f}"
        )
    return "\n".join(text)


def _add(row: list[int], *values: int):
    row[:] = [before + value for before, value in zip(row, values)]
