"""Resampling along a theta: whole batches with torch, single items on the CPU by whatever is fastest there.

A crop with flips keeps the axes apart and is one small banded matrix product per axis; a general affine map goes
through ITK in three dimensions (several times faster than ``grid_sample`` there) and through torch in two. Padding
means the same everywhere: a point beyond the outer faces of the image takes the border voxel or zero; within them, the
outer half voxel takes the value of its voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - its usual name
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from medssl.core.transfer import onto
from medssl.transforms.geometry import Floats, Padding, grid, voxels_from_theta

_MOST_PADDING = 8  # times the image: beyond that, padding for ITK costs more than grid_sample


def resample_batch(images: Tensor, theta: Tensor, size: Sequence[int], padding: Padding) -> Tensor:
    """Linear resampling of a whole batch on its device.

    Args:
        images: (N, C, *spatial) float32.
        theta: (N, d, d + 1).
        size: Voxels per axis of the views.
        padding: What lies outside.

    Returns:
        (N, C, *size).
    """
    points = grid(onto(theta, images.device), size)
    views = grid_sample(images, points, mode="bilinear", padding_mode="border", align_corners=False)
    if padding == "zeros":
        views.masked_fill_((points.abs() > 1).any(dim=-1)[:, None], 0.0)
    return views


def resample_item(image: Tensor, theta: Tensor, out: Tensor, padding: Padding, inside: bool) -> None:
    """Linear resampling of one item on the CPU, written to ``out``; equal to ``resample_batch``.

    Args:
        image: (C, *spatial) float32.
        theta: (d, d + 1).
        out: (C, *size) float32.
        padding: What lies outside.
        inside: ``theta`` is a crop with flips: the axes stay apart.
    """
    source, size = image.shape[1:], out.shape[1:]
    matrix, offset = voxels_from_theta(theta[None], size, source)
    if inside:
        for axis, (old, new) in enumerate(zip(source, size, strict=True)):
            image = along_axis(image, interpolation_matrix(matrix[0, axis, axis], offset[0, axis], old, new), axis + 1)
        out.copy_(image)
    elif len(source) == 3 and _padded(matrix[0], offset[0], source, size) <= _MOST_PADDING * source.numel():
        for channel, target in zip(image.numpy(), out.numpy(), strict=True):
            _itk_linear(channel, matrix[0], offset[0], target, padding)
    else:
        out.copy_(resample_batch(image[None], theta[None], size, padding)[0])


def product(image: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Replace axis ``axis`` of ``image`` by its product with ``matrix`` (new, old), or (N, new, old), one per item."""
    shape, new = image.shape, matrix.shape[-2]
    if matrix.dim() == 3:  # the axis goes last, or the matrices would be copied for every row before it
        rows = image.movedim(axis, -1)
        changed = rows.reshape(shape[0], -1, shape[axis]) @ matrix.mT
        return changed.reshape(*rows.shape[:-1], new).movedim(-1, axis)
    if axis == image.dim() - 1:
        return (image.reshape(-1, shape[-1]) @ matrix.T).reshape(*shape[:-1], new)
    lead, tail = shape[:axis].numel(), shape[axis + 1 :].numel()
    changed = torch.matmul(matrix, image.reshape(lead, shape[axis], tail))
    return changed.reshape(*shape[:axis], new, *shape[axis + 1 :])


def along_axis(image: Tensor, matrix: Tensor, axis: int, block: int = 24) -> Tensor:
    """``product`` with a banded matrix (new, old), by blocks of rows that leave out the zeros beside the band."""
    parts = []
    for rows in matrix.split(block):
        used = rows.any(dim=0).nonzero()
        low, high = int(used[0]), int(used[-1]) + 1
        parts.append(product(image.narrow(axis, low, high - low), rows[:, low:high], axis))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def interpolation_matrix(step: float, start: float, old: int, new: int) -> Tensor:
    """(new, old) weights of linear interpolation at ``start + step * i``, border voxels beyond the ends."""
    position = np.clip(start + step * np.arange(new), 0, old - 1)
    below = np.minimum(position.astype(np.int64), max(old - 2, 0))
    share = position - below
    weights = np.zeros((new, old), dtype=np.float32)
    rows = np.arange(new)
    weights[rows, below] = 1 - share
    weights[rows, np.minimum(below + 1, old - 1)] += share
    return torch.from_numpy(weights)


def _margins(matrix: Floats, offset: Floats, source: Sequence[int], size: Sequence[int]) -> npt.NDArray[np.int64]:
    """(d, 2) voxels by which a view looks beyond its source, before and after each axis."""
    last = np.asarray(size) - 1
    low, high = offset + np.minimum(matrix, 0) @ last, offset + np.maximum(matrix, 0) @ last
    beyond = np.stack([-low, high - np.asarray(source) + 1], axis=1)
    # One more voxel, so that rounding never reaches the outer half voxel.
    return np.maximum(0, np.ceil(beyond)).astype(np.int64) + 1


def _padded(matrix: Floats, offset: Floats, source: Sequence[int], size: Sequence[int]) -> float:
    return float(np.prod(np.asarray(source, dtype=np.float64) + _margins(matrix, offset, source, size).sum(axis=1)))


def _itk_linear(
    channel: npt.NDArray[np.float32], matrix: Floats, offset: Floats, out: npt.NDArray[np.float32], padding: Padding
) -> None:
    if padding == "border":  # ITK's own extrapolation takes the nearest voxel instead of interpolating along the border
        margins = _margins(matrix, offset, channel.shape, out.shape)
        channel, offset = np.pad(channel, margins, mode="edge"), offset + margins[:, 0]
    moved = _itk(channel, matrix, offset, out.shape, sitk.sitkLinear, fill=0.0, extrapolate=False)
    out[...] = sitk.GetArrayViewFromImage(moved)


def _itk(
    array: npt.NDArray[np.generic],
    matrix: Floats,
    offset: Floats,
    size: Sequence[int],
    interpolator: int,
    *,
    fill: float,
    extrapolate: bool,
) -> sitk.Image:
    """Resample by ITK, whose axes run the other way. The caller keeps the image as long as it looks at its voxels."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[::-1, ::-1].ravel().tolist())
    transform.SetTranslation(offset[::-1].tolist())
    resample = sitk.ResampleImageFilter()
    resample.SetSize([int(length) for length in size[::-1]])
    resample.SetTransform(transform)
    resample.SetInterpolator(interpolator)
    resample.SetDefaultPixelValue(fill)
    resample.SetNumberOfThreads(torch.get_num_threads())
    if extrapolate:
        resample.UseNearestNeighborExtrapolatorOn()
    return resample.Execute(sitk.GetImageFromArray(array))


def resample_labels(labels: Tensor, theta: Tensor, size: Sequence[int], padding: Padding, inside: Tensor) -> Tensor:
    """Nearest voxel of every label map, on the CPU or an accelerator.

    Outside the image lies its border, or with zeros the background; an item without a single label (all -1) stays so.

    Args:
        labels: (N, *spatial) integers, -1 where unlabelled.
        theta: (N, d, d + 1).
        size: Voxels per axis of the views.
        padding: What lies outside.
        inside: (N,) bool: where ``theta`` is a crop with flips.

    Returns:
        (N, *size), same type.
    """
    matrix, offset = voxels_from_theta(theta, size, labels.shape[1:])
    border = padding == "border"
    if labels.device.type != "cpu":
        return _nearest(labels, matrix, offset, size, border)
    result = labels.new_empty((len(labels), *size))
    for item, label_map in enumerate(labels):
        if len(size) == 3 and not bool(inside[item]):
            fill = min(0, int(label_map.max()))
            moved = _itk(
                label_map.numpy(), matrix[item], offset[item], size,
                sitk.sitkNearestNeighbor, fill=fill, extrapolate=border,
            )  # fmt: skip
            result[item].numpy()[...] = sitk.GetArrayViewFromImage(moved)
        else:
            one = slice(item, item + 1)
            result[one] = _nearest(labels[one], matrix[one], offset[one], size, border)
    return result


def _nearest(labels: Tensor, matrix: Floats, offset: Floats, size: Sequence[int], border: bool) -> Tensor:
    """(n, *spatial) to (n, *size), all items at once."""
    n, device, spatial = len(labels), labels.device, labels.shape[1:]
    dims = len(spatial)
    steps, starts = (onto(torch.from_numpy(np.ascontiguousarray(values)), device) for values in (matrix, offset))
    lines = [torch.arange(new, device=device, dtype=torch.float64) for new in size]
    index = torch.zeros((n, *(1,) * dims), dtype=torch.int64, device=device)
    outside = torch.zeros((n, *(1,) * dims), dtype=torch.bool, device=device)
    for row, old in enumerate(spatial):
        position = starts[:, row].view(n, *(1,) * dims) + 0.5
        for axis, line in enumerate(lines):
            if (matrix[:, row, axis] != 0).any():  # a crop depends on one axis only: its index stays one line
                along = steps[:, row, axis, None] * line
                position = position + along.reshape(n, *(1,) * axis, -1, *(1,) * (dims - 1 - axis))
        voxel = position.floor().long()
        outside = outside | (voxel < 0) | (voxel >= old)
        index = index * old + voxel.clamp(0, old - 1)
    index = index.expand(n, *size)
    values = labels.flatten(1).gather(1, index.flatten(1)).view(n, *size)
    if border:
        return values
    background = labels.flatten(1).amax(1).clamp(max=0).view(n, *(1,) * dims)  # -1 where nothing is labelled
    return torch.where(outside, background, values)
