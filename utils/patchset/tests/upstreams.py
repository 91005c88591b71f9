"""Fetch releases of upstream's as source: `python utils/patchset/tests/upstreams.py VERSION ...`."""

import subprocess
import sys
import tarfile
from pathlib import Path


FOLDER = Path(__file__).resolve().parents[3] / "build" / "upstreams"


def fetch(version: str) -> Path:
    """The root of the source tree of transformers `version` from PyPI, downloaded once."""
    tree = FOLDER / f"transformers-{version}"
    if not tree.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "-d", str(FOLDER), f"transformers==={version}"], check=True)
        with tarfile.open(FOLDER / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(FOLDER / "unpacking", filter="data")
        (FOLDER / "unpacking" / tree.name).rename(tree)
        (FOLDER / "unpacking").rmdir()
    return tree


if __name__ == "__main__":
    for version in sys.argv[1:]:
        print(fetch(version))
