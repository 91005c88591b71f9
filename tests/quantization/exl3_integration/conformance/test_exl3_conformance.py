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
"""All architectures that exllamav3 and Transformers both have, held against exllamav3's own code; see `__main__.py`."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from parameterized import parameterized

from transformers.testing_utils import require_accelerate, require_torch, slow

from .architectures import NOT_HELD, NOT_HERE, ROWS


@slow
@require_torch
@require_accelerate
@unittest.skipUnless(importlib.util.find_spec("exllamav3"), "test requires exllamav3 (`make conformance` installs it)")
class Exl3ConformanceTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # In a process of its own: a stub takes the place of exllamav3's compiled extension there.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "found.json")
            command = [sys.executable, "-m", __package__, "--json", path]
            above = Path(__file__).resolve().parents[len(__package__.split("."))]  # where pytest found the package
            done = subprocess.run(command, capture_output=True, text=True, cwd=above)
            if not os.path.isfile(path):
                raise RuntimeError(f"The comparison came to no end:\n{done.stderr[-4000:]}")
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        print(done.stdout)
        cls.known, cls.here = set(found["known"]), set(found["here"])
        cls.cases = {case["name"]: case for case in found["cases"]}

    @parameterized.expand([row.name for row in ROWS])
    def test_rows(self, name):
        self.assertEqual(self.cases[name]["problems"], [])

    def test_each_architecture_that_exllamav3_has_is_in_a_row_or_listed(self):
        rows = {row.architecture for row in ROWS}
        listed = NOT_HELD.keys() | NOT_HERE
        self.assertEqual(self.known - rows - listed, set(), "in no row, and not listed in architectures.py")
        self.assertEqual(listed - self.known | listed & rows, set(), "listed as not held, and it is or cannot be")
        self.assertEqual(NOT_HERE & self.here, set(), "Transformers has it now")
        self.assertEqual(len({row.name for row in ROWS}), len(ROWS), "several rows have one name")
