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
"""The examples of the documentation run, with tiny models in the place of the ones that they name."""

import contextlib
import os
import re
import shlex
import tempfile
import unittest
from pathlib import Path

from parameterized import parameterized

from transformers.integrations.exl3.__main__ import main as convert
from transformers.testing_utils import require_accelerate, require_peft, require_tokenizers, require_torch

from .conformance.architectures import in_short
from .synthetic import SyntheticCheckpoint
from .test_exl3_ecosystem import tiny_tokenizer
from .tiny_models import tiny_model


DOCS = Path(__file__).resolve().parents[3] / "docs" / "source"
FLOAT, QUANTIZED = "google/gemma-3-270m", "path/to/model-exl3"
LEFT_OUT = ("distributed_config",)  # several processes have tests of their own


@require_torch
@require_accelerate
@require_peft
@require_tokenizers
@unittest.skipUnless(DOCS.is_dir(), "test requires the documentation")
class Exl3DocsTest(unittest.TestCase):
    @parameterized.expand(["en", "ar"])
    def test_examples(self, language):
        text = (DOCS / language / "quantization" / "exl3.md").read_text(encoding="utf-8")
        examples = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
        run = [code for code in examples if not any(word in code for word in LEFT_OUT)]
        self.assertLessEqual(len(examples) - len(run), len(LEFT_OUT))
        self.assertGreater(len(run), 5)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.makedirs(FLOAT)
            os.makedirs(QUANTIZED)
            checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
            checkpoint.save(FLOAT, checkpoint.dense, quantized=False)
            checkpoint.quantize_all()
            checkpoint.save(QUANTIZED, checkpoint.tensors)
            for name in (FLOAT, QUANTIZED):
                tiny_tokenizer().save_pretrained(name)
            names = {}
            with contextlib.redirect_stdout(None):
                for code in run:
                    with self.subTest(code):
                        # Inductor takes its time and is tested elsewhere.
                        exec(code.replace("fullgraph=True", 'fullgraph=True, backend="eager"'), names)
                commands = re.findall(r"^python -m transformers.integrations.exl3 (.*-o (\S+).*)$", text, re.MULTILINE)
                for line, _ in commands:
                    self.assertEqual(convert(shlex.split(line)), 0)
            for made in ("gemma-3-270m-exl3", *(output for _, output in commands)):
                self.assertLessEqual({"quantization_config.json", "tokenizer.json"}, {*os.listdir(made)})
            self.assertGreater(sum(parameter.requires_grad for parameter in names["model"].parameters()), 0)

    @parameterized.expand([(language, kind) for language in ("en", "ar") for kind in in_short()])
    def test_architectures_are_those_of_the_conformance_table(self, language, kind):
        text = (DOCS / language / "quantization" / "exl3.md").read_text(encoding="utf-8")
        names = ", ".join(in_short()[kind])
        self.assertRegex(text, rf"(?<!, ){re.escape(names)}(?!, \w)")
