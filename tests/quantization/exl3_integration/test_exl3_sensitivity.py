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

import itertools
import tempfile
import unittest
from unittest import mock

import torch
from parameterized import parameterized

from transformers import Exl3Config
from transformers.integrations.exl3 import calibration, sensitivity
from transformers.integrations.exl3.allocation import allocate_bits
from transformers.integrations.exl3.calibration import _arguments
from transformers.integrations.exl3.experts import Exl3StackedLinear
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.integrations.exl3.planning import Plan
from transformers.testing_utils import require_accelerate, require_torch
from transformers.utils import logging

from .tiny_models import tiny_model


SHOWN = logging.get_logger("transformers.integrations.exl3.sensitivity")
PLANNED = logging.get_logger("transformers.integrations.exl3.planning")


def some_ids(rows, length):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(2))


def measured(model, ids, seed=0):
    """The plan of a float model, and what is measured of it."""
    plan = Plan(model, Exl3Config(bits=3, dataset=ids.tolist()), ["lm_head"])
    return plan, sensitivity.sensitivities(model, plan.modules, lambda some: _arguments(model, some), ids, seed)


def weights_of(model, plan, unit):
    """Views of the float weights of a path, or of a part of it."""
    path = next(path for path in plan.modules if unit == path or unit.startswith(f"{path}."))
    part = unit[len(path) + 1 :]
    for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
        for layer, leaf, view in plan.modules[path].plain_views(name, parameter.data):
            if leaf == "weight" and part in ("", layer, layer.rpartition("_")[2]):
                yield view


def noise(weight, generator):
    """As much as there is weight, of variances that go with the norms of rows and of columns."""
    rows, columns = (weight.square().sum(dim).sqrt() for dim in (1, 0))
    variances = torch.outer(rows, columns)
    variances *= weight.square().sum() / variances.sum()
    return variances.sqrt() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


@require_torch
@require_accelerate
class Exl3SensitivityTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("llama", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"),
            ("gpt2", "transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_proj"),
            ("phi3", "model.layers.0.self_attn.qkv_proj.v_proj", "model.layers.0.mlp.gate_up_proj.up_proj"),
            ("mixtral", "model.layers.0.mlp.experts.gate", "model.layers.0.mlp.experts.down"),
            ("t5", "encoder.block.0.layer.0.SelfAttention.v", "decoder.block.0.layer.2.DenseReluDense.wi"),
            ("bert", "encoder.layer.0.attention.output.dense"),
        ]
    )
    @torch.no_grad()
    def test_it_is_the_divergence_that_noise_makes(self, name, *units):
        """Of texts of one token: what an error does through other tokens' attention depends on how it goes with theirs."""
        model = tiny_model(name)[0].eval()
        ids, size, draws, generator = some_ids(2048, 1), 0.03, 4, torch.Generator().manual_seed(0)
        plan, *found = measured(model, ids)
        found += [measured(model, ids, seed)[1] for seed in range(1, draws)]
        expected = model(**_arguments(model, ids))
        for unit in units:
            weights = list(weights_of(model, plan, unit))
            total = 0.0
            for _ in range(draws):
                added = [size * noise(weight, generator) for weight in weights]
                for weight, error in zip(weights, added):
                    weight += error
                output = model(**_arguments(model, ids))
                for weight, error in zip(weights, added):
                    weight -= error
                if "logits" in output:
                    a, b = (o.logits.double().log_softmax(-1) for o in (expected, output))
                    total += float((a.exp() * (a - b)).sum()) / draws
                else:
                    total += float((expected[0] - output[0]).square().sum()) / 2 / draws
            mean = sum(one[unit] for one in found) / draws
            self.assertLess(abs(mean * size**2 / 2 / total - 1), 0.15, unit)

    @parameterized.expand(["llama", "gpt2", "phi3", "mixtral", "t5", "bert", "nemotron_h", "gemma3"])
    def test_all_that_text_reaches_is_measured(self, name):
        plan, found = measured(tiny_model(name)[0], some_ids(2, 9))
        unseen = {unit for unit in plan._free if unit not in found}
        self.assertFalse({unit for unit in unseen if "vision" not in unit and "pooler" not in unit}, unseen)
        self.assertEqual(bool(unseen), name in ("bert", "gemma3"))

    def test_the_model_is_left_as_it_was(self):
        for name in ("llama", "mixtral"):
            model, _ = tiny_model(name)
            trained = next(model.parameters()).requires_grad_(True)
            modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
            plan, found = measured(model, some_ids(2, 8))
            self.assertEqual(measured(model, some_ids(2, 8))[1], found)
            self.assertNotEqual(measured(model, some_ids(2, 8), seed=1)[1], found)
            self.assertEqual([p.requires_grad for p in model.parameters()], flags)
            self.assertIsNone(trained.grad)
            self.assertTrue(all(a is b for a, b in itertools.zip_longest(model.modules(), modules)))
            self.assertFalse([module for module in model.modules() if module._forward_hooks])
            for module in plan.modules.values():
                self.assertFalse([child for child in module._modules if child.isdecimal()])

    @parameterized.expand(
        [
            (16, 512, [1] * 4),
            (3, 2048, [1] * 3),
            (64, 128, [4] * 4),
            (200, 9, [56, 56, 56, 32]),
            (300, 9, [56] * 4 + [3]),
        ]
    )
    def test_as_much_is_read_as_suffices_and_from_all_of_the_text(self, rows, length, batches):
        ids = torch.arange(rows)[:, None].expand(rows, length)
        some = sensitivity._some(ids)
        self.assertEqual([len(batch) for batch in some], batches)
        read = torch.cat(some)
        self.assertLessEqual(read.numel(), sensitivity.TOKENS)
        self.assertEqual((read.shape[1], int(read[0, 0])), (min(length, 512), 0))
        self.assertGreaterEqual(int(read[-1, 0]), 0.7 * (rows - 1))


@require_torch
class Exl3SpendingTest(unittest.TestCase):
    def test_bits_go_where_they_take_most(self):
        """Held to all ways to spend them."""
        generator = torch.Generator().manual_seed(0)
        rates = (1, 2, 3, 4, 5, 6, 7, 8)
        for _ in range(5):
            noises = dict(zip("abcd", (torch.randn(4, generator=generator) * 2).exp().tolist()))
            sizes = dict.fromkeys("abcd", 1 << 14)
            found = allocate_bits(sizes, 3, "mcg", noises)
            self.assertEqual(sum(found.values()), 12)

            def counts(given):
                return sum(noise * 4.0**-rate for noise, rate in zip(noises.values(), given))

            best = min(counts(given) for given in itertools.product(rates, repeat=4) if sum(given) <= 12)
            self.assertAlmostEqual(counts(found.values()), best)

    def test_small_groups_cost_less(self):
        sizes = {"large": 1 << 20, "small": 1 << 14}
        allocated = allocate_bits(sizes, 3, "mul1", dict.fromkeys(sizes, 7.0))
        self.assertEqual(allocated["large"], 2.5)
        self.assertGreater(allocated["small"], 5)


@require_torch
@require_accelerate
class Exl3SpentTest(unittest.TestCase):
    def quantized(self, name, folder, **arguments):
        model, auto_class = tiny_model(name)
        model.save_pretrained(folder)
        arguments = {"bits": 2, "effort": "fast", "dataset": some_ids(8, 16).tolist(), **arguments}
        return auto_class.from_pretrained(folder, quantization_config=Exl3Config(**arguments))

    @staticmethod
    def rates(model):
        return {
            path: module.bits
            for path, module in model.named_modules()
            if isinstance(module, (Exl3Linear, Exl3StackedLinear))
        }

    @parameterized.expand([("llama", 2), ("phi3", 2.3), ("mixtral", 3), ("gpt2", 2)])
    def test_layers_have_the_rates_that_are_logged_and_the_average_that_is_asked_for(self, name, bits):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
            with self.assertLogs(PLANNED, "INFO") as logs:
                model = self.quantized(name, folder, bits=bits)
            model.save_pretrained(saved)
            again = type(model).from_pretrained(saved)
        self.assertEqual(len(logs.output), 1)  # rates before they are measured are of no interest
        for path, rate in self.rates(model).items():
            layer = model.get_submodule(path)
            self.assertEqual(layer.trellis.shape[-1], 16 * rate)
            self.assertEqual(again.get_submodule(path).bits, rate)
        self.assertGreater(len(set(self.rates(model).values())), 1)
        layers = [model.get_submodule(path) for path in self.rates(model)]
        sizes = [len(getattr(m, "members", "1")) * m.in_features * m.out_features for m in layers]
        average = sum(m.bits * size for m, size in zip(layers, sizes)) / sum(sizes)
        self.assertLessEqual(average, bits)
        self.assertGreater(average, bits - 0.2)
        self.assertIn(f"{average:.4g} bits on average", logs.output[0])
        self.assertEqual(model.config.quantization_config.bits, bits)

    def test_overrides_heads_and_what_is_not_read_keep_their_rates(self):
        with tempfile.TemporaryDirectory() as folder:
            rates = self.rates(self.quantized("llama", folder, head_bits=5, overrides={"*.o_proj": 6}))
            self.assertEqual(rates.pop("lm_head"), 5)
            self.assertEqual({rate for path, rate in rates.items() if path.endswith("o_proj")}, {6})
            self.assertGreater(len({rate for path, rate in rates.items() if not path.endswith("o_proj")}), 1)
            rates = self.rates(self.quantized("gemma3", folder))
            self.assertEqual({rate for path, rate in rates.items() if "vision" in path}, {2})
            self.assertNotEqual({rate for path, rate in rates.items() if "vision" not in path}, {2})

    @parameterized.expand([("one", {"overrides": {"*": 2}}), ("lowest", {"bits": 1}), ("highest", {"bits": 8})])
    def test_where_there_is_no_choice_nothing_is_measured(self, _, arguments):
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(calibration, "sensitivities") as measure,
            self.assertLogs(PLANNED, "INFO") as logs,
        ):
            rates = self.rates(self.quantized("gpt2", folder, **arguments))
        measure.assert_not_called()
        self.assertEqual((len({*rates.values()}), len(logs.output)), (1, 1))

    def test_without_gradients_it_is_told_and_rates_are_those_without_data(self):
        cases = (
            ("Inference tensors", torch.inference_mode()),
            ("there is no backward", mock.patch.object(sensitivity, "_backward", side_effect=no_backward)),
            (
                "the gradients of transformer.h.0.mlp.c_proj are not finite",
                mock.patch.object(sensitivity, "_noise", of_nan),
            ),
            ("no gradient reaches a layer", mock.patch.object(sensitivity, "_backward")),
        )
        for message, context in cases:
            with tempfile.TemporaryDirectory() as folder, context, self.assertLogs(SHOWN, "WARNING") as logs:
                rates = self.rates(self.quantized("gpt2", folder))
            self.assertEqual({*rates.values()}, {2})
            self.assertEqual(len(logs.output), 1)
            self.assertIn("spent without regard to the `dataset`", logs.output[0])
            self.assertIn(message, logs.output[0])


def no_backward(*args):
    raise NotImplementedError("there is no backward")


def of_nan(weight):
    return torch.full((weight.shape[0],), torch.nan), torch.ones(weight.shape[1])
