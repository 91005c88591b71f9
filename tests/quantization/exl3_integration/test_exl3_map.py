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
"""The map of the integration's files in its docstring: it names all of them, and no import goes up or sideways."""

import ast
import re
import unittest
from pathlib import Path

import transformers.integrations.exl3 as exl3


FOLDER = Path(exl3.__file__).parent


def imports(file: Path) -> set[str]:
    """The files and folders right in FOLDER that `file`, somewhere in it, imports from."""
    package = file.relative_to(FOLDER).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(package) + 1:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            path = [part for part in base if part]
            found |= {path[0]} if path else {alias.name for alias in node.names}
    return found


class Exl3MapTest(unittest.TestCase):
    def test_every_file_has_a_line_and_imports_from_lines_above(self):
        rows = re.findall(r"^\| ([a-z_, ]+?) +\|", exl3.__doc__, re.MULTILINE)[1:]
        line = {name: number for number, row in enumerate(rows) for name in row.split(", ")}
        entries = {path.stem for path in FOLDER.iterdir() if not path.name.startswith(("__", "."))}
        self.assertEqual(line.keys(), entries)
        checked = 0
        for file in sorted(FOLDER.rglob("*.py")):
            own = Path(file.relative_to(FOLDER).parts[0]).stem
            for other in imports(file) & line.keys() if own in line else ():
                if other != own:
                    self.assertLess(line[other], line[own], f"{own} imports from {other}")
                    checked += 1
        self.assertGreater(checked, 20)
