r"""Pseudo-labels from a whole training set (optimal transport, k-means), and the loss of predicting them.

``sela_assignment`` and ``k_means`` are called between steps, a few dozen times in a training, without gradient.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.losses.numerics import check_finite, check_float, check_temperature, exact_float32, unit, widen

log = logging.getLogger(__name__)
_CHUNK = 1 << 24
"""Most similarities of items and centroids that are held at once."""


def cluster_cross_entropy(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of predicting each head's pseudo-labels, averaged over views and heads, one value per item.

    Asano et al. 2020, "Self-labelling via simultaneous clustering and representation learning" (arXiv:1911.05371),
    Eq. (1), with the mean over heads of the authors' program (the paper prints a sum). Not averaged over items, so
    that processes exchange one number an item.

    Args:
        logits: (N, V, H, K) float: of V views, for H heads.
        labels: (N, H) int64 in [0, K); -1 is an item without label, whose loss is NaN.
        temperature: Above 0; divides the logits.

    Returns:
        (N,) in nats; log K for equal logits.

    Raises:
        ShapeError: The shapes do not fit.
        InputError: A temperature that is not positive.
    """
    check_float("logits", logits, "(N, V, H, K)", 4)
    check_temperature(temperature)
    if labels.shape != (logits.shape[0], logits.shape[2]):
        expected = (logits.shape[0], logits.shape[2])
        raise ShapeError(f"labels must be (N, H), {expected}", found=str(tuple(labels.shape)))
    with exact_float32(logits.device):
        surprise = -(widen(logits) / temperature).log_softmax(3)
        places = labels.clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        picked = surprise.gather(3, places).squeeze(3).mean(1)  # (N, H)
        return torch.where(labels >= 0, picked, torch.nan).mean(1)


@torch.no_grad()
def sela_assignment(
    logits: Tensor, *, lamb: float = 25.0, tolerance: float = 1e-6, max_iterations: int = 10_000
) -> Tensor:
    r"""Soft labels of every item under equally large clusters: entropic optimal transport.

    Asano et al. 2020 (arXiv:1911.05371), Eqs. (6) to (9): with P = softmax(logits), the Q of least
    :math:`\langle Q, -\log P\rangle + \frac1\lambda KL(Q \Vert \frac{1}{NK})` whose rows sum to 1/N and columns to
    1/K, :math:`Q = diag(\beta) P^\lambda diag(\alpha)`. Sinkhorn's iteration is done in the log domain and float64:
    :math:`P^{25}` underflows float32 below P = 0.03. It ends with the items' step, so rows are exact and columns as
    near as the iteration came. The authors' program stops where the relative changes of all items sum to 0.1.

    Args:
        logits: (N, K) float, N at least K.
        lamb: Above 0; the larger, the nearer to a hard assignment, and the slower.
        tolerance: Ends when no entry of beta changes by more than this, relatively.
        max_iterations: Ends anyway, and says so in the log.

    Returns:
        Q (N, K) float64; rows sum to 1/N. Labels are the argmax of its rows, which is nearly balanced only.

    Raises:
        ShapeError: Not a matrix.
        InputError: Fewer items than clusters, logits that are not finite, a parameter out of range.
    """
    check_float("logits", logits, "(N, K)", 2)
    check_finite("logits", logits, "the network diverged, or an item holds NaN")
    if not (lamb > 0 and math.isfinite(lamb)):
        raise InputError("lamb must be a positive number", found=str(lamb), fix="25 is usual")
    if not tolerance > 0 or max_iterations < 1:
        raise InputError(
            "tolerance must be positive and max_iterations at least 1", found=f"{tolerance}, {max_iterations}"
        )
    n, k = logits.shape
    check_enough(n, k)
    with exact_float32(logits.device):
        m = lamb * logits.double().log_softmax(1)
        beta = m.new_full((n,), -math.log(n))  # logarithms of the paper's alpha and beta
        for _ in range(max_iterations):
            alpha = -math.log(k) - torch.logsumexp(m + beta[:, None], 0)
            before, beta = beta, -math.log(n) - torch.logsumexp(m + alpha, 1)
            change = float((before - beta).expm1().abs().max())
            if change < tolerance:
                break
        else:
            log.info("optimal transport stopped after %d iterations at a change of %.1e", max_iterations, change)
        return (m + alpha + beta[:, None]).exp()


@torch.no_grad()
def k_means(
    rows: Tensor, n_clusters: int, *, iterations: int = 20, seed: int = 0, spherical: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random items, in which no cluster stays empty.

    As DeepCluster uses it (Caron et al. 2018, arXiv:1807.05520, section 3.3): a cluster that runs empty takes the item
    of the largest cluster that is farthest from its centre. Spherical: rows and centroids are of length 1, and the
    nearest centroid is that of the largest cosine (DeepCluster-v2, Caron et al. 2020, arXiv:2006.09882, appendix D).

    Args:
        rows: (n, D) float, n at least n_clusters.
        n_clusters: K.
        iterations: Most updates; ends earlier when labels stay.
        seed: Determines the starting items.
        spherical: See above.

    Returns:
        labels (n,) int64, every one of K used, and centroids (K, D): the (normalised) means of the labelled rows.

    Raises:
        ShapeError: Not a matrix.
        InputError: Fewer rows than clusters, rows that are not finite, no iteration.
    """
    check_float("rows", rows, "(n, D)", 2)
    check_finite("rows", rows, "the network diverged, or an item holds NaN")
    check_enough(len(rows), n_clusters)
    if iterations < 1:
        raise InputError("k-means needs at least one iteration", found=str(iterations))
    with exact_float32(rows.device):
        rows = unit(rows) if spherical else widen(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        centroids = rows[order[:n_clusters].to(rows.device)]
        labels = torch.full((len(rows),), -1, device=rows.device)
        for _ in range(iterations):
            before = labels
            labels, distance = _nearest(rows, centroids)
            _fill_empty(labels, distance, n_clusters)
            if torch.equal(labels, before):
                break
            means = _means(rows, labels, n_clusters)
            centroids = unit(means) if spherical else means
        return labels, centroids


def check_enough(n: int, n_clusters: int) -> None:
    """Refuse fewer items than clusters.

    Raises:
        InputError: Says both numbers.
    """
    if n < n_clusters:
        raise InputError(
            "there are fewer items than clusters",
            found=f"{n} items, {n_clusters} clusters",
            fix=f"use at most {n} clusters; a tenth of the items is a sensible upper limit",
        )


def _chunks(rows: Tensor, n_clusters: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _CHUNK // n_clusters))


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (n,) of each row and the squared distance to it, for unit vectors 2 - 2 cosine (+ 0)."""
    half = centroids.square().sum(1) / 2
    best = [(part @ centroids.T - half).max(1) for part in _chunks(rows, len(centroids))]
    labels, score = torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])
    return labels, rows.square().sum(1) - 2 * score


def _fill_empty(labels: Tensor, distance: Tensor, n_clusters: int) -> None:
    """Give every empty cluster the outermost item of the largest one, in place."""
    sizes = labels.bincount(minlength=n_clusters)
    for empty in (sizes == 0).nonzero().flatten():
        largest = sizes.argmax()
        outermost = torch.where(labels == largest, distance, -torch.inf).argmax()
        labels[outermost] = empty
        sizes[largest] -= 1
        sizes[empty] += 1


def _means(rows: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Mean (K, D) of each cluster's rows; by products, which unlike scattered sums repeat to the bit on any device."""
    sums = rows.new_zeros(n_clusters, rows.shape[1])
    numbers = torch.arange(n_clusters, device=rows.device)
    for part, label in zip(_chunks(rows, n_clusters), _chunks(labels, n_clusters), strict=True):
        sums += (label == numbers[:, None]).to(rows.dtype) @ part
    return sums / labels.bincount(minlength=n_clusters)[:, None]
