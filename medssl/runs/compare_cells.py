"""One cell of a comparison: train an arm on a fold's training people, embed everyone, predict age and site."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning_fabric import Fabric
from threadpoolctl import threadpool_limits

from medssl.config.age_site import INPUT, ArmCombat
from medssl.config.compare import CompareArm, CompareConfig
from medssl.data.feature_store import FeatureReader, FeatureStore
from medssl.data.features import FeatureStatistics
from medssl.evaluation.age_site import People, predict_age_site
from medssl.evaluation.combat import ComBat
from medssl.evaluation.probes import SiteProbe, site_probe
from medssl.models import read_model
from medssl.reporting.tables import write_csv
from medssl.runs.compare_folds import Fold, rows_of
from medssl.runs.embed import embed_rows
from medssl.runs.grid import NOT_RESULT_TRAINING, Result, fingerprint
from medssl.runs.labels import prior_fingerprint, training_items
from medssl.runs.pretrain import build_method, empty_batches
from medssl.runs.volumes import Cohort, open_items, weights_statistics
from medssl.samplers import SAMPLERS
from medssl.training import BatchSource, TrainResult, build_fabric, train

Floats = npt.NDArray[np.float64]

EMBEDDINGS: Final = "embeddings.npz"
PER_PERSON: Final = "per_person.csv"
ROWS_AT_ONCE: Final = 1024
"""Rows of a feature table that are embedded in one pass."""
# Settings that change where and how fast a cell is computed, or which cells there are, but not a cell's result.
_NOT_RESULT: Final = {
    "name", "runs", "status", "kind", "arms", "jobs", "seed", "sampler", "protocol", "data", "training",
}  # fmt: skip


@dataclass(frozen=True)
class CompareCell:
    """One training and evaluation: an arm, a fold of the people and a seed."""

    arm: str
    fold: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name of the cell; a site's name may hold anything."""
        safe = re.sub(r"[^A-Za-z0-9_.+-]", "_", self.fold)
        if safe != self.fold or len(safe) > 80:
            safe = f"{safe[:60]}-{fingerprint(self.fold)[:8]}"
        return f"{self.arm}@{safe}@seed{self.seed}"


@dataclass
class CompareRunner:
    """Computes one cell; picklable, so that cells can run in processes of their own.

    Attributes:
        config: The plan.
        cohort: Every person, read once.
        folds: By name.
        keep: Cells whose embeddings are kept for maps.
    """

    config: CompareConfig
    cohort: Cohort
    folds: Mapping[str, Fold]
    keep: frozenset[CompareCell] = frozenset()
    _fabric: Fabric | None = field(default=None, repr=False)
    _floors: dict[tuple[str, int], SiteProbe] = field(default_factory=dict, repr=False)
    _contents: dict[str, str] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fabric": None, "_floors": {}, "_contents": {}}

    def __call__(self, cell: CompareCell, folder: Path) -> Result:
        """Train, embed, harmonise if asked, predict; leaves ``per_person.csv`` and what training logs."""
        if self.config.spatial_dims != 0:
            return self._compute(cell, folder)
        # Small operations gain nothing from more threads, and one gives the same result for any number of jobs.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(1):
                return self._compute(cell, folder)
        finally:
            torch.set_num_threads(threads)

    def _compute(self, cell: CompareCell, folder: Path) -> Result:
        begun = time.monotonic()
        config, arm, fold = self.config, self.config.arm(cell.arm), self.folds[cell.fold]
        cohort, notes = self.cohort, list[str]()
        if arm.combat is not None and arm.combat.on == INPUT:
            cohort, fold, notes = self._harmonised_input(arm.combat, fold)
        embedded, trained, said = self._embeddings(arm, cell, cohort, fold, folder)
        notes += said
        tables, kept = [], {}
        for layer, values in embedded.items():
            if layer == "z" and config.protocol.normalise_z:
                values = unit_rows(values)
            seen = fold
            if arm.combat is not None and arm.combat.on == layer:
                values, seen, said = self._harmonised(arm.combat, fold, values)
                notes += said
            table, kept[layer] = self._predict(seen, values, cell)
            tables.append(table.assign(layer=layer))
        write_csv(pd.concat(tables, ignore_index=True), folder / PER_PERSON)
        if cell in self.keep:
            np.savez(folder / EMBEDDINGS, **{layer: rows.astype(np.float32) for layer, rows in kept.items()})
        result: Result = {"layers": list(embedded), "notes": notes, "n_train": len(fold.train)}
        if trained is not None:
            loss = trained.last.get("loss")
            result |= {"steps": trained.steps, "train_seconds": round(trained.seconds, 3), "loss": loss}
            result["collapse"] = list(trained.collapse)
        return result | {"seconds": round(time.monotonic() - begun, 3)}

    def _embeddings(
        self, arm: CompareArm, cell: CompareCell, cohort: Cohort, fold: Fold, folder: Path
    ) -> tuple[dict[str, Floats], TrainResult | None, list[str]]:
        """By layer (n, D) of the fold's people: train, internal, external; what training left; notes."""
        config = self.config
        volumes = [*fold.train, *fold.internal, *fold.external]
        rows = rows_of(cohort.chosen, fold.train)
        everyone = rows_of(cohort.chosen, volumes)
        if arm.method is None:
            _, reader = open_items(config, cohort, everyone, statistics=fold_statistics(config, cohort, fold))
            place = dict(zip(reader.table.volume.tolist(), reader.table.row.tolist(), strict=True))
            values, _ = reader.read([place[volume] for volume in volumes])
            return {INPUT: values.numpy().astype(np.float64)}, None, []
        pretraining = config.pretraining(arm, cell.seed)
        statistics = weights_statistics(arm.weights) or fold_statistics(config, cohort, fold)
        table, reader = training_items(pretraining, cohort, rows, statistics=statistics)
        chosen = pretraining.sampler
        sampler = SAMPLERS[chosen.name](table, seed=cell.seed, **chosen.model_dump(exclude={"name"}))
        method, _ = build_method(pretraining, reader.image_shape, table)
        # A batch of rows is made in less time than it takes to hand it over from another thread.
        workers = 0 if isinstance(reader, FeatureReader) else pretraining.training.workers
        source = BatchSource(sampler, reader, pretraining.views, seed=cell.seed, workers=workers)
        if self._fabric is None:
            self._fabric = build_fabric(config.training)
        trained = train(
            method,
            source,
            pretraining.training,
            optimizer=pretraining.optimizer,
            schedule=pretraining.schedule,
            seed=cell.seed,
            run_dir=folder,
            fabric=self._fabric,
            checkpoints=False,
        )
        # Slices that no partition holds are embedded too.
        whole = config.model_copy(update={"items": config.items.model_copy(update={"partitions": None})})
        _, reader = open_items(whole, cohort, everyone, statistics=statistics)
        size = ROWS_AT_ONCE if isinstance(reader, FeatureReader) else 64
        embedded = {
            layer: embed_rows(
                method.encoder,
                method.head,
                reader,
                volumes,
                layer=layer,
                batch_size=size,
                device=self._fabric.device,
            ).astype(np.float64)
            for layer in config.layers(arm)
        }
        return embedded, trained, empty_batches(method)

    def _predict(self, fold: Fold, values: Floats, cell: CompareCell) -> tuple[pd.DataFrame, Floats]:
        """Predictions of the evaluated people, and their rows of ``values`` in the same order."""
        solver = self.config.protocol.solver
        train = self._people(fold.train, values[: len(fold.train)])
        held = values[len(fold.train) :]
        key = (cell.fold, cell.seed)
        if key not in self._floors:
            floor = site_probe(train.age[:, None], train.site, train.subject, seed=cell.seed, solver=solver)
            self._floors = {key: floor}
        table = predict_age_site(
            train,
            self._people(fold.internal, held[: len(fold.internal)]) if fold.internal else None,
            self._people(fold.external, held[len(fold.internal) :]) if fold.external else None,
            seed=cell.seed,
            solver=solver,
            age_only=self._floors[key],
        )
        return table, held

    def _people(self, volumes: Sequence[int], values: Floats) -> People:
        rows = self._columns(volumes)
        return People(values, rows["age"].to_numpy(float), rows["site"].to_numpy(), rows["group"].to_numpy())

    def _columns(self, volumes: Sequence[int]) -> pd.DataFrame:
        """The manifest's rows of these volumes, in this order."""
        return self.cohort.chosen.table.set_index("volume").loc[list(volumes)]

    def _harmonised(self, combat: ArmCombat, fold: Fold, values: Floats) -> tuple[Floats, Fold, list[str]]:
        """ComBat fitted on the training rows; people of sites that it was not fitted on are left out.

        Args:
            combat: Which covariates are kept.
            fold: Whose people ``values`` are: train, internal, external.
            values: (n, F).
        """
        known = [*fold.train, *fold.internal]
        rows, n_train = self._columns(known), len(fold.train)
        sites, kept = rows["site"].to_numpy(), rows[list(combat.covariates)].reset_index(drop=True)
        covariates = kept if combat.covariates else None
        fitted = ComBat().fit(
            values[:n_train], sites=sites[:n_train], covariates=None if covariates is None else covariates[:n_train]
        )
        result = fitted.transform(values[: len(known)], sites=sites, covariates=covariates)
        if not fold.external:
            return result, fold, []
        note = "ComBat cannot harmonise sites that it was not fitted on: no external result."
        return result, replace(fold, external=()), [note]

    def _harmonised_input(self, combat: ArmCombat, fold: Fold) -> tuple[Cohort, Fold, list[str]]:
        """The cohort with harmonised rows of features."""
        store: FeatureStore = self.cohort.store
        volumes = [*fold.train, *fold.internal]
        values = store.rows(volumes)
        features = self.config.data.features.model_copy(update={"standardise": False})
        filled = FeatureStatistics.fit(store.names, values[: len(fold.train)], features).apply(values)
        result, seen, notes = self._harmonised(combat, fold, filled.astype(np.float64))
        everyone = store.values.copy()
        place = {volume: row for row, volume in enumerate(store.volumes)}
        everyone[[place[volume] for volume in volumes]] = result
        return replace(self.cohort, store=store.replaced(everyone)), seen, notes

    def key(self, cell: CompareCell) -> str:
        """Fingerprint of everything that determines the cell's result."""
        config, arm = self.config, self.config.arm(cell.arm)
        settings = config.model_dump(mode="json", exclude=_NOT_RESULT)
        training = config.training.model_dump(mode="json", exclude=set(NOT_RESULT_TRAINING))
        own: dict[str, Any] = arm.model_dump(mode="json", exclude={"name", "weights"})
        if arm.method is None:
            settings = {}
        else:
            pretraining = config.pretraining(arm, cell.seed)
            own |= {"training": training, "sampler": pretraining.sampler.model_dump(mode="json")}
            own["prior"] = prior_fingerprint(pretraining)
        own["weights"] = None if arm.weights is None else read_model(arm.weights)["sha256"]
        if cell.fold not in self._contents:
            self._contents[cell.fold] = self._content(self.folds[cell.fold])
        return fingerprint(
            {
                "settings": settings,
                "features": config.data.features.model_dump(mode="json"),
                "prepare": config.data.prepare.model_dump(mode="json"),
                "arm": own,
                "layers": config.layers(arm),
                "probes": [config.protocol.normalise_z, config.protocol.solver],
                "cell": [cell.fold, cell.seed],
                "people": self._contents[cell.fold],
            }
        )

    def _content(self, fold: Fold) -> str:
        """What a fold's people are and what their files held, whatever folder they lie in."""
        volumes = [*fold.train, *fold.internal, *fold.external]
        columns = self._columns(volumes).drop(columns=["image", "label", "split"], errors="ignore")
        keys = [self.cohort.store.key(volume) for volume in volumes]
        return fingerprint(
            [len(fold.train), len(fold.internal), keys, columns.to_csv(index=False, lineterminator="\n")]
        )


def fold_statistics(config: CompareConfig, cohort: Cohort, fold: Fold) -> FeatureStatistics | None:
    """Mean and deviation of the features of a fold's training rows; None for images."""
    store = cohort.store
    if not isinstance(store, FeatureStore):
        return None
    return FeatureStatistics.fit(store.names, store.rows(fold.train), config.data.features)


def unit_rows(values: Floats) -> Floats:
    """Rows scaled to length 1; a row shorter than 1e-12 becomes 0, as in the losses."""
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(length > 1e-12, values / np.maximum(length, 1e-12), 0.0)
