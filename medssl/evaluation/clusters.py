"""How clusters found without labels compare with what is known of the items, and how evenly they are filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from medssl.core.errors import InputError, ShapeError
from medssl.core.types import Ints

MANY_VALUES: Final = 20
"""A column of numbers with more distinct values is compared in groups, as each value for itself would be a class."""
GROUPS: Final = 10


@dataclass(frozen=True)
class ClusterQuality:
    """Agreement of two groupings of the same items; NaN where fewer than two items have both.

    Attributes:
        nmi: Normalised mutual information, in [0, 1]: divided by the mean of both entropies. It grows with the number
            of clusters, whatever they are.
        ami: Adjusted for chance (Vinh et al. 2010, JMLR 11:2837): 1 for equal groupings, 0 on average for random ones.
        ari: Adjusted Rand index (Hubert & Arabie 1985, J. Classif. 2:193): pairs that both groupings join or part,
            adjusted likewise.
        n: Items that were compared.
        n_missing: Items without a cluster or without a reference value, which were left out.
    """

    nmi: float
    ami: float
    ari: float
    n: int
    n_missing: int


def cluster_quality(labels: npt.ArrayLike, reference: npt.ArrayLike) -> ClusterQuality:
    """Compare clusters with a grouping that is known.

    Args:
        labels: Integers (n,); negative: the item has no cluster.
        reference: (n,), see `reference_groups`.

    Raises:
        ShapeError: Not two vectors of one length.
        InputError: Labels that are no integers.
    """
    found, known = _labels(labels), reference_groups(reference)
    if found.shape != known.shape:
        raise ShapeError("clusters and references differ in number", found=f"{found.shape} and {known.shape}")
    both = (found >= 0) & (known >= 0)
    n = int(both.sum())
    if n < 2:
        return ClusterQuality(float("nan"), float("nan"), float("nan"), n, len(found) - n)
    pair = (known[both], found[both])
    return ClusterQuality(
        nmi=float(normalized_mutual_info_score(*pair)),
        ami=float(adjusted_mutual_info_score(*pair)),
        ari=float(adjusted_rand_score(*pair)),
        n=n,
        n_missing=len(found) - n,
    )


def cluster_balance(labels: npt.ArrayLike, k: int) -> tuple[float, int]:
    """How evenly items fill ``k`` clusters.

    Args:
        labels: Integers (n,) below ``k``; negative: the item has no cluster.
        k: At least 1.

    Returns:
        Entropy of the shares of the clusters divided by log k (1: all equally large, 0: all items in one; NaN: no item
        has a cluster), and the number of empty clusters.

    Raises:
        ShapeError: Not a vector.
        InputError: Labels that are no integers or not below ``k``.
    """
    found = _labels(labels)
    found = found[found >= 0]
    if k < 1 or (len(found) and found.max() >= k):
        raise InputError("a label names a cluster that does not exist", found=f"{found.max(initial=-1)}, {k} clusters")
    counts = np.bincount(found, minlength=k)
    n_empty = int((counts == 0).sum())
    if len(found) == 0:
        return float("nan"), n_empty
    shares = counts[counts > 0] / len(found)
    return (float(-(shares * np.log(shares)).sum() / np.log(k)) if k > 1 else 1.0), n_empty


def reference_groups(reference: npt.ArrayLike) -> Ints:
    """Codes 0, 1, ... of the values of a column, -1 where one is missing.

    Args:
        reference: (n,) numbers with NaN for missing ones, codes with negative ones for missing, or text with None. Of
            more than 20 distinct numbers (an age) ten groups of equally many items are made.

    Raises:
        ShapeError: Not a vector.
    """
    values = np.asarray(reference)
    if values.ndim != 1:
        raise ShapeError("a reference is one value for each item", found=str(values.shape))
    if values.dtype.kind == "f":
        missing = ~np.isfinite(values)
    elif values.dtype.kind in "iu":
        missing = values < 0
    else:
        missing = np.array([value is None or value != value for value in values.tolist()], dtype=bool)
        values = np.array([str(value) for value in values.tolist()])
    codes = np.full(len(values), -1, dtype=np.int64)
    distinct, own = np.unique(values[~missing], return_inverse=True)
    if values.dtype.kind == "f" and len(distinct) > MANY_VALUES:
        edges = np.quantile(values[~missing], np.arange(1, GROUPS) / GROUPS)
        own = np.searchsorted(edges, values[~missing], side="right")
    codes[~missing] = own
    return codes


def _labels(labels: Any) -> Ints:
    found = np.asarray(labels)
    if found.ndim != 1:
        raise ShapeError("clusters are one label for each item", found=str(found.shape))
    if found.dtype.kind not in "iu":
        raise InputError("clusters are integers", found=str(found.dtype))
    return found.astype(np.int64)
