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
"""What is shown of quantizing a model, and how long it may take."""

import contextlib
import io
import tempfile
import unittest
from unittest.mock import Mock, patch

import torch
from parameterized import parameterized
from torch.testing import assert_close

from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.exl3 import encoding, ops, progress
from transformers.integrations.exl3.modules import Exl3Linear
from transformers.testing_utils import require_accelerate, require_torch

from .tiny_models import quick_config, tiny_model


@require_torch
@require_accelerate
class Exl3ProgressTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        tiny_model("llama")[0].save_pretrained(folder.name)

    def test_a_progress_bar_counts_weights(self):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            quantized = AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=quick_config(bits=1))
        line = [part for part in stream.getvalue().split("\r") if "Quantizing to EXL3" in part][-1]
        layers = [module for module in quantized.modules() if isinstance(module, Exl3Linear)]
        total = sum(layer.in_features * layer.out_features for layer in layers)
        self.assertIn("100%", line)
        self.assertIn(" weights/s", line)
        self.assertIn(f"{total / 1000:.0f}k/{total / 1000:.0f}k", line)

    @parameterized.expand(
        [
            ("before_the_first_weight", "cuda:63", (RuntimeError, AssertionError)),
            ("at_a_weight", "cpu", ValueError),
        ]
    )
    def test_no_progress_bar_is_left_beside_an_error(self, name, device, error):
        model = LlamaForCausalLM.from_pretrained(self.folder)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        with tempfile.TemporaryDirectory() as other, contextlib.redirect_stderr(io.StringIO()) as stream:
            model.save_pretrained(other)
            with self.assertRaises(error):
                AutoModelForCausalLM.from_pretrained(
                    other, quantization_config=quick_config(bits=1), device_map=device
                )
        *shown, after = stream.getvalue().split("Quantizing to EXL3")
        self.assertEqual(bool(shown), device == "cpu")
        if shown:
            self.assertRegex(after, r"\r {40}")  # blanked

    def test_the_progress_bar_is_off_the_screen_between_parameters(self):
        bars = []
        with patch.object(progress.logging, "tqdm", side_effect=lambda **kwargs: bars.append(Mock(n=0)) or bars[0]):
            bar = progress.Progress(100, 4, "mul1", "default")
            self.assertEqual(bars, [])
            with bar.shown(torch.device("cpu")) as update:
                update(60)
                bars[0].clear.assert_not_called()
            bars[0].clear.assert_called_once()
            bars[0].close.assert_not_called()
            bars[0].n = 100
            with bar.shown(torch.device("cpu")):
                bars[0].refresh.assert_called()
            bars[0].close.assert_called_once()
            self.assertEqual(len(bars), 1)

    def test_what_the_reference_would_take_days_for_is_an_error_with_an_estimate(self):
        with patch.object(ops.cpu, "is_available", return_value=False):
            message = r"\d{3},\d{3} weights .* on cpu would take about \d+ \w+: .*compiler"
            with (
                patch.object(progress, "REFERENCE_WEIGHTS", 10**5),
                self.assertRaisesRegex(RuntimeError, message),
            ):
                AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=quick_config(bits=1))
            for device in ("cpu", "mps"):
                with patch.object(progress, "_seconds_per_weight", return_value=1.0):
                    with self.assertRaisesRegex(RuntimeError, f"on {device} would take about 12 days"):
                        progress.Progress(10**6, 4, "mul1", "default").check(torch.device(device))
            progress.Progress(progress.REFERENCE_WEIGHTS, 4, "mul1", "default").check(torch.device("cpu"))

    @unittest.skipUnless(ops.cpu.is_available(), "needs the compiled kernels")
    def test_a_device_without_a_search_has_tiles_searched_on_the_cpu(self):
        search_on_host = encoding.search_on(torch.device("mps"))
        tiles = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
        assert_close(search_on_host(tiles, 2, "mul1"), ops.cpu.kernels().search(tiles, 2, "mul1"), rtol=0, atol=0)
        progress.Progress(10**9, 4, "mul1", "default").check(torch.device("mps"))
