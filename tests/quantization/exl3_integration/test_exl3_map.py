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
"""
The map of the integration's files in its docstring: it names all of them, and no import goes up or sideways. And what benchmarks and
tools, which no test runs, call of these files.
"""

import ast
import importlib.util
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


def used_names(file: Path) -> set[tuple[str, str]]:
    """The modules that `file` imports from the integration, each with a name that it takes from there or has replaced there."""
    nodes, modules, found = list(ast.walk(ast.parse(file.read_text(encoding="utf-8")))), {}, set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(exl3.__name__):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {(node.module, alias.name) for alias in node.names}
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                found.add((modules[name], attribute))
            case ast.Call(
                func=ast.Attribute(attr="object"), args=[ast.Name(id=name), ast.Constant(attribute), *_]
            ) if name in modules:
                found.add((modules[name], attribute))
    return found


class Exl3MapTest(unittest.TestCase):
    def test_what_no_test_runs_uses_names_that_there_are(self):
        folder = Path(__file__).parent
        tools = [file for file in folder.rglob("*.py") if file.parent != folder or not file.name.startswith("test_")]
        found = {(file.name, *used) for file in tools for used in used_names(file)}
        self.assertGreater(len(found), 100)
        for file, name, attribute in sorted(found):
            holder, _, last = name.rpartition(".")
            try:
                thing = importlib.import_module(name)
            except ModuleNotFoundError:
                thing = getattr(importlib.import_module(holder), last)  # a class or a function
            is_there = hasattr(thing, attribute) or importlib.util.find_spec(f"{name}.{attribute}")
            self.assertTrue(is_there, f"{file} uses {attribute} of {name}")

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
