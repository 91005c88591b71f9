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
from itertools import accumulate, islice

import torch
from torch import nn

from ...conversion_mapping import get_model_conversion_mapping
from ...core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)
from ...pytorch_utils import Conv1D
from . import format
from .architecture import (
    EXPERT_PARAMETERS,
    EXPERT_ROLES,
    FUSED,
    expert_roles,
    expert_sizes,
    is_embedding,
    is_experts,
    is_linear,
    linear_sizes,
    part_sizes,
)
from .checkpoint import Checkpoint, Exl3CheckpointError, cut_columns
from .embeddings import Exl3Embedding, Exl3TiedHead
from .experts import Exl3Experts, Exl3Projection
from .modules import Exl3Linear, Exl3Module, Exl3SlicedLinear, Exl3SplitLinear
from .naming import changing_operations
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
            how to multiply.
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
        self.cut: dict[str, dict[str, range]] = {}
        self._problems: list[str] = []
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.plain = model.state_dict()
        self._paths = dict(model.named_modules())
        self._containers: dict[tuple[str, str], str | None] = {}
        composites = defaultdict(dict)
        for name in checkpoint.linears:
            self._place_linear(name, composites)
        for (build, path), parts in composites.items():
            self._add(path, parts.values(), build(self, path, parts))
        for name, tensors in checkpoint.embeddings.items():
            path = self._target(name)[0]
            self._add(path, [name], self._embedding(name, path, tensors))
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
            composites[Placement._experts, container][int(expert[2]), expert[3]] = name
            return
        path = self._target(name)[0]
        if isinstance(self._paths.get(path), LINEAR_CLASSES):
            operations = self._operations(name, path)
            if operations:
                self._problems.append(
                    f"{name} is quantized, and its weight would become that of {path} through {', '.join(operations)}, which "
                    "codes cannot be put through"
                )
                return
            self._add(path, [name], self._linear(name, *linear_sizes(self._paths[path]), self._paths[path]), "")
            return
        sliced = re.fullmatch(rf"(.+)\.slice\.{NUMBER}", name)
        if sliced:
            path = self._target(sliced[1])[0]
            if isinstance(self._paths.get(path), LINEAR_CLASSES):
                composites[Placement._sliced, path][int(sliced[2])] = name
                return
        parent, _, part = self._in_model_parent(apply_renamings(name, self._renamings)).rpartition(".")
        for fused, spellings in FUSED.items():
            path = f"{parent}.{fused}" if parent else fused
            if path in self._paths and is_linear(self._paths[path]) and any(part in names for names in spellings):
                composites[Placement._split, path][part] = name
                return
        path = self._path_of_part(name)
        if path is not None:
            self._add(path, [name], self._linear(name, *linear_sizes(self._paths[path]), self._paths[path]), "")
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
            tensors = self._tensors(name, sizes[0][0], ends[-1])
            if tensors is None or not all(self._have_biases(path, self._paths[path], [name]) for path in paths):
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

    def _linear(self, name: str, in_features: int, out_features: int, plain: nn.Module | None = None):
        """The layer for the tensors of `name`, None (and a problem noted) if they do not fit these sizes."""
        tensors = self._tensors(name, in_features, out_features, plain)
        return None if tensors is None else Exl3Linear(in_features, out_features, tensors, plain)

    def _tensors(self, name: str, in_features: int, out_features: int, plain: nn.Module | None = None):
        """The tensors of `name`, None (and a problem noted) if they do not fit a layer of these sizes."""
        tensors = {leaf: tensor.to("meta") for leaf, tensor in self.checkpoint.linears[name].items()}
        stored = [size * format.TILE for size in tensors["trellis"].shape[:2]]
        if stored != [format.padded(in_features), format.padded(out_features)]:
            self._problems.append(
                f"{name} is quantized with {stored[0]} x {stored[1]} features, the model's layer has {in_features} x "
                f"{out_features}, which would be {format.padded(in_features)} x {format.padded(out_features)}"
            )
            return None
        if plain is not None and (plain.bias is None) != ("bias" not in tensors):
            has, has_not = ("checkpoint", "model") if plain.bias is None else ("model", "checkpoint")
            self._problems.append(f"{name} has a bias in the {has} and none in the {has_not}")
            return None
        if "bias" in tensors and tensors["bias"].shape[0] not in (out_features, stored[1]):
            self._problems.append(
                f"{name} has a bias of {tensors['bias'].shape[0]} for {out_features} output features"
            )
            return None
        return tensors

    def _stored(self, name: str, side: int) -> int:
        return self.checkpoint.linears[name]["trellis"].shape[side] * format.TILE

    def _split(self, path: str, parts: dict[str, str]) -> Exl3SplitLinear | None:
        parent, _, fused = path.rpartition(".")
        order = next((names for names in FUSED[fused] if set(names) == set(parts)), None)
        if order is None:
            self._problems.append(f"{path}: of its parts the checkpoint has only {', '.join(parts.values())}")
            return None
        names = [parts[part] for part in order]
        plain = self._paths[path]
        sizes = part_sizes(
            plain, self._paths[parent], self.model.config, len(order), [self._stored(name, 1) for name in names]
        )
        if sizes is None:
            self._problems.append(
                f"{', '.join(names)}: their sizes do not make up the {linear_sizes(plain)[1]} of {path}"
            )
            return None
        parts.clear()  # in the order of the rows, for `_add`
        parts.update(zip(order, names))
        layers = {
            part: self._linear(name, linear_sizes(plain)[0], size) for part, name, size in zip(order, names, sizes)
        }
        if None in layers.values() or not self._have_biases(path, plain, names):
            return None
        return Exl3SplitLinear(layers, plain)

    def _have_biases(self, path: str, plain: nn.Module, names: list[str]) -> bool:
        """Whether the parts `names` have biases where `plain`, which they make up, has one; a problem is noted if not."""
        has = ["bias" in self.checkpoint.linears[name] for name in names]
        if has == [plain.bias is not None] * len(names):
            return True
        odd = [name for name, some in zip(names, has) if some is (plain.bias is None)]
        self._problems.append(
            f"{path} has {'no' if plain.bias is None else 'a'} bias, and {', '.join(odd)} in the checkpoint "
            f"{'have one' if plain.bias is None else 'have none'}"
        )
        return False

    def _sliced(self, path: str, parts: dict[int, str]) -> Exl3SlicedLinear | None:
        if sorted(parts) != list(range(len(parts))):
            self._problems.append(f"{path}: of its slices the checkpoint has only {', '.join(parts.values())}")
            return None
        ordered = dict(sorted(parts.items()))
        parts.clear()
        parts.update(ordered)
        plain = self._paths[path]
        sizes = linear_sizes(plain)
        stored = [[self._stored(name, side) for name in parts.values()] for side in (0, 1)]
        side = 0 if stored[0][0] < format.padded(sizes[0]) else 1
        widths = stored[side][:-1]
        widths.append(sizes[side] - sum(widths))
        if not is_linear(plain):  # the slices are groups, each with its own padding
            widths = [sizes[side] // len(parts)] * len(parts)
        layers = []
        for name, width in zip(parts.values(), widths):
            layers.append(self._linear(name, *((width, sizes[1]) if side == 0 else (sizes[0], width))))
        return None if None in layers else Exl3SlicedLinear(layers, plain)

    def _experts(self, path: str, parts: dict[tuple[int, str], str]) -> Exl3Experts | None:
        plain = self._paths[path]
        count, hidden, intermediate = expert_sizes(plain)
        roles = expert_roles(plain)
        found = {EXPERT_ROLES[projection]: projection for _, projection in parts}
        names = {role: found.get(role, role) for role in roles}
        wanted = ((expert, name) for expert in range(count) for name in names.values())
        missing = list(islice((f"{e}.{name}" for e, name in wanted if (e, name) not in parts), 4))
        unknown = [f"{e}.{name}" for e, name in sorted(parts) if e >= count or name not in names.values()]
        if missing or unknown:
            self._problems.append(
                f"{path} has {count} experts with {', '.join(roles)}; the checkpoint lacks {missing} and has {unknown[:4]}"
            )
            return None
        projections = {}
        for role in roles:
            sizes = (intermediate, hidden) if role == "down" else (hidden, intermediate)
            tensors, alike = [], {}
            for name in (parts[expert, names[role]] for expert in range(count)):
                kind = id(self.checkpoint.linears[name])
                alike[kind] = alike.get(kind) or self._tensors(name, *sizes)
                tensors.append(alike[kind])
            projections[role] = None if None in tensors else Exl3Projection(*sizes, tensors)
        ordered = {key: parts[key] for key in ((e, names[role]) for e in range(count) for role in roles)}
        parts.clear()
        parts.update(ordered)
        return None if None in projections.values() else Exl3Experts(projections, plain)

    def _embedding(self, name: str, path: str, tensors) -> Exl3Embedding | None:
        plain = self._paths.get(path)
        if not is_embedding(plain):
            self._problems.append(
                f"{name} is a quantized embedding table, and the model has {type(plain).__name__} at {path}"
            )
            return None
        rows, width = tensors["trellis"].shape[0], tensors["signs"].numel()
        if rows != plain.num_embeddings or not 0 <= width - plain.embedding_dim < format.EMBEDDING_GROUP:
            self._problems.append(
                f"{name} is a quantized embedding table of {rows} x {width}, the model's is {plain.num_embeddings} x "
                f"{plain.embedding_dim}"
            )
            return None
        return Exl3Embedding({leaf: tensor.to("meta") for leaf, tensor in tensors.items()}, plain)

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
            if id(module) not in required or path in self.modules:
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
