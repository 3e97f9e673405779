"""Splits: always by group, never by volume or slice, and a pure function of the seed.

Yagis et al. 2021 (Scientific Reports 11, 22544) measured what splitting by slice costs: 29 to 55 points of accuracy
that vanish on new people. Few-label draws and the leak guard are in `label_draws` and `leaks` and offered here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import pandas as pd

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.core.seeding import SPLIT, numpy_rng, permutation
from medssl.data.label_draws import LabelDraw, label_draws, listed, published_sets, with_published_splits
from medssl.data.leaks import Leak, refuse_leak
from medssl.data.manifest import Manifest

__all__ = [
    "TEST_SPLITS",
    "LabelDraw",
    "Leak",
    "kfold",
    "label_draws",
    "leave_site_out",
    "published_sets",
    "refuse_leak",
    "split_table",
    "with_published_splits",
]

AGE_BINS: Final = 5
TEST_SPLITS: Final = ("test", "internal_test", "external_test")
"""Splits that are only evaluated on: nobody in them may be trained on. OpenBHB has two, of seen and unseen sites."""


def split_table(
    manifest: Manifest,
    *,
    test: float = 0.0,
    validation: float = 0.0,
    seed: int = 0,
    stratify: Sequence[str] | str = (),
) -> pd.DataFrame:
    """The manifest's table with ``split`` set to train, validation or test, whole groups at a time.

    Args:
        manifest: The cohort.
        test, validation: A share of the groups (below 1) or a number of groups. A share above 0 gives at least one.
        seed: Not negative. Row order does not matter.
        stratify: Columns whose values the parts should share in proportion. A column of more than 10 different
            numbers (age) is cut into 5 equally filled bins; a group counts with its mean or most frequent value.

    Raises:
        ConfigError: Neither a share nor a whole number, or an unknown column.
        DataError: Nothing would be left for training.
    """
    groups = _ordered_groups(manifest.table, stratify, seed)
    n_test = _count("test", test, len(groups))
    n_validation = _count("validation", validation, len(groups))
    if n_test + n_validation >= len(groups):
        raise DataError(
            "the split leaves no group for training",
            where=str(manifest.path),
            found=f"{len(groups)} groups, {n_test} for test, {n_validation} for validation",
            fix="ask for fewer, or check the group column",
        )
    held_out, rest = _spread(groups, n_test, seed, 1)
    checked, _ = _spread(rest, n_validation, seed, 2)
    return _labelled_table(manifest.table, {"test": held_out, "validation": checked})


def kfold(
    manifest: Manifest,
    *,
    n_folds: int,
    validation: float = 0.0,
    seed: int = 0,
    stratify: Sequence[str] | str = (),
) -> list[pd.DataFrame]:
    """One table per fold, like `split_table`; every group is in test exactly once, fold sizes differ by at most one.

    Args:
        manifest: The cohort.
        n_folds: At least 2.
        validation: Share or number of the groups outside the test fold.
        seed: As in `split_table`.
        stratify: As in `split_table`; every stratum is dealt out evenly too.

    Raises:
        ConfigError: Fewer than two folds, a bad share or column.
        DataError: Fewer groups than folds, or nothing left for training.
    """
    groups = _ordered_groups(manifest.table, stratify, seed)
    if n_folds < 2:
        raise ConfigError("cross-validation needs at least two folds", found=f"n_folds: {n_folds}")
    if len(groups) < n_folds:
        raise DataError("there are fewer groups than folds", found=f"{len(groups)} groups, {n_folds} folds")
    tables = []
    for fold in range(n_folds):
        held_out = groups[fold::n_folds]
        rest = [group for i, group in enumerate(groups) if i % n_folds != fold]
        tables.append(_with_validation(manifest, held_out, rest, validation, seed, fold))
    return tables


def leave_site_out(
    manifest: Manifest, *, validation: float = 0.0, seed: int = 0, stratify: Sequence[str] | str = ()
) -> dict[str, pd.DataFrame]:
    """One table per site: its volumes are the test set, all other sites train.

    ``validation``, ``seed`` and ``stratify`` are those of `kfold`.

    Other volumes of a person who was scanned at the left-out site too are left out of that table's training set:
    ``split`` is empty there.

    Raises:
        DataError: A row without a site, fewer than two sites, or nothing left for training.
    """
    table = manifest.table
    unknown = table["volume"][table["site"].isna()].tolist()
    if unknown:
        raise DataError(
            "leave-site-out needs the site of every volume",
            where=f"{manifest.path}, line {listed(manifest.line(volume) for volume in unknown)}",
            fix="fill the site column, or remove these rows",
        )
    sites = sorted(table["site"].unique())
    if len(sites) < 2:
        raise DataError("leave-site-out needs at least two sites", where=str(manifest.path), found=listed(sites))
    ordered = _ordered_groups(table, stratify, seed)
    tables = {}
    for number, site in enumerate(sites):
        here = table["site"] == site
        held_out = set(table["group"][here])
        rest = [group for group in ordered if group not in held_out]
        result = _with_validation(manifest, sorted(held_out), rest, validation, seed, number)
        parts = [part if at or part != "test" else None for part, at in zip(result["split"], here)]
        tables[site] = result.assign(split=pd.Series(parts, dtype=object, index=result.index))
    return tables


def _count(name: str, value: float, n_groups: int) -> int:
    """Number of groups that a share (below 1) or a count (whole, also written 2.0) asks for."""
    if isinstance(value, bool) or not value >= 0 or (value >= 1 and value != int(value)):
        raise ConfigError(f"{name} is a share of the groups below 1, or a whole number of groups", found=repr(value))
    if value >= 1 or value == 0:
        return int(value)
    return max(1, round(value * n_groups))


def _ordered_groups(table: pd.DataFrame, stratify: Sequence[str] | str, seed: int) -> list[str]:
    """All groups in random order, equal strata side by side: taking every k-th is then a stratified choice."""
    columns = [stratify] if isinstance(stratify, str) else list(stratify)
    if seed < 0:
        raise ConfigError("a seed cannot be negative", found=str(seed))
    for name in columns:
        if name not in table.columns:
            raise ConfigError(f"there is no column `{name}` to stratify by. {nearest(name, table.columns)}")
    groups = sorted(table["group"].unique())
    order = permutation(len(groups), seed, SPLIT, 0)
    shuffled = [groups[i] for i in order]
    if not columns:
        return shuffled
    strata = [_strata(table, name) for name in columns]
    key = {group: tuple(stratum[group] for stratum in strata) for group in groups}
    first_seen = {one: i for i, one in enumerate(dict.fromkeys(key[group] for group in shuffled))}
    return sorted(shuffled, key=lambda group: first_seen[key[group]])


def _strata(table: pd.DataFrame, name: str) -> dict[str, str]:
    values = table[name]
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 2 * AGE_BINS:
        mean = values.astype(float).groupby(table["group"]).mean()
        return pd.qcut(mean, AGE_BINS, labels=False, duplicates="drop").astype(str).to_dict()
    text = values.astype(object).where(values.notna(), "").astype(str)
    counts = text.groupby([table["group"], text]).size().rename_axis(["group", "value"]).reset_index(name="n")
    ranked = counts.sort_values(["group", "n", "value"], ascending=[True, False, True]).drop_duplicates("group")
    return dict(zip(ranked["group"], ranked["value"]))


def _spread(groups: Sequence[str], n: int, seed: int, use: int) -> tuple[list[str], list[str]]:
    """``n`` of the groups, evenly spread over their order from a random start, and the others."""
    if n == 0:
        return [], list(groups)
    start = numpy_rng(seed, SPLIT, 1, use).random()
    chosen = {int((k + start) * len(groups) / n) for k in range(n)}
    return [groups[i] for i in sorted(chosen)], [group for i, group in enumerate(groups) if i not in chosen]


def _with_validation(
    manifest: Manifest, held_out: Sequence[str], rest: Sequence[str], validation: float, seed: int, use: int
) -> pd.DataFrame:
    n_validation = _count("validation", validation, len(rest))
    if n_validation >= len(rest):
        raise DataError(
            "the split leaves no group for training",
            where=str(manifest.path),
            found=f"{len(rest)} groups outside the test set, {n_validation} for validation",
        )
    checked, _ = _spread(rest, n_validation, seed, 4 + use)
    return _labelled_table(manifest.table, {"test": held_out, "validation": checked})


def _labelled_table(table: pd.DataFrame, sets: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    part = {group: name for name, groups in sets.items() for group in groups}
    names = [part.get(group, "train") for group in table["group"]]
    return table.assign(split=pd.Series(names, dtype=object, index=table.index))
