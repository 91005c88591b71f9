"""Our files and edits, laid over a tree of upstream's Transformers."""

import tomllib
from pathlib import Path


REPO = Path(__file__).resolve().parents[2]
# The release that the edits are made for: what the build requires.
(UPSTREAM,) = (
    requirement.removeprefix("transformers===")
    for requirement in tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    if requirement.startswith("transformers===")
)
VERSION = f"{UPSTREAM}+exl3.1"


class PatchError(Exception):
    """The patch set does not fit; the message has one line for each misfit."""
