"""build/tree: upstream's package with our files and edits, which is what gets installed."""

import os
import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from . import REPO, UPSTREAM, VERSION, PatchError, tree


# Relative to the root of the repository.
PRISTINE = Path("build", "upstream")
TREE = Path("build", "tree")
SOURCE = Path("src")
PACKAGE = SOURCE / "transformers"
LIBRARY = PACKAGE / "integrations" / "exl3" / "kernels" / "cpu" / ("_cpu.dll" if os.name == "nt" else "_cpu.so")
KERNEL_SOURCES = (".cpp", ".h")
# Our files show up at once where the system has links; elsewhere `python utils/patchset` copies them.
LINKS = os.name != "nt"


def upstream_distribution() -> Distribution:
    """The pinned release of upstream's, as installed where this runs.

    Raises:
        PatchError: If there is none or another release.
    """
    how = f"the build needs transformers==={UPSTREAM}, which pip installs for it: build without --no-build-isolation"
    try:
        found = distribution("transformers")
    except PackageNotFoundError:
        raise PatchError(f"upstream's transformers is not installed; {how}") from None
    if found.version != UPSTREAM:
        raise PatchError(f"transformers {found.version} at {found.locate_file('')} is not the release to patch; {how}")
    return found


def fetch(upstream: Distribution, repo: Path = REPO):
    """Copy the package of `upstream` to build/upstream, from where later refreshes take it."""
    files = [file for file in upstream.files or () if file.parts[0] == "transformers" and file.suffix != ".pyc"]
    if not files:
        raise PatchError(f"transformers {upstream.version} at {upstream.locate_file('')} has no list of its files")
    _sync(repo / PRISTINE, {SOURCE / file: Path(upstream.locate_file(file)) for file in files}, link=False)


def refresh(repo: Path = REPO) -> list[Path]:
    """Bring build/tree up to date with build/upstream and the repository, touching only what changed.

    Returns:
        The files of the package, by path in build/tree.

    Raises:
        PatchError: If build/upstream is missing or the patch set does not fit it.
    """
    pristine, init = repo / PRISTINE, PACKAGE / "__init__.py"
    if not (pristine / init).is_file():
        raise PatchError(f"{pristine} is missing: run `pip install -e .` once")
    plan = tree.plan(pristine, only=str(PACKAGE), repo=repo)
    text = plan.merged.get(init) or (pristine / init).read_text("utf-8")
    plan.merged[init], count = re.subn(rf'(?m)^__version__ = "{UPSTREAM}"$', f'__version__ = "{VERSION}"', text)
    if count != 1:
        raise PatchError(f'{pristine / init}: no `__version__ = "{UPSTREAM}"`: run `pip install -e .` again')
    upstream = {path.relative_to(pristine): path for path in _files(pristine)}
    _sync(repo / TREE, upstream | plan.added | plan.merged, link=LINKS, keep=LIBRARY)
    return sorted(upstream | plan.added)


def is_library_stale(repo: Path = REPO) -> bool:
    """Whether the compiled kernels are missing or older than their sources or the flags in setup.edit.py."""
    library, folder = repo / TREE / LIBRARY, repo / LIBRARY.parent
    sources = [path for path in folder.rglob("*") if path.suffix in KERNEL_SOURCES]
    newest = max(path.stat().st_mtime for path in [*sources, repo / "setup.edit.py"])
    return bool(sources) and (not library.is_file() or newest > library.stat().st_mtime)


def _files(folder: Path):
    return (
        Path(parent, name)
        for parent, folders, names in os.walk(folder)
        if not parent.endswith("__pycache__")
        for name in names
    )


def _sync(folder: Path, content: dict[Path, Path | str], link: bool, keep: Path | None = None):
    """Make `folder` hold exactly `content`: texts, and links to or copies of files; and `keep` if it is there."""
    for parent, folders, names in os.walk(folder, topdown=False):
        here = Path(parent)
        for name in names:
            path = (here / name).relative_to(folder)
            if path not in content and path != keep and here.name != "__pycache__":
                (here / name).unlink()
        if not any(name != "__pycache__" for name in os.listdir(here)):
            shutil.rmtree(here)
    for path, origin in content.items():
        target = folder / path
        if isinstance(origin, str):
            if target.is_symlink() or not target.is_file() or target.read_text("utf-8") != origin:
                replace(target, lambda new: new.write_text(origin, "utf-8", newline=""))
        elif link:
            if not target.is_symlink() or os.readlink(target) != str(origin):
                replace(target, lambda new: new.symlink_to(origin))
        elif target.is_symlink() or not target.is_file() or target.read_bytes() != origin.read_bytes():
            replace(target, lambda new: shutil.copy(origin, new))


def replace(target: Path, make):
    """Let `make` write the file that takes the place of `target`, which is there at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.{os.getpid()}")
    make(new)
    os.replace(new, target)
