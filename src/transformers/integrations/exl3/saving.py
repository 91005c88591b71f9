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
"""How EXL3 checkpoints are saved: with a `quantization_config.json`, and whole before they take the place of others."""

import contextlib
import copy
import functools
import gc
import inspect
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...configuration_utils import PreTrainedConfig
from ...modeling_utils import PreTrainedModel, _add_variant
from ...utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from ...utils.quantization_config import QuantizationMethod
from . import format
from .checkpoint import read_checkpoint
from .modules import Exl3Linear, Exl3Module
from .scratch import if_none, scratch


logger = logging.getLogger(__name__)

TENSOR_STORAGE = "quantization_config.json"  # is written for other programs, and never read here but for its method
UNFINISHED = ".unfinished"  # where files are written first, in the folder that they are for
ASIDE = ".replaced"  # in the names of old files while new ones take their places


def tensor_storage(files: list[str]) -> dict[str, dict]:
    """
    The map of modules to their stored tensors that `quantization_config.json` holds, made from the files themselves.

    Args:
        files (`list[str]`): The safetensors files of a checkpoint.

    Returns:
        `dict[str, dict]`: For each module its tensors with shape, bytes and dtype, and for quantized linear layers the
        bits per weight and the multiplier of their codebook.
    """
    checkpoint = read_checkpoint(files)
    storage: dict[str, dict] = {}
    for name, (_, _, meta, _, nbytes) in checkpoint.stored.items():
        stored = storage.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})["stored_tensors"]
        stored[name] = {"shape": list(meta.shape), "n_bytes": nbytes, "dtype": str(meta.dtype)}
    for module, tensors in checkpoint.linears.items():
        storage[module] |= {"quant_format": "exl3", "bits_per_weight": format.bits_of(tensors["trellis"])}
        storage[module] |= {f"{name}_multiplier": format.MARKERS[name] for name in format.MARKERS if name in tensors}
    return storage


def state_with_repeated_layers(model) -> dict[str, torch.Tensor] | None:
    """
    The tensors of a model that has a quantized layer at several places, None for any other.

    Upstream refuses such models with a message that names the shared tensors, and looks at these as rows of numbers to find
    them: a trellis, whose tiles stand in memory by columns, is given as a copy of its own for each place.
    """
    times = Counter(m for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, Exl3Linear))
    repeated = {module.trellis.data_ptr() for module, count in times.items() if count > 1}
    if not repeated:
        return None
    state = model.state_dict()
    return {name: value.contiguous() if value.data_ptr() in repeated else value for name, value in state.items()}


def _saving_exl3(save: Callable) -> Callable:
    """
    `save`, a `save_pretrained`, that for quantized models writes `quantization_config.json`, too, and moves the files to their
    places when all are written. What stops it before that leaves the folder as it was.

    Upstream's quantizers see the tensors that are saved, but not where. An attribute of the model in place of its method would
    keep the model alive, or not keep it alive while it saves.
    """

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        if not any(isinstance(module, Exl3Module) for module in self.modules()):
            with _config_of_floats(self):
                result = save(self, *args, **kwargs)
            _remove_tensor_storage(self, inspect.signature(save).bind(self, *args, **kwargs))
            return result
        if getattr(self, "hf_quantizer", None) is None:
            raise ValueError(
                f"This {type(self).__name__} is a part of a quantized model, and saved alone it would be loaded without its quantized "
                "weights. Save the whole model, or call its `dequantize` first."
            )
        return _save_whole(save, self, *args, **kwargs)

    return save_pretrained


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the first floating parameter, as upstream has it, and where this is of a quantized layer, of what the layer stands for."""
    owned = ((m, p.dtype) for m in model.modules() for p in m.parameters(recurse=False) if p.is_floating_point())
    module, dtype = next(owned)
    return module.plain_dtype if isinstance(module, Exl3Module) else dtype


PreTrainedModel.save_pretrained = _saving_exl3(PreTrainedModel.save_pretrained)
PreTrainedModel.dtype = property(_dtype, doc=PreTrainedModel.dtype.__doc__)


def _is_exl3(config) -> bool:
    """Whether `config`, a quantization config or a dict of one, is of EXL3."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return method == QuantizationMethod.EXL3


@contextlib.contextmanager
def _config_of_floats(model: PreTrainedModel):
    """
    Have the config of `model`, which has no quantized module, not say that it is quantized: where all its modules were dequantized
    one by one, from here on, and where it is a part of a quantized model, meanwhile.
    """
    config = getattr(model.config, "quantization_config", None)
    if not _is_exl3(config):
        yield
    elif getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()
        yield
    else:
        del model.config.quantization_config
        try:
            yield
        finally:
            model.config.quantization_config = config


def _save_whole(save: Callable, model: PreTrainedModel, *args, **kwargs):
    """`save(model, ...)`, with the map of tensors and in one step; see `_saving_exl3`."""
    call = inspect.signature(save).bind(model, *args, **kwargs)
    call.apply_defaults()
    arguments = call.arguments
    if arguments["distributed_checkpoint"]:
        raise ValueError("EXL3 models are not saved with `distributed_checkpoint=True`: leave it out.")
    folder, hub_arguments = arguments["save_directory"], arguments["kwargs"]
    push_to_hub, arguments["push_to_hub"] = arguments["push_to_hub"], False
    is_writer = model.should_save_on_this_rank(arguments["is_main_process"])
    asked = getattr(model.config, "distributed_config", None)
    with _unfinished(folder) if is_writer else contextlib.nullcontext(folder) as arguments["save_directory"]:
        model.config.distributed_config = None  # the quantizer gathers the state: upstream is to write what it gets
        model.hf_quantizer.given_state = arguments["state_dict"]
        try:
            with _for_many_tensors():
                with _logging_paths(arguments["save_directory"], os.fspath(folder)):
                    save(*call.args, **call.kwargs)
                if is_writer:
                    unfinished = arguments["save_directory"]
                    if not getattr(model, "_hf_peft_config_loaded", False):
                        _write_tensor_storage(model, unfinished)
                        _write_names_of_fields(model.config, unfinished, model.hf_quantizer.published)
                    _move(unfinished, folder, arguments["variant"])
        finally:
            model.config.distributed_config, model.hf_quantizer.given_state = asked, None
    if is_writer and push_to_hub:
        hub_arguments.setdefault("repo_id", os.path.basename(os.path.abspath(folder)))
        model.push_to_hub(token=arguments["token"], **hub_arguments)
    model.barrier_after_gathered_checkpoint_save(asked)


@contextlib.contextmanager
def _unfinished(folder: str | os.PathLike) -> Iterator[str]:
    """Yields a folder to write to what `folder` is to have, which nobody else writes to and which is gone afterwards."""

    def tell():
        logger.warning(f"Another process or thread is saving to {folder}: waiting for it. {if_none(Path(place))}")

    place = os.path.join(folder, UNFINISHED)
    files = os.path.join(place, "files")
    with scratch(Path(place), tell):
        try:
            shutil.rmtree(files, ignore_errors=True)  # of a process that was killed
            yield files
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _for_many_tensors():
    """
    Have Python collect no garbage meanwhile, for which it would go through tens of thousands of tensors again and again, and torch copy
    in this thread alone: others wait in a loop after each copy, longer than it takes.
    """
    was_enabled, threads = gc.isenabled(), torch.get_num_threads()
    gc.disable()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if was_enabled:
            gc.enable()


def _write_tensor_storage(model: PreTrainedModel, folder: str):
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    storage = {"tensor_storage": tensor_storage(files)}
    with open(os.path.join(folder, TENSOR_STORAGE), "w", encoding="utf-8") as file:
        # With indents, Python's json is written in Python: a second for each 30 000 tensors.
        file.write(json.dumps(model.config.quantization_config.to_dict() | storage))


def _remove_tensor_storage(model: PreTrainedModel, call: inspect.BoundArguments):
    """Remove the map of tensors from the folder where `call`, of `save_pretrained`, has put a float model in the place of an EXL3 one."""
    call.apply_defaults()
    arguments = call.arguments
    path = Path(arguments["save_directory"], TENSOR_STORAGE)
    is_writer = model.should_save_on_this_rank(arguments["is_main_process"])
    is_other = arguments["variant"] is not None or getattr(model, "_hf_peft_config_loaded", False)  # stands beside it
    if not is_writer or is_other or not path.is_file():
        return
    with contextlib.suppress(ValueError):  # what cannot be read is of others
        if _is_exl3(json.loads(path.read_text(encoding="utf-8"))):
            path.unlink()


def _write_names_of_fields(config: PreTrainedConfig, folder: str, published: dict | None):
    """
    Have config.json in `folder` tell what other programs, which know a checkpoint by the fields that it was published with, look
    for: those of `published`, the config.json that it was loaded with, where they mean the same, and older names of fields that the
    class of `config` knows.
    """
    path = os.path.join(folder, CONFIG_NAME)
    content = config._dict_from_json_file(path)
    if published is not None and published.get("model_type") == config.model_type:
        content = _as_published(type(config), content, published)
    _add_older_names(config, content)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config._encode_special_floats(content), file, indent=2, sort_keys=True)
        file.write("\n")


def _add_older_names(config: PreTrainedConfig, content: dict):
    for older, name in config.attribute_map.items():
        if name in content:
            content.setdefault(older, content[name])
    for name in config.sub_configs:
        if isinstance(content.get(name), dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            _add_older_names(getattr(config, name), content[name])


OF_THE_SAVED = ("architectures", "dtype", "quantization_config", "transformers_version")


def _as_published(kind: type[PreTrainedConfig], written: dict, published: dict) -> dict:
    """`published` with what differs in `written`, if that is read as `written` is; else `written`."""

    def read(content: dict) -> dict:
        return kind.from_dict(copy.deepcopy(content)).to_dict()

    wanted = read(written)
    result = {name: value for name, value in published.items() if name not in (*OF_THE_SAVED, "torch_dtype")}
    result = copy.deepcopy(result) | {name: written[name] for name in OF_THE_SAVED if name in written}
    try:
        _take_differences(result, read(result), wanted, written)
        problem = None if read(result) == wanted else "it is read as another config"
    except Exception as error:  # of a class that does not read it: the model was loaded with a config of the user's
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning(
            f"config.json has the names of fields that {kind.__name__} has, and not those of the checkpoint that the model was loaded "
            f"from, which other programs may look for: with the config that the model has now, the fields of then cannot be read "
            f"({problem})."
        )
        return written
    names, classes = published.get("architectures") or (), written.get("architectures") or ()
    if len(names) == len(classes) and all(map(_is_spelled, names, classes)):
        result["architectures"] = published["architectures"]
    return result


def _is_spelled(name: str, kind: str) -> bool:
    """
    Whether files may mean upstream's class `kind` by `name`, which is no other class of upstream's: `Ernie4_5_ForCausalLM` is
    Ernie4_5ForCausalLM, and `BailingMoeV3ForCausalLM` is BailingHybridForCausalLM.
    """
    is_alike = name.replace("_", "") == kind.replace("_", "")
    is_other = hasattr(sys.modules[__name__.partition(".")[0]], name)
    return is_alike or ("For" in name and not is_other and name.partition("For")[2] == kind.partition("For")[2])


def _take_differences(result: dict, found: dict, wanted: dict, written: dict):
    for name in [name for name in wanted if found.get(name) != wanted[name]]:
        parts = [content.get(name) for content in (result, found, wanted, written)]
        if all(isinstance(part, dict) for part in parts):
            _take_differences(*parts)
        else:
            result[name] = written.get(name, wanted[name])


@contextlib.contextmanager
def _logging_paths(path: str, instead: str):
    """Have what Transformers logs name `instead` where it names `path`."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(path, instead), ()
        return True

    root = __name__.partition(".")[0]
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(root)]
    for logger in loggers:
        logger.addFilter(rename)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(rename)


def _move(source: str, folder: str | os.PathLike, variant: str | None):
    """
    Move the files of `source` to `folder`, and remove the weights there that they replace.

    At each moment the weights that `folder` loads are all old or all new: what they are found by, their one file, or
    without it the index of several, is replaced or removed in one step, when all that the new one needs is there.
    """
    new = os.listdir(source)
    whole, index = entries = [_add_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    shard = re.compile(rf"{re.escape(whole.removesuffix('.safetensors'))}-\d{{5}}-of-\d{{5}}(\{ASIDE})?\.safetensors")
    old = {name for name in os.listdir(folder) if name in entries or shard.fullmatch(name)}
    if index in old and index in new:
        old.update(_set_aside(old.intersection(new) - {*entries}, source, folder, index))
    for name in sorted(new, key=entries.__contains__):
        os.replace(os.path.join(source, name), os.path.join(folder, name))
    if whole in new or index in new:  # and not the weights of an adapter
        for name in sorted(old.difference(new), key=lambda name: name != whole):
            os.remove(os.path.join(folder, name))


def _set_aside(shards: set[str], source: str, folder: str | os.PathLike, index: str) -> list[str]:
    """
    Give those of `shards` in `folder` that its index uses second names, and have it use these, which are returned. It uses
    such names already where a save was killed: then its files have nothing to fear. `source` is for scratch.
    """
    with open(os.path.join(folder, index), "rb") as file:
        content = file.read()
    used = [name for name in shards if f'"{name}"'.encode() in content]
    aside = {name: name.replace(".safetensors", f"{ASIDE}.safetensors") for name in used}
    for name, other in aside.items():
        link = os.path.join(source, other)
        try:
            os.link(os.path.join(folder, name), link)
        except OSError:  # a file system without links
            shutil.copyfile(os.path.join(folder, name), link)
        os.replace(link, os.path.join(folder, other))
        content = content.replace(f'"{name}"'.encode(), f'"{other}"'.encode())
    rewritten = os.path.join(source, index + ASIDE)
    with open(rewritten, "wb") as file:
        file.write(content)
    os.replace(rewritten, os.path.join(folder, index))
    return list(aside.values())
