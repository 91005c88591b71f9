"""A Python source as nested, named items: what an edit can refer to."""

import ast
import re
from dataclasses import dataclass, replace


WILDCARD = "..."  # how an edit writes "what upstream has here"
BLOCKS = (ast.Try, ast.With, ast.For, ast.While, ast.Match)  # what an edit can add but not reach into


@dataclass
class Item:
    """A statement, or a part of an import, a literal or a call.

    Args:
        name: What identifies it among its siblings.
        kind: The class of its syntax node.
        first, last: Its lines, from 1, decorators included.
        start, end: Its bytes in the source, decorators included.
        column: The byte in its line at which it starts.
        items: The items in it, or None where an edit cannot reach into it.
        has_else: Whether it is an `if` with an `else`, which an edit cannot reach into.
    """

    name: str
    kind: type
    first: int
    last: int
    start: int
    end: int
    column: int
    items: list["Item"] | None = None
    has_else: bool = False

    @property
    def is_wildcard(self) -> bool:
        return self.name == WILDCARD

    @property
    def is_partial(self) -> bool:
        return any(item.is_wildcard for item in self.items or ())

    @property
    def is_import(self) -> bool:
        return self.kind in (ast.Import, ast.ImportFrom)

    @property
    def is_definition(self) -> bool:
        return self.kind in (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    @property
    def is_function(self) -> bool:
        return self.kind in (ast.FunctionDef, ast.AsyncFunctionDef)

    @property
    def is_body(self) -> bool:
        """Whether its items are statements rather than parts separated by commas."""
        return self.kind in (ast.Module, ast.ClassDef, ast.If)

    def holds(self, part: "Item") -> bool:
        """Whether all that is in `part`, wildcards aside, is in this item too."""
        return all(
            item.is_wildcard or any(item.name == mine.name and mine.holds(item) for mine in self.items or ())
            for item in part.items or ()
        )


class Source:
    """The text of a Python module, with its items in `root`."""

    def __init__(self, text: str):
        self.data = text.encode("utf-8")
        self.starts = [0, *(match.end() for match in re.finditer(rb"\n", self.data))]
        tree = ast.parse(text)
        body = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
        self.root = Item("", ast.Module, 1, len(self.starts), 0, len(self.data), 0, [self._item(n) for n in body])

    def line_start(self, line: int) -> int:
        """The byte at which `line` (from 1) starts; the end of the data if there is no such line."""
        return self.starts[line - 1] if line <= len(self.starts) else len(self.data)

    def line(self, number: int) -> bytes:
        return self.data[self.line_start(number) : self.line_start(number + 1)]

    def _item(self, node: ast.AST, name: str | None = None, items: list[Item] | None = None) -> Item:
        if items is None:
            name, items = self._parts(node, name)
        line, column = node.lineno, node.col_offset
        if getattr(node, "decorator_list", None):
            line, column = node.decorator_list[0].lineno, node.col_offset
        start = self.line_start(line) + column
        end = self.line_start(node.end_lineno) + node.end_col_offset
        has_else = isinstance(node, ast.If) and bool(node.orelse)
        return Item(name or ast.unparse(node), type(node), line, node.end_lineno, start, end, column, items, has_else)

    def _parts(self, node: ast.AST, name: str | None) -> tuple[str | None, list[Item] | None]:
        match node:
            case ast.ClassDef(body=body) | ast.FunctionDef(body=body) | ast.AsyncFunctionDef(body=body):
                return node.name, [self._item(n) for n in body]
            case ast.If(body=body):
                return f"if {ast.unparse(node.test)}", [self._item(n) for n in body]
            case ast.ImportFrom(names=names) if not any(alias.asname for alias in names):
                return f"from {'.' * node.level}{node.module or ''}", [self._item(alias) for alias in names]
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=value) if value:
                return ast.unparse(target), self._inside(value)
            case ast.Expr(value=ast.Call(func=func) as call):
                return f"{ast.unparse(func)}()", self._inside(call)
        if isinstance(node, BLOCKS):
            return name, [self._item(n) for n in ast.walk(node) if isinstance(n, ast.Expr) and _is_wildcard(n.value)]
        return name, self._inside(node) if isinstance(node, ast.expr) else None

    def _inside(self, value: ast.AST) -> list[Item] | None:
        match value:
            case ast.Constant() if _is_wildcard(value):
                return [self._item(value, WILDCARD, items=[])]
            case ast.Dict(keys=keys, values=values):
                return [self._pair(key, value) for key, value in zip(keys, values)]
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                return [self._item(element) for element in elements]
            case ast.Call(args=args, keywords=keywords):
                return [self._item(arg) for arg in args] + [self._keyword(keyword) for keyword in keywords]
        return None

    def _pair(self, key: ast.AST | None, value: ast.AST) -> Item:
        if key is None:
            start = self.data.rindex(b"**", 0, self._item(value).start)
            column = start - self.line_start(value.lineno)
            return replace(self._item(value), kind=ast.Dict, start=start, column=column)
        last = self._item(value, items=[])
        return replace(
            self._item(key, items=[]), kind=ast.Dict, last=last.last, end=last.end, items=self._inside(value)
        )

    def _keyword(self, keyword: ast.keyword) -> Item:
        name = f"{keyword.arg}=" if keyword.arg else f"**{ast.unparse(keyword.value)}"
        return replace(self._item(keyword, name, []), items=self._inside(keyword.value))


def _is_wildcard(value: ast.AST) -> bool:
    return isinstance(value, ast.Constant) and value.value is ...
