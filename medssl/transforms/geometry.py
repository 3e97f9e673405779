"""Where voxels go: affine maps between views and items, and the resampling that follows them.

A ``theta`` (N, d, d + 1) maps the normalised coordinates of a view to those of its source, exactly as
``torch.nn.functional.affine_grid(..., align_corners=False)`` takes it: -1 and 1 are the outer faces of the first and
last voxel, and coordinates run from the last axis to the first. Normalised coordinates stretch with the axes, so maps are
built in voxel coordinates (here: 0 to S, faces of the image) and converted at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
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
    linear = torch.linalg.inv(theta[:, :, :dims].double())
    return torch.cat([linear, -linear @ theta[:, :, dims:].double()], dim=2).to(theta.dtype)


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


def resample_batch(images: Tensor, theta: Tensor, size: Sequence[int], padding: Padding, inside: Tensor) -> Tensor:
    """Linear resampling of a whole batch on its device.

    Args:
        images: (N, C, *spatial) float32.
        theta: (N, d, d + 1).
        size: Voxels per axis of the views.
        padding: What lies outside.
        inside: (N,) bool: crops and flips, of which no sample can lie outside; the outer half voxel is not padded.

    Returns:
        (N, C, *size).
    """
    points = grid(theta.to(images.device), size)
    if padding == "zeros" and bool(inside.any()):
        limit = 1 - 1 / torch.tensor(images.shape[:1:-1], dtype=torch.float32)
        bound = torch.where(inside[:, None], limit, torch.inf).to(images.device)
        bound = bound.reshape(len(images), *(1,) * len(size), len(size))
        points = torch.minimum(torch.maximum(points, -bound), bound)
    return grid_sample(images, points, mode="bilinear", padding_mode=padding, align_corners=False)


def along_axis(image: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Replace axis ``axis`` of ``image`` by its product with ``matrix`` (new, old), or (N, new, old) per item."""
    shape = image.shape
    if matrix.dim() == 2 and axis == image.dim() - 1:
        return (image.reshape(-1, shape[-1]) @ matrix.T).reshape(*shape[:-1], len(matrix))
    if matrix.dim() == 2:
        lead, tail = shape[:axis].numel(), shape[axis + 1 :].numel()
        product = torch.matmul(matrix, image.reshape(lead, shape[axis], tail))
    else:
        lead, tail = shape[1:axis].numel(), shape[axis + 1 :].numel()
        product = torch.matmul(matrix[:, None], image.reshape(shape[0], lead, shape[axis], tail))
    return product.reshape(*shape[:axis], matrix.shape[-2], *shape[axis + 1 :])


def resample_item(image: Tensor, theta: Tensor, out: Tensor, padding: Padding, inside: bool) -> None:
    """Linear resampling of one item on the CPU, written to ``out``; equal to ``resample_batch``.

    Args:
        image: (C, *spatial) float32.
        theta: (d, d + 1).
        out: (C, *size) float32, contiguous.
        padding: What lies outside.
        inside: A crop or flip: the axes stay apart, so one small matrix product each does it.
    """
    source, size = image.shape[1:], out.shape[1:]
    matrix, offset = voxels_from_theta(theta[None], size, source)
    if inside:
        for axis, (old, new) in enumerate(zip(source, size, strict=True)):
            weights, low, high = _interpolation(matrix[0, axis, axis], offset[0, axis], old, new)
            image = along_axis(image.narrow(axis + 1, low, high - low), weights, axis + 1)
        out.copy_(image)
        return
    mode = "nearest" if padding == "border" else "grid-constant"
    for channel, target in zip(image.numpy(), out.numpy(), strict=True):
        ndimage.affine_transform(channel, matrix[0], offset[0], output=target, order=1, mode=mode)


def _interpolation(step: float, start: float, old: int, new: int) -> tuple[Tensor, int, int]:
    """Weights (new, high - low) that interpolate ``start + step * i`` on voxels ``low`` to ``high`` of ``old``."""
    position = np.clip(start + step * np.arange(new), 0, old - 1)
    below = np.minimum(position.astype(np.int64), max(old - 2, 0))
    share = position - below
    low, high = int(below.min()), min(int(below.max()) + 2, old)
    weights = np.zeros((new, high - low), dtype=np.float32)
    rows = np.arange(new)
    weights[rows, below - low] = 1 - share
    weights[rows, np.minimum(below + 1, old - 1) - low] += share
    return torch.from_numpy(weights), low, high


def resample_labels(labels: Tensor, theta: Tensor, size: Sequence[int], padding: Padding, inside: Tensor) -> Tensor:
    """Nearest voxel of every label map, on the CPU or an accelerator.

    Outside the image lies its border, or with zeros the background; an item without a single label (all -1) stays so.

    Args:
        labels: (N, *spatial) integers, -1 where unlabelled.
        theta: (N, d, d + 1).
        size: Voxels per axis of the views.
        padding: What lies outside.
        inside: (N,) bool, as for ``resample_batch``.

    Returns:
        (N, *size), same type.
    """
    source = labels.shape[1:]
    matrix, offset = voxels_from_theta(theta, size, source)
    result = labels.new_empty((len(labels), *size))
    for item in range(len(labels)):
        clamp = padding == "border" or bool(inside[item])
        if labels.device.type == "cpu" and not bool(inside[item]):
            fill = 0 if clamp else min(0, int(labels[item].max()))
            ndimage.affine_transform(
                labels[item].numpy(), matrix[item], offset[item], output=result[item].numpy(), order=0,
                mode="nearest" if clamp else "grid-constant", cval=fill,
            )  # fmt: skip
        else:
            result[item] = _nearest(labels[item], matrix[item], offset[item], size, clamp)
    return result


def _nearest(labels: Tensor, matrix: Floats, offset: Floats, size: Sequence[int], clamp: bool) -> Tensor:
    dims, device = labels.dim(), labels.device
    index: Any = torch.zeros((1,) * dims, dtype=torch.int64, device=device)
    outside: Any = torch.zeros((1,) * dims, dtype=torch.bool, device=device)
    for row, old in enumerate(labels.shape):
        position: Any = float(offset[row])
        for axis, new in enumerate(size):
            if matrix[row, axis] != 0:
                line = torch.arange(new, device=device, dtype=torch.float64) * float(matrix[row, axis])
                position = position + line.reshape(*(1,) * axis, new, *(1,) * (dims - 1 - axis))
        voxel = torch.floor(torch.as_tensor(position, device=device) + 0.5).long()
        outside = outside | (voxel < 0) | (voxel >= old)
        index = index * old + voxel.clamp(0, old - 1)
    values = labels.reshape(-1)[index].expand(*size)
    return values if clamp else torch.where(outside, labels.max().clamp(max=0), values)
