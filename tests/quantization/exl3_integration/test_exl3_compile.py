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
"""`torch.compile` and `torch.export`: whole models in one graph, and the same outputs as without."""

import io
import tempfile
import unittest

import torch
from parameterized import parameterized
from torch._dynamo import lookup_backend
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from transformers import CompileConfig, Qwen3MoeConfig
from transformers.integrations.exl3.experts import Exl3Experts
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.testing_utils import require_accelerate, require_peft, require_torch, slow
from transformers.utils import is_peft_available

from .synthetic import SyntheticCheckpoint, random_linear
from .tiny_models import MODELS, quick_config, tiny_inputs, tiny_model


if is_peft_available():
    from peft import LoraConfig, get_peft_model


def error(result, expected):
    return float((result - expected).detach().abs().max() / expected.detach().abs().max())


def counting_backend():
    """A backend that runs its graphs as they are, and the list of all graphs that were given to it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    return backend, graphs


@require_torch
@require_accelerate
class Exl3CompileTest(unittest.TestCase):
    def setUp(self):
        torch.compiler.reset()
        self.addCleanup(torch.compiler.reset)

    def load(self, name):
        """The tiny model `name` at two bits, and inputs for it."""
        model, auto_class = tiny_model(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, quantization_config=quick_config(bits=2))
        self.assertTrue(model.hf_quantizer.is_compileable)
        return model, tiny_inputs(name)

    @parameterized.expand(
        ["llama", "gpt2", "phi3", "mixtral", "gpt_oss"]
    )  # each has another module in place of its own
    def test_whole_models_are_one_graph(self, name):
        self.check_one_graph(name)

    @parameterized.expand(["gemma3_text", "bert", "t5", "gemma3"])
    @slow
    def test_more_models_are_one_graph(self, name):
        self.check_one_graph(name)

    @torch.no_grad()
    def check_one_graph(self, name):
        model, inputs = self.load(name)
        expected = model(**inputs)[0]
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
        self.assertLess(error(compiled(**inputs)[0], expected), 1e-6)

    @parameterized.expand(["nemotron_h"])
    @torch.no_grad()
    def test_models_with_experts_compile(self, name):
        model, inputs = self.load(name)
        self.assertTrue(any(isinstance(module, Exl3Experts) for module in model.modules()))
        expected = model(**inputs)[0]
        self.assertLess(error(torch.compile(model.forward, backend="aot_eager")(**inputs)[0], expected), 1e-6)

    @torch.no_grad()
    def test_inputs_of_a_graph_are_as_many_for_any_number_of_experts(self):
        auto_class, config = MODELS["qwen3_moe"]
        inputs = []
        for number in (2, 12):
            model = auto_class.from_config(Qwen3MoeConfig(**config.to_dict() | {"num_experts": number}))
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = SyntheticCheckpoint(model)
                checkpoint.quantize_all("layers.0")
                checkpoint.save(folder, checkpoint.tensors)
                model = auto_class.from_pretrained(folder)
            backend, graphs = counting_backend()
            torch.compile(model.forward, fullgraph=True, backend=backend)(torch.tensor([[3, 4]]), use_cache=False)
            inputs.append(sum(node.op == "placeholder" for node in graphs[0].graph.nodes))
        self.assertEqual(inputs[0], inputs[1])
        self.assertLess(inputs[0], 50)

    @torch.no_grad()
    def test_other_shapes_compile_nothing_anew(self):
        model, _ = self.load("qwen2")
        backend, graphs = counting_backend()
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)
        counts = []
        for shape in ((3, 7), (2, 5), (5, 9), (4, 33), (7, 64)):
            ids = torch.randint(3, 90, shape)
            self.assertLess(error(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits), 1e-6)
            counts.append(len(graphs))
        self.assertEqual(set(counts), {counts[0]})

    def test_generating_compiles_once(self):
        """As `generate` does by itself on accelerators: the prompt runs as it is, each further token through one graph."""
        model, inputs = self.load("qwen2")
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "do_sample": False}
        expected = model.generate(**inputs, max_new_tokens=12)
        backend, graphs = counting_backend()
        config = CompileConfig(backend=backend, fullgraph=True, mode=None)
        config._compile_all_devices = True  # on CPUs, too
        for _ in range(2):
            result = model.generate(**inputs, max_new_tokens=12, cache_implementation="static", compile_config=config)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            self.assertEqual(len(graphs), 1)

    @torch.no_grad()
    def test_exports(self):
        model, _ = self.load("qwen2")
        shapes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=128)}
        inputs = {"input_ids": torch.randint(3, 90, (3, 7)), "use_cache": False}
        program = export(model, (), inputs, strict=False, dynamic_shapes={"input_ids": shapes, "use_cache": None})
        operators = [node.target for node in program.graph.nodes if node.target is torch.ops.exl3.linear.default]
        self.assertEqual(len(operators), 7)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        inputs["input_ids"] = torch.randint(3, 90, (5, 11))
        for exported in (program, torch.export.load(file)):
            self.assertLess(error(exported.module()(**inputs).logits, model(**inputs).logits), 1e-6)

    @torch.no_grad()
    def test_what_reads_the_weight_is_one_graph(self):
        """As adapters like DoRA do."""
        layer, x = Exl3Linear(128, 100, random_linear(100, 128)[0]), torch.randn(3, 128)

        def product(x):
            return torch.nn.functional.linear(x, layer.weight.to(x.dtype)) / layer.weight.norm()

        for graph in (
            torch.compile(product, fullgraph=True, backend="eager"),
            torch.jit.trace(product, (x,)),
            make_fx(product)(x),
        ):
            torch.testing.assert_close(graph(x), product(x), rtol=0, atol=0)

    @require_peft
    def test_training_steps_are_one_graph(self):
        model, inputs = self.load("qwen2")
        config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
        model, gradients = get_peft_model(model, config), []
        for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            step(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
            model.zero_grad()
        self.assertEqual(len(gradients[0]), 2 * 2)
        for name, gradient in gradients[0].items():
            self.assertLess(error(gradients[1][name], gradient), 1e-5, name)

    @parameterized.expand(["llama", "gpt2"])
    @slow
    @torch.no_grad()
    def test_the_default_backend(self, name):
        model, inputs = self.load(name)
        expected = model(**inputs)[0]
        self.assertLess(error(torch.compile(model.forward, fullgraph=True)(**inputs)[0], expected), 1e-5)
