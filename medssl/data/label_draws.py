"""Few-label training sets: drawn from distinct groups and nested, or taken from published lists."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.core.seeding import SPLIT, numpy_rng
from medssl.data.manifest import Manifest

PUBLISHED_ROLES: Final = ("labelled", "validation", "test", "unlabelled", "upper_bound")


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
    column: str = "label",
    by_class: bool = False,
) -> list[LabelDraw]:
    """Few-label training sets: nested (the volume of 1 is in 2 is in 8), from distinct groups, several draws.

    Args:
        manifest: Volumes to draw from: leave the test set out. Volumes without a label are passed over.
        n_labelled: Sizes, each at least 1.
        draws: Draws per size; draw d does not depend on how many there are.
        n_validation: Labelled validation volumes, from groups that train in no size of this draw.
        seed: Not negative; (seed, draw) alone decide.
        published: CSV of published lists (columns role, n_labelled, draw, subjects), used instead of drawing: the
            first ``draws`` of each size. Its lists are not nested, and must hold ``n_validation`` subjects.
        column: What a labelled volume has: ``label`` is its label map, other columns are a target such as age.
        by_class: The column holds classes: the first of a draw hold one of each, and further ones follow their shares.

    Raises:
        ConfigError: A size or number below what makes sense, or that the published list does not have; with
            ``by_class`` a size below the number of classes.
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
    labelled = manifest.table[manifest.table[column].notna()]
    what = "labels" if column == "label" else f"a value of `{column}`"
    by_group = {group: sorted(rows.tolist()) for group, rows in labelled.groupby("group")["volume"]}
    if len(by_group) < sizes[-1] + n_validation:
        raise DataError(
            f"more labelled volumes are asked for than there are groups with {what}",
            where=str(manifest.path),
            found=f"{len(by_group)} groups with {what}; {sizes[-1]} for training and {n_validation} for validation",
            fix="ask for fewer labels or validation volumes, or add labelled volumes",
        )
    classes = dict(zip(labelled["volume"], labelled[column], strict=True)) if by_class else {}
    if sizes[0] < len(set(classes.values())):
        raise ConfigError(
            f"a training set of {sizes[0]} cannot hold every class of `{column}`",
            where="grid.n_labelled",
            found=listed(sorted(map(str, set(classes.values())))),
            fix=f"ask for {len(set(classes.values()))} labelled volumes at least",
        )
    result = []
    names = np.array(sorted(by_group), dtype=object)
    # Draws of one volume repeat no person while there are enough: equal draws would hide the spread over draws.
    leaders = numpy_rng(seed, SPLIT, 3).permutation(names).tolist()
    for draw in range(1, draws + 1):
        rng = numpy_rng(seed, SPLIT, 3, draw)
        leader = leaders[(draw - 1) % len(leaders)]
        groups = [leader, *(group for group in rng.permutation(names).tolist() if group != leader)]
        chosen = [by_group[group][int(rng.integers(len(by_group[group])))] for group in groups]
        if by_class:
            chosen = _interleaved(chosen, [classes[volume] for volume in chosen], rng)
        validation = chosen[len(chosen) - n_validation :]
        result += [LabelDraw(size, draw, chosen[:size], validation) for size in sizes]
    return sorted(result, key=lambda one: (one.n_labelled, one.draw))


def _interleaved(chosen: Sequence[int], classes: Sequence[object], rng: np.random.Generator) -> list[int]:
    """The same volumes, first one of each class, then all classes in proportion to their size."""
    members: dict[object, list[int]] = {}
    for volume, name in zip(chosen, classes, strict=True):
        members.setdefault(name, []).append(volume)
    first = [own[0] for own in members.values()]
    place = {
        volume: (position + start) / len(own)
        for own, start in zip(members.values(), rng.random(len(members)), strict=True)
        for position, volume in enumerate(own[1:], start=1)
    }
    return [*first, *sorted(place, key=lambda volume: place[volume])]


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


def with_published_splits(manifest: Manifest, path: Path | str) -> Manifest:
    """The same volumes with ``split`` as published: test, unlabelled (for pretraining), train (listed otherwise).

    A subject that is listed as labelled and as unlabelled is `unlabelled`. Volumes in no list have no split.

    Args:
        manifest: The whole cohort, subjects named or numbered as in the list.
        path: CSV with the columns role, n_labelled, draw and subjects.

    Raises:
        DataError: The list cannot be read, names subjects that are not in the manifest, or tests on training subjects.
    """
    match = _matcher(manifest, Path(path))
    volumes: dict[str, set[int]] = {"train": set(), "unlabelled": set(), "test": set()}
    for row in _read_published(Path(path)):
        volumes[row.role if row.role in volumes else "train"].update(match(row.subjects, labelled_only=False))
    both = volumes["test"] & (volumes["train"] | volumes["unlabelled"])
    if both:
        subjects = sorted({str(manifest.row(volume)["subject"]) for volume in both})
        raise DataError("published test subjects are listed for training too", where=str(path), found=listed(subjects))
    split = {volume: name for name in ("train", "unlabelled", "test") for volume in volumes[name]}
    names = pd.Series([split.get(int(v)) for v in manifest.table["volume"]], index=manifest.table.index, dtype=object)
    return replace(manifest, table=manifest.table.assign(split=names))


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
                raise DataError(f"the published list has no column {listed(sorted(missing))}", where=str(path))
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


def _matcher(manifest: Manifest, path: Path) -> Callable[..., list[int]]:
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
                f"{listed(missing, 20)}",
                where=f"{path} against {manifest.path}",
                fix="check that the whole cohort was scanned, or draw your own labels",
            )
        return [volume for name in names for volume in table["volume"][table["subject"] == found[name]].tolist()]

    return match


def listed(values: Iterable[object], limit: int = 10) -> str:
    """The first of the values, separated by commas, and how many more there are."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
