"""From the cells of a grid to the numbers that are reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.config import FinetuneConfig
from medssl.config.compare import UPPER_BOUND
from medssl.data.splits import TEST_SPLITS
from medssl.evaluation.statistics import compare_arms, holm, over_draws
from medssl.reporting.metric import Metric, metric_of
from medssl.runs.grid import Cell, Result
from medssl.runs.tasks import TaskRun, task_run
from medssl.runs.volumes import Cohort


@dataclass
class Finetuned:
    """What a fine-tuning grid found."""

    summary: dict[str, Any]
    folder: Path
    report: Path | None = None
    verdict: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Table and verdict for people."""
        metric = metric_of(self.summary)
        lines = [f"{'arm':<24}{'labels':>8}  {metric.axis} (mean +- sd over draws)"]
        for row in self.summary["table"]:
            spread = "" if row["sd"] is None else f" +- {metric.text(row['sd'])}"
            mean = metric.text(row["mean"])
            lines.append(f"{row['arm']:<24}{row['n_labelled']:>8}  {mean}{spread} ({row['n_draws']} draws)")
        return "\n".join([*lines, "", self.verdict, f"report: {self.report}"])

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        return {**self.summary, "report": str(self.report)}


def summarise_grid(
    config: FinetuneConfig,
    cohort: Cohort,
    folder: Path,
    per_case: pd.DataFrame,
    results: dict[Cell, Result],
    leak_check: dict[str, Any],
) -> Finetuned:
    """Mean, spread and paired intervals of every arm and label fraction, and what they amount to in words."""
    run = task_run(config, cohort)
    facts = run.facts()
    metric = metric_of({"metric": run.metric.name, **facts})
    arms = per_case[per_case["arm"] != UPPER_BOUND]
    baseline = config.grid.arms[0].name
    table = score_rows(arms, results, run)
    upper = upper_bound(per_case[per_case["arm"] == UPPER_BOUND], run)
    paired = paired_rows(arms, baseline, run) if len(config.grid.arms) > 1 else []
    evaluated_on = " and ".join(config.evaluated)
    verdict = _verdict(table, paired, config.evaluated[0], metric)
    summary = {
        "task": config.task.name,
        "metric": metric.name,
        **facts,
        "evaluated_on": evaluated_on,
        "baseline": baseline,
        "table": table,
        "paired": paired,
        "upper_bound": upper,
        "gap_closed": gap_closed(table, baseline, upper, metric),
        "left_out": {
            **({"both_empty": int(per_case["dice"].isna().sum())} if metric.name == "dice" else {}),
            "excluded_cases": list(cohort.left_out),
        },
        "transductive": config.data.transductive,
        "leak_check": leak_check,
        "notes": grid_notes(
            config, run, intervals="Intervals resample draws and groups; cases of one group are averaged first."
        ),
        "verdict": verdict,
    }
    return Finetuned(summary, folder, verdict=verdict)


def _leading(per_case: pd.DataFrame, run: TaskRun) -> pd.DataFrame:
    """The rows of the split that leads, where there are several."""
    return per_case[per_case["split"] == run.config.evaluated[0]] if "split" in per_case else per_case


def score_rows(arms: pd.DataFrame, results: Mapping[Any, Result], run: TaskRun) -> list[dict[str, Any]]:
    """Mean and spread over draws of each arm of the configuration and number of labels that has finished cells.

    Args:
        arms: Rows of ``per_case.csv``, without the upper bound's.
        results: By cell (which has ``arm`` and ``n_labelled``).
        run: What the scores are.
    """
    grid, column = run.config.grid, run.metric.column
    means = over_draws(_leading(arms, run), metric=column).set_index(["arm", "n_labelled"])
    rows = []
    for arm in (one.name for one in grid.arms):
        for n in sorted(set(grid.n_labelled)):
            part = arms[(arms["arm"] == arm) & (arms["n_labelled"] == n)]
            cells = [result for cell, result in results.items() if cell.arm == arm and cell.n_labelled == n]
            if not cells:
                continue
            # People count alike, however many volumes they have; as in the mean.
            by_person = _leading(part, run).groupby(["draw", "seed", "group"])[column].mean()
            by_draw = by_person.groupby(level="draw").mean()
            rows.append(
                {
                    "arm": arm,
                    "n_labelled": n,
                    "n_validation": cells[0]["n_validation"],
                    "n_draws": int(by_draw.size),
                    "n_seeds": int(part["seed"].nunique()),
                    "mean": _number(means.loc[(arm, n), "mean"]),
                    "sd": _number(means.loc[(arm, n), "sd"]),
                    "min": _number(by_draw.min()),
                    "max": _number(by_draw.max()),
                    **plain(run.details(part)),
                    "seconds": round(sum(cell["seconds"] for cell in cells), 1),
                }
            )
    return rows


def upper_bound(bound: pd.DataFrame, run: TaskRun) -> dict[str, Any] | None:
    """What training on every label reached, from its rows of ``per_case.csv``; None without any."""
    if bound.empty:
        return None
    mean = over_draws(_leading(bound, run), metric=run.metric.column)["mean"].iloc[0]
    return {
        "mean": _number(mean),
        "n_labelled": int(bound["n_labelled"].iloc[0]),
        **({"splits": plain(run.details(bound)["splits"])} if "split" in bound else {}),
    }


def paired_rows(arms: pd.DataFrame, baseline: str, run: TaskRun) -> list[dict[str, Any]]:
    """Differences to the baseline, on each split by itself, with p-values corrected over all of them."""
    splits = run.config.evaluated if len(run.config.evaluated) > 1 else (None,)
    frames = [
        compare_arms(arms if split is None else arms[arms["split"] == split], baseline, metric=run.metric.column)
        for split in splits
    ]
    frame = pd.concat([one.assign(split=split) for one, split in zip(frames, splits, strict=True)], ignore_index=True)
    frame["p_holm"] = holm(frame["p_value"].to_numpy(dtype=float))
    names = ["arm", "baseline", "n_labelled", "difference", "low", "high", "p_value", "p_holm", "n_people", "n_draws"]
    names += [] if splits == (None,) else ["split"]
    return [{name: plain(row[name]) for name in names} for row in frame.to_dict(orient="records")]


def gap_closed(
    table: list[dict[str, Any]], baseline: str, upper: dict[str, Any] | None, metric: Metric
) -> list[dict[str, Any]]:
    """Share of the way from the baseline to the upper bound that an arm goes; left out where there is no way to go."""
    if upper is None or upper["mean"] is None:
        return []
    start = {row["n_labelled"]: row["mean"] for row in table if row["arm"] == baseline}
    rows = []
    for row in table:
        gap = upper["mean"] - start[row["n_labelled"]]
        if row["arm"] != baseline and metric.better(gap):
            share = round((row["mean"] - start[row["n_labelled"]]) / gap, 4)
            rows.append({"arm": row["arm"], "n_labelled": row["n_labelled"], "share": share})
    return rows


def _verdict(table: list[dict[str, Any]], paired: list[dict[str, Any]], split: str, metric: Metric) -> str:
    what = metric.measure
    if not paired:
        pick = max if metric.higher else min
        best = pick(table, key=lambda row: 0.0 if row["mean"] is None else row["mean"])
        reached = f"{metric.text(best['mean'])} {metric.unit}".strip()
        return (
            f"{best['arm']} reaches a mean {metric.title} of {reached} with {best['n_labelled']} labelled volumes "
            f"on {split}; there is no other arm to compare it with."
        )
    sentences = []
    for row in paired:
        known = row["low"] is not None and row["high"] is not None
        where = f"with {row['n_labelled']} labelled" + (f" on {row['split']}" if "split" in row else "")
        difference, low, high = (
            None if row[name] is None else f"{row[name]:+.{metric.digits}f}" for name in ("difference", "low", "high")
        )
        if not known:
            sentences.append(f"{row['arm']} {where}: {difference} {what}, an interval cannot be given.")
        elif row["low"] > 0 or row["high"] < 0:
            direction = "better" if metric.better(row["difference"]) else "worse"
            sentences.append(
                f"{row['arm']} is {direction} than {row['baseline']} {where}: {difference} {what} "
                f"(95 % interval {low} to {high})."
            )
        else:
            sentences.append(
                f"No difference between {row['arm']} and {row['baseline']} {where} can be told from chance: "
                f"{difference} {what} (95 % interval {low} to {high})."
            )
    return " ".join(sentences)


def grid_notes(config: FinetuneConfig, run: TaskRun, *, intervals: str) -> list[str]:
    """What a reader must know about the scores of a grid; ``intervals`` says what they allow for."""
    grid = config.grid
    given = (
        f"Every cell is given n training and {grid.n_validation} labelled validation volumes, on which its best step "
        f"is chosen: n + {grid.n_validation} labels in all."
        if grid.n_validation
        else "Every cell is given n labelled volumes and none for validation: its last step counts."
    )
    notes = [
        given,
        *run.notes(),
        intervals,
    ]
    if not set(config.evaluated) <= set(TEST_SPLITS):
        notes.append("These are not test results: settings may have been chosen on these volumes.")
    if config.status:
        notes.append(f"Status: {config.status}")
    for arm in grid.arms:
        if arm.steps is not None:
            notes.append(f"Arm `{arm.name}` is trained for {arm.steps} steps instead of {config.training.steps}.")
    if config.data.transductive:
        notes.append(
            "Transductive: images of evaluated people (with their labels, where the method uses labels) were "
            "allowed in pretraining."
        )
    return notes


def _number(value: Any) -> float | None:
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def plain(value: Any) -> Any:
    """Python values for numpy ones, and null for what is not finite, as JSON can hold it."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, float):
        return _number(value)
    return value.item() if hasattr(value, "item") else value
