"""Fine-tune with few labels: arms x label fractions x draws x seeds, scored on people never seen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from medssl.config import ArmConfig, FinetuneConfig, dump_config
from medssl.config.compare import UPPER_BOUND
from medssl.core.errors import ConfigError, DataError
from medssl.core.files import write_json
from medssl.core.types import ModelParts
from medssl.data.splits import LabelDraw, label_draws, refuse_leak
from medssl.methods import TASKS
from medssl.models import build_decoder, build_encoder, load_weights, read_model
from medssl.reporting import build_report
from medssl.reporting.tables import write_csv
from medssl.runs.folder import open_run, record_run, run_folder, tracked
from medssl.runs.grid import NOT_RESULT_TRAINING, AnyCell, Cell, GridCell, Result, check_keys, fingerprint, run_grid
from medssl.runs.leaks import LeakCheck, check_weights
from medssl.runs.summary import Finetuned, summarise_grid
from medssl.runs.tasks import TaskRun, task_run
from medssl.runs.volumes import Cohort, in_splits, open_run_cohort, voxel_hashes, weights_statistics
from medssl.samplers import FewLabelSampler
from medssl.training import BatchSource, train
from medssl.training.device import resolve_accelerator, resolve_precision

log = logging.getLogger(__name__)

# Settings that change where a cell is computed and what is kept of it, but not its result.
_NOT_RESULT = {"name", "runs", "status", "grid", "save_predictions", "kind"}


@dataclass(frozen=True)
class CellRunner:
    """Computes one cell; picklable, so that cells can run in processes of their own."""

    config: FinetuneConfig
    cohort: Cohort
    draws: dict[tuple[int, int], LabelDraw]
    folder: Path
    allow_changed: bool = False

    def __call__(self, cell: Cell, folder: Path) -> Result:
        """Train, choose the step on validation, predict the evaluation split, score it in native geometry."""
        config, cohort, arm = self.config, self.cohort, self.arm(cell)
        run = task_run(config, cohort)
        draw = self.draws[cell.n_labelled, cell.draw]
        task, report = build_task(config, cohort, arm, cell.seed, draw)
        table, reader = run.items(draw.train, arm)
        source = BatchSource(
            FewLabelSampler(table, seed=cell.seed, batch_size=config.batch_size),
            reader,
            config.views,
            seed=cell.seed,
            workers=config.training.workers,
        )
        validation = tuple(draw.validation)

        def validate(method: Any, step: int) -> float:
            del step
            return run.validate(method, validation, arm)

        settings = config.training
        if arm.steps is not None:
            settings = settings.model_copy(update={"steps": arm.steps})
        trained = train(
            task,
            source,
            settings,
            optimizer=config.optimizer,
            schedule=config.schedule,
            seed=cell.seed,
            run_dir=folder,
            resume=(folder / "checkpoints").is_dir(),
            allow_changed=self.allow_changed,
            validate=validate if validation else None,
            fingerprint={"cell": self.key(cell)},
        )
        predictions = self.folder / "predictions" / cell.name if config.save_predictions == "all" else None
        write_csv(run.score(task, arm, predictions=predictions), folder / "per_case.csv")
        run.save(folder / "weights", task, arm)
        return {
            "steps": trained.steps,
            "seconds": trained.seconds,
            "best_step": trained.best_step,
            "best_score": trained.best_score,
            "data_wait_share": trained.data_wait_share,
            "n_validation": len(validation),
            "weights": report,
            "train": [cohort.store.case(volume) for volume in draw.train],
            "validation": [cohort.store.case(volume) for volume in draw.validation],
        }

    def arm(self, cell: Cell) -> ArmConfig:
        """The arm's settings; the upper bound is training from scratch."""
        if cell.arm == UPPER_BOUND:
            return ArmConfig(name="scratch")
        return next(arm for arm in self.config.grid.arms if arm.name == cell.arm)

    def key(self, cell: Cell) -> str:
        """Fingerprint of everything that determines the cell's result."""
        arm = self.arm(cell)
        draw = self.draws[cell.n_labelled, cell.draw]
        settings = self.config.model_dump(mode="json", exclude=_NOT_RESULT)
        settings["training"] = {k: v for k, v in settings["training"].items() if k not in NOT_RESULT_TRAINING}
        settings["data"] = {k: v for k, v in settings["data"].items() if k in ("prepare", "map")}
        run = task_run(self.config, self.cohort)
        if self.config.spatial_dims == 0:
            settings["data"]["features"] = self.config.data.features.model_dump(mode="json")
        table, evaluated = self.cohort.chosen.table, run.evaluated.table
        identity = run.identity(draw, arm)
        cases = dict(zip(table["volume"], table["case"], strict=True))

        def contents(volumes: Sequence[int]) -> list[list[str]]:
            """Names and what the files held: one that was edited between two sittings makes another cell."""
            return [[str(cases[volume]), self.cohort.store.key(volume)] for volume in volumes]

        return fingerprint(
            {
                "settings": settings,
                "arm": {
                    "steps": arm.steps,
                    "weights": None if arm.weights is None else read_model(arm.weights)["sha256"],
                },
                "cell": [cell.n_labelled, cell.draw, cell.seed],
                "train": contents(draw.train),
                "validation": contents(draw.validation),
                "evaluated": contents([int(volume) for volume in evaluated["volume"]]),
                **({} if identity is None else {"task": identity}),
            }
        )


def build_task(
    config: FinetuneConfig, cohort: Cohort, arm: ArmConfig, seed: int, draw: LabelDraw
) -> tuple[Any, dict[str, Any]]:
    """The network of one cell with its starting weights, and what became of the weights that were loaded."""
    run = task_run(config, cohort)
    table, reader = run.items(draw.train, arm)
    encoder = build_encoder(config.model.encoder, reader.image_shape, seed=seed)
    decoder = None
    if config.task.needs().decoder:
        decoder = build_decoder(encoder, blocks=config.model.decoder_blocks, seed=seed)
    report: dict[str, Any] = {}
    if arm.weights is not None:
        parts: list[tuple[str, nn.Module]] = [("encoder", encoder)]
        if decoder is not None and read_model(arm.weights)["decoder"] is not None:
            parts.append(("decoder", decoder))
        for part, module in parts:
            loaded = load_weights(module, arm.weights, part=part)
            report[part] = {name: len(getattr(loaded, name)) for name in ("matched", "adapted", "skipped", "missing")}
    settings = run.settings(arm)
    task = TASKS[settings.name].build(settings, ModelParts(encoder, decoder, reader.image_shape), seed=seed)
    task.fit_labels(table)
    return task, report


def finetune(config: FinetuneConfig, *, resume: bool = False, allow_changed: bool = False) -> Finetuned:
    """Run the whole grid, aggregate and report.

    Args:
        config: The validated configuration.
        resume: Go on in an existing run folder; finished cells are not repeated.
        allow_changed: Resume half-finished cells although their settings changed.

    Raises:
        ConfigError, DataError: Before any training starts.
        Interrupted: Asked to stop; resumable.
    """
    resolve_precision(config.training, resolve_accelerator(config.training))
    if config.schedule_note:
        log.warning("%s", config.schedule_note)
    cohort = open_finetune(config)
    leaks = check_leaks(config, cohort)
    draws = plan_draws(config, cohort)
    cells = plan_cells(config, draws)
    runner = CellRunner(config, cohort, draws, run_folder(config.runs, config.name), allow_changed)
    keys = {cell: runner.key(cell) for cell in cells}
    text = dump_config(config)
    folder = open_run(
        config.runs, config.name, kind="finetune", config_text=text, manifest=cohort.chosen, resume=resume
    )
    check_keys(folder / "cells", keys, allow_changed=allow_changed)
    with tracked(folder, "finetune") as info:
        record_run(folder, config_text=text, manifest=cohort.chosen)
        results = run_grid(cells, runner, folder / "cells", keys=keys, jobs=config.grid.jobs)
        done = finish(config, cohort, folder, results, leaks)
        info["verdict"] = done.verdict
    done.report = build_report(folder)  # after the status says done
    return done


def open_finetune(config: FinetuneConfig) -> Cohort:
    """The volumes that are drawn from and those that are scored.

    Raises:
        DataError: There is no split, or the task finds nothing to learn from or to score (see ``TaskRun.check``).
    """
    splits = (*(config.data.splits or ()), *config.evaluated) if config.data.splits else None
    weights = [arm.weights for arm in config.grid.arms if arm.weights is not None]
    statistics = [known for one in weights if (known := weights_statistics(one)) is not None]
    cohort = open_run_cohort(
        config, splits=splits, statistics=statistics[0] if statistics and config.spatial_dims == 0 else None
    )
    if not cohort.chosen.table["split"].notna().any():
        raise DataError(
            "the manifest holds no split, so there is nobody to evaluate on",
            where=str(cohort.manifest.path),
            fix="run `medssl data split` first",
        )
    for split in config.evaluated:
        in_splits(cohort.chosen, (split,))  # refuses a split that nobody has
    task_run(config, cohort).check()
    return cohort


def check_leaks(config: FinetuneConfig, cohort: Cohort) -> LeakCheck:
    """Refuse a person or image that is trained on and tested on; pretraining counts as training.

    Raises:
        DataError: A leak, unless it is one of pretraining and the configuration says ``transductive``.
    """
    evaluated = in_splits(cohort.chosen, config.evaluated)
    trained = in_splits(cohort.chosen, config.data.splits)
    role = " and ".join(config.evaluated)
    refuse_leak({"training": trained, role: evaluated}, voxels=voxel_hashes(cohort))
    weights = {arm.name: arm.weights for arm in config.grid.arms if arm.weights is not None}
    transductive = config.data.transductive
    return check_weights(weights, cohort, evaluated, role=role, transductive=transductive)


def plan_draws(config: FinetuneConfig, cohort: Cohort) -> dict[tuple[int, int], LabelDraw]:
    """Which labelled volumes train and validate, per (n_labelled, draw)."""
    grid, run = config.grid, task_run(config, cohort)
    sizes = sorted(set(grid.n_labelled))
    # Random draws are nested over all sizes, so they are made together; published ones may differ in number.
    together = [[size] for size in sizes] if grid.published_draws else [sizes]
    draws = [
        one
        for group in together
        for one in label_draws(
            run.pool,
            n_labelled=group,
            draws=max(grid.n_draws(size) for size in group),
            n_validation=grid.n_validation,
            seed=config.seed,
            published=grid.published_draws,
            column=run.column,
            by_class=run.by_class,
        )
        if one.draw <= grid.n_draws(one.n_labelled)
    ]
    planned = {(one.n_labelled, one.draw): one for one in draws}
    if grid.upper_bound:
        everything = upper_bound_draw(run, draws)
        planned[everything.n_labelled, 0] = everything
    run.check_draws(list(planned.values()))
    return planned


def upper_bound_draw(run: TaskRun, draws: Sequence[LabelDraw]) -> LabelDraw:
    """Every labelled volume but the people of the first draw's validation volumes."""
    validation = draws[0].validation
    table = run.pool.table
    held_out = set(table["group"][table["volume"].isin(validation)])
    train = table["volume"][table[run.column].notna() & ~table["group"].isin(held_out)].astype(int).tolist()
    if not train:
        raise ConfigError("grid.upper_bound: no labelled volume is left for it", fix="set grid.upper_bound: false")
    return LabelDraw(len(train), 0, train, validation)


def plan_cells(config: FinetuneConfig, draws: dict[tuple[int, int], LabelDraw]) -> list[Cell]:
    """All cells; arms side by side, so that a stopped run can already be compared."""
    grid = config.grid
    cells = [
        Cell(arm.name, n, draw, seed)
        for seed in grid.seeds
        for draw in sorted({draw for _, draw in draws if draw > 0})
        for n in sorted(set(grid.n_labelled))
        if (n, draw) in draws
        for arm in grid.arms
    ]
    cells += [Cell(UPPER_BOUND, n, draw, grid.seeds[0]) for n, draw in draws if draw == 0]
    return cells


def finish(
    config: FinetuneConfig, cohort: Cohort, folder: Path, results: dict[Cell, Result], leaks: LeakCheck
) -> Finetuned:
    """Tables, summary and overlays from the finished cells."""
    run = task_run(config, cohort)
    per_case = scores_of(folder / "cells", results, run)
    write_csv(per_case, folder / "eval" / "per_case.csv")
    write_csv(cell_table(results), folder / "eval" / "cells.csv")
    leak_check = {"groups_shared_between_splits": leaks.n_groups, "notes": list(leaks.notes)}
    done = summarise_grid(config, cohort, folder, per_case, results, leak_check)
    write_json(folder / "eval" / "summary.json", done.summary)
    run.keep_examples(per_case, folder)
    return done


def scores_of(folder: Path, cells: Iterable[GridCell], run: TaskRun) -> pd.DataFrame:
    """The rows of ``per_case.csv`` of every finished cell, with what the cell is in front."""
    tables = []
    for cell in cells:
        # Only empty cells are missing: a person or a structure may be called NA.
        rows = pd.read_csv(
            folder / cell.name / "per_case.csv",
            dtype=dict.fromkeys(run.texts, str),
            keep_default_na=False,
            na_values=[""],
        )
        tables.append(rows.assign(**asdict(cell)))
        fields = list(asdict(cell))
    per_case = pd.concat(tables, ignore_index=True)
    first = [*fields, *(name for name in run.texts if name in per_case)]
    return per_case[[*first, *[name for name in per_case if name not in first]]]


def cell_table(results: Mapping[AnyCell, Result]) -> pd.DataFrame:
    """One row per cell: budget used, step chosen, score on validation."""
    names = ("n_validation", "best_step", "best_score", "steps", "seconds", "data_wait_share")
    return pd.DataFrame(
        [
            {**asdict(cell), **{name: result[name] for name in names}, "status": "done"}
            for cell, result in results.items()
        ]
    )
