"""Regions of an image and how strong the boundaries between them are.

A watershed of boundary strengths (Beucher & Lantuejoul 1979) gives more regions than an image has parts. Crumbs are
joined to their neighbours until at most 40 regions are left, the finest level of a tree; the tree above it follows the
rule of ultrametric contour maps (`medssl.core.merging.merge_order`). By that rule alone two large regions that touch
through some gap in the boundary would join early, and most of the 40 would be crumbs on the boundary itself.

Where the learned edges of Zhang & Maire 2020 (arXiv:2012.03044) would be, the strength is **a stand-in: the magnitude
of the image's gradient**, or whatever boundaries the manifest supplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat
from scipy import ndimage
from skimage.morphology import local_minima
from skimage.segmentation import watershed

from medssl.core.merging import components, merge_order, pairwise_heights
from medssl.core.schema import StrictModel

REGION_MAP: Final = "region_map"
"""What a method names among its needs: label maps of its batches are then maps of regions, 1 to R, 0 outside."""
HEIGHTS: Final = "region_heights"
"""Label of every item beside it: (max_regions^2,) float32, row a - 1, column b - 1: height at which a and b join."""
STRONGEST: Final = 99.0
"""Percentile of an item's positive gradients that counts as strength 1."""

CROWD: Final = 50
"""Basins per region wanted; of more, the smallest are flooded from the others at once, several times faster."""

Floats = npt.NDArray[np.float64]


class RegionsConfig(StrictModel):
    """How regions are found."""

    max_regions: Annotated[int, Field(ge=2, le=255)] = 40
    """Regions of an item at the finest level of its tree, at most (Zhang & Maire 2020: 40)."""
    smoothing: NonNegativeFloat = 1.0
    """Standard deviation, in voxels, of the Gaussian before the gradient is taken [ours]; supplied boundaries are used
    as they are."""
    boundaries: str | None = None
    """Column of the manifest that names a map of boundary strengths, 0 to 1, on the grid of each image (.nii, .nii.gz,
    .npy, .mha, .nrrd), from a trained edge detector for example; null: the magnitude of the gradient stands in."""
    heights: Literal["relative", "strength"] = "relative"
    """strength: regions are as far apart as the mean boundary strength at which they join (Zhang & Maire 2020, whose
    learned edges are calibrated). relative [ours]: the same divided by the height of the item's root, because gradients
    are not calibrated."""


@dataclass(frozen=True)
class Regions:
    """The finest regions of one item.

    Attributes:
        map: uint8 ``(*spatial)``, regions numbered 1 to ``n_regions``.
        edges: (E, 4) rows (a, b, strength sum, length) of neighbours, numbered from 0; the length is that of the
            boundary in mm (its area in mm^2 in 3D), the sum is of strength times length.
        n_regions: 1 where nothing divides the item.
    """

    map: npt.NDArray[np.uint8]
    edges: Floats
    n_regions: int

    def heights(self, kind: Literal["relative", "strength"] = "strength") -> Floats:
        """How far apart each pair of regions is, (n_regions, n_regions); see `RegionsConfig.heights`."""
        merges = merge_order(self.edges, self.n_regions)
        if kind == "relative" and len(merges) and merges[-1, 2] > 0:
            merges[:, 2] /= merges[-1, 2]
        return pairwise_heights(merges, self.n_regions)


def gradient_strength(
    image: npt.NDArray[Any], spacing: Sequence[float], *, smoothing: float = 1.0
) -> npt.NDArray[np.float32]:
    """Magnitude of the gradient, 0 to 1: a stand-in for learned boundaries.

    Args:
        image: (C, *spatial); of several channels the steepest counts at each voxel.
        spacing: Voxel size in mm, one per axis.
        smoothing: Standard deviation of a Gaussian before, in voxels.

    Returns:
        float32 (*spatial): 1 at and above the 99th percentile of the positive values, 0 everywhere where nothing
        changes.
    """
    steepest = np.zeros(image.shape[1:], dtype=np.float64)
    axes = [axis for axis in range(image.ndim - 1) if image.shape[axis + 1] > 1]
    for channel in image:
        smooth = ndimage.gaussian_filter(np.asarray(channel, dtype=np.float64), smoothing, mode="nearest")
        squares = sum((np.gradient(smooth, spacing[axis], axis=axis) ** 2 for axis in axes), np.zeros_like(steepest))
        # One channel's units are not another's.
        np.maximum(steepest, _scaled(np.sqrt(squares)), out=steepest)
    return steepest.astype(np.float32)


def _scaled(magnitude: Floats) -> Floats:
    positive = magnitude[magnitude > 0]
    return np.clip(magnitude / np.percentile(positive, STRONGEST), 0, 1) if len(positive) else magnitude


def find_regions(strength: npt.NDArray[Any], spacing: Sequence[float], *, max_regions: int = 40) -> Regions:
    """Watershed of boundary strengths, then crumbs are joined until at most ``max_regions`` are left.

    The strength between two neighbouring voxels is the larger of theirs. The two neighbours are joined whose mean
    boundary strength times the size of the smaller is least.

    Args:
        strength: (*spatial), finite, at least 0.
        spacing: Voxel size in mm, one per axis.
        max_regions: At most 255.
    """
    # Neighbours share a face, for minima too: a boundary one voxel thin must not leak at its corners.
    minima, n_minima = ndimage.label(local_minima(strength, connectivity=1))
    if n_minima == 0:  # one level everywhere
        return Regions(np.ones(strength.shape, np.uint8), np.zeros((0, 4)), 1)
    basins = watershed(strength, minima)
    if n_minima > CROWD * max_regions:
        size = np.bincount(basins.ravel(), minlength=n_minima + 1)
        kept = np.sort(np.argsort(-size[1:], kind="stable")[: CROWD * max_regions]) + 1
        number = np.zeros(n_minima + 1, dtype=np.int32)
        number[kept] = np.arange(1, len(kept) + 1)
        basins = watershed(strength, number[minima])
    basins = basins.astype(np.int64) - 1
    n_basins = int(basins.max()) + 1
    edges = adjacency(basins, strength, spacing)
    order = merge_order(edges, n_basins, down_to=max_regions, sizes=np.bincount(basins.ravel()))
    joined = components(order, n_basins)
    regions = joined[basins]
    return Regions((regions + 1).astype(np.uint8), adjacency(regions, strength, spacing), int(joined.max()) + 1)


def adjacency(regions: npt.NDArray[np.int64], strength: npt.NDArray[Any], spacing: Sequence[float]) -> Floats:
    """Neighbouring regions as rows (a, b, strength sum, length), a < b, sorted; see `Regions`."""
    n = int(regions.max()) + 1
    keys, weights, lengths = [], [], []
    for axis in range(regions.ndim):
        before, after = (_cut(regions, axis, part) for part in (slice(None, -1), slice(1, None)))
        differ = before != after
        one, other = before[differ], after[differ]
        level = np.maximum(_cut(strength, axis, slice(None, -1)), _cut(strength, axis, slice(1, None)))[differ]
        face = float(np.prod(spacing)) / spacing[axis]
        keys.append(np.minimum(one, other) * n + np.maximum(one, other))
        weights.append(level.astype(np.float64) * face)
        lengths.append(np.full(len(one), face))
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    total, length = (np.bincount(place, np.concatenate(values), len(pairs)) for values in (weights, lengths))
    return np.stack([pairs // n, pairs % n, total, length], axis=1)


def _cut(array: npt.NDArray[Any], axis: int, part: slice) -> npt.NDArray[Any]:
    return array[(slice(None),) * axis + (part,)]
