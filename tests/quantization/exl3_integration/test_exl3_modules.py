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
"""The modules by themselves: what they compute, how they move, and what they stand for."""

import copy
import pickle
import unittest
from unittest.mock import patch

import torch
from parameterized import parameterized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformers.integrations.exl3 import embeddings, format, grouped, ops
from transformers.integrations.exl3.embeddings import Exl3Embedding
from transformers.integrations.exl3.experts import Exl3Experts, Exl3Projection
from transformers.integrations.exl3.kernels import cpu
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module, Exl3SlicedLinear, Exl3SplitLinear
from transformers.pytorch_utils import Conv1D
from transformers.testing_utils import require_torch

from .synthetic import random_linear, stacked
from .tiny_models import tiny_model


def make(in_features, out_features, bias=True, plain=None, **kwargs):
    values = torch.linspace(-1, 1, out_features) if bias else None
    tensors, weight = random_linear(out_features, in_features, bias=values, **kwargs)
    return Exl3Linear(in_features, out_features, tensors, plain), weight


def error(result, expected):
    return float((result - expected).abs().max() / expected.abs().max())


@require_torch
class Exl3ModulesTest(unittest.TestCase):
    def assert_stands_for(self, module: Exl3Module, x: torch.Tensor):
        """`module` and the plain module that it dequantizes to have the same outputs."""
        plain = module.dequantize(torch.float32)
        self.assertIs(type(plain), type(module.plain))
        self.assertLess(error(module(x), plain(x)), 1e-5)
        return plain

    @parameterized.expand([(128, 128), (200, 130), (1, 300), (384, 1)])
    def test_linear(self, in_features, out_features):
        for bias in (True, False):
            module, weight = make(in_features, out_features, bias)
            x = torch.randn(2, 3, in_features)
            plain = self.assert_stands_for(module, x)
            self.assertEqual((plain.in_features, plain.out_features), (in_features, out_features))
            self.assertLess(error(plain.weight, weight), 1e-6)
            self.assertEqual(plain.bias is not None, bias)
            torch.testing.assert_close(module.weight, plain.weight.data, rtol=0, atol=0)

    @parameterized.expand([(128,), (200,)])
    def test_inputs_of_another_width_are_refused(self, in_features):
        """Also of a width that is stored with the same padding."""
        module, _ = make(in_features, 64)
        for width in (1, 64, in_features - 1, in_features + 1, 256, 2 * in_features):
            if width != in_features:
                with self.assertRaisesRegex(
                    ValueError, rf"\[2, {width}\], the layer has {in_features} input features"
                ):
                    module(torch.ones(2, width))

    def test_few_rows_without_gradients_take_no_operator(self):
        """To the same bytes, and with weights that were replaced, moved in memory or copied."""
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        module, _ = make(200, 130)
        expected = lambda x: ops.linear(x, module.codes, *module.scales, module.stored_bias, module.codebook, 130)  # noqa: E731
        for x in (
            torch.randn(1, 200),
            torch.randn(2, 3, 200).bfloat16(),
            torch.randn(200, 4).half().T,
            torch.randn(200),
        ):
            calls, y = self.called(lambda: module(x))
            self.assertEqual((calls, y.shape, y.dtype), (0, (*x.shape[:-1], 130), x.dtype))
            torch.testing.assert_close(y, expected(x), rtol=0, atol=0)
        others, _ = make(200, 130, seed=1)
        x = torch.randn(1, 200)
        module(x)
        module.trellis.data = others.trellis.data.clone()
        torch.testing.assert_close(module(x), expected(x), rtol=0, atol=0)
        module.suh = nn.Parameter(others.suh.data.float(), requires_grad=False)
        torch.testing.assert_close(module(x), expected(x), rtol=0, atol=0)
        module.stored_bias.data.add_(1)
        torch.testing.assert_close(module(x), expected(x), rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(module)(x), expected(x), rtol=0, atol=0)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), expected(x), rtol=0, atol=0)

    def test_what_watches_sees_the_operator(self):
        module, _ = make(200, 130)
        x = torch.randn(1, 200)

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
                return function(*arguments, **kwargs or {})

        def under(context):
            with context:
                return module(x)

        watchers = {
            "gradients": lambda: module(x.clone().requires_grad_()),
            "a mode": lambda: under(Mode()),
            "a profiler": lambda: under(torch.profiler.profile()),
            "a trace": lambda: torch.jit.trace(module, (x,), check_trace=False),
            "a transform": lambda: torch.func.functionalize(module)(x),
            "more rows": lambda: module(torch.randn(ops.FEW_ROWS + 1, 200)),
        }
        for name, call in watchers.items():
            with self.subTest(name):
                self.assertGreater(self.called(call)[0], 0)

    def called(self, call):
        """How often `call()` calls `ops.linear`, and what it returns."""
        with patch.object(ops, "linear", wraps=ops.linear) as linear:
            result = call()
        return linear.call_count, result

    def test_conv1d(self):
        module, weight = make(192, 130, plain=Conv1D(130, 192))
        plain = self.assert_stands_for(module, torch.randn(2, 192))
        self.assertLess(error(plain.weight, weight.T), 1e-6)

    def test_split(self):
        parts = {name: make(192, size, seed=size)[0] for name, size in (("q", 128), ("k", 64), ("v", 60))}
        module = Exl3SplitLinear(parts, nn.Linear(192, 252))
        self.assert_stands_for(module, torch.randn(5, 192))
        self.assertEqual([name for name, _ in module.named_children()], ["q", "k", "v"])

    @parameterized.expand([(True,), (False,)])
    def test_sliced(self, cuts_input):
        sizes = [(128, 200), (70, 200)] if cuts_input else [(198, 128), (198, 72)]
        slices = [make(*size, bias=not cuts_input or index == 0, seed=index)[0] for index, size in enumerate(sizes)]
        module = Exl3SlicedLinear(slices, nn.Linear(198, 200))
        self.assertEqual(module.cuts_input, cuts_input)
        self.assert_stands_for(module, torch.randn(5, 198))

    def experts(self, name, other_bits=None):
        """A model's own experts, and quantized ones in their place, the last at `other_bits`."""
        model, _ = tiny_model(name)
        own = [
            module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "num_experts")
        ][0]
        own.config._experts_implementation = "eager"
        hidden, has_bias = 128, hasattr(own, "down_proj_bias")
        width = own.down_proj.numel() // (own.num_experts * hidden)
        roles = ("gate", "up", "down") if hasattr(own, "gate_up_proj") else ("up", "down")
        shapes = {role: (width, hidden) if role == "down" else (hidden, width) for role in roles}
        layers = [
            {
                role: make(
                    *shapes[role],
                    has_bias,
                    seed=10 * e + len(role),
                    bits=other_bits if other_bits and e == own.num_experts - 1 else 4,
                )[0]
                for role in roles
            }
            for e in range(own.num_experts)
        ]
        return own, stacked(layers, own)

    @parameterized.expand(["mixtral", "gpt_oss", "nemotron_h"])
    def test_experts(self, name):
        """Gated, gated with interleaved columns, biases and a transposed layout, and without a gate."""
        own, module = self.experts(name)
        hidden = 128
        plain = module.dequantize(torch.float32)
        self.assertEqual(
            {k: v.shape for k, v in plain.named_parameters()}, {k: v.shape for k, v in own.named_parameters()}
        )
        tokens = 11
        x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 2)
        index = torch.stack([torch.randperm(own.num_experts)[:2] for _ in range(tokens)])
        self.assertLess(error(module(x, index, weights), plain(x, index, weights)), 1e-5)
        # The sentinel of expert parallelism, and experts that no token is routed to.
        nobody = torch.full_like(index, own.num_experts)
        torch.testing.assert_close(module(x, nobody, weights), torch.zeros_like(x), rtol=0, atol=0)
        torch.testing.assert_close(module(x, -1 - index, weights), torch.zeros_like(x), rtol=0, atol=0)
        for narrow in (x[:, :-1], torch.randn(100, hidden - 1)):
            with self.assertRaisesRegex(ValueError, f"{hidden - 1}"):
                module(narrow, index[:1].expand(len(narrow), -1), torch.ones(len(narrow), 2))
        only = torch.zeros_like(index[:, :1])
        alone = module(x, only, weights[:, :1])
        self.assertLess(error(alone, plain(x, only, weights[:, :1])), 1e-5)
        self.assertLess(error(module(x[3:4], only[3:4], weights[3:4, :1]), alone[3:4]), 1e-5)
        self.assertEqual(module(x[:0], index[:0], weights[:0]).shape, (0, hidden))

    @parameterized.expand(
        [(name, dtype) for name in ("mixtral", "gpt_oss", "nemotron_h") for dtype in ("float32", "bfloat16")]
    )
    def test_experts_take_three_calls_of_the_kernel(self, name, dtype):
        """To the same bytes as the operators, with several kinds of stacks, and with tensors that were replaced."""
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        own, module = self.experts(name, other_bits=2)
        x, weights = torch.randn(20, 128, dtype=getattr(torch, dtype)), torch.rand(20, 3)
        by_operators = patch.object(Exl3Experts, "_directly", lambda *_: None)
        for tokens in (1, 2, 20):
            index = torch.stack([torch.randperm(own.num_experts + 1)[:3] for _ in range(tokens)])
            inputs = x[:tokens], index, weights[:tokens]
            with by_operators:
                expected = module(*inputs)
            with patch.object(cpu.kernels(), "_call", wraps=cpu.kernels()._call) as call:
                torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=0)
            names = [arguments[0] for arguments, _ in call.call_args_list]
            self.assertEqual(names, ["exl3_grouped_linear"] * 2 + ["exl3_mix"])
        module.stacked_up.get_submodule("0").trellis.data = module.stacked_up.get_submodule("0").trellis.data.flip(0)
        changed = module(*inputs)
        self.assertGreater(error(changed, expected), 1e-3)
        with by_operators:
            torch.testing.assert_close(changed, module(*inputs), rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(module)(*inputs), changed, rtol=0, atol=0)

    def test_experts_with_more_rows_than_the_kernel_is_fast_for(self):
        """Those in fp32 go through matrix products of decoded weights."""
        own, module = self.experts("mixtral")
        tokens = ops.FEW_ROWS + 2
        x, index, weights = torch.randn(tokens, 128), torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1)
        with patch.object(ops, "multiply_in_strips", wraps=ops.multiply_in_strips) as products:
            y = module(x, index, weights)
        self.assertEqual(products.call_count, 3)
        self.assertLess(error(y[:5], module(x[:5], index[:5], weights[:5])), 1e-5)

    def test_each_thread_is_given_the_weights_of_its_own_tensors(self):
        """Another thread's turn comes while a stack is packed."""
        if not cpu.is_available():
            self.skipTest("the compiled kernels are missing")
        stack = self.experts("mixtral")[1].stacked_up.get_submodule("0")
        own = [stack.trellis, stack.suh, stack.svh]
        others, sizes = [tensor.detach().clone() for tensor in own], (stack.in_features, stack.out_features)
        packed, other = grouped.PackedStack(), []

        kind = cpu.kernels().Stack

        def switch(*args):
            if not other:
                other.append(None)
                other[0] = packed(*others, None, stack.codebook, *sizes)
            return kind(*args)

        with patch.object(cpu.kernels(), "Stack", switch):
            found = packed(*own, None, stack.codebook, *sizes)
        for tensors, stacks in ((own, found), (others, other[0])):
            self.assertEqual(stacks._constant, cpu.kernels().Stack(*tensors, None, stack.codebook, *sizes)._constant)

    @parameterized.expand(["float32", "bfloat16"])
    def test_outputs_of_many_tokens_are_added_up_in_one_order(self, dtype):
        """Whether the result is all that is asked for, or gradients, too."""
        own, module = self.experts("mixtral")
        x, weights = torch.randn(37, 128, dtype=getattr(torch, dtype)), torch.rand(37, 3)
        index = torch.stack([torch.randperm(own.num_experts + 1)[:3] for _ in range(37)])
        alone = module(x, index, weights)
        differentiated = module(x, index, weights.requires_grad_())
        torch.testing.assert_close(differentiated.detach(), alone, rtol=0, atol=0)

    def test_hooks_gradients_and_adapters_see_the_experts_of_one_token(self):
        own, module = self.experts("mixtral")
        x, index, weights = torch.randn(1, 128), torch.tensor([[0, 1]]), torch.rand(1, 2)
        expected = module(x, index, weights)
        seen = []
        stack = module.stacked_down.get_submodule("0")
        everywhere = lambda hook: nn.modules.module.register_module_forward_hook(  # noqa: E731
            lambda called, *_: hook() if called in (module.stacked_up, stack) else None
        )
        for register, times in (
            (stack.register_forward_hook, 1),
            (module.stacked_up.register_forward_pre_hook, 1),
            (everywhere, 2),
        ):
            handle = register(lambda *_: seen.append("hook"))
            torch.testing.assert_close(module(x, index, weights), expected, rtol=0, atol=0)
            handle.remove()
            self.assertEqual(seen, ["hook"] * times)
            seen.clear()
        y = module(x.requires_grad_(), index, weights)
        y.sum().backward()
        self.assertTrue(x.grad.abs().sum() > 0)
        module.separate()
        getattr(module, "0").expert_up = nn.Linear(128, own.down_proj.shape[-1])
        self.assertGreater(error(module(x, index, weights), expected), 1e-3)

    @parameterized.expand(["gate", "up", "down"])
    def test_a_bias_of_experts_has_gradients_when_it_alone_does(self, role):
        own, module = self.experts("gpt_oss")
        bias = getattr(module, f"stacked_{role}").get_submodule("0").bias
        bias.requires_grad_()
        inputs = torch.randn(1, 128), torch.tensor([[0, 1]]), torch.rand(1, 2)
        y = module(*inputs)
        y.sum().backward()
        self.assertEqual((bias.grad.abs().sum(1) > 0).nonzero().flatten().tolist(), [0, 1])
        with torch.no_grad():
            torch.testing.assert_close(module(*inputs), y.detach(), rtol=0, atol=0)

    def test_whatever_watches_sees_the_operator_of_experts(self):
        projection = Exl3Projection(128, 128, [random_linear(128, 128, seed=seed)[0] for seed in range(3)])
        x, ranges = torch.randn(4, 128), torch.tensor([[0, 1], [1, 1], [1, 4]])
        seen = []

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func.name())
                return func(*args, **(kwargs or {}))

        alone = projection(x, ranges)
        with Watching():
            watched = projection(x, ranges)
        self.assertEqual(seen.count("exl3::grouped_linear"), 1)
        torch.testing.assert_close(watched, alone, rtol=0, atol=0)
        differentiated = projection(x.requires_grad_(), ranges)
        torch.testing.assert_close(differentiated, alone, rtol=0, atol=0)
        differentiated.sum().backward()
        self.assertTrue(x.grad.abs().sum(1).all())

    def test_the_number_of_modules_and_tensors_is_that_of_kinds_and_not_of_experts(self):
        layer, other = (random_linear(128, 128, bits=bits)[0] for bits in (2, 3))
        for count in (4, 64):
            for layers, kinds in (([layer] * count, 1), ([layer] * (count - 1) + [other], 2)):
                module = Exl3Experts({role: Exl3Projection(128, 128, layers) for role in ("up", "down")}, nn.Module())
                self.assertEqual(len(list(module.modules())), 1 + 2 * (1 + kinds))
                self.assertEqual(len(list(module.parameters())), 2 * 3 * kinds)

    def test_embedding(self):
        signs = torch.randn(2, 256).sign().half()
        trellis = torch.randint(-(1 << 15), 1 << 15, (30, 2 * (1 + 16 * 4))).to(torch.int16)
        trellis.view(30, 2, 65)[..., 0] = torch.tensor(0.25).half().view(torch.int16)
        module = Exl3Embedding({"trellis": trellis, "signs": signs}, nn.Embedding(30, 320, padding_idx=29))
        ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
        plain = self.assert_stands_for(module, ids)
        self.assertEqual(plain.padding_idx, 29)
        self.assertEqual(module(ids[:, :0]).shape, (2, 0, 320))
        whole = module.dequantized("weight")
        with patch.object(embeddings, "EMBEDDING_STRIP_ELEMENTS", 29 * 512):  # a strip of 29 rows, and one of one
            torch.testing.assert_close(module.decode_into(torch.full_like(whole, torch.nan)), whole, rtol=0, atol=0)
        torch.testing.assert_close(module.bfloat16().state_dict()["signs"], signs, rtol=0, atol=0)

    def test_casting_and_moving_keep_the_format(self):
        module, _ = make(128, 128)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for cast in (module.half, module.float, module.bfloat16, lambda: module.to("cpu", torch.float64)):
            after = cast().state_dict()
            torch.testing.assert_close(dict(after), before, rtol=0, atol=0)
        self.assertTrue(all(parameter.is_meta for parameter in module.to("meta").parameters()))

    @parameterized.expand([(True,), (False,)])
    def test_a_module_is_trained_or_not_as_the_plain_one(self, training):
        module, _ = make(128, 128, plain=nn.Linear(128, 128).train(training))
        self.assertEqual(module.training, training)
        self.assertEqual(module.dequantize().training, training)
        self.assertEqual(module.train(not training).dequantize().training, not training)

    def test_copies_and_pickles(self):
        for module in (make(128, 130)[0], Exl3SplitLinear({"a": make(128, 130)[0]}, nn.Linear(128, 130))):
            x = torch.randn(3, 128)
            for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
                self.assertFalse(
                    {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}
                )

    def test_legacy_signs_and_unsigned_words(self):
        tensors, weight = random_linear(100, 200, signs=("su", "sv"))
        module = Exl3Linear(200, 100, tensors)
        self.assertLess(error(module.weight, weight), 1e-6)
        tensors["trellis"] = tensors["trellis"].view(torch.uint16)
        torch.testing.assert_close(Exl3Linear(200, 100, tensors).weight, module.weight, rtol=0, atol=0)

    def test_gradients_pass_through(self):
        module, weight = make(130, 200)
        x, g = torch.randn(4, 130, requires_grad=True), torch.randn(4, 200)
        module(x).backward(g)
        self.assertLess(error(x.grad, g @ weight), 1e-5)
        self.assertFalse(any(parameter.requires_grad for parameter in module.parameters()))

    def test_the_gradient_is_that_of_the_function(self):
        module, _ = make(130, 200, bits=2)
        x = torch.randn(2, 130, dtype=torch.float64, requires_grad=True)
        # A linear function: large steps, which the rounding of float32 is small beside, are as good as small ones.
        self.assertTrue(torch.autograd.gradcheck(module, (x,), eps=1.0, atol=1e-4))

    def test_the_weight_cannot_be_assigned(self):
        module, _ = make(128, 128)
        with self.assertRaisesRegex(RuntimeError, "pruned, replaced or changed in place"):
            module.weight = nn.Parameter(torch.zeros(128, 128))

    def test_the_bias_is_read_as_it_goes_with_the_weight(self):
        module, _ = make(128, 130)
        x = torch.randn(3, 128)
        self.assertLess(error(nn.functional.linear(x, module.weight, module.bias), module(x)), 1e-5)
        module.bfloat16()
        self.assertEqual((module.bias.dtype, module.bias.shape), (torch.bfloat16, (130,)))
        with self.assertRaisesRegex(RuntimeError, "changed in place"):
            module.bias.data.add_(1)
        module.bias.requires_grad = True
        (module.bias.float() * torch.arange(130)).sum().backward()
        torch.testing.assert_close(module.bias.grad[:130], torch.arange(130).half())
        self.assertIs(module.bias.grad, module.get_parameter("stored_bias").grad)
        self.assertIs(module.half()._parameters["bias"].dtype, torch.float16)

    def test_representation_tells_bits_and_codebook(self):
        module, _ = make(128, 130, bits=2.5)
        self.assertIn("in_features=128, out_features=130, bias=True, bits=2.5, codebook=mul1", repr(module))

    def test_state_is_what_a_checkpoint_has(self):
        for codebook in format.CODEBOOKS:
            tensors, _ = random_linear(130, 128, bits=3, codebook=codebook)
            state = Exl3Linear(128, 130, tensors).state_dict()
            self.assertEqual(state.keys(), tensors.keys())
