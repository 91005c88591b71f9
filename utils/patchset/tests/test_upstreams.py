import difflib
import os
import shutil
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
