"""From the cells of a few-label comparison to the numbers that are reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from medssl.config.compare import UPPER_BOUND, CompareConfig
from medssl.core.errors import TrainingError
from medssl.core.files import write_json
from medssl.evaluation.statistics import compare_in_blocks, holm
from medssl.reporting.metric import Metric, metric_of
from medssl.reporting.tables import write_csv
from medssl.runs.few_label_cells import FewLabelCell, FewLabelPlan
from medssl.runs.few_label_pretraining import PretrainCell, pretraining_rows, weights_of
from medssl.runs.finetune import cell_table, scores_of
from medssl.runs.grid import Result
from medssl.runs.leaks import LeakCheck
from medssl.runs.summary import gap_closed, grid_notes, paired_rows, plain, score_rows, upper_bound
from medssl.runs.tasks import TaskRun, task_run
from medssl.training import TrainingConfig

log = logging.getLogger(__name__)

SHOWN_BELOW: Final = 0.05
"""A difference is called one when its p-value, corrected by Holm, is below."""
_SHOWN: Final = 12
_INTERVALS: Final = (
    "Intervals are the wider, p-values the larger of two: a bootstrap over people and draws, and a two-way analysis of "
    "variance with the draws as blocks, which measures on all arms how trainings vary."
)
_INTERVAL: Final = ("low", "high", "p_value")


@dataclass
class ComparedFewLabel:
    """What a comparison found."""

    summary: dict[str, Any]
    folder: Path
    report: Path | None = None

    @property
    def verdict(self) -> str:
        """What it amounts to in words."""
        return str(self.summary["verdict"])

    @property
    def failed(self) -> Mapping[str, str]:
        """The first line of the error of each pretraining or fine-tuning that failed."""
        return dict(self.summary["failed"])

    def text(self) -> str:
        """Table and verdict for people."""
        summary, metric = self.summary, metric_of(self.summary)
        several = len(summary["encoders"]) > 1
        paired = {(row["arm"], row["encoder"], row["n_labelled"]): row for row in summary["paired"]}
        names = [_name(row, several) for row in summary["table"]]
        width = max([len("arm"), *(len(name) for name in names)]) + 2
        lines = [
            f"{'arm':<{width}}{'labels':>6}  {metric.axis}, mean +- sd over draws; difference to {summary['baseline']}"
        ]
        for name, row in zip(names, summary["table"], strict=True):
            spread = "" if row["sd"] is None else f" +- {metric.text(row['sd'])}"
            line = f"{name:<{width}}{row['n_labelled']:>6}  {metric.text(row['mean'])}{spread}"
            found = paired.get((row["arm"], row["encoder"], row["n_labelled"]))
            lines.append(line + ("" if found is None else f"  {_difference(found, metric)}"))
        lines += ["", self.verdict]
        lines += [f"FAILED {name}: {error}" for name, error in self.failed.items()]
        return "\n".join([*lines, f"report: {self.report}"])

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        return {**self.summary, "report": str(self.report)}


def summarise_few_label(
    plan: FewLabelPlan,
    folder: Path,
    pretrained: Mapping[PretrainCell, Result],
    results: Mapping[FewLabelCell, Result],
    failures: Mapping[str, str],
    leaks: LeakCheck,
) -> ComparedFewLabel:
    """Write the tables of every finished cell, and what they amount to.

    Arms of which a cell failed keep their scores, but are not compared: draws would differ.

    Args:
        plan: The opened plan.
        folder: Its run folder.
        pretrained: Pretrainings that are done.
        results: Fine-tunings that are done.
        failures: Error of each cell that failed, by its name.
        leaks: What the guard had to say.

    Raises:
        TrainingError: Nothing was finished.
    """
    if not results:
        name, error = next(iter(failures.items()), ("", ""))
        raise TrainingError("every cell of the comparison failed", where=name, found=error)
    config, run = plan.config, task_run(plan.tuning, plan.cohort)
    per_case = scores_of(folder / "cells", results, run)
    write_csv(per_case, folder / "eval" / "per_case.csv")
    write_csv(cell_table(results), folder / "eval" / "cells.csv")
    weights = {cell: weights_of(folder / "pretraining", cell, result) for cell, result in pretrained.items()}
    found = [_on_encoder(plan, encoder, per_case, results, weights) for encoder in config.encoders]
    facts = run.facts()
    metric = metric_of({"metric": run.metric.name, **facts})
    paired, best = (_corrected([row for one in found for row in one[part]]) for part in ("paired", "paired_best"))
    pretraining = pretraining_rows(pretrained)
    summary = {
        "kind": "few_label",
        "task": plan.tuning.task.name,
        "metric": metric.name,
        **facts,
        "evaluated_on": " and ".join(plan.tuning.evaluated),
        "baseline": config.baseline,
        "encoders": list(config.encoders),
        "budget": {"pretraining": _budget(config.training), "finetuning": _budget(plan.tuning.training)},
        "table": [row for one in found for row in one["table"]],
        "paired": paired,
        "best": [row for one in found for row in one["best"]],
        "paired_best": best,
        "upper_bound": [row for one in found for row in one["upper_bound"]],
        "gap_closed": [row for one in found for row in one["gap_closed"]],
        "pretraining": pretraining,
        "failed": {name: error.splitlines()[0] for name, error in failures.items()},
        "left_out": {
            **({"both_empty": int(per_case["dice"].isna().sum())} if metric.name == "dice" else {}),
            "excluded_cases": list(plan.cohort.left_out),
        },
        "transductive": config.data.transductive,
        "leak_check": {"groups_shared_between_splits": leaks.n_groups, "notes": list(leaks.notes)},
        "notes": [*_notes(plan, pretraining, found), *_task_notes(found), *plan.notes],
        "verdict": _verdict(config, paired, metric),
    }
    summary = _jsonable(summary)
    write_json(folder / "eval" / "summary.json", summary)
    return ComparedFewLabel(summary, folder)


def _on_encoder(
    plan: FewLabelPlan,
    encoder: str,
    per_case: pd.DataFrame,
    results: Mapping[FewLabelCell, Result],
    weights: Mapping[PretrainCell, Path],
) -> dict[str, Any]:
    """Tables of one encoder."""
    config = plan.config
    cells = {cell: result for cell, result in results.items() if cell.encoder == encoder}
    present = {cell.arm for cell in cells}
    first = {cell.arm: path for cell, path in weights.items() if cell.encoder == encoder}
    arms = {arm.name: first.get(arm.name) for arm in config.arms if arm.name in present}
    run = task_run(config.finetuning(encoder, config.protocol.seeds, arms), plan.cohort)
    rows = per_case[per_case["encoder"] == encoder]
    own, bound = rows[rows["arm"] != UPPER_BOUND], upper_bound(rows[rows["arm"] == UPPER_BOUND], run)
    table = score_rows(own, cells, run) if len(own) else []
    wanted = {cell for cell in plan.cells if cell.encoder == encoder and cell.arm != UPPER_BOUND}
    incomplete = {cell.arm for cell in wanted - set(cells)}
    whole = own[~own["arm"].isin(incomplete)]
    compared = whole["arm"].nunique() > 1
    known = compared and config.baseline not in incomplete
    best = _best([row for row in table if row["arm"] not in incomplete], run.metric)
    against = [
        row
        for one in best
        if compared
        for row in differences(whole[whole["n_labelled"] == one["n_labelled"]], one["arm"], run)
    ]
    closed = gap_closed(table, config.baseline, bound, run.metric) if config.baseline in present else []

    def named(part: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"encoder": encoder, **row} for row in part]

    return {
        "run": run,
        "incomplete": sorted(incomplete),
        "table": named(table),
        "paired": named(differences(whole, config.baseline, run)) if known else [],
        "best": named(best),
        "paired_best": named(against),
        "upper_bound": named([] if bound is None else [bound]),
        "gap_closed": named(closed),
    }


def differences(whole: pd.DataFrame, baseline: str, run: TaskRun) -> list[dict[str, Any]]:
    """Paired differences that allow both for who is tested and for how trainings vary.

    The bootstrap resamples people and draws, but two or three draws hardly vary in it; the blocks measure that
    variation on all arms together. The wider interval and the larger p-value of the two are kept; with one draw
    neither is known.
    """
    rows = []
    for row in paired_rows(whole, baseline, run):
        part = whole[whole["n_labelled"] == row["n_labelled"]]
        part = part[part["split"] == row["split"]] if "split" in row else part
        if "split" in part and "split" not in row:
            part = part[part["split"] == run.config.evaluated[0]]
        block = compare_in_blocks(part, baseline, metric=run.metric.column)[row["arm"]]
        both = [(row["low"], row["high"], row["p_value"]), (block.low, block.high, block.p_value)]
        known = all(value is not None and np.isfinite(value) for values in both for value in values)
        low, high, p = zip(*both, strict=True)
        wider = {"low": min(low), "high": max(high), "p_value": max(p)} if known else dict.fromkeys(_INTERVAL)
        rows.append({**row, **wider})
    return rows


def _best(table: Sequence[Mapping[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """The arm with the best mean of each number of labels."""
    pick = max if metric.higher else min
    best = []
    for n in dict.fromkeys(row["n_labelled"] for row in table):
        rows = [row for row in table if row["n_labelled"] == n and row["mean"] is not None]
        if rows:
            top = pick(rows, key=lambda row: row["mean"])
            best.append({"arm": top["arm"], "n_labelled": n, "mean": top["mean"]})
    return best


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with p-values that are corrected by Holm over all of them, every encoder included."""
    p = np.array([np.nan if row["p_value"] is None else row["p_value"] for row in rows], dtype=np.float64)
    return [{**row, "p_holm": plain(float(value))} for row, value in zip(rows, holm(p), strict=True)]


def _budget(training: TrainingConfig) -> dict[str, float]:
    return {"steps": training.steps} if training.steps is not None else {"seconds": float(training.seconds or 0)}


def _in_words(training: TrainingConfig) -> str:
    return f"{training.steps} steps" if training.steps is not None else f"{training.seconds:g} s"


def _verdict(config: CompareConfig, paired: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Names the arms that differ from the baseline by more than chance explains, and no others."""
    if not paired:
        return f"No arm can be compared with {config.baseline}: see what failed."
    if all(row["p_holm"] is None for row in paired):
        return (
            f"No arm can be told from {config.baseline}: with one draw of labelled volumes it is not known how much "
            "trainings vary."
        )
    shown = [row for row in paired if row["p_holm"] is not None and row["p_holm"] < SHOWN_BELOW]
    rest = len(paired) - len(shown)
    of = f"{len(paired)} comparison{'s' if len(paired) > 1 else ''} with {config.baseline}"
    if not shown:
        return (
            f"No arm can be told from {config.baseline} by its {metric.title}: none of {of} shows a difference once "
            "their number is corrected for (Holm). The means differ by no more than chance explains; they rank nothing."
        )
    several = len(config.encoders) > 1, len({row["n_labelled"] for row in paired}) > 1
    parts = []
    for row in shown:
        where = f" on {row['encoder']}" * several[0] + f" with {row['n_labelled']} labelled" * several[1]
        word = "better" if metric.better(row["difference"]) else "worse"
        parts.append(f"{row['arm']}{where} is {word} ({_difference(row, metric)})")
    listed = "; ".join(parts[:_SHOWN]) + (f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")
    end = f" The other {rest} cannot be told from it by more than chance explains." if rest else ""
    return f"Of {of}, {len(shown)} show{'s' * (len(shown) == 1)} a difference after Holm's correction: {listed}.{end}"


def _difference(row: Mapping[str, Any], metric: Metric) -> str:
    low, high = row["low"], row["high"]
    interval = (
        "" if low is None or high is None else f", 95 % interval {_signed(low, metric)} to {_signed(high, metric)}"
    )
    p = "" if row["p_holm"] is None else f", p {row['p_holm']:.2g} (Holm)"
    return f"{_signed(row['difference'], metric)} {metric.measure}{interval}{p}"


def _signed(value: float | None, metric: Metric) -> str:
    return "-" if value is None else f"{value:+.{metric.digits}f}"


def _name(row: Mapping[str, Any], several: bool) -> str:
    return f"{row['arm']} ({row['encoder']})" if several else str(row["arm"])


def _notes(
    plan: FewLabelPlan, pretraining: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> list[str]:
    config, tuning = plan.config, plan.tuning
    notes = [
        f"Every pretraining has {_in_words(config.training)} (stages of an arm share them), every fine-tuning "
        f"{_in_words(tuning.training)}; an arm without a method is not pretrained.",
    ]
    if config.training.seconds is not None or tuning.training.seconds is not None:
        side = f", {config.jobs} side by side" if config.jobs > 1 else ""
        notes.append(
            f"Budgets in seconds are wall time of training{side}: the number of steps depends on the machine and on "
            "what else it does; the steps that were done are in the tables."
        )
    notes.append("Networks, draws of labelled volumes and everything about fine-tuning are the same for all arms.")
    if found and any(one["best"] for one in found):
        notes.append(
            "The best arm is the one with the best mean on the very people that it is then compared on, so that "
            "differences to it look larger than they are."
        )
    fallen = {(row["arm"], row["encoder"]) for row in pretraining if row["collapse"]}
    for arm, encoder in sorted(fallen):
        on = f" on {encoder}" if len(config.encoders) > 1 else ""
        notes.append(f"`{arm}`{on}: pretraining showed signs of collapse (table of pretrainings).")
    for one in found:
        notes += [f"`{arm}` is not compared: not all of its cells were finished." for arm in one["incomplete"]]
    return list(dict.fromkeys(notes))


def _task_notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of the fine-tuning task, which are alike for every encoder but for what weights had seen."""
    runs: list[TaskRun] = [one["run"] for one in found]
    return list(dict.fromkeys(note for run in runs for note in grid_notes(run.config, run, intervals=_INTERVALS)))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(one) for one in value]
    return plain(value)
