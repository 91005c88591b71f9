import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch as mocked

from .. import REPO, PatchError, tree


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def read(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text("utf-8") for path in root.rglob("*") if path.is_file()}


OURS = {
    "README.md": "ours",
    "setup.py": "ours",
    "setup.edit.py": "setup(..., b=2)",
    "src/transformers/__init__.edit.py": "T = [..., 'q']",
    "src/transformers/new/part.py": "x = 1\n",
    "src/transformers/new/__pycache__/part.pyc": "",
    "src/transformers/new/.part.py.swp": "",
    "tests/quantization/new/test_part.py": "",
    "docs/source/_toctree.edit.yml": "@@ after a\nb\n",
    "docs/image/Dockerfile": "ours",
    "docs/image/Dockerfile.edit": "@@ after RUN a\nRUN b\n",
    "utils/patchset/tool.py": "",
}
UPSTREAMS = {
    "setup.py": "setup(a=1)\n",
    "src/transformers/__init__.py": "T = ['p']\n",
    "tests/quantization/old/test_old.py": "",
    "docs/source/_toctree.yml": "a\n",
    "docs/image/Dockerfile": "RUN a\n",
}


class TreeTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.repo = write(Path(folder.name, "repo"), OURS)
        self.tree = write(Path(folder.name, "tree"), UPSTREAMS)

    def check_misfits(self, *expected: str):
        before = read(self.tree)
        with self.assertRaises(PatchError) as caught:
            tree.patch(self.tree, self.repo)
        lines = str(caught.exception).splitlines()
        self.assertEqual(len(lines), len(expected), lines)
        for line, part in zip(lines, expected):
            self.assertIn(part, line)
        self.assertEqual(read(self.tree), before)

    def test_our_files_and_edits_are_laid_over_the_tree(self):
        plan = tree.patch(self.tree, self.repo)
        self.assertEqual(plan.skipped, [])
        self.assertEqual(
            read(self.tree),
            {
                "setup.py": "setup(a=1, b=2)\n",
                "src/transformers/__init__.py": "T = ['p', 'q']\n",
                "src/transformers/new/part.py": "x = 1\n",
                "tests/quantization/old/test_old.py": "",
                "tests/quantization/new/test_part.py": "",
                "docs/source/_toctree.yml": "a\nb\n",
                "docs/image/Dockerfile": "RUN a\nRUN b\n",
            },
        )

    def test_a_pull_request_has_what_edits_and_its_test_import(self):
        files = {
            "src/transformers/__init__.edit.py": "from .new import part, fast\n",
            "src/transformers/new/__init__.py": "",
            "src/transformers/new/fast/__init__.py": "def load():\n    from ..lazy import x\n",
            "src/transformers/new/fast/kernel.cpp": "",
            "src/transformers/new/lazy.py": "",
            "src/transformers/new/tool.py": "from . import part\n",
            "tests/quantization/new/__init__.py": "",
            "tests/quantization/new/test_exl3.py": "from .helper import y\n",
            "tests/quantization/new/helper.py": "",
            "docs/source/en/page.md": "",
            "docs/source/ar/page.md": "",
        }
        write(self.repo, files)
        left_out = ["kernel.cpp", "new/tool.py", "ar/page.md"]
        expected = {name for name in files if not any(part in name for part in left_out)}
        expected.add("src/transformers/new/part.py")
        self.assertEqual({str(path) for path in tree.pull_request(self.repo)}, expected)

    def test_the_pull_request_of_this_repository(self):
        files = tree.pull_request()
        self.assertLessEqual(len(files), 60)
        self.assertEqual({path.suffix for path in files}, {".py", ".md", ".yml"})
        names = {path.name for path in files}
        self.assertLessEqual({"quantizer_exl3.py", "ops.py", "hub.py", "search.py", "exl3.md", "test_exl3.py"}, names)

    def test_modes_are_kept(self):
        (self.tree / "setup.py").chmod(0o755)
        (self.repo / "src/transformers/new/part.py").chmod(0o755)
        tree.patch(self.tree, self.repo)
        for name in ("setup.py", "src/transformers/new/part.py"):
            self.assertEqual((self.tree / name).stat().st_mode & 0o777, 0o755, name)

    def test_a_second_time_is_an_error(self):
        tree.patch(self.tree, self.repo)
        self.check_misfits(
            "docs/image/Dockerfile.edit:1: the lines of `@@ after RUN a` are already in",
            "docs/source/_toctree.edit.yml:1:",
            "setup.edit.py:1: `b=` in `setup()` is already in",
            "src/transformers/__init__.edit.py:1: `'q'` in `T` is already in",
            "src/transformers/new/part.py: upstream's tree already has a file of this name",
            "tests/quantization/new/test_part.py: upstream's tree already has",
        )

    def test_folders_that_pypi_lacks_are_skipped_and_named(self):
        for folder in ("docs", "tests/quantization"):
            (self.tree / folder).rename(self.tree.parent / folder.replace("/", "-"))
        plan = tree.patch(self.tree, self.repo)
        self.assertEqual(plan.skipped, ["docs", "tests/quantization"])
        self.assertFalse((self.tree / "tests/quantization").exists())

    def test_a_file_missing_in_a_folder_is_an_error(self):
        (self.tree / "docs/source/_toctree.yml").rename(self.tree / "docs/source/moved.yml")
        (self.tree / "setup.py").unlink()
        self.check_misfits(
            "docs/source/_toctree.edit.yml: upstream's tree has no docs/source/_toctree.yml to edit",
            "setup.edit.py: upstream's tree has no setup.py to edit",
        )

    def test_what_is_no_tree_of_upstreams_is_refused(self):
        (self.tree / "src/transformers/__init__.py").unlink()
        self.check_misfits("no tree of Transformers")

    def test_the_command_names_misfits_and_fails(self):
        out, err = io.StringIO(), io.StringIO()
        # The tool as it stands in this repository does not fit the tree of this test.
        arguments = [str(REPO / "utils" / "patchset"), str(self.tree)]
        before = read(self.tree)
        with mocked.object(sys, "argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            from ..__main__ import main

            self.assertEqual(main(), 1)
        self.assertIn("src/transformers/quantizers/auto.edit.py: upstream's tree has no", err.getvalue())
        self.assertIn("nothing was written", err.getvalue())
        self.assertEqual(read(self.tree), before)
