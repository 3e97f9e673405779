"""Tables of measures instead of images: one row a visit, numbers as features, everything else as keys.

Read from .csv, .tsv, .parquet (columns by name) and .npy (columns by place).
"""

from __future__ import annotations

import csv
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.core.errors import DataError, nearest
from medssl.core.files import atomic_write, explain_disk_errors, write_json
from medssl.core.schema import StrictModel
from medssl.data.volume import check_file

Floats = npt.NDArray[np.float32]

TEXT_SUFFIXES: Final = {".csv": ",", ".tsv": "\t"}
SUFFIXES: Final = (*TEXT_SUFFIXES, ".parquet", ".npy")
IDS_SUFFIX: Final = ".ids.csv"
"""Beside ``x.npy``, ``x.ids.csv`` says whose its rows are."""
ABOUT_SUFFIX: Final = ".json"
SUBJECT_NAMES: Final = ("subject", "participant_id", "subject_id", "participant", "sub_id", "id")
# What is known of a person or a scan is never a feature, whatever type its column has: a network that sees the site or
# the age has nothing left to learn. In lower case.
NOT_FEATURES: Final = frozenset(
    {
        *SUBJECT_NAMES, "session", "session_id", "ses", "run", "visit", "age", "sex", "gender", "site", "site_id",
        "scanner", "study", "cohort", "diagnosis", "dx", "group", "split", "fold", "image", "label", "frame", "volume",
        "case", "pretrained_on", "siteyacquisition", "sitexacq", "acquisition_setting", "magnetic_field_strength",
    }
)  # fmt: skip
_TEXT: Final = NOT_FEATURES - {"age", "pretrained_on", "magnetic_field_strength", "volume", "frame"}
MISSING: Final = ["", "NA", "N/A", "n/a", "NaN", "nan", "null", "None"]
FORMAT: Final = 1


@dataclass(frozen=True)
class FeatureTable:
    """Rows of a table.

    Attributes:
        names: Of the F features.
        values: (n, F) float32; NaN where a cell is missing.
        keys: The n rows' other columns: ids, site and the like as text (None: missing), age and others as numbers.
    """

    names: tuple[str, ...]
    values: Floats
    keys: pd.DataFrame

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names) or len(self.keys) != len(self.values):
            raise DataError(
                "names, values and keys of a feature table differ in length",
                found=f"{len(self.names)} names, values {self.values.shape}, {len(self.keys)} rows of keys",
            )
        if len(set(self.names)) < len(self.names):
            raise DataError("two features have the same name", found=_repeated(self.names))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def positional(self) -> bool:
        """Whether columns are known by their place only, as in .npy: another number of them means other features."""
        return self.names == numbered(len(self.names))


def numbered(n: int) -> tuple[str, ...]:
    """``f0000, f0001, ...``: names of features that have none."""
    return tuple(f"f{number:04d}" for number in range(n))


def is_feature_file(path: Path) -> bool:
    """Whether a path names a table rather than a volume. A .npy array does if it has fewer than three axes longer
    than one; what cannot be opened counts as a volume.
    """
    suffix = path.suffix.lower()
    if suffix != ".npy":
        return suffix in SUFFIXES
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError, EOFError):
        return False
    return sum(length > 1 for length in shape) < 3


def read_features(path: Path, columns: Sequence[str] | None = None, *, one_row: bool = False) -> FeatureTable:
    """Read a table of features.

    Args:
        path: .csv, .tsv, .parquet or .npy. The first axis of a .npy array are the rows, all others are flattened.
        columns: Globs such as ``lh_*`` that name the features, in the order of the file; None: every column of numbers
            that says nothing about the person (``NOT_FEATURES``).
        one_row: A .npy array is one row, whatever its axes (a (7, 68) array of measures by region of one person).

    Raises:
        DataError: Missing, damaged or empty file, another format, a glob that matches nothing, a feature that is text,
            two columns of one name.
    """
    path = Path(path)
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        table = _read_array(path, one_row)
    elif suffix in SUFFIXES:
        frame = _read_parquet(path) if suffix == ".parquet" else _read_text(path, TEXT_SUFFIXES[suffix])
        table = _from_frame(frame, columns, path)
    else:
        raise DataError(
            "not a table of features", where=str(path), found=path.name, fix=f"known endings: {', '.join(SUFFIXES)}"
        )
    if suffix == ".npy" and columns is not None:
        chosen = _matching(columns, table.names, path)
        keep = [place for place, name in enumerate(table.names) if name in chosen]
        table = replace(table, names=tuple(table.names[place] for place in keep), values=table.values[:, keep])
    if table.values.size == 0:
        raise DataError(
            "the table holds no features",
            where=str(path),
            found=f"{len(table)} rows, {len(table.names)} columns of numbers",
            fix="check the file; columns of text and what is known of the person are no features",
        )
    return table


def _read_array(path: Path, one_row: bool) -> FeatureTable:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "not a readable .npy array", where=str(path), found=str(error), fix="export it again"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim == 0:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError("the array does not hold rows of numbers", where=str(path), found=found)
    values = array.reshape(1 if one_row or array.ndim == 1 else len(array), -1).astype(np.float32)
    keys = pd.DataFrame(index=range(len(values)))
    ids = path.with_name(path.stem + IDS_SUFFIX)
    if ids.is_file():
        keys = _read_text(ids, ",")
        keys = keys.assign(**{name: _text(keys[name]) for name in keys if name.lower() in _TEXT})
        if len(keys) != len(values):
            raise DataError(
                "the ids beside the array are not one a row",
                where=str(ids),
                found=f"{len(keys)} ids, {len(values)} rows in {path.name}",
            )
    return FeatureTable(numbered(values.shape[1]), values, keys)


def _read_text(path: Path, separator: str) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = [cell.strip() for cell in next(csv.reader(file, delimiter=separator), [])]
        if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
            raise DataError(
                "columns are not separated by commas",
                where=str(path),
                found=header[0][:80],
                fix="save the table with commas (and decimal points), or name it .tsv where tabs separate columns",
            )
        named = [name for name in header if name]
        if len(set(named)) < len(named):
            raise DataError("two columns have the same name", where=str(path), found=_repeated(named))
        text = {place: str for place, name in enumerate(header) if name.lower() in _TEXT}
        missing = {place: [""] if place in text else MISSING for place in range(len(header))}  # a person may be NA
        names = [name or f"unnamed column {place + 1}" for place, name in enumerate(header)]
        frame = pd.read_csv(
            path, sep=separator, header=None, skiprows=1, names=range(len(header)), dtype=text, na_values=missing,
            keep_default_na=False, low_memory=False, encoding="utf-8-sig", index_col=False,
        )  # fmt: skip
    except (OSError, ValueError, csv.Error) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        raise DataError(
            "the table cannot be read", where=str(path), found=str(error).strip()[:200], fix="save it as UTF-8 CSV"
        ) from error
    frame.columns = pd.Index(names)
    return frame


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise DataError("not a readable parquet file", where=str(path), found=str(error)[:200]) from error
    if frame.index.name is not None or any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    frame.columns = frame.columns.astype(str)
    if frame.columns.has_duplicates:
        raise DataError("two columns have the same name", where=str(path), found=_repeated(list(frame.columns)))
    return frame.reset_index(drop=True)


def _from_frame(frame: pd.DataFrame, columns: Sequence[str] | None, path: Path) -> FeatureTable:
    frame = frame.reset_index(drop=True)
    numbers = [
        str(name)
        for name in frame.columns
        if pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
    ]
    if columns is None:
        chosen = {
            n for n in numbers if n.lower() not in NOT_FEATURES and not n.startswith(("unnamed column", "Unnamed"))
        }
    else:
        chosen = _matching(columns, [str(name) for name in frame.columns], path)
        person = sorted(name for name in chosen if name.lower() in NOT_FEATURES)
        if person:
            raise DataError(
                "columns that describe the person or the scan cannot be features",
                where=str(path),
                found=", ".join(person[:10]),
                fix="choose narrower patterns",
            )
        _refuse_text(frame, sorted(chosen - set(numbers)), path)
    names = tuple(name for name in numbers if name in chosen)
    values = frame[list(names)].to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused where rows are opened
        values32 = values.astype(np.float32)
    keys = frame[[name for name in frame.columns if name not in chosen]]
    keys = keys.assign(**{name: _text(keys[name]) for name in keys if name.lower() in _TEXT})
    return FeatureTable(names, values32, keys)


def _matching(columns: Sequence[str], names: Sequence[str], path: Path) -> set[str]:
    chosen: set[str] = set()
    for pattern in columns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise DataError(
                f"no column matches `{pattern}`",
                where=str(path),
                found=f"{len(names)} columns",
                fix=nearest(pattern, names[:50]),
            )
        chosen.update(found)
    return chosen


def _refuse_text(frame: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    if not names:
        return
    column = frame[names[0]]
    bad = pd.to_numeric(column, errors="coerce").isna() & column.notna()
    at = int(bad.to_numpy().argmax())
    raise DataError(
        "features must be numbers",
        where=f"{path}, row {at}, column {names[0]}",
        found=f"{column.iloc[at]!r:.60}" + (f"; also in {', '.join(names[1:6])}" if len(names) > 1 else ""),
        fix="leave missing cells empty, or choose other columns",
    )


def _text(column: pd.Series) -> pd.Series:
    """Ids, sites and the like as text, whole numbers without a decimal point; None where missing."""

    def shown(cell: Any) -> str | None:
        if pd.isna(cell) or str(cell).strip() == "":
            return None
        return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()

    return pd.Series([shown(cell) for cell in column], dtype=object, index=column.index)


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted({name for name in names if names.count(name) > 1})[:10])


def write_features(table: FeatureTable, path: Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write a table so that ``read_features`` reads the same values back.

    Args:
        table: The rows.
        path: .csv or .parquet: keys, then features. .npy: the values; names of the features are lost, and the keys
            (where there are any) go to ``<stem>.ids.csv`` beside it.
        about: Written as ``<name>.json`` beside it (``x.csv.json``).

    Raises:
        DataError: Another ending.
        DiskError: No space or no permission; what was there before is untouched.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet", ".npy"):
        raise DataError("features are written as .csv, .parquet or .npy", where=str(path), fix="name such a file")
    values = pd.DataFrame(table.values, columns=list(table.names))
    frame = pd.concat([table.keys.reset_index(drop=True), values], axis=1)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".csv":
        atomic_write(path, frame.to_csv(index=False, lineterminator="\n"))
    else:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with explain_disk_errors(path):
                if suffix == ".parquet":
                    frame.to_parquet(temporary, index=False)
                else:
                    with temporary.open("wb") as file:
                        np.save(file, table.values)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    if suffix == ".npy" and len(table.keys.columns):
        ids = table.keys.to_csv(index=False, lineterminator="\n")
        atomic_write(path.with_name(path.stem + IDS_SUFFIX), ids)
    if about is not None:
        write_json(path.with_name(path.name + ABOUT_SUFFIX), dict(about))
    return path


def about_table(path: Path) -> dict[str, Any]:
    """What ``write_features`` was given as ``about`` of a table; empty for tables without it.

    Raises:
        DataError: The file beside the table is no JSON.
    """
    file = path.with_name(path.name + ABOUT_SUFFIX)
    if not file.is_file():
        return {}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            "not readable as JSON", where=str(file), found=str(error), fix="embed again, or remove it"
        ) from error
    return about if isinstance(about, dict) else {}


class FeaturesConfig(StrictModel):
    """How rows of feature tables are taken (`items.geometry: features`)."""

    columns: tuple[str, ...] | None = None
    """Globs such as `lh_*` that name the features; null: those that the manifest was scanned with, else every column
    of numbers that says nothing about the person."""
    standardise: bool = True
    """Subtract the mean and divide by the standard deviation of the rows that are trained on; a feature that is
    constant there becomes 0."""
    impute: Literal["mean"] | None = None
    """mean: a missing feature takes the mean of the rows that are trained on; null: it is refused."""


@dataclass(frozen=True)
class FeatureStatistics:
    """What turns raw features into a network's input, learnt from the rows that are trained on.

    Attributes:
        names: Of the F features, in the order in which the network takes them.
        mean: (F,) of the rows that have a value.
        sd: (F,) with denominator n; 0 where a feature is constant.
        n_rows: How many rows they were learnt from.
        standardise: False: values pass unchanged (missing ones still take the mean if ``impute``).
        impute: Missing features take the mean; else they are refused.
    """

    names: tuple[str, ...]
    mean: npt.NDArray[np.float64]
    sd: npt.NDArray[np.float64]
    n_rows: int
    standardise: bool = True
    impute: bool = False

    @classmethod
    def fit(cls, names: Sequence[str], values: Floats, config: FeaturesConfig) -> FeatureStatistics:
        """Learn from ``values`` (n, F), in float64.

        Raises:
            DataError: No row; a feature without any value; all features constant.
        """
        if len(values) == 0:
            raise DataError("there are no rows to learn the mean of features from")
        rows = np.asarray(values, dtype=np.float64)
        known = ~np.isnan(rows)
        empty = [name for name, some in zip(names, known.any(axis=0), strict=True) if not some]
        if empty:
            raise DataError(
                "features without any value in the rows that are trained on",
                found=", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else ""),
                fix="leave them out with data.features.columns",
            )
        mean = np.nanmean(rows, axis=0)
        # In float64 the mean of equal float32 values is that value, so a constant column's spread is 0 and not 1e-16.
        sd = np.nanstd(rows, axis=0)
        if not sd.any():
            raise DataError("every feature is constant in the rows that are trained on", found=f"{len(rows)} rows")
        return cls(tuple(names), mean, sd, len(rows), config.standardise, config.impute == "mean")

    @property
    def constant(self) -> tuple[str, ...]:
        """Features that are constant in the rows that were trained on."""
        return tuple(name for name, spread in zip(self.names, self.sd, strict=True) if spread == 0)

    def apply(self, values: Floats) -> Floats:
        """(n, F) raw features to the network's input, float32."""
        rows = np.asarray(values, dtype=np.float64)
        if self.impute:
            rows = np.where(np.isnan(rows), self.mean, rows)
        if self.standardise:
            rows = np.where(self.sd > 0, (rows - self.mean) / np.where(self.sd > 0, self.sd, 1.0), 0.0)
        return rows.astype(np.float32)

    def save(self, path: Path) -> Path:
        """Write them as JSON."""
        return write_json(
            path,
            {
                "format": FORMAT,
                "standardise": self.standardise,
                "impute": self.impute,
                "n_rows": self.n_rows,
                "names": list(self.names),
                "mean": self.mean.tolist(),
                "sd": self.sd.tolist(),
            },
        )

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read what ``save`` wrote.

        Raises:
            DataError: Missing, damaged or of a newer format.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if int(about["format"]) > FORMAT:
                raise ValueError(f"format {about['format']}, known up to {FORMAT}")
            names = tuple(str(name) for name in about["names"])
            mean, sd = (np.asarray(about[name], dtype=np.float64) for name in ("mean", "sd"))
            if not (mean.shape == sd.shape == (len(names),)) or not np.isfinite([mean, sd]).all() or (sd < 0).any():
                raise ValueError("names, means and deviations do not belong together")
            return cls(names, mean, sd, int(about["n_rows"]), bool(about["standardise"]), bool(about["impute"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                "the statistics of the features cannot be read",
                where=str(path),
                found=str(error)[:200],
                fix="copy the whole weights folder of the run; it holds features.json",
            ) from error
