"""The verdict of a fine-tuning: what its paired differences show, in the direction of its metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from medssl.reporting.metric import Metric, metric_of
from medssl.reporting.text import Verdict, clean, excludes_zero, finite, joined, labels_phrase

MAX_LINES: Final = 6


def finetune_verdict(summary: Mapping[str, Any]) -> Verdict:
    """The sober reading of a comparison: a difference only where its 95 % interval leaves out 0.

    A verdict that the summary brings with it is shown first; the numbers are always stated.
    """
    metric = metric_of(summary)
    paired = list(summary.get("paired") or [])
    table = list(summary.get("table") or [])
    by_arm: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(paired, key=lambda row: row["n_labelled"]):
        by_arm.setdefault((clean(row["arm"], 60), clean(row["baseline"], 60), on_split(row)), []).append(row)
    by_pair = [_arm_headline(*names, rows, metric) for names, rows in by_arm.items()]
    lines = [_paired_line(row, table, metric) for rows in by_arm.values() for row in rows]
    lines += [] if paired else [_score_line(row, metric) for row in table]
    headline = "No paired comparison is available, so no arm can be called better."
    if by_pair:
        headline = by_pair[0] if len(by_pair) == 1 else _counted(paired, metric)
        if len(lines) > MAX_LINES:
            by_pair, lines = [_with_numbers(text, rows, metric) for text, rows in zip(by_pair, by_arm.values())], []
        lines = (by_pair if len(by_pair) > 1 or not lines else []) + lines
    written = summary.get("verdict")
    if isinstance(written, str) and written.strip():
        headline, lines = clean(written, 600), [headline, *lines]
    return Verdict(headline, lines, _cautions(summary, paired, table))


def on_split(row: Mapping[str, Any]) -> str:
    """`` on external_test`` for a row of one split among several."""
    return f" on {clean(row['split'], 40)}" if row.get("split") else ""


def _counted(paired: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Many comparisons in one sentence, those without a shown difference included."""
    better = sum(excludes_zero(row) and metric.better(row["difference"]) for row in paired)
    worse = sum(excludes_zero(row) and not metric.better(row["difference"]) for row in paired)
    if not better and not worse:
        return f"None of {len(paired)} paired comparisons shows a difference in {metric.title}."
    rest = len(paired) - better - worse
    return (
        f"Of {len(paired)} paired comparisons with the baseline, {better} show a {metric.good} {metric.title}, {worse} "
        f"a {metric.bad} one and {rest} no difference."
    )


def _arm_headline(arm: str, baseline: str, split: str, rows: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    better = [row["n_labelled"] for row in rows if excludes_zero(row) and metric.better(row["difference"])]
    worse = [row["n_labelled"] for row in rows if excludes_zero(row) and not metric.better(row["difference"])]
    open_ = [row["n_labelled"] for row in rows if not excludes_zero(row)]
    if not better and not worse:
        return f"No difference between {arm} and {baseline} was shown with {_volumes(open_)}{split}."
    parts = [f"{metric.good} {metric.title} than {baseline} with {_volumes(better)}"] if better else []
    parts += [f"{metric.bad} {metric.title} than {baseline} with {_volumes(worse)}"] if worse else []
    rest = f"; no difference was shown with {joined(open_)}" if open_ else ""
    return f"{arm} reached {' and '.join(parts)}{rest}{split}."


def _with_numbers(headline: str, rows: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """The headline of one arm with its differences, for where the full lines would be too many."""
    differences = ", ".join(f"{metric.difference(row['difference'])} (n = {row['n_labelled']})" for row in rows)
    return f"{headline} Differences: {differences}."


def _volumes(counts: Sequence[Any]) -> str:
    return f"{joined(counts)} labelled volume{'' if list(counts) == [1] else 's'}"


def _paired_line(row: Mapping[str, Any], table: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    n = row["n_labelled"]
    cells = {entry["arm"]: entry for entry in table if entry["n_labelled"] == n}
    means = {name: _mean_of(entry, row, metric) for name, entry in cells.items()}
    arm, baseline = row["arm"], row["baseline"]
    validation = cells.get(arm, {}).get("n_validation")
    scores = ""
    if arm in cells and baseline in cells:
        scores = f"{metric.text(means[arm])} against {metric.text(means[baseline])}, "
    low, high = row.get("low"), row.get("high")
    draws = f"{clean(row.get('n_draws'))} draw{'' if row.get('n_draws') == 1 else 's'}"
    if finite(low) is None or finite(high) is None:
        interval, reading = "no interval", "so no difference is claimed"
    else:
        interval = f"95 % interval {metric.difference(low)} to {metric.difference(high)}"
        reading = "0 is outside" if excludes_zero(row) else "it includes 0: no difference shown"
    return (
        f"{labels_phrase(n, validation)}{on_split(row)}: {clean(arm, 60)} {scores}difference to {clean(baseline, 60)} "
        f"{metric.difference(row.get('difference'))} {metric.measure} ({interval}, {reading}; "
        f"{clean(row.get('n_people'))} people, {draws})"
    )


def _mean_of(entry: Mapping[str, Any], row: Mapping[str, Any], metric: Metric) -> Any:
    """Mean of an arm on the split of a comparison."""
    if not row.get("split"):
        return entry.get("mean")
    found = entry.get("splits")
    for key in (row["split"], metric.name, "mean"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _score_line(row: Mapping[str, Any], metric: Metric) -> str:
    phrase = labels_phrase(row["n_labelled"], row.get("n_validation"))
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{phrase}: {clean(row['arm'], 60)} mean {metric.title} {metric.text(row.get('mean'))}{unit}"


def _cautions(
    summary: Mapping[str, Any], paired: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]
) -> list[str]:
    cautions = []
    if any(row.get("n_draws") == 1 for row in (*paired, *table)):
        cautions.append(
            "Some results rest on one draw of labelled volumes: how much the choice of volumes matters is unknown."
        )
    people = [row["n_people"] for row in paired if finite(row.get("n_people")) is not None]
    if people and min(people) < 10:
        cautions.append(f"Only {min(people):.0f} people were tested; an interval from so few is rough.")
    if len(paired) > 1:
        cautions.append(f"{len(paired)} comparisons were made; the intervals are not widened for that.")
    if summary.get("transductive"):
        cautions.append(
            "Transductive: images of tested people (with their labels, where the method uses labels) were used in "
            "pretraining."
        )
    return cautions
