"""Names what a newer release of upstream's changes in what this repository touches: `python utils/patchset/watch.py [VERSION]`.

Our files import names of upstream's modules, and our edits merge into some of its files. Both are compared between the pinned
release and another one, the newest on PyPI by default. Exit status 1 if an edit does not fit or a name that is imported is gone.
"""

import ast
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from patchset import REPO, UPSTREAM, PatchError, imports, tree  # noqa: E402
from patchset.tests import upstreams  # noqa: E402


SOURCE = Path("src")
ROOT = "transformers"


def imported(repo: Path = REPO) -> dict[str, set[str]]:
    """The names that our files import from upstream's modules, by dotted module."""
    files = [path for path in tree.our_files(repo) if path.suffix == ".py" and path.parts[0] in ("src", "tests")]
    ours = {imports.module_of(path) for path in files if imports.EDIT not in path.name}
    names: dict[str, set[str]] = {}
    for path in files:
        for source, imported_names in imports.imports(path, repo):
            if source.split(".")[0] == ROOT and source not in ours:
                names.setdefault(source, set()).update(n for n in imported_names if f"{source}.{n}" not in ours)
    return names


def definitions(root: Path, module: str) -> dict[str, str] | None:
    """The top-level definitions of a module of the release at `root`, by name, as text without comments; None without the module."""
    path = root / SOURCE / Path(*module.split("."))
    path = next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
    if path is None:
        return None
    found = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))  # of which only the names matter
        for name in _defined(node):
            found[name] = name if is_import else ast.unparse(node)
    return found


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    return []


def changes(old: Path, new: Path, names: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """What differs of `names` between two releases: the lines to print for changed definitions, and for those that are gone."""
    changed, gone = [], []
    for module in sorted(names):
        before, after = definitions(old, module), definitions(new, module)
        for name in sorted(names[module]):
            if before is None or name not in before:
                continue  # a lazy export of a package: its own module is looked at where it is imported
            if after is None or name not in after:
                gone.append(f"gone     {module}.{name}")
            elif before[name] != after[name]:
                changed.append(f"changed  {module}.{name}")
    return changed, gone


def newest() -> str:
    """The newest release on PyPI."""
    command = [sys.executable, "-m", "pip", "index", "versions", ROOT]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return text.partition("(")[2].partition(")")[0]


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else newest()
    print(f"transformers {UPSTREAM}, which is pinned, and {version}")
    old, new = upstreams.fetch(UPSTREAM), upstreams.fetch(version)
    changed, gone = changes(old, new, imported())
    with tempfile.TemporaryDirectory() as folder:
        try:
            tree.patch(Path(shutil.copytree(new, Path(folder, "tree"))))
        except PatchError as error:
            gone += [f"no fit   {line}" for line in str(error).splitlines()]
    print("\n".join([*changed, *gone]) or "nothing that is touched here has changed")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
