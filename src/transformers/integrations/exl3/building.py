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
"""Modules of a checkpoint's tensors, in the sizes of the model's own modules that they stand for."""

from itertools import islice

from torch import nn

from . import format
from .architecture import (
    EXPERT_ROLES,
    FUSED,
    expert_roles,
    expert_sizes,
    is_embedding,
    is_linear,
    linear_sizes,
    part_sizes,
)
from .checkpoint import Checkpoint
from .embeddings import Exl3Embedding
from .experts import Exl3Experts, Exl3Projection
from .modules import Exl3Linear, Exl3SlicedLinear, Exl3SplitLinear


class Builder:
    """
    Builds quantized modules on the meta device. What does not fit is None, and a problem is noted.

    Args:
        checkpoint (`Checkpoint`): What the files hold.
        paths (`dict[str, nn.Module]`): The modules of the model by path.
        config (`PreTrainedConfig`): The model's.
        problems (`list[str]`): Where to note what does not fit, a line each.
    """

    def __init__(self, checkpoint: Checkpoint, paths: dict[str, nn.Module], config, problems: list[str]):
        self.checkpoint, self.paths, self.config, self.problems = checkpoint, paths, config, problems

    def linear(self, name: str, in_features: int, out_features: int, plain: nn.Module | None = None):
        """The layer for the tensors of `name`, None (and a problem noted) if they do not fit these sizes."""
        tensors = self.tensors(name, in_features, out_features, plain)
        return None if tensors is None else Exl3Linear(in_features, out_features, tensors, plain)

    def tensors(self, name: str, in_features: int, out_features: int, plain: nn.Module | None = None):
        """The tensors of `name`, None (and a problem noted) if they do not fit a layer of these sizes."""
        tensors = {leaf: tensor.to("meta") for leaf, tensor in self.checkpoint.linears[name].items()}
        stored = [size * format.TILE for size in tensors["trellis"].shape[:2]]
        if stored != [format.padded(in_features), format.padded(out_features)]:
            self.problems.append(
                f"{name} is quantized with {stored[0]} x {stored[1]} features, the model's layer has {in_features} x "
                f"{out_features}, which would be {format.padded(in_features)} x {format.padded(out_features)}"
            )
            return None
        if plain is not None and (plain.bias is None) != ("bias" not in tensors):
            has, has_not = ("checkpoint", "model") if plain.bias is None else ("model", "checkpoint")
            self.problems.append(f"{name} has a bias in the {has} and none in the {has_not}")
            return None
        if "bias" in tensors and tensors["bias"].shape[0] not in (out_features, stored[1]):
            self.problems.append(f"{name} has a bias of {tensors['bias'].shape[0]} for {out_features} output features")
            return None
        return tensors

    def _stored(self, name: str, side: int) -> int:
        return self.checkpoint.linears[name]["trellis"].shape[side] * format.TILE

    def split(self, path: str, parts: dict[str, str]) -> tuple[list[str], Exl3SplitLinear | None]:
        """The layer in parts, which `parts` gives the names of, for the fused projection at `path`, and their names in its order."""
        parent, _, fused = path.rpartition(".")
        order = next((names for names in FUSED[fused] if set(names) == set(parts)), None)
        if order is None:
            self.problems.append(f"{path}: of its parts the checkpoint has only {', '.join(parts.values())}")
            return [*parts.values()], None
        names = [parts[part] for part in order]
        plain = self.paths[path]
        sizes = part_sizes(
            plain, self.paths[parent], self.config, len(order), [self._stored(name, 1) for name in names]
        )
        if sizes is None:
            self.problems.append(
                f"{', '.join(names)}: their sizes do not make up the {linear_sizes(plain)[1]} of {path}"
            )
            return names, None
        layers = {
            part: self.linear(name, linear_sizes(plain)[0], size) for part, name, size in zip(order, names, sizes)
        }
        if None in layers.values() or not self.have_biases(path, plain, names):
            return names, None
        return names, Exl3SplitLinear(layers, plain)

    def have_biases(self, path: str, plain: nn.Module, names: list[str]) -> bool:
        """Whether the parts `names` have biases where `plain`, which they make up, has one; a problem is noted if not."""
        has = ["bias" in self.checkpoint.linears[name] for name in names]
        if has == [plain.bias is not None] * len(names):
            return True
        odd = [name for name, some in zip(names, has) if some is (plain.bias is None)]
        self.problems.append(
            f"{path} has {'no' if plain.bias is None else 'a'} bias, and {', '.join(odd)} in the checkpoint "
            f"{'have one' if plain.bias is None else 'have none'}"
        )
        return False

    def sliced(self, path: str, parts: dict[int, str]) -> tuple[list[str], Exl3SlicedLinear | None]:
        """The layer in slices, which `parts` gives the names of by their numbers, at `path`, and their names in order."""
        names = [parts[number] for number in sorted(parts)]
        if sorted(parts) != list(range(len(parts))):
            self.problems.append(f"{path}: of its slices the checkpoint has only {', '.join(names)}")
            return names, None
        plain = self.paths[path]
        sizes = linear_sizes(plain)
        stored = [[self._stored(name, side) for name in names] for side in (0, 1)]
        side = 0 if stored[0][0] < format.padded(sizes[0]) else 1
        widths = stored[side][:-1]
        widths.append(sizes[side] - sum(widths))
        if not is_linear(plain):  # the slices are groups, each with its own padding
            widths = [sizes[side] // len(parts)] * len(parts)
        layers = []
        for name, width in zip(names, widths):
            layers.append(self.linear(name, *((width, sizes[1]) if side == 0 else (sizes[0], width))))
        return names, None if None in layers else Exl3SlicedLinear(layers, plain)

    def experts(self, path: str, parts: dict[tuple[int, str], str]) -> tuple[list[str], Exl3Experts | None]:
        """The experts at `path`, whose names `parts` gives by expert and projection, and these names in their order."""
        plain = self.paths[path]
        count, hidden, intermediate = expert_sizes(plain)
        roles = expert_roles(plain)
        found = {EXPERT_ROLES[projection]: projection for _, projection in parts}
        names = {role: found.get(role, role) for role in roles}
        wanted = ((expert, name) for expert in range(count) for name in names.values())
        missing = list(islice((f"{e}.{name}" for e, name in wanted if (e, name) not in parts), 4))
        unknown = [f"{e}.{name}" for e, name in sorted(parts) if e >= count or name not in names.values()]
        if missing or unknown:
            self.problems.append(
                f"{path} has {count} experts with {', '.join(roles)}; the checkpoint lacks {missing} and has {unknown[:4]}"
            )
            return [*parts.values()], None
        projections = {}
        for role in roles:
            sizes = (intermediate, hidden) if role == "down" else (hidden, intermediate)
            tensors, alike = [], {}
            for name in (parts[expert, names[role]] for expert in range(count)):
                kind = id(self.checkpoint.linears[name])
                alike[kind] = alike.get(kind) or self.tensors(name, *sizes)
                tensors.append(alike[kind])
            projections[role] = None if None in tensors else Exl3Projection(*sizes, tensors)
        ordered = [parts[expert, names[role]] for expert in range(count) for role in roles]
        return ordered, None if None in projections.values() else Exl3Experts(projections, plain)

    def embedding(self, name: str, path: str, tensors) -> Exl3Embedding | None:
        """The embedding table `name` for the one at `path`, None (and a problem noted) if it is none or of another size."""
        plain = self.paths.get(path)
        if not is_embedding(plain):
            self.problems.append(
                f"{name} is a quantized embedding table, and the model has {type(plain).__name__} at {path}"
            )
            return None
        rows, width = tensors["trellis"].shape[0], tensors["signs"].numel()
        if rows != plain.num_embeddings or not 0 <= width - plain.embedding_dim < format.EMBEDDING_GROUP:
            self.problems.append(
                f"{name} is a quantized embedding table of {rows} x {width}, the model's is {plain.num_embeddings} x "
                f"{plain.embedding_dim}"
            )
            return None
        return Exl3Embedding({leaf: tensor.to("meta") for leaf, tensor in tensors.items()}, plain)
