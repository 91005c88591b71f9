"""Patch a checkout of Transformers, or refresh what `pip install -e .` installed.

python utils/patchset CHECKOUT      patch this tree of upstream's in place, wholly or not at all, with what a pull request has
python utils/patchset               after an edit: bring build/tree up to date
python utils/patchset --hub-kernels the same, and write the kernels as projects for kernel-builder
"""

import argparse
import sys
from pathlib import Path


# Python put the folder itself there, which hides that it is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from patchset import REPO, UPSTREAM, PatchError, build, extension, tree  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python utils/patchset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", nargs="?", type=Path, help=f"the root of a tree of transformers {UPSTREAM}")
    parser.add_argument(
        "--full",
        action="store_true",
        help="patch it with all: the compiled kernels and this repository's own tests, too",
    )
    parser.add_argument("--hub-kernels", action="store_true", help="write the kernels as the hub takes them")
    arguments = parser.parse_args()
    checkout = arguments.checkout
    try:
        if checkout:
            plan = tree.patch(checkout, files=None if arguments.full else tree.pull_request())
            for folder in plan.skipped:
                print(f"skipped {folder}/: this tree has none")
            print(
                f"{checkout}: {len(plan.merged)} files edited, {len(plan.added)} added, {plan.added_lines} more lines"
            )
        else:
            build.refresh()
            if build.is_library_stale():
                print("the kernels' sources have changed: compiling")
                extension.compile_in_place()
            print(f"{REPO / build.TREE} is up to date")
        if arguments.hub_kernels:
            print(f"{extension.write_hub_kernels()} has projects for kernel-builder, with builds for this machine")
    except PatchError as error:
        print(error, file=sys.stderr)
        print("error: nothing was written" if checkout else "error: not up to date", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
