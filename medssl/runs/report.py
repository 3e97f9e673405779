"""Build the report of a run again from its files."""

from __future__ import annotations

from pathlib import Path

from medssl.reporting import build_report
from medssl.runs.cohort import Outcome


def rebuild(run: Path) -> Outcome:
    """Write ``figures/`` and ``report.html`` of a run folder.

    Raises:
        DataError: Not the folder of a run.
    """
    report = build_report(run)
    return Outcome([f"report: {report}"], {"report": str(report)})
