"""What every cohort module shares: the records they return and the careful reading of folders and JSON files."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import pandas as pd

from medssl.core.errors import ConfigError, DataError
from medssl.core.schema import validate
from medssl.data.manifest import ManifestMeta

# The manifest's own columns, in the order in which they are written; other columns follow.
COLUMNS: Final = (
    "subject",
    "image",
    "session",
    "label",
    "frame",
    "modality",
    "site",
    "age",
    "sex",
    "diagnosis",
    "split",
    "group",
)
MISSING: Final = frozenset({"", "n/a", "na", "nan", "none", "unknown"})
"""What tables of participants write, in any case, where a value is missing."""
NIFTI_SUFFIXES: Final = (".nii.gz", ".nii")
_JUNK: Final = {".DS_Store", "Thumbs.db", "desktop.ini"}


class Skipped(NamedTuple):
    """A file (or entry) that is not in the table, or a value that was left missing, and the reason."""

    path: str
    why: str


@dataclass(frozen=True)
class Discovery:
    """What was found under a root.

    Attributes:
        table: One row per volume; paths are relative to the root, with forward slashes.
        meta: Name, label names, licence and citation; written beside the manifest.
        skipped: Everything that was found and left out, and every doubt, with the reason.
        cohort: The layout that was read.
        why: What that layout was recognised by (filled in by `discover_any`).
    """

    table: pd.DataFrame
    meta: ManifestMeta
    skipped: list[Skipped]
    cohort: str = ""
    why: str = ""


@dataclass(frozen=True)
class Recognition:
    """How sure a layout is of a folder: 0 (not it) to 1; below 0.5 it is taken only when no other layout claims it."""

    score: float
    why: str

    def __bool__(self) -> bool:
        return self.score > 0


@dataclass(frozen=True)
class Cohort:
    """One known layout: how to list it, how to recognise it, and what that recognition looks for."""

    name: str
    discover: Callable[..., Discovery]
    recognise: Callable[[Path], Recognition]
    summary: str
    looks_for: str


def existing_folder(root: str | Path) -> Path:
    """The folder as a `Path`.

    Raises:
        DataError: If it does not exist or is no folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError("the data folder does not exist", where=str(folder), found=found, fix="check the path")
    return folder


def list_files(root: Path, skipped: list[Skipped]) -> list[str]:
    """Every file below `root` as sorted relative paths with forward slashes; links to folders are not followed.

    Links that lead nowhere (content that a version control of data has not fetched) are added to `skipped`.
    """
    found = []
    for folder, _, names in os.walk(root):
        below = Path(folder).relative_to(root)
        for name in names:
            if (Path(folder) / name).exists():
                found.append((below / name).as_posix())
            else:
                skipped.append(Skipped((below / name).as_posix(), "link to a file that is not here"))
    skipped.sort()
    return sorted(found)


def leftovers(files: Iterable[str], used: Iterable[str], layout: str) -> list[Skipped]:
    """The files that no rule of the layout used, each with a reason."""
    known = set(used)
    return [
        Skipped(path, junk_reason(path) or f"not part of the {layout} layout") for path in files if path not in known
    ]


def junk_reason(path: str) -> str | None:
    """Why a file is never data (an operating system's leftovers, a hidden file), or None."""
    name = PurePosixPath(path).name
    if name.startswith("._"):
        return "resource fork that macOS leaves in archives, not an image"
    if name in _JUNK or name.startswith("."):
        return "hidden or system file"
    return None


def is_nifti(path: str) -> bool:
    """True for .nii and .nii.gz names that are not an operating system's leftovers."""
    return path.endswith(NIFTI_SUFFIXES) and junk_reason(path) is None


def stem(path: str) -> str:
    """The file name without folder and without .nii or .nii.gz (or its last suffix)."""
    name = PurePosixPath(path).name
    for suffix in NIFTI_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return PurePosixPath(name).stem


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which `case_2` comes before `case_10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def build_table(rows: Sequence[Mapping[str, Any]], *, root: Path, layout: str) -> pd.DataFrame:
    """The manifest's columns that hold a value (subject and image always), then the extra ones; missing cells are None.

    Raises:
        DataError: If there is no row.
    """
    if not rows:
        raise DataError(
            f"no volume found in the {layout} layout", where=str(root), fix="check the path and the options of the scan"
        )
    extra = [name for row in rows for name in row if name not in COLUMNS]
    names = list(dict.fromkeys([*COLUMNS, *extra]))
    values = {name: [row.get(name) for row in rows] for name in names}
    kept = [name for name in names if name in ("subject", "image") or any(v is not None for v in values[name])]
    table = pd.DataFrame({name: pd.Series(values[name], dtype="object") for name in kept})
    if "frame" in table:
        table["frame"] = table["frame"].astype("Int64")
    for name in {"age", "height_cm", "weight_kg"} & set(kept):
        table[name] = table[name].astype("float64")
    return table


def read_tsv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names in lower case, and the line number and stripped cells by column of every row that is not empty.

    Raises:
        DataError: If the file cannot be read, or a row has another number of cells than the header.
    """
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "cannot read the file", where=str(path), found=str(error), fix="save it as UTF-8 text"
        ) from error
    header = [name.strip().lower() for name in lines[0]] if lines else []
    records = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"a line has {len(cells)} cells, the header {len(header)}",
                where=f"{path}, line {number}",
                fix="separate the cells by tabs, with n/a for a missing value",
            )
        records.append((number, dict(zip(header, (cell.strip() for cell in cells)))))
    return header, records


def years(text: str | None) -> float | None:
    """An age of 0 to 120 years, or None for anything else."""
    try:
        age = float(text) if text is not None else -1.0
    except ValueError:
        return None
    return age if 0 <= age <= 120 else None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DataError: If the file cannot be read, is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError("cannot read the file", where=str(path), found=str(error), fix="check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            "not valid JSON", where=str(path), found=str(error), fix="extract the archive again, or correct the file"
        ) from error
    if not isinstance(content, dict):
        raise DataError("the file does not hold a JSON object", where=str(path), found=type(content).__name__)
    return content


def field(content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """A required entry of a JSON object.

    Raises:
        DataError: If it is missing or of another type.
    """
    value = content.get(key)
    if key not in content or not isinstance(value, kind):
        found = f"{type(value).__name__} {value!r:.60}" if key in content else "no such key"
        raise DataError(
            f"`{key}` is missing or of the wrong type", where=str(path), found=found, fix="correct the file"
        )
    return value


def integer_labels(labels: Mapping[Any, Any], path: Path) -> dict[int, str]:
    """Label names from a mapping of numbers (as text) to names, sorted by number.

    Raises:
        DataError: If a key is not an integer.
    """
    try:
        named = {int(value): str(name) for value, name in labels.items()}
    except (TypeError, ValueError) as error:
        raise DataError("`labels` needs integer keys", where=str(path), found=f"{dict(labels)!r:.200}") from error
    return dict(sorted(named.items()))


def make_meta(path: Path, **values: Any) -> ManifestMeta:
    """A `ManifestMeta` from what a file of the cohort says.

    Raises:
        DataError: If the file gives a value that cannot be used, such as two label values of one name.
    """
    try:
        return validate(ManifestMeta, values, source=path.name)
    except ConfigError as error:
        raise DataError(error.message, where=str(path), fix="correct the file") from error


def inside(relative: str) -> str | None:
    """The normalised relative path, or None when it is absolute or leaves the root."""
    path = PurePosixPath(relative.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", relative):
        return None
    return path.as_posix()
