"""What a fine-tuning grid asks of its task: label maps of voxels, or one label of a person."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.config import ArmConfig, FinetuneConfig
from medssl.core.errors import ConfigError, DataError, MedsslError
from medssl.core.schema import validate
from medssl.core.types import ItemTable
from medssl.data.feature_store import FeatureStore, fit_statistics
from medssl.data.features import FeatureStatistics
from medssl.data.items import ItemReader
from medssl.data.manifest import Manifest
from medssl.data.splits import LabelDraw
from medssl.methods import METHODS
from medssl.methods.targets import ClassificationConfig, RegressionConfig
from medssl.models import read_model
from medssl.reporting.metric import METRICS, Metric
from medssl.runs.predict import save_network, save_target_network
from medssl.runs.scoring import mean_dice, save_overlays, score_volumes
from medssl.runs.targets import (
    check_draws,
    check_target,
    classes_of,
    measures,
    outputs,
    reference,
    scored_rows,
    validation_score,
)
from medssl.runs.volumes import Cohort, in_splits, open_items, weights_statistics


@dataclass(frozen=True)
class TaskRun(ABC):
    """A task on an opened cohort."""

    config: FinetuneConfig
    cohort: Cohort

    @property
    @abstractmethod
    def column(self) -> str:
        """Column of the manifest that a labelled volume has."""

    @property
    def by_class(self) -> bool:
        """Whether training sets hold every value of the column."""
        return False

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """What networks are judged by."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns of ``per_case.csv`` that are text, whatever they look like."""
        return ("case", "subject", "group", "class")

    @property
    def pool(self) -> Manifest:
        """Rows that training sets are drawn from."""
        return in_splits(self.cohort.chosen, self.config.data.splits)

    @property
    def evaluated(self) -> Manifest:
        """Rows that are scored."""
        return in_splits(self.cohort.chosen, self.config.evaluated)

    def rows(self, volumes: Sequence[int]) -> Manifest:
        """Some rows of the cohort, in its order."""
        return self.cohort.chosen.select(self.cohort.chosen.table["volume"].isin(volumes).to_numpy(dtype=bool))

    @abstractmethod
    def check(self) -> None:
        """Refuse a cohort that the task cannot be trained or scored on, before anything is trained."""

    def check_draws(self, draws: Sequence[LabelDraw]) -> None:  # noqa: B027 - any draw of label maps will do
        """Refuse training sets that nothing can be learnt from."""

    def settings(self, arm: ArmConfig) -> Any:
        """The task's section for an arm, completed by what the cohort says."""
        del arm
        return self.config.task

    @abstractmethod
    def items(self, volumes: Sequence[int], arm: ArmConfig) -> tuple[ItemTable, ItemReader]:
        """The items of a training set."""

    @abstractmethod
    def validate(self, task: Any, volumes: Sequence[int], arm: ArmConfig) -> float:
        """Score of a network on validation volumes, higher is better."""

    @abstractmethod
    def score(self, task: Any, arm: ArmConfig, *, predictions: Path | None) -> pd.DataFrame:
        """Rows of ``per_case.csv``; label maps are written into the folder ``predictions``."""

    @abstractmethod
    def save(self, folder: Path, task: Any, arm: ArmConfig) -> None:
        """Write what `medssl predict` needs."""

    def keep_examples(self, per_case: pd.DataFrame, folder: Path) -> None:  # noqa: B027 - not every task has any
        """Write the pictures that the report shows into a run folder."""

    def identity(self, draw: LabelDraw, arm: ArmConfig) -> Any:
        """What decides a cell's result beside names, files and settings; None: nothing."""
        del draw, arm

    def details(self, cells: pd.DataFrame) -> dict[str, Any]:
        """Further columns of the table of an arm and size, from its rows of ``per_case.csv``."""
        del cells
        return {}

    def facts(self) -> dict[str, Any]:
        """Further keys of the summary."""
        return {}

    def notes(self) -> list[str]:
        """What a reader must know about the numbers."""
        table = self.evaluated.table
        n, groups = int(table[self.column].notna().sum()), table["group"].nunique()
        return [f"Scored on {n} volumes of {groups} groups (split `{self.config.evaluated[0]}`)."]


class SegmentationRun(TaskRun):
    """Label maps, scored by Dice in the geometry of their files."""

    column = "label"
    metric = METRICS["dice"]

    def check(self) -> None:
        """At least one volume of the evaluated split has a label map."""
        where = str(self.cohort.manifest.path)
        if not self.cohort.classes:
            raise DataError("no volume of these splits has a label", where=where)
        if not self.evaluated.table["label"].notna().any():
            raise DataError(f"no volume of the split {self.config.evaluate_on} has a label", where=where)

    def settings(self, arm: ArmConfig) -> Any:
        """With the number of classes."""
        task = super().settings(arm)
        return (
            task if task.n_classes is not None else task.model_copy(update={"n_classes": len(self.cohort.classes) + 1})
        )

    def items(self, volumes: Sequence[int], arm: ArmConfig) -> tuple[ItemTable, ItemReader]:
        """With label maps."""
        return open_items(self.config, self.cohort, self.rows(volumes), with_labels=True)

    def validate(self, task: Any, volumes: Sequence[int], arm: ArmConfig) -> float:
        """Mean Dice on the prepared grid."""
        return mean_dice(task.network, self.cohort, volumes, self.config)

    def score(self, task: Any, arm: ArmConfig, *, predictions: Path | None) -> pd.DataFrame:
        """A row per case and class."""
        return score_volumes(task.network, self.cohort, self.evaluated, self.config, predictions=predictions).rows

    def save(self, folder: Path, task: Any, arm: ArmConfig) -> None:
        """The segmentation network."""
        save_network(folder, task.network, self.config, self.cohort)

    def keep_examples(self, per_case: pd.DataFrame, folder: Path) -> None:
        """The best, median and worst case."""
        save_overlays(self.config, self.cohort, per_case, folder)

    def details(self, cells: pd.DataFrame) -> dict[str, Any]:
        """Surface distances and missed structures."""
        missed = cells["missed"].astype(bool)
        return {
            "hd95_mm": cells["hd95_mm"].mean(),
            "hd95_mm_detected": cells.loc[~missed, "hd95_mm"].mean(),
            "missed": int(missed.sum()),
        }

    def notes(self) -> list[str]:
        """The geometry that was scored in."""
        return [super().notes()[0][:-1] + ", in the geometry of their files."]


class TargetRun(TaskRun):
    """One label of a person: a number, scored by MAE, or a class, scored by balanced accuracy."""

    @property
    def column(self) -> str:
        """The target."""
        return str(self.config.task.target)

    @property
    def by_class(self) -> bool:
        """Training sets of classification hold every class."""
        return bool(self.classes)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the outputs; empty for regression."""
        return classes_of(self.config.task, self.pool)

    @property
    def metric(self) -> Metric:
        """MAE or balanced accuracy."""
        return METRICS["balanced_accuracy" if self.classes else "mae"]

    @property
    def texts(self) -> tuple[str, ...]:
        """Classes are text even where they are numbers."""
        return (*super().texts, "split", "site", *(("true", "predicted") if self.classes else ()))

    def check(self) -> None:
        """A target that can be learnt and scored; weights that take the cohort's features."""
        check_target(self.config.task, self.pool, self.evaluated)
        given = getattr(self.config.task, "n_classes", None)
        if given is not None and given != len(self.classes):
            raise ConfigError(
                f"`{self.column}` has another number of values than there are classes",
                where="task.n_classes",
                found=f"{len(self.classes)} values, n_classes {given}",
                fix="leave n_classes out",
            )
        if not isinstance(self.cohort.store, FeatureStore):
            return
        for arm in self.config.grid.arms:
            statistics = self.statistics(arm)
            assert statistics is not None
            if arm.weights is not None and weights_statistics(arm.weights) is None:
                raise DataError(
                    f"arm `{arm.name}` begins from weights that were not trained on features",
                    where=str(arm.weights),
                    fix="copy the whole weights folder of the run, or name other weights",
                )
            if statistics.names != self.cohort.store.names:
                raise DataError(
                    f"arm `{arm.name}` begins from weights of other features than another arm's",
                    where=str(arm.weights),
                    found=f"{len(statistics.names)} and {len(self.cohort.store.names)} features",
                    fix="compare weights of one table of features in a run",
                )
        fit_statistics(self.cohort.store, self._pool_volumes, self.config.data.features)  # says what is constant

    def check_draws(self, draws: Sequence[LabelDraw]) -> None:
        """Two different targets in each."""
        check_draws(self.config.task, self.pool, draws)

    def settings(self, arm: ArmConfig) -> Any:
        """With the number of classes; random weights are never frozen."""
        changes: dict[str, Any] = {"n_classes": len(self.classes)} if self.classes else {}
        if arm.weights is None:
            changes["train"] = "whole"
        return super().settings(arm).model_copy(update=changes)

    @property
    def _pool_volumes(self) -> list[int]:
        return [int(volume) for volume in self.pool.table["volume"]]

    def statistics(self, arm: ArmConfig) -> FeatureStatistics | None:
        """How features are standardised: as for the arm's weights, else over all rows of the training splits.

        No label is needed for that, so an arm from scratch knows the spread of the features as pretrained ones do.
        """
        store = self.cohort.store
        if not isinstance(store, FeatureStore):
            return None
        if arm.weights not in self._statistics:
            settings = self.config.data.features
            known = weights_statistics(arm.weights) or FeatureStatistics.fit(
                store.names, store.rows(self._pool_volumes), settings
            )
            self._statistics[arm.weights] = known
        return self._statistics[arm.weights]

    @cached_property
    def _statistics(self) -> dict[Path | None, FeatureStatistics]:
        """Those that were asked for, by weights."""
        return {}

    def items(self, volumes: Sequence[int], arm: ArmConfig) -> tuple[ItemTable, ItemReader]:
        """Without label maps."""
        return open_items(self.config, self.cohort, self.rows(volumes), statistics=self.statistics(arm))

    def validate(self, task: Any, volumes: Sequence[int], arm: ArmConfig) -> float:
        """Minus the MAE, or the mean log-probability of the true class."""
        rows = self.rows(volumes).table
        return validation_score(rows, self.column, self._outputs(task, rows, arm), self.classes)

    def _outputs(self, task: Any, rows: pd.DataFrame, arm: ArmConfig) -> Any:
        volumes = [int(volume) for volume in rows["volume"]]
        size = self.config.inference.batch_size
        return outputs(
            task, self.cohort.store, volumes, self.config.items, statistics=self.statistics(arm), batch_size=size
        )

    def score(self, task: Any, arm: ArmConfig, *, predictions: Path | None) -> pd.DataFrame:
        """A row per volume; the predictions are in it."""
        del predictions
        parts = [in_splits(self.cohort.chosen, (split,)).table for split in self.config.evaluated]
        scored = [scored_rows(rows, self.column, self._outputs(task, rows, arm), self.classes) for rows in parts]
        return pd.concat(scored, ignore_index=True)

    def save(self, folder: Path, task: Any, arm: ArmConfig) -> None:
        """Encoder and output, how items are made, and what classes are called."""
        save_target_network(folder, task, self.config, self.settings(arm), self.classes, self.statistics(arm))

    def identity(self, draw: LabelDraw, arm: ArmConfig) -> Any:
        """The targets, and how features are standardised."""
        volumes = (draw.train, draw.validation, [int(volume) for volume in self.evaluated.table["volume"]])
        targets = [self.rows(some).table[self.column].tolist() for some in volumes]
        known = self.statistics(arm)
        features = None if known is None else {k: np.asarray(v).tolist() for k, v in asdict(known).items()}
        return {"targets": targets, "features": features}

    def details(self, cells: pd.DataFrame) -> dict[str, Any]:
        """Every metric on each split, averaged over fine-tunings."""
        splits = {}
        for split in self.config.evaluated:
            runs = cells[cells["split"] == split].groupby(["draw", "seed"])
            found = pd.DataFrame([measures(rows, self.classes) for _, rows in runs])
            draws = found.assign(draw=[draw for (draw, _), _ in runs]).groupby("draw").mean()
            splits[split] = {name: {"mean": draws[name].mean(), "sd": draws[name].std()} for name in found}
        return {"splits": splits}

    def facts(self) -> dict[str, Any]:
        """What is predicted, and what would be scored without looking."""
        task, first = self.config.task, in_splits(self.cohort.chosen, self.config.evaluated[:1])
        return {
            "target": task.target,
            "unit": "years" if task.target == "age" and not self.classes else "",
            "higher_is_better": self.metric.higher,
            "splits": list(self.config.evaluated),
            "classes": list(self.classes),
            "reference": reference(task, self.pool, first),
        }

    def notes(self) -> list[str]:
        """Who is scored, what is frozen, and which weights have seen the target."""
        notes = []
        for split in self.config.evaluated:
            table = in_splits(self.cohort.chosen, (split,)).table
            notes.append(f"Scored on {len(table)} volumes of {table['group'].nunique()} groups (split `{split}`).")
        if len(self.config.evaluated) > 1:
            notes.append(f"`{self.config.evaluated[0]}` leads: scores without the name of a split are its.")
        if self.config.task.train != "whole":
            scratch = [arm.name for arm in self.config.grid.arms if arm.weights is None]
            trained = self.config.task.train
            shown = "the linear output alone" if trained == "head" else f"the last {trained.last_blocks} blocks"
            notes.append(
                f"Trained from weights: {shown}, on a frozen encoder."
                + (f" From scratch everything is trained: {', '.join(scratch)}." if scratch else "")
            )
        for arm in self.config.grid.arms:
            n = labels_seen(arm.weights, self.column)
            if n is not None:
                notes.append(
                    f"`{arm.name}` was pretrained with the column `{self.column}` of {n} images or rows: the number of "
                    "labels counts those of fine-tuning alone, not those of its pretraining. Its validation people may "
                    "be among them, so that its best validation score flatters it."
                )
        unlabelled = int(self.pool.table[self.column].isna().sum())
        if unlabelled:
            notes.append(f"{unlabelled} volumes of the training splits lack `{self.column}` and were never drawn.")
        return notes


def labels_seen(weights: Path | None, column: str) -> int | None:
    """How many images some weights were pretrained on, if that used a column of the manifest as a label; else None."""
    if weights is None:
        return None
    info: Mapping[str, Any] = read_model(weights)["info"]
    settings = info.get("method")
    entry = METHODS.get(settings.get("name", "")) if isinstance(settings, dict) else None
    if entry is None:
        return None
    try:
        method: Any = validate(entry.config, settings, source=str(weights))
    except MedsslError:  # settings of another version: what they used is not known
        return None
    return len(info.get("pretrained_on", ())) if column in method.needs().labels else None


def task_run(config: FinetuneConfig, cohort: Cohort) -> TaskRun:
    """What the configuration's task does with a cohort."""
    if isinstance(config.task, (RegressionConfig, ClassificationConfig)):
        return TargetRun(config, cohort)
    return SegmentationRun(config, cohort)
