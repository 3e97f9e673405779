"""CSV files that a spreadsheet shows and never runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from medssl.core.files import atomic_write

# The last four are the full-width forms, which some spreadsheet locales read as the ASCII ones.
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf")


def neutral(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such texts get a leading apostrophe, numbers stay as they are.

    A carriage return becomes a line feed, as pandas writes a bare one without quotes and thereby ends the row.
    """
    if not isinstance(value, str):
        return value
    risky = value.startswith(FORMULA_STARTS) and not _NUMBER.fullmatch(value)
    return ("'" if risky else "") + value.replace("\r\n", "\n").replace("\r", "\n")


def write_csv(table: pd.DataFrame | Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a table as CSV, atomically and safe to open in a spreadsheet; returns ``path``.

    Cells and headers that start like a formula (= + - @, tab, line break) and are not numbers get a leading
    apostrophe (CWE-1236). Missing values are empty cells; there is no index column.

    Raises:
        DiskError: The file cannot be written; what was there before is untouched.
    """
    frame = pd.DataFrame(table).copy()
    for position, kind in enumerate(frame.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            cells = frame.iloc[:, position].astype(object)
            frame.isetitem(position, cells.where(cells.isna(), cells.map(neutral)))
    frame.columns = [neutral(str(name)) for name in frame.columns]
    return atomic_write(Path(path), frame.to_csv(index=False, lineterminator="\n"))
