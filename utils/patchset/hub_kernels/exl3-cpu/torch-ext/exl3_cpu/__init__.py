"""The compiled CPU kernels of EXL3. `library` is the file of a plain C library, which transformers opens with ctypes."""

from pathlib import Path


(library,) = (path for path in Path(__file__).parent.iterdir() if path.suffix in (".so", ".pyd", ".dll"))
