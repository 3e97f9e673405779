"""What a report is made of: the files of one run folder, read without trusting them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np
import pandas as pd

from medssl.core.errors import DataError, MedsslError
from medssl.core.files import read_yaml

MAX_BYTES: Final = 200_000_000
MAX_PIXELS: Final = 4_000_000
MAX_OVERLAYS: Final = 12
UPPER_BOUND: Final = "upper_bound"  # the arm that trained with all labels: a line in the chart, no arm to compare
CELL_NAME: Final = re.compile(r"(?P<arm>.+)-n(?P<n>\d+)-draw(?P<draw>\d+)-seed(?P<seed>\d+)")
_RANK: Final = ("best", "median", "worst")
TARGET_TASKS: Final = ("regression", "classification")
T = TypeVar("T")


@dataclass(frozen=True)
class Overlay:
    """One example: image (X, Y) float, label and prediction (X, Y) int, and its title."""

    name: str
    title: str
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True)
class Curve:
    """The log of one fine-tuning."""

    arm: str
    n_labelled: int
    metrics: pd.DataFrame


@dataclass
class RunFiles:
    """Everything read from a run folder; a part that is missing is empty and named in ``gaps``."""

    folder: Path
    config: Any = None
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    manifest: pd.DataFrame | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    per_case: pd.DataFrame | None = None
    cells: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None
    curves: list[Curve] = field(default_factory=list)
    overlays: list[Overlay] = field(default_factory=list)
    people: pd.DataFrame | None = None
    maps: pd.DataFrame | None = None
    clusters: pd.DataFrame | None = None
    gaps: list[str] = field(default_factory=list)

    def attempt(self, name: str, read: Callable[[Path], T], consequence: str | None, fallback: T) -> T:
        """Read one file; a missing or broken one becomes a line in ``gaps`` (missing and optional: nothing)."""
        path = self.folder / name
        if not path.is_file():
            if consequence is not None:
                self.gaps.append(f"{name} is not there: {consequence}.")
            return fallback
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES / 1e6:.0f} MB")
            return read(path)
        except (MedsslError, OSError, ValueError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.gaps.append(f"{name} cannot be read ({cause}): it was left out.")
            return fallback


def run_kind(folder: Path) -> str:
    """``age_site``, ``few_label``, ``segmentation``, ``target`` or ``pretrain``, from the files that a run leaves.

    Raises:
        DataError: The folder does not exist or is not the folder of a run that can be reported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("no such run folder", where=str(folder), fix="name the folder of a run, such as runs/<name>")
    if any((folder / name).exists() for name in ("eval/age_site.json", "eval/per_person.csv")):
        return "age_site"
    if _is_few_label(folder):
        return "few_label"
    finetuned = ("eval/summary.json", "eval/per_case.csv", "eval/cells.csv", "cells")
    if any((folder / name).exists() for name in finetuned):
        return "target" if _task(folder) in TARGET_TASKS else "segmentation"
    if (folder / "eval/pretrain.json").is_file() or (folder / "logs/metrics.csv").is_file():
        return "pretrain"
    raise DataError(
        "nothing to report in this folder",
        where=str(folder),
        found="none of eval/summary.json, eval/age_site.json, eval/pretrain.json and logs/metrics.csv",
        fix="name the folder of a finished or started run",
    )


def _is_few_label(folder: Path) -> bool:
    """Whether the folder is a comparison by fine-tuning, by its summary or, before there is one, its configuration."""
    known = _known(folder)
    protocol = known["config.yaml"].get("protocol")
    planned = isinstance(protocol, dict) and protocol.get("name") == "few_label"
    return known["eval/summary.json"].get("kind") == "few_label" or planned


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """Summary and configuration; an empty one where it is not there or unreadable."""
    found: dict[str, dict[str, Any]] = {}
    for name, read in (("eval/summary.json", _read_object), ("config.yaml", read_yaml)):
        try:
            content = read(folder / name)
        except (MedsslError, OSError, ValueError, RecursionError):
            content = None
        found[name] = content if isinstance(content, dict) else {}
    return found


def _task(folder: Path) -> str | None:
    """The task of a fine-tuning by its summary, or by its configuration while there is none; None: unreadable."""
    for found in _known(folder).values():
        task = found.get("task")
        task = task.get("name") if isinstance(task, dict) else task
        if isinstance(task, str):
            return task
    return None


def read_run(folder: Path, kind: str) -> RunFiles:
    """Read a run folder for a report of ``kind``; nothing missing or broken stops it, everything is named."""
    run = RunFiles(Path(folder))
    run.config = run.attempt("config.yaml", read_yaml, "the settings cannot be shown", None)
    run.environment = run.attempt("environment.json", _read_object, "versions and device are unknown", {})
    run.status = run.attempt("status.json", _read_object, "it is unknown whether the run finished", {})
    run.manifest = run.attempt("manifest.csv", _read_table, "the data cannot be described", None)
    meta = run.attempt("manifest.meta.yaml", read_yaml, None, {})
    run.meta = meta if isinstance(meta, dict) else {}
    required = "training cannot be shown" if kind == "pretrain" else None
    run.metrics = run.attempt("logs/metrics.csv", _read_metrics, required, None)
    _PARTS[kind](run)
    return run


def _read_pretrain_parts(run: RunFiles) -> None:
    run.pretrain = run.attempt("eval/pretrain.json", _read_object, "the summary cannot be shown", {})
    run.clusters = run.attempt("logs/clusters.csv", _read_table, None, None)


def _read_segmentation_parts(run: RunFiles) -> None:
    run.summary = run.attempt("eval/summary.json", _read_summary, "scores and comparisons cannot be shown", {})
    run.per_case = run.attempt("eval/per_case.csv", _read_per_case, "single draws and classes cannot be shown", None)
    run.cells = run.attempt("eval/cells.csv", _read_table, "single fine-tunings cannot be listed", None)
    _read_curves(run)
    names = sorted((p.name for p in run.folder.glob("eval/overlays/*.npz")), key=lambda name: (_rank(name), name))
    found = (run.attempt(f"eval/overlays/{name}", _read_overlay, None, None) for name in names[:MAX_OVERLAYS])
    run.overlays = [overlay for overlay in found if overlay is not None]
    if len(names) > MAX_OVERLAYS:
        run.gaps.append(f"{len(names) - MAX_OVERLAYS} more overlays are in eval/overlays and not shown.")


def _read_target_parts(run: RunFiles) -> None:
    run.summary = run.attempt("eval/summary.json", _read_summary, "scores and comparisons cannot be shown", {})
    run.per_case = run.attempt("eval/per_case.csv", _read_predictions, "predictions cannot be shown", None)
    run.cells = run.attempt("eval/cells.csv", _read_table, "single fine-tunings cannot be listed", None)
    _read_curves(run)


def _read_few_label_parts(run: RunFiles) -> None:
    run.summary = run.attempt("eval/summary.json", _read_few_label, "scores and comparisons cannot be shown", {})
    target = run.summary.get("task") in TARGET_TASKS
    read = _read_predictions if target else _read_per_case
    run.per_case = run.attempt("eval/per_case.csv", read, "single draws cannot be shown", None)
    run.cells = run.attempt("eval/cells.csv", _read_table, "single fine-tunings cannot be listed", None)


def _read_curves(run: RunFiles) -> None:
    for path in sorted(run.folder.glob("cells/*/logs/metrics.csv")):
        match = CELL_NAME.fullmatch(path.parent.parent.name)
        if match and match["arm"] != UPPER_BOUND:
            name = path.relative_to(run.folder).as_posix()
            frame = run.attempt(name, _read_metrics, None, None)
            if frame is not None:
                run.curves.append(Curve(match["arm"], int(match["n"]), frame))


def _read_age_site_parts(run: RunFiles) -> None:
    run.summary = run.attempt("eval/age_site.json", _read_age_site, "scores and comparisons cannot be shown", {})
    consequence = "predicted ages and errors by decade cannot be shown"
    run.people = run.attempt("eval/per_person.csv", _read_people, consequence, None)
    run.maps = run.attempt("eval/embedding_maps.csv", _read_maps, "embedding maps cannot be shown", None)
    run.cells = run.attempt("eval/cells.csv", _read_table, None, None)


_PARTS: Final[Mapping[str, Callable[[RunFiles], None]]] = MappingProxyType(
    {
        "segmentation": _read_segmentation_parts,
        "pretrain": _read_pretrain_parts,
        "target": _read_target_parts,
        "few_label": _read_few_label_parts,
        "age_site": _read_age_site_parts,
    }
)


def _rank(name: str) -> int:
    return next((i for i, word in enumerate(_RANK) if word in name), len(_RANK))


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _rows_with(content: dict[str, Any], parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """``content`` if the rows of its ``parts`` hold at least what they are looked up by."""
    for part, needed in parts.items():
        rows = content.get(part) or []
        if not isinstance(rows, list):
            raise ValueError(f"`{part}` is no list of rows")
        for row in rows:
            lacking = [key for key in needed if not isinstance(row, dict) or row.get(key) is None]
            if lacking:
                raise ValueError(f"a row of `{part}` without {', '.join(lacking)}")
    return content


def _read_summary(path: Path) -> dict[str, Any]:
    keys = ("arm", "baseline", "n_labelled", "difference")
    return _rows_with(_read_object(path), {"table": ("arm", "n_labelled"), "paired": keys})


def _read_few_label(path: Path) -> dict[str, Any]:
    keys = ("arm", "baseline", "encoder", "n_labelled", "difference")
    rows = ("arm", "encoder", "n_labelled")
    parts = {"table": rows, "paired": keys, "paired_best": keys, "best": rows, "upper_bound": ("encoder",)}
    return _rows_with(_read_object(path), {**parts, "pretraining": ("arm", "encoder", "method")})


def _read_age_site(path: Path) -> dict[str, Any]:
    keys = ("arm", "baseline", "layer", "metric", "difference")
    content = _rows_with(_read_object(path), {"rows": ("arm", "layer"), "paired": keys})
    left_out = content.get("leave_site_out") or {}
    if not isinstance(left_out, dict):
        raise ValueError("`leave_site_out` is no object")
    _rows_with(left_out, {"rows": ("arm",)})
    return content


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)


def _read_per_case(path: Path) -> pd.DataFrame:
    frame = _read_table(path)
    lacking = {"arm", "n_labelled", "draw", "case", "class", "dice"} - set(frame)
    if lacking:
        raise ValueError(f"columns missing: {', '.join(sorted(lacking))}")
    frame["dice"] = pd.to_numeric(frame["dice"], errors="coerce")
    frame["seed"] = frame.get("seed", 0)
    for name in ("arm", "case", "class"):
        frame[name] = frame[name].astype(str)
    return frame[frame["arm"] != UPPER_BOUND].reset_index(drop=True)


def _read_predictions(path: Path) -> pd.DataFrame:
    """Predictions of people: numbers with ``abs_error``, or names of classes with ``balanced``."""
    frame = pd.read_csv(path, keep_default_na=False, dtype=str)
    number = "abs_error" in frame
    numbers = ["n_labelled", "draw", *(("true", "predicted", "abs_error") if number else ("balanced",))]
    lacking = {"arm", "case", "split", "true", "predicted", *numbers} - set(frame)
    if lacking:
        raise ValueError(f"columns missing: {', '.join(sorted(lacking))}")
    frame["seed"] = pd.to_numeric(frame["seed"], errors="coerce").fillna(0) if "seed" in frame else 0
    for name in numbers:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").replace([np.inf, -np.inf], np.nan)
    known = frame[["n_labelled", "draw"]].notna().all(axis=1) & (frame["arm"] != UPPER_BOUND)
    return frame[known].astype({"n_labelled": int, "draw": int}).reset_index(drop=True)


def _read_people(path: Path) -> pd.DataFrame:
    return _read_labelled(path, ("arm", "layer", "set", "subject", "site"), ("age", "age_pred"))


def _read_maps(path: Path) -> pd.DataFrame:
    return _read_labelled(path, ("arm", "layer", "kind", "subject", "site"), ("x", "y", "age"), ("set",))


def _read_labelled(
    path: Path, words: Sequence[str], numbers: Sequence[str], optional: Sequence[str] = ()
) -> pd.DataFrame:
    """A table whose ``words`` are text (missing: an empty one) and whose ``numbers`` are float.

    Sites are often numbers, and a missing one elsewhere in the column makes pandas write 7 as 7.0: read as 7 again.
    """
    frame = pd.read_csv(path, keep_default_na=False, dtype=str)
    lacking = {*words, *numbers} - set(frame)
    if lacking:
        raise ValueError(f"columns missing: {', '.join(sorted(lacking))}")
    for name in (*words, *(name for name in optional if name in frame)):
        frame[name] = frame[name].str.replace(r"^(-?\d+)\.0$", r"\1", regex=True)
    for name in numbers:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").replace([np.inf, -np.inf], np.nan)
    frame["seed"] = pd.to_numeric(frame["seed"], errors="coerce").fillna(0) if "seed" in frame else 0
    return frame


def _read_metrics(path: Path) -> pd.DataFrame:
    """A training log: numbers only, rows without a step dropped (a run that was killed may leave half a row)."""
    frame = pd.read_csv(path, on_bad_lines="skip")
    if "step" not in frame:
        raise ValueError("no column `step`")
    frame = frame.apply(pd.to_numeric, errors="coerce")
    return frame[frame["step"].notna()].sort_values("step", kind="stable").reset_index(drop=True)


def _read_overlay(path: Path) -> Overlay:
    with np.load(path, allow_pickle=False) as arrays:
        image, label, prediction = (np.asarray(arrays[key]) for key in ("image", "label", "prediction"))
        title = str(arrays["title"]) if "title" in arrays else path.stem
    if image.ndim != 2 or image.size > MAX_PIXELS or not image.shape == label.shape == prediction.shape:
        raise ValueError(f"expected three equal 2-D arrays, found {image.shape}, {label.shape}, {prediction.shape}")
    return Overlay(path.stem, title, image.astype(float), label.astype(int), prediction.astype(int))
