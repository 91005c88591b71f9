"""Lets setup.py build the compiled CPU kernels of EXL3; this repository's own setup.py builds them with the same."""

import glob
import os

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class DepsTableUpdateCommand: ...


# No contraction and no value-changing shortcuts: the kernels round as the torch reference does.
EXL3_COMPILE_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
EXL3_SOURCES = "src/transformers/integrations/exl3/kernels/cpu"
EXL3_KERNELS = Extension(
    "transformers.integrations.exl3.kernels.cpu._cpu",
    sources=[f"{EXL3_SOURCES}/cpu.cpp"],
    depends=sorted(
        glob.glob(f"{EXL3_SOURCES}/**/*.h", recursive=True)
    ),  # which puts them into source distributions, too
    language="c++",
    extra_compile_args=["/O2", "/std:c++17"] if os.name == "nt" else EXL3_COMPILE_FLAGS,
    extra_link_args=[] if os.name == "nt" else ["-pthread"],
    # Without a compiler the package still installs, and uses the torch reference.
    optional=True,
)


class BuildKernels(build_ext):
    """Builds plain C libraries, which are loaded with ctypes: they are no Python modules and fit every Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def run(self):
        super().run()
        if self.missing():
            self.warn(
                "\n*** The EXL3 kernels for CPUs were not compiled. Without them EXL3 runs on the much slower torch reference on "
                "CPUs, and quantizes only small models there: install a C++ compiler and build again. ***\n"
            )

    def missing(self):
        """The libraries that were not built."""
        return [path for path in self.get_outputs() if not os.path.isfile(path)]


class KernelWheel(bdist_wheel):
    """One wheel a platform, for every Python; one for all platforms where the kernels were not compiled."""

    def get_tag(self):
        # An editable wheel has its tag before its libraries.
        is_built = self.distribution.have_run.get("build_ext")
        self.root_is_pure = bool(is_built and self.get_finalized_command("build_ext").missing())
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


if __name__ == "__main__":
    ...
    setup(
        ...,
        cmdclass={**..., "bdist_wheel": KernelWheel, "build_ext": BuildKernels},
        ext_modules=[EXL3_KERNELS],
    )
