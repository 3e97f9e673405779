"""The report of a few-label comparison: what each way to pretrain is worth, where that can be told from chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.reporting.describe import Table, cell_table, pairs_table, score_table, table_of
from medssl.reporting.few_label_figures import difference_figures, is_shown, score_figures
from medssl.reporting.metric import Metric, metric_of
from medssl.reporting.page import Section, data_section, notes, some, write_page
from medssl.reporting.source import read_run
from medssl.reporting.text import MISSING, Verdict, clean, duration, finite, joined, number

FEW_DRAWS = 5
FEW_PEOPLE = 10


def few_label_report(run_dir: Path) -> Path:
    """Build the report of a comparison by fine-tuning; see ``build_report``."""
    run = read_run(run_dir, "few_label")
    summary = run.summary
    spoken = with_encoders(summary)
    against = difference_table(spoken, "paired", f"Differences to the baseline, {clean(summary.get('baseline'), 60)}.")
    best = difference_table(spoken, "paired_best", _best_caption(spoken))
    left_out = pairs_table("Scores and cases that are not counted.", summary.get("left_out") or {})
    leak = pairs_table("Check that no person is on both sides of a split.", summary.get("leak_check") or {})
    sections = [
        Section(
            "results", "Results", "No scores are available.",
            score_figures(summary, run.per_case), some(score_table(spoken)),
        ),
        Section(
            "paired", "Differences to the baseline", "No paired comparison is available.",
            difference_figures(summary), some(against),
        ),
        Section("best", "Differences to the best arm", "No paired comparison is available.", (), some(best)),
        Section(
            "pretraining", "Pretraining", "Nothing was pretrained.", (),
            some(pretraining_table(summary), failed_table(summary)),
        ),
        data_section(run),
        Section("evaluation", "How it was measured", "Nothing was recorded.", (), some(left_out, leak), notes(summary)),
        Section(
            "cells", "All fine-tunings", "eval/cells.csv was not found.", (), some(cell_table(run.cells)), folded=True
        ),
    ]  # fmt: skip
    return write_page(run, "Comparison of pretrainings with few labels", few_label_verdict(summary), sections)


def with_encoders(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with the encoder in the name of every arm, where there are several encoders."""
    several = len(summary.get("encoders") or []) > 1

    def named(row: Mapping[str, Any]) -> dict[str, Any]:
        if not several:
            return dict(row)
        shown = {key: f"{row[key]} on {row['encoder']}" for key in ("arm", "baseline") if key in row}
        return {**row, **shown}

    parts = ("table", "paired", "paired_best", "best", "gap_closed")
    return {**summary, **{part: [named(row) for row in summary.get(part) or []] for part in parts}}


def difference_table(summary: Mapping[str, Any], part: str, caption: str) -> Table | None:
    """Paired differences of one kind with their intervals, p-values and how each is to be read."""
    metric = metric_of(summary)
    splits = any(row.get("split") for row in summary.get(part) or [])
    several = len({str(row["baseline"]) for row in summary.get(part) or []}) > 1  # one is named in the caption
    columns = ["arm", *(["against"] if several else []), *(["split"] if splits else []), "reading"]
    words = len(columns)
    columns += ["training labels", "difference", "95 % interval", "p (Holm)", "people", "draws"]
    rows = [
        [
            clean(row["arm"], 80),
            *([clean(row["baseline"], 80)] if several else []),
            *([clean(row.get("split"), 40)] if splits else []),
            _reading(row, metric),
            number(row["n_labelled"], 0),
            metric.difference(row["difference"]),
            _interval(row, metric),
            number(row.get("p_holm"), 3),
            number(row.get("n_people"), 0),
            number(row.get("n_draws"), 0),
        ]
        for row in summary.get(part) or []
    ]
    caption += (
        f" In {metric.axis}, over the same test people and draws. The interval allows for who is tested and for how "
        "trainings vary between draws; p-values are corrected by Holm over all rows of this table."
    )
    return table_of(caption, columns, rows, words=words)


def _reading(row: Mapping[str, Any], metric: Metric) -> str:
    if not is_shown(row):
        return "no difference shown"
    return "better" if metric.better(row["difference"]) else "worse"


def _interval(row: Mapping[str, Any], metric: Metric) -> str:
    if finite(row.get("low")) is None or finite(row.get("high")) is None:
        return "none"
    return f"{metric.difference(row['low'])} to {metric.difference(row['high'])}"


def _best_caption(summary: Mapping[str, Any]) -> str:
    best = [f"{clean(row['arm'], 80)} with {number(row['n_labelled'], 0)}" for row in summary.get("best") or []]
    if not best:
        return "Differences to the best arm."
    return (
        f"Differences to the arm with the best mean ({joined(best)} labelled volumes). It was chosen on the people "
        "that it is compared on here, so that differences look larger than they are."
    )


def pretraining_table(summary: Mapping[str, Any]) -> Table | None:
    """What each pretraining did with its budget."""
    several = len(summary.get("encoders") or []) > 1
    columns = ["arm", *(["encoder"] if several else []), "stage", "method", "collapse"]
    words = len(columns)
    columns += ["seed", "steps", "time", "ms a step", "final loss"]
    rows = []
    for row in summary.get("pretraining") or []:
        steps, seconds = finite(row.get("steps")), finite(row.get("seconds"))
        signs = row.get("collapse") or []
        rows.append(
            [
                clean(row["arm"], 80),
                *([clean(row["encoder"], 60)] if several else []),
                clean(row.get("stage"), 10),
                clean(row["method"], 40),
                "; ".join(clean(sign, 160) for sign in signs) if signs else "no sign",
                clean(row.get("seed"), 10),
                number(steps, 0),
                duration(seconds),
                MISSING if not steps or seconds is None else number(1000 * seconds / steps, 0),
                number(row.get("loss")),
            ]
        )
    caption = (
        "Every pretraining; each has a report of its own in the folder pretraining. Losses of different methods cannot "
        "be compared."
    )
    return table_of(caption, columns, rows, words=words)


def failed_table(summary: Mapping[str, Any]) -> Table | None:
    """What failed and why."""
    failed = summary.get("failed")
    if not isinstance(failed, Mapping):
        return None
    rows = [[clean(name, 120), clean(error, 400)] for name, error in failed.items()]
    return table_of("What failed; --resume tries it again.", ["cell", "error"], rows, words=2)


def few_label_verdict(summary: Mapping[str, Any]) -> Verdict:
    """The run's own verdict, the numbers beside it, and reasons for caution."""
    metric = metric_of(summary)
    table, paired = summary.get("table") or [], summary.get("paired") or []
    written = summary.get("verdict")
    headline = clean(written, 1500) if isinstance(written, str) and written.strip() else "No scores are available."
    lines = []
    means = [mean for row in table if (mean := finite(row.get("mean"))) is not None]
    if means:
        spreads = [sd for row in table if (sd := finite(row.get("sd"))) is not None]
        over = f", and one arm's draws differ by up to {number(max(spreads), metric.digits)} (sd)" if spreads else ""
        lines.append(
            f"Means of {len(means)} arms and settings lie between {metric.text(min(means))} and "
            f"{metric.text(max(means))} {metric.measure}{over}."
        )
    for row in summary.get("upper_bound") or []:
        on = f" on {clean(row['encoder'], 40)}" if len(summary.get("encoders") or []) > 1 else ""
        lines.append(f"With all {clean(row.get('n_labelled'))} labels{on}: {metric.text(row.get('mean'))}.")
    return Verdict(headline, lines, _cautions(summary, table, paired))


def _cautions(summary: Mapping[str, Any], table: list[Any], paired: list[Any]) -> list[str]:
    cautions = []
    failed = summary.get("failed") or {}
    if failed:
        cautions.append(f"{len(failed)} cells failed and are missing: {joined(clean(name, 80) for name in failed)}.")
    draws = [row["n_draws"] for row in table if finite(row.get("n_draws")) is not None]
    if draws and min(draws) < FEW_DRAWS:
        n = min(draws)
        how = "unknown, so no interval is given" if n == 1 else "known only roughly"
        cautions.append(f"{n} draw{'s' * (n != 1)} of labelled volumes: how much their choice matters is {how}.")
    seeds = [row["n_seeds"] for row in table if finite(row.get("n_seeds")) is not None]
    if seeds and min(seeds) == 1:
        cautions.append("One seed: each arm was pretrained once, and another pretraining may come out differently.")
    people = [row["n_people"] for row in paired if finite(row.get("n_people")) is not None]
    if people and min(people) < FEW_PEOPLE:
        cautions.append(f"Only {min(people)} people were tested; an interval from so few is rough.")
    fallen = dict.fromkeys(clean(row["arm"], 60) for row in summary.get("pretraining") or [] if row.get("collapse"))
    if fallen:
        cautions.append(f"Pretraining showed signs of collapse in {joined(fallen)}.")
    if summary.get("transductive"):
        cautions.append("Transductive: images of tested people were allowed in pretraining.")
    return cautions
