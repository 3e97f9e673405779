"""From the prepared grid back to the voxels of the input file, by the two affines alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.data.store import CaseGeometry
from medssl.data.volume import write_nifti

GRID_TOLERANCE = 1e-2
"""Largest distance in voxels, anywhere in the volume, at which two grids count as the same voxels."""


def to_native(prediction: Tensor | npt.NDArray[np.generic], geometry: CaseGeometry) -> npt.NDArray[np.int16]:
    """Bring a label map, or class probabilities, from the prepared grid to the native one.

    Where the two grids differ by flips, axis order, crop and padding only, every voxel is copied and nothing is
    interpolated. Otherwise probabilities are interpolated linearly class by class before the largest is taken (smoother
    than moving labels), and label maps take the nearest voxel. What lies outside the prepared grid is background.

    Args:
        prediction: (X, Y, Z) whole numbers, or (K, X, Y, Z) probabilities with class 0 the background.
        geometry: Of the volume that was predicted.

    Returns:
        (X, Y, Z) int16 on the native grid.

    Raises:
        ShapeError: The spatial shape is not that of the prepared grid.
        InputError: Values that are not probabilities, where they would be interpolated.
    """
    array = prediction.detach().cpu().numpy() if isinstance(prediction, Tensor) else np.asarray(prediction)
    if array.ndim not in (3, 4) or array.shape[-3:] != tuple(geometry.shape):
        raise ShapeError(
            "a prediction must lie on the prepared grid",
            found=f"{array.shape}, the prepared grid is {tuple(geometry.shape)}",
        )
    indices = _voxel_indices(geometry)
    if indices is not None:
        label = array if array.ndim == 3 else array.argmax(0)
        return _gather(label, *indices)
    if array.ndim == 3:
        return np.rint(_resample(array, geometry, "nearest")).astype(np.int16)
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise InputError(
            "interpolation to the native grid needs probabilities",
            found=f"values from {array.min():.3g} to {array.max():.3g}",
            fix="apply a softmax over the classes first",
        )
    best = np.zeros(geometry.native_shape, np.int16)
    # Outside the prepared grid interpolation gives 0; shifted by 1, that makes background certain there.
    highest = _resample(array[0] - 1, geometry, "bilinear") + 1
    for number in range(1, len(array)):  # one class at a time: all classes at native size may not fit into memory
        probability = _resample(array[number], geometry, "bilinear")
        better = probability > highest
        best[better], highest[better] = number, probability[better]
    return best


def _voxel_indices(geometry: CaseGeometry) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]] | None:
    """For each native axis the prepared axis it runs along and, per native voxel, the index there; None if oblique."""
    matrix = np.linalg.inv(geometry.affine) @ geometry.native_affine  # native index -> prepared index
    order = np.abs(matrix[:3, :3]).argmax(axis=0)
    if sorted(order) != [0, 1, 2]:
        return None
    exact = np.zeros((4, 4))
    exact[3, 3] = 1
    for native, prepared in enumerate(order):
        exact[prepared, native] = np.sign(matrix[prepared, native])
    exact[:3, 3] = np.rint(matrix[:3, 3])
    lengths = np.array([*geometry.native_shape, 1])
    if (np.abs(matrix - exact)[:3] @ lengths).max() > GRID_TOLERANCE:
        return None
    steps = [
        (exact[prepared, native] * np.arange(geometry.native_shape[native]) + exact[prepared, 3]).astype(np.int64)
        for native, prepared in enumerate(order)
    ]
    return order, steps


def _gather(
    label: npt.NDArray[np.generic], order: npt.NDArray[np.int64], steps: list[npt.NDArray[np.int64]]
) -> npt.NDArray[np.int16]:
    turned = label.transpose(order)
    inside = [(index >= 0) & (index < length) for index, length in zip(steps, turned.shape, strict=True)]
    clipped = [index.clip(0, length - 1) for index, length in zip(steps, turned.shape, strict=True)]
    copied = turned[np.ix_(*clipped)].astype(np.int16)
    copied[~(inside[0][:, None, None] & inside[1][:, None] & inside[2])] = 0
    return copied


def _resample(array: npt.NDArray[np.generic], geometry: CaseGeometry, mode: str) -> npt.NDArray[np.float32]:
    source = MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None], affine=torch.from_numpy(geometry.affine)
    )
    resample = SpatialResample(mode=mode, padding_mode="zeros", align_corners=False, dtype=np.float64)
    moved = resample(source, dst_affine=torch.from_numpy(geometry.native_affine), spatial_size=geometry.native_shape)
    return moved.as_tensor()[0].float().numpy()


def save_prediction(path: Path, label_map: npt.NDArray[np.integer], geometry: CaseGeometry) -> Path:
    """Write a native label map with the affine and shape of its input; uint8 where the values allow it.

    Raises:
        ShapeError: Not on the native grid.
        DiskError: No space or no permission.
    """
    if label_map.shape != tuple(geometry.native_shape):
        raise ShapeError(
            "a prediction is written on the native grid only",
            where=str(path),
            found=f"{label_map.shape}, the native grid is {tuple(geometry.native_shape)}",
            fix="bring it back with to_native first",
        )
    dtype = np.uint8 if label_map.size and label_map.min() >= 0 and label_map.max() <= 255 else np.int16
    return write_nifti(path, label_map, geometry.native_affine, dtype=dtype)
