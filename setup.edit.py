"""Lets setup.py build the compiled CPU kernels of EXL3; this repository's own setup.py builds them with the same."""

import os

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class DepsTableUpdateCommand: ...


# No contraction and no value-changing shortcuts: the kernels round as the torch reference does.
EXL3_COMPILE_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
EXL3_KERNELS = Extension(
    "transformers.integrations.exl3.kernels._cpu",
    sources=["src/transformers/integrations/exl3/kernels/cpu.cpp"],
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


class KernelWheel(bdist_wheel):
    """One wheel a platform, for every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    ...
    setup(
        ...,
        cmdclass={**..., "bdist_wheel": KernelWheel, "build_ext": BuildKernels},
        ext_modules=[EXL3_KERNELS],
    )
