import unittest

from parameterized import parameterized

from .. import PatchError
from ..hunks import merge


UPSTREAM = """\
- sections:
  - local: a
    title: A
  - local: c
    title: C"""


class HunksTest(unittest.TestCase):
    def test_lines_go_next_to_their_anchor_indented_as_it_is(self):
        edit = "@@ before local: c\n- local: b\n  title: B\n\n@@ after title: C\n\nend: 1\n"
        self.assertEqual(
            merge(UPSTREAM, edit, "x.edit.yml"),
            "- sections:\n  - local: a\n    title: A\n  - local: b\n    title: B\n  - local: c\n    title: C\n"
            "\n    end: 1\n",
        )

    @parameterized.expand(
        [
            ("no_anchor", "@@ before local: x\nb\n", "x.edit.yml:1: `local: x` is not in one line", "in 0"),
            ("ambiguous", "\n@@ after local\nb\n", "x.edit.yml:2: `local`", "in 2"),
            ("empty_anchor", "@@ after \nb\n", "x.edit.yml:1:", "in 0"),
            ("side", "@@ at local: a\nb\n", "neither `@@ before <text>`"),
            ("no_lines", "@@ after local: a\n\n", "has no lines to add"),
            ("there", "@@ after local: a\n  title: A\n", "already in upstream's file"),
            ("no_hunk", "b\n", "x.edit.yml:1: the edit must start with"),
            ("empty", "", "the edit has no `@@ before <text>`"),
        ]
    )
    def test_misfit(self, _, edit, *expected):
        with self.assertRaises(PatchError) as caught:
            merge(UPSTREAM, edit, "x.edit.yml")
        for part in expected:
            self.assertIn(part, str(caught.exception))
