"""The compiled CPU kernels of EXL3, laid out as in transformers, whose door to them imports `kernels.cpu.calls` from here."""

from pathlib import Path

from .kernels.cpu import calls


(library,) = (path for path in Path(__file__).parent.iterdir() if path.suffix in (".so", ".pyd", ".dll"))
calls.load(library)
