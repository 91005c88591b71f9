import os
import re
import shutil
import tempfile
import time
import unittest
from pathlib import Path
from unittest.mock import Mock
from unittest.mock import patch as mocked

from .. import REPO, UPSTREAM, VERSION, PatchError, build, extension
from .test_tree import read, write


KERNELS = "src/transformers/integrations/exl3/kernels/cpu"


class PinTest(unittest.TestCase):
    def test_the_release_is_pinned_in_one_place(self):
        folders = [REPO / name for name in ("docker", "docs", "src", "tests", "utils", ".ci", ".github")]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        files += [path for path in REPO.glob("*") if path.is_file()]
        files = [path for path in files if not {"__pycache__", ".hypothesis"}.intersection(path.parts)]
        named = [path for path in files if UPSTREAM.encode() in path.read_bytes()]
        self.assertEqual([path.name for path in named], ["pyproject.toml"])

    def test_another_release_is_refused(self):
        for version in ("0.0.1", VERSION):
            with mocked.object(build, "distribution", return_value=Mock(version=version)):
                with self.assertRaisesRegex(
                    PatchError, rf"transformers {re.escape(version)} at .* transformers==={UPSTREAM}"
                ):
                    build.upstream_distribution()

    def test_a_missing_release_is_named(self):
        with mocked.object(build, "distribution", side_effect=build.PackageNotFoundError):
            with self.assertRaisesRegex(PatchError, "not installed; .*without --no-build-isolation"):
                build.upstream_distribution()


class TreeTestCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.repo = write(
            Path(folder.name),
            {
                "src/transformers/__init__.edit.py": "T = [..., 'q']",
                "src/transformers/new/part.py": "x = 1\n",
                "docs/new.md": "",
                "build/upstream/src/transformers/__init__.py": f"__version__ = \"{UPSTREAM}\"\nT = ['p']\n",
                "build/upstream/src/transformers/old.py": "",
            },
        )
        shutil.copy(REPO / "setup.edit.py", self.repo)
        self.tree = self.repo / "build" / "tree"


class RefreshTest(TreeTestCase):
    def test_the_tree_is_upstreams_package_with_ours(self):
        files = build.refresh(self.repo)
        expected = {
            "src/transformers/__init__.py": f"__version__ = \"{VERSION}\"\nT = ['p', 'q']\n",
            "src/transformers/new/part.py": "x = 1\n",
            "src/transformers/old.py": "",
        }
        self.assertEqual(read(self.tree), expected)
        self.assertEqual([str(path) for path in files], sorted(expected))

    def test_changes_show(self):
        build.refresh(self.repo)
        (self.tree / "src/transformers/new/__pycache__").mkdir()
        (self.repo / "src/transformers/new/part.py").rename(self.repo / "src/transformers/part.py")
        (self.repo / "src/transformers/__init__.edit.py").write_text("T = [..., 'r']", "utf-8")
        build.refresh(self.repo)
        self.assertFalse((self.tree / "src/transformers/new").exists())
        self.assertTrue((self.tree / "src/transformers/part.py").is_file())
        self.assertIn("T = ['p', 'r']", (self.tree / "src/transformers/__init__.py").read_text("utf-8"))
        pristine = self.repo / "build/upstream/src/transformers/__init__.py"
        self.assertIn("T = ['p']", pristine.read_text("utf-8"))

    @unittest.skipUnless(build.LINKS, "needs links")
    def test_our_whole_files_are_links(self):
        build.refresh(self.repo)
        (self.repo / "src/transformers/new/part.py").write_text("x = 2\n", "utf-8")
        self.assertEqual((self.tree / "src/transformers/new/part.py").read_text("utf-8"), "x = 2\n")

    def test_what_did_not_change_is_not_touched(self):
        build.refresh(self.repo)
        before = {path: path.lstat().st_mtime_ns for path in self.tree.rglob("*")}
        build.refresh(self.repo)
        self.assertEqual({path: path.lstat().st_mtime_ns for path in self.tree.rglob("*")}, before)

    def test_a_missing_or_other_upstream_is_an_error(self):
        init = self.repo / "build/upstream/src/transformers/__init__.py"
        init.write_text("__version__ = \"5.0.0\"\nT = ['p']\n", "utf-8")
        with self.assertRaisesRegex(PatchError, "run `pip install -e .` again"):
            build.refresh(self.repo)
        init.unlink()
        with self.assertRaisesRegex(PatchError, "run `pip install -e .` once"):
            build.refresh(self.repo)
        self.assertFalse(self.tree.exists())


@unittest.skipUnless(shutil.which("cc") or shutil.which("c++"), "needs a compiler")
class LibraryTest(TreeTestCase):
    def setUp(self):
        super().setUp()
        self.source = self.repo / KERNELS / "cpu.cpp"
        write(self.repo, {f"{KERNELS}/cpu.cpp": 'extern "C" int answer() { return 42; }\n', f"{KERNELS}/cpu.h": ""})
        self.library = self.tree / build.LIBRARY

    def test_the_library_is_compiled_when_it_is_missing_or_older_than_a_source(self):
        import ctypes

        build.refresh(self.repo)
        self.assertTrue(build.is_library_stale(self.repo))
        extension.compile_in_place(self.repo)
        self.assertEqual(ctypes.CDLL(str(self.library)).answer(), 42)
        build.refresh(self.repo)
        self.assertFalse(build.is_library_stale(self.repo))
        later = time.time() + 10
        os.utime(self.source.with_suffix(".h"), (later, later))
        self.assertTrue(build.is_library_stale(self.repo))

    def test_a_source_that_does_not_compile_is_an_error_and_leaves_no_old_library(self):
        build.refresh(self.repo)
        write(self.tree, {str(build.LIBRARY): "old"})
        self.source.write_text("int answer(", "utf-8")
        with self.assertRaisesRegex(PatchError, "the kernels do not compile"):
            extension.compile_in_place(self.repo)
        self.assertFalse(self.library.exists())
