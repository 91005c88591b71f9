"""
Our files and edits, laid over a tree of upstream's Transformers.

Why not plain patches and `git apply --3way`: a patch carries upstream's lines as its context, and only our own text is to be in
this repository; without context it fits nothing but one release. An edit names what it needs of a file and has the rest as
`...`, so that the same edit fits several releases, all of them fit or nothing is written, and a misfit is told by the names
that are missing. It also needs no git where pip builds.
"""

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
