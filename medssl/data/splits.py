"""Splits and few-label draws: always by group, never by volume or slice, and a pure function of the seed.

Yagis et al. 2021 (Scientific Reports 11, 22544) measured what splitting by slice costs: 29 to 55 points of accuracy
that vanish on new people.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.core.seeding import SPLIT, numpy_rng, permutation
from medssl.data.manifest import Manifest

AGE_BINS: Final = 5
PUBLISHED_ROLES: Final = ("labelled", "validation", "test", "unlabelled", "upper_bound")


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


def leave_site_out(manifest: Manifest, *, validation: float = 0.0, seed: int = 0) -> dict[str, pd.DataFrame]:
    """One table per site: its volumes are the test set, all other sites train.

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
            where=f"{manifest.path}, line {_listed(manifest.line(volume) for volume in unknown)}",
            fix="fill the site column, or remove these rows",
        )
    sites = sorted(table["site"].unique())
    if len(sites) < 2:
        raise DataError("leave-site-out needs at least two sites", where=str(manifest.path), found=_listed(sites))
    tables = {}
    for number, site in enumerate(sites):
        here = table["site"] == site
        held_out = set(table["group"][here])
        rest = [group for group in _ordered_groups(table, (), seed) if group not in held_out]
        result = _with_validation(manifest, sorted(held_out), rest, validation, seed, number)
        parts = [part if at or part != "test" else None for part, at in zip(result["split"], here)]
        tables[site] = result.assign(split=pd.Series(parts, dtype=object, index=result.index))
    return tables


@dataclass(frozen=True)
class LabelDraw:
    """One few-label experiment: which volumes may be learnt from, which choose the best weights.

    Attributes:
        n_labelled: Number of labelled groups (a published list: of labelled subjects).
        draw: Number of the draw, from 1.
        train: Volumes whose labels are used, one per group (a published list: all labelled volumes of its subjects).
        validation: Volumes of other groups, the same for every ``n_labelled`` of a draw.
    """

    n_labelled: int
    draw: int
    train: list[int]
    validation: list[int]


def label_draws(
    manifest: Manifest,
    *,
    n_labelled: Sequence[int],
    draws: int,
    n_validation: int = 2,
    seed: int = 0,
    published: Path | str | None = None,
) -> list[LabelDraw]:
    """Few-label training sets: nested (the volume of 1 is in 2 is in 8), from distinct groups, several draws.

    Args:
        manifest: Volumes to draw from: leave the test set out. Volumes without a label map are passed over.
        n_labelled: Sizes, each at least 1.
        draws: Draws per size; draw d does not depend on how many there are.
        n_validation: Labelled validation volumes, from groups that train in no size of this draw.
        seed: Not negative; (seed, draw) alone decide.
        published: CSV of published lists (columns role, n_labelled, draw, subjects), used instead of drawing: the
            first ``draws`` of each size. Its lists are not nested, and must hold ``n_validation`` subjects.

    Raises:
        ConfigError: A size or number below what makes sense, or that the published list does not have.
        DataError: Not enough labelled groups, or ids that are not in the manifest.
    """
    sizes = sorted(set(n_labelled))
    if not sizes or sizes[0] < 1 or draws < 1 or n_validation < 0:
        raise ConfigError(
            "few-label draws need sizes and a number of draws of at least 1",
            found=f"n_labelled: {list(n_labelled)}, draws: {draws}, n_validation: {n_validation}",
        )
    if published is not None:
        return _published_draws(manifest, Path(published), sizes, draws, n_validation)
    labelled = manifest.table[manifest.table["label"].notna()]
    by_group = {group: sorted(rows.tolist()) for group, rows in labelled.groupby("group")["volume"]}
    if len(by_group) < sizes[-1] + n_validation:
        raise DataError(
            "more labelled volumes are asked for than there are groups with labels",
            where=str(manifest.path),
            found=f"{len(by_group)} groups with labels; {sizes[-1]} for training and {n_validation} for validation",
            fix="ask for fewer labels or validation volumes, or add labelled volumes",
        )
    result = []
    for draw in range(1, draws + 1):
        rng = numpy_rng(seed, SPLIT, 3, draw)
        groups = rng.permutation(np.array(sorted(by_group), dtype=object)).tolist()
        chosen = [by_group[group][int(rng.integers(len(by_group[group])))] for group in groups]
        validation = chosen[len(chosen) - n_validation :]
        result += [LabelDraw(size, draw, chosen[:size], validation) for size in sizes]
    return sorted(result, key=lambda one: (one.n_labelled, one.draw))


def published_sets(manifest: Manifest, path: Path | str) -> dict[str, list[int]]:
    """Volumes of the published test, unlabelled and upper-bound lists, by role.

    Args:
        manifest: The cohort; subjects are matched by id, or by number where the ids are written differently.
        path: CSV with the columns role, n_labelled, draw and subjects.

    Raises:
        DataError: The list cannot be read, or names subjects that are not in the manifest.
    """
    match = _matcher(manifest, Path(path))
    return {
        row.role: match(row.subjects, labelled_only=False)
        for row in _read_published(Path(path))
        if row.role in ("test", "unlabelled", "upper_bound")
    }


@dataclass(frozen=True)
class _PublishedRow:
    role: str
    n_labelled: int | None
    draw: int | None
    subjects: tuple[str, ...]


def _read_published(path: Path) -> list[_PublishedRow]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"role", "n_labelled", "draw", "subjects"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"the published list has no column {_listed(sorted(missing))}", where=str(path))
            rows = []
            for row in reader:
                if row["role"] not in PUBLISHED_ROLES:
                    raise DataError(
                        f"unknown role `{row['role']}`. {nearest(str(row['role']), PUBLISHED_ROLES)}",
                        where=f"{path}, line {reader.line_num}",
                    )
                numbers = [int(row[name]) if row[name] else None for name in ("n_labelled", "draw")]
                rows.append(_PublishedRow(row["role"], *numbers, tuple((row["subjects"] or "").split())))
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError("the published list cannot be read", where=str(path), found=str(error)) from error
    return rows


def _published_draws(
    manifest: Manifest, path: Path, sizes: Sequence[int], draws: int, n_validation: int
) -> list[LabelDraw]:
    rows = [row for row in _read_published(path) if row.role in ("labelled", "validation")]
    lists = {(row.role, row.n_labelled, row.draw): row.subjects for row in rows}
    match = _matcher(manifest, path)
    result = []
    for size in sizes:
        available = sorted(draw for role, n, draw in lists if role == "labelled" and n == size and draw is not None)
        if draws > len(available):
            known = ", ".join(str(n) for n in sorted({n for role, n, _ in lists if role == "labelled" and n}))
            raise ConfigError(
                f"the published list has {len(available)} draws of {size} labelled, {draws} are asked for",
                where=str(path),
                found=f"published sizes: {known}",
                fix="ask for fewer draws or another size",
            )
        for draw in available[:draws]:
            validation = lists.get(("validation", size, draw), ())
            if len(validation) != n_validation:
                raise ConfigError(
                    f"the published validation set of {size} labelled, draw {draw} holds {len(validation)} subjects",
                    where=str(path),
                    found=f"n_validation: {n_validation}",
                    fix=f"set n_validation: {len(validation)}",
                )
            train = match(lists["labelled", size, draw], labelled_only=True)
            result.append(LabelDraw(size, draw, train, match(validation, labelled_only=True)))
    return result


def _matcher(manifest: Manifest, path: Path):  # noqa: ANN202 - a closure: (subjects, labelled_only) -> volumes
    """Finds the volumes of published subject ids: by the id itself, else by the number it ends in."""
    subjects = set(manifest.table["subject"])
    by_number: dict[int, list[str]] = {}
    for subject in sorted(subjects):
        number = re.search(r"(\d+)$", subject)
        if number:
            by_number.setdefault(int(number.group(1)), []).append(subject)

    def find(name: str) -> str | None:
        number = re.search(r"(\d+)$", name)
        if name in subjects or not number:
            return name if name in subjects else None
        same = by_number.get(int(number.group(1)), [])
        return same[0] if len(same) == 1 else None

    def match(names: Sequence[str], *, labelled_only: bool) -> list[int]:
        found = {name: find(name) for name in names}
        missing = [name for name, subject in found.items() if subject is None]
        table = manifest.table[manifest.table["label"].notna()] if labelled_only else manifest.table
        missing += [name for name, subject in found.items() if subject and subject not in set(table["subject"])]
        if missing:
            raise DataError(
                f"published subjects are not in the manifest{' with a label' if labelled_only else ''}: "
                f"{_listed(missing, 20)}",
                where=f"{path} against {manifest.path}",
                fix="check that the whole cohort was scanned, or draw your own labels",
            )
        return [volume for name in names for volume in table["volume"][table["subject"] == found[name]].tolist()]

    return match


@dataclass(frozen=True)
class Leak:
    """One thing that two sets share. ``kind`` is group, subject, file or voxels; ``what`` names it."""

    kind: Literal["group", "subject", "file", "voxels"]
    what: str
    sets: tuple[str, str]

    def __str__(self) -> str:
        noun = "identical image" if self.kind == "voxels" else self.kind
        return f"{noun} {self.what} is in {self.sets[0]} and in {self.sets[1]}"


def refuse_leak(
    sets: Mapping[str, Manifest],
    *,
    transductive: bool = False,
    hashes: Mapping[Path, str] | None = None,
) -> list[Leak]:
    """Refuse sets of one run that share a group, a subject or an image.

    Equal ids count as one person unless the meta files name two different cohorts.

    Args:
        sets: Manifests by the name of their role, each to be disjoint from every other.
        transductive: Let leaks pass and return them, for the report. Meant for pretraining images (without labels)
            that are tested on later: check labelled sets against each other in a call without it.
        hashes: Content hash by image path (as ``Manifest.image_paths`` gives it), for finding copies under other
            names. Paths without one are compared by path alone.

    Returns:
        The leaks that were let pass; empty when there are none.

    Raises:
        DataError: A set is empty (whatever ``transductive`` says), or sets leak: every leak is named.
    """
    for name, manifest in sets.items():
        if len(manifest) == 0:
            raise DataError(
                f"the {name} set is empty",
                where=str(manifest.path),
                fix="check the split column, the fractions and the selection",
            )
    keys = {name: _identities(manifest, hashes or {}) for name, manifest in sets.items()}
    leaks = []
    for one, other in combinations(sets, 2):
        cohorts = {sets[one].meta.cohort, sets[other].meta.cohort}
        same_people = "" in cohorts or len(cohorts) == 1
        for kind in ("group", "subject", "file", "voxels"):
            if kind in ("group", "subject") and not same_people:
                continue
            shared = sorted(set(keys[one][kind]) & set(keys[other][kind]))
            leaks += [Leak(kind, keys[one][kind][key], (one, other)) for key in shared]
    if leaks and not transductive:
        lines = [str(leak) for leak in leaks[:50]]
        lines += [f"... and {len(leaks) - 50} more"] if len(leaks) > 50 else []
        raise DataError(
            "the sets of this run leak into each other",
            where=", ".join(dict.fromkeys(str(manifest.path) for manifest in sets.values())),
            found="\n         ".join(lines),
            fix="split by group (medssl data split), or set transductive: true if that is what you study",
        )
    return leaks


def _identities(manifest: Manifest, hashes: Mapping[Path, str]) -> dict[str, dict[str, str]]:
    """What identifies the content of a set, by kind: key to compare -> name to show."""
    table = manifest.table
    found: dict[str, dict[str, str]] = {
        "group": {str(group): str(group) for group in table["group"].unique()},
        "subject": {},
        "file": {},
        "voxels": {},
    }
    whole = found["group"]
    found["subject"] = {subject: subject for subject in table["subject"].unique() if subject not in whole}
    for volume, case, frame in zip(table["volume"], table["case"], table["frame"]):
        at = "" if pd.isna(frame) else f", frame {frame}"
        for path in manifest.image_paths(volume):
            found["file"][f"{path.absolute()}{at}"] = f"{path}{at}"
            if path in hashes:
                found["voxels"][f"{hashes[path]}{at}"] = f"{case} ({path}{at})"
    return found


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
    names = np.array(
        [part.get(group, "train") for group in table["group"]], dtype=object
    )  # an array: no index to align
    return table.assign(split=names)


def _listed(values: Iterable[object], limit: int = 10) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
