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
"""Which modules of a model the names and patterns of a config mean."""

import difflib
import re

from ...quantizers.quantizers_utils import should_convert_module


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
            if not chosen and not any(_has(path, name) or path.endswith(name) for path in paths):
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
