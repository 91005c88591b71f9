"""Our files and edits, laid over a tree of upstream's Transformers."""

from pathlib import Path


UPSTREAM = "5.23.0"  # the release that the edits are made for, as pinned in pyproject.toml
VERSION = f"{UPSTREAM}+exl3.1"
REPO = Path(__file__).resolve().parents[2]


class PatchError(Exception):
    """The patch set does not fit; the message has one line for each misfit."""
