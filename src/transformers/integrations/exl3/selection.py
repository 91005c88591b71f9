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
"""Which modules of a model stay as they are when it is quantized on the fly: of themselves, and by what a config says."""

import difflib
import re

from torch import nn

from ...core_model_loading import WeightConverter
from ...quantizers.quantizers_utils import should_convert_module
from .architecture import is_linear, linear_sizes
from .naming import changing_operations


CONTROLS = re.compile(r"(?:^|\.)(?:gate|router|\w*hyper_connection\w*|\w*patch_?(?:embed|merge)\w*)(?:\.|$)")

# Layers whose weights models read themselves: of MLA and of Mamba.
READ_BY_MODELS = ("kv_b_proj", "dt_proj")


def stays_plain(model: nn.Module, paths: dict[str, nn.Module], converters: list[WeightConverter]) -> set[str]:
    """
    The linear layers of a model that stay as they are. The format's converters leave these, too.

    Beside what its name tells it is a layer that gives no more than a number for a head: a gate of attention, a rate of decay; in a
    block with a recurrence whatever passes through the width of one head: the factors of its gates; and in the indexer of
    sparse attention the key that all its heads share.

    So do layers whose weights stand in files in another order, which codes cannot be put into: other programs would read them
    wrong.

    Args:
        model (`nn.Module`): The model, with a config.
        paths (`dict[str, nn.Module]`): Its modules.
        converters (`list[WeightConverter]`): What upstream does to weights of its files.

    Returns:
        `set[str]`: Paths of linear layers.
    """
    layers = {path: linear_sizes(module) for path, module in paths.items() if is_linear(module)}
    heads = _most_heads(model.config.to_dict())
    narrow = _narrow_in_recurrences(layers, paths)
    return {
        path
        for path, (_, out_features) in layers.items()
        if CONTROLS.search(path)
        or path.rpartition(".")[2] in READ_BY_MODELS
        or out_features <= heads
        or path in narrow
        or out_features <= _head_of_indexer(path, paths)
        or changing_operations(path, converters)
    }


def _most_heads(config: dict) -> int:
    """The largest number of heads that a config and those in it tell, for all layers or one by one."""
    most = 0
    for name, value in config.items():
        if isinstance(value, dict):
            most = max(most, _most_heads(value))
        elif re.search(r"heads(_per_layer)?$|^n_head$", str(name)):
            values = value if isinstance(value, (list, tuple)) else [value]
            most = max([most, *(count for count in values if isinstance(count, int))])
    return most


def _narrow_in_recurrences(layers: dict[str, tuple[int, int]], paths: dict[str, nn.Module]) -> set[str]:
    """The layers beside a recurrence, known by its rates of decay `A_log`, that have a side of at most one head's width."""
    narrow = set()
    for path, module in paths.items():
        if "A_log" not in module._parameters:
            continue
        block = re.match(r".*\.\d+\.[^.]+|", path)[0] or path  # all of what stands in a layer, not only a part of it
        inside = {name: sizes for name, sizes in layers.items() if name.startswith(f"{block}.")}
        width = max((into for into, _ in inside.values()), default=0) // module.A_log.numel()
        narrow |= {name for name, sizes in inside.items() if min(sizes) <= width}
    return narrow


def _head_of_indexer(path: str, paths: dict[str, nn.Module]) -> int:
    """The width of a head of the indexer that the layer at `path` is in, 0 if it is in none."""
    indexer = re.match(r".*\bindexer(?=\.)|", path)[0]
    return getattr(paths.get(indexer), "head_dim", 0) if indexer else 0


def selected(names: list[str], paths: list[str], candidates: list[str]) -> set[str]:
    """
    The modules that `modules_to_not_convert` means.

    A name, or regular expression, selects what upstream's rule selects: a module and what is in it by its path from the
    model's root, or every module whose path ends with the name. Where that selects nothing, paths may begin at any component:
    `visual` selects the layers in `model.visual`, `layers.0` those in `model.layers.0`.

    Args:
        names (`list[str]`): What a user wrote.
        paths (`list[str]`): All modules of the model.
        candidates (`list[str]`): Those of them that there is a choice about.

    Returns:
        `set[str]`: Of `candidates`.

    Raises:
        `ValueError`: For names that mean no module of the model at all, with names that are like them, and for patterns that
            are not regular expressions.
    """
    found, problems = set(), []
    for name in names:
        try:
            chosen = {path for path in candidates if not should_convert_module(path, [name])}
            chosen = chosen or {path for path in candidates if _has(path, name)}
            if not chosen and all(should_convert_module(path, [name]) and not _has(path, name) for path in paths):
                problems.append(f"`{name}` is the name of no module{_nearest(name, paths)}")
        except re.error as error:
            problems.append(f"`{name}` is not a regular expression: {error}")
            continue
        found |= chosen
    if problems:
        raise ValueError(f"`modules_to_not_convert` of Exl3Config: {'; '.join(problems)}.")
    return found


def _has(path: str, pattern: str) -> bool:
    """Whether whole components of the dotted `path` match `pattern`."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", path) is not None


def _nearest(name: str, paths: list[str]) -> str:
    """The end of a message about `name`: what in `paths` it may have been meant for."""
    known = {path for path in paths if path} | {part for path in paths for part in path.split(".") if part}
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    if not near:
        near = sorted({path.partition(".")[0] for path in paths if path})
    return f", there is {', '.join(f'`{other}`' for other in near)}"
