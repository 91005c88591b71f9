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
"""Where a model's memory is: device maps, offload, limits of memory, casts, copies, pickles."""

import copy
import gc
import io
import pickle
import tempfile
import unittest
from contextlib import contextmanager
from unittest import mock

import torch
from parameterized import parameterized
from torch import nn

from transformers import Exl3Config
from transformers.integrations.accelerate import compute_module_sizes
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module
from transformers.quantizers.quantizer_exl3 import Exl3HfQuantizer
from transformers.testing_utils import require_accelerate, require_torch

from .synthetic import read_tensors
from .tiny_models import MODELS, quick_config, tiny_inputs, tiny_model


# Experts, parts of fused projections, tied embeddings, Conv1D, encoder and decoder.
NAMES = ["llama", "llama_tied", "phi3", "mixtral", "gpt2", "t5"]


@torch.no_grad()
def outputs(model, name):
    return model(**tiny_inputs(name))[0]


def transposed(model):
    """Every trellis in another order in memory, `[out/16, in/16, 16K]`, under the same shape."""
    for layer in model.modules():
        if isinstance(layer, Exl3Linear):
            data = layer.trellis.data.transpose(0, 1).contiguous().transpose(0, 1)
            layer.trellis = nn.Parameter(data, requires_grad=False)
    return model


@contextmanager
def recorded_sizes():
    """The sizes in bytes of all modules as upstream estimates them, after the model inside was loaded."""
    sizes, preprocess = {}, Exl3HfQuantizer.preprocess_model

    def recording(quantizer, model, *args, **kwargs):
        preprocess(quantizer, model, *args, **kwargs)
        sizes.update(compute_module_sizes(model, quantizer)[0])

    with mock.patch.object(Exl3HfQuantizer, "preprocess_model", recording):
        yield sizes


@require_torch
@require_accelerate
class Exl3PlacementTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folders = {}

    def folder(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def sources(self, name):
        """A float checkpoint of the model `name`, and the quantized one."""
        if name not in self.folders:
            folders = [tempfile.TemporaryDirectory() for _ in range(2)]
            for folder in folders:
                self.addClassCleanup(folder.cleanup)
            tiny_model(name)[0].save_pretrained(folders[0].name)
            self.load(name, folders[0].name, quantization_config=quick_config(bits=2)).save_pretrained(folders[1].name)
            self.folders[name] = [folder.name for folder in folders]
        return self.folders[name]

    def load(self, name, folder=None, **kwargs):
        return MODELS[name][0].from_pretrained(folder or self.sources(name)[1], dtype=torch.float32, **kwargs)

    def both_ways(self, name, **kwargs):
        """The quantized model, loaded from its checkpoint and made from the float one."""
        yield self.load(name, **kwargs)
        yield self.load(name, self.sources(name)[0], quantization_config=quick_config(bits=2), **kwargs)

    def assert_saves(self, model, name):
        """`model` writes the quantized checkpoint."""
        folder = self.folder()
        model.save_pretrained(folder)
        saved, expected = read_tensors(folder), read_tensors(self.sources(name)[1])
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)

    # Upstream puts both of two tied weights on disk, so of `llama_tied` nothing would be left.
    @parameterized.expand([name for name in NAMES if name != "llama_tied"])
    def test_limits_of_memory(self, name):
        """With a little less memory than a model needs, a part is on disk; it computes and saves the same."""
        expected = outputs(self.load(name), name)
        limit = sum(parameter.nbytes for parameter in self.load(name).parameters()) - 1000
        kwargs = {"device_map": "auto", "max_memory": {"cpu": limit}}
        with mock.patch("transformers.integrations.accelerate.check_tied_parameters_on_same_device"):
            for model in self.both_ways(name, **kwargs, offload_folder=self.folder(), offload_buffers=True):
                self.assertEqual(set(model.hf_device_map.values()), {"cpu", "disk"})
                held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
                self.assertLessEqual(held, limit)
                self.assertTrue(
                    any(p.is_meta for m in model.modules() if isinstance(m, Exl3Module) for p in m.parameters())
                )
                torch.testing.assert_close(outputs(model, name), expected, rtol=0, atol=0)
                self.assert_saves(model, name)
                del model
                gc.collect()

    @parameterized.expand(NAMES)
    def test_sizes_are_estimated_right(self, name):
        """What decides where modules go are the sizes of the quantized ones, whether they are there already or not."""
        for quantized in (True, False):
            kwargs = {} if quantized else {"quantization_config": quick_config(bits=2)}
            with recorded_sizes() as sizes:
                model = self.load(name, self.sources(name)[quantized], **kwargs)
            modules = {path: module for path, module in model.named_modules() if path}
            tied = model.all_tied_weights_keys
            for path, module in modules.items():
                names = {f"{path}.{tensor}": value for tensor, value in module.state_dict().items()}
                held = sum(value.nbytes for tensor, value in names.items() if tensor not in tied)
                held += sum(b.nbytes for n, b in module.named_buffers() if f"{path}.{n}" not in names)
                self.assertEqual(sizes.get(path, 0), held, path)

    def test_explicit_maps(self):
        expected = outputs(self.load("mixtral"), "mixtral")
        parts = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
        layer = "model.layers.0"
        parts |= {f"{layer}.self_attn": "cpu", f"{layer}.mlp.gate": "cpu", f"{layer}.mlp.experts": "disk"}
        parts |= {f"{layer}.input_layernorm": "cpu", f"{layer}.post_attention_layernorm": "disk"}
        for device_map in ("cpu", {"": "cpu"}, torch.device("cpu"), parts):
            for model in self.both_ways("mixtral", device_map=device_map, offload_folder=self.folder()):
                torch.testing.assert_close(outputs(model, "mixtral"), expected, rtol=0, atol=0)
        self.assertTrue(all(p.is_meta for p in model.model.layers[0].mlp.experts.parameters()))
        self.assert_saves(model, "mixtral")

    def test_offloaded_models_are_dequantized_while_loading_only(self):
        kwargs = {"device_map": "auto", "max_memory": {"cpu": 60000}, "offload_folder": self.folder()}
        model = self.load("phi3", **kwargs)
        with self.assertRaisesRegex(
            ValueError, r"is offloaded: load the checkpoint with `Exl3Config\(dequantize=True\)`"
        ):
            model.dequantize()
        expected = outputs(self.load("phi3").dequantize(), "phi3")
        kwargs |= {"offload_folder": self.folder(), "quantization_config": Exl3Config(dequantize=True)}
        plain = self.load("phi3", **kwargs)
        self.assertIn("disk", plain.hf_device_map.values())
        torch.testing.assert_close(outputs(plain, "phi3"), expected, rtol=0, atol=0)

    @parameterized.expand(["cpu_offload", "disk_offload"])
    def test_offload_after_loading(self, how):
        import accelerate

        model = self.load("phi3")
        expected = outputs(model, "phi3")
        arguments = [self.folder()] if how == "disk_offload" else []
        getattr(accelerate, how)(model, *arguments)
        self.assertTrue(all(parameter.is_meta for parameter in model.parameters()))
        torch.testing.assert_close(outputs(model, "phi3"), expected, rtol=0, atol=0)

    def test_casts(self):
        """Whole models are not cast with `half` and `float`, as upstream has it; `to` casts what is not quantized."""
        model = self.load("qwen2")
        expected = outputs(model, "qwen2")
        for cast in (model.half, model.float):
            self.assertRaisesRegex(ValueError, "is not supported for quantized model", cast)
        for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-6)):
            model = self.load("qwen2").to(dtype)
            before = self.load("qwen2")
            for name, module in model.named_modules():
                kept = before.get_submodule(name) if isinstance(module, Exl3Module) else None
                for leaf, parameter in module.named_parameters(recurse=False):
                    self.assertEqual(parameter.dtype, kept._parameters[leaf].dtype if kept is not None else dtype)
            result = outputs(model, "qwen2")
            self.assertEqual(result.dtype, dtype)
            self.assertLess(float((result - expected).norm() / expected.norm()), tolerance)
        self.assertTrue(all(parameter.is_meta for parameter in model.to("meta").parameters()))

    @parameterized.expand([("as_loaded", lambda model: model), ("transposed", transposed)])
    def test_copies_and_pickles(self, _, arrange):
        def saved_whole(model):
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        for name in ("mixtral", "phi3"):
            model = arrange(self.load(name))
            expected = outputs(model, name)
            addresses = {parameter.data_ptr() for parameter in model.parameters()}
            for make in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_whole):
                other = make(model)
                self.assertFalse({parameter.data_ptr() for parameter in other.parameters()} & addresses)
                torch.testing.assert_close(outputs(other, name), expected, rtol=0, atol=0)
                self.assert_saves(other, name)

    def test_the_order_of_a_trellis_in_memory_does_not_matter(self):
        for name in NAMES:
            model = self.load(name)
            expected, size = outputs(model, name), sum(p.nbytes for p in model.parameters())
            transposed(model)
            self.assertTrue(any(not parameter.is_contiguous() for parameter in model.parameters()))
            self.assertEqual(sum(parameter.nbytes for parameter in model.parameters()), size)
            torch.testing.assert_close(outputs(model, name), expected, rtol=0, atol=0)
            self.assert_saves(model, name)
            other = self.load(name)
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(outputs(other, name), expected, rtol=0, atol=0)
            self.assertLess(float((outputs(model.dequantize(), name) - expected).norm() / expected.norm()), 1e-5)

    def test_a_transposed_trellis_is_offloaded(self):
        import accelerate

        for how in ("cpu_offload", "disk_offload"):
            model = transposed(self.load("phi3"))
            expected = outputs(model, "phi3")
            getattr(accelerate, how)(model, *([self.folder()] if how == "disk_offload" else []))
            torch.testing.assert_close(outputs(model, "phi3"), expected, rtol=0, atol=0)

    def test_a_state_is_loaded(self):
        model, other = self.load("mixtral"), self.load("mixtral")
        expected = outputs(model, "mixtral")
        for parameter in other.parameters():
            parameter.data.zero_()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        torch.testing.assert_close(outputs(other, "mixtral"), expected, rtol=0, atol=0)

    def test_the_footprint_is_that_of_the_quantized_tensors(self):
        model = self.load("llama")
        held = [*model.parameters(), *model.buffers()]
        self.assertEqual(model.get_memory_footprint(), sum(tensor.nbytes for tensor in held))
        self.assertLess(model.get_memory_footprint(), tiny_model("llama")[0].get_memory_footprint() / 4)
