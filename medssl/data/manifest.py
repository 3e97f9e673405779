"""The manifest: one row per volume, read strictly and written atomically.

``manifest.csv`` names the volumes and what is known about them, ``manifest.meta.yaml`` beside it says what its labels
mean. Reading never opens an image: `medssl.data.integrity` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import yaml
from pydantic import field_validator

from medssl.core.errors import ConfigError, DataError
from medssl.core.files import atomic_write, read_yaml
from medssl.core.schema import StrictModel, validate
from medssl.data.manifest_rows import COLUMNS, DERIVED, REQUIRED, Problem, parse_rows

__all__ = [
    "COLUMNS",
    "DERIVED",
    "REQUIRED",
    "Manifest",
    "ManifestError",
    "ManifestMeta",
    "Problem",
    "read_manifest",
    "write_manifest",
]

SHOWN_PROBLEMS: Final = 200


class ManifestError(DataError):
    """A manifest with problems; ``problems`` holds every one, the message the first 200."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        shown = [str(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            shown.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(
            "\n".join([f"the manifest {path.name} cannot be used: {count}", *(f"  - {line}" for line in shown)]),
            where=str(path),
            fix="correct the lines named above (line 1 is the header); an empty cell means a missing value",
        )


class ManifestMeta(StrictModel):
    """What a cohort is: kept in ``manifest.meta.yaml`` and carried along with the manifest.

    Attributes:
        name: Name of this manifest, for titles.
        cohort: Cohort that the subjects belong to. Equal subject ids of two different cohorts are different people.
        label_names: Structure by label value, such as ``{1: "right ventricle"}``; value 0 is background and may be
            left out. Empty: the label values have no known meaning, and none is refused.
        modality: Modality of volumes whose row names none.
        licence: Licence of the data.
        citation: What its providers ask to be cited.
        source: Where it came from.
        features: Of feature tables: globs of the columns that are features; empty: every column of numbers that says
            nothing about the person.
    """

    name: str = ""
    cohort: str = ""
    label_names: dict[int, str] = {}
    modality: str = ""
    licence: str = ""
    citation: str = ""
    source: str = ""
    features: tuple[str, ...] = ()

    @field_validator("label_names")
    @classmethod
    def _names_tell_apart(cls, value: dict[int, str]) -> dict[int, str]:
        if any(not name.strip() for name in value.values()):
            raise ValueError("a structure has an empty name")
        if len(set(value.values())) < len(value):
            raise ValueError("two label values have the same name")
        if any(label < 0 for label in value):
            raise ValueError("label values cannot be negative")
        return value


@dataclass(frozen=True)
class Manifest:
    """The volumes of a cohort.

    Attributes:
        table: One row per volume. All of ``COLUMNS`` (text as objects, ``age`` float in years, ``frame`` Int64; a
            missing cell is None or NaN, never 0 or ""), the file's extra columns (numbers where every filled cell is
            one), ``volume`` (0-based row of the file, unchanged by `select`) and ``case`` (unique, safe as file name).
        meta: Meaning of the labels, licence, citation.
        path: The CSV file that relative paths start from.
        lines: Line of the file (header = 1) by ``volume``; None: no blank lines, so ``volume + 2``.
    """

    table: pd.DataFrame
    meta: ManifestMeta
    path: Path
    lines: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {volume: position for position, volume in enumerate(self.table["volume"].tolist())}

    @cached_property
    def _cells(self) -> dict[str, list[Any]]:
        """Columns that are looked up row by row, as lists: many times faster than asking the table."""
        names = [name for name in ("image", "label", "modality", "frame") if name in self.table]
        return {name: self.table[name].tolist() for name in names}

    def _position(self, volume: int) -> int:
        position = self._positions.get(int(volume))
        if position is None:
            raise DataError(f"volume {volume} is not in this manifest", where=str(self.path))
        return position

    def row(self, volume: int) -> pd.Series:
        """The table row of ``volume``. Raises DataError when this manifest does not hold it."""
        return self.table.iloc[self._position(volume)]

    def line(self, volume: int) -> int:
        """Line of the file that describes ``volume``; the header is line 1."""
        return int(volume) + 2 if self.lines is None else int(self.lines[volume])

    def image_paths(self, volume: int) -> list[Path]:
        """The files of ``volume``, one per channel."""
        return [self._resolve(part) for part in self._cells["image"][self._position(volume)].split(";")]

    def label_path(self, volume: int) -> Path | None:
        """The label map of ``volume``, or None where it has none."""
        label = self._cells["label"][self._position(volume)]
        return None if pd.isna(label) else self._resolve(label)

    def channels(self, volume: int) -> int | None:
        """How many channels the fourth axis of the volume's one file holds; None where that axis is time or absent.

        A row says so by naming several modalities for one path and no frame: ``T2;ADC``.
        """
        position = self._position(volume)
        image, modality, frame = (self._cells[name][position] for name in ("image", "modality", "frame"))
        if pd.isna(modality) or pd.notna(frame) or ";" in image or ";" not in modality:
            return None
        return int(modality.count(";")) + 1

    @cached_property
    def label_aliases(self) -> dict[int, int]:
        """Stray values of the label files and the value that each stands for, from a column ``label_alias``.

        ``421=420`` says so, several are separated by semicolons.

        Raises:
            DataError: A cell that does not say so.
        """
        aliases: dict[int, int] = {}
        if "label_alias" not in self.table:
            return aliases
        for text in self.table["label_alias"].dropna().unique():
            for pair in str(text).split(";"):
                parts = [part.strip() for part in pair.split("=")]
                if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                    raise DataError(
                        "the column label_alias cannot be understood",
                        where=str(self.path),
                        found=str(text)[:100],
                        fix="write STRAY=VALUE, such as 421=420, several separated by semicolons",
                    )
                aliases[int(parts[0])] = int(parts[1])
        return aliases

    def _resolve(self, text: str) -> Path:
        return self.path.parent / text.strip()  # an absolute path stays what it is

    def select(self, mask: Any) -> Manifest:
        """The rows where ``mask`` (boolean, one value a row) is true; ``volume`` and ``case`` stay what they were."""
        keep = np.asarray(mask)
        if keep.dtype != bool or keep.shape != (len(self.table),):
            raise DataError(
                "a selection takes one true or false for each row",
                found=f"{keep.dtype} of shape {keep.shape}, {len(self.table)} rows",
            )
        return replace(self, table=self.table[keep].reset_index(drop=True))

    def relocated(self, path: Path) -> pd.DataFrame:
        """The table with paths as a manifest at ``path`` needs them, for `write_manifest` into another folder.

        Relative where the file lies under the new folder, absolute elsewhere.
        """
        folder = Path(path).absolute().parent

        def move(cell: Any) -> Any:
            if pd.isna(cell):
                return cell
            parts = [Path(os.path.normpath(self._resolve(part).absolute())) for part in cell.split(";")]
            return ";".join(str(p.relative_to(folder) if p.is_relative_to(folder) else p) for p in parts)

        return self.table.assign(**{name: self.table[name].map(move).astype(object) for name in ("image", "label")})

    def hash(self) -> str:
        """SHA-256 of what the table and the meta file say; column order and place on disk do not matter."""
        columns = sorted(set(self.table.columns) - {"volume"})
        content = self.table[columns].to_csv(index=False, lineterminator="\n")
        without = None if self.meta.features else {"features"}  # manifests of images keep the hash that they had
        meta = json.dumps(self.meta.model_dump(mode="json", exclude=without), sort_keys=True)
        return hashlib.sha256(f"{meta}\n{content}".encode()).hexdigest()


def read_manifest(path: Path | str, *, mapping: Mapping[str, str] | None = None) -> Manifest:
    """Read and check a manifest and the meta file beside it.

    Args:
        path: The CSV file, or a folder that holds ``manifest.csv``.
        mapping: Column of the file to read under a name of ours: ``{"group": "person"}``. It replaces a column of
            that name; the file's own column is kept as well.

    Raises:
        ManifestError: Every problem of the file, with line numbers. It is a DataError.
        DataError: No such file, or the meta file is wrong.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.csv"
    if not path.is_file():
        raise DataError(
            "there is no manifest here",
            where=str(path),
            fix="name the CSV file, or write one with `medssl data scan`",
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError("the manifest cannot be read", where=str(path), found=str(error)) from error
    parsed = parse_rows(raw, mapping or {})
    if parsed.problems:
        raise ManifestError(path, parsed.problems)
    return Manifest(parsed.table, _read_meta(meta_path(path)), path, parsed.lines)


def meta_path(path: Path) -> Path:
    """``manifest.meta.yaml`` for ``manifest.csv``."""
    return path.with_name(f"{path.stem}.meta.yaml")


def _read_meta(path: Path) -> ManifestMeta:
    if not path.exists():
        return ManifestMeta()
    try:
        values = read_yaml(path)
        return validate(ManifestMeta, {} if values is None else values, source=path.name)
    except ConfigError as error:
        where = error.where or str(path)
        raise DataError(error.message, where=where, found=error.found, fix="correct the meta file") from error


def write_manifest(table: pd.DataFrame, meta: ManifestMeta, path: Path | str) -> None:
    """Write ``path`` and the meta file beside it; what was there stays whole when anything goes wrong.

    Paths in ``table`` are written as they are (`Manifest.relocated` gives them for another folder); ``volume`` and
    ``case`` are derived on reading and not written.

    Args:
        table: Columns of ours and any others; ``subject`` and ``image`` at least.
        meta: Written as ``<name>.meta.yaml``.
        path: Ends in ``.csv``; its folder is made when missing.

    Raises:
        ManifestError: Reading the result would fail (line numbers are those of the file that was not written).
        DiskError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise DataError("a manifest is written to a file that ends in .csv", where=str(path))
    known = [name for name in COLUMNS if name in table.columns]
    columns = known + [name for name in table.columns if name not in COLUMNS and name not in DERIVED]
    kept = [name for name in columns if name in REQUIRED or name not in COLUMNS or table[name].notna().any()]
    content = table[kept].to_csv(index=False, lineterminator="\n")
    problems = parse_rows(content.encode(), {}).problems
    if problems:
        raise ManifestError(path, problems)
    text = yaml.safe_dump(meta.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    atomic_write(meta_path(path), text)
    atomic_write(path, content)
