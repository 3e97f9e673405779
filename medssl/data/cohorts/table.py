"""A table of measures: one row a visit, some columns about the person, the others features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd

from medssl.core.errors import DataError
from medssl.data.cohorts.base import Discovery, Recognition, Skipped, build_table
from medssl.data.features import SUBJECT_NAMES, SUFFIXES, read_features
from medssl.data.manifest import ManifestMeta

# Names under which tables hold what the manifest calls otherwise; the first that is there is taken. In lower case.
_OURS: Final = {
    "subject": SUBJECT_NAMES,
    "session": ("session", "session_id", "ses", "visit"),
    "site": ("site", "site_id"),
    "age": ("age",),
    "sex": ("sex", "gender"),
    "diagnosis": ("diagnosis", "dx"),
    "split": ("split",),
    "group": ("group",),
}
_RESERVED: Final = {"image", "label", "frame", "volume", "case", "modality"}


def recognise(root: Path) -> Recognition:
    """Never a folder: a table is named as a file."""
    return Recognition(0.0, f"{root.name} is a folder; name the table itself")


def discover(root: str | Path, *, features: str = "") -> Discovery:
    """List the rows of one table.

    Args:
        root: A .csv, .tsv, .parquet or .npy file (with its ids in ``<stem>.ids.csv``).
        features: Globs of the columns that are features, separated by semicolons: ``lh_*;rh_*``. Kept in the meta file
            of the manifest; other columns of numbers are then kept as columns of the manifest. Without them every
            column of numbers that says nothing about the person is a feature.

    Raises:
        DataError: Not such a file, no column with ids, or a pattern that matches nothing.
    """
    path = Path(root)
    if not path.is_file():
        raise DataError(
            "a table of features is a file",
            where=str(path),
            found="a folder" if path.is_dir() else "nothing",
            fix=f"name the table itself ({', '.join(SUFFIXES)})",
        )
    patterns = tuple(part.strip() for part in features.split(";") if part.strip())
    table = read_features(path, patterns or None)
    keys = table.keys
    lower = {str(name).lower(): str(name) for name in reversed(list(keys.columns))}
    found = {ours: lower[name] for ours, names in _OURS.items() for name in reversed(names) if name in lower}
    if "subject" not in found:
        ids = f", or write the ids to {path.stem}.ids.csv" if path.suffix.lower() == ".npy" else ""
        raise DataError(
            "no column says whose rows these are",
            where=str(path),
            found=", ".join(map(str, keys.columns[:10])) or "no columns beside the features",
            fix=f"name the column of ids subject or participant_id{ids}",
        )
    taken = {*found.values()} | {name for name in keys.columns if name.lower() in _RESERVED | set(_OURS)}
    extra = [str(name) for name in keys.columns if name not in taken and not str(name).lower().startswith("unnamed")]
    rows: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    columns = {**{ours: keys[name].tolist() for ours, name in found.items()}, **{n: keys[n].tolist() for n in extra}}
    for row in range(len(table)):
        values = {name: None if pd.isna(cells[row]) else cells[row] for name, cells in columns.items()}
        if values["subject"] is None:
            skipped.append(Skipped(f"row {row}", "no subject id"))
        else:
            rows.append({**values, "image": path.name, "frame": row})
    dropped = sorted(str(name) for name in keys.columns if name in taken - {*found.values()})
    if dropped:
        skipped.append(Skipped(f"columns {', '.join(dropped)}", "their names are kept for what a manifest derives"))
    meta = ManifestMeta(name=path.stem, features=patterns)
    return Discovery(build_table(rows, root=path, layout="table"), meta, skipped, "table")
