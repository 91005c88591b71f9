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


HUB_KERNELS = Path("build", "hub-kernels")


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


def write_hub_kernels(folder: Path = REPO / HUB_KERNELS, repo: Path = REPO) -> Path:
    """Write the kernels as projects for kernel-builder, each with a build for this machine, as `kernels` takes it from a folder.

    Args:
        folder: Of the projects, which is made anew.

    Returns:
        `folder`.

    Raises:
        PatchError: If the library has not been compiled.
    """
    library, integration = repo / build.TREE / build.LIBRARY, repo / build.PACKAGE / "integrations" / "exl3"
    if not library.is_file():
        raise PatchError(f"{library} is missing: run `python utils/patchset` once")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(__file__).with_name("hub_kernels"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = integration / "kernels" / "cpu"
    sources = [path for path in sorted(kernels.iterdir()) if path.suffix in build.KERNEL_SOURCES]
    python = [integration / name for name in ("format.py", "search.py", "kernels/__init__.py", "kernels/cpu/calls.py")]
    _write_project(
        folder / "exl3-cpu",
        _constants(kernels / "__init__.py", repository="HUB_KERNEL", version="HUB_VERSION")
        | {
            "flags": json.dumps(definitions(repo)["EXL3_COMPILE_FLAGS"]),
            "sources": json.dumps([f"exl3_cpu/{source.name}" for source in sources]),
        },
        {f"exl3_cpu/{source.name}": source for source in sources}
        | {f"torch-ext/exl3_cpu/{source.relative_to(integration)}": source for source in python},
        "torch-cpu",
        [library],
    )
    kernels = integration / "kernels" / "triton"
    sources = [integration / name for name in ("format.py", "search.py", "kernels/__init__.py")]
    sources += [path for path in sorted(kernels.glob("*.py")) if path.name != "gpu.py"]  # which is the door
    _write_project(
        folder / "exl3-triton",
        _constants(kernels / "gpu.py", repository="HUB_KERNEL", version="HUB_VERSION"),
        {f"torch-ext/exl3_triton/{source.relative_to(integration)}": source for source in sources},
        "torch-universal",
    )
    return folder


def _constants(file: Path, **names: str) -> dict[str, str]:
    """The values of names that are assigned once in a module."""
    text = file.read_text("utf-8")
    return {key: re.search(rf'(?m)^{name} = "?([^"\s]+)', text)[1] for key, name in names.items()}


def _write_project(folder: Path, values: dict[str, str], files: dict[str, Path], variant: str, binaries=()):
    """Fill in the project in `folder`, and build the variant of it that is its Python files and `binaries`."""
    config = (folder / "build.toml").read_text("utf-8")
    (folder / "build.toml").write_text(string.Template(config).substitute(values), "utf-8")
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    name, built = folder.name, folder / "build" / variant
    shutil.copytree(folder / "torch-ext" / name.replace("-", "_"), built)
    for binary in binaries:
        shutil.copy(binary, built)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(built.rglob("*")) if path.is_file()))
    metadata = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{digest.hexdigest()[:7]}",
        "version": int(values["version"]),
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (built / "metadata.json").write_text(json.dumps(metadata), "utf-8")
