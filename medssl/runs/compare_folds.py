"""Who is trained on and who is evaluated in each cell of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from medssl.config.compare import CompareConfig
from medssl.core.errors import DataError
from medssl.data.manifest import Manifest
from medssl.data.splits import TEST_SPLITS, kfold, leave_site_out, refuse_leak, split_table
from medssl.data.weak_labels import named_rows, shortened
from medssl.runs.volumes import Cohort, in_splits, open_run_cohort, voxel_hashes

VALIDATION_SHARE: Final = 0.2
"""Of the training people: evaluated instead of test people, or beside a site that was left out."""
WITHOUT: Final = "without-"
"""Begins the name of a fold that leaves a site out."""


@dataclass(frozen=True)
class Fold:
    """Volume numbers of one division of the people.

    Attributes:
        name: ``fold0``, ``fold1``, ...; ``split`` for the manifest's own; ``without-SITE``.
        train: Trained on, and what the probes are fitted on.
        internal: Evaluated people of sites that ``train`` holds.
        external: Evaluated people of other sites.
    """

    name: str
    train: tuple[int, ...]
    internal: tuple[int, ...]
    external: tuple[int, ...] = ()

    @property
    def site(self) -> str | None:
        """The site that was left out; None for other folds."""
        return self.name.removeprefix(WITHOUT) if self.name.startswith(WITHOUT) else None


def open_people(config: CompareConfig) -> Cohort:
    """Open every row that the protocol may use, with age and site known.

    Raises:
        DataError: Rows without age or site, or a manifest without the splits that are asked for.
    """
    splits = config.data.splits
    if config.protocol.folds is None:
        assert splits is not None  # refused by the configuration
        splits = (*splits, "validation") if config.protocol.evaluate_on == "validation" else (*splits, *TEST_SPLITS)
    cohort = open_run_cohort(config, splits=splits)
    table = cohort.chosen.table
    for column in ("age", "site"):
        gap = table[column].isna().to_numpy(dtype=bool)
        if gap.any():
            raise DataError(
                f"`{column}` is missing for {int(gap.sum())} of {len(table)} rows, but the probes predict it",
                where=f"{cohort.manifest.path}, {named_rows(cohort.chosen, gap)}",
                fix="fill the cells, or leave these people out (data.exclude)",
            )
    if table["age"].nunique() < 2:
        raise DataError("predicting the age needs people of several ages", where=str(cohort.manifest.path))
    if table["site"].nunique() < 2:
        raise DataError("predicting the site needs two of them", where=str(cohort.manifest.path))
    return cohort


def plan_folds(config: CompareConfig, cohort: Cohort) -> tuple[list[Fold], list[str]]:
    """Every fold of the protocol, each checked to share no person and no image between its parts.

    Determined by the configuration's ``seed`` and the people, whatever the order of the rows.

    Returns:
        The folds, and what is worth knowing about them, one line each.

    Raises:
        DataError: A site with too few people, a split that is not there, or people on both sides.
    """
    protocol, people, notes = config.protocol, cohort.chosen, []
    if protocol.folds is None:
        fold, notes = _from_splits(config, people)
        folds = [fold]
    else:
        _check_sites(people, protocol.folds, "folds")
        validating = protocol.evaluate_on == "validation"
        tables = kfold(
            people,
            n_folds=protocol.folds,
            validation=VALIDATION_SHARE if validating else 0.0,
            seed=config.seed,
            stratify="site",
        )
        evaluated = "validation" if validating else "test"
        folds = [_fold(f"fold{i}", table, evaluated) for i, table in enumerate(tables)]
        if validating:
            notes.append("Validation people of one fold are test people of another: in the end everyone was looked at.")
    if protocol.leave_site_out:
        _check_sites(people, 2, "leave_site_out")
        pool = people if protocol.folds is not None else in_splits(people, config.data.splits)
        left = leave_site_out(pool, validation=VALIDATION_SHARE, seed=config.seed, stratify="site")
        folds += [_fold(f"{WITHOUT}{site}", table, "validation", "test") for site, table in left.items()]
    hashes = voxel_hashes(cohort)
    for fold in folds:
        _check_fold(fold, people, hashes)
    return folds, notes


def _fold(name: str, table: pd.DataFrame, internal: str, external: str | None = None) -> Fold:
    def rows(split: str | None) -> tuple[int, ...]:
        return () if split is None else tuple(int(volume) for volume in table["volume"][table["split"] == split])

    return Fold(name, rows("train"), rows(internal), rows(external))


def _from_splits(config: CompareConfig, people: Manifest) -> tuple[Fold, list[str]]:
    """The manifest's own division; the training people's sites say who is internal and who external."""
    table, validating = people.table, config.protocol.evaluate_on == "validation"
    if not table["split"].notna().any():
        raise DataError(
            "protocol.folds: null takes the manifest's splits, but it holds none",
            where=str(people.path),
            fix="run `medssl data split`, or set protocol.folds: 5",
        )
    trained = table["split"].isin(config.data.splits).to_numpy(dtype=bool)
    evaluated = ~trained
    if validating and not evaluated.any():
        pool = people.select(trained)
        parts = split_table(pool, validation=VALIDATION_SHARE, seed=config.seed, stratify="site")
        return _fold("split", parts, "validation"), []
    if not trained.any() or not evaluated.any():
        wanted = "validation" if validating else ", ".join(TEST_SPLITS)
        raise DataError(
            "the manifest's splits leave nobody to train on" if not trained.any() else "nobody is evaluated",
            where=str(people.path),
            found=f"splits: {', '.join(sorted(table['split'].dropna().unique()))}",
            fix=f"name the rows to train on in data.splits, and give others the split {wanted}",
        )
    seen = table["site"].isin(set(table["site"][trained])).to_numpy(dtype=bool)
    internal, external = evaluated & seen, evaluated & ~seen
    notes = []
    for part, name, other in ((internal, "external_test", "internal"), (external, "internal_test", "external")):
        moved = int((part & (table["split"] == name).to_numpy(dtype=bool)).sum())
        if moved:
            why = "shares" if other == "internal" else "does not share"
            notes.append(f"{moved} rows of the split {name} count as {other}: their site {why} training people.")
    volumes = table["volume"].to_numpy()
    return Fold("split", *(tuple(int(v) for v in volumes[part]) for part in (trained, internal, external))), notes


def _check_sites(people: Manifest, least: int, what: str) -> None:
    """A site with fewer people than folds would be missing from some of them."""
    counts = people.table.groupby("site")["group"].nunique()
    few = counts[counts < least]
    if len(few):
        raise DataError(
            f"protocol.{what}: every site needs at least {least} people",
            where=str(people.path),
            found=shortened([f"{site} has {n}" for site, n in few.items()]),
            fix=("ask for fewer folds, or leave" if what == "folds" else "leave")
            + " these sites' people out (data.exclude)",
        )


def _check_fold(fold: Fold, people: Manifest, hashes: dict[int, str]) -> None:
    """Nobody who is evaluated is trained on: by group, subject, file and content."""
    sets = {"training": fold.train, "evaluation": (*fold.internal, *fold.external)}
    refuse_leak({name: rows_of(people, volumes) for name, volumes in sets.items()}, voxels=hashes)
    sites = [set(rows_of(people, volumes).table["site"]) for volumes in (fold.train, fold.internal, fold.external)]
    if sites[1] - sites[0] or sites[2] & sites[0]:
        raise DataError(
            f"{fold.name}: sites do not divide people into seen and unseen",
            where=str(people.path),
            found=shortened(sorted(sites[1] - sites[0]) or sorted(sites[2] & sites[0])),
            fix="a person scanned at several sites cannot be divided by site: leave them out (data.exclude)",
        )


def rows_of(people: Manifest, volumes: Sequence[int]) -> Manifest:
    """The rows of some volumes, in the manifest's order."""
    return people.select(np.isin(people.table["volume"].to_numpy(), np.asarray(volumes, dtype=np.int64)))
