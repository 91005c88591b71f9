import tempfile
import unittest
from pathlib import Path

from .. import watch
from .test_tree import write


class WatchTest(unittest.TestCase):
    def test_names_that_changed_and_names_that_are_gone(self):
        with tempfile.TemporaryDirectory() as folder:
            old = write(Path(folder, "old"), {"src/transformers/a.py": "def f(): return 1\ndef g(): ...\nX = 1\n"})
            new = write(Path(folder, "new"), {"src/transformers/a.py": "def f(): return 2\nX = 1  # the same\n"})
            found = watch.changes(old, new, {"transformers.a": {"f", "g", "X"}})
        self.assertEqual(found, (["changed  transformers.a.f"], ["gone     transformers.a.g"]))

    def test_a_module_that_is_gone(self):
        with tempfile.TemporaryDirectory() as folder:
            old = write(Path(folder, "old"), {"src/transformers/a/__init__.py": "from .b import f\n"})
            found = watch.changes(old, Path(folder), {"transformers.a": {"f"}})
        self.assertEqual(found, ([], ["gone     transformers.a.f"]))

    def test_what_is_imported_is_upstreams(self):
        names = watch.imported()
        self.assertIn("WeightConverter", names["transformers.core_model_loading"])
        self.assertIn("HfQuantizer", names["transformers.quantizers.base"])
        self.assertFalse([module for module in names if ".exl3" in module])
