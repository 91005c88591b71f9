import importlib.util
import os
import tempfile
import tomllib
import unittest
from pathlib import Path
from unittest.mock import patch

import torch

from transformers.integrations import hub_kernels
from transformers.integrations.exl3.kernels import cpu, hub
from transformers.integrations.exl3.kernels.triton import gpu
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from .. import REPO, build, extension


@unittest.skipUnless((REPO / build.TREE / build.LIBRARY).is_file(), "needs the compiled kernels")
@unittest.skipUnless(importlib.util.find_spec("kernels"), "needs kernels")
class HubKernelTest(unittest.TestCase):
    """The kernel of the hub's is loaded by the `kernels` package, from a folder instead of the hub."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.kernels = extension.write_hub_kernels(Path(folder.name, "kernels"))
        cls.folder = cls.kernels / "exl3-cpu"

    def setUp(self):
        cpu._found.cache_clear()
        self.addCleanup(cpu._found.cache_clear)
        # Whether upstream takes the release of `kernels` that is installed is its own affair.
        self.enter(patch.object(hub, "is_kernels_available", return_value=True))
        self.enter(patch.object(hub_kernels, "_kernels_enabled", True))
        self.take_from(self.folder)
        gpu.kernels.cache_clear()
        self.addCleanup(gpu.kernels.cache_clear)

    def enter(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def take_from(self, folder):
        folders = {cpu.HUB_KERNEL: folder, gpu.HUB_KERNEL: self.kernels / "exl3-triton"}
        local = ":".join(f"{name}={path}" for name, path in folders.items())
        self.enter(patch.dict(os.environ, {"LOCAL_KERNELS": local}))

    def library(self):
        return Path(cpu.kernels()._library._name)

    def test_kernel_builder_reads_the_project(self):
        from kernels._rust import Build

        Build.open(self.folder)  # which parses and checks it as kernel-builder does
        config = tomllib.loads((self.folder / "build.toml").read_text("utf-8"))
        self.assertEqual(config["general"]["version"], cpu.HUB_VERSION)
        kernel = config["kernel"]["exl3_cpu"]
        self.assertIn("-ffp-contract=off", kernel["cxx-flags"])
        included = {f"exl3_cpu/{name}" for path in self.folder.glob("exl3_cpu/*") for name in included_by(path)}
        self.assertEqual({"exl3_cpu/cpu.cpp", *included}, set(kernel["src"]))
        self.assertTrue(all((self.folder / source).is_file() for source in kernel["src"]))

    def test_products_are_those_of_the_built_library(self):
        trellis = torch.randint(-(2**15), 2**15, (8, 16, 48), dtype=torch.int16)
        suh, svh = torch.rand(128), torch.rand(256)
        weight = cpu.kernels().dequantize(trellis, suh, svh, "mul1")
        self.assertEqual(self.library().parent.parent.parent, self.folder)
        cpu._found.cache_clear()
        with patch.object(hub_kernels, "_kernels_enabled", False):
            torch.testing.assert_close(cpu.kernels().dequantize(trellis, suh, svh, "mul1"), weight, rtol=0, atol=0)
            self.assertEqual(self.library(), cpu.LIBRARY)

    def test_a_folder_without_a_kernel_is_told_and_the_built_library_used(self):
        self.take_from(self.folder / "exl3_cpu")
        with CaptureLogger(logging.get_logger(hub.__name__)) as captured:
            self.assertTrue(cpu.is_available())
        self.assertIn("Cannot find a build variant", captured.out)
        self.assertEqual(self.library(), cpu.LIBRARY)

    @unittest.skipUnless(importlib.util.find_spec("triton"), "needs triton")
    def test_triton_kernels_are_the_same_files(self):
        from kernels._rust import Build

        Build.open(self.kernels / "exl3-triton")
        with patch.object(gpu, "_ARE_HERE", False):
            calls = gpu.kernels()
            for module in (calls, calls.multiplying, calls.dequantizing, calls.searching, calls.target):
                self.assertTrue(Path(module.__file__).is_relative_to(self.kernels), module.__file__)
                here = Path(gpu.__file__).with_name(Path(module.__file__).name)
                self.assertEqual(Path(module.__file__).read_bytes(), here.read_bytes())
            self.assertTrue(calls.multiplying.row_tiles(calls.target.Target("cuda", "sm_80", 108)))

    def test_without_any_library_the_reasons_are_told(self):
        logger = logging.get_logger(cpu.__name__)
        with patch.object(cpu, "LIBRARY", Path("nowhere")), CaptureLogger(logger) as captured:
            with patch.object(hub_kernels, "_kernels_enabled", False):
                self.assertFalse(cpu.is_available())
        self.assertIn("USE_HUB_KERNELS", captured.out)
        self.assertIn("no nowhere", captured.out)


def included_by(path: Path) -> list[str]:
    return [line.split('"')[1] for line in path.read_text("utf-8").splitlines() if line.startswith('#include "')]
