"""Where voxels go: affine maps between views and items, and the resampling that follows them.

A ``theta`` (N, d, d + 1) maps the normalised coordinates of a view to those of its source, exactly as
``torch.nn.functional.affine_grid(..., align_corners=False)`` takes it: -1 and 1 are the outer faces of the first and
last voxel, and coordinates run from the last axis to the first. Normalised coordinates stretch with the axes, so maps
are built in voxel coordinates (here: 0 to S, faces of the image) and converted at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from medssl.core.errors import ShapeError

Floats = npt.NDArray[np.float64]
Padding = Literal["border", "zeros"]


def rotation(angles: Floats, spatial_dims: int) -> Floats:
    """Rotation matrices (N, d, d) of angles in radians, (N, 3): about axes 0, 1 and 2, applied in that order.

    Two dimensions use the last angle alone, from axis 0 towards axis 1.
    """
    n = len(angles)
    total = np.broadcast_to(np.eye(spatial_dims), (n, spatial_dims, spatial_dims)).copy()
    for axis in range(3):
        a, b = ((1, 2), (2, 0), (0, 1))[axis]
        if max(a, b) >= spatial_dims:
            continue
        turn = np.broadcast_to(np.eye(spatial_dims), total.shape).copy()
        cosine, sine = np.cos(angles[:, axis]), np.sin(angles[:, axis])
        turn[:, a, a] = turn[:, b, b] = cosine
        turn[:, b, a], turn[:, a, b] = sine, -sine
        total = turn @ total
    return total


def theta_from_voxels(matrix: Floats, offset: Floats, view: Sequence[int], source: Sequence[int]) -> Tensor:
    """Theta of the voxel map ``c_source = matrix @ c_view + offset`` (coordinates from 0 to S, faces of the image).

    Args:
        matrix: (N, d, d), axes in array order.
        offset: (N, d), in voxels.
        view: Voxels per axis of the view.
        source: Voxels per axis of the source.

    Returns:
        (N, d, d + 1) float32.
    """
    half_view, half_source = np.asarray(view) / 2.0, np.asarray(source) / 2.0
    linear = matrix * half_view[None, None, :] / half_source[None, :, None]
    shift = (matrix @ half_view + offset) / half_source - 1.0
    theta = np.concatenate([linear[:, ::-1, ::-1], shift[:, ::-1, None]], axis=2)
    return torch.from_numpy(theta.astype(np.float32))


def voxels_from_theta(theta: Tensor, view: Sequence[int], source: Sequence[int]) -> tuple[Floats, Floats]:
    """Matrix (N, d, d) and offset (N, d) of ``theta`` between voxel **indices** (centres at whole numbers)."""
    values = theta.detach().cpu().double().numpy()
    linear, shift = values[:, ::-1, -2::-1], values[:, ::-1, -1]
    half_view, half_source = np.asarray(view) / 2.0, np.asarray(source) / 2.0
    matrix = linear * half_source[None, :, None] / half_view[None, None, :]
    faces = half_source * (shift + 1.0) - matrix @ half_view
    return matrix, faces + matrix.sum(axis=2) * 0.5 - 0.5


def inverse_theta(theta: Tensor) -> Tensor:
    """The map source -> view of a map view -> source.

    Args:
        theta: (N, d, d + 1), invertible.

    Returns:
        (N, d, d + 1), so that composing both leaves every coordinate where it was.
    """
    dims = theta.shape[1]
    linear = torch.linalg.inv_ex(theta[:, :, :dims].double()).inverse  # inv would wait for the device
    return torch.cat([linear, -linear @ theta[:, :, dims:].double()], dim=2).to(theta.dtype)


def compose_theta(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that applies ``inner`` first and then ``outer``; all (N, d, d + 1)."""
    dims = inner.shape[1]
    linear = outer[:, :, :dims].double()
    moved = linear @ inner.double()
    return torch.cat([moved[:, :, :dims], moved[:, :, dims:] + outer[:, :, dims:].double()], dim=2).to(inner.dtype)


def grid(theta: Tensor, size: Sequence[int]) -> Tensor:
    """``F.affine_grid(theta, (N, C, *size), align_corners=False)`` by broadcasting: 4x faster on a CPU."""
    n, dims = len(theta), theta.shape[1]
    total = theta[:, :, dims].reshape(n, *(1,) * dims, dims)
    for axis, length in enumerate(size):
        line = (2 * torch.arange(length, device=theta.device, dtype=theta.dtype) + 1) / length - 1
        term = line[None, :, None] * theta[:, None, :, dims - 1 - axis]
        total = total + term.reshape(n, *(1,) * axis, length, *(1,) * (dims - 1 - axis), dims)
    return total


def warp(
    features: Tensor,
    theta: Tensor,
    size: Sequence[int] | None = None,
    *,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding: Padding = "zeros",
) -> Tensor:
    """Sample ``features`` where ``theta`` points; differentiable in ``features``.

    ``warp(image, theta)`` makes a view; ``warp(features_of_view, inverse_theta(theta))`` brings a feature map of that
    view back to the grid of the item. Coordinates are relative, so the map may be coarser than the image.

    Args:
        features: (N, C, *spatial) float, 2 or 3 spatial axes.
        theta: (N, d, d + 1), grid of the result -> ``features``.
        size: Voxels per axis of the result; None: those of ``features``.
        mode: Linear (in 2 or 3 dimensions) or nearest voxel.
        padding: What lies outside.

    Raises:
        ShapeError: ``theta`` does not fit ``features``.
    """
    dims = features.dim() - 2
    if theta.shape != (len(features), dims, dims + 1):
        raise ShapeError(
            "theta does not fit the features",
            found=f"theta {tuple(theta.shape)}, features {tuple(features.shape)}",
            fix=f"theta must be ({len(features)}, {dims}, {dims + 1})",
        )
    points = grid(theta.to(features), tuple(features.shape[2:]) if size is None else size)
    return grid_sample(features, points, mode=mode, padding_mode=padding, align_corners=False)
