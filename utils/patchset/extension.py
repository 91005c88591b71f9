"""The compiled CPU kernels and the commands that build them, as setup.edit.py defines them for upstream's setup.py."""

import runpy
import shutil
import tempfile
from pathlib import Path

from . import REPO, PatchError, build


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
