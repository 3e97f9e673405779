"""The pretrainings of a few-label comparison: every arm, encoder and seed once, each a run of `medssl pretrain`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.config import PretrainConfig
from medssl.config.compare import CompareConfig
from medssl.core.errors import MedsslError
from medssl.models import read_model
from medssl.runs.grid import NOT_RESULT_TRAINING, Result, fingerprint
from medssl.runs.labels import check_labels, prior_fingerprint
from medssl.runs.pretrain import check_leaks, open_training, pretrain, tested_rows
from medssl.runs.volumes import Cohort, in_splits, open_run_cohort, weights_statistics

log = logging.getLogger(__name__)

# Settings that say where a pretraining is kept or what it is called, but not what comes out.
_NOT_RESULT = {"name", "runs", "status", "kind", "data", "weights", "training"}


@dataclass(frozen=True)
class PretrainCell:
    """The pretraining of an arm on an encoder with a seed; one stage after the other where it has several."""

    arm: str
    encoder: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name of the cell."""
        return f"{self.arm}@{self.encoder}@seed{self.seed}"


@dataclass(frozen=True)
class PretrainRunner:
    """Computes one pretraining; picklable, so that cells can run in processes of their own.

    Attributes:
        config: The plan.
        people: Fingerprint of everyone who is trained on.
        allow_changed: Go on with one that was begun with other settings.
    """

    config: CompareConfig
    people: str
    allow_changed: bool = False

    def __call__(self, cell: PretrainCell, folder: Path) -> Result:
        """Run every stage in a folder of its own inside ``folder``; one that is done already is only looked at."""
        weights = self.config.arm(cell.arm).weights
        stages: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages(cell), start=1):
            name = f"{number}-{stage.method.name}"
            run = stage.model_copy(update={"name": name, "runs": folder, "weights": weights})
            done = pretrain(run, resume=True, allow_changed=self.allow_changed)
            weights = done.folder
            stages.append(
                {
                    "folder": name,
                    "method": stage.method.name,
                    "steps": done.summary["steps"],
                    "seconds": done.summary["seconds"],
                    "loss": done.summary["last"].get("loss"),
                    "collapse": done.summary["collapse"],
                    "notes": done.summary["label_notes"],
                }
            )
        return {"stages": stages}

    def stages(self, cell: PretrainCell) -> tuple[PretrainConfig, ...]:
        """Their configurations."""
        return self.config.pretrainings(self.config.arm(cell.arm), cell.encoder, cell.seed)

    def key(self, cell: PretrainCell) -> str:
        """Fingerprint of everything that determines the cell's result."""
        weights = self.config.arm(cell.arm).weights
        data = self.config.data
        return fingerprint(
            {
                "stages": [
                    {
                        **stage.model_dump(mode="json", exclude=_NOT_RESULT),
                        "training": stage.training.model_dump(mode="json", exclude=set(NOT_RESULT_TRAINING)),
                        "prior": prior_fingerprint(stage),
                    }
                    for stage in self.stages(cell)
                ],
                "weights": None if weights is None else read_model(weights)["sha256"],
                "data": [part.model_dump(mode="json") for part in (data.prepare, data.features)],
                "people": self.people,
            }
        )


def weights_of(folder: Path, cell: PretrainCell, result: Result) -> Path:
    """The run that the arm's fine-tunings begin from: the last stage's.

    Args:
        folder: Of the plan's pretrainings.
        cell: One of them.
        result: What it left.
    """
    return folder / cell.name / str(result["stages"][-1]["folder"])


def people_of(cohort: Cohort) -> str:
    """What the people who are trained on are, and what their files hold, whatever folder they lie in."""
    table = cohort.chosen.table
    columns = table.drop(columns=["image", "label", "split", "volume"], errors="ignore")
    keys = [cohort.store.key(int(volume)) for volume in table["volume"]]
    return fingerprint([keys, columns.to_csv(index=False, lineterminator="\n")])


def pretrain_cells(config: CompareConfig) -> list[PretrainCell]:
    """All pretrainings of a plan, arms side by side."""
    return [
        PretrainCell(arm.name, encoder, seed)
        for seed in config.protocol.seeds
        for encoder in config.encoders
        for arm in config.arms
        if arm.pretrainings
    ]


def check_pretrainings(config: CompareConfig, cells: Sequence[PretrainCell]) -> list[str]:
    """Refuse an arm that could not be pretrained, before the first one is: its labels, batch, method and first views.

    Returns:
        Notes, each with the arm's name.

    Raises:
        ConfigError, DataError: Named by the arm.
    """
    cohorts: dict[int, Cohort] = {}
    notes: list[str] = []
    for cell in cells:
        stages = config.pretrainings(config.arm(cell.arm), cell.encoder, cell.seed)
        weights = config.arm(cell.arm).weights
        for number, stage in enumerate(stages, start=1):
            axis = stage.items.slice_axis
            if axis not in cohorts:  # prepared here once, so that cells side by side find all of it
                cohorts[axis] = open_run_cohort(stage, statistics=weights_statistics(weights))
            where = f"arm `{cell.arm}`" + (f", stage {number}" if len(stages) > 1 else "")
            with named(where):
                found = check_stage(stage, cohorts[axis], first=number == 1)
            notes += [f"`{cell.arm}`: {note}" for note in found]
            notes += [f"`{cell.arm}`: {note}" for note in stage.notes]
    return list(dict.fromkeys(notes))


def check_stage(stage: PretrainConfig, cohort: Cohort, *, first: bool) -> list[str]:
    """Everything that a pretraining would refuse, and its first batch.

    Args:
        stage: Its configuration.
        cohort: Opened for it.
        first: Whether it begins from weights that are there already (or from none).

    Raises:
        ConfigError, DataError: What does not fit.
    """
    manifest = cohort.manifest
    notes = check_leaks(stage, manifest)
    notes += check_labels(stage, in_splits(manifest, stage.data.splits), tested_rows(manifest))
    opened = open_training(stage, cohort, untrained=not first)
    try:
        opened.source.batch(0, until=1)  # nothing is prepared ahead
    finally:
        opened.source.close()
    return notes


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors inside say which arm they are about."""
    try:
        yield
    except MedsslError as error:
        error.message = f"{where}: {error.message}"
        raise


def pretraining_rows(results: Mapping[PretrainCell, Result]) -> list[dict[str, Any]]:
    """One row per stage of every pretraining."""
    return [
        {"arm": cell.arm, "encoder": cell.encoder, "seed": cell.seed, "stage": number, **stage}
        for cell, result in results.items()
        for number, stage in enumerate(result["stages"], start=1)
    ]
