"""Merge an edit, a partial module, into the Python file of upstream's that it is named after.

In an edit `...` stands for what upstream has there. Beside our own content in a body, a literal or a call it keeps
upstream's (`{**..., "key": value}`, `[..., item]`, `setup(..., keyword=value)`); as a whole body or value it only
marks the place after which our next definition goes. Imports are united. Bodies of functions cannot be edited.
"""

import ast
import re
from bisect import bisect
from dataclasses import dataclass, field

from . import PatchError
from .items import BLOCKS, Item, Source


LINE_LENGTH = 119  # upstream's


def merge(upstream: str, edit: str, name: str) -> str:
    """Add to the source `upstream` what is in `edit`.

    Args:
        upstream: The text of upstream's module.
        edit: The text of the partial module.
        name: The path of the edit, for messages.

    Returns:
        Upstream's text with our lines inserted.

    Raises:
        PatchError: If something does not fit; a line of the message for each, with `name` and the line of the edit.
    """
    try:
        theirs = Source(upstream)
    except SyntaxError as error:
        raise PatchError(f"{name}: upstream's file is no valid Python: {error}") from error
    try:
        ours = Source(edit)
    except SyntaxError as error:
        raise PatchError(f"{name}:{error.lineno}: the edit is no valid Python: {error.msg}") from error
    merger = _Merger(name, theirs, ours)
    merger.weave(theirs.root, ours.root)
    if merger.misfits:
        raise PatchError("\n".join(merger.misfits))
    merged = merger.result()
    try:
        whole = Source(merged).root
    except SyntaxError as error:
        raise PatchError(f"{name}: upstream's layout does not take the edit: {error}") from error
    if not (whole.holds(theirs.root) and whole.holds(ours.root)):
        raise PatchError(f"{name}: upstream's layout does not take the edit: the result is not the sum of both")
    return merged


@dataclass
class _Merger:
    name: str
    theirs: Source
    ours: Source
    misfits: list[str] = field(default_factory=list)
    inserts: list[tuple[int, str]] = field(default_factory=list)
    inserted: dict[int, Item] = field(default_factory=dict)

    def result(self) -> str:
        pieces, done = [], 0
        # The sort is stable: what goes to one place stays in the order of the edit.
        for offset, text in sorted(self.inserts, key=lambda insert: insert[0]):
            pieces += [self.theirs.data[done:offset], text.encode("utf-8")]
            done = offset
        return b"".join([*pieces, self.theirs.data[done:]]).decode("utf-8")

    def misfit(self, item: Item, parent: Item, what: str):
        inside = f" in `{parent.name}`" if parent.name else ""
        self.misfits.append(f"{self.name}:{item.first}: `{item.name.splitlines()[0]}`{inside} {what}")

    def weave(self, theirs: Item, ours: Item):
        """Insert what `ours` has and `theirs` lacks, and descend where both have an item."""
        place = None
        for item in ours.items:
            if item.is_wildcard:
                continue
            same = [their for their in theirs.items if their.name == item.name]
            if item.is_partial and item.kind in BLOCKS:
                self.misfit(item, ours, "cannot be partial: an edit does not reach into this kind of block")
            elif item.is_partial and item.has_else:
                self.misfit(item, ours, "cannot be partial and have an `else`")
            elif item.is_partial and len(same) != 1:
                self.misfit(item, ours, f"is not in upstream's file once but {len(same)} times")
            elif item.is_partial and all(part.is_wildcard for part in item.items):
                place = same[0]
            elif item.is_partial and item.is_function:
                self.misfit(item, ours, "cannot be added to: the bodies of functions are not edited")
            elif item.is_partial and not same[0].items:
                self.misfit(item, ours, "cannot be added to: upstream's is empty or no literal")
            elif item.is_partial:
                self.weave(same[0], item)
            elif item.is_import and same:
                self.unite(same, item)
            elif same:
                self.misfit(item, ours, "is already in upstream's file")
            else:
                self.insert(theirs, item, place)

    def unite(self, same: list[Item], ours: Item):
        """Add the names that `ours` imports to the first of upstream's imports from that module."""
        known = {alias.name for their in same for alias in their.items or ()}
        for alias in ours.items or ():
            if alias.name not in known:
                self.insert(same[0], alias, None)

    def insert(self, theirs: Item, item: Item, place: Item | None):
        peers = _peers(theirs, item)
        if not peers:
            self.misfit(item, theirs, "cannot be added: upstream's is empty")
        elif theirs.is_body or peers[0].first != theirs.first:
            self._insert_lines(theirs, item, _position(peers, item, place))
        else:
            self._insert_inline(theirs, item, _position(peers, item, place))

    def _insert_lines(self, theirs: Item, item: Item, after: Item | None):
        before = theirs.items[theirs.items.index(after) + 1 :] if after else theirs.items
        line = after.last + 1 if after else before[0].first
        text = self._text(item, theirs.items[0].column)
        if theirs.is_body:
            blank = 2 if theirs.kind is ast.Module else 1
            above = self.inserted.get(line, after)
            if above and (item.is_definition or above.is_definition):
                text = "\n" * blank + text
            if before and item.is_definition:
                text += "\n" * max(0, blank - _blank_lines(self.theirs, line))
        else:
            text = text.removesuffix("\n") + "\n"
        if after and not self.theirs.line(after.last).endswith(b"\n"):
            text = "\n" + text
        self.inserts.append((self.theirs.line_start(line), text))
        self.inserted[line] = item

    def _insert_inline(self, theirs: Item, item: Item, after: Item | None):
        text = self.ours.data[item.start : item.end].decode("utf-8")
        line = self.theirs.line(theirs.first).rstrip().decode("utf-8")
        if "\n" in text or len(line) + len(text) + 2 > LINE_LENGTH:
            self.misfit(item, theirs, "cannot be added: upstream's is all on one line, which has no room for it")
        elif after:
            self.inserts.append((after.end, f", {text}"))
        else:
            self.inserts.append((theirs.items[0].start, f"{text}, "))

    def _text(self, item: Item, column: int) -> str:
        """The lines of our `item`, with the comments that belong to it, moved to `column`."""
        first = item.first
        while first > 1 and self.ours.line(first - 1).lstrip().startswith(b"#"):
            first -= 1
        shift = column - item.column
        above = self.ours.data[self.ours.line_start(first) : self.ours.line_start(item.first)].decode("utf-8")
        text = " " * item.column + self.ours.data[item.start : item.end].decode("utf-8")
        rest = self.ours.data[item.end : self.ours.line_start(item.last + 1)].decode("utf-8")
        comma = "" if issubclass(item.kind, ast.stmt) else ","
        comment = re.fullmatch(r",?( *#.*)?\s*", rest)
        text = above + text + comma + (comment[1] or "" if comment else "") + "\n"
        if shift > 0:
            return re.sub(r"(?m)^(?=.)", " " * shift, text)
        return re.sub(rf"(?m)^ {{1,{-shift}}}", "", text) if shift else text


def _peers(theirs: Item, item: Item) -> list[Item]:
    """Those of upstream's items that a new `item` goes among: for an import, the block most like it."""
    if not item.is_import:
        return theirs.items
    blocks, last = [[]], None
    for their in theirs.items:
        if their.kind is item.kind and _dots(their) == _dots(item):
            if last and their.first > last.last + 1:
                blocks.append([])
            blocks[-1].append(their)
        else:
            blocks.append([])
        last = their

    def likeness(block: list[Item]) -> tuple[bool, bool, int]:
        modules, packages = {_module(its) for its in block}, {_package(its) for its in block}
        return _module(item) in modules, _package(item) in packages, len(block)

    return max(blocks, key=likeness) or theirs.items


def _position(peers: list[Item], item: Item, place: Item | None) -> Item | None:
    """The one after which a new item goes: the place marked, or in order if upstream's are in order, or the last."""
    keys = [_order(peer) for peer in peers]
    if place or keys != sorted(keys) or item.is_definition or item.kind is ast.keyword:
        return place or peers[-1]
    at = bisect(keys, _order(item))
    return peers[at - 1] if at else None


def _blank_lines(source: Source, line: int) -> int:
    count = 0
    while source.line(line + count).strip() == b"" and source.line(line + count):
        count += 1
    return count


def _module(item: Item) -> str:
    return item.name.removeprefix("from ").removeprefix("import ").partition(" ")[0]


def _package(item: Item) -> str:
    return _module(item).lstrip(".").partition(".")[0]


def _dots(item: Item) -> int:
    return len(_module(item)) - len(_module(item).lstrip("."))


def _order(item: Item) -> tuple[int, str]:
    """isort's order: modules by name; in an import or a list CONSTANTS, then Classes, then functions."""
    name = item.name.strip("'\"").removeprefix("from ")
    case = 0 if name.isupper() else 1 if name[:1].isupper() else 2
    return (case if item.kind in (ast.alias, ast.Constant, ast.Name) else 0, name.casefold())
