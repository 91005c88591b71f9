"""Fails where a class of tests was skipped as a whole: `python check_report.py report.xml`, a report of `pytest --junitxml`.

The nightly image has all that the tests ask for. A class that does not run there is one that nobody would miss.
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict


def skipped_classes(report: str) -> dict[str, str]:
    """The classes none of whose tests ran, by name, each with the reason of its first test."""
    ran, reasons = defaultdict(bool), {}
    for case in ElementTree.parse(report).iter("testcase"):
        name, skipped = case.get("classname"), case.find("skipped")
        ran[name] |= skipped is None
        if skipped is not None:
            reasons.setdefault(name, skipped.get("message", ""))
    if not ran:
        return {report: "the report has no tests"}
    return {name: reasons[name] for name, some in ran.items() if not some}


if __name__ == "__main__":
    found = skipped_classes(sys.argv[1])
    for name, reason in found.items():
        print(f"{name}: {reason}")
    sys.exit(bool(found))
