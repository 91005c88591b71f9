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
"""Training adapters on quantized models, with PEFT and the Trainer."""

import copy
import os
import pickle
import tempfile
import unittest
from unittest.mock import patch

import torch
from parameterized import parameterized
from torch.nn.utils import prune

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import peft as upstreams_peft
from transformers.integrations.exl3 import ops, separate_experts
from transformers.integrations.exl3.experts import Exl3Experts
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.integrations.exl3.weight import DequantizedWeight
from transformers.testing_utils import require_accelerate, require_peft, require_torch
from transformers.utils import is_peft_available

from .synthetic import read_tensors, save_quantized
from .tiny_models import quick_config, tiny_inputs, tiny_model


if is_peft_available():
    from peft import (
        AdaLoraConfig,
        IA3Config,
        LoraConfig,
        PeftModel,
        PrefixTuningConfig,
        PromptTuningConfig,
        get_peft_model,
        prepare_model_for_kbit_training,
    )


@require_torch
@require_accelerate
class Exl3TrainingTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        save_quantized(tiny_model("llama")[0], self.folder)
        self.inputs = tiny_inputs("llama")
        torch.manual_seed(0)  # of the adapters

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
            torch.testing.assert_close(other(**self.inputs).logits, model.eval()(**self.inputs).logits, rtol=0, atol=0)
        after = model.unload().state_dict()
        torch.testing.assert_close({name: after[name] for name in before}, before, rtol=0, atol=0)

    def train(self, model, steps=6, rate=0.03, autocast=False):
        """Train what can be, and return the losses."""
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], rate)
        losses = []
        for _ in range(steps):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model.train()(**self.inputs, labels=self.inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    @parameterized.expand(
        [
            ("all_linear", lambda: LoraConfig(target_modules="all-linear", r=4)),
            ("rslora", lambda: LoraConfig(target_modules=["q_proj", "up_proj"], r=4, use_rslora=True)),
            ("dora", lambda: LoraConfig(target_modules=["q_proj", "up_proj"], r=4, use_dora=True)),
            ("adalora", lambda: AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=10, init_r=4)),
            ("ia3", lambda: IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])),
            ("prompts", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            ("prefixes", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ]
    )
    @require_peft
    def test_other_adapters_learn(self, _, make_config):
        model = self.load()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        peft_model = get_peft_model(model, make_config())
        losses = self.train(peft_model, rate=0.1)
        self.assertLess(losses[-1], losses[0] - 0.02)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            peft_model.save_pretrained(folder)
            other = PeftModel.from_pretrained(self.load(), folder).eval()
            torch.testing.assert_close(
                other(**self.inputs).logits, peft_model.eval()(**self.inputs).logits, rtol=0, atol=0
            )
        after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        torch.testing.assert_close({name: after[name] for name in before}, before, rtol=0, atol=0)

    @parameterized.expand(["pissa", "olora"])
    @require_peft
    def test_adapters_that_start_from_the_weight_and_change_it_are_refused(self, start):
        with self.assertRaisesRegex(RuntimeError, "changed in place.*`model.dequantize"):
            get_peft_model(self.load(), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=start))

    @parameterized.expand(
        [
            ("llama", ["q_proj", "up_proj", "down_proj"]),
            ("gpt2", ["c_attn", "c_fc"]),
            ("phi3", ["q_proj", "v_proj", "up_proj", "o_proj"]),  # parts of fused projections
            ("mixtral", ["q_proj", "expert_gate", "expert_down"]),
            ("qwen3_moe", ["q_proj", "expert_gate", "expert_up"]),
            ("gpt_oss", ["q_proj", "expert_gate", "expert_down"]),
            ("nemotron_h", ["up_proj", "expert_up", "expert_down"]),  # experts without a gate, and a shared one
        ]
    )
    @require_peft
    def test_gradients_are_those_of_the_dequantized_weights(self, name, targets):
        """Of every adapter, of the same values, on the quantized model and on float layers in its stead."""
        source, auto_class = tiny_model(name)
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, quantization_config=quick_config(bits=2))
        inputs, gradients = tiny_inputs(name), []
        config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
        separate_experts(model)
        model = get_peft_model(model, config)
        adapted = [name for name, module in model.named_modules() if name.endswith("base_layer")]
        self.assertTrue(all(isinstance(model.get_submodule(name), Exl3Linear) for name in adapted))
        in_experts = [path for path in adapted if ".experts." in path]
        self.assertEqual(bool(in_experts), any(isinstance(module, Exl3Experts) for module in model.modules()))
        for is_dense in (False, True):
            for path in adapted if is_dense else ():
                model.set_submodule(path, model.get_submodule(path).dequantize(torch.float32).requires_grad_(False))
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            trained = {name: p for name, p in model.named_parameters() if "lora" in name}
            gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
            model.zero_grad()
        self.assertEqual(gradients[0].keys(), gradients[1].keys())
        self.assertGreater(len(gradients[0]), len(adapted))  # some experts see no token
        for name, gradient in gradients[1].items():
            difference = (gradients[0][name] - gradient).abs().max()
            self.assertLess(float(difference), 1e-5 * float(gradient.abs().max()) + 1e-9, name)

    @require_peft
    def test_a_fused_projection_is_adapted_by_its_parts(self):
        source, auto_class = tiny_model("phi3")
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, quantization_config=quick_config(bits=1))
        with self.assertRaisesRegex(
            ValueError, r"Target module Exl3SplitLinear\((.|\n)*q_proj(.|\n)*is not supported"
        ):
            get_peft_model(model, LoraConfig(target_modules=["qkv_proj"]))

    @require_peft
    def test_autocast(self):
        model = get_peft_model(self.load(), LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
        losses = self.train(model, autocast=True)
        self.assertLess(losses[-1], losses[0] - 0.05)
        self.assertEqual({p.dtype for p in model.parameters() if p.requires_grad}, {torch.float32})

    @require_peft
    def test_preparing_for_training_keeps_the_format(self):
        """PEFT casts every float parameter to fp32, the scales too: they are what they were, and are saved as fp16."""
        model = self.load(torch.bfloat16)
        scales = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(("suh", "svh"))}
        model = prepare_model_for_kbit_training(model)
        with torch.no_grad():
            self.assertTrue(model(**self.inputs).logits.isfinite().all())
        peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
        losses = self.train(peft_model)
        self.assertLess(losses[-1], losses[0] - 0.05)
        with tempfile.TemporaryDirectory() as folder:
            peft_model.unload().save_pretrained(folder)
            saved = read_tensors(folder)
            AutoModelForCausalLM.from_pretrained(folder)
        for name, value in scales.items():
            self.assertEqual(saved[name].dtype, torch.float16)
            torch.testing.assert_close(saved[name], value, rtol=0, atol=0)

    @require_peft
    def test_the_trainer(self):
        """It refuses to train the quantized weights, and trains adapters on them."""

        def arguments(folder):
            return TrainingArguments(
                folder,
                max_steps=8,
                per_device_train_batch_size=2,
                learning_rate=0.03,
                report_to=[],
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            )

        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaisesRegex(ValueError, "cannot perform fine-tuning on purely quantized models"):
                Trainer(self.load(), arguments(folder))
            model = get_peft_model(self.load(), LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
            rows = [{"input_ids": row, "labels": row} for row in self.inputs["input_ids"]]
            trainer = Trainer(model, arguments(folder), train_dataset=rows)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            self.assertLess(losses[-1], losses[0] - 0.1)
            trainer.save_model(folder)
            self.assertIn("adapter_model.safetensors", os.listdir(folder))
            self.assertNotIn("model.safetensors", os.listdir(folder))
            other = PeftModel.from_pretrained(self.load(), folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(other(**self.inputs).logits, model.eval()(**self.inputs).logits, rtol=0, atol=0)

    @require_peft
    def test_quantized_layers_are_not_among_modules_to_save(self):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
        with self.assertRaisesRegex(RuntimeError, "cannot be trained, and `modules_to_save`.*`target_modules`"):
            get_peft_model(self.load(), config)
        model = get_peft_model(self.load(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model(**self.inputs, labels=self.inputs["input_ids"]).loss.backward()

    @require_peft
    @patch.object(
        upstreams_peft, "check_peft_version"
    )  # what is done here goes with older versions than upstream asks for, too
    def test_adapters_of_transformers_itself(self, _):
        model = self.load()
        model.add_adapter(LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            self.assertFalse({"model.safetensors", "quantization_config.json"} & set(os.listdir(folder)))
            other = self.load()
            other.load_adapter(folder)
            torch.testing.assert_close(other(**self.inputs).logits, model(**self.inputs).logits, rtol=0, atol=0)
            other.disable_adapters()
            torch.testing.assert_close(other(**self.inputs).logits, self.load()(**self.inputs).logits, rtol=0, atol=0)

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

    @require_peft
    def test_dora_on_layers_with_biases_and_padding(self):
        model, auto_class = tiny_model("qwen2")
        with tempfile.TemporaryDirectory() as folder:
            save_quantized(model, folder, match="k_proj")
            model = auto_class.from_pretrained(folder)
        ids = tiny_inputs("qwen2")["input_ids"]
        expected = model(ids).logits
        peft_model = get_peft_model(model, LoraConfig(target_modules=["k_proj"], use_dora=True, bias="lora_only"))
        logits = peft_model(ids).logits
        torch.testing.assert_close(logits, expected)
        logits.sum().backward()
        self.assertGreater(float(model.model.layers[0].self_attn.k_proj.bias.grad.abs().max()), 0)

    @parameterized.expand(
        [
            ("all_linear", lambda: LoraConfig(target_modules="all-linear"), 0),
            ("adalora", lambda: AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=10), 0),
            (
                "dora",
                lambda: LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True),
                4,
            ),  # the norms of four layers
        ]
    )
    @require_peft
    def test_adapters_are_added_without_decoding_weights(self, _, make_config, decoded):
        model = self.load()
        with patch.object(ops, "dequantize", wraps=ops.dequantize) as decode:
            get_peft_model(model, make_config())
            self.assertEqual(decode.call_count, decoded)

    def test_the_weight_is_decoded_when_its_values_are_needed(self):
        layer = self.load(torch.bfloat16).model.layers[0].mlp.up_proj
        with patch.object(ops, "dequantize", wraps=ops.dequantize) as decode:
            self.assertTrue(hasattr(layer, "weight"))
            weight = layer.weight
            self.assertIs(type(weight), DequantizedWeight)
            self.assertEqual((weight.shape, weight.dtype), ((100, 128), torch.bfloat16))
            self.assertEqual((weight.device, weight.requires_grad), (torch.device("cpu"), False))
            self.assertEqual((weight.numel(), weight.size(0), len(weight), weight.ndim), (100 * 128, 100, 100, 2))
            self.assertIs(weight.requires_grad_(False), weight)
            weight.requires_grad = False
            self.assertIs(weight.data.detach(), weight)
            self.assertEqual(decode.call_count, 0)
            plain = layer.dequantize().weight
            self.assertEqual(decode.call_count, 1)
            for value in (
                weight,
                weight.T.T,
                weight.clone(),
                copy.deepcopy(weight),
                pickle.loads(pickle.dumps(weight)),
            ):
                torch.testing.assert_close(value + 0, plain.detach(), rtol=0, atol=0)
            self.assertEqual(weight.tolist(), plain.tolist())
            self.assertEqual(decode.call_count, 2)

    def test_the_dequantized_weight_is_read_only(self):
        layer = self.load().model.layers[0].mlp.up_proj
        weight, other = layer.weight, torch.zeros(100, 128)
        for change in (
            lambda: weight.add_(1),
            lambda: weight.data.copy_(weight),
            lambda: weight.T.zero_(),
            lambda: weight[0].zero_(),
            lambda: weight.float().view(-1).fill_(0),
            lambda: weight.chunk(2)[1].zero_(),
            lambda: weight.__iadd__(1),
            lambda: weight.__setitem__(0, 1),
            lambda: torch.add(other, 1, out=weight),
            lambda: torch._foreach_add_([other, weight], 1.0),
            lambda: setattr(weight, "data", other),
            lambda: setattr(weight, "grad", other),
            lambda: torch.nn.init.zeros_(weight),
            lambda: weight.requires_grad_(),
            lambda: setattr(weight, "requires_grad", True),
            lambda: torch.nn.Parameter(weight),
            lambda: setattr(layer, "weight", other),
            lambda: setattr(layer, "weight", torch.nn.Parameter(other)),
            lambda: layer.register_parameter("copy", weight),
            lambda: prune.l1_unstructured(layer, "weight", 0.5),
            lambda: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
            lambda: torch.func.functional_call(layer, {"weight": other}, (torch.zeros(1, 128),)),
        ):
            self.assertRaisesRegex(RuntimeError, "replaced or changed in place(.*)dequantize", change)
        torch.testing.assert_close(weight + 0, layer.dequantize().weight.detach(), rtol=0, atol=0)
        self.assertIs(type(weight + 1), torch.Tensor)
        self.assertIs(type(other.copy_(weight)), torch.Tensor)
        x = torch.randn(3, 128)
        product = torch.nn.functional.linear(x, weight)
        self.assertIs(type(product), torch.Tensor)
        self.assertLess(float((product - layer(x)).abs().max() / product.abs().max()), 1e-5)

    def test_operators_beside_python_read_the_weight_and_do_not_change_it(self):
        layer = self.load().model.layers[0].mlp.up_proj

        @torch.jit.script
        def read(x, weight):
            return torch.mm(x, weight.t())

        @torch.jit.script
        def change(weight):
            return weight.mul_(0)

        x = torch.randn(3, 128)
        torch.testing.assert_close(read(x, layer.weight), x @ layer.weight.T, rtol=0, atol=0)
        self.assertRaises(RuntimeError, change, layer.weight)

    def test_generates_with_every_kind_of_cache(self):
        model = self.load()
        kwargs = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(self.inputs["input_ids"])}
        expected = model.generate(**self.inputs, **kwargs)
        self.assertEqual(expected.shape, (3, 12))
        static = model.generate(**self.inputs, **kwargs, cache_implementation="static", disable_compile=True)
        torch.testing.assert_close(static, expected, rtol=0, atol=0)
        torch.testing.assert_close(model.generate(**self.inputs, **kwargs, use_cache=False), expected, rtol=0, atol=0)
