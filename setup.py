"""Build the package: upstream's pinned release with our files and edits, under upstream's metadata."""

import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.sdist import sdist


# pip runs this file from the root, which is not on the path then.
sys.path.insert(0, str(Path(__file__).resolve().parent / "utils"))

from patchset import REPO, UPSTREAM, VERSION, PatchError, build, extension  # noqa: E402


EDIT = extension.definitions()


class Patched(Distribution):
    """Upstream's metadata, word for word but for the version."""

    def __init__(self, attrs=None):
        super().__init__(attrs)
        self.metadata.write_pkg_file = lambda file: file.write(METADATA)


class Wheel(EDIT["KernelWheel"]):
    def egg2dist(self, egginfo_path, distinfo_path):
        super().egg2dist(egginfo_path, distinfo_path)
        for path, text in LICENSES.items():
            (Path(distinfo_path) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(distinfo_path) / path).write_text(text, "utf-8")


class Sources(sdist):
    """This repository rather than what it builds."""

    def _add_defaults_python(self):
        pass

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [file for file in files if Path(file).parts[0] != "build"])


try:
    UPSTREAM_DISTRIBUTION = build.upstream_distribution()
    build.fetch(UPSTREAM_DISTRIBUTION)
    FILES = build.refresh()
    if build.is_library_stale():
        (REPO / build.TREE / build.LIBRARY).unlink(missing_ok=True)
except PatchError as error:
    sys.exit(f"error: {error}")

METADATA = UPSTREAM_DISTRIBUTION.read_text("METADATA").replace(f"Version: {UPSTREAM}\n", f"Version: {VERSION}\n", 1)
LICENSES = {
    str(file).partition(".dist-info/")[2]: file.read_text("utf-8")
    for file in UPSTREAM_DISTRIBUTION.files
    if ".dist-info/licenses/" in str(file)
}
PACKAGES: dict[str, list[str]] = {}
for path in FILES:
    names = PACKAGES.setdefault(".".join(path.parent.relative_to(build.SOURCE).parts), [])
    if path.suffix != ".py":
        names.append(path.name)

with tempfile.TemporaryDirectory() as scratch:
    setup(
        name="transformers",
        version=VERSION,
        distclass=Patched,
        package_dir={"": str(build.TREE / build.SOURCE)},
        packages=list(PACKAGES),
        package_data=PACKAGES,
        include_package_data=False,
        entry_points=UPSTREAM_DISTRIBUTION.read_text("entry_points.txt"),
        ext_modules=[EDIT["EXL3_KERNELS"]],
        cmdclass={"bdist_wheel": Wheel, "build_ext": EDIT["BuildKernels"], "sdist": Sources},
        # A build folder of its own each time: what an earlier build left there must not ship.
        options={"build": {"build_base": scratch}, "egg_info": {"egg_base": "build"}},
        zip_safe=False,
    )
