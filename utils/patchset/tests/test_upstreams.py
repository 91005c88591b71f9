import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from .. import REPO, UPSTREAM, tree
from . import upstreams


RELEASES = ("5.21.1", "5.22.2", "5.23.0", UPSTREAM)


def added_lines(source: Path, folder: Path) -> dict[str, list[str]]:
    """The lines that patching `source` adds, by file."""
    patched = Path(shutil.copytree(source, folder / source.name))
    plan = tree.patch(patched)
    added = {str(path): origin.read_text("utf-8").splitlines() for path, origin in plan.added.items()}
    for path in plan.merged:
        before, after = ((root / path).read_text("utf-8").splitlines() for root in (source, patched))
        added[str(path)] = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    return added


@unittest.skipUnless(os.environ.get("RUN_SLOW") == "1", "test is slow: set RUN_SLOW=1")
class UpstreamsTest(unittest.TestCase):
    def test_the_same_edits_add_the_same_lines_to_every_release(self):
        with tempfile.TemporaryDirectory() as folder:
            expected = added_lines(upstreams.fetch(UPSTREAM), Path(folder, "expected"))
            edits = [path for path in tree.our_files(REPO) if path.parts[0] == "src" and ".edit" in path.name]
            self.assertGreater(len(edits), 0)
            for release in RELEASES:
                with self.subTest(release):
                    self.assertEqual(added_lines(upstreams.fetch(release), Path(folder, release)), expected)

    def test_a_pull_request_passes_its_tests_without_compiled_kernels(self):
        with tempfile.TemporaryDirectory() as folder:
            patched = Path(shutil.copytree(upstreams.fetch(UPSTREAM), Path(folder, "patched")))
            (patched / "tests" / "quantization").mkdir()
            plan = tree.patch(patched, files=tree.pull_request())
            self.assertEqual(plan.skipped, ["docs"])
            self.assertFalse([path for path in patched.rglob("exl3/**/*") if path.is_file() and path.suffix != ".py"])
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/quantization"]
            environment = os.environ | {"PYTHONPATH": "src", "RUN_SLOW": "0"}
            done = subprocess.run(command, cwd=patched, env=environment, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertRegex(done.stdout, r"\d{2} passed")
