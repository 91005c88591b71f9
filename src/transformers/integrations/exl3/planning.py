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
"""Which modules of a float model are quantized on the fly, into what, and at how many bits."""

from torch import nn

from ...conversion_mapping import get_model_conversion_mapping
from ...core_model_loading import WeightConverter, apply_converters
from ...quantizers.quantizers_utils import should_convert_module
from ...utils import logging
from . import format
from .allocation import PLAIN, allocate_bits, override_bits, table_of_bits
from .architecture import (
    EXPERT_ROLES,
    FUSED,
    expert_roles,
    expert_sizes,
    is_embedding,
    is_experts,
    is_linear,
    linear_sizes,
    part_sizes,
    untie,
)
from .checkpoint import embedding_tensors, linear_tensors
from .embeddings import Exl3Embedding, Exl3TiedHead
from .experts import Exl3Experts, Exl3Projection
from .modules import Exl3Linear, Exl3Module, Exl3SplitLinear
from .selection import selected, stays_plain


logger = logging.get_logger(__name__)


class Plan:
    """
    What to quantize on the fly.

    Args:
        model (`PreTrainedModel`): On the meta device.
        config (`Exl3Config`): Tells bits, overrides, head bits, codebook, and names or patterns of modules to leave as they are.
        skip (`list[str]`): More of these, by upstream's rule: those that it leaves by default, the output embeddings among them.

    Attributes:
        modules (`dict[str, Exl3Module]`): By path in the model, what stands there instead, waiting for float weights.
        names (`dict[str, str]`): Tensor names that checkpoints have for parts of what is fused in the model or in files, to those in the
            model.
        stacks (`dict[str, list[str]]`): Names of stacked tensors in the model, to those that checkpoints have for their entries.
        tied_heads (`dict[str, str]`): Output embeddings to be quantized whose weight is another parameter's: path to name.
        has_tied_head (`bool`): Whether the output embeddings stay tied to the input embeddings, which are quantized.
        weights (`int`): How many weights there are to quantize.
        leaves_choice (`bool`): Whether there is data by which `spend` is to choose rates.

    Raises:
        `ValueError`: Where there is nothing to quantize, a name or an override means no module, or the head cannot be quantized
            as asked for.
    """

    def __init__(self, model, config, skip: list[str]):
        self.model, self.codebook, self._average = model, config.codebook, config.bits
        self._free: dict[str, tuple[str, str]] = {}  # paths and parts, by names, whose rates no override tells
        self.modules: dict[str, Exl3Module] = {}
        self.names: dict[str, str] = {}
        self.stacks: dict[str, list[str]] = {}
        self.tied_heads: dict[str, str] = {}
        self._paths = dict(model.named_modules())
        self._converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
        self._reversed = [converter.reverse_transform() for converter in self._converters]
        self._expert_names = self._names_of_projections()
        sizes, head, left, plain = {}, self._head(), [], stays_plain(model, self._paths, self._converters)
        own = config.modules_to_not_convert or []
        for path, module in self._paths.items():
            if path != head and not should_convert_module(path, skip):
                continue
            if is_experts(module) or (is_linear(module) and path not in plain):
                if path != head:
                    sizes[path] = self._sizes(path)
            elif any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) and hasattr(
                module, "num_experts"
            ):
                left.append(f"{path} ({type(module).__name__})")
        skipped = selected(own, [*self._paths], [*sizes, *([head] if head else [])])
        sizes = {path: parts for path, parts in sizes.items() if any(parts.values()) and path not in skipped}
        if left:
            logger.warning(f"EXL3 knows no layout for these experts, they stay as they are: {', '.join(left)}")
        self.bits = self._bits(sizes, config) if sizes or config.overrides else {}
        if config.head_bits is not None and config.head_bits != 16:
            if head is None:
                raise ValueError(
                    f"`head_bits` is set and {type(model).__name__} has no linear output embeddings. Unset it."
                )
            _check_wanted("head_bits", config, head, skipped)
            if config.head_bits != int(config.head_bits) and self.codebook != "mul1":
                raise ValueError(
                    f"`head_bits` of {config.head_bits} needs the codebook `mul1`, not `{self.codebook}`."
                )
            self.bits[head] = {"": config.head_bits}
            sizes[head] = self._sizes(head)
            self._untie_head(head)
        self.has_tied_head = False
        if config.embedding_bits not in (None, PLAIN):
            embedding = self._embedding(head, config)
            _check_wanted("embedding_bits", config, embedding, selected(own, [*self._paths], [embedding]))
            self.bits[embedding] = {"": config.embedding_bits}
            sizes[embedding] = {"": self._paths[embedding].weight.numel()}
        if not self.bits:
            raise ValueError(
                f"There is nothing to quantize in {type(model).__name__}: no `nn.Linear` or `Conv1D` (no subclass of these) is left "
                f"by `overrides` ({config.overrides}) and `modules_to_not_convert` ({[*own, *skip]}). Load it without "
                "`quantization_config`."
            )
        for path, bits in self.bits.items():
            self.modules[path] = module = self._build(path, bits)
            module.wait_for_plain()
        self.weights = sum(sum(sizes[path].values()) for path in self.bits)
        self._sizes_of = {_join(path, part): size for path in sizes for part, size in sizes[path].items()}
        is_between = format.BITS[0] < config.bits < format.BITS[-1]
        self.leaves_choice = config.dataset is not None and is_between and len(self._free) > 1
        if not self.leaves_choice:
            self._log()

    def spend(self, noises: dict[str, float]):
        """
        Give modules that still wait other rates, with the same average.

        Args:
            noises (`dict[str, float]`): What noise counts, by path and part. Those that lack share the average among themselves.
        """
        known, others = ([unit for unit in self._free if (unit in noises) is is_known] for is_known in (True, False))
        allocated = {}
        for units, counts in ((known, noises), (others, None)):
            sizes = {unit: self._sizes_of[unit] for unit in units}
            allocated |= allocate_bits(sizes, self._average, self.codebook, counts) if sizes else {}
        for unit, rate in allocated.items():
            path, part = self._free[unit]
            self.bits[path][part] = rate
            module = self.modules[path]
            if isinstance(module, Exl3Experts):
                layers = getattr(module, f"stacked_{part}").children()
            else:
                layers = [module.get_submodule(part)]
            for layer in layers:
                layer.bits = rate
        self._log()

    def _log(self):
        rates = {_join(path, part): rate for path, parts in self.bits.items() for part, rate in parts.items()}
        logger.info(f"Quantizing {type(self.model).__name__} to EXL3: {table_of_bits(rates, self._sizes_of)}")

    def _sizes(self, path: str) -> dict[str, int]:
        """How many weights each part of the module at `path` has that can have a rate of its own, empty for itself."""
        module = self._paths[path]
        if is_experts(module):
            count, hidden, intermediate = expert_sizes(module)
            return dict.fromkeys(expert_roles(module), count * hidden * intermediate)
        parts = self._fused_sizes(path)
        into, out = linear_sizes(module)
        return {part: into * size for part, size in parts.items()} if parts else {"": into * out}

    def _bits(self, sizes: dict[str, dict[str, int]], config) -> dict[str, dict[str, float]]:
        """
        Bits per weight of all parts of modules, by path and part: what overrides say, and for all others the average
        `config.bits`.
        """
        units = {_join(path, part): self._names(path, part) for path, parts in sizes.items() for part in parts}
        above = {path.rsplit(".", up)[0] for path in sizes for up in range(path.count(".") + 1)}
        plain = [path for path in self._paths if path and path not in above]
        overridden = override_bits(config.overrides or {}, units, self.codebook, plain)
        self._free = {
            unit: (path, part)
            for path, parts in sizes.items()
            for part in parts
            if (unit := _join(path, part)) not in overridden
        }
        left = {
            path: sum(size for part, size in parts.items() if _join(path, part) not in overridden)
            for path, parts in sizes.items()
        }
        left = {path: size for path, size in left.items() if size}
        allocated = allocate_bits(left, config.bits, self.codebook) if left else {}
        bits = {}
        for path, parts in sizes.items():
            rates = {part: overridden.get(_join(path, part), allocated.get(path)) for part in parts}
            if PLAIN not in rates.values():
                bits[path] = rates
            elif set(rates.values()) != {PLAIN}:
                raise ValueError(
                    f"`overrides` of Exl3Config: of {path} some parts are to be quantized and some are not ({rates}), and it is "
                    "one weight: give all of them 16 or none."
                )
        return bits

    def _names(self, path: str, part: str) -> set[str]:
        """What overrides may call a part of the module at `path`: by its path and by those that files have for the part."""
        module, (parent, _, _) = self._paths[path], path.rpartition(".")
        if not part:
            return {path}
        if not is_experts(module):
            return {path, _join(path, part), _join(parent, part)}
        parameter = "down_proj" if part == "down" else "gate_up_proj" if "gate" in expert_roles(module) else "up_proj"
        names = {parameter, self._expert_names[part], f"{part}_proj", part}
        return {path, *(_join(path, name) for name in names)}

    def _fused_sizes(self, path: str) -> dict[str, int] | None:
        """Output features of the parts of a fused projection, None for any other."""
        parent, _, name = path.rpartition(".")
        if name not in FUSED:
            return None
        parts = FUSED[name][0]
        sizes = part_sizes(self._paths[path], self._paths[parent], self.model.config, len(parts))
        return dict(zip(parts, sizes)) if sizes else None

    def _names_of_projections(self) -> dict[str, str]:
        """What the files of this architecture call the projections of an expert: by role, as `EXPERT_ROLES` has them."""
        in_files = {
            part
            for converter in self._converters
            for source in converter.source_patterns
            for part in source.split(".")
        }
        spelling = ("w1", "w3", "w2") if {"w1", "w2"} <= in_files else ("gate_proj", "up_proj", "down_proj")
        return {EXPERT_ROLES[name]: name for name in spelling}

    def _in_files(self, path: str, parameter: str) -> str:
        """
        What files call the layer or the experts at `path`: where they have what upstream makes `parameter` from in one tensor with
        others, a name beside that.
        """
        stored, _ = apply_converters(f"{path}.{parameter}", self._reversed)
        owner, _, name = stored.removesuffix(".weight").rpartition(".")
        part = path.rpartition(".")[2]
        if is_experts(self._paths[path]):
            return f"{owner}.experts" if name in EXPERT_ROLES and "*" not in owner and owner != path else path
        return f"{owner}.{part}" if any(part in names for names in FUSED.get(name, ())) else path

    def _head(self) -> str | None:
        """Path of the output embeddings, if there are any that can be quantized."""
        head = self.model.get_output_embeddings()
        return next((path for path, module in self._paths.items() if module is head and is_linear(module)), None)

    def _embedding(self, head: str | None, config) -> str:
        """Path of the input embeddings, if they can be quantized."""
        table, kind = self.model.get_input_embeddings(), type(self.model).__name__
        path = next((path for path, module in self._paths.items() if module is table), None)
        if path is None or not is_embedding(table):
            raise ValueError(
                f"`embedding_bits` is set and the input embeddings of {kind} are {type(table).__name__}, no plain table. Unset it."
            )
        tied = self.model.all_tied_weights_keys
        weight = f"{path}.weight"
        group = {weight, tied.get(weight, weight)}
        tied_to = sorted({name for pair in tied.items() if group & {*pair} for name in pair} - {weight})
        if tied_to == [f"{head}.weight"]:
            if config.head_bits is None and self._paths[head].bias is None:
                untie(self.model, [head])
                self.modules[head] = Exl3TiedHead(self._paths[head])
                self.has_tied_head = True
            else:
                self._untie_head(head)
        elif tied_to:
            raise ValueError(
                f"`embedding_bits` is set, and {', '.join(tied_to)} of {kind} are tied to the input embeddings: that is not possible "
                "with a quantized table. Unset it."
            )
        return path

    def _untie_head(self, head: str):
        source = self.model.all_tied_weights_keys.get(f"{head}.weight")
        if source is not None:
            self.tied_heads[head] = source
        untie(self.model, [head])

    def _linear(self, in_features: int, out_features: int, bits: float, bias: bool, plain: nn.Module | None = None):
        return Exl3Linear(
            in_features, out_features, linear_tensors(in_features, out_features, bits, self.codebook, bias), plain
        )

    def _build(self, path: str, bits: dict[str, float]) -> Exl3Module:
        module = self._paths[path]
        if isinstance(module, nn.Embedding):
            return Exl3Embedding(embedding_tensors(module.num_embeddings, module.embedding_dim, bits[""]), module)
        if is_experts(module):
            return self._experts(path, module, bits)
        in_features, out_features = linear_sizes(module)
        bias = module.bias is not None
        sizes = self._fused_sizes(path)
        if sizes:
            layers = {part: self._linear(in_features, size, bits[part], bias) for part, size in sizes.items()}
            for part, layer in layers.items():
                beside = _join(path.rpartition(".")[0], part)
                self.names |= {f"{beside}.{tensor}": f"{path}.{part}.{tensor}" for tensor in layer.stored}
            return Exl3SplitLinear(layers, module)
        layer = self._linear(in_features, out_features, bits[""], bias, module)
        in_files = self._in_files(path, "weight")
        if in_files != path:
            self.names |= {f"{in_files}.{tensor}": f"{path}.{tensor}" for tensor in layer.stored}
        return layer

    def _experts(self, path: str, module: nn.Module, bits: dict[str, float]) -> Exl3Experts:
        count, hidden, intermediate = expert_sizes(module)
        roles = expert_roles(module)
        bias = hasattr(module, "down_proj_bias")
        shapes = {role: (intermediate, hidden) if role == "down" else (hidden, intermediate) for role in roles}
        tensors = {role: linear_tensors(*shapes[role], bits[role], self.codebook, bias) for role in roles}
        projections = {role: Exl3Projection(*shapes[role], [tensors[role]] * count) for role in roles}
        experts = Exl3Experts(projections, module)
        in_files = self._in_files(path, "gate_up_proj" if "gate" in roles else "up_proj")
        for holder, stack in experts.stacks():
            name = self._expert_names[holder.partition(".")[0].removeprefix("stacked_")]
            for leaf in stack.stored:
                self.stacks[f"{path}.{holder}.{leaf}"] = [
                    f"{in_files}.{expert}.{name}.{leaf}" for expert in stack.members
                ]
        return experts


def _check_wanted(option: str, config, path: str, skipped: set[str]):
    """Raise `ValueError` where `option` of `config` asks for what is to be left as it is."""
    if path in skipped:
        raise ValueError(
            f"`{option}` of {getattr(config, option)} asks for {path} to be quantized, and `modules_to_not_convert` "
            f"({config.modules_to_not_convert}) for it to be left as it is. Unset one of them."
        )


def _join(path: str, part: str) -> str:
    return ".".join(name for name in (path, part) if name)
