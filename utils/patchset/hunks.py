"""Merge an edit, a list of hunks, into a file of upstream's that is no Python.

A hunk is a line `@@ before <text>` or `@@ after <text>` and the lines below it. They go next to the one line of
upstream's that contains <text>, indented as that line is.
"""

import textwrap

from . import PatchError


def merge(upstream: str, edit: str, name: str) -> str:
    """Add the hunks of `edit` to `upstream`.

    Args:
        upstream: The text of upstream's file.
        edit: The text of the edit.
        name: The path of the edit, for messages.

    Returns:
        Upstream's text with our lines inserted.

    Raises:
        PatchError: If a hunk does not fit; a line of the message for each, with `name` and the line of the edit.
    """
    lines = upstream.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    additions: dict[int, str] = {}
    misfits = []
    for number, head, body in _hunks(edit, name):
        side, _, text = head.partition(" ")
        hits = [index for index, line in enumerate(lines) if text.strip() and text in line]
        if side not in ("before", "after"):
            misfits.append(f"{name}:{number}: `@@ {head}` is neither `@@ before <text>` nor `@@ after <text>`")
        elif not body.strip():
            misfits.append(f"{name}:{number}: `@@ {head}` has no lines to add")
        elif len(hits) != 1:
            misfits.append(f"{name}:{number}: `{text}` is not in one line of upstream's file but in {len(hits)}")
        else:
            anchor = lines[hits[0]]
            body = textwrap.indent(body, anchor[: len(anchor) - len(anchor.lstrip())])
            if body in upstream:
                misfits.append(f"{name}:{number}: the lines of `@@ {head}` are already in upstream's file")
            index = hits[0] + (side == "after")
            additions[index] = additions.get(index, "") + body
    if misfits:
        raise PatchError("\n".join(misfits))
    return "".join(additions.get(index, "") + line for index, line in enumerate([*lines, ""]))


def _hunks(edit: str, name: str):
    """Yields the number of its line, the head without `@@ ` and the body of each hunk."""
    number, head, body = 0, None, []
    for index, line in enumerate([*edit.splitlines(), "@@ "], 1):
        if not line.startswith("@@ "):
            if head is None and line.strip():
                raise PatchError(
                    f"{name}:{index}: the edit must start with a line `@@ before <text>` or `@@ after <text>`"
                )
            body.append(line)
            continue
        if head is not None:
            # Blank lines before the next hunk only separate the two.
            yield number, head, "\n".join(body).rstrip("\n") + "\n"
        number, head, body = index, line.removeprefix("@@ "), []
    if number == 1:
        raise PatchError(f"{name}: the edit has no `@@ before <text>` or `@@ after <text>`")
