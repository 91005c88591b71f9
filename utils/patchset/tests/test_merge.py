import textwrap
import unittest

from parameterized import parameterized

from .. import PatchError
from ..merge import merge


def merged(upstream: str, edit: str) -> str:
    return merge(textwrap.dedent(upstream), textwrap.dedent(edit), "x.edit.py")


class MergeTest(unittest.TestCase):
    def check(self, upstream: str, edit: str, expected: str):
        self.assertEqual(merged(upstream, edit), textwrap.dedent(expected))

    def check_misfits(self, upstream: str, edit: str, *expected: str):
        with self.assertRaises(PatchError) as caught:
            merged(upstream, edit)
        lines = str(caught.exception).splitlines()
        self.assertEqual(len(lines), len(expected), lines)
        for line, part in zip(lines, expected):
            self.assertIn(part, line)

    def test_an_entry_goes_in_order_where_upstream_is_in_order(self):
        self.check(
            """
            TABLE = {
                "a": 1,
                "c": 3,
            }
            """,
            'TABLE = {**..., "b": 2}',
            """
            TABLE = {
                "a": 1,
                "b": 2,
                "c": 3,
            }
            """,
        )

    def test_an_entry_goes_last_where_upstream_is_in_no_order(self):
        self.check(
            """
            NAMES = (
                Zebra,
                Ape,
            )
            """,
            "NAMES = (..., Bear)",
            """
            NAMES = (
                Zebra,
                Ape,
                Bear,
            )
            """,
        )

    def test_an_entry_goes_after_the_place_marked(self):
        self.check(
            """
            TABLE = {
                "a": 1,
                "c": 3,
                "b": 2,
            }
            """,
            """
            TABLE = {
                "a": ...,
                "z": 9,
                **...,
            }
            """,
            """
            TABLE = {
                "a": 1,
                "z": 9,
                "c": 3,
                "b": 2,
            }
            """,
        )

    def test_a_list_in_a_dict_is_reached(self):
        self.check(
            """
            TABLE = {
                "a": [
                    "One",
                    "Two",
                ],
            }
            """,
            'TABLE = {**..., "a": [..., "Three"]}',
            """
            TABLE = {
                "a": [
                    "One",
                    "Three",
                    "Two",
                ],
            }
            """,
        )

    def test_what_is_on_one_line_stays_on_it(self):
        self.check(
            "f(x={'b': 1}, y=['p'])\n",
            "f(..., x={**..., 'a': 0, 'c': 2}, y=[..., 'q'], z=3)",
            "f(x={'a': 0, 'b': 1, 'c': 2}, y=['p', 'q'], z=3)\n",
        )

    def test_keywords_go_last_in_a_call(self):
        self.check(
            """
            if __name__ == "__main__":
                setup(
                    name="é",
                    data={"": ["*.cu", "py.typed"]},
                )
            """,
            """
            if __name__ == "__main__":
                ...
                setup(
                    ...,
                    data={**..., "": [..., "*.inc"]},
                    # Why.
                    modules=[
                        1,
                    ],
                )
            """,
            """
            if __name__ == "__main__":
                setup(
                    name="é",
                    data={"": ["*.cu", "*.inc", "py.typed"]},
                    # Why.
                    modules=[
                        1,
                    ],
                )
            """,
        )

    def test_imports_are_united(self):
        self.check(
            """
            import sys
            from os import (
                path,
                walk,
            )

            from a import A, c
            from z import z


            x = 1
            """,
            """
            import re
            import sys
            from a import B, c
            from b import thing
            from os import sep
            """,
            """
            import re
            import sys
            from os import (
                path,
                sep,
                walk,
            )

            from a import A, B, c
            from b import thing
            from z import z


            x = 1
            """,
        )

    def test_an_import_goes_to_the_block_that_has_its_module(self):
        self.check(
            """
            if TYPE_CHECKING:
                from .a import A as A
                from .b import B as B
                from .c import C as C

                # More.
                from .d import D as D
                from .e import E as E
            """,
            """
            if TYPE_CHECKING:
                ...
                from .d import F as F
            """,
            """
            if TYPE_CHECKING:
                from .a import A as A
                from .b import B as B
                from .c import C as C

                # More.
                from .d import D as D
                from .d import F as F
                from .e import E as E
            """,
        )

    def test_a_member_and_a_method_go_into_a_class(self):
        self.check(
            """
            class Method(Enum):
                B = 1
                A = 2


            def f():
                pass
            """,
            """
            class Method:
                ...
                C = 3  # last

                @property
                def g(self):
                    return 1
            """,
            """
            class Method(Enum):
                B = 1
                A = 2
                C = 3  # last

                @property
                def g(self):
                    return 1


            def f():
                pass
            """,
        )

    def test_definitions_go_after_the_place_marked(self):
        self.check(
            """
            class A:
                pass


            if True:
                x = 1
            """,
            """
            class A: ...


            # Ours.
            ONE = 1
            TWO = 2


            class B:
                pass
            """,
            """
            class A:
                pass


            # Ours.
            ONE = 1
            TWO = 2


            class B:
                pass


            if True:
                x = 1
            """,
        )

    def test_a_definition_goes_last_and_wildcards_in_its_code_are_its_own(self):
        self.check(
            "x = 1",
            "def f(y) -> tuple[int, ...]:\n    return y[..., 0]\n",
            "x = 1\n\n\ndef f(y) -> tuple[int, ...]:\n    return y[..., 0]\n",
        )

    @parameterized.expand(
        [
            ("missing", "x = 1", "\nTABLE = {**..., 'a': 1}", "x.edit.py:2: `TABLE` is not in upstream's file"),
            ("known_value", "x = 1", "x = 2", "x.edit.py:1: `x` is already in"),
            ("known_entry", "t = {\n 'a': 1,\n}", "t = {**..., 'a': 2}", "`'a'` in `t` is already in"),
            ("known_class", "class A:\n    pass", "class A:\n    x = 1", "`A` is already in"),
            ("twice", "if a:\n    x = 1\nif a:\n    y = 1", "if a:\n    ...\n    z = 1", "once but 2 times"),
            ("function", "def f():\n    x()", "def f():\n    ...\n    y()", "bodies of functions are not edited"),
            ("no_literal", "t = g()", "t = [..., 1]", "upstream's is empty or no literal"),
            ("no_room", f"t = ['{'a' * 110}']", "t = [..., 'b']", "no room"),
            ("block", "try:\n    x()\nexcept E:\n    y()", "try:\n    ...\nexcept E:\n    z()", "cannot be partial"),
            ("with_else", "if a:\n    x = 1", "if a:\n    ...\nelse:\n    y = 1", "an `else`"),
            ("edit_syntax", "x = 1", "x = (", "x.edit.py:1: the edit is no valid Python"),
            ("upstream_syntax", "x = (", "y = 1", "upstream's file is no valid Python"),
            ("layout", "t = [\n    'a'\n]", "t = [..., 'b']", "upstream's layout does not take the edit"),
        ]
    )
    def test_misfit(self, _, upstream, edit, expected):
        self.check_misfits(upstream, edit, expected)

    def test_every_misfit_is_named(self):
        self.check_misfits(
            "x = 1", "x = 2\nT = [..., 1]\nz = 1\nclass C:\n    ...\n    y = 1", ":1: `x`", ":2: `T`", ":4: `C`"
        )

    def test_an_edit_does_not_merge_twice(self):
        edit = "from a import b\n\n\nT = [..., 'q']"
        once = merged("from a import a\n\n\nT = ['p']\n", edit)
        self.check_misfits(once, edit, "`'q'` in `T` is already in")
