"""Compare ways to pretrain by what few labels then reach: one budget, one set of draws, one report for every arm."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.config import dump_config
from medssl.config.compare import CompareConfig
from medssl.core.errors import ConfigError
from medssl.reporting import build_report
from medssl.runs.few_label_cells import FewLabelCell, FewLabelPlan, FewLabelRunner, plan_cells
from medssl.runs.few_label_pretraining import (
    PretrainCell,
    PretrainRunner,
    check_pretrainings,
    people_of,
    pretrain_cells,
    weights_of,
)
from medssl.runs.few_label_summary import ComparedFewLabel, summarise_few_label
from medssl.runs.finetune import check_leaks, open_finetune, plan_draws
from medssl.runs.folder import open_run, record_run, run_folder, tracked
from medssl.runs.grid import Result, check_keys, check_stop, finished, run_grid
from medssl.runs.leaks import LeakCheck
from medssl.runs.parts import Part, PartDone
from medssl.runs.tasks import task_run
from medssl.runs.volumes import open_run_cohort
from medssl.training.device import resolve_accelerator, resolve_precision
from medssl.training.signals import StopFlag

log = logging.getLogger(__name__)


def compare_few_label(
    config: CompareConfig, *, resume: bool = False, allow_changed: bool = False, part: Part | None = None
) -> ComparedFewLabel | PartDone:
    """Pretrain and fine-tune everything that is not finished, then aggregate and report.

    Args:
        config: The validated plan (protocol few_label).
        resume: Go on in an existing run folder; nothing that is finished is repeated, new arms or draws are added.
        allow_changed: Go on with what was begun, but not finished, with other settings.
        part: Compute only these cells, and do not aggregate: for array jobs that share the run folder.

    Raises:
        ConfigError, DataError: Before any training starts; they name the arm.
        Interrupted: Asked to stop; resumable.
    """
    for training in (config.training, config.protocol.finetune.training):
        resolve_precision(training, resolve_accelerator(training))
    plan = open_plan(config)
    text, chosen = dump_config(config), plan.cohort.chosen
    root = run_folder(config.runs, config.name)
    runner = PretrainRunner(config, plan.people, allow_changed)
    keys = {cell: runner.key(cell) for cell in plan.pretrainings}
    wanted = plan.pretrainings
    if part is not None:
        wanted = part.of_cells(plan.pretrainings) if part.stage == "pretraining" else []
    check_keys(root / "pretraining", keys, allow_changed=allow_changed)
    todo = [cell for cell in wanted if finished(root / "pretraining" / cell.name, keys[cell]) is None]
    plan.notes += check_pretrainings(config, todo)
    folder = open_run(config.runs, config.name, kind="compare", config_text=text, manifest=chosen, resume=resume)
    # Parts run side by side: the status is that of whoever aggregates.
    with tracked(folder, "compare") if part is None else contextlib.nullcontext({}) as info:
        record_run(folder, config_text=text, manifest=chosen)
        failures: dict[Any, Exception] = {}
        with StopFlag() as stop:  # hears of a signal that comes with the last cell of a stage
            run_grid(wanted, runner, folder / "pretraining", keys=keys, jobs=config.jobs, failures=failures)
            check_stop(stop)
            if part is not None and part.stage == "pretraining":
                return PartDone(part, folder, len(wanted) - len(failures), _texts(failures))
            pretrained = _finished(folder / "pretraining", keys)
            weights = {cell: weights_of(folder / "pretraining", cell, result) for cell, result in pretrained.items()}
            check_features(plan, weights)
            leaks = check_weights_of(plan, weights)
            tuner = FewLabelRunner(config, plan.cohort, plan.draws, weights, folder, allow_changed)
            ready = _ready(plan.cells if part is None else part.of_cells(plan.cells), tuner, part)
            cell_keys = {cell: tuner.key(cell) for cell in ready}
            check_keys(folder / "cells", cell_keys, allow_changed=allow_changed)
            results = run_grid(ready, tuner, folder / "cells", keys=cell_keys, jobs=config.jobs, failures=failures)
        if part is not None:
            return PartDone(part, folder, len(results), _texts(failures))
        done = summarise_few_label(plan, folder, pretrained, results, _texts(failures), leaks)
        info["verdict"] = done.verdict
    done.report = build_report(folder)  # after the status says done
    return done


def open_plan(config: CompareConfig) -> FewLabelPlan:
    """Whom a plan trains and scores on, and its cells.

    Raises:
        ConfigError, DataError: What `medssl finetune` would refuse.
    """
    encoders = list(config.encoders)
    tuning = config.finetuning(encoders[0], config.protocol.seeds, {config.baseline: None})
    cohort = open_finetune(tuning)
    leaks = check_leaks(tuning, cohort)  # between the rows that are trained on, in either half, and the scored ones
    draws = plan_draws(tuning, cohort)
    notes = [f"Fine-tuning: {tuning.schedule_note}"] if tuning.schedule_note else []
    people = people_of(open_run_cohort(config)) if any(arm.pretrainings for arm in config.arms) else ""
    cells = plan_cells(config, draws)
    return FewLabelPlan(config, tuning, cohort, draws, pretrain_cells(config), cells, people, leaks, notes)


def check_features(plan: FewLabelPlan, weights: Mapping[PretrainCell, Path]) -> None:
    """Refuse pretrained weights that do not take the cohort's features; images fit by their encoder."""
    if plan.tuning.spatial_dims != 0:
        return
    for cell, path in weights.items():
        config = plan.config.finetuning(cell.encoder, (cell.seed,), {cell.arm: path})
        task_run(config, plan.cohort).check()


def check_weights_of(plan: FewLabelPlan, weights: Mapping[PretrainCell, Path]) -> LeakCheck:
    """The guard between all pretrained weights and the people who are scored; see ``finetune.check_leaks``."""
    notes, groups = list(plan.leaks.notes), plan.leaks.n_groups
    for encoder in plan.config.encoders:
        for seed in plan.config.protocol.seeds:
            arms = {cell.arm: path for cell, path in weights.items() if (cell.encoder, cell.seed) == (encoder, seed)}
            if arms:
                found = check_leaks(plan.config.finetuning(encoder, (seed,), arms), plan.cohort)
                notes += found.notes
                groups = max(groups, found.n_groups)
    return LeakCheck(groups, tuple(dict.fromkeys(notes)))


def _finished(folder: Path, keys: Mapping[PretrainCell, str]) -> dict[PretrainCell, Result]:
    found = {cell: finished(folder / cell.name, key) for cell, key in keys.items()}
    return {cell: result for cell, result in found.items() if result is not None}


def _ready(cells: Sequence[FewLabelCell], tuner: FewLabelRunner, part: Part | None) -> list[FewLabelCell]:
    """The cells whose pretraining is there."""
    ready = [cell for cell in cells if tuner.ready(cell)]
    without = sorted({cell.arm for cell in cells} - {cell.arm for cell in ready})
    if part is not None and not ready and cells:
        raise ConfigError(
            "no pretraining that this part begins from is finished",
            where=str(tuner.folder / "pretraining"),
            found=", ".join(without),
            fix="run the parts of --stage pretraining first",
        )
    if without:
        log.warning("left out, as their pretraining is not finished: %s", ", ".join(without))
    return ready


def _texts(failures: Mapping[Any, Exception]) -> dict[str, str]:
    return {cell.name: str(error) or type(error).__name__ for cell, error in failures.items()}
