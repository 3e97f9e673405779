"""The page of a report: its parts, what all kinds of run share, and how it becomes one HTML file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from medssl.core.files import atomic_write
from medssl.reporting.describe import Table, data_table, licence_table, pairs_table, settings_text
from medssl.reporting.drawing import Picture
from medssl.reporting.source import RunFiles
from medssl.reporting.text import Verdict, clean, duration, finite

log = logging.getLogger(__name__)


@dataclass
class Section:
    """One heading of the page; a section without content says why in ``empty``."""

    key: str
    title: str
    empty: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[str] = ()
    overlays: Sequence[Picture] = ()
    code: str = ""
    folded: bool = False

    @property
    def filled(self) -> bool:
        """True when there is something to show."""
        return bool(self.pictures or self.tables or self.texts or self.overlays or self.code)


@dataclass
class Page:
    """What the template is given."""

    name: str
    kind: str
    facts: list[str]
    verdict: Verdict
    sections: list[Section] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def _state_cautions(run: RunFiles) -> list[str]:
    state = run.status.get("state")
    if state in ("done", "finished", "completed"):
        return []
    if state is None:
        return ["It is not recorded whether this run finished."]
    cause = f" ({clean(run.status['error'], 300)})" if run.status.get("error") else ""
    return [f"This run is not finished; its state is `{clean(state, 40)}`{cause}. The report shows what is there."]


def _facts(run: RunFiles) -> list[str]:
    """The line under the title: when, how long, on what, with which version."""
    facts = [f"started {clean(run.status['started'], 40)}"] if run.status.get("started") else []
    facts += [f"took {duration(run.status['seconds'])}"] if finite(run.status.get("seconds")) is not None else []
    facts += [f"on {clean(run.environment['device'], 60)}"] if run.environment.get("device") else []
    facts += [f"medssl {clean(run.environment['medssl'], 30)}"] if run.environment.get("medssl") else []
    return facts


def notes(summary: Mapping[str, Any]) -> list[str]:
    """The remarks that the run wrote down."""
    found = summary.get("notes") or []
    return [clean(note, 600) for note in (found if isinstance(found, list) else [found])]


def some(*items: Any) -> list[Any]:
    """What there is of tables and pictures that may be None."""
    return [item for item in items if item is not None]


def data_section(run: RunFiles) -> Section:
    """What the volumes are, where they come from and how they may be used."""
    return Section("data", "Data", "The manifest was not found.", (), some(data_table(run), licence_table(run)))


def write_page(run: RunFiles, kind: str, verdict: Verdict, sections: Sequence[Section]) -> Path:
    """Write ``report.html`` and ``figures/`` into the run folder; returns the report's path.

    What every kind of report shares is added here: the state of the run, its facts, settings, versions and gaps.

    Raises:
        DiskError: A file cannot be written.
    """
    versions = pairs_table("What the result depends on besides data and settings.", run.environment)
    page = Page(clean(run.folder.resolve().name, 80), kind, _facts(run), verdict)
    verdict.cautions = [*_state_cautions(run), *verdict.cautions]
    page.sections = [
        *sections,
        Section("settings", "Settings", "config.yaml was not found.", code=settings_text(run), folded=True),
        Section("versions", "Versions", "Not recorded.", (), some(versions), folded=True),
    ]
    page.gaps = [clean(gap, 400) for gap in run.gaps]
    for picture in (p for section in page.sections for p in (*section.pictures, *section.overlays)):
        target = run.folder / "figures" / f"{picture.name}.{picture.suffix}"
        if picture.name != "views":  # pretraining wrote it there itself
            atomic_write(target, picture.file)
    path = atomic_write(run.folder / "report.html", templates().get_template("report.html").render(page=page))
    log.info("report written: %s", path)
    return path


def templates() -> jinja2.Environment:
    """The templates of pages; whatever is put into them is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("medssl.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
