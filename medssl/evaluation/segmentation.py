"""Segmentation metrics per case and class, and their summary.

Definitions, the same in every table:

- Dice is 2 |P and L| / (|P| + |L|). 0 when exactly one side is empty; left out (NaN) and counted when both are.
- HD95 is in mm between voxel surfaces. A voxel is on the surface if it is in the structure and a face neighbour is not
  (what lies outside the image is not). From every surface voxel of one side, take the distance to the nearest surface
  voxel of the other, centre to centre; the 95th percentile (linear interpolation) in each direction, and the larger of
  the two. The image diagonal (outer corner to outer corner: the length of shape x spacing) when exactly one side is
  empty, left out (NaN) when both are.
- A structure is missed when exactly one side is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage

from medssl.core.errors import InputError, ShapeError

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def dice(prediction: Array, label: Array) -> float:
    """Dice of two masks of one shape: 0 if exactly one is empty, NaN if both are.

    Raises:
        ShapeError: The shapes differ.
    """
    predicted, true = _masks(prediction, label)
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(true))
    return 2 * int(np.count_nonzero(predicted & true)) / total if total else float("nan")


def hd95_mm(prediction: Array, label: Array, spacing: Sequence[float]) -> float:
    """95th percentile of the symmetric surface distance of two masks, in mm (definition at the top of this file).

    Args:
        prediction: Mask of any number of axes.
        label: Mask of the same shape.
        spacing: mm per voxel on each axis.

    Returns:
        mm; the image diagonal if exactly one mask is empty, NaN if both are.

    Raises:
        ShapeError: The shapes differ, or there is not one spacing per axis.
        InputError: A spacing that is not positive.
    """
    predicted, true = _masks(prediction, label)
    millimetres = _spacing(spacing, predicted.ndim)
    if not predicted.any() and not true.any():
        return float("nan")
    if not predicted.any() or not true.any():
        return float(np.linalg.norm(np.asarray(predicted.shape) * millimetres))
    box = ndimage.find_objects((predicted | true).astype(np.int8))[0]
    surfaces = [_surface(mask[box]) for mask in (predicted, true)]
    return max(_directed(surfaces[0], surfaces[1], millimetres), _directed(surfaces[1], surfaces[0], millimetres))


def case_metrics(
    prediction: Array, label: Array, label_names: Mapping[int, str], spacing: Sequence[float]
) -> list[dict[str, Any]]:
    """Metrics of one case, one row per class.

    Args:
        prediction: Integer label map.
        label: Integer label map of the same shape.
        label_names: Classes to score by their value; 0 is background and skipped. Empty: every value that occurs.
        spacing: mm per voxel on each axis.

    Returns:
        Rows with ``class``, ``dice``, ``hd95_mm`` (NaN where left out), ``missed`` and ``voxels`` (of the label).

    Raises:
        ShapeError: The shapes differ, or there is not one spacing per axis.
        InputError: A spacing that is not positive, or label maps that are not integers.
    """
    for name, array in (("prediction", prediction), ("label", label)):
        if not np.issubdtype(np.asarray(array).dtype, np.integer):
            raise InputError(f"{name} must be an integer label map", found=str(np.asarray(array).dtype))
    names = dict(label_names) or {int(v): str(v) for v in np.union1d(np.unique(prediction), np.unique(label))}
    rows: list[dict[str, Any]] = []
    for value, name in sorted(names.items()):
        if value == 0:
            continue
        predicted, true = prediction == value, label == value
        rows.append(
            {
                "class": name,
                "dice": dice(predicted, true),
                "hd95_mm": hd95_mm(predicted, true, spacing),
                "missed": bool(predicted.any() != true.any()),
                "voxels": int(np.count_nonzero(true)),
            }
        )
    return rows


@dataclass(frozen=True)
class ClassSummary:
    """One class over cases.

    Attributes:
        dice: Mean over cases; NaN if every case was left out.
        dice_sd: Standard deviation over cases (n - 1); NaN below two.
        hd95_mm: Mean over cases, a missed structure counting as the image diagonal.
        hd95_mm_detected: Mean over the cases in which the structure was not missed.
        n: Cases that count.
        left_out: Cases in which both sides are empty.
        missed: Cases in which exactly one side is empty.
    """

    dice: float
    dice_sd: float
    hd95_mm: float
    hd95_mm_detected: float
    n: int
    left_out: int
    missed: int


@dataclass(frozen=True)
class Summary:
    """All classes: means are over classes of the means over cases, counts are sums over classes."""

    dice: float
    hd95_mm: float
    hd95_mm_detected: float
    n: int
    left_out: int
    missed: int
    classes: dict[str, ClassSummary]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None for what does not exist."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def summarise(per_case: pd.DataFrame) -> Summary:
    """Means and counts of a table of `case_metrics` rows of any number of cases.

    Args:
        per_case: Columns ``class``, ``dice``, ``hd95_mm``, ``missed``; one row per case and class.

    Raises:
        InputError: A column is missing, or the table is empty.
    """
    lacking = {"class", "dice", "hd95_mm", "missed"} - set(per_case.columns)
    if lacking or per_case.empty:
        raise InputError("the table of cases cannot be summarised", found=f"{len(per_case)} rows, without {lacking}")
    classes = {str(name): _summarise_class(rows) for name, rows in per_case.groupby("class", sort=False)}
    means = pd.DataFrame([asdict(summary) for summary in classes.values()])
    return Summary(
        dice=float(means["dice"].mean()),
        hd95_mm=float(means["hd95_mm"].mean()),
        hd95_mm_detected=float(means["hd95_mm_detected"].mean()),
        n=int(means["n"].sum()),
        left_out=int(means["left_out"].sum()),
        missed=int(means["missed"].sum()),
        classes=classes,
    )


def _summarise_class(rows: pd.DataFrame) -> ClassSummary:
    counted = rows[rows["dice"].notna()]
    missed = counted["missed"].astype(bool)
    return ClassSummary(
        dice=float(counted["dice"].mean()),
        dice_sd=float(counted["dice"].std()),
        hd95_mm=float(counted["hd95_mm"].mean()),
        hd95_mm_detected=float(counted.loc[~missed, "hd95_mm"].mean()),
        n=len(counted),
        left_out=len(rows) - len(counted),
        missed=int(missed.sum()),
    )


def _masks(prediction: Array, label: Array) -> tuple[Mask, Mask]:
    predicted, true = np.asarray(prediction).astype(bool), np.asarray(label).astype(bool)
    if predicted.shape != true.shape:
        raise ShapeError("prediction and label must have one shape", found=f"{predicted.shape} and {true.shape}")
    return predicted, true


def _spacing(spacing: Sequence[float], ndim: int) -> npt.NDArray[np.float64]:
    millimetres = np.asarray(spacing, dtype=np.float64)
    if millimetres.shape != (ndim,):
        raise ShapeError(f"spacing needs one value per axis, {ndim}", found=str(tuple(spacing)))
    if not (np.isfinite(millimetres).all() and (millimetres > 0).all()):
        raise InputError("spacing must be positive", found=str(tuple(spacing)), fix="repair the image's header")
    return millimetres


def _surface(mask: Mask) -> Mask:
    """Voxels with a face neighbour outside the structure; nothing of it lies outside the array."""
    return mask & ~ndimage.binary_erosion(mask)


def _directed(source: Mask, target: Mask, millimetres: npt.NDArray[np.float64]) -> float:
    distance = ndimage.distance_transform_edt(~target, sampling=millimetres)
    return float(np.percentile(distance[source], 95))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
