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
import os
import re
from typing import TYPE_CHECKING

from ..utils import CONFIG_NAME, is_accelerate_available, is_torch_available, logging
from .base import HfQuantizer
from .quantizers_utils import get_module_from_name


if TYPE_CHECKING:
    from ..modeling_utils import PreTrainedModel
    from ..utils.quantization_config import Exl3Config

if is_torch_available():
    import torch

logger = logging.get_logger(__name__)

# What a config says of weights that were quantized here. Converters fold constants into those of some architectures.
QUANTIZED_HERE = {"quantized_by": "transformers"}
TIED_HEAD = {"tied_head": True}  # to a quantized table, which no converter writes
CALIBRATION = "calibration"  # the field for rows and columns of the data, as converters have it


class Exl3HfQuantizer(HfQuantizer):
    """Loads EXL3 checkpoints, and quantizes float ones to EXL3: while loading them, or with data when they are loaded."""

    requires_calibration = False
    required_packages = ["torch", "accelerate"]
    quantization_config: "Exl3Config"

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.placement = None  # of an EXL3 checkpoint
        self.plan = None  # for a float checkpoint
        self.float_dtype = None
        self.progress = None  # of quantizing
        self.file_names = None  # of a float checkpoint's tensors, and the model's state before modules are replaced
        self.published = None  # what config.json beside the weights says
        self.given_state = None  # what `save_pretrained` was given to write
        self.failure = None  # the error of a parameter that could not be quantized

    @property
    def requires_parameters_quantization(self) -> bool:
        return not self.pre_quantized

    def validate_environment(self, *args, device_map=None, **kwargs):
        if not is_torch_available() or not is_accelerate_available():
            raise ImportError(f"EXL3 needs {' and '.join(self.required_packages)}: `pip install accelerate`.")
        if isinstance(device_map, dict) and not device_map:
            raise ValueError(
                "`device_map` is an empty dict and places nothing: pass `auto`, a device, or leave it out."
            )
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
        if self.requires_parameters_quantization and "meta" in places:
            raise ValueError(
                "`device_map` places weights on the meta device, which has no numbers to quantize: leave it out."
            )
        if self.quantization_config.dataset is not None:
            self._check_data(places)
        if self.requires_parameters_quantization and self.quantization_config.dequantize:
            raise ValueError(
                "`dequantize=True` is for EXL3 checkpoints, and this checkpoint is not quantized: load it without "
                "`quantization_config`."
            )

    def _check_data(self, places: set[str]):
        if self.pre_quantized:
            raise ValueError("`dataset` is for quantizing, and this checkpoint is quantized: leave it out.")
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "A model that is quantized with a `dataset` has to fit in memory as it is, and `device_map` offloads some of it. "
                "Quantize it without `dataset`, or on devices that hold it."
            )

    def update_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        self.float_dtype = dtype
        return dtype

    def update_parallel_plan(self, model, plan):
        asked = getattr(model.config, "distributed_config", None)
        if asked is None or plan is model.ep_plan:
            return  # upstream calls this for the tensor parallel plan first: what is to be done to both is done then
        if self.quantization_config.dataset is not None:
            raise ValueError(
                "A model is quantized with a `dataset` in one process: leave `distributed_config` out, save the model, and load that."
            )
        if asked.pp_size > 1:
            raise ValueError(
                "EXL3 models cannot be distributed by `pp_size`: upstream sends activations between stages in the dtype of a stage's "
                "first parameter, which is an integer here. Use `tp_plan`, `ep_size`, `fsdp_size` or `device_map`."
            )
        if asked.dp_size > 1 and max(asked.tp_size, asked.ep_size) > 1:
            raise ValueError(
                "EXL3 models are distributed by `fsdp_size` or by `tp_plan` and `ep_size`, not by both: use one of them."
            )
        if self.quantization_config.dequantize:
            return  # the model is a plain one
        from ..integrations.exl3.parallel import adapt_expert_plan, adapt_tensor_plan

        dispatched = adapt_expert_plan(model, asked.ep_plan, asked.ep_size) if asked.ep_size > 1 else set()
        if asked.tp_size > 1:
            adapt_tensor_plan(model, asked.tp_plan, asked.tp_size, dispatched)

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs
    ):
        from ..integrations.exl3 import replace_with_exl3_modules
        from ..integrations.exl3.finished import layers
        from ..integrations.exl3.stored import stored_tensors

        path = os.path.join(os.path.dirname((checkpoint_files or [""])[0]), CONFIG_NAME)
        self.published = model.config._dict_from_json_file(path) if checkpoint_files and os.path.isfile(path) else None
        if self.requires_parameters_quantization:
            modules = self._plan(model, kwargs.get("device_map"))
            files = [file for file in checkpoint_files or () if file.endswith(".safetensors")]
            self.file_names = [tensor.name for tensor in stored_tensors(files)], model.state_dict()
        else:
            modules = self._place(model, checkpoint_files)
        if not self.quantization_config.dequantize:
            decoded = self.placement.decoded if self.placement is not None else ()
            replace_with_exl3_modules(model, {path: m for path, m in modules.items() if path not in decoded})
        if self.plan is not None:
            layers().begin(model)

    def _plan(self, model, device_map):
        from ..integrations.exl3.finished import layers
        from ..integrations.exl3.planning import Plan
        from ..integrations.exl3.progress import Progress

        config = self.quantization_config
        # Of a dict that a user wrote.
        config._check_unknown(config.converter_fields.keys() - {*QUANTIZED_HERE, *TIED_HEAD, CALIBRATION})
        for name in (*TIED_HEAD, CALIBRATION):  # of a config that another model was quantized with
            config.converter_fields.pop(name, None)
        config.codebook = config.codebook or "mul1"
        config.converter_fields |= QUANTIZED_HERE
        skip = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        # The default names the last parameter, whose module is meant: a bias as well as a weight.
        self.plan = Plan(model, config, [name.removesuffix(".bias") for name in skip])
        if self.plan.has_tied_head:
            config.converter_fields |= TIED_HEAD
        # The loading report is to name what the files lack of the float model, and not what it is quantized to.
        parts = [part for module in self.plan.modules.values() for part in module.modules()]
        leaves = {name for part in parts for name in getattr(part, "stored", ())} - {"bias"}
        made = rf"\.({'|'.join(sorted(leaves))})$"
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), made}
        self.progress = Progress(self.plan.weights, int(config.bits), config.codebook, config.effort)
        if device_map is None or not torch.accelerator.is_available():
            self.progress.check(layers().device or torch.device("cpu"))  # elsewhere when the first weight is there
        return self.plan.modules

    def _place(self, model, checkpoint_files):
        from ..integrations.exl3.architecture import check_architecture, untie
        from ..integrations.exl3.checkpoint import read_checkpoint
        from ..integrations.exl3.placement import Placement

        if not QUANTIZED_HERE.items() <= self.quantization_config.converter_fields.items():
            check_architecture(model.config)
        if checkpoint_files is None:
            raise ValueError(
                "EXL3 models are loaded from files, not from a `state_dict` alone: upstream does not show it to quantizers, and their "
                "modules are made from the shapes of tensors. Save it to the file model.safetensors "
                "(`safetensors.torch.save_file`) in a folder with the config, and load the folder."
            )
        if not checkpoint_files:
            raise ValueError(
                f"{model.config.name_or_path}: the EXL3 checkpoint has no weights, or its index names none. Download or "
                "convert it again."
            )
        unreadable = [file for file in checkpoint_files if not file.endswith(".safetensors")]
        if unreadable:
            raise ValueError(
                f"EXL3 checkpoints are safetensors files, got {', '.join(unreadable)}: pass their folder or repo."
            )
        checkpoint = read_checkpoint(checkpoint_files)
        if not checkpoint.linears and not checkpoint.embeddings:
            raise ValueError(
                f"The config of this checkpoint says `exl3`, and {', '.join(checkpoint_files)} has no quantized tensor "
                "(`*.trellis`). Remove `quantization_config` from config.json to load it as it is, or convert it again."
            )
        codebook = self.quantization_config.codebook
        if codebook in ("mcg", "mul1") and not any(codebook in tensors for tensors in checkpoint.linears.values()):
            logger.warning(
                f"The config of this checkpoint names the codebook `{codebook}`, and none of its layers has the marker of "
                "that name. They are decoded with the codebook that their tensors tell, `3inst` where they tell none."
            )
        has_tied_head = TIED_HEAD.items() <= self.quantization_config.converter_fields.items()
        self.placement = Placement(checkpoint, model, has_tied_head)
        # Of these the loading report is to be silent: `restore` tells of what matters, and the codes count.
        lacking = [f"^{re.escape(name)}$" for name in self.placement.lacking]
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *lacking}
        superseded = [rf"^{re.escape(owner)}\.\w+$" for owner in {*self.placement.superseded.values()}]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *superseded}
        if self.placement.decoded:
            classes = {type(model.get_submodule(path)).__name__ for path in self.placement.decoded}
            logger.info(
                f"{len(self.placement.decoded)} quantized layers are of classes with a product of their own, or have rows in another order "
                f"in files ({', '.join(classes)}): their weights are dequantized."
            )
        untie(model, self.placement.modules)
        return self.placement.modules

    def update_weight_conversions(self, weight_conversions, model):
        from ..integrations.exl3.loading import Exl3Names, keeping_stored, with_transforms
        from ..integrations.exl3.naming import Exl3FileNames, names_in_files
        from ..integrations.exl3.quantizing import Exl3Failure
        from ..integrations.exl3.stacks import Exl3Stacks

        if self.plan is not None:
            stored = keeping_stored(self.plan.modules, model, weight_conversions)
            names = Exl3Names(self.plan.names, on_loading=False)
            found, state = self.file_names
            prefix, layers = model.base_model_prefix, self.plan.modules
            in_files = names_in_files(found, weight_conversions, prefix, state, layers=layers)
            renamings = [Exl3FileNames(in_files), *weight_conversions, names, Exl3Stacks(self.plan.stacks)]
            return [*renamings, stored, Exl3Failure(self)]
        return with_transforms(weight_conversions, self)

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name in getattr(module, "pending", ()) or bool(self.heads_tied_to(param_name))

    def heads_tied_to(self, param_name: str) -> list[str]:
        """Paths of the output embeddings that are quantized from the parameter `param_name`, the input embeddings."""
        tied_heads = self.plan.tied_heads if self.plan is not None else {}
        return [head for head, source in tied_heads.items() if source == param_name]

    def param_element_size(self, model: "PreTrainedModel", param_name: str, param: "torch.Tensor") -> float:
        module, name = get_module_from_name(model, param_name)
        is_placeholder = name in getattr(module, "pending", ()) and name not in module.stored
        return 0 if is_placeholder and not self.waits_for_data(module) else param.element_size()

    def waits_for_data(self, module: "torch.nn.Module") -> bool:
        """Whether the plain module that `module` stands for is quantized when its inputs arrive."""
        from ..integrations.exl3.embeddings import Exl3Embedding

        return not isinstance(module, Exl3Embedding) and self.quantization_config.dataset is not None

    def get_quantize_ops(self):
        from ..integrations.exl3.quantizing import Exl3Quantize

        return Exl3Quantize(self)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs):
        from ..integrations.exl3.quantizing import finish_modules
        from ..integrations.exl3.restoring import restore

        finish_modules(model, self.progress, self._calibrate_on(model))
        if self.progress is not None:
            self.progress.close()
        if self.placement is not None:
            restore(model, self.placement.lacking)
        self.placement = self.plan = self.progress = self.file_names = None
        return model

    def _calibrate_on(self, model):
        """What quantizes modules of `model` with data, by their paths; None where there is no data."""
        config = self.quantization_config
        if config.dataset is None:
            return None
        from ..integrations.exl3.calibration import calibrate

        def calibrate_at(paths):
            rows, columns = calibrate(model, paths, config, self.progress, self.plan)
            config.converter_fields[CALIBRATION] = {"rows": rows, "cols": columns}

        return calibrate_at

    def dequantize(self, model, dtype=None):
        from ..integrations.exl3.quantizing import dequantize_modules

        # By default upstream takes the dtype out of the config, which `model.to(dtype)` leaves as it was.
        dequantize_modules(model, dtype)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model):
        from ..distributed.utils import is_dtensor
        from ..integrations.exl3.saving import state_with_repeated_layers

        if self.given_state is not None:
            return self.given_state, {}
        if not model.is_distributed_loading_by_transformers and not any(map(is_dtensor, model.parameters())):
            return state_with_repeated_layers(model), {}
        from ..integrations.exl3.parallel import gathered

        return gathered(model, model.should_save_on_this_rank(is_main_process=True)), {}

    @property
    def is_trainable(self) -> bool:
        return True  # adapters; the quantized weights themselves are frozen

    @property
    def is_compileable(self) -> bool:
        return True
