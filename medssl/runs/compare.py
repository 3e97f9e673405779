"""Compare ways to learn an embedding: every arm on the same folds and seeds, evaluated alike, in one report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from medssl.config import dump_config
from medssl.config.compare import CompareConfig
from medssl.core.errors import ConfigError
from medssl.data.weak_labels import shortened
from medssl.reporting import build_report
from medssl.runs.compare_cells import CompareCell, CompareRunner, fold_statistics
from medssl.runs.compare_folds import Fold, open_people, plan_folds, rows_of
from medssl.runs.compare_summary import Compared, summarise_comparison
from medssl.runs.few_label import compare_few_label
from medssl.runs.few_label_pretraining import named
from medssl.runs.few_label_summary import ComparedFewLabel
from medssl.runs.folder import open_run, record_run, run_folder, tracked
from medssl.runs.grid import check_keys, run_grid
from medssl.runs.labels import check_labels, training_items
from medssl.runs.leaks import LeakCheck, check_weights
from medssl.runs.parts import Part, PartDone
from medssl.runs.pretrain import build_method, check_batch
from medssl.runs.volumes import Cohort, voxel_hashes
from medssl.samplers import SAMPLERS
from medssl.training.device import resolve_accelerator, resolve_precision

log = logging.getLogger(__name__)


def compare(
    config: CompareConfig, *, resume: bool = False, allow_changed: bool = False, part: Part | None = None
) -> Compared | ComparedFewLabel | PartDone:
    """Run every cell of a plan that is not finished, then aggregate and report.

    Args:
        config: The validated plan.
        resume: Go on in an existing run folder; finished cells are not repeated, new arms or seeds are added.
        allow_changed: Compute cells again that were begun, but not finished, with other settings.
        part: Compute only these cells, and do not aggregate: for array jobs that share the run folder.

    Raises:
        ConfigError, DataError: Before any training starts.
        Interrupted: Asked to stop; resumable.
    """
    if config.few_label:
        return compare_few_label(config, resume=resume, allow_changed=allow_changed, part=part)
    if part is not None and part.stage == "pretraining":
        raise ConfigError("the protocol age_site pretrains in its cells", fix="use --stage cells")
    return compare_age_site(config, resume=resume, allow_changed=allow_changed, part=part)


def compare_age_site(
    config: CompareConfig, *, resume: bool = False, allow_changed: bool = False, part: Part | None = None
) -> Compared | PartDone:
    """`compare` by the protocol age_site.

    A cell is small: nothing of its training is saved, and one that was interrupted is computed again as a whole.
    """
    resolve_precision(config.training, resolve_accelerator(config.training))
    cohort = open_people(config)
    folds, notes = plan_folds(config, cohort)
    if config.schedule_note:
        notes = [config.schedule_note, *notes]
        log.warning("%s", config.schedule_note)
    by_name = {fold.name: fold for fold in folds}
    checked = check_arms(config, cohort, folds)
    cells = plan_cells(config, by_name)
    cells = cells if part is None else part.of_cells(cells)
    keep = frozenset(CompareCell(arm.name, folds[0].name, config.protocol.seeds[0]) for arm in config.arms)
    runner = CompareRunner(config, cohort, by_name, keep)
    keys = {cell: runner.key(cell) for cell in cells}
    text = dump_config(config)
    run_folder(config.runs, config.name)
    folder = open_run(config.runs, config.name, kind="compare", config_text=text, manifest=cohort.chosen, resume=resume)
    check_keys(folder / "cells", keys, allow_changed=allow_changed)
    # Parts run side by side: the status is that of whoever aggregates.
    with tracked(folder, "compare") if part is None else contextlib.nullcontext({}) as info:
        record_run(folder, config_text=text, manifest=cohort.chosen)
        results = run_grid(cells, runner, folder / "cells", keys=keys, jobs=config.jobs)
        if part is not None:
            return PartDone(part, folder, len(results), {})
        checked = LeakCheck(checked.n_groups, (*notes, *checked.notes))
        done = summarise_comparison(config, cohort, by_name, results, folder, checked)
        info["cells"] = len(results)
    done.report = build_report(folder)  # after the status says done
    return done


def plan_cells(config: CompareConfig, folds: Mapping[str, Fold]) -> list[CompareCell]:
    """All cells; arms side by side, so that a stopped run can already be compared, and left-out sites last."""
    protocol = config.protocol
    cells = [
        CompareCell(arm.name, fold.name, seed)
        for left_out in (False, True)
        for seed in (protocol.seeds[:1] if left_out else protocol.seeds)
        for fold in folds.values()
        if (fold.site is not None) == left_out
        for arm in config.arms
    ]
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError("two cells would share a folder", found=twice, fix="rename the arm or the site")
    return cells


def check_arms(config: CompareConfig, cohort: Cohort, folds: list[Fold]) -> LeakCheck:
    """Refuse arms that could not be trained or evaluated on these people, before the first one is.

    Raises:
        DataError: Labels that cannot be learnt from, covariates that are missing, weights that saw evaluated people.
        ConfigError: A batch that a fold cannot fill, or a method that does not fit its people.
    """
    notes: list[str] = []
    trained = {arm.name: config.pretraining(arm, config.protocol.seeds[0]) for arm in config.arms if arm.method}
    voxels = voxel_hashes(cohort) if config.spatial_dims else None
    smallest = min(folds, key=lambda fold: len(fold.train))
    for fold in folds:
        rows = rows_of(cohort.chosen, fold.train)
        tested = rows_of(cohort.chosen, (*fold.internal, *fold.external))
        statistics = fold_statistics(config, cohort, fold)
        if statistics is not None and statistics.constant:
            notes.append(f"Constant in the training rows of a fold, so 0: {shortened(statistics.constant)}.")
        for name, pretraining in trained.items():
            with named(f"arm `{name}`, {fold.name}"):
                notes += check_labels(pretraining, rows, tested, voxels=voxels)
                table, reader = training_items(pretraining, cohort, rows, statistics=statistics)
                settings = pretraining.sampler.model_dump(exclude={"name"})
                sampler = SAMPLERS[pretraining.sampler.name](table, seed=config.seed, **settings)
                check_batch(pretraining, sampler.batch_size)
                # A queue or a number of clusters may be too large for what a fold leaves to train on. Once for each
                # arm: a 3D network takes half a second to build.
                if fold is smallest:
                    build_method(pretraining, reader.image_shape, table, untrained=True)
    evaluated = {volume for fold in folds for volume in (*fold.internal, *fold.external)}
    weights = {arm.name: arm.weights for arm in config.arms if arm.weights is not None}
    found = check_weights(
        weights,
        cohort,
        rows_of(cohort.chosen, sorted(evaluated)),
        role="evaluation",
        transductive=config.data.transductive,
    )
    return LeakCheck(found.n_groups, (*dict.fromkeys(notes), *found.notes))
