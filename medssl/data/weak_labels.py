"""Whether the weak labels of a run can be learnt from, found out before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from medssl.core.errors import DataError, nearest
from medssl.data.manifest import Manifest

SHOWN: Final = 10


@dataclass(frozen=True)
class LabelUse:
    """How a run uses one column of the manifest.

    Attributes:
        column: Name of the column.
        by: Key of the configuration that asks for it, named in messages. Several columns of one key form one label.
        number: Differences are taken, so that the column must hold numbers.
        missing_allowed: Whether volumes may lack it.
        bias: It is what shall be removed: at least two values are needed, and those of one person are named.
        may_be_constant: One value for everybody is fine.
    """

    column: str
    by: str
    number: bool = False
    missing_allowed: bool = False
    bias: bool = False
    may_be_constant: bool = False


def check_weak_labels(manifest: Manifest, uses: Iterable[LabelUse]) -> list[str]:
    """Refuse labels that training would silently be misled by.

    The rules: a column must exist and be filled, with numbers where differences are taken, for every volume that is
    trained on unless missing labels are ignored. Labels that are the same for everybody are refused, as they say
    nothing; one such column beside others that differ is only mentioned. A bias with one value is refused, because
    there is nothing to remove; a value that only one person has is mentioned, as it never forms a pair of two people.
    (Ages below 0 or above 130 years, such as months, are refused when the manifest is read.)

    Args:
        manifest: The rows that are trained on.
        uses: What is asked of which column.

    Returns:
        What is worth knowing, one line each.

    Raises:
        DataError: A rule is broken; names the file, the lines and people, and a remedy.
    """
    uses = list(dict.fromkeys(uses))
    notes: list[str] = []
    for use in uses:
        column = _column(manifest, use)
        if use.bias:
            notes += _check_bias(manifest, use, column)
    for by in dict.fromkeys(use.by for use in uses):
        together = [use for use in uses if use.by == by and not use.bias]
        notes += _check_spread(manifest, by, together)
    return notes


def _column(manifest: Manifest, use: LabelUse) -> pd.Series:
    table = manifest.table
    if use.column not in table or not table[use.column].notna().any():
        filled = [str(name) for name in table if table[name].notna().any()]
        empty = use.column in table
        raise DataError(
            f"{use.by} needs the column `{use.column}`, which {'is empty' if empty else 'the manifest does not have'}",
            where=str(manifest.path),
            fix="fill it, read another one under this name with data.map, or name another column. "
            + nearest(use.column, filled),
        )
    column = table[use.column]
    gap = column.isna().to_numpy(dtype=bool)
    if gap.any() and not use.missing_allowed:
        raise DataError(
            f"{use.by}: `{use.column}` is missing for {int(gap.sum())} of the {len(table)} volumes that are trained on",
            where=f"{manifest.path}, {named_rows(manifest, gap)}",
            fix="fill the cells, leave these people out (data.exclude)"
            + (", or set missing: ignore in the kernel" if use.number else ""),
        )
    if use.number and not is_number(column):
        raise DataError(
            f"{use.by}: `{use.column}` holds text, but differences of its values are taken",
            where=str(manifest.path),
            found=", ".join(sorted({repr(value) for value in column.dropna()})[:5]),
            fix="use the kernel `kind: equal` for categories, or write numbers into the column",
        )
    return column


def is_number(column: pd.Series) -> bool:
    """Whether a column holds numbers (truth values count as categories)."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _check_spread(manifest: Manifest, by: str, uses: Sequence[LabelUse]) -> list[str]:
    constant = [use for use in uses if manifest.table[use.column].dropna().nunique() == 1]
    if not constant:
        return []
    shown = "; ".join(f"{use.column} is {manifest.table[use.column].dropna().iloc[0]}" for use in constant)
    if len(constant) == len(uses) and not all(use.may_be_constant for use in constant):
        raise DataError(
            f"{by}: all {len(manifest)} volumes that are trained on have the same label, which says nothing about them",
            where=str(manifest.path),
            found=shown,
            fix="name a column in which people differ, or use a method without labels (simclr)",
        )
    return [f"{by}: one value for everybody ({shown})"]


def _check_bias(manifest: Manifest, use: LabelUse, column: pd.Series) -> list[str]:
    people = manifest.table["group"].groupby(column.to_numpy()).nunique()
    if len(people) == 1:
        raise DataError(
            f"{use.by}: every volume that is trained on has the same `{use.column}`, so there is nothing to remove",
            where=str(manifest.path),
            found=f"{use.column} {people.index[0]}, {int(people.iloc[0])} people",
            fix="remove the section debias, or train on several of its values",
        )
    alone = [str(value) for value, n in people.items() if n == 1]
    if not alone:
        return []
    rows = column.isin([value for value, n in people.items() if n == 1]).to_numpy(dtype=bool)
    return [
        f"{use.by}: one person alone has {use.column} {', '.join(alone[:SHOWN])}"
        f"{f' and {len(alone) - SHOWN} more' if len(alone) > SHOWN else ''} ({named_rows(manifest, rows)}): there is "
        "nobody of the same value to compare them with, only people of others"
    ]


def named_rows(manifest: Manifest, chosen: np.ndarray) -> str:
    """``lines 3, 7 (sub-02, sub-06)`` for the rows where ``chosen`` is true, at most ten of each."""
    rows = manifest.table[chosen]
    lines = [str(manifest.line(int(volume))) for volume in rows["volume"]]
    return f"line{'s' if len(lines) > 1 else ''} {shortened(lines)} ({shortened(list(rows['subject']))})"


def shortened(names: Sequence[str]) -> str:
    """At most ten names, and how many more there are."""
    names = list(dict.fromkeys(map(str, names)))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
