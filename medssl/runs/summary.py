"""From the cells of a grid to the numbers that are reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.config import FinetuneConfig
from medssl.data.splits import TEST_SPLITS
from medssl.evaluation.statistics import compare_arms, over_draws
from medssl.runs.grid import Cell, Result
from medssl.runs.volumes import Cohort

UPPER_BOUND = "upper_bound"


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
        lines = [f"{'arm':<24}{'labels':>8}  Dice (mean +- sd over draws)"]
        for row in self.summary["table"]:
            spread = "" if row["sd"] is None else f" +- {row['sd']:.3f}"
            lines.append(f"{row['arm']:<24}{row['n_labelled']:>8}  {row['mean']:.3f}{spread} ({row['n_draws']} draws)")
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
    arms = per_case[per_case["arm"] != UPPER_BOUND]
    bound = per_case[per_case["arm"] == UPPER_BOUND]
    baseline = config.grid.arms[0].name
    table = _table(arms, results, config)
    upper = None
    if not bound.empty:
        upper = {"mean": _number(over_draws(bound)["mean"].iloc[0]), "n_labelled": int(bound["n_labelled"].iloc[0])}
    paired = _paired(arms, baseline) if len(config.grid.arms) > 1 else []
    verdict = _verdict(table, paired, config.evaluate_on)
    summary = {
        "task": config.task.name,
        "metric": "dice",
        "evaluated_on": config.evaluate_on,
        "baseline": baseline,
        "table": table,
        "paired": paired,
        "upper_bound": upper,
        "gap_closed": _gap_closed(table, baseline, upper),
        "left_out": {
            "both_empty": int(per_case["dice"].isna().sum()),
            "excluded_cases": list(cohort.left_out),
        },
        "transductive": config.data.transductive,
        "leak_check": leak_check,
        "notes": _notes(config, cohort),
        "verdict": verdict,
    }
    return Finetuned(summary, folder, verdict=verdict)


def _table(arms: pd.DataFrame, results: dict[Cell, Result], config: FinetuneConfig) -> list[dict[str, Any]]:
    means = over_draws(arms).set_index(["arm", "n_labelled"])
    rows = []
    for arm in (one.name for one in config.grid.arms):
        for n in sorted(set(config.grid.n_labelled)):
            part = arms[(arms["arm"] == arm) & (arms["n_labelled"] == n)]
            # People count alike, however many volumes they have; as in the mean.
            by_draw = part.groupby(["draw", "seed", "group"])["dice"].mean().groupby(level="draw").mean()
            cells = [result for cell, result in results.items() if cell.arm == arm and cell.n_labelled == n]
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
                    "hd95_mm": _number(part["hd95_mm"].mean()),
                    "hd95_mm_detected": _number(part.loc[~part["missed"].astype(bool), "hd95_mm"].mean()),
                    "missed": int(part["missed"].astype(bool).sum()),
                    "seconds": round(sum(cell["seconds"] for cell in cells), 1),
                }
            )
    return rows


def _paired(arms: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
    frame = compare_arms(arms, baseline)
    names = ("arm", "baseline", "n_labelled", "difference", "low", "high", "p_value", "p_holm", "n_people", "n_draws")
    return [{name: _plain(row[name]) for name in names} for row in frame.to_dict(orient="records")]


def _gap_closed(table: list[dict[str, Any]], baseline: str, upper: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Share of the way from the baseline to the upper bound that an arm goes; left out where there is no way to go."""
    if upper is None or upper["mean"] is None:
        return []
    start = {row["n_labelled"]: row["mean"] for row in table if row["arm"] == baseline}
    rows = []
    for row in table:
        gap = upper["mean"] - start[row["n_labelled"]]
        if row["arm"] != baseline and gap > 0:
            share = round((row["mean"] - start[row["n_labelled"]]) / gap, 4)
            rows.append({"arm": row["arm"], "n_labelled": row["n_labelled"], "share": share})
    return rows


def _verdict(table: list[dict[str, Any]], paired: list[dict[str, Any]], evaluated_on: str) -> str:
    if not paired:
        best = max(table, key=lambda row: row["mean"] or 0.0)
        return (
            f"{best['arm']} reaches a mean Dice of {best['mean']:.3f} with {best['n_labelled']} labelled volumes "
            f"on {evaluated_on}; there is no other arm to compare it with."
        )
    sentences = []
    for row in paired:
        known = row["low"] is not None and row["high"] is not None
        where = f"with {row['n_labelled']} labelled"
        if not known:
            sentences.append(f"{row['arm']} {where}: {row['difference']:+.3f} Dice, an interval cannot be given.")
        elif row["low"] > 0 or row["high"] < 0:
            direction = "better" if row["low"] > 0 else "worse"
            sentences.append(
                f"{row['arm']} is {direction} than {row['baseline']} {where}: {row['difference']:+.3f} Dice "
                f"(95 % interval {row['low']:+.3f} to {row['high']:+.3f})."
            )
        else:
            sentences.append(
                f"No difference between {row['arm']} and {row['baseline']} {where} can be told from chance: "
                f"{row['difference']:+.3f} Dice (95 % interval {row['low']:+.3f} to {row['high']:+.3f})."
            )
    return " ".join(sentences)


def _notes(config: FinetuneConfig, cohort: Cohort) -> list[str]:
    grid = config.grid
    table = cohort.chosen.table
    evaluated = table[table["split"] == config.evaluate_on]
    notes = [
        f"Every cell is given n training and {grid.n_validation} labelled validation volumes, on which its best step "
        f"is chosen: n + {grid.n_validation} labels in all.",
        f"Scored on {int(evaluated['label'].notna().sum())} volumes of {evaluated['group'].nunique()} groups "
        f"(split `{config.evaluate_on}`), in the geometry of their files.",
        "Intervals resample draws and groups; cases of one group are averaged first.",
    ]
    if config.evaluate_on not in TEST_SPLITS:
        notes.append("These are not test results: settings may have been chosen on these volumes.")
    if config.status:
        notes.append(f"Status: {config.status}")
    for arm in grid.arms:
        if arm.steps is not None:
            notes.append(f"Arm `{arm.name}` is trained for {arm.steps} steps instead of {config.training.steps}.")
    if config.data.transductive:
        notes.append("Transductive: images of evaluated people were allowed in pretraining.")
    return notes


def _number(value: Any) -> float | None:
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _number(value)
    return value.item() if hasattr(value, "item") else value
