"""Which of our modules import which."""

import ast
from pathlib import Path


EDIT = ".edit"


def closure(start: set[Path], files: set[Path], repo: Path) -> set[Path]:
    """`start`, and all of `files` that are imported from there, directly or not, by path from the root of the repository."""
    found, open_files = set(), list(start)
    while open_files:
        file = open_files.pop()
        if file not in found:
            found.add(file)
            open_files += imported_files(file, files, repo)
    return found


def imported_files(file: Path, files: set[Path], repo: Path) -> set[Path]:
    """Those of `files` that `file`, a Python module or not, imports from: with each module the packages that it is in."""
    if file.suffix != ".py":
        return set()
    found: set[Path] = set()
    for module, names in imports(file, repo):
        path = Path(file.parts[0], *module.split("."))
        for target in (path, *(path / name for name in names)):
            for candidate in (target.with_suffix(".py"), target / "__init__.py"):
                if candidate in files:
                    found |= {candidate, *(folder / "__init__.py" for folder in candidate.parents)} & files
    return found


def module_of(file: Path) -> str:
    """The dotted name of the module in `file`, which is given by path from the root of the repository."""
    parts = [part.removesuffix(".py").removesuffix(EDIT) for part in file.parts[1:]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, repo: Path) -> list[tuple[str, list[str]]]:
    """The modules that `file` imports from, by their full names, and the names that it imports from each."""
    package = file.parts[1:-1]
    found = []
    for node in ast.walk(ast.parse((repo / file).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append((".".join([*base, *filter(None, [node.module])]), [alias.name for alias in node.names]))
    return found
