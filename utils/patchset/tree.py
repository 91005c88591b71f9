"""What the patched tree holds, worked out as a whole before anything is written."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import REPO, PatchError, hunks, imports, merge


EXPORTED = ("src", "tests", "docs", "utils")  # laid out as upstream's tree is
OWN = ("utils/patchset",)  # this repository's own, although in one of those folders
# What a pull request starts from: these, and every module of ours that they import.
PULL_REQUEST = ("src/**/*.edit.py", "tests/**/test_exl3.py", "docs/source/en/**/*")
ABSENT_FROM_PYPI = ("docs", "tests/quantization", "utils")
GENERATED = {"__pycache__", ".ruff_cache", ".pytest_cache"}
EDIT = re.compile(r"\.edit(?=\.[^.]+$|$)")


@dataclass
class Plan:
    """What to write: the text of merged files and the origin of new ones, by path in the tree, and how many lines that adds."""

    merged: dict[Path, str]
    added: dict[Path, Path]
    skipped: list[str]
    added_lines: int = 0


def our_files(repo: Path = REPO) -> list[Path]:
    """The files to export: ours in upstream's folders, and edits of files in upstream's root."""
    found = [path.relative_to(repo) for top in EXPORTED for path in (repo / top).rglob("*") if path.is_file()]
    found += [path.relative_to(repo) for path in repo.glob("*.edit*")]
    edited = {_target(path) for path in found if _is_edit(path)}
    return sorted(
        path
        for path in found
        if path not in edited
        and not GENERATED.intersection(path.parts)
        and not path.name.startswith(".")
        and not any(path.is_relative_to(own) for own in OWN)
    )


def pull_request(repo: Path = REPO) -> list[Path]:
    """Those of `our_files` that a pull request has: not kernels, the command, this repository's own tests and tools."""
    ours = our_files(repo)
    start = {path.relative_to(repo) for pattern in PULL_REQUEST for path in repo.glob(pattern)}
    return sorted(imports.closure(start.intersection(ours), set(ours), repo))


def plan(tree: Path, only: str = "", repo: Path = REPO, files: list[Path] | None = None) -> Plan:
    """Work out how to patch `tree`.

    Args:
        tree: The root of a tree of upstream's.
        only: Consider just our files below this folder.
        repo: The root of this repository.
        files: Consider just these, by default all of `our_files`.

    Returns:
        The plan. Folders that `tree` does not have at all, and may do without, are named in `skipped`.

    Raises:
        PatchError: If some file does not fit; every misfit is a line of the message.
    """
    result, misfits, absent = Plan({}, {}, []), [], [top for top in ABSENT_FROM_PYPI if not (tree / top).is_dir()]
    for ours in our_files(repo) if files is None else files:
        if not ours.is_relative_to(only):
            continue
        target = _target(ours)
        top = next((top for top in absent if target.is_relative_to(top)), None)
        if top:
            if top not in result.skipped:
                result.skipped.append(top)
        elif not _is_edit(ours):
            if (tree / target).exists():
                misfits.append(f"{ours}: upstream's tree already has a file of this name")
            result.added[target] = repo / ours
            result.added_lines += _count(repo / ours)
        elif not (tree / target).is_file():
            misfits.append(f"{ours}: upstream's tree has no {target} to edit")
        else:
            tool = merge if target.suffix == ".py" else hunks
            try:
                result.merged[target] = tool.merge(_read(tree / target), _read(repo / ours), str(ours))
                result.added_lines += len(result.merged[target].splitlines()) - _count(tree / target)
            except PatchError as error:
                misfits.append(str(error))
    if misfits:
        raise PatchError("\n".join(misfits))
    return result


def patch(tree: Path, repo: Path = REPO, files: list[Path] | None = None) -> Plan:
    """Patch `tree` in place, wholly or, on a PatchError, not at all. For `files` see `plan`."""
    if not (tree / "src" / "transformers" / "__init__.py").is_file():
        raise PatchError(f"{tree}: no tree of Transformers: src/transformers/__init__.py is missing")
    result = plan(tree, repo=repo, files=files)
    for target, text in result.merged.items():
        write(tree / target, text)
    for target, origin in result.added.items():
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(origin, tree / target)
    return result


def write(path: Path, text: str):
    """Replace the text of a file, whose mode stays."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def _count(path: Path) -> int:
    """Lines of a text; what is none counts as one."""
    try:
        return len(_read(path).splitlines())
    except UnicodeDecodeError:
        return 1


def _is_edit(path: Path) -> bool:
    return bool(EDIT.search(path.name))


def _target(path: Path) -> Path:
    return path.with_name(EDIT.sub("", path.name))
