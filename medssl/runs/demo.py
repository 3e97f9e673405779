"""Both jobs on cohorts that are generated on the spot: hearts with few labels, and brain age without the scanner.

How the settings were fixed stands in `demo_cardiac` and `demo_brain`; the verdicts are what comes out.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from medssl.core.files import write_json
from medssl.reporting.index import Part, write_index
from medssl.reporting.text import Verdict
from medssl.runs import demo_brain, demo_cardiac
from medssl.runs.cohort import Outcome
from medssl.runs.demo_parts import SMOKE, SYNTHETIC, Half, claim

log = logging.getLogger(__name__)

VERSION: Final = 2  # raised when settings change that are not in the marker, so that old and new are never mixed
ENDED: Final = "ended.json"
Choice = Literal["cardiac", "brain", "both"]
_TITLES: Final = {"cardiac": demo_cardiac.TITLE, "brain": demo_brain.TITLE}


@dataclass(frozen=True)
class Settings:
    """What differs between the demo and its smoke test."""

    cardiac: demo_cardiac.CardiacSettings
    brain: demo_brain.BrainSettings
    smoke: bool
    version: int = VERSION


FULL: Final = Settings(demo_cardiac.FULL, demo_brain.FULL, smoke=False)
QUICK: Final = Settings(demo_cardiac.QUICK, demo_brain.QUICK, smoke=True)


def demo(out: Path, smoke: bool = False, half: Choice = "both") -> Outcome:
    """Run the demo in ``out``; a folder of an earlier, unfinished demo is gone on with.

    Args:
        out: Folder for the cohorts, the configurations and the runs: ``cardiac/``, ``brain/`` and ``report.html``.
        smoke: The same path in seconds, with numbers that mean nothing.
        half: What to run; the page also shows what an earlier start has left of the other half.

    Raises:
        ConfigError: The folder holds something else, or a demo with other settings.
        Interrupted: Stopped; the same command goes on.
    """
    return run_demo(out, QUICK if smoke else FULL, half)


def run_demo(out: Path, settings: Settings, half: Choice = "both") -> Outcome:
    """The demo with any settings."""
    begun = time.monotonic()
    claim(out, settings)
    log.info("%s", SYNTHETIC)
    done = []
    if half in ("cardiac", "both"):
        done.append(demo_cardiac.cardiac(out / "cardiac", settings.cardiac, smoke=settings.smoke))
        _keep(out, done[-1])
    if half in ("brain", "both"):
        done.append(demo_brain.brain(out / "brain", settings.brain, smoke=settings.smoke))
        _keep(out, done[-1])
    notes = [SYNTHETIC, *([SMOKE] if settings.smoke else [])]
    page = write_index(
        out / "report.html",
        kind="medssl demo",
        title="What pretraining and debiasing do on generated data",
        notes=notes,
        parts=[_part(out, name) for name in _TITLES],
    )
    return _outcome(page, notes, done, time.monotonic() - begun)


def _keep(out: Path, half: Half) -> None:
    """What the page says of a half, for a later start that runs the other alone."""
    write_json(
        out / half.name / ENDED,
        {
            "verdict": half.verdict,
            "lines": list(half.lines),
            "report": half.report.resolve().relative_to(out.resolve()).as_posix(),
        },
    )


def _part(out: Path, name: str) -> Part:
    """A half on the page, whenever it was run."""
    title, ended = _TITLES[name], out / name / ENDED
    if not ended.is_file():
        return Part(title, Verdict(f"Not run yet: medssl demo --half {name}"), None)
    found = json.loads(ended.read_text(encoding="utf-8"))
    return Part(title, Verdict(found["verdict"], found["lines"]), out / found["report"])


def _outcome(page: Path, notes: list[str], done: Sequence[Half], seconds: float) -> Outcome:
    lines = [f"report: {page}", "", *notes]
    for half in done:
        lines += ["", f"== {_TITLES[half.name]}", "", half.verdict, *(f"- {line}" for line in half.lines)]
        lines += ["", *half.table, "", f"report of this half: {half.report}"]
        lines += [f"{half.seconds:.0f} s. The same by hand, step by step:", *(f"  {each}" for each in half.commands)]
    fields: dict[str, Any] = {
        "report": str(page),
        "synthetic": True,
        "smoke": SMOKE in notes,
        "notes": notes,
        "seconds": round(seconds, 1),
        "halves": {
            half.name: {
                "report": str(half.report),
                "verdict": half.verdict,
                "lines": list(half.lines),
                "seconds": round(half.seconds, 1),
                "commands": list(half.commands),
                "summary": half.summary,
            }
            for half in done
        },
    }
    # The verdicts end what is said, as a terminal shows the end.
    lines += ["", f"{seconds:.0f} s in all. Both in short:" if len(done) > 1 else f"{seconds:.0f} s in all. In short:"]
    lines += [f"  {half.name}: {half.verdict}" for half in done]
    return Outcome([*lines, f"  {page}"], fields)
