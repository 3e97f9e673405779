"""The report of a run: one HTML file that needs nothing else, built from the files of the run folder alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jinja2

from medssl.core.files import atomic_write
from medssl.reporting import curves, scores
from medssl.reporting.describe import (
    Table,
    cell_table,
    data_table,
    gap_table,
    licence_table,
    paired_table,
    pairs_table,
    score_table,
    settings_text,
)
from medssl.reporting.drawing import Picture
from medssl.reporting.source import RunFiles, read_run, run_kind
from medssl.reporting.text import Verdict, clean, duration, finite, segmentation_verdict

log = logging.getLogger(__name__)

MAX_PICTURE_BYTES: Final = 20_000_000


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


def build_report(run_dir: Path) -> Path:
    """Build ``report.html`` and ``figures/`` of a run of any kind from its files; returns the report's path.

    The same files give the same bytes. What is missing is named in the report.

    Raises:
        DataError: The folder is not that of a run.
        DiskError: The report cannot be written.
    """
    run_dir = Path(run_dir)
    return segmentation_report(run_dir) if run_kind(run_dir) == "segmentation" else pretrain_report(run_dir)


def segmentation_report(run_dir: Path) -> Path:
    """Build the report of a fine-tuning run; see ``build_report``."""
    run = read_run(run_dir, "segmentation")
    verdict = segmentation_verdict(run.summary)
    verdict.cautions = [*_state_cautions(run), *verdict.cautions]
    chart = scores.dice_by_labels(run.summary, run.per_case)
    forest = scores.paired_differences(run.summary)
    boxes = scores.class_boxes(run.summary, run.per_case)
    training = curves.training_curves(run.curves, run.summary)
    monitors = curves.pretraining_curves(run.metrics, monitors_only=True)
    summary = run.summary
    left_out = pairs_table("Cases and structures that no score counts.", _named(summary.get("left_out")))
    leak = pairs_table("Check that no person is on both sides of a split.", _named(summary.get("leak_check")))
    sections = [
        Section("results", "Results", "No scores are available.", _some(chart, forest), _some(score_table(summary))),
        Section(
            "paired",
            "Comparisons",
            "No paired comparison is available.",
            (),
            _some(paired_table(summary), gap_table(summary)),
        ),
        Section("classes", "Structures", "No scores of single cases are available.", _some(boxes)),
        Section(
            "examples",
            "Examples",
            "No example pictures were kept.",
            overlays=[scores.overlay_picture(o) for o in run.overlays],
        ),
        Section("training", "Training", "No training logs were found.", _some(training, monitors)),
        Section("data", "Data", "The manifest was not found.", (), _some(data_table(run), licence_table(run))),
        Section("left-out", "Left out and checks", "Nothing was recorded.", (), _some(left_out, leak), _notes(summary)),
    ]
    cells = _some(cell_table(run.cells))
    sections.append(Section("cells", "All fine-tunings", "eval/cells.csv was not found.", (), cells, folded=True))
    return _write(run, Page(_name(run), "Few-label segmentation", _facts(run), verdict), sections)


def pretrain_report(run_dir: Path) -> Path:
    """Build the report of a pretraining run; see ``build_report``."""
    run = read_run(run_dir, "pretrain")
    done = run.pretrain
    facts = {k: v for k, v in done.items() if k not in ("weights", "collapse", "views", "data_wait_share", "seconds")}
    if "seconds" in done:
        facts["time"] = duration(done["seconds"])
    share = finite(done.get("data_wait_share"))
    if share is not None:
        facts["share of the time spent waiting for data"] = f"{100 * share:.0f} %"
    weights = done.get("weights") if isinstance(done.get("weights"), dict) else {}
    saved = pairs_table("Saved weights: number of tensors.", weights, ("part", "tensors"))
    views = _views(run)
    sections = [
        Section("training", "Training", "No training log was found.", _some(curves.pretraining_curves(run.metrics))),
        Section("views", "Views", "No picture of the views was kept.", _some(views)),
        Section(
            "summary", "Summary", "eval/pretrain.json was not found.", (),
            _some(pairs_table("The run.", facts), saved),
        ),
        Section("data", "Data", "The manifest was not found.", (), _some(data_table(run), licence_table(run))),
    ]  # fmt: skip
    return _write(run, Page(_name(run), "Pretraining", _facts(run), _pretrain_verdict(run)), sections)


def _pretrain_verdict(run: RunFiles) -> Verdict:
    """What a loss curve can tell: whether the run ended and whether the embedding collapsed, never how good it is."""
    done = run.pretrain
    collapse = done.get("collapse")
    method, steps = clean(done.get("method", "The method"), 60), done.get("steps")
    begin = (
        f"{method} was trained for {steps} steps"
        if finite(steps) is not None
        else f"{method}: no summary of the run is available"
    )
    if collapse:
        end = "the embedding shows signs of collapse: do not use these weights without looking at the monitors"
    elif collapse is None:
        end = "whether the embedding collapsed was not recorded"
    else:
        end = "no sign of collapse was seen"
    signs = [
        clean(sign if not isinstance(sign, dict) else ", ".join(f"{k}: {v}" for k, v in sign.items()), 300)
        for sign in collapse or []
    ]
    use = "A loss says nothing about use: whether pretraining helps is decided by fine-tuning on labels."
    return Verdict(f"{begin}; {end}.", [f"Sign of collapse: {sign}" for sign in signs], [*_state_cautions(run), use])


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


def _name(run: RunFiles) -> str:
    return clean(run.folder.resolve().name, 80)


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = summary.get("notes") or []
    return [clean(note, 600) for note in (notes if isinstance(notes, list) else [notes])]


def _named(value: Any) -> dict[str, Any]:
    """Findings as names and values, whether the run wrote them as a mapping, a list or one value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value, 1)} or {"findings": "none"}
    return {} if value is None else {"finding": value}


def _some(*items: Any) -> list[Any]:
    return [item for item in items if item is not None]


def _views(run: RunFiles) -> Picture | None:
    """The picture of the augmented views that pretraining saw, when the run kept one inside its folder."""
    name = run.pretrain.get("views")
    if not isinstance(name, str) or not name:
        return None
    path = (run.folder / name).resolve()
    if not path.is_relative_to(run.folder.resolve()) or path.suffix.lower() != ".png":
        run.gaps.append(
            "eval/pretrain.json names a picture of views that is no PNG inside the run folder: it was left out."
        )
        return None
    if not path.is_file() or path.stat().st_size > MAX_PICTURE_BYTES:
        run.gaps.append(f"{clean(name)} is not there or too large: the views cannot be shown.")
        return None
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        run.gaps.append(f"{clean(name)} is not a PNG picture: it was left out.")
        return None
    caption = "Views of the same images as the method saw them: one row is one image."
    return Picture("views", content, "png", "Augmented views of some training images", caption, "Views")


def _write(run: RunFiles, page: Page, sections: list[Section]) -> Path:
    """Add what both kinds share, write the figures and the page."""
    versions = pairs_table("What the result depends on besides data and settings.", run.environment)
    settings = Section("settings", "Settings", "config.yaml was not found.", code=settings_text(run), folded=True)
    page.sections = [
        *sections,
        settings,
        Section("versions", "Versions", "Not recorded.", (), _some(versions), folded=True),
    ]
    page.gaps = [clean(gap, 400) for gap in run.gaps]
    for picture in (p for section in page.sections for p in (*section.pictures, *section.overlays)):
        target = run.folder / "figures" / f"{picture.name}.{picture.suffix}"
        if picture.name != "views":
            atomic_write(target, picture.file)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medssl.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = atomic_write(run.folder / "report.html", environment.get_template("report.html").render(page=page))
    log.info("report written: %s", path)
    return path
