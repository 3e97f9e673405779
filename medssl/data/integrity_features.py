"""What is wrong with the rows of feature tables that a manifest names; like `integrity_files`, for rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medssl.core.errors import DataError
from medssl.data.feature_store import FeatureStore, aligned_values
from medssl.data.features import FeatureTable, Floats, read_features
from medssl.data.integrity_files import Finding, Inspection, Task

_SHOWN = 10


def inspect_features(tasks: Sequence[Task], columns: Sequence[str] | None) -> list[Inspection]:
    """Check rows of feature tables; a table is read once. Never raises for a bad file.

    Args:
        tasks: One for each row, all of feature tables.
        columns: Globs of the features, as the manifest's meta file has them; None: all.

    Returns:
        One inspection a task, in their order. Constant features are noted at the first row.
    """
    files: dict[tuple[Path, bool], list[Task]] = {}
    for task in tasks:
        whole = task.frame is None and task.images[0].suffix.lower() == ".npy"
        files.setdefault((task.images[0], whole), []).append(task)
    results = {task.volume: Inspection(task.volume, what="features") for task in tasks}
    names: tuple[str, ...] | None = None
    first = ""
    values: dict[int, Floats] = {}
    for (path, whole), members in files.items():
        table = _read(path, whole, columns, members, results)
        if table is None:
            continue
        if names is None:
            names, first = table.names, path.name
        try:
            aligned = aligned_values(table, names, path, reference=f"{first} has", same=True)
        except DataError as error:
            message = f"{error.message}: {error.found}"
            _report(results, members, "E-FEATURE-COLUMNS", message, error.fix or "use one layout for all tables")
            continue
        for task in members:
            row = _row(task, len(table), results[task.volume])
            if row is not None:
                values[task.volume] = aligned[row]
    if names is not None and values and tasks[0].deep:
        _judge_values(tasks, names, values, results)
    return [results[task.volume] for task in tasks]


def _read(
    path: Path, whole: bool, columns: Sequence[str] | None, members: list[Task], results: dict[int, Inspection]
) -> FeatureTable | None:
    """The table, or None and one finding at the first row that names it."""
    try:
        return read_features(path, columns, one_row=whole)
    except (DataError, OSError, MemoryError) as error:
        missing = not path.exists()
        text = f"{error.message} ({error.found})" if isinstance(error, DataError) and error.found else str(error)
        message = "there is no such file" if missing else text.splitlines()[0]
        rows = f"; {len(members) - 1} more rows name it" if len(members) > 1 else ""
        code, fix = ("E-MISSING-FILE", "check the path") if missing else ("E-DAMAGED", "export the table again")
        _report(results, members, code, message + rows, getattr(error, "fix", None) or fix)
        return None


def _report(results: dict[int, Inspection], members: list[Task], code: str, message: str, fix: str) -> None:
    task = members[0]
    results[task.volume].findings.append(Finding(code, task.row, str(task.images[0]), message, fix))


def _row(task: Task, n_rows: int, result: Inspection) -> int | None:
    if task.frame is not None and task.frame < n_rows:
        return task.frame
    if task.frame is None and n_rows == 1:
        return 0
    code = "E-FRAME-NEEDED" if task.frame is None else "E-FRAME-RANGE"
    message = (
        f"the table has {n_rows} rows and `frame` names none"
        if task.frame is None
        else f"there is no row {task.frame}: the table has {n_rows}"
    )
    fix = f"fill the column `frame` with a number from 0 to {n_rows - 1}, or scan the table again"
    result.findings.append(Finding(code, task.row, str(task.images[0]), message, fix))
    return None


def _judge_values(
    tasks: Sequence[Task], names: tuple[str, ...], values: dict[int, Floats], results: dict[int, Inspection]
) -> None:
    """Missing, infinite and constant features; hashes of the rows."""
    volumes = list(values)
    matrix = np.stack([values[volume] for volume in volumes])
    store = FeatureStore(names, matrix, volumes, {volume: str(volume) for volume in volumes})
    task_of = {task.volume: task for task in tasks}
    for volume, row in values.items():
        task, result = task_of[volume], results[volume]
        for code, bad, word, fix in (
            ("E-FEATURE-MISSING", np.isnan(row), "missing", "fill them in, or set data.features.impute: mean"),
            ("E-NOT-FINITE", np.isinf(row), "infinite", "correct the table"),
        ):
            if bad.any():
                shown = [names[at] for at in np.flatnonzero(bad)]
                message = f"{word} features: {_listed(shown)}"
                result.findings.append(Finding(code, task.row, str(task.images[0]), message, fix))
        if np.isfinite(row).all() and len(np.unique(row)) > 1:
            result.image_hashes = (store.voxels(volume),)
    finite = np.where(np.isfinite(matrix), matrix, np.nan)
    known = (~np.isnan(finite)).any(axis=0)
    constant = [
        names[at] for at in np.flatnonzero(known) if np.nanmax(finite[:, at]) == np.nanmin(finite[:, at])
    ]  # fmt: skip
    if constant and len(volumes) > 1:
        task = task_of[volumes[0]]
        message = f"{len(constant)} of {len(names)} features have one value in all rows: {_listed(constant)}"
        fix = "nothing to do: they become 0; or leave them out with data.features.columns"
        results[volumes[0]].findings.append(Finding("W-FEATURE-CONSTANT", task.row, str(task.images[0]), message, fix))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
