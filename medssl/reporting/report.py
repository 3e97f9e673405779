"""The report of a run: one HTML file that needs nothing else, built from the files of the run folder alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from medssl.reporting import curves, scores
from medssl.reporting.age_site import age_site_report
from medssl.reporting.clusters import cluster_curves, cluster_table, read_clusters
from medssl.reporting.describe import cell_table, gap_table, paired_table, pairs_table, score_table
from medssl.reporting.drawing import Picture
from medssl.reporting.few_label import few_label_report
from medssl.reporting.page import Section, data_section, notes, some, write_page
from medssl.reporting.source import RunFiles, read_run, run_kind
from medssl.reporting.targets import confusion, predicted_values
from medssl.reporting.text import Verdict, clean, duration, finite
from medssl.reporting.verdict import finetune_verdict

MAX_PICTURE_BYTES: Final = 20_000_000


def build_report(run_dir: Path) -> Path:
    """Build ``report.html`` and ``figures/`` of a run of any kind from its files; returns the report's path.

    The same files give the same bytes. What is missing is named in the report.

    Raises:
        DataError: The folder is not that of a run.
        DiskError: The report cannot be written.
    """
    run_dir = Path(run_dir)
    return _REPORTS[run_kind(run_dir)](run_dir)


def segmentation_report(run_dir: Path) -> Path:
    """Build the report of a fine-tuning run; see ``build_report``."""
    run = read_run(run_dir, "segmentation")
    chart = scores.score_by_labels(run.summary, run.per_case)
    forest = scores.paired_differences(run.summary)
    boxes = scores.class_boxes(run.summary, run.per_case)
    training = curves.training_curves(run.curves, run.summary)
    monitors = curves.pretraining_curves(run.metrics, monitors_only=True)
    summary = run.summary
    left_out = pairs_table("Cases and structures that no score counts.", _named(summary.get("left_out")))
    leak = pairs_table("Check that no person is on both sides of a split.", _named(summary.get("leak_check")))
    sections = [
        Section("results", "Results", "No scores are available.", some(chart, forest), some(score_table(summary))),
        Section(
            "paired",
            "Comparisons",
            "No paired comparison is available.",
            (),
            some(paired_table(summary), gap_table(summary)),
        ),
        Section("classes", "Structures", "No scores of single cases are available.", some(boxes)),
        Section(
            "examples",
            "Examples",
            "No example pictures were kept.",
            overlays=[scores.overlay_picture(o) for o in run.overlays],
        ),
        Section("training", "Training", "No training logs were found.", some(training, monitors)),
        data_section(run),
        Section("left-out", "Left out and checks", "Nothing was recorded.", (), some(left_out, leak), notes(summary)),
    ]
    cells = some(cell_table(run.cells))
    sections.append(Section("cells", "All fine-tunings", "eval/cells.csv was not found.", (), cells, folded=True))
    return write_page(run, "Few-label segmentation", finetune_verdict(run.summary), sections)


def target_report(run_dir: Path) -> Path:
    """Build the report of a fine-tuning on one label of a person; see ``build_report``."""
    run = read_run(run_dir, "target")
    summary = run.summary
    people = some(predicted_values(summary, run.per_case), confusion(summary, run.per_case))
    training = curves.training_curves(run.curves, summary)
    left_out = pairs_table("Cases that no score counts.", _named(summary.get("left_out")))
    leak = pairs_table("Check that no person is on both sides of a split.", _named(summary.get("leak_check")))
    results = some(scores.score_by_labels(summary, run.per_case), scores.paired_differences(summary))
    compared = some(paired_table(summary), gap_table(summary))
    sections = [
        Section("results", "Results", "No scores are available.", results, some(score_table(summary))),
        Section("paired", "Comparisons", "No paired comparison is available.", (), compared),
        Section("people", "Predictions", "eval/per_case.csv holds nothing to draw.", people),
        Section("training", "Training", "No training logs were found.", some(training)),
        data_section(run),
        Section("left-out", "Left out and checks", "Nothing was recorded.", (), some(left_out, leak), notes(summary)),
        Section(
            "cells", "All fine-tunings", "eval/cells.csv was not found.", (), some(cell_table(run.cells)), folded=True
        ),
    ]
    kind = f"Few-label {clean(summary.get('task', 'prediction'), 30)}"
    target = f" of {clean(summary['target'], 40)}" if summary.get("target") else ""
    return write_page(run, kind + target, finetune_verdict(summary), sections)


def pretrain_report(run_dir: Path) -> Path:
    """Build the report of a pretraining run; see ``build_report``."""
    run = read_run(run_dir, "pretrain")
    done = run.pretrain
    elsewhere = ("weights", "collapse", "recovered", "clusters", "label_notes", "views", "data_wait_share", "seconds")
    facts = {k: v for k, v in done.items() if k not in elsewhere}
    if "seconds" in done:
        facts["time"] = duration(done["seconds"])
    share = finite(done.get("data_wait_share"))
    if share is not None:
        facts["share of the time spent waiting for data"] = f"{100 * share:.0f} %"
    weights = done.get("weights") if isinstance(done.get("weights"), dict) else {}
    saved = pairs_table("Saved weights: number of tensors.", weights, ("part", "tensors"))
    views = _views(run)
    sections = [
        Section("training", "Training", "No training log was found.", some(curves.pretraining_curves(run.metrics))),
        *_clusters(run),
        Section("views", "Views", "No picture of the views was kept.", some(views)),
        Section(
            "summary", "Summary", "eval/pretrain.json was not found.", (),
            some(pairs_table("The run.", facts), saved),
        ),
        data_section(run),
    ]  # fmt: skip
    return write_page(run, "Pretraining", _pretrain_verdict(run), sections)


def _clusters(run: RunFiles) -> list[Section]:
    """What the method's clusters are; nothing for a method without any."""
    if run.clusters is None:
        return []
    try:
        frame = read_clusters(run.clusters)
    except ValueError as error:
        run.gaps.append(f"logs/clusters.csv cannot be read ({error}): clusters cannot be shown.")
        return []
    pictures, tables = some(cluster_curves(frame)), some(cluster_table(frame))
    return [Section("clusters", "Clusters", "logs/clusters.csv holds no rows.", pictures, tables)]


def _pretrain_verdict(run: RunFiles) -> Verdict:
    """What a loss curve can tell: whether the run ended and whether it collapsed, never how good it is."""
    done = run.pretrain
    collapse = done.get("collapse")
    method, steps = clean(done.get("method", "The method"), 60), done.get("steps")
    debias = done.get("debias")
    if isinstance(debias, dict):
        weight = f", weight {debias['weight']:g}" if finite(debias.get("weight")) is not None else ""
        what, layer = clean(debias.get("attribute", ""), 60), clean(debias.get("on", ""), 10)
        method = f"{method} with {clean(debias.get('name', ''), 30)} against {what} on {layer}{weight}"
    begin = (
        f"{method} was trained for {steps} steps"
        if finite(steps) is not None
        else f"{method}: no summary of the run is available"
    )
    if collapse:
        end = "it ended with signs of collapse: do not use these weights without looking at the monitors"
    elif collapse is None:
        end = "whether it collapsed was not recorded"
    elif not _looked(run):
        end = "it was not watched for collapse (too few steps for training.monitor_every, or nothing to watch)"
    else:
        end = "no sign of collapse was seen"
    signs = [f"Sign of collapse: {clean(sign, 300)}" for sign in collapse or []]
    signs += [f"Sign of collapse that went away: {clean(sign, 300)}" for sign in done.get("recovered") or []]
    empty = sorted({int(row["empty"]) for row in done.get("clusters") or [] if finite(row.get("empty"))})
    if empty:
        signs.append(f"At the end {' or '.join(map(str, empty))} clusters held no item (see Clusters).")
    use = "A loss says nothing about use: whether pretraining helps is decided by fine-tuning on labels."
    labels = [clean(note, 500) for note in done.get("label_notes") or []]
    return Verdict(f"{begin}; {end}.", [*signs, *labels], [use])


def _looked(run: RunFiles) -> bool:
    """Whether the embedding or the clusters were looked at during training; true where no log is left to tell."""
    return run.metrics is None or any(
        name in run.metrics and bool(run.metrics[name].notna().any())
        for name in ("collapse_alarm", "spread", "effective_rank")
    )


def _named(value: Any) -> dict[str, Any]:
    """Findings as names and values, whether the run wrote them as a mapping, a list or one value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value, 1)} or {"findings": "none"}
    return {} if value is None else {"finding": value}


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


_REPORTS: Final[Mapping[str, Callable[[Path], Path]]] = MappingProxyType(
    {
        "segmentation": segmentation_report,
        "target": target_report,
        "pretrain": pretrain_report,
        "age_site": age_site_report,
        "few_label": few_label_report,
    }
)
