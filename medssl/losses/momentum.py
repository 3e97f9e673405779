"""Losses against a slowly moving teacher: contrast with a queue of its keys (MoCo), and agreement alone (BYOL)."""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.losses.numerics import (
    check_float,
    check_paired,
    check_temperature,
    exact_float32,
    excess,
    unit,
    warn_if,
    widen,
)


def queue_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.2, negative_mask: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against their own key and a queue of earlier keys.

    He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), Eq. (1).
    With unit rows, item i contributes -log of e^(q k / T) over the sum of e^(q k / T) and, for each queue row m that
    may be a negative, e^(q Q[m] / T); the mean is over the N items. Other items of the batch are no negatives.

    Args:
        query: (N, D) float. Raw embeddings of one view; the only input with a gradient.
        key: (N, D) float. Raw embeddings of the other view by the teacher; row i of both is the same item.
        queue: (K, D) float, unit rows, taken as they are.
        temperature: Above 0, dimensionless (MoCo v1: 0.07; v2: 0.2).
        negative_mask: (N, K) bool, true where a queue row may be a negative of an item; None: everywhere.

    Returns:
        Scalar in float32 or wider, in nats. An item without negatives contributes 0 and is counted.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: The temperature is not positive, tensors are not floating, or the mask is not boolean.
    """
    check_float("query", query, "(N, D)", 2)
    check_float("queue", queue, "(K, D)", 2)
    check_paired("query", query, "key", key)
    check_temperature(temperature)
    if queue.shape[1] != query.shape[1]:
        raise ShapeError("queue and query must be equally long", found=f"{queue.shape[1]} and {query.shape[1]}")
    if negative_mask is not None:
        expected = (len(query), len(queue))
        if negative_mask.shape != expected:
            raise ShapeError(f"negative_mask must be (N, K), {expected}", found=str(tuple(negative_mask.shape)))
        if negative_mask.dtype != torch.bool:
            raise InputError("negative_mask must be boolean", found=str(negative_mask.dtype))
    with exact_float32(query.device):
        q = unit(query) / temperature
        positive = (q * unit(key.detach())).sum(1)  # (N,)
        similarity = q @ widen(queue.detach()).to(q.dtype).T  # (N, K)
        return excess(_log_sum_exp(similarity, negative_mask), positive).mean()


def _log_sum_exp(similarity: Tensor, negatives: Tensor | None) -> Tensor:
    """LSE over the negatives of each row (N, K); -inf without gradient where there are none."""
    if negatives is None:
        return similarity.logsumexp(1)
    found = negatives.any(1)
    warn_if(~found.any(), "no item has a negative in the queue: the loss is 0 with gradient 0")
    # A row of -inf alone would have gradient NaN: such rows stay whole here and are selected out below.
    total = similarity.masked_fill(~negatives & found[:, None], -torch.inf).logsumexp(1)
    return torch.where(found, total, -torch.inf)


def byol(p1: Tensor, p2: Tensor, target1: Tensor, target2: Tensor) -> Tensor:
    """Squared distance of the prediction from each view to the teacher's projection of the other view.

    Grill et al. 2020, "Bootstrap your own latent" (arXiv:2006.07733), Eq. (2): with unit rows,
    |p1 - target2|^2 + |p2 - target1|^2, the mean over items of the sum of both directions (no half of it).

    Args:
        p1: (N, D) float. Raw predictions from view 1.
        p2: (N, D) float. Raw predictions from view 2; row i of all four is the same item.
        target1: (N, D) float. The teacher's raw projections of view 1; no gradient goes there.
        target2: (N, D) float. The teacher's raw projections of view 2; no gradient goes there.

    Returns:
        Scalar in float32 or wider, from 0 to 8; 4 where predictions are at right angles to their targets.

    Raises:
        ShapeError: Shapes differ or are not (N, D).
        InputError: The tensors are not floating.
    """
    check_float("p1", p1, "(N, D)", 2)
    for name, x in (("p2", p2), ("target1", target1), ("target2", target2)):
        check_float(name, x, "(N, D)", 2)
        check_paired("p1", p1, name, x)
    with exact_float32(p1.device):
        first = unit(p1) - unit(target2.detach())
        second = unit(p2) - unit(target1.detach())
        return first.square().sum(1).mean() + second.square().sum(1).mean()
