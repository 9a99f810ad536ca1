# SPDX-License-Identifier: Apache-2.0
"""A test may be skipped for a reason that `SKIPPED.md` lists, and for no other."""

import re
from pathlib import Path
from typing import Any

LISTED = Path(__file__).with_name("SKIPPED.md")


def reasons() -> set[str]:
    """All reasons of the list."""
    return set(re.findall(r"^\| `([^`]+)` \|", LISTED.read_text(), re.MULTILINE))


def checked(report: Any) -> Any:
    """``report`` of a test or of a file; one that is skipped for a reason which is not listed has failed."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason not in reasons():
        report.outcome = "failed"
        report.longrepr = f"skipped for a reason that tests/SKIPPED.md does not list: {reason}"
    return report
