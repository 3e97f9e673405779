"""Region trees: neighbouring regions are joined one pair after the other, weakest boundary first."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.core.errors import InputError, ShapeError

Floats = npt.NDArray[np.float64]


def merge_order(
    edges: npt.ArrayLike, n_regions: int, *, down_to: int = 1, sizes: npt.ArrayLike | None = None
) -> Floats:
    """Greedy merging by the length-weighted mean strength of the boundary between two regions.

    Zhang & Maire 2020 (arXiv:2012.03044) merge as ultrametric contour maps do (Arbelaez et al. 2011,
    doi:10.1109/TPAMI.2010.161): the neighbours with the smallest mean strength (sum over length) are joined; boundaries
    that then separate the same two regions become one, sums and lengths added. A mean of numbers is at least the
    smallest of them, so the heights of successive merges never fall. The same edges give the same tree, equal means
    included. Costs O(E log E log R) for E edges and R regions.

    Args:
        edges: (E, 4) rows (a, b, strength sum, length); a pair may have several rows, which are added. Strengths at
            least 0, lengths above 0.
        n_regions: Regions are numbered 0 to n_regions - 1.
        down_to: Stop at so many regions.
        sizes: (n_regions,) above 0: the mean strength times the size of the smaller region decides instead, so that
            crumbs are joined before parts. Only the order is of use then: heights are not those of a tree.

    Returns:
        float64 (M, 3) rows (a, b, height) with a < b: merge k joins a and b, which are regions (below n_regions) or
        results of earlier merges, into n_regions + k. M = n_regions - down_to, or less where no neighbours are left.

    Raises:
        ShapeError: ``edges`` is not (E, 4).
        InputError: A region that does not exist or borders on itself, a strength or length out of range.
    """
    rows = _checked(edges, n_regions)
    size = [1.0] * n_regions if sizes is None else np.asarray(sizes, dtype=np.float64).tolist()
    # border[a][b]: strength sum and length. A joined region lives on under the number of the one with more neighbours,
    # so that each boundary moves at most log2(R) times; ``node`` is its number in the tree.
    border: list[dict[int, tuple[float, float]]] = [{} for _ in range(n_regions)]
    for a, b, strength, length in rows.tolist():
        _add(border, int(a), int(b), strength, length)

    def cost(a: int, b: int) -> float:
        strength, length = border[a][b]
        return strength / length * min(size[a], size[b])

    heap = [(cost(a, b), a, b) for a, own in enumerate(border) for b in own if a < b]
    heapq.heapify(heap)
    node, merges, height = list(range(n_regions)), list[tuple[int, int, float]](), 0.0
    while heap and n_regions - len(merges) > down_to:
        known, a, b = heapq.heappop(heap)
        if b not in border[a]:
            continue  # one of the two was joined with a third
        now = cost(a, b)
        if now != known:
            if now > known:  # a region has grown; where a boundary became weaker, its new cost is in the heap
                heapq.heappush(heap, (now, a, b))
            continue
        kept, gone = (a, b) if len(border[a]) >= len(border[b]) else (b, a)
        height = max(height, now)  # a mean may fall by a rounding
        merges.append((min(node[a], node[b]), max(node[a], node[b]), height))
        node[kept] = n_regions + len(merges) - 1
        if sizes is not None:
            size[kept] += size[gone]
        del border[kept][gone], border[gone][kept]
        for other, (strength, length) in border[gone].items():
            del border[other][gone]
            _add(border, kept, other, strength, length)
            heapq.heappush(heap, (cost(kept, other), min(kept, other), max(kept, other)))
        border[gone] = {}
    return np.array(merges, dtype=np.float64).reshape(-1, 3)


def _add(border: list[dict[int, tuple[float, float]]], a: int, b: int, strength: float, length: float) -> None:
    """Lengthen the boundary between two regions."""
    before = border[a].get(b, (0.0, 0.0))
    border[a][b] = border[b][a] = (before[0] + strength, before[1] + length)


def _checked(edges: Any, n_regions: int) -> Floats:
    rows = np.asarray(edges, dtype=np.float64)
    if rows.size == 0:
        rows = rows.reshape(0, 4)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ShapeError("edges must be (E, 4): a, b, strength sum, length", found=str(rows.shape))
    if n_regions < 1:
        raise InputError("a region tree needs at least one region", found=str(n_regions))
    a, b = rows[:, 0], rows[:, 1]
    numbers = rows[:, :2]
    bad = ~((numbers >= 0) & (numbers < n_regions) & (numbers == np.floor(numbers))).all(1) | (a == b)
    _refuse(bad, rows, f"an edge must join two different regions of 0 to {n_regions - 1}")
    bad = ~(np.isfinite(rows[:, 2:]).all(1) & (rows[:, 2] >= 0) & (rows[:, 3] > 0))
    _refuse(bad, rows, "an edge needs a strength sum of at least 0 and a length above 0, both finite")
    return rows


def _refuse(bad: npt.NDArray[np.bool_], rows: Floats, message: str) -> None:
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise InputError(message, where=f"edge {first}", found=str(rows[first].tolist()))


def components(merges: Floats, n_regions: int) -> npt.NDArray[np.int64]:
    """Joined region of each of the ``n_regions`` after all ``merges``, numbered 0, 1, ... as they first occur."""
    parent = np.arange(n_regions + len(merges))
    for k, (a, b, _) in enumerate(merges):
        parent[[int(a), int(b)]] = n_regions + k
    for node in range(len(parent) - 1, -1, -1):  # a parent has a higher number than its children
        parent[node] = parent[parent[node]]
    _, first, place = np.unique(parent[:n_regions], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[place.reshape(-1)]


def pairwise_heights(merges: Floats, n_regions: int) -> Floats:
    """Height at which each pair of regions is joined, (n_regions, n_regions): 0 on the diagonal, infinity if never."""
    heights = np.full((n_regions, n_regions), np.inf)
    np.fill_diagonal(heights, 0.0)
    members: list[npt.NDArray[np.int64]] = [np.array([region]) for region in range(n_regions)]
    for a, b, height in merges:
        one, other = members[int(a)], members[int(b)]
        heights[np.ix_(one, other)] = height
        heights[np.ix_(other, one)] = height
        members.append(np.concatenate([one, other]))
    return heights
