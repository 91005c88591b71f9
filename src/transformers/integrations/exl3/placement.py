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
Which module of a model each quantized module of a checkpoint belongs to.

Checkpoints have the names of the source model's files. Upstream's conversion mapping tells what became of these in the
model: renamed, or merged into the 3-D parameters of experts. What the format itself splits is found here: the parts of
fused projections, the slices of wide ones, and experts that the source kept in one tensor.
"""

import re
from collections import defaultdict
from itertools import accumulate

import torch
from torch import nn

from ...conversion_mapping import get_model_conversion_mapping
from ...core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings, rename_source_key
from ...pytorch_utils import Conv1D
from . import format
from .architecture import EXPERT_PARAMETERS, EXPERT_ROLES, FUSED, is_experts, is_linear, linear_sizes
from .building import Builder
from .checkpoint import Checkpoint, Exl3CheckpointError, cut_columns
from .embeddings import Exl3Embedding, Exl3TiedHead
from .experts import Exl3Experts
from .modules import Exl3Linear, Exl3Module
from .naming import changing_operations, row_order
from .restoring import ROUTER_CORRECTIONS


# A module of these has a weight that codes can stand for; of subclasses only they themselves know how to multiply.
LINEAR_CLASSES = (nn.Linear, Conv1D)
NUMBER = "(0|[1-9][0-9]{0,8})"  # of an expert or a slice, in the one spelling that it has
EXPERT = re.compile(rf"(.+)\.{NUMBER}\.({'|'.join(EXPERT_ROLES)})")


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


class Placement:
    """
    The quantized modules of a checkpoint, built for a model and not yet put into it.

    Args:
        checkpoint (`Checkpoint`): What the files hold.
        model (`PreTrainedModel`): On the meta device.
        has_tied_head (`bool`, *optional*, defaults to `False`): Whether the output embeddings are tied to quantized input
            embeddings, so that the checkpoint has no tensors for them.

    Attributes:
        modules (`dict[str, Exl3Module]`): By path in the model, what has to stand there.
        layers (`dict[str, tuple[str, str]]`): Module name in the checkpoint to the path of the module in the model that it belongs
            to, and the layer's name there, as `Exl3Module.layer` takes it.
        padded (`dict[str, str]`): Tensor name in the checkpoint to the model's parameter, for tensors stored with padding, or without
            the dimensions of size 1 that the model has.
        plain (`dict[str, torch.Tensor]`): The model's state before modules are replaced.
        tied_head (`str` or `None`): Path in the model of a head that is decoded from the quantized input embeddings.
        superseded (`dict[str, str]`): Tensor name in the checkpoint to module in the model, for plain weights that stand beside
            the quantized parts of the same module: the codes count.
        lacking (`list[str]`): Buffers of the model, and corrections of routers, that the checkpoint lacks, for `restore`.
        spelled (`dict[str, str]`): Tensor name in the checkpoint to the one that the source has, for `x.weight` of `x_weight`.
        transposed (`set[str]`): Those parameters of `padded` that are stored transposed.
        decoded (`set[str]`): Those of `modules` that are to be dequantized while loading, since only the model's own module knows
            how to multiply, or since its rows are in another order.
        row_order (`dict[str, torch.Tensor]`): By path in the model, the rows in files that those of the layer are, for those of `decoded`
            that have another order.
        cut (`dict[str, dict[str, range]]`): Module name in the checkpoint to the columns that are each of the model's modules.

    Raises:
        `Exl3CheckpointError`: Where a quantized module has no place in the model, or does not fit it, or where the model
            has parameters that the checkpoint lacks.
    """

    def __init__(self, checkpoint: Checkpoint, model, has_tied_head: bool = False):
        self.checkpoint, self.model = checkpoint, model
        self.modules: dict[str, Exl3Module] = {}
        self.layers: dict[str, tuple[str, str]] = {}
        self.padded: dict[str, str] = {}
        self.superseded: dict[str, str] = {}
        self.lacking: list[str] = []
        self.spelled: dict[str, str] = {}
        self.transposed: set[str] = set()
        self.decoded: set[str] = set()
        self.row_order: dict[str, torch.Tensor] = {}
        self.cut: dict[str, dict[str, range]] = {}
        self._problems: list[str] = []
        self._unfit: set[str] = set()  # paths in the model of what the checkpoint has, and what does not fit
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.plain = model.state_dict()
        self._paths = dict(model.named_modules())
        self._build = Builder(checkpoint, self._paths, model.config, self._problems)
        self._containers: dict[tuple[str, str], str | None] = {}
        composites = defaultdict(dict)
        for name in checkpoint.linears:
            self._place_linear(name, composites)
        for (build, path), parts in composites.items():
            self._add(path, *build(path, parts))
        for name, tensors in checkpoint.embeddings.items():
            path = self._target(name)[0]
            self._add(path, [name], self._build.embedding(name, path, tensors))
        self.tied_head = self._tied_head() if has_tied_head else None
        if self.tied_head is not None:
            self.modules[self.tied_head] = Exl3TiedHead(self._paths[self.tied_head])
        self._check_others()
        if self._problems:
            raise Exl3CheckpointError(
                self._problems,
                f"Load it as the architecture that its config.json names (here it is loaded as {type(model).__name__}), "
                "or download or convert it again.",
            )

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        """What the loader calls a tensor of the checkpoint, and the pattern of the converter that it goes through, if any."""
        prefix, plain = self.model.base_model_prefix, self.plain
        renamed, pattern = rename_source_key(tensor, self._renamings, self._converters, prefix, plain)
        if renamed not in plain and tensor in plain:  # a model's own name, which patterns for files match by chance
            return rename_source_key(tensor, [], [], prefix, plain)
        return renamed, pattern

    def _target(self, name: str) -> tuple[str, str]:
        """Path and parameter in the model that `name`'s weight would go to if it were not quantized."""
        path, _, parameter = self._renamed(f"{name}.weight")[0].rpartition(".")
        return path, parameter

    def _operations(self, name: str, path: str) -> list[str]:
        """What upstream does to the float weight of `name`, or of what it makes that of `path` from, but to split or merge."""
        _, pattern = apply_converters(apply_renamings(f"{name}.weight", self._renamings), self._converters)
        converters = [entry for entry in self._converters if pattern in entry.source_patterns]
        if not converters:
            return changing_operations(path, self._converters)
        return [type(operation).__name__ for entry in converters for operation in entry.operations]

    def _in_model(self, path: str) -> str:
        """`path` with the base model's prefix taken away or added where only that is in the model."""
        prefix = self.model.base_model_prefix
        others = (path.removeprefix(f"{prefix}."), f"{prefix}.{path}") if prefix else ()
        return next((option for option in (path, *others) if option in self._paths), path)

    def _place_linear(self, name: str, composites):
        expert = EXPERT.fullmatch(name)
        if expert and (container := self._container(name, expert[1], expert[3])) is not None:
            composites[self._build.experts, container][int(expert[2]), expert[3]] = name
            return
        path = self._target(name)[0]
        if isinstance(self._paths.get(path), LINEAR_CLASSES):
            operations, order, plain = self._operations(name, path), None, self._paths[path]
            if operations and isinstance(plain, nn.Linear):
                order = row_order(path, plain.out_features, self._converters, self.model.config)
            if order is not None:
                self.row_order[path] = order
                self.decoded.add(path)
            elif operations:
                self._problems.append(
                    f"{name} is quantized, and its weight would become that of {path} through {', '.join(operations)}, which "
                    "codes cannot be put through"
                )
                self._unfit.add(path)
                return
            self._add(path, [name], self._build.linear(name, *linear_sizes(plain), plain), "")
            return
        sliced = re.fullmatch(rf"(.+)\.slice\.{NUMBER}", name)
        if sliced:
            path = self._target(sliced[1])[0]
            if isinstance(self._paths.get(path), LINEAR_CLASSES):
                composites[self._build.sliced, path][int(sliced[2])] = name
                return
        parent, _, part = self._in_model_parent(apply_renamings(name, self._renamings)).rpartition(".")
        for fused, spellings in FUSED.items():
            path = f"{parent}.{fused}" if parent else fused
            if path in self._paths and is_linear(self._paths[path]) and any(part in names for names in spellings):
                composites[self._build.split, path][part] = name
                return
        path = self._path_of_part(name)
        if path is not None:
            self._add(path, [name], self._build.linear(name, *linear_sizes(self._paths[path]), self._paths[path]), "")
            return
        if not self._place_fused(name, parent) and not self._is_ignored(name):
            stands = type(self._paths[path]).__name__ if (path := self._target(name)[0]) in self._paths else "nothing"
            self._problems.append(
                f"{name} is a quantized linear layer in the checkpoint, and {type(self.model).__name__} has {stands} at {path}"
            )

    def _container(self, name: str, owner: str, projection: str) -> str | None:
        """Path of the experts that `projection` of the experts in `owner` belongs to, `name` among them, None if there are none."""
        if (owner, projection) not in self._containers:
            path, parameter = self._target(name)
            if parameter not in EXPERT_PARAMETERS:
                path = self._in_model(apply_renamings(owner, self._renamings))
            if path not in self._paths:  # of a source that has one tensor for all experts
                stacked, parameter = self._target(f"{owner.removesuffix('.experts')}.{projection}")
                path = stacked if parameter in EXPERT_PARAMETERS else path
            is_there = path in self._paths and is_experts(self._paths[path])
            self._containers[owner, projection] = path if is_there else None
        return self._containers[owner, projection]

    def _path_of_part(self, name: str) -> str | None:
        """Where the model has the layer `name`, a part of what is one tensor in files of the source, which upstream splits."""
        parent, _, part = name.rpartition(".")
        for fused, spellings in FUSED.items():
            order = next((names for names in spellings if part in names), ())
            renamed, pattern = self._renamed(f"{parent}.{fused}.weight")
            targets = next((c.target_patterns for c in self._converters if pattern in c.source_patterns), ())
            if not order or len(targets) != len(order):
                continue
            path = renamed.removesuffix(".weight").replace(targets[0], targets[order.index(part)])
            if isinstance(self._paths.get(path), LINEAR_CLASSES) and not self._operations(name, path):
                return path
        return None

    def _place_fused(self, name: str, parent: str) -> bool:
        """Place the quantized module `name` that the model has in parts, in the module `parent`, if that is what it is."""
        stored = [size * format.TILE for size in self.checkpoint.linears[name]["trellis"].shape[:2]]
        for parts in dict.fromkeys(spellings[0] for spellings in FUSED.values()):
            paths = [f"{parent}.{part}" for part in parts]
            if not all(path in self._paths and is_linear(self._paths[path]) for path in paths):
                continue
            sizes = [linear_sizes(self._paths[path]) for path in paths]
            ends = list(accumulate(out for _, out in sizes))
            if {format.padded(into) for into, _ in sizes} != {stored[0]} or format.padded(ends[-1]) != stored[1]:
                continue
            tensors = self._build.tensors(name, sizes[0][0], ends[-1])
            if tensors is None or not all(self._build.have_biases(path, self._paths[path], [name]) for path in paths):
                self._unfit.update(paths)
                return True
            self.cut[name] = {path: range(end - out, end) for path, end, (_, out) in zip(paths, ends, sizes)}
            for path, (into, out) in zip(paths, sizes):
                cut, first = cut_columns(tensors, self.cut[name][path]), self.cut[name][path].start
                self._put(path, [name], Exl3Linear(into, out, cut, self._paths[path], first % format.BLOCK))
            return True
        return False

    def _in_model_parent(self, name: str) -> str:
        parent, _, leaf = name.rpartition(".")
        return f"{self._in_model(parent)}.{leaf}"

    def _is_ignored(self, name: str) -> bool:
        """Whether the model does without `name`: what its class ignores, and heads beside a base model that is there."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or []
        if any(re.search(pattern, f"{name}.{leaf}") for pattern in patterns for leaf in ("weight", "trellis")):
            return True
        for layers in re.finditer(rf"\.{NUMBER}\.", name):
            # Layers after the last one, for the prediction of more tokens, or of a model that is loaded in part.
            module = self._paths.get(self._in_model(apply_renamings(name[: layers.start()], self._renamings)))
            if isinstance(module, nn.ModuleList) and int(layers[1]) >= len(module):
                return True
        prefix = f"{self.model.base_model_prefix}."
        names = (*self.checkpoint.linears, *self.checkpoint.others)
        return not name.startswith(prefix) and any(other.startswith(prefix) for other in names)

    def _add(self, path: str, names, module: Exl3Module | None, *layers: str):
        if module is None:
            self._unfit.add(path)
        if module is None or not self._put(path, names, module):
            return
        if isinstance(self._paths[path], nn.Linear) and not is_linear(self._paths[path]):
            self.decoded.add(path)
        if isinstance(module, Exl3Experts):
            layers = [f"{expert}.expert_{role}" for expert in range(module.num_experts) for role in module.roles]
        elif not isinstance(module, (Exl3Linear, Exl3Embedding)):
            layers = [layer for layer, child in module.named_modules() if isinstance(child, Exl3Linear)]
        for name, layer in zip(names, layers or [""], strict=True):
            self.layers[name] = path, layer

    def _put(self, path: str, names, module: Exl3Module) -> bool:
        """Whether nothing stands at `path` yet; a problem is noted if not."""
        if path in self.modules:
            self._problems.append(f"{', '.join(names)}: {path} has other quantized weights in the checkpoint, too")
            return False
        self.modules[path] = module
        return True

    def _tied_head(self) -> str | None:
        """Path of the output embeddings, which the input embeddings of the checkpoint stand for, where the model has any."""
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        path = next((path for path, module in self._paths.items() if module is head), None)
        if path is None or path in self.modules:
            return None
        if not any(isinstance(m, Exl3Embedding) and self._paths[name] is table for name, m in self.modules.items()):
            self._problems.append(f"{path} is tied to the input embeddings by its config, and these are not quantized")
            return None
        return path

    def _check_others(self):
        """Note tensors that are stored with padding, and parameters that nothing in the checkpoint is for."""
        prefix, present = self.model.base_model_prefix, set()
        for name, tensor in self.checkpoint.others.items():
            renamed, pattern = self._renamed(name)
            if renamed not in self.plain:
                renamed, pattern = self._respelled(name, tensor) or (renamed, pattern)
            owner, _, leaf = renamed.rpartition(".")
            if owner in self.modules and leaf in dict(self.modules[owner].plain.named_parameters(recurse=False)):
                self.superseded[name] = owner
                continue
            present.add(renamed)
            plain = self.plain.get(renamed, tensor)
            if plain.is_floating_point() != tensor.is_floating_point():
                self._problems.append(f"{name} is {tensor.dtype}, and the model's {renamed} is {plain.dtype}")
            elif pattern is not None:
                targets = next(c.target_patterns for c in self._converters if pattern in c.source_patterns)
                present.update(renamed.replace(targets[0], target) for target in targets)
            elif plain.shape != tensor.shape:
                shape = plain.shape
                if _without_ones(shape) == _without_ones(tensor.shape) or (
                    [format.padded(size) for size in shape[:2]] == [format.padded(size) for size in tensor.shape[:2]]
                    and all(size in (wanted, format.padded(wanted)) for size, wanted in zip(tensor.shape, shape))
                ):
                    self.padded[name] = renamed
        head = self.model.get_output_embeddings()
        base = getattr(self.model, prefix, self.model) if prefix else self.model
        required = {id(module) for module in base.modules()} | {id(head)}
        lacking = self.model._keys_to_ignore_on_load_missing or []
        for path, module in self._paths.items():
            if id(module) not in required or path in self.modules or path in self._unfit:
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}" if path else leaf
                if name in present or any(re.search(pattern, name) for pattern in lacking):
                    continue
                if leaf in ROUTER_CORRECTIONS:
                    self.lacking.append(name)
                elif not self._is_tied(name, self.model.all_tied_weights_keys, present):
                    is_weight = leaf == "weight" and (is_linear(module) or isinstance(module, nn.Embedding))
                    lacks = f"{path} has neither a `weight` nor a `trellis`" if is_weight else f"{name} is not"
                    self._problems.append(f"{lacks} in the checkpoint")

        self.lacking += [
            name
            for name, _ in self.model.named_buffers()
            if name in self.plain and name not in present and name.rpartition(".")[0] not in self.modules
        ]

    def _respelled(self, name: str, tensor: torch.Tensor) -> tuple[str, str | None] | None:
        """What the loader would call a tensor if the converter had written the name of the source, None where it is no such."""
        source = re.sub(r"\.(weight|bias)$", r"_\1", name)
        renamed, pattern = self._renamed(source)
        if renamed in self.plain:
            wanted = self.plain[renamed].shape
            # With the tower the converter writes its projection as a linear layer has it.
            is_tower = any("vision" in path for path in self.modules)
            if tensor.dim() == 2 and tensor.shape == wanted[::-1] and (tensor.shape != wanted or is_tower):
                self.padded[name] = renamed
                self.transposed.add(renamed)
            else:
                self.spelled[name] = source
            return renamed, pattern
        parent, is_unnamed, leaf = self._renamed(name)[0].rpartition(".None.")
        if not is_unnamed:
            return None
        taken = {self._renamed(other)[0] for other in self.checkpoint.others}
        fitting = [
            path
            for path, parameter in self.plain.items()
            if re.fullmatch(rf"{re.escape(parent)}\.\w+\.{leaf}", path)
            and parameter.shape == tensor.shape
            and path not in taken
        ]
        if len(fitting) != 1:
            return None
        self.padded[name] = fitting[0]
        return fitting[0], None

    @staticmethod
    def _is_tied(weight: str, tied: dict[str, str], present: set[str]) -> bool:
        """Whether `weight` is shared with one that is present."""
        group = {tied.get(weight, weight)} | {
            key for key, source in tied.items() if source == tied.get(weight, weight)
        }
        return weight in {*tied, *tied.values()} and bool(group & present)
