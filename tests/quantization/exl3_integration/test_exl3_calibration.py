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
"""Quantizing with data: the feedback, the pass that quantizes, the text, and what is refused."""

import copy
import tempfile
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
from parameterized import parameterized
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from transformers import (
    AutoModelForCausalLM,
    Exl3Config,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.exl3 import calibration, encoder, encoding, feedback, ops, text
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module
from transformers.quantizers.quantizer_exl3 import Exl3HfQuantizer
from transformers.testing_utils import require_accelerate, require_torch
from transformers.utils import logging

from .tiny_models import ENCODER, MODELS, tiny_inputs, tiny_model


ROWS, LENGTH = 8, 16
SHOWN = logging.get_logger("transformers.integrations.exl3.calibration")


def some_rows(rows=ROWS, length=LENGTH):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(2)).tolist()


def correlated(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing + torch.randn(width, generator=generator)


def output_error(weight, moments, tensors, codebook="mul1"):
    """The share of the energy of outputs that quantizing takes."""
    error = weight - ops.dequantize(*tensors, codebook)[: weight.shape[0], : weight.shape[1]]
    hessian = moments.hessian.float()
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


@require_torch
class Exl3FeedbackTest(unittest.TestCase):
    def test_each_strip_is_searched_for_what_is_best_after_those_done(self):
        """Held to a direct minimization in float64: all inputs that are still to come are free, those done are fixed."""
        inputs = correlated(600, 256).double()
        hessian = inputs.T @ inputs / 600 + 0.01 * torch.eye(256)
        factor = feedback._factor(hessian.clone(), torch.ones(256, dtype=torch.float64))
        rotated = encoder.hadamard(encoder.hadamard(hessian).T.contiguous())
        regular, targets = torch.randn(256, 48), []

        def code(rows):
            targets.append(rows.double())
            return torch.zeros(1, 3, 48, dtype=torch.int16), (2 * rows).round() / 2

        _, coded = feedback._search_with_feedback(regular, factor, code)
        error = (regular - coded).double()
        for number, target in enumerate(targets):
            stop = 256 - 16 * number
            now, done = slice(stop - 16, stop), slice(stop, 256)
            # The loss of strips from `now` on, with those before at their best, is that of the Schur complement.
            left = torch.linalg.inv(torch.linalg.inv(rotated)[stop - 16 :, stop - 16 :])
            best = regular[now] + torch.linalg.solve(left[:16, :16], left[:16, 16:] @ error[done])
            torch.testing.assert_close(target, best, rtol=1e-3, atol=1e-3)

    @parameterized.expand([(bits, *shape) for bits in (2, 4) for shape in ((128, 256), (130, 72))])
    def test_outputs_err_less_than_without_data(self, bits, out, into):
        inputs = correlated(1000, into)
        moments = feedback.Moments(inputs.T @ inputs / 1000)
        weight = torch.randn(out, into, generator=torch.Generator().manual_seed(1))
        weight[:, 5] = 0  # rows of zeros have no scale, and neither has padding
        arguments = {"bits": bits, "search": encoding.search_on(weight.device), "effort": "fast"}
        plain = output_error(weight, moments, encoder.quantize_weight(weight, **arguments))
        found = feedback.quantize_weight(weight, moments, **arguments)
        self.assertLess(output_error(weight, moments, found), 0.6 * plain)
        self.assertEqual(found[1][5], 0)
        again = feedback.quantize_weight(weight, moments, **arguments)
        torch.testing.assert_close(again, found, rtol=0, atol=0)

    def test_strips_of_columns_give_what_the_whole_gives(self):
        inputs = correlated(500, 128)
        moments = feedback.Moments(inputs.T @ inputs / 500)
        weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
        arguments = {"bits": 2, "search": encoding.search_on(weight.device), "effort": "fast"}
        whole, done = feedback.quantize_weight(weight, moments, **arguments), []
        with mock.patch.object(feedback, "STRIP_COLUMNS", 128), mock.patch.object(encoder, "STRIP_ELEMENTS", 1 << 14):
            parts = feedback.quantize_weight(weight, moments, **arguments, progress=done.append)
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)
        self.assertEqual(done, [128 * 128] * 2)

    def test_inputs_that_are_zero_or_few(self):
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
        arguments = {"bits": 4, "search": encoding.search_on(weight.device), "effort": "fast"}
        inputs = correlated(3, 128)  # of rank 3
        inputs[:, 7] = 0
        for moment in (inputs.T @ inputs / 3, torch.zeros(128, 128)):
            found = feedback.quantize_weight(weight, feedback.Moments(moment), **arguments)
            error = weight - ops.dequantize(*found, "mul1")
            self.assertLess(error.norm() / weight.norm(), 0.2)

    def test_moments_of_no_matrix_are_brought_to_their_diagonal(self):
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
        moment = torch.randn(128, 128)
        moment = moment + moment.T
        moment.diagonal().fill_(1)
        arguments = {"bits": 4, "search": encoding.search_on(weight.device), "effort": "fast"}
        found = feedback.quantize_weight(weight, feedback.Moments(moment), **arguments)
        self.assertLess((weight - ops.dequantize(*found, "mul1")).norm() / weight.norm(), 0.1)

    def test_drifted_inputs_are_made_up_for(self):
        """Inputs that are half of what they were: the weight that gives the same outputs is twice as large."""
        inputs = torch.randn(4000, 128)
        moments = feedback.Moments(inputs.T @ inputs / 4000, inputs.T @ inputs / 4000)
        weight = torch.randn(128, 128)
        found = feedback.quantize_weight(weight, moments, 8, search=encoding.search_on(weight.device), effort="fast")
        ratio = (ops.dequantize(*found, "mul1") * weight).sum() / weight.square().sum()
        self.assertAlmostEqual(float(ratio), 1 + feedback.DRIFT, delta=0.05)

    def test_scales_of_outputs_are_the_best_for_these_inputs(self):
        """What is left of the error has nothing in common with what is stored, as the inputs weigh it."""
        inputs = correlated(1000, 128)
        moments = feedback.Moments(inputs.T @ inputs / 1000)
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
        found = feedback.quantize_weight(weight, moments, 2, search=encoding.search_on(weight.device), effort="fast")
        stored, hessian = ops.dequantize(*found, "mul1").double(), feedback._damped(moments.hessian, 0.1)
        left = (((weight - stored) @ hessian) * stored).sum(1) / ((stored @ hessian) * stored).sum(1)
        self.assertLess(float(left.abs().max()), 1e-3)

    def test_moments_are_shrunk_to_their_diagonal_and_damped(self):
        hessian = torch.tensor([[3.0, 2.0], [2.0, 5.0]])
        expected = torch.tensor([[3.2, 1.8], [1.8, 5.2]], dtype=torch.float64)
        torch.testing.assert_close(feedback._damped(hessian, 0.1), expected)

    def test_strong_inputs_have_smaller_scales(self):
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).sign()
        hessian = torch.eye(128)
        hessian[3, 3] = 2.0**16  # and so is its square root, the exponent 1/8 of it 4
        found = feedback.quantize_weight(
            weight, feedback.Moments(hessian), 4, search=encoding.search_on(weight.device)
        )
        scales = found[1].abs().float()
        # All others are damped by the mean.
        expected = ((2.0**16 + 0.05 * hessian.diagonal().mean()) / (1 + 0.05 * hessian.diagonal().mean())) ** -0.125
        torch.testing.assert_close(scales[3] / scales[4], expected, rtol=2e-3, atol=0)

    def test_signs_follow_the_seed_and_the_search_the_effort(self):
        weight, told = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)), []
        search = encoding.search_on(weight.device)

        def telling(tiles, bits, codebook, effort):
            told.append(effort)
            return search(tiles, bits, codebook, "fast")

        for seed in (0, 7):
            scales = encoder.quantize_weight(weight, 1, seed=seed, search=telling)[1:]
            moments = feedback.Moments(torch.eye(128))
            found = feedback.quantize_weight(weight, moments, 1, seed=seed, search=telling, effort="default")[1:]
            torch.testing.assert_close([s.sign() for s in found], [s.sign() for s in scales], rtol=0, atol=0)
        self.assertEqual({*told}, {"default"})

    @parameterized.expand([("hessian", "size"), ("drift", "size"), ("hessian", "nan"), ("drift", "nan")])
    def test_wrong_moments_are_refused(self, name, kind):
        good = torch.eye(128)
        bad = torch.eye(64) if kind == "size" else torch.full((128, 128), torch.nan)
        moments = feedback.Moments(good, good)._replace(**{name: bad})
        with self.assertRaisesRegex(ValueError, f"`{name}`"):
            feedback.quantize_weight(torch.randn(128, 128), moments, 4)


@require_torch
@require_accelerate
class Exl3CalibrationTest(unittest.TestCase):
    def quantized(self, name, folder, **arguments):
        model, auto_class = tiny_model(name)
        model.save_pretrained(folder)
        arguments = {"bits": 2, "effort": "fast", "dataset": some_rows(), **arguments}
        return auto_class.from_pretrained(folder, quantization_config=Exl3Config(**arguments)), model, auto_class

    @parameterized.expand(
        ["llama_tied", "gemma3_text", "gpt2", "bert", "t5", "mixtral", "phi3", "nemotron_h", "gemma3"]
    )
    def test_models_are_quantized_saved_and_loaded(self, name):
        arguments = {"head_bits": 4} if name in ("llama_tied", "gemma3_text") else {}
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
            with mock.patch.object(calibration, "quantize_in_place", wraps=calibration.quantize_in_place) as quantize:
                model, plain, auto_class = self.quantized(name, folder, **arguments)
            waited = [path for path, module in model.named_modules() if isinstance(module, Exl3Module)]
            reached = {call.args[1] for call in quantize.call_args_list}
            parts = {path for path in waited if any(path.startswith(f"{other}.") for other in waited)}
            unseen = {path for path in {*waited} - reached - parts if "visi" not in path and "visual" not in path}
            self.assertEqual(unseen, set())
            for module in model.modules():
                self.assertFalse(getattr(module, "pending", ()))
                self.assertFalse(module._forward_hooks or module._forward_pre_hooks)
                for plain_module in getattr(module, "_plain", ()):
                    self.assertFalse(plain_module._forward_hooks or plain_module._forward_pre_hooks)
            expected = {"rows": ROWS, "cols": LENGTH}
            self.assertEqual(model.config.quantization_config.converter_fields["calibration"], expected)
            model.save_pretrained(saved)
            again = auto_class.from_pretrained(saved)
            with torch.no_grad():
                results = [m(**tiny_inputs(name))[0] for m in (model, again)]
            torch.testing.assert_close(*results, rtol=0, atol=0)
            written = model.config.to_dict()["quantization_config"]
            self.assertNotIn("dataset", written)
            self.assertEqual(written["calibration"], expected)

    @parameterized.expand(["llama", "gpt2", "qwen3_moe", "phi3"])
    def test_what_was_read_is_answered_better_than_without_data(self, name):
        ids = torch.tensor(some_rows())
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model, plain, auto_class = self.quantized(name, folder)
            config = Exl3Config(bits=2, effort="fast")
            without = auto_class.from_pretrained(folder, quantization_config=config)
            expected, *found = (m(ids)[0] for m in (plain, model, without))
        self.assertLess((found[0] - expected).norm(), 0.85 * (found[1] - expected).norm())

    @parameterized.expand([("llama", 15), ("qwen2", 8)])
    def test_each_layer_is_given_the_moments_of_what_reaches_it(self, name, layers):
        """Of inputs that come through the layers before it when they are quantized, and of the same in the float model."""
        ids = torch.tensor(some_rows())
        seen, float_inputs, inputs = {}, {}, {}
        quantize_in_place = calibration.quantize_in_place

        def spying(model, path, progress, moments_of):
            seen[path] = moments_of("")
            quantize_in_place(model, path, progress, moments_of)

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            with mock.patch.object(calibration, "quantize_in_place", spying):
                model, plain, _ = self.quantized(name, folder, head_bits=3)
            for which, kept in ((model, inputs), (plain, float_inputs)):
                for path in seen:
                    which.get_submodule(path).register_forward_pre_hook(
                        lambda module, args, path=path, kept=kept: kept.update({path: args[0].flatten(0, -2).double()})
                    )
                which(ids)
        self.assertEqual(len(seen), layers)
        for path, moments in seen.items():
            x, f = inputs[path], float_inputs[path]
            torch.testing.assert_close(moments.hessian.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
            # Biases are read in fp16, as they are stored.
            torch.testing.assert_close(moments.drift.double(), x.T @ (f - x) / len(x), rtol=1e-3, atol=1e-3)
        self.assertIs(seen["model.layers.0.self_attn.q_proj"], seen["model.layers.0.self_attn.k_proj"])
        self.assertGreater(seen["lm_head"].drift.norm(), 0.01 * seen["lm_head"].hessian.norm())

    def test_text_goes_on_through_tiles_in_the_order_that_is_read_fastest(self):
        orders, forward = [], Exl3Linear.forward

        def spying(layer, x):
            orders.append((layer.trellis.stride(), ops.ordered(layer.trellis).stride()))
            return forward(layer, x)

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(Exl3Linear, "forward", spying):
            self.quantized("llama", folder)
        found, fastest = zip(*orders)
        self.assertEqual(found, fastest)

    def test_experts_are_given_the_moments_of_their_rows(self):
        with tempfile.TemporaryDirectory() as folder:
            model, _, _ = self.quantized("mixtral", folder)
        experts = model.model.layers[0].mlp.experts
        x, index = torch.randn(300, 128), torch.randint(0, 3, (300, 2))  # none to the last
        floats = x + torch.randn(300, 128)
        mixture = calibration._Mixture("experts", experts, x, floats, index)
        of_all = x.T @ x / 300
        own = x[(index == 1).any(1)]
        share = len(own) / (len(own) + 128)
        expected = share * (own.T @ own / len(own)) + (1 - share) * of_all
        torch.testing.assert_close(mixture.into("1.expert_up").hessian, expected, rtol=1e-3, atol=1e-4)
        own_floats = floats[(index == 1).any(1)]
        expected = share * (own.T @ (own_floats - own) / len(own)) + (1 - share) * (x.T @ (floats - x) / 300)
        torch.testing.assert_close(mixture.into("1.expert_up").drift, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mixture.into("3.expert_gate").hessian, of_all, rtol=1e-3, atol=1e-4)
        self.assertIsNone(mixture.down("3.expert_down"))
        hidden = torch.nn.functional.silu(experts.projection(1, "gate")(own)) * experts.projection(1, "up")(own)
        moment, share = hidden.T @ hidden / len(own), len(own) / (len(own) + 100)
        expected = share * moment + (1 - share) * moment.diagonal().diag()
        torch.testing.assert_close(mixture.down("1.expert_down").hessian, expected, rtol=1e-3, atol=1e-4)

    def test_moments_are_those_of_all_rows(self):
        x, f = torch.randn(2, 23, 128, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(calibration, "MOMENT_ROWS", 10):
            found = calibration.moments("layer", x, f)
        torch.testing.assert_close(found, feedback.Moments(x.T @ x / 23, x.T @ (f - x) / 23), rtol=1e-4, atol=1e-5)
        self.assertIsNone(calibration.moments("layer", x, f[:0]).drift)

    def test_moments_are_taken_anew_of_an_input_that_was_changed_in_place(self):
        ids, x, seen = torch.zeros(3, 5), torch.randn(6, 5, 128), []
        run = calibration._Pass(tiny_model("llama")[0], {}, None, ids)
        run._sizes = {"layer": 1}
        with mock.patch.object(calibration, "quantize_in_place", lambda *args: seen.append(args[3](""))):
            for factor in (1, 1, 2):
                self.assertEqual(run._quantize_linear("layer", None, x.mul_(factor) if factor > 1 else x), 3)
        self.assertIs(seen[0], seen[1])
        torch.testing.assert_close(seen[2].hessian, 4 * seen[0].hessian)

    def test_streams_are_halves_of_what_grows_with_the_batch(self):
        """No table of relative positions, which layers of DeBERTa read, whatever its size."""
        run = calibration._Pass(tiny_model("llama")[0], {}, None, torch.zeros(3, 5))
        run._sizes = {"rows": 1, "tokens": 5, "table": 6}
        shapes = {"rows": (6, 5, 128), "tokens": (30, 128), "table": (6, 128), "expert without a token": (6, 128)}
        found = [run._count(path, torch.empty(shape)) for path, shape in shapes.items()]
        self.assertEqual(found, [3, 15, 6, 6])

    def test_a_batch_in_the_second_dimension_is_not_cut_along_the_sequence(self):
        """As many tokens as there are rows in both streams: then the shapes alone do not tell."""
        torch.manual_seed(0)
        config = XLNetConfig(vocab_size=100, d_model=128, n_layer=2, n_head=4, d_inner=100, pad_token_id=0)
        plain, seen, moments = XLNetModel(config), {}, calibration.moments
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            with mock.patch.object(calibration, "moments", lambda *args: seen.setdefault(args[0], moments(*args))):
                config = Exl3Config(bits=2, effort="fast", dataset=some_rows())
                model = XLNetModel.from_pretrained(folder, quantization_config=config)
        inputs = {}
        for path in seen:
            model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: inputs.update({path: args[0].flatten(0, -2)})
            )
        with torch.no_grad():
            model(torch.tensor(some_rows()))
        self.assertEqual(seen.keys(), {f"layer.{name}" for name in ("0.ff.layer_1", "0.ff.layer_2", "1.ff.layer_1")})
        for path, found in seen.items():
            x = inputs[path]
            torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-4)

    def test_the_text_is_read_once_up_to_the_head(self):
        """After one window alone, which tells what is of the batch. What bits are spent by is measured before."""
        forward = LlamaForCausalLM.forward
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(LlamaForCausalLM, "forward", autospec=True, side_effect=forward) as call,
            mock.patch.object(calibration, "_stop", side_effect=calibration._HeadReached) as stop,
        ):
            self.quantized("llama", folder)
        self.assertEqual((call.call_count, stop.call_count), (3, 2))
        for args, expected in zip(call.call_args_list, (some_rows(), some_rows()[:1], some_rows() * 2)):
            self.assertEqual(args.kwargs["use_cache"], False)
            self.assertEqual(args.kwargs["input_ids"].tolist(), expected)

    def test_what_the_text_does_not_reach_is_quantized_without_data_and_counted(self):
        with tempfile.TemporaryDirectory() as folder, self.assertLogs(SHOWN, "WARNING") as logs:
            model, _, _ = self.quantized("gemma3", folder)
            with_data = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
            auto_class = MODELS["gemma3"][0]
            without = auto_class.from_pretrained(folder, quantization_config=Exl3Config(bits=2, effort="fast"))
        self.assertIn("8 of 15 modules were not reached", logs.output[0])
        for name, tensor in with_data.items():
            torch.testing.assert_close(tensor, without.state_dict()[name], rtol=0, atol=0)

    def test_overrides_parts_and_embeddings_go_with_data(self):
        with tempfile.TemporaryDirectory() as folder:
            model, _, _ = self.quantized(
                "phi3", folder, overrides={"*": 2, "*.q_proj": 4, "*.down_proj": 16}, embedding_bits=6
            )
        layer = model.model.layers[0]
        self.assertEqual((layer.self_attn.qkv_proj.q_proj.bits, layer.self_attn.qkv_proj.k_proj.bits), (4, 2))
        self.assertIs(type(layer.mlp.down_proj), torch.nn.Linear)
        self.assertFalse(layer.mlp.down_proj._forward_hooks)

    def test_a_bias_that_the_checkpoint_lacks_is_initialized_before_it_is_read(self):
        """New memory is filled with NaN here, which would reach the activations."""
        with tempfile.TemporaryDirectory() as folder:
            model, auto_class = tiny_model("qwen2")
            name = "model.layers.0.self_attn.q_proj.bias"
            state = {key: value for key, value in model.state_dict().items() if key != name}
            model.save_pretrained(folder, state_dict=state)
            torch.use_deterministic_algorithms(True, warn_only=True)
            self.addCleanup(torch.use_deterministic_algorithms, False)
            config = Exl3Config(bits=4, effort="fast", dataset=some_rows())
            model = auto_class.from_pretrained(folder, quantization_config=config)
        self.assertEqual(float(model.get_parameter(name).abs().max()), 0)

    def test_a_config_tells_of_the_model_that_it_quantized_last(self):
        config = Exl3Config(bits=4, effort="fast", dataset=some_rows(), embedding_bits=4)
        with tempfile.TemporaryDirectory() as folder:
            for name, arguments in (("llama_tied", {}), ("llama_base", {"dataset": None, "embedding_bits": None})):
                model, auto_class = tiny_model(name)
                model.save_pretrained(folder)
                vars(config).update(arguments)
                model = auto_class.from_pretrained(folder, quantization_config=config)
                config = model.config.quantization_config
        self.assertEqual(config.converter_fields, {"quantized_by": "transformers"})

    def test_experts_without_tokens_are_counted(self):
        with tempfile.TemporaryDirectory() as folder, self.assertLogs(SHOWN, "WARNING") as logs:
            with mock.patch.object(calibration._Mixture, "_rows", lambda *_: torch.zeros(0, dtype=torch.long)):
                self.quantized("mixtral", folder)
        self.assertIn("4 experts had no token", logs.output[0])

    def test_layers_that_the_checkpoint_lacks_stay_float(self):
        from transformers import AutoModelForSequenceClassification

        with tempfile.TemporaryDirectory() as folder:
            tiny_model("bert")[0].save_pretrained(folder)
            config = Exl3Config(bits=4, effort="fast", dataset=some_rows())
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, quantization_config=config, output_loading_info=True
            )
        self.assertEqual(info["missing_keys"], {"classifier.weight", "classifier.bias"})
        self.assertIs(type(model.classifier), torch.nn.Linear)
        self.assertIsInstance(model.bert.encoder.layer[0].output.dense, Exl3Linear)

    def test_the_loading_report_names_nothing_that_is_made_later(self):
        with tempfile.TemporaryDirectory() as folder:
            tiny_model("llama")[0].save_pretrained(folder)
            config = Exl3Config(bits=4, effort="fast", dataset=some_rows())
            _, info = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, output_loading_info=True)
        self.assertEqual(info["missing_keys"], set())

    def test_the_mode_for_inference_makes_no_difference(self):
        with tempfile.TemporaryDirectory() as folder:
            expected = self.quantized("llama", folder, overrides={"*": 2})[0].state_dict()
            with torch.inference_mode():
                found = self.quantized("llama", folder, overrides={"*": 2})[0].state_dict()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_activations_that_are_not_finite_are_named(self):
        with tempfile.TemporaryDirectory() as folder:
            model, auto_class = tiny_model("llama")
            model.model.layers[1].input_layernorm.weight.data[3] = torch.inf
            model.save_pretrained(folder)
            with self.assertRaisesRegex(ValueError, "inputs of model.layers.1.self_attn.q_proj are not finite"):
                auto_class.from_pretrained(folder, quantization_config=Exl3Config(dataset=some_rows(), effort="fast"))

    def test_data_for_what_cannot_read_it_is_refused(self):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
            with self.assertRaisesRegex(ValueError, "Dinov2Model takes `pixel_values`"):
                self.quantized("dinov2", folder)
            model, _, auto_class = self.quantized("llama", folder)
            model.save_pretrained(saved)
            config = Exl3Config(dataset=some_rows())
            with self.assertRaisesRegex(ValueError, "`dataset` is for quantizing, and this checkpoint is quantized"):
                auto_class.from_pretrained(saved, quantization_config=config)
            with self.assertRaisesRegex(ValueError, "has to fit in memory"):
                auto_class.from_pretrained(
                    folder, quantization_config=config, device_map={"": "disk"}, offload_folder=saved
                )
            places = {"device_map": "auto", "max_memory": {"cpu": 100_000}, "offload_folder": saved}
            with self.assertRaisesRegex(ValueError, "`device_map` offloads some of it"):
                auto_class.from_pretrained(folder, quantization_config=config, **places)

    @parameterized.expand([("tp", {"tp_size": 2}), ("fsdp", {"fsdp_size": 2})])
    def test_several_processes_are_refused(self, _, sizes):
        model, _ = tiny_model("llama")
        model.config = copy.copy(model.config)  # which all tests share
        model.config.distributed_config = DistributedConfig(**sizes)
        quantizer = Exl3HfQuantizer(Exl3Config(dataset=some_rows()), pre_quantized=False)
        with self.assertRaisesRegex(ValueError, "quantized with a `dataset` in one process"):
            quantizer.update_parallel_plan(model, model.tp_plan)


def word_tokenizer(before=None, after=None):
    """A tokenizer of words `w3`, `w4`, ..., whose texts begin and end with these."""
    vocab = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{number}": number for number in range(3, 120)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if before or after:
        single = " ".join(part for part in (before, "$A", after) if part)
        tokens = [(name, vocab[name]) for name in (before, after) if name]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@require_torch
@require_accelerate
class Exl3TextTest(unittest.TestCase):
    def windows(self, dataset, name="llama", **arguments):
        model, _ = tiny_model(name)
        arguments = {"calibration_rows": 4, "calibration_length": 6, **arguments}
        return text.windows_of(model, Exl3Config(dataset=dataset, **arguments))

    @parameterized.expand(
        [
            ("begin", "[BOS]", None, [[1, 3, 4, 5, 6, 7], [1, 8, 9, 10, 11, 12]]),
            ("neither", None, None, [[3, 4, 5, 6, 7, 8]]),
            ("both", "[BOS]", "[EOS]", [[1, 3, 4, 5, 6, 2], [1, 7, 8, 9, 10, 2]]),
        ]
    )
    def test_texts_are_joined_and_cut_into_windows_that_are_texts(self, _, before, after, expected):
        windows = self.windows(["w3 w4 w5", "", "w6 w7 w8 w9 w10 w11 w12"], tokenizer=word_tokenizer(before, after))
        self.assertEqual(windows.tolist(), expected)

    def test_texts_are_as_special_tokens_make_them(self):
        """Such as those of which the first word is another token after the beginning."""

        def tokenizer(texts, return_special_tokens_mask):
            ids = [
                [1, *(50 + len(word) for word in some.split()[:1]), *map(len, some.split()[1:]), 2] for some in texts
            ]
            mask = [[1, *[0] * (len(some) - 2), 1] for some in ids]
            return {"input_ids": ids, "special_tokens_mask": mask}

        windows = self.windows(["", "one three", "eleven six"], tokenizer=tokenizer)
        self.assertEqual(windows.tolist(), [[1, 53, 5, 56, 3, 2]])

    def test_a_tokenizer_may_be_that_of_a_processor(self):
        processor = SimpleNamespace(tokenizer=word_tokenizer())
        self.assertEqual(self.windows(["w3 w4 w5 w6"], tokenizer=processor).tolist(), [[3, 4, 5, 6]])
        with self.assertRaisesRegex(TypeError, "`tokenizer` of Exl3Config has to be a tokenizer, .*, got 5"):
            self.windows(["w3 w4 w5 w6"], tokenizer=5)

    def test_special_tokens_in_a_text_are_of_the_text(self):
        tokenizer = word_tokenizer("[BOS]")
        tokenizer.add_special_tokens({"additional_special_tokens": ["w3", "w9"]})
        windows = self.windows(["w3 w4 w9", "w9 w5"], tokenizer=tokenizer)
        self.assertEqual(windows.tolist(), [[1, 3, 4, 9, 9, 5]])

    def test_the_tokenizer_of_the_model_is_found(self):
        with tempfile.TemporaryDirectory() as folder:
            model, _ = tiny_model("llama")
            model.save_pretrained(folder)
            config = Exl3Config(dataset=["w3 w4 w5 w6"], calibration_length=4)
            model = AutoModelForCausalLM.from_pretrained(folder)
            with self.assertRaisesRegex(ValueError, "no tokenizer at .*: pass one as `tokenizer`"):
                text.windows_of(model, config)
            word_tokenizer().save_pretrained(folder)
            self.assertEqual(text.windows_of(model, config).tolist(), [[3, 4, 5, 6]])
            config.tokenizer = folder
            self.assertEqual(text.windows_of(tiny_model("llama")[0], config).tolist(), [[3, 4, 5, 6]])

    def test_lists_of_ids_are_windows_and_short_ones_are_joined(self):
        self.assertEqual(self.windows([[3, 4, 5], [6, 7, 8]]).tolist(), [[3, 4, 5], [6, 7, 8]])
        self.assertEqual(self.windows([list(range(3, 16)), [20] * 4, [21] * 4]).tolist(), [
            [3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 20, 20, 20, 21, 21]
        ])  # fmt: skip
        self.assertEqual(len(self.windows([[3] * 100])), 4)

    def test_windows_are_no_longer_than_the_model_can_read(self):
        model = copy.copy(tiny_model("llama")[0])
        model.config = copy.copy(model.config)
        model.config.max_position_embeddings = 4
        for dataset in ([list(range(3, 16))], "self"):
            windows = text.windows_of(model, Exl3Config(dataset=dataset, calibration_rows=2, calibration_length=6))
            self.assertEqual(windows.shape, (2, 4))

    def test_positions_that_begin_after_the_padding_token_are_fewer_than_rows_of_their_table(self):
        roberta = RobertaModel(RobertaConfig(**ENCODER, max_position_embeddings=11)).eval()
        self.assertEqual(roberta.embeddings.position_embeddings.padding_idx, 0)
        for pad, length in ((0, 10), (4, 6)):
            for module in (roberta.embeddings, roberta.embeddings.position_embeddings):
                module.padding_idx = pad
            windows = text.windows_of(roberta, Exl3Config(dataset=[list(range(5, 90))], calibration_length=16))
            self.assertEqual(windows.shape[1], length)
            roberta(windows)

    def test_text_goes_on_to_the_end_of_a_window(self):
        """Whatever ends a text: chat models have more tokens for that in their generation config than in their config."""
        model = copy.copy(tiny_model("llama")[0])
        model.generation_config = copy.copy(model.generation_config)
        model.generation_config.eos_token_id = list(range(2, 60))
        windows = text.windows_of(model, Exl3Config(dataset="self", calibration_rows=4, calibration_length=6))
        self.assertEqual((windows.shape, bool((windows[:, 1:] >= 60).all())), ((4, 6), True))

    def test_the_model_writes_out_of_all_of_its_vocabulary(self):
        windows = self.windows("self", calibration_rows=1500, calibration_length=2)
        self.assertGreater(len(windows[:, 1].unique()), 90)

    def test_what_a_text_begins_with_is_read(self):
        """Also where the beginning-of-text token pads: upstream would leave it out."""
        with mock.patch.object(
            LlamaForCausalLM, "generate", autospec=True, side_effect=LlamaForCausalLM.generate
        ) as spy:
            self.windows("self", calibration_rows=4, calibration_length=2)
        mask = spy.call_args.kwargs["attention_mask"]
        torch.testing.assert_close(mask, torch.ones_like(mask), rtol=0, atol=0)
        self.assertEqual(mask.shape, (4, 1))

    def test_the_model_writes_text_that_depends_on_the_seed_alone(self):
        model, _ = tiny_model("llama")
        before = torch.get_rng_state()
        first, again, other = (
            text.windows_of(
                model, Exl3Config(dataset="self", calibration_rows=4, calibration_length=6, calibration_seed=seed)
            )
            for seed in (0, 0, 1)
        )
        torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        self.assertEqual(first.shape, (4, 6))
        self.assertNotEqual(other.tolist(), first.tolist())
        self.assertTrue((first[:, 0] == 1).all() and (first[:, 1:] > 2).all())  # no end, no padding

    def test_what_the_model_writes_does_not_depend_on_its_generation_config(self):
        config = Exl3Config(dataset="self", calibration_rows=4, calibration_length=6)
        model, _ = tiny_model("llama")
        expected = text.windows_of(model, config)
        settings = {
            "min_p": 0.9,
            "no_repeat_ngram_size": 1,
            "num_return_sequences": 2,
            "return_dict_in_generate": True,
        }
        model.generation_config.update(**settings, num_beams=2, max_time=1e-9)
        defaults = model.generation_config
        torch.testing.assert_close(text.windows_of(model, config), expected, rtol=0, atol=0)
        self.assertIs(model.generation_config, defaults)
        ending = int(expected[0, 1])
        defaults.eos_token_id = [2, ending]  # which files often have there alone
        windows = text.windows_of(model, config)
        self.assertEqual(windows.shape, (4, 6))
        self.assertFalse((windows == ending).any())

    def test_the_model_writes_no_places_of_images(self):
        windows = self.windows("self", "gemma3", calibration_rows=64, calibration_length=16)
        self.assertFalse(set(windows.flatten().tolist()) & {95, 96, 97})

    @parameterized.expand(
        [
            ("too large", [[3, 100]], {}, "tokens from 3 to 100, and LlamaForCausalLM has 100"),
            ("negative", [[-1, 5]], {}, "tokens from -1 to 5"),
            ("empty ids", [[], []], {}, "no tokens"),
            ("empty texts", [""], {"tokenizer": word_tokenizer("[BOS]")}, "no tokens"),
            (
                "no room",
                ["w3 w4"],
                {"tokenizer": word_tokenizer("[BOS]", "[EOS]"), "calibration_length": 2},
                "no room",
            ),
        ]
    )
    def test_data_that_does_not_do_is_refused(self, _, dataset, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            self.windows(dataset, **arguments)

    def test_a_model_that_cannot_write_is_named(self):
        for name in ("bert", "t5"):
            with self.assertRaisesRegex(ValueError, "cannot write text"):
                self.windows("self", name)

    @parameterized.expand(
        [
            ({"dataset": "wikitext2"}, ValueError, "no names but `self`, got 'wikitext2'"),
            ({"dataset": []}, TypeError, "not empty"),
            ({"dataset": ["text", [1, 2]]}, TypeError, "`dataset` of Exl3Config"),
            ({"dataset": [[1.5]]}, TypeError, "`dataset` of Exl3Config"),
            ({"dataset": 5}, TypeError, "`dataset` of Exl3Config"),
            ({"tokenizer": "name"}, ValueError, "is for a `dataset` of texts"),
            ({"dataset": "self", "tokenizer": "name"}, ValueError, "is for a `dataset` of texts"),
            ({"dataset": [[1]], "tokenizer": "name"}, ValueError, "one of token ids"),
            ({"calibration_rows": 0}, ValueError, "`calibration_rows`"),
            ({"calibration_length": 1.5}, ValueError, "`calibration_length`"),
            ({"calibration_seed": -1}, ValueError, "`calibration_seed`"),
            ({"calibration_rows": 8}, ValueError, "`calibration_rows` of Exl3Config is for quantizing with data"),
            ({"calibration_length": 64}, ValueError, "`calibration_length` .* pass a `dataset`, too"),
        ]
    )
    def test_wrong_arguments_are_refused(self, arguments, error, message):
        with self.assertRaisesRegex(error, message):
            Exl3Config(**arguments)


if __name__ == "__main__":
    unittest.main()
