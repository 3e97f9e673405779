"""From the bytes of a manifest to a checked table: finds every problem in one pass, column by column."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final

import numpy as np
import pandas as pd

from medssl.core.errors import nearest

_log = logging.getLogger(__name__)

REQUIRED: Final = ("subject", "image")
COLUMNS: Final = (
    "subject", "image", "session", "label", "frame", "modality", "site", "age", "sex", "diagnosis", "split", "group",
)  # fmt: skip
DERIVED: Final = ("volume", "case")
MAX_ID: Final = 128
TABLES: Final = (".csv", ".tsv", ".parquet")
MAX_AGE: Final = 130.0

_ID = re.compile(rf"(?!\.)[A-Za-z0-9._-]{{1,{MAX_ID}}}")
_FORMULA: Final = ("=", "+", "-", "@")
_SYSTEM: Final = ("/dev/", "/proc/", "/sys/")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Without leading zeros, which are part of an id.
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?|-?\.[0-9]+")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a manifest. ``line`` counts from 1, the header; ``column`` is "" for a whole line."""

    line: int
    column: str
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}" + (f", {self.column}" if self.column else "")
        return f"{place}: {self.message}"


@dataclass
class ParsedRows:
    """Result of `parse_rows`; ``table`` is empty when there are problems."""

    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    lines: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    problems: list[Problem] = field(default_factory=list)


def parse_rows(raw: bytes, mapping: Mapping[str, str]) -> ParsedRows:
    """Check the bytes of a manifest and build its table (see `medssl.data.manifest.Manifest`)."""
    result = ParsedRows()
    text = _decode(raw, result.problems)
    header, columns, lines = _split_cells(text, result.problems)
    if not header:
        return result
    cells = _name_columns(header, columns, mapping, result.problems)
    _check_cells(cells, lines, result.problems)
    if len(lines) == 0 and not result.problems:
        result.problems.append(Problem(1, "", "there is no row below the header"))
    if result.problems:
        return result
    table = _typed_table(cells)
    table["volume"] = np.arange(len(table), dtype=np.int64)
    table["case"] = pd.Series(_cases(table), dtype=object)
    result.problems += [
        Problem(int(lines[i]), "subject", f"subject and session together make a name of more than {MAX_ID} characters")
        for i in np.flatnonzero(table["case"].str.len().to_numpy() > MAX_ID)
    ]
    result.table, result.lines = table, lines
    return result


def _decode(raw: bytes, problems: list[Problem]) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problems.append(Problem(1, "", "the file is UTF-16; save it as UTF-8"))
        return ""
    for number, line in enumerate(raw.split(b"\n"), 1) if b"\0" in raw else ():
        if b"\0" in line:
            problems.append(Problem(number, "", "holds a NUL byte; the file is damaged or not text"))
    raw = raw.replace(b"\0", b"")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        problems.append(Problem(number, "", f"byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8"))
        return raw.decode("utf-8-sig", errors="replace")


def _split_cells(text: str, problems: list[Problem]) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Header, cells by column (stripped), and the line on which each row starts. Empty rows are passed over."""
    reader = csv.reader(io.StringIO(text, newline=None), strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if "".join(row).strip():
                if not header:
                    header = [cell.strip() for cell in row]
                elif len(row) != len(header):
                    hint = "; put quotes round a cell that holds a comma" if len(row) > len(header) else ""
                    problems.append(Problem(start, "", f"has {len(row)} cells, the header {len(header)}{hint}"))
                else:
                    rows.append(row)
                    lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        problems.append(Problem(start, "", f"cannot be read on from here: {error} (an open quotation mark?)"))
    if not header and not problems:
        problems.append(Problem(1, "", "the file is empty"))
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            problems.append(Problem(1, "", f"columns are separated by {name}; save the file with commas"))
            return [], [], np.empty(0, np.int64)
    columns = [list(map(str.strip, column)) for column in zip(*rows)] if rows else [[] for _ in header]
    return header, columns, np.array(lines, np.int64)


def _name_columns(
    header: list[str], columns: list[list[str]], mapping: Mapping[str, str], problems: list[Problem]
) -> dict[str, list[str]]:
    """Cells by column name, after renaming; problems of the header itself."""
    cells: dict[str, list[str]] = {}
    for name, values in zip(header, columns):
        if not name and not any(values):
            continue  # a trailing comma on every line
        if not name:
            problems.append(Problem(1, "", "a column that holds cells has no name"))
        elif name in cells:
            problems.append(Problem(1, name, "two columns have this name"))
        elif name.startswith(_FORMULA):
            problems.append(Problem(1, name, "a column name cannot start like a spreadsheet formula (= + - @)"))
        cells.setdefault(name, values)
    found = dict(cells)
    for ours, theirs in mapping.items():
        if ours not in COLUMNS:
            problems.append(Problem(1, ours, f"there is no such column to map to. {nearest(ours, COLUMNS)}"))
        elif theirs not in found:
            problems.append(Problem(1, theirs, f"mapped to `{ours}`, but not in the file. {nearest(theirs, found)}"))
        else:
            cells[ours] = found[theirs]
    for name in REQUIRED:
        if name not in cells:
            problems.append(Problem(1, name, f"this required column is missing. {nearest(name, header)}"))
    for name in DERIVED:
        if name in cells and name not in mapping.values():
            problems.append(Problem(1, name, "this name is kept for what is derived; give the column another one"))
        cells.pop(name, None)
    for name in cells:
        close = get_close_matches(name, [known for known in COLUMNS if known not in cells], n=1, cutoff=0.8)
        if name not in COLUMNS and name not in mapping.values() and close:
            _log.warning("column `%s` is kept as an extra column; did you mean `%s`?", name, close[0])
    return cells


def _check_cells(cells: Mapping[str, list[str]], lines: np.ndarray, problems: list[Problem]) -> None:
    def report(column: str, bad: Callable[[str], bool], message: Callable[[str], str] | str) -> None:
        """A problem for every cell of ``column`` whose value is bad; each different value is looked at once."""
        values = cells.get(column, [])
        found = {value for value in set(values) if bad(value)}
        for i in (i for i, value in enumerate(values) if value in found) if found else ():
            text = message if isinstance(message, str) else message(values[i])
            problems.append(Problem(int(lines[i]), column, text))

    for name, values in cells.items():
        text = "\n".join(["", *values])  # one search of the whole column is much faster than one look at each cell
        if any(f"\n{mark}" in text for mark in _FORMULA):
            report(name, lambda v: v.startswith(_FORMULA) and not _is_number(v), _formula_message)
        if not "".join(values).isprintable():
            report(
                name, lambda v: not v.isprintable(), lambda v: f"{_short(v)} holds a line break or control character"
            )
    for name in REQUIRED:
        if "" in cells.get(name, ()):
            report(name, lambda v: not v, "this cell is required, but empty")
    for name in ("subject", "session"):
        report(name, lambda v: bool(v) and not _ID.fullmatch(v), _id_message)
    years = f"an age of 0 to {MAX_AGE:g} years (months are divided by 12)"
    _report_numbers("age", report, lambda x: 0 <= x <= MAX_AGE, years)
    whole = "a whole number from 0 on (index into a 4D file)"
    _report_numbers("frame", report, lambda x: 0 <= x < 2**31 and x == int(x), whole)
    for name in ("image", "label"):
        text = "".join(cells.get(name, ()))
        if any(folder in text for folder in _SYSTEM):
            report(name, _is_system_path, lambda v: f"{_short(v)} points at a device or into a system folder")
        if ";" in text and name == "image":
            report(name, _has_hole, lambda v: f"{_short(v)} has an empty path beside a semicolon")
        elif ";" in text:
            report(name, lambda v: ";" in v, lambda v: f"{_short(v)} names several files; a volume has one label map")
    for i, (modality, image) in enumerate(zip(cells.get("modality", ()), cells.get("image", ()))):
        # One 4D file may hold all channels, so that several modalities go with one path.
        if ";" in modality and ";" in image and modality.count(";") != image.count(";"):
            message = f"{_short(modality)} does not name one modality per image path"
            problems.append(Problem(int(lines[i]), "modality", message))
    _check_rows(cells, lines, problems)


def _report_numbers(name: str, report: Callable, valid: Callable[[float], bool], expected: str) -> None:
    def bad(value: str) -> bool:
        return bool(value) and not (_is_number(value) and math.isfinite(float(value)) and valid(float(value)))

    report(name, bad, lambda v: f"{_short(v)} is not {expected}; leave the cell empty if it is unknown")


def _is_system_path(value: str) -> bool:
    return any(part.strip().startswith(_SYSTEM) for part in value.split(";"))


def _has_hole(value: str) -> bool:
    return ";" in value and not all(part.strip() for part in value.split(";"))


def _check_rows(cells: Mapping[str, list[str]], lines: np.ndarray, problems: list[Problem]) -> None:
    """What concerns two rows at once: repeats, and people who are cut in two by the group column."""
    first: dict[tuple[str, ...], int] = {}
    unlike = len(set(zip(*cells.values()))) == len(lines)  # nearly always, and much faster to find out
    for i, row in enumerate(() if unlike else zip(*cells.values())):
        seen = first.setdefault(row, i)
        if seen != i:
            problems.append(Problem(int(lines[i]), "", f"repeats line {lines[seen]}"))
    if "group" not in cells or "subject" not in cells:
        return
    group_of: dict[str, tuple[str, int]] = {}
    for i, (subject, group) in enumerate(zip(cells["subject"], cells["group"])):
        known, line = group_of.setdefault(subject, (group, int(lines[i])))
        if known != group:
            message = (
                f"subject {subject} is in group {group or '(empty)'} here and in {known or '(empty)'} on line {line}"
            )
            problems.append(Problem(int(lines[i]), "group", f"{message}; one subject cannot be in two groups"))


def _typed_table(cells: Mapping[str, list[str]]) -> pd.DataFrame:
    n_rows = len(cells["subject"])
    table: dict[str, pd.Series] = {}
    for name in (*COLUMNS, *(name for name in cells if name not in COLUMNS)):
        values = cells.get(name, [""] * n_rows)
        if name == "age":
            table[name] = pd.Series(_numbers(values), dtype=np.float64)
        elif name == "frame":
            table[name] = pd.Series(_numbers(values)).astype("Int64")
        elif name not in COLUMNS and any(values) and all(not v or _PLAIN_NUMBER.fullmatch(v) for v in values):
            table[name] = pd.Series(pd.to_numeric(pd.Series([v or None for v in values], dtype=object)))
        else:
            filled = [value or None for value in values] if "" in values else values
            table[name] = pd.Series(filled, dtype=object)
    for name in ("image", "modality"):
        if ";" in "".join(cells.get(name, ())):
            tidy = [";".join(map(str.strip, v.split(";"))) if v and ";" in v else v for v in table[name]]
            table[name] = pd.Series(tidy, dtype=object)
    groups = [group or subject for group, subject in zip(table["group"], table["subject"])]
    table["group"] = pd.Series(groups, dtype=object)
    return pd.DataFrame(table)


def _cases(table: pd.DataFrame) -> list[str]:
    """subject[_session][_frameNN]; where that repeats, the modality is added, and then a number."""
    frames = table["frame"].fillna(-1).astype(int).tolist()
    in_tables = [image.lower().endswith(TABLES) for image in table["image"]]  # there, the frame is a row of the table
    cases = [
        subject + (f"_{session}" if session else "") + (f"_frame{frame:02d}" if frame >= 0 and not in_table else "")
        for subject, session, frame, in_table in zip(table["subject"], table["session"], frames, in_tables)
    ]
    for i in _repeated(cases):
        modality = table["modality"].iloc[i]
        if modality and _ID.fullmatch(modality):
            cases[i] = f"{cases[i]}_{modality}"
    repeated = _repeated(cases)
    taken = {case.lower() for case in cases}
    for i in repeated:
        number = 1
        while f"{cases[i]}_{number}".lower() in taken:
            number += 1
        cases[i] = f"{cases[i]}_{number}"
        taken.add(cases[i].lower())
    return cases


def _repeated(names: list[str]) -> list[int]:
    """Positions of names that occur more than once, capitals or not: on some disks they would be one file."""
    lower = [name.lower() for name in names]
    if len(set(lower)) == len(lower):
        return []
    counts = Counter(lower)
    return [i for i, name in enumerate(lower) if counts[name] > 1]


def _numbers(values: list[str]) -> np.ndarray:
    """Checked cells as float64; NaN where a cell is empty."""
    return np.array([float(value) if value else math.nan for value in values], np.float64)


def _is_number(value: str) -> bool:
    return _NUMBER.fullmatch(value) is not None  # float() would also take 1_000, nan and infinity


def _short(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _formula_message(value: str) -> str:
    return f"{_short(value)} starts like a spreadsheet formula (= + - @)"


def _id_message(value: str) -> str:
    return f"{_short(value)} is not an id: letters, digits and . _ - only, at most {MAX_ID}, no dot in front"
