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
import inspect
import itertools
import json
import os
import random
import re
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from parameterized import parameterized

import transformers
from transformers import AutoConfig, Exl3Config, GPTQConfig
from transformers.distributed import DistributedConfig
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.quantizer_exl3 import Exl3HfQuantizer
from transformers.testing_utils import require_accelerate, require_torch
from transformers.utils import is_torch_available
from transformers.utils.quantization_config import QuantizationMethod


if is_torch_available():
    import torch

    from transformers.integrations.exl3.allocation import allocate_bits, override_bits, table_of_bits


FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = ("tiny-llama-exl3", "tiny-qwen3moe-exl3")
BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
CODEBOOKS = ("3inst", "mcg", "mul1")

# What converters of all times wrote: each version's fields, and those that are there for some sources only.
WRITTEN = {
    "0.0.1": {"version": "0.0.1", "bits": 4.0, "calibration": {"rows": 100, "cols": 2048}},
    "0.0.6": {
        "version": "0.0.6",
        "bits": 3,
        "head_bits": 6,
        "calibration": {"rows": 100, "cols": 2048},
        "out_scales": "always",
        "experimental_options": {"mcg_multiplier": 0xCBAC1FED},
    },
    "0.0.9": {"version": "0.0.9", "bits": 2.25, "head_bits": 6, "out_scales": "never", "codebook": "mcg"},
    "0.0.12": {
        "version": "0.0.12",
        "bits": 5.0,
        "head_bits": 16,
        "codebook": "3inst",
        "original_quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "1.6.5": {
        "version": "1.6.5",
        "bits": 2.53,
        "head_bits": 2.5,
        "calibration": {"rows": 250, "cols": 2048},
        "out_scales": "auto",
        "codebook": "mul1",
        "mtp_bits": 4,
        "vision_bits": 6,
    },
    "of the future": {"version": "9.9.9", "bits": 4.0, "codebook": "mul1", "new_field": [1, None, {"a": True}]},
}


class Exl3ConfigTest(unittest.TestCase):
    def test_the_docstring_has_the_arguments_as_upstream_checks_them(self):
        arguments = [p for p in inspect.signature(Exl3Config).parameters.values() if p.kind is not p.VAR_KEYWORD]
        described = Exl3Config.__doc__.partition("Args:")[2].partition("Attributes:")[0]
        found = re.findall(
            r"^ {8}(\w+) \(.+?(?:, (\*optional\*)(?:, defaults to (.+))?)?\):$", described, re.MULTILINE
        )
        written = lambda value: f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value}`"  # noqa: E731
        for argument, (name, optional, default) in zip(arguments, found, strict=True):
            self.assertEqual((name, optional), (argument.name, "*optional*"))
            numbers = type(argument.default) in (int, float)
            expected = "" if argument.default is None else written(argument.default).strip("`" if numbers else "")
            self.assertEqual(default, expected, name)

    def test_defaults(self):
        config = Exl3Config()
        self.assertEqual(config.quant_method, QuantizationMethod.EXL3)
        self.assertEqual((config.bits, config.head_bits, config.codebook), (4.0, None, "mul1"))
        self.assertIsNone(config.modules_to_not_convert)
        self.assertIs(config.dequantize, False)
        self.assertEqual(config.to_dict(), {"quant_method": "exl3", "bits": 4.0, "codebook": "mul1"})

    def test_is_public(self):
        self.assertIs(transformers.Exl3Config, Exl3Config)
        self.assertIs(transformers.utils.quantization_config.Exl3Config, Exl3Config)

    @parameterized.expand(sorted(WRITTEN))
    def test_what_a_converter_wrote_comes_back_unchanged(self, version):
        written = {"quant_method": "exl3", **WRITTEN[version]}
        given = copy.deepcopy(written)
        for config in (Exl3Config.from_dict(given), AutoQuantizationConfig.from_dict(given)):
            self.assertIsInstance(config, Exl3Config)
            self.assertEqual(config.to_dict(), written)
            self.assertEqual(config.to_diff_dict(), written)
            self.assertEqual(Exl3Config.from_dict(config.to_dict()).to_dict(), written)
            self.assertEqual(json.loads(config.to_json_string()), written)
        self.assertEqual(given, written)

    @parameterized.expand(CHECKPOINTS)
    def test_what_a_checkpoint_has_comes_back_unchanged(self, name):
        written = json.loads((FIXTURES / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        self.assertEqual(Exl3Config.from_dict(written).to_dict(), written)
        model_config = AutoConfig.from_pretrained(FIXTURES / name)
        self.assertEqual(AutoQuantizationConfig.from_pretrained(FIXTURES / name).to_dict(), written)
        model_config.quantization_config = AutoQuantizationConfig.from_dict(model_config.quantization_config)
        with tempfile.TemporaryDirectory() as folder:
            model_config.save_pretrained(folder)
            text = (Path(folder) / "config.json").read_text(encoding="utf-8")
        self.assertEqual(json.loads(text)["quantization_config"], written)
        self.assertEqual(text.count("quant_method"), 1)

    def test_a_codebook_that_the_file_lacks_stays_absent(self):
        config = Exl3Config.from_dict({"quant_method": "exl3", "bits": 4.0})
        self.assertIsNone(config.codebook)
        self.assertNotIn("codebook", config.to_dict())
        self.assertEqual(Exl3Config(bits=4).codebook, "mul1")

    def test_what_is_asked_for_comes_back(self):
        given = {"bits": 2.5, "head_bits": 6, "codebook": "mcg", "modules_to_not_convert": ["lm_head", "layers.0"]}
        given |= {"overrides": {"model.layers.0.*": 16, "*.down_proj": 4}, "embedding_bits": 8}
        config = Exl3Config(**given, dequantize=True)
        pairs = [["model.layers.0.*", 16], ["*.down_proj", 4]]
        self.assertEqual(config.to_dict(), {"quant_method": "exl3", **given, "overrides": pairs})
        self.assertEqual(Exl3Config.from_dict(config.to_dict()).to_dict(), config.to_dict())

    def test_the_order_of_overrides_comes_back_from_files(self):
        rates = {"*.self_attn.*": 6, "*.*.q_proj": 4}  # the last that matches counts
        config = AutoConfig.for_model("llama", quantization_config=Exl3Config(overrides=rates))
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            read = Exl3Config.from_dict(AutoConfig.from_pretrained(folder).quantization_config)
        self.assertEqual([*read.overrides.items()], [*rates.items()])

    def test_numbers_of_any_kind_are_written(self):
        numbers = {"bits": np.float32(3.5), "head_bits": np.int64(6), "embedding_bits": 5.0}
        config = Exl3Config(**numbers, overrides={"*": np.int64(4)})
        written = json.loads(json.dumps(config.to_dict()))
        expected = {"bits": 3.5, "head_bits": 6, "embedding_bits": 5, "overrides": [["*", 4]]}
        self.assertEqual({name: written[name] for name in expected}, expected)
        self.assertIs(type(config.embedding_bits), int)

    def test_how_to_load_is_not_written(self):
        config = Exl3Config(dequantize=True, effort="fast", dataset=["text"], tokenizer="name", calibration_rows=2)
        self.assertEqual(config.to_dict(), Exl3Config().to_dict())
        self.assertEqual(Exl3Config(dequantize=True).get_loading_attributes(), {"dequantize": True})

    def test_what_is_written_can_be_changed_without_harm(self):
        config = Exl3Config.from_dict({"modules_to_not_convert": ["a"], "calibration": {"rows": 1}})
        written = config.to_dict()
        written["modules_to_not_convert"].append("b")
        written["calibration"]["rows"] = 2
        self.assertEqual(config.modules_to_not_convert, ["a"])
        self.assertEqual(config.to_dict()["calibration"], {"rows": 1})

    @parameterized.expand(
        [
            ("bit", "Did you mean `bits`"),
            ("head_bit", "Did you mean `head_bits`"),
            ("dequantise", "Did you mean `dequantize`"),
            ("modules_to_not_covert", "Did you mean `modules_to_not_convert`"),
            ("bpw", "It has `bits`, `head_bits`"),
            ("load_in_4bit", "It has `bits`, `head_bits`"),
            ("version", "It has `bits`, `head_bits`"),
        ]
    )
    def test_an_argument_that_there_is_not(self, name, message):
        with self.assertRaisesRegex(TypeError, f"no argument `{name}`.*{message}"):
            Exl3Config(**{name: 3})

    def test_unused_arguments_are_returned(self):
        config, unused = Exl3Config.from_dict(
            {"bits": 4}, return_unused_kwargs=True, dequantize=True, something_else=1
        )
        self.assertTrue(config.dequantize)
        self.assertEqual(unused, {"something_else": 1})

    def test_is_written_to_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            Exl3Config(bits=3.5).to_json_file(path)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(json.load(file), Exl3Config(bits=3.5).to_dict())

    @parameterized.expand(
        [
            ("bits", 0.5, ValueError, "from 1 to 8, got 0.5"),
            ("bits", 8.01, ValueError, "from 1 to 8, got 8.01"),
            ("bits", float("nan"), ValueError, "from 1 to 8, got nan"),
            ("bits", "4", TypeError, "a number, got '4'"),
            ("bits", None, TypeError, "a number, got None"),
            ("bits", True, TypeError, "a number, got True"),
            ("head_bits", 4.5, ValueError, "one of .*16 or None, got 4.5"),
            ("head_bits", 0, ValueError, "one of .*16 or None, got 0"),
            ("head_bits", 9, ValueError, "one of .*16 or None, got 9"),
            ("head_bits", "6", TypeError, "a number, got '6'"),
            ("head_bits", False, TypeError, "a number, got False"),
            ("embedding_bits", 2.5, ValueError, "a whole number from 1 to 8, 16 or None, got 2.5"),
            ("embedding_bits", 9, ValueError, "a whole number from 1 to 8, 16 or None, got 9"),
            ("embedding_bits", "6", TypeError, "a number, got '6'"),
            ("embedding_bits", True, TypeError, "a number, got True"),
            ("codebook", "qtip", ValueError, "`mul1`, `mcg` or `3inst`, got 'qtip'"),
            ("codebook", 3, ValueError, "`mul1`, `mcg` or `3inst`, got 3"),
            ("modules_to_not_convert", "lm_head", TypeError, "a list of names, got 'lm_head'"),
            ("modules_to_not_convert", [1], TypeError, r"a list of names, got \[1\]"),
            ("modules_to_not_convert", 1, TypeError, "a list of names, got 1"),
            ("overrides", ["a"], TypeError, r"a dict of patterns to rates, got \['a'\]"),
            ("overrides", {4: 4}, TypeError, "a dict of patterns to rates, got {4: 4}"),
            ("overrides", [[4, 4]], TypeError, r"a dict of patterns to rates, got \[\[4, 4\]\]"),
            ("overrides", {"a": 4.5}, ValueError, "one of .* or 16 for 'a', got 4.5"),
            ("overrides", {"a": "4"}, ValueError, "one of .* or 16 for 'a', got '4'"),
            ("overrides", {"a": True}, ValueError, "one of .* or 16 for 'a', got True"),
            ("effort", "exact", ValueError, "`default` or `fast`, got 'exact'"),
            ("effort", None, ValueError, "`default` or `fast`, got None"),
            ("dequantize", 1, TypeError, "True or False, got 1"),
            ("dequantize", None, TypeError, "True or False, got None"),
        ]
    )
    def test_what_the_format_lacks_is_an_error_that_names_the_field(self, field, value, error, message):
        with self.assertRaisesRegex(error, f"`{field}` of Exl3Config has to be {message}"):
            Exl3Config(**{field: value})
        with self.assertRaisesRegex(error, f"`{field}`"):
            AutoQuantizationConfig.from_dict({"quant_method": "exl3", field: value})

    def test_what_is_only_told_by_a_converter_is_taken_as_it_is(self):
        block = {"quant_method": "exl3", "bits": 2.5, "head_bits": 2.5, "codebook": "mcg"}
        self.assertEqual(Exl3Config.from_dict(block).to_dict(), block)

    def test_configs_are_equal_where_all_fields_are(self):
        written = {"bits": 3, "version": "1.6.5"}
        self.assertEqual(Exl3Config.from_dict(written), Exl3Config.from_dict(written))
        self.assertNotEqual(Exl3Config(bits=3), Exl3Config(bits=4))
        self.assertIn('"bits": 3', repr(Exl3Config(bits=3)))

    @parameterized.expand([*BITS, 16])
    def test_rates_of_the_head(self, bits):
        self.assertEqual(Exl3Config(head_bits=bits).to_dict()["head_bits"], bits)

    def test_any_average(self):
        for bits in (1, 1.0, 3.14, 8, 8.0):
            self.assertEqual(Exl3Config(bits=bits).bits, bits)


@require_torch
@require_accelerate
class Exl3QuantizerTest(unittest.TestCase):
    def test_dispatch(self):
        for config in (Exl3Config(), {"quant_method": "exl3", "bits": 3.0}):
            for pre_quantized in (True, False):
                quantizer = AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)
                self.assertIs(type(quantizer), Exl3HfQuantizer)
                self.assertEqual(quantizer.pre_quantized, pre_quantized)
        self.assertTrue(AutoHfQuantizer.supports_quant_method({"quant_method": "exl3"}))

    def test_attributes(self):
        quantizer = Exl3HfQuantizer(Exl3Config(), pre_quantized=False)
        self.assertFalse(quantizer.requires_calibration)
        self.assertTrue(quantizer.requires_parameters_quantization)
        self.assertFalse(Exl3HfQuantizer(Exl3Config(), pre_quantized=True).requires_parameters_quantization)
        self.assertEqual(quantizer.required_packages, ["torch", "accelerate"])
        self.assertIs(quantizer.is_serializable(), True)
        self.assertIs(quantizer.is_trainable, True)
        self.assertIs(quantizer.is_compileable, True)
        self.assertIs(quantizer.is_qat_trainable, False)

    def test_the_dtype_stays_what_was_asked_for(self):
        quantizer = Exl3HfQuantizer(Exl3Config(), pre_quantized=True)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.assertEqual(quantizer.update_dtype(dtype), dtype)

    def test_loading_attributes_override_the_checkpoint(self):
        written = {"quant_method": "exl3", "version": "1.6.5", "bits": 3.44, "head_bits": 6, "codebook": "mcg"}
        with self.assertWarnsRegex(UserWarning, r"loading attributes \(e.g. \['dequantize'\]\)"):
            merged = AutoHfQuantizer.merge_quantization_configs(written, Exl3Config(bits=8, dequantize=True))
        self.assertTrue(merged.dequantize)
        self.assertEqual(merged.to_dict(), written)
        self.assertFalse(AutoHfQuantizer.merge_quantization_configs(written, None).dequantize)

    def test_the_config_of_another_method_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "quantized with Exl3Config but you are passing a GPTQConfig"):
            AutoHfQuantizer.merge_quantization_configs({"quant_method": "exl3"}, GPTQConfig(bits=4))

    @parameterized.expand(["accelerate", "torch"])
    def test_missing_packages_are_an_error(self, package):
        with patch(f"transformers.quantizers.quantizer_exl3.is_{package}_available", lambda: False):
            for pre_quantized in (True, False):
                with self.assertRaisesRegex(ImportError, "EXL3 needs torch and accelerate: `pip install accelerate`"):
                    Exl3HfQuantizer(Exl3Config(), pre_quantized=pre_quantized).validate_environment()

    def test_a_device_map_that_places_nothing_is_an_error(self):
        quantizer = Exl3HfQuantizer(Exl3Config(), pre_quantized=True)
        with self.assertRaisesRegex(
            ValueError, "`device_map` is an empty dict.*pass `auto`, a device, or leave it out"
        ):
            quantizer.validate_environment(device_map={})
        for device_map in (None, "auto", "cpu", {"": "cpu"}):
            quantizer.validate_environment(device_map=device_map)

    def test_only_what_is_quantized_can_be_dequantized(self):
        config = Exl3Config(dequantize=True)
        with self.assertRaisesRegex(
            ValueError, "`dequantize=True` is for EXL3 checkpoints.*without `quantization_config`"
        ):
            Exl3HfQuantizer(config, pre_quantized=False).validate_environment()
        Exl3HfQuantizer(config, pre_quantized=True).validate_environment()

    def test_one_process_needs_no_parallel_plan(self):
        quantizer = Exl3HfQuantizer(Exl3Config(), pre_quantized=True)
        for sizes in ({"distributed_config": DistributedConfig(tp_size=1)}, {"distributed_config": None}, {}):
            plan = {"layers.*.mlp.up_proj": "colwise"}
            model = SimpleNamespace(config=SimpleNamespace(**sizes), tp_plan=plan, ep_plan={})
            quantizer.update_parallel_plan(model, plan)
            self.assertEqual(plan, {"layers.*.mlp.up_proj": "colwise"})


@require_torch
class Exl3AllocationTest(unittest.TestCase):
    """Which rate each layer gets, for an average that is no rate."""

    AVERAGES = (1, 1.01, 1.3, 1.5, 1.75, 2, 2.2, 2.5, 3.25, 3.5, 3.9, 4, 4.5, 5.1, 6, 6.99, 7.5, 7.999, 8)

    @staticmethod
    def sizes(count, seed=0):
        generator = random.Random(seed)
        choices = (128 * 128, 128 * 128, 256 * 512, 1000 * 4096, 14336 * 4096)
        return {f"layers.{index}": generator.choice(choices) for index in range(count)}

    @staticmethod
    def rates(codebook):
        return [bits for bits in BITS if codebook == "mul1" or bits == int(bits)]

    @parameterized.expand(itertools.product(CODEBOOKS, (1, 2, 7, 60, 400)))
    def test_spends_the_average_and_no_more(self, codebook, count):
        rates = self.rates(codebook)
        for bits, seed in itertools.product(self.AVERAGES, range(2)):
            sizes = self.sizes(count, seed)
            allocated = allocate_bits(sizes, bits, codebook)
            self.assertEqual(list(allocated), list(sizes))
            self.assertLessEqual(set(allocated.values()), set(rates))
            left = bits * sum(sizes.values()) - sum(allocated[name] * size for name, size in sizes.items())
            self.assertGreaterEqual(left, -1e-3)
            for name, size in sizes.items():
                if allocated[name] < 8:
                    step = rates[rates.index(allocated[name]) + 1] - allocated[name]
                    self.assertGreater(step * size, left - 1e-3, f"{name} could have more at {bits}")
            self.assertGreaterEqual(min(allocated.values()), max(rate for rate in rates if rate <= bits))

    @parameterized.expand(CODEBOOKS)
    def test_rates_of_the_format_stay_uniform(self, codebook):
        for bits in self.rates(codebook):
            self.assertEqual(set(allocate_bits(self.sizes(60), bits, codebook).values()), {bits})

    @parameterized.expand([("mul1", {2.5}), ("mcg", {2, 3}), ("3inst", {2, 3})])
    def test_half_bits_are_for_one_codebook_only(self, codebook, expected):
        sizes = dict.fromkeys("abcd", 128 * 128)
        self.assertEqual(set(allocate_bits(sizes, 2.5, codebook).values()), expected)

    def test_is_the_same_each_time(self):
        sizes = self.sizes(60)
        first = allocate_bits(sizes, 3.3, "mul1")
        self.assertEqual(first, allocate_bits(dict(sizes), 3.3, "mul1"))
        self.assertGreater(len(set(first.values())), 1)

    def test_more_bits_go_to_small_layers_and_to_the_ends(self):
        sizes = {"large": 1 << 24, "small": 1 << 14, "middle": 1 << 14, "last": 1 << 24}
        allocated = allocate_bits(sizes, 3.01, "mcg")
        self.assertEqual(allocated["large"], 3)
        self.assertGreater(allocated["small"], 3)
        self.assertGreater(allocated["middle"], 3)
        self.assertEqual(
            allocate_bits(dict.fromkeys("abcdef", 128 * 128), 3.34, "mcg"), dict(zip("abcdef", (4, 3, 3, 3, 3, 4)))
        )

    def test_nothing_to_allocate(self):
        self.assertEqual(allocate_bits({}, 3.3, "mul1"), {})

    UNITS = {f"model.layers.{i}.{name}": {f"model.layers.{i}.{name}"} for i in (0, 1, 11) for name in ("up", "down")}

    @parameterized.expand(
        [
            ("an_ending", {"*.down": 6}, {f"model.layers.{i}.down": 6 for i in (0, 1, 11)}),
            ("a_layer_and_no_other", {"model.layers.1.*": 6}, {"model.layers.1.up": 6, "model.layers.1.down": 6}),
            ("a_name", {"model.layers.0.up": 16}, {"model.layers.0.up": 16}),
            (
                "the_last_counts",
                {"*": 3, "*.1.*": 5, "*.1.up": 2.5},
                {"0.up": 3, "0.down": 3, "1.up": 2.5, "1.down": 5},
            ),
            ("one_of_several", {"*.layers.[01].up": 7, "*.layers.1?.up": 8}, {"0.up": 7, "1.up": 7, "11.up": 8}),
        ]
    )
    def test_patterns_give_rates(self, _, overrides, expected):
        expected = {
            name if name.startswith("model") else f"model.layers.{name}": rate for name, rate in expected.items()
        }
        bits = override_bits(overrides, self.UNITS, "mul1")
        self.assertEqual({name: bits[name] for name in expected}, expected)
        if "*" not in overrides:
            self.assertEqual(bits.keys(), expected.keys())

    @parameterized.expand(
        [
            ("down", r"matches no layer that is quantized; a pattern has to match a whole name, such as '\*\.down'"),
            ("*.dwon", r"such as '\*\.down'"),
            ("layers.0.up", r"such as '\*\.layers\.0\.up'"),
            ("model.layer.0.up", "'model.layers.0.up'"),
            ("something else", r"such as 'model\.layers\.0\.down' or '\*\.down'"),
            ("*head", r"not quantized whatever it says \(lm_head\): `head_bits`"),
        ]
    )
    def test_patterns_that_match_nothing_are_errors_that_name_what_is_near(self, pattern, message):
        with self.assertRaisesRegex(ValueError, message):
            override_bits({"*.up": 4, pattern: 5}, self.UNITS, "mul1", plain=["lm_head", "model"])

    @parameterized.expand(["mcg", "3inst"])
    def test_half_bits_of_an_override_need_their_codebook(self, codebook):
        with self.assertRaisesRegex(
            ValueError, rf"'\*' asks for 2.5 bits, which need the codebook `mul1`, not `{codebook}`"
        ):
            override_bits({"*": 2.5}, self.UNITS, codebook)

    def test_the_table_of_rates(self):
        bits = {f"layers.{i}.up": 6 if i == 4 else 2.5 for i in (0, 1, 2, 4, 11)} | {"head": 6}
        text = table_of_bits(bits, dict.fromkeys(bits, 100) | {"head": 1500})
        self.assertEqual(
            text.splitlines(),
            [
                "6 weights of 2,000 elements, 5.3 bits on average:",
                "  2.5 bits: layers.0-2,11.up",
                "  6 bits: layers.4.up, head",
            ],
        )
