"""Labels of single items, such as the clusters that another run exported, joined to the items of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from medssl.core.errors import DataError
from medssl.core.types import ItemTable
from medssl.data.items import NOT_LABELS, label_columns
from medssl.data.manifest import Manifest
from medssl.data.weak_labels import shortened

PLACES: Final = ("case", "position")
"""What names an item: the visit and, of a slice or slab, where it lies."""
_NO_LABELS: Final = NOT_LABELS | {"position", "partition"}


@dataclass(frozen=True)
class ItemLabels:
    """A table of labels, checked: rows are told apart by `PLACES` (or by ``case`` alone, for whole volumes)."""

    path: Path
    table: pd.DataFrame
    by: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(str(name) for name in self.table.columns if name not in _NO_LABELS)

    def join(self, items: ItemTable, rows: Manifest) -> ItemTable:
        """The items with these labels beside those of the manifest: numbers as float64, text as codes.

        Raises:
            DataError: Items without a row.
        """
        case = dict(zip(rows.table["volume"], rows.table["case"].astype(str), strict=True))
        wanted = pd.DataFrame({"case": [case[int(volume)] for volume in items.volume], "position": items.position})
        place = pd.Series(np.arange(len(self.table)), index=pd.MultiIndex.from_frame(self.table[list(self.by)]))
        found = place.reindex(pd.MultiIndex.from_frame(wanted[list(self.by)])).to_numpy(dtype=float)
        missing = np.isnan(found)
        if missing.any():
            lacking = wanted[missing]
            names = [f"{one} slice {at}" if len(self.by) > 1 else one for one, at in lacking.itertuples(index=False)]
            raise DataError(
                f"the table of item labels has no row for {len(names)} of the {len(items)} items that are trained on",
                where=str(self.path),
                found=shortened(names),
                fix="use the items of the run that wrote it (items, data.prepare), or name the cases that it holds",
            )
        labels = label_columns(self.table[list(self.columns)])
        chosen = found.astype(np.int64)
        return replace(items, labels={**items.labels, **{name: values[chosen] for name, values in labels.items()}})


def read_item_labels(path: Path, rows: Manifest, *, geometry: str) -> ItemLabels:
    """Read a table of labels and check it against the rows that are trained on, before anything is prepared.

    Args:
        path: CSV with ``case``, for slices and slabs also ``position`` (the index along the slice axis), and labels;
            `weights/clusters.csv` of a run is one.
        rows: Those that are trained on; the table may hold others.
        geometry: Of the items.

    Raises:
        DataError: No such file, no CSV, columns missing or known already, two rows of one item, cases without a row.
    """
    if not path.is_file():
        raise DataError(
            "there is no table of item labels here",
            where=str(path),
            fix="name a CSV file in data.item_labels, such as runs/NAME/weights/clusters.csv of a clustering method",
        )
    try:
        table = pd.read_csv(path, dtype={"case": str}, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise DataError("the table of item labels cannot be read", where=str(path), found=str(error)) from error
    if "case" in table:
        table["case"] = table["case"].str.removeprefix("'")  # what makes a cell safe for spreadsheets
    by = PLACES[:1] if geometry in ("volume", "features") else PLACES
    labels = ItemLabels(path, table, by)
    _check_columns(labels, rows)
    _check_items(labels, rows)
    return labels


def _check_columns(labels: ItemLabels, rows: Manifest) -> None:
    lacking = [name for name in labels.by if name not in labels.table]
    columns = shortened(list(labels.table.columns))
    if lacking:
        raise DataError(
            f"the table of item labels lacks the column {' and '.join(f'`{name}`' for name in lacking)}",
            where=str(labels.path),
            found=f"columns {columns}",
            fix="write the case of the manifest into `case` and, for slices and slabs, the slice into `position`",
        )
    filled = [name for name in labels.columns if labels.table[name].notna().any()]
    if not filled:
        raise DataError("the table of item labels holds no labels", where=str(labels.path), found=f"columns {columns}")
    known = [name for name in filled if name in rows.table and rows.table[name].notna().any()]
    if known:
        raise DataError(
            f"the manifest has labels of these names already: {shortened(known)}",
            where=str(labels.path),
            fix="rename the columns of one of the two",
        )


def _check_items(labels: ItemLabels, rows: Manifest) -> None:
    table = labels.table
    if "position" in labels.by and not pd.api.types.is_integer_dtype(table["position"]):
        raise DataError("`position` of the item labels must be whole numbers in every row", where=str(labels.path))
    repeated = table[table.duplicated(list(labels.by))]
    if len(repeated):
        names = [" slice ".join(map(str, one)) for one in repeated[list(labels.by)].itertuples(index=False)]
        whole = " (it is one of slices; these items are whole volumes)" if labels.by == PLACES[:1] else ""
        raise DataError(
            f"the table of item labels has several rows of one item{whole}",
            where=str(labels.path),
            found=shortened(names),
            fix="keep one row for each item",
        )
    cases = rows.table["case"].astype(str)
    missing = cases[~cases.isin(table["case"])]
    if len(missing):
        raise DataError(
            f"the table of item labels has no row for {len(missing)} of the {len(cases)} volumes that are trained on",
            where=str(labels.path),
            found=shortened(list(missing)),
            fix="leave these volumes out (data.exclude), or write labels for them",
        )
