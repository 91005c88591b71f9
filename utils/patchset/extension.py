"""The compiled CPU kernels and the commands that build them, as setup.edit.py defines them for upstream's setup.py."""

import hashlib
import json
import re
import runpy
import shutil
import string
import tempfile
from pathlib import Path

from . import REPO, PatchError, build


HUB_KERNEL = Path("build", "hub-kernel")


def definitions(repo: Path = REPO) -> dict:
    """The names that setup.edit.py defines, which stands by itself as a module too."""
    return runpy.run_path(str(repo / "setup.edit.py"))


def compile_in_place(repo: Path = REPO):
    """Compile the kernels into build/tree.

    Raises:
        PatchError: If that fails; the old library is gone then.
    """
    try:
        from setuptools import Distribution

        names = definitions(repo)
    except ImportError as error:
        raise PatchError(f"compiling the kernels needs `pip install 'setuptools>=77'`: {error}") from error
    kernels = names["EXL3_KERNELS"]
    kernels.sources = [str(repo / source) for source in kernels.sources]
    kernels.optional = False
    library = repo / build.TREE / build.LIBRARY
    with tempfile.TemporaryDirectory() as scratch:
        command = names["BuildKernels"](Distribution({"name": "transformers", "ext_modules": [kernels]}))
        command.build_temp = command.build_lib = scratch
        command.ensure_finalized()
        try:
            command.run()
        except Exception as error:
            # An old library beside new sources would hide the error.
            library.unlink(missing_ok=True)
            raise PatchError(f"the kernels do not compile: {error}") from error
        built = Path(scratch, build.LIBRARY.relative_to(build.SOURCE))
        build.replace(library, lambda new: shutil.copy(built, new))


def write_hub_kernel(folder: Path = REPO / HUB_KERNEL, repo: Path = REPO) -> Path:
    """Write the kernels as a project for kernel-builder, with the library of build/tree as a build for this machine.

    Args:
        folder: Of the project, which is made anew.

    Returns:
        `folder`.

    Raises:
        PatchError: If the library has not been compiled.
    """
    library, kernels = repo / build.TREE / build.LIBRARY, repo / build.LIBRARY.parent
    if not library.is_file():
        raise PatchError(f"{library} is missing: run `python utils/patchset` once")
    door, hub = ((kernels / name).read_text("utf-8") for name in ("__init__.py", "hub.py"))
    version = int(re.search(r"(?m)^ABI_VERSION = (\d+)", door)[1])
    sources = sorted(path for path in kernels.iterdir() if path.suffix in build.KERNEL_SOURCES)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(__file__).with_name("hub_kernel"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "exl3_cpu").mkdir()
    for source in sources:
        shutil.copy(source, folder / "exl3_cpu")
    config = string.Template((folder / "build.toml").read_text("utf-8")).substitute(
        version=version,
        repository=re.search(r'(?m)^REPOSITORY = "(.*)"', hub)[1],
        flags=json.dumps(definitions(repo)["EXL3_COMPILE_FLAGS"]),
        sources=json.dumps([f"exl3_cpu/{source.name}" for source in sources]),
    )
    (folder / "build.toml").write_text(config, "utf-8")
    variant = folder / "build" / "torch-cpu"
    shutil.copytree(folder / "torch-ext" / "exl3_cpu", variant)
    shutil.copy(library, variant)
    identity = f"_exl3_cpu_{hashlib.sha256(library.read_bytes()).hexdigest()[:7]}"
    metadata = {"name": "exl3-cpu", "id": identity, "version": version, "license": "apache-2.0", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}), "utf-8")
    return folder
