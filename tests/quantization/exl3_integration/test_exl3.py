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

import copy
import gc
import json
import os
import sys
import tempfile
import types
import unittest
from unittest.mock import patch

from parameterized import parameterized

from transformers import AutoModelForCausalLM, AutoTokenizer, Exl3Config, LlamaConfig, Qwen3MoeConfig
from transformers.quantizers import AutoQuantizationConfig
from transformers.testing_utils import (
    backend_empty_cache,
    require_accelerate,
    require_peft,
    require_torch,
    require_torch_accelerator,
    slow,
    torch_device,
)
from transformers.utils import is_peft_available, is_torch_available


if is_torch_available():
    import torch
    from safetensors.torch import load_file, save_file

    from transformers.integrations import hub_kernels
    from transformers.integrations.exl3 import Exl3Linear, format, search
    from transformers.integrations.exl3.experts import Exl3Experts
    from transformers.integrations.exl3.kernels import cpu, hub

if is_peft_available():
    from peft import LoraConfig, get_peft_model


RATES = [(bits, "mul1") for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)]
RATES += [(bits, codebook) for bits in (1, 2, 4, 8) for codebook in ("mcg", "3inst")]
EXPECTED_VALUES = {
    "3inst": [0.76806640625, -0.91943359375, -2.19921875, -0.158203125],
    "mcg": [1.84375, 0.134521484375, 1.5146484375, 0.85009765625],
    "mul1": [-3.453125, 0.64111328125, -0.5771484375, -0.6513671875],
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def random_tensors(out_features, in_features, bits=4, codebook="mul1"):
    """What a checkpoint has for one layer, with random codes."""
    columns, rows = format.padded(out_features), format.padded(in_features)
    tensors = {
        "trellis": torch.randint(-(2**15), 2**15, (rows // 16, columns // 16, int(16 * bits)), dtype=torch.int16),
        "suh": (0.02 * torch.randn(rows)).half(),
        "svh": torch.randn(columns).sign().half(),
    }
    if codebook in format.MARKERS:
        tensors[codebook] = format.marker(codebook)
    return tensors


def weight_of(tensors, out_features, in_features):
    """The weight that the tensors stand for by the definition of the format."""
    codebook = next((name for name in format.MARKERS if name in tensors), "3inst")
    inner = format.decode(tensors["trellis"], codebook).double()
    weight = format.hadamard(format.hadamard(inner).T) * tensors["suh"] * tensors["svh"][:, None]
    return weight[:out_features, :in_features].float()


class Exl3ConfigTest(unittest.TestCase):
    def test_to_dict(self):
        self.assertEqual(Exl3Config().to_dict(), {"quant_method": "exl3", "bits": 4.0, "codebook": "mul1"})
        config = Exl3Config(bits=2.5, head_bits=6, modules_to_not_convert=["lm_head"], dequantize=True)
        self.assertEqual(config.to_dict()["modules_to_not_convert"], ["lm_head"])
        self.assertNotIn("dequantize", config.to_dict())

    def test_from_dict_keeps_what_converters_wrote(self):
        written = {"quant_method": "exl3", "version": "1.6.5", "bits": 2.53, "calibration": {"rows": 250}, "new": [1]}
        self.assertEqual(AutoQuantizationConfig.from_dict(written).to_dict(), written)

    @parameterized.expand(
        [
            ("bits", 9, ValueError),
            ("bits", "4", TypeError),
            ("head_bits", 4.5, ValueError),
            ("codebook", "x", ValueError),
        ]
    )
    def test_wrong_values_are_errors(self, name, value, error):
        with self.assertRaisesRegex(error, f"`{name}` of Exl3Config"):
            Exl3Config(**{name: value})

    def test_unknown_arguments_are_errors(self):
        with self.assertRaisesRegex(TypeError, "Did you mean `bits`"):
            Exl3Config(bit=4)


@require_torch
class Exl3LinearTest(unittest.TestCase):
    """One layer, against the weight that it stands for."""

    @parameterized.expand(RATES)
    def test_decode_and_multiply(self, bits, codebook):
        torch.manual_seed(0)
        tensors, x = random_tensors(200, 130, bits, codebook), torch.randn(3, 130)
        layer = Exl3Linear(130, 200, tensors)
        torch.testing.assert_close(layer.weight, weight_of(tensors, 200, 130), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-5)

    @parameterized.expand([(1, "mul1"), (2.5, "mul1"), (4, "mcg"), (4, "3inst")])
    def test_encode(self, bits, codebook):
        torch.manual_seed(0)
        tiles = 0.99 * torch.randn(2, 256)
        states = search.search_reference(tiles, bits, codebook)
        trellis = format.pack_states(states[None], bits)
        self.assertEqual(trellis.shape, (1, 2, int(16 * bits)))
        torch.testing.assert_close(format.unpack_states(trellis)[0], states, rtol=0, atol=0)
        values = format.codebook_values(codebook, torch.device("cpu"))[states].float()
        # No code of this rate has an error below 4**-bits for Gaussian weights.
        self.assertLess((values - tiles).square().mean().item(), 1.5 * 4**-bits)

    def test_codebooks(self):
        """Values that the definitions of the codebooks give for four states."""
        states = torch.tensor([0, 1, 4660, 65535])
        for codebook, expected in EXPECTED_VALUES.items():
            values = format.codebook_values(codebook, torch.device("cpu"))[states]
            torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float16), rtol=0, atol=0)

    def test_gradient(self):
        layer = Exl3Linear(130, 200, random_tensors(200, 130))
        x, grad = torch.randn(4, 130, requires_grad=True), torch.randn(4, 200)
        layer(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ layer.weight, rtol=1e-4, atol=1e-4)


@require_torch
@require_accelerate
class Exl3ModelTest(unittest.TestCase):
    """A model with random codes, as a converter would have written it."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder, cls.source = (os.path.join(folder.name, name) for name in ("quantized", "float"))
        torch.manual_seed(0)
        cls.plain, cls.quantized = cls.load(LlamaConfig(**TINY), cls.source, cls.folder)
        cls.ids = torch.tensor([[3, 14, 15, 92, 65, 35]])

    @staticmethod
    def load(config, source, folder):
        """Write a float checkpoint to `source` and one that stands for the same weights to `folder`. Returns both models."""
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        files = [os.path.join(path, "model.safetensors") for path in (source, folder)]
        weights, tensors = load_file(files[0]), {}
        for name, weight in weights.items():
            if name.endswith("_proj.weight"):
                layer = random_tensors(*weight.shape)
                tensors |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in layer.items()}
                weights[name] = weight_of(layer, *weight.shape).contiguous()
            else:
                tensors[name] = weight
        config = copy.deepcopy(config)
        config.quantization_config = {"quant_method": "exl3", "version": "1.6.5", "bits": 4.0, "codebook": "mul1"}
        config.save_pretrained(folder)
        for file, content in zip(files, (weights, tensors)):
            save_file(content, file, metadata={"format": "pt"})
        return (AutoModelForCausalLM.from_pretrained(path) for path in (source, folder))

    def layers(self, model):
        return [name for name, module in model.named_modules() if isinstance(module, Exl3Linear)]

    @torch.no_grad()
    def logits(self, model):
        return model(self.ids.to(model.device)).logits.float().cpu()

    def test_quantized_layers(self):
        names = self.layers(self.quantized)
        self.assertEqual(len(names), 2 * 7)
        self.assertNotIn("lm_head", names)

    def test_logits_are_those_of_the_weights(self):
        torch.testing.assert_close(self.logits(self.quantized), self.logits(self.plain), rtol=1e-3, atol=1e-4)

    def test_quantize_on_the_fly(self):
        if not cpu.is_available():
            self.skipTest("test requires the compiled kernels, since the reference needs minutes")
        config = Exl3Config(bits=6, head_bits=8, modules_to_not_convert=["model.layers.0"])
        model = AutoModelForCausalLM.from_pretrained(self.source, quantization_config=config)
        names = [name for name in self.layers(self.quantized) if ".layers.1." in name]
        self.assertEqual(self.layers(model), [*names, "lm_head"])
        expected = self.logits(self.plain)
        error = (self.logits(model) - expected).square().mean() / expected.square().mean()
        self.assertLess(error.item(), 0.01)

    def test_save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.quantized.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                self.assertEqual(json.load(file)["quantization_config"]["quant_method"], "exl3")
            saved, written = (load_file(os.path.join(path, "model.safetensors")) for path in (folder, self.folder))
        self.assertEqual(saved.keys(), written.keys())
        for name, tensor in written.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0, msg=name)
        torch.testing.assert_close(self.logits(model), self.logits(self.quantized), rtol=0, atol=0)

    def test_generate(self):
        result = self.quantized.generate(self.ids, max_new_tokens=4, do_sample=False)
        self.assertEqual(result.shape, (1, self.ids.shape[1] + 4))

    def test_memory_footprint(self):
        self.assertLess(self.quantized.get_memory_footprint(), 0.6 * self.plain.get_memory_footprint())

    def test_dequantize(self):
        models = [AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=Exl3Config(dequantize=True))]
        models.append(AutoModelForCausalLM.from_pretrained(self.folder).dequantize())
        for model in models:
            self.assertEqual(self.layers(model), [])
            torch.testing.assert_close(self.logits(model), self.logits(self.quantized), rtol=1e-3, atol=1e-4)

    def test_a_missing_tensor_is_an_error(self):
        tensors = load_file(os.path.join(self.folder, "model.safetensors"))
        del tensors["model.layers.1.mlp.up_proj.suh"]
        with tempfile.TemporaryDirectory() as folder:
            self.quantized.config.save_pretrained(folder)
            save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            with self.assertRaisesRegex(ValueError, r"model\.layers\.1\.mlp\.up_proj"):
                AutoModelForCausalLM.from_pretrained(folder)

    def test_experts(self):
        sizes = {**TINY, "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=64)
        with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
            plain, model = self.load(config, source, folder)
        self.assertEqual(sum(isinstance(module, Exl3Experts) for module in model.modules()), 1)
        torch.testing.assert_close(self.logits(model), self.logits(plain), rtol=1e-3, atol=1e-4)

    def test_compile(self):
        self.addCleanup(torch.compiler.reset)
        compiled = torch.compile(self.quantized.forward, fullgraph=True, backend="eager")
        with torch.no_grad():
            logits = compiled(self.ids).logits
        torch.testing.assert_close(logits, self.logits(self.quantized), rtol=1e-4, atol=1e-5)

    @require_peft
    def test_train_adapters(self):
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
        model(self.ids, labels=self.ids).loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.assertEqual(len(trained), 2 * 2 * 2)
        for name, parameter in trained.items():
            self.assertGreater(parameter.grad.abs().sum().item(), 0, name)


@require_torch
class Exl3HubKernelTest(unittest.TestCase):
    """How kernels are asked for. The package that answers is a stand-in."""

    def load(self, get_kernel, enabled=True):
        package = types.ModuleType("kernels")
        package.get_kernel = get_kernel
        with (
            patch.dict(sys.modules, kernels=package),
            patch.object(hub, "is_kernels_available", return_value=True),
            patch.object(hub_kernels, "_kernels_enabled", enabled),
        ):
            return hub.load("kernels-community/exl3-cpu", 7, "cpu")

    def test_the_version_and_the_backend_are_named(self):
        def get_kernel(repository, **kwargs):
            return repository, kwargs["version"], kwargs["backend"], kwargs["trust_remote_code"]

        self.assertEqual(self.load(get_kernel), ("kernels-community/exl3-cpu", 7, "cpu", False))

    def test_what_keeps_it_from_being_loaded_is_told(self):
        def get_kernel(repository, **kwargs):
            raise ConnectionError("no network")

        with self.assertRaisesRegex(FileNotFoundError, "exl3-cpu cannot be loaded: no network"):
            self.load(get_kernel)
        with self.assertRaisesRegex(FileNotFoundError, "USE_HUB_KERNELS"):
            self.load(get_kernel, enabled=False)


@slow
@require_torch_accelerator
@require_accelerate
class Exl3AcceleratorTest(unittest.TestCase):
    model_name = "unsloth/Llama-3.2-1B"
    input_text = "1 2 3 4"
    EXPECTED_OUTPUT = "1 2 3 4 5 6"

    def tearDown(self):
        gc.collect()
        backend_empty_cache(torch_device)
        gc.collect()

    def test_quantize_save_and_generate(self):
        tokenizer = AutoTokenizer.from_pretrained(self.model_name)
        inputs = tokenizer(self.input_text, return_tensors="pt")
        kwargs = {"device_map": torch_device, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(self.model_name, quantization_config=Exl3Config(bits=4), **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
            on_cpu = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for quantized in (model, loaded):
            output = quantized.generate(**inputs.to(torch_device), max_new_tokens=4, do_sample=False)
            self.assertEqual(tokenizer.decode(output[0], skip_special_tokens=True), self.EXPECTED_OUTPUT)
        with torch.no_grad():
            expected = on_cpu(**inputs.to("cpu")).logits.float()
            logits = loaded(**inputs.to(torch_device)).logits.float().cpu()
        self.assertLess(((logits - expected).square().mean().sqrt() / expected.std()).item(), 0.05)
