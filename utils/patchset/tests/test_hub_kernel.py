import importlib.util
import os
import tempfile
import tomllib
import unittest
from pathlib import Path
from unittest.mock import patch

import torch

from transformers.integrations import hub_kernels
from transformers.integrations.exl3.kernels import cpu
from transformers.integrations.exl3.kernels.cpu import hub
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
        cls.folder = extension.write_hub_kernel(Path(folder.name, "kernel"))

    def setUp(self):
        cpu._library.cache_clear()
        self.addCleanup(cpu._library.cache_clear)
        # Whether upstream takes the release of `kernels` that is installed is its own affair.
        self.enter(patch.object(hub, "is_kernels_available", return_value=True))
        self.enter(patch.object(hub_kernels, "_kernels_enabled", True))
        self.take_from(self.folder)

    def enter(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def take_from(self, folder):
        self.enter(patch.dict(os.environ, {"LOCAL_KERNELS": f"{hub.REPOSITORY}={folder}"}))

    def test_kernel_builder_reads_the_project(self):
        from kernels._rust import Build

        Build.open(self.folder)  # which parses and checks it as kernel-builder does
        config = tomllib.loads((self.folder / "build.toml").read_text("utf-8"))
        self.assertEqual(config["general"]["version"], cpu.ABI_VERSION)
        kernel = config["kernel"]["exl3_cpu"]
        self.assertIn("-ffp-contract=off", kernel["cxx-flags"])
        included = {f"exl3_cpu/{name}" for path in self.folder.glob("exl3_cpu/*") for name in included_by(path)}
        self.assertEqual({"exl3_cpu/cpu.cpp", *included}, set(kernel["src"]))
        self.assertTrue(all((self.folder / source).is_file() for source in kernel["src"]))

    def test_products_are_those_of_the_built_library(self):
        trellis = torch.randint(-(2**15), 2**15, (8, 16, 48), dtype=torch.int16)
        suh, svh = torch.rand(128), torch.rand(256)
        weight = cpu.dequantize(trellis, suh, svh, "mul1")
        self.assertEqual(Path(cpu._library()._name).parent.parent.parent, self.folder)
        cpu._library.cache_clear()
        with patch.object(hub_kernels, "_kernels_enabled", False):
            torch.testing.assert_close(cpu.dequantize(trellis, suh, svh, "mul1"), weight, rtol=0, atol=0)
            self.assertEqual(Path(cpu._library()._name), cpu.LIBRARY)

    def test_another_abi_is_refused(self):
        with patch.object(cpu, "ABI_VERSION", 1), self.assertRaisesRegex(ImportError, f"needs 1: .*{hub.REPOSITORY}"):
            cpu.is_available()

    def test_a_folder_without_a_kernel_is_told_and_the_built_library_used(self):
        self.take_from(self.folder / "exl3_cpu")
        with CaptureLogger(logging.get_logger(hub.__name__)) as captured:
            self.assertTrue(cpu.is_available())
        self.assertIn("Cannot find a build variant", captured.out)
        self.assertEqual(Path(cpu._library()._name), cpu.LIBRARY)

    def test_without_any_library_the_reasons_are_told(self):
        logger = logging.get_logger(cpu.__name__)
        with patch.object(cpu, "LIBRARY", Path("nowhere")), CaptureLogger(logger) as captured:
            with patch.object(hub_kernels, "_kernels_enabled", False):
                self.assertFalse(cpu.is_available())
        self.assertIn("USE_HUB_KERNELS", captured.out)
        self.assertIn("no nowhere", captured.out)


def included_by(path: Path) -> list[str]:
    return [line.split('"')[1] for line in path.read_text("utf-8").splitlines() if line.startswith('#include "')]
