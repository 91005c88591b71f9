import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile
from pathlib import Path

from .. import REPO, UPSTREAM, build, tree
from . import upstreams
from .test_tree import write


KERNELS = "src/transformers/integrations/exl3/kernels/cpu"
SETUP = """
import runpy
from setuptools import setup
edit = runpy.run_path("setup.edit.py")
setup(
    name="transformers",
    version="1.0",
    package_dir={"": "src"},
    packages=["transformers"],
    ext_modules=[edit["EXL3_KERNELS"]],
    cmdclass={"bdist_wheel": edit["KernelWheel"], "build_ext": edit["BuildKernels"]},
)
"""


def run_setup(folder: Path, *arguments: str, **environment: str) -> str:
    """What setup.py prints."""
    command = [sys.executable, "setup.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def unpacked_sdist(folder: Path) -> Path:
    """The source tree in the source distribution that `folder` makes."""
    run_setup(folder, "-q", "sdist")
    (archive,) = folder.glob("dist/*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


def wheel_of(folder: Path, **environment: str) -> tuple[str, list[str], str]:
    """The name of the wheel that `folder` makes, the files in it, and what was printed."""
    output = run_setup(folder, "-q", "bdist_wheel", **environment)
    (wheel,) = folder.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as file:
        return wheel.name, file.namelist(), output


@unittest.skipUnless(shutil.which("cc") or shutil.which("c++"), "needs a compiler")
class WheelTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        files = {
            f"{KERNELS}/cpu.cpp": '#include "sub/a.h"\n#include "b.h"\n',
            f"{KERNELS}/sub/a.h": "",
            f"{KERNELS}/b.h": "",
        }
        write(self.folder, files | {"setup.py": SETUP, "src/transformers/__init__.py": ""})
        shutil.copy(REPO / "setup.edit.py", self.folder)
        self.library = str(build.LIBRARY.relative_to(build.SOURCE))

    def test_a_source_distribution_has_all_that_the_kernels_include(self):
        sources = unpacked_sdist(self.folder)
        self.assertTrue((sources / KERNELS / "sub" / "a.h").is_file())
        shutil.copy(REPO / "setup.edit.py", sources)
        name, files, output = wheel_of(sources)
        self.assertIn(self.library, files)
        self.assertNotIn("-any.whl", name)
        self.assertNotIn("not compiled", output)

    def test_a_wheel_without_the_library_says_so_and_is_for_any_platform(self):
        write(self.folder, {f"{KERNELS}/cpu.cpp": "this is no C++"})
        name, files, output = wheel_of(self.folder)
        self.assertNotIn(self.library, files)
        self.assertIn("transformers/__init__.py", files)
        self.assertEqual(name, "transformers-1.0-py3-none-any.whl")
        self.assertIn("kernels for CPUs were not compiled", output)


@unittest.skipUnless(os.environ.get("RUN_SLOW") == "1", "test is slow: set RUN_SLOW=1")
class ExportedWheelTest(unittest.TestCase):
    def test_a_wheel_from_the_source_distribution_of_a_patched_tree_has_the_library(self):
        with tempfile.TemporaryDirectory() as folder:
            patched = Path(shutil.copytree(upstreams.fetch(UPSTREAM), Path(folder, "patched")))
            tree.patch(patched)
            name, files, output = wheel_of(unpacked_sdist(patched))
        self.assertIn(str(build.LIBRARY.relative_to(build.SOURCE)), files, output)
        self.assertNotIn("-any.whl", name)
