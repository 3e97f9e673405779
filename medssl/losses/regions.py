"""Where the regions of a local contrastive loss lie, and which of them repel each other.

A corner is the first voxel of a region: the region covers ``corner .. corner + region_size - 1`` on every axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError


def region_corners(spatial: Sequence[int], region_size: int = 3) -> Tensor:
    """Corners spread over a feature map: the 13 of the paper in 2D, 35 in 3D.

    Chaitanya et al. 2020 (arXiv:2006.10511) as their program places them: with m the last position used on an axis,
    the grid {0, m/2, m} on every axis and {m/4, 3m/4} on every axis between, divisions rounded down. m is the axis
    length minus 1 for single voxels and minus (region_size + 1) for larger regions (length - 4 for 3 x 3).
    Corners that coincide on a small map are kept once.

    Args:
        spatial: Size of the map, 2 or 3 axes, each at least ``region_size``.
        region_size: Voxels on a side.

    Returns:
        int64 (R, dims).

    Raises:
        ShapeError: The map is smaller than a region, or has neither 2 nor 3 axes.
    """
    if len(spatial) not in (2, 3) or region_size < 1 or min(spatial) < region_size:
        raise ShapeError(
            "a feature map needs 2 or 3 axes, each at least as long as a region",
            found=f"map {tuple(spatial)}, region_size {region_size}",
            fix="use more decoder blocks (a finer map) or a smaller region",
        )
    last = [max(size - (1 if region_size == 1 else region_size + 1), 0) for size in spatial]
    corners = [*product(*((0, m // 2, m) for m in last)), *product(*((m // 4, 3 * m // 4) for m in last))]
    return torch.tensor(list(dict.fromkeys(corners)), dtype=torch.int64)


def nearest_negatives(corners: Tensor, n: int) -> Tensor:
    """The ``n`` nearest other corners of each corner (Euclidean, in voxels; ties by their order).

    The paper's program uses a table of about the 5 nearest in LR and 4 in LD; its text says all others.

    Args:
        corners: int64 (R, dims).
        n: At least 1, below R.

    Returns:
        int64 (R, n, dims).

    Raises:
        InputError: There are not that many other corners.
    """
    if not 1 <= n < len(corners):
        raise InputError(
            "each region needs that many other regions",
            found=f"n {n}, {len(corners)} regions",
            fix=f"choose n from 1 to {len(corners) - 1}, or None for all others",
        )
    distance = (corners[:, None] - corners[None, :]).square().sum(-1).double()
    distance.fill_diagonal_(torch.inf)
    return corners[distance.sort(dim=1, stable=True).indices[:, :n]]


def all_others(corners: Tensor) -> Tensor:
    """All other corners of each corner, int64 (R, R - 1, dims): what ``negatives=None`` means, written out."""
    r = len(corners)
    other = ~torch.eye(r, dtype=torch.bool)
    return corners.expand(r, r, -1)[other].reshape(r, r - 1, -1)
