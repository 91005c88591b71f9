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
"""Adapters on quantized models, and quantized models under `torch.compile`."""

import os
import tempfile
import unittest

import torch
from parameterized import parameterized

from transformers import AutoModelForCausalLM
from transformers.integrations.exl3.modules import DequantizedWeight
from transformers.testing_utils import require_accelerate, require_peft, require_torch
from transformers.utils import is_peft_available

from .synthetic import SyntheticCheckpoint
from .tiny_models import tiny_inputs, tiny_model


if is_peft_available():
    from peft import LoraConfig, PeftModel, get_peft_model


@require_torch
@require_accelerate
class Exl3TrainingTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
        checkpoint.quantize_all()
        checkpoint.save(self.folder, checkpoint.tensors)
        self.inputs = tiny_inputs("llama")

    def load(self, dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)

    @parameterized.expand([(torch.float32, False), (torch.bfloat16, True)])
    @require_peft
    def test_adapters_learn(self, dtype, checkpointing):
        model = self.load(dtype)
        self.assertTrue(model.hf_quantizer.is_trainable)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=4))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.assertEqual(len(trained), 2 * 2 * 4)
        optimizer, losses = torch.optim.AdamW(trained, 1e-2), []
        for _ in range(8):
            loss = model(**self.inputs, labels=self.inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        self.assertLess(losses[-1], losses[0] - 0.2)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.assertEqual(
                [name for name in os.listdir(folder) if "safetensors" in name], ["adapter_model.safetensors"]
            )
            other = PeftModel.from_pretrained(self.load(dtype), folder).eval()
        with torch.no_grad():
            self.assertTrue(torch.equal(other(**self.inputs).logits, model.eval()(**self.inputs).logits))
        after = model.unload().state_dict()
        self.assertTrue(all(torch.equal(after[name], value) for name, value in before.items()))

    @require_peft
    def test_adapters_merge_into_the_dequantized_model_and_never_into_a_quantized_weight(self):
        config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(self.load(), config).eval()
        with torch.no_grad():
            expected = model(**self.inputs).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            plain = PeftModel.from_pretrained(self.load().dequantize(), folder)
        with torch.no_grad():
            merged = plain.merge_and_unload()(**self.inputs).logits
        self.assertLess(float((merged - expected).abs().max() / expected.abs().max()), 1e-4)
        for safe in (False, True):
            with self.assertRaisesRegex(
                RuntimeError, r"cannot be merged into it. Make the model plain with `model.dequantize"
            ):
                model.merge_adapter(safe_merge=safe)

    def test_the_dequantized_weight_is_read_only(self):
        layer = self.load().model.layers[0].mlp.up_proj
        weight = layer.weight
        for change in (
            lambda: weight.add_(1),
            lambda: weight.data.copy_(weight),
            lambda: weight.__iadd__(1),
            lambda: weight.__setitem__(0, 1),
            lambda: setattr(weight, "data", torch.zeros(192, 128)),
            lambda: torch.nn.init.zeros_(weight),
        ):
            self.assertRaisesRegex(RuntimeError, "cannot be changed in place", change)
        self.assertIs(type(weight), DequantizedWeight)
        self.assertIs(type(weight + 1), torch.Tensor)
        x = torch.randn(3, 128)
        product = torch.nn.functional.linear(x, weight)
        self.assertIs(type(product), torch.Tensor)
        self.assertLess(float((product - layer(x)).abs().max() / product.abs().max()), 1e-5)

    def test_generates_with_every_kind_of_cache(self):
        model = self.load()
        kwargs = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(self.inputs["input_ids"])}
        expected = model.generate(**self.inputs, **kwargs)
        self.assertEqual(expected.shape, (3, 12))
        static = model.generate(**self.inputs, **kwargs, cache_implementation="static", disable_compile=True)
        self.assertTrue(torch.equal(static, expected))
        self.assertTrue(torch.equal(model.generate(**self.inputs, **kwargs, use_cache=False), expected))
