"""Clusters of voxels against labels, against another view of the same image, and against an image without content.

Everything about labels is computed from tables of counts: ``counts[k, c]`` voxels of cluster k with label c. Counts of
several volumes add up; clusters are matched to classes on one set of people and scored on another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from medssl.core.errors import InputError, ShapeError

Ints = npt.NDArray[np.int64]
Matching = Literal["hungarian", "many_to_one"]


@dataclass(frozen=True)
class ClusterScores:
    """How well matched clusters are the classes.

    Attributes:
        iou: Per class |A and B| / (|A| + |B| - |A and B|); NaN where neither clusters nor labels hold it.
        recall: Per class the share of its voxels that are found; NaN where the labels do not hold it.
        miou: Mean of ``iou`` over the classes that are there.
        class_accuracy: Class-normalised accuracy: mean of ``recall`` over the classes that are there.
        accuracy: Share of all labelled voxels that are right: of a set with much background, mostly background.
        n_voxels: Labelled voxels.
        left_out: Classes that neither side holds.
    """

    iou: tuple[float, ...]
    recall: tuple[float, ...]
    miou: float
    class_accuracy: float
    accuracy: float
    n_voxels: int
    left_out: int


@dataclass(frozen=True)
class Invariance:
    """Whether a place has the same cluster in two views of it.

    Attributes:
        agreement: Share of the places seen in both views that do; NaN where there are none.
        chance: What independent clusters of the same frequencies would give.
        kappa: (agreement - chance) / (1 - chance): 0 at chance, 1 for always; 0 where there is one cluster only, which
            says nothing.
        n_places: Seen in both.
    """

    agreement: float
    chance: float
    kappa: float
    n_places: int


@dataclass(frozen=True)
class BlankCheck:
    """Clusters of an image of one intensity, which should be one: what differs comes from the border, not the image.

    Attributes:
        n_clusters: That appear.
        minority_share: Share of the map outside the most frequent cluster; 0 is right.
        reach: How far in the border is felt, in voxels of the map: depth of the innermost voxel whose cluster is not
            that of the centre, counted from 1; 0 where all are the same.
        depth: Of the centre, counted alike: the most that ``reach`` can be.
    """

    n_clusters: int
    minority_share: float
    reach: int
    depth: int


def cluster_counts(clusters: npt.NDArray[Any], labels: npt.NDArray[Any], k: int, n_classes: int) -> Ints:
    """Voxels of each cluster with each label.

    Args:
        clusters: Integers from 0 to k - 1, any shape.
        labels: Integers from 0 to n_classes - 1 of the same shape; negative: unlabelled, left out.
        k: Clusters.
        n_classes: Classes, with the background.

    Returns:
        int64 (k, n_classes).

    Raises:
        ShapeError: The shapes differ.
        InputError: A cluster or a label beyond its number.
    """
    if clusters.shape != labels.shape:
        raise ShapeError("clusters and labels differ in shape", found=f"{clusters.shape} and {labels.shape}")
    keep = labels >= 0
    found, true = clusters[keep].astype(np.int64), labels[keep].astype(np.int64)
    for name, values, n in (("cluster", found, k), ("label", true, n_classes)):
        if values.size and not 0 <= values.min() <= values.max() < n:
            raise InputError(f"a {name} outside 0 to {n - 1}", found=f"{values.min()} to {values.max()}")
    return np.bincount(found * n_classes + true, minlength=k * n_classes).reshape(k, n_classes).astype(np.int64)


def match_clusters(counts: Ints, how: Matching) -> Ints:
    """The class of each cluster.

    Args:
        counts: (k, n_classes), of the people on whom clusters are matched: never those that are scored.
        how: "hungarian": one cluster for each class so that most voxels are right (Kuhn 1955), for as many clusters as
            classes (Ji et al. 2019, arXiv:1807.06653, section 4.1); of more clusters the rest stay without a class, of
            fewer some classes are never found. "many_to_one": every cluster its most frequent class, the first one of
            equals; a cluster without voxels has none.

    Returns:
        int64 (k,), -1 for a cluster without a class.
    """
    result: Ints = np.full(len(counts), -1, dtype=np.int64)
    if how == "hungarian":
        clusters, classes = linear_sum_assignment(counts, maximize=True)
        result[clusters] = classes
        return result
    return np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), -1).astype(np.int64)


def score_clusters(counts: Ints, matching: Ints) -> ClusterScores:
    """Scores of clusters whose classes are known.

    Args:
        counts: (k, n_classes), of the people who are scored.
        matching: (k,), from `match_clusters`; voxels of clusters without a class are wrong for every class.

    Raises:
        ShapeError: The numbers of clusters differ.
        InputError: No labelled voxel.
    """
    if len(counts) != len(matching):
        raise ShapeError("counts and matching differ in clusters", found=f"{len(counts)} and {len(matching)}")
    if counts.sum() == 0:
        raise InputError("no labelled voxel to score")
    n_classes = counts.shape[1]
    confusion = np.zeros((n_classes, n_classes), dtype=np.int64)  # predicted class, label
    known = matching >= 0
    np.add.at(confusion, matching[known], counts[known])
    right, true = confusion.diagonal(), counts.sum(axis=0)
    either = confusion.sum(axis=1) + true - right
    with np.errstate(invalid="ignore"):
        iou, recall = right / either, right / true
    return ClusterScores(
        iou=tuple(map(float, iou)),
        recall=tuple(map(float, recall)),
        miou=float(np.nanmean(iou)),
        class_accuracy=float(np.nanmean(recall)),
        accuracy=float(right.sum() / true.sum()),
        n_voxels=int(true.sum()),
        left_out=int((either == 0).sum()),
    )


def invariance(pairs: Ints) -> Invariance:
    """How far clusters are the same in two views.

    Args:
        pairs: (k, k) places of cluster k in one view and of cluster l in the other (`cluster_counts` of both, -1 where
            a place is not seen in both); pairs of several images add up.
    """
    n = int(pairs.sum())
    if n == 0:
        return Invariance(float("nan"), float("nan"), float("nan"), 0)
    agreement = float(pairs.trace() / n)
    chance = float(pairs.sum(axis=1) / n @ (pairs.sum(axis=0) / n))
    return Invariance(agreement, chance, (agreement - chance) / (1 - chance) if chance < 1 else 0.0, n)


def blank_check(clusters: npt.NDArray[Any]) -> BlankCheck:
    """How an image of one intensity is split into clusters.

    Args:
        clusters: Integers on the map of such an image, one or more axes.

    Raises:
        ShapeError: An empty map.
    """
    if clusters.size == 0 or clusters.ndim == 0:
        raise ShapeError("a map needs one or more axes, none of them empty", found=str(clusters.shape))
    _, counts = np.unique(clusters, return_counts=True)
    depths = [np.minimum(np.arange(n), np.arange(n)[::-1]) + 1 for n in clusters.shape]
    depth = np.minimum.reduce(np.meshgrid(*depths, indexing="ij"))
    centre = clusters[tuple(n // 2 for n in clusters.shape)]
    other = depth[clusters != centre]
    return BlankCheck(
        n_clusters=len(counts),
        minority_share=float(1 - counts.max() / clusters.size),
        reach=int(other.max()) if other.size else 0,
        depth=int(depth.max()),
    )


def miou_interval(
    counts: Ints, matching: Ints, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the mIoU over people, who are drawn with replacement.

    Args:
        counts: (people, k, n_classes), all voxels of a person added up.
        matching: (k,), fixed.
        n_resamples: Draws.
        level: Share of draws inside.
        seed: Of the draws.

    Returns:
        Low and high; None for fewer than two people.
    """
    if len(counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=n_resamples)
    sums = np.tensordot(draws, counts, axes=1)  # (resamples, k, n_classes)
    values = [score_clusters(one, matching).miou for one in sums]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
