"""Swapped prediction: each view predicts the cluster codes of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.losses.numerics import check_float, check_temperature, exact_float32, unit
from medssl.losses.sinkhorn import check_sinkhorn, sinkhorn_knopp


def swav(
    z: Tensor,
    prototypes: Tensor,
    *,
    assign_views: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between the code of one view and what every other view predicts.

    Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
    (arXiv:2006.09882), Eqs. (1), (2) and (6). With u and c the unit rows of ``z`` and ``prototypes``, S^v = u^v c^T and
    q^a the codes that `sinkhorn_knopp` gives for S^a, without gradient:

        mean over a in assign_views, v != a and items of: - sum over k of q^a[k] log softmax_k(S^v / temperature)

    The paper writes the sum over views; this is the mean, as in the authors' program. Rows of a queue take part in the
    assignment only, scored by the prototypes as they are now.

    Args:
        z: (N, V, D) float, projections of V views; need not be unit length.
        prototypes: (K, D) float; need not be unit length.
        assign_views: Views whose codes are predicted.
        temperature: Above 0, dimensionless; of the predictions.
        epsilon: Above 0, in cosines; of the codes.
        iterations: Of Sinkhorn-Knopp.
        queue: (A, Q, D) float, earlier embeddings of each assigning view; need not be unit length. No gradient.

    Returns:
        Scalar in float32 or wider, in nats; log K when no prototype is preferred.

    Raises:
        ShapeError: Shapes other than the above, or one view alone.
        InputError: A view that does not exist or is named twice, or settings that are out of range.
    """
    assign = _checked(z, prototypes, assign_views, queue)
    check_temperature(temperature)
    check_sinkhorn(epsilon, iterations)
    n, views, _ = z.shape
    with exact_float32(z.device):
        centres = unit(prototypes)
        scores = unit(z) @ centres.T  # (N, V, K)
        predicted = torch.log_softmax(scores / temperature, dim=2)
        everywhere = predicted.sum(1)
        total = scores.new_zeros(())
        for number, view in enumerate(assign):
            known = scores[:, view].detach()
            if queue is not None:
                known = torch.cat([known, unit(queue[number].detach()).to(known) @ centres.detach().T])
            codes = sinkhorn_knopp(known, epsilon=epsilon, iterations=iterations)[:n]
            total = total - (codes * (everywhere - predicted[:, view])).sum()
        return total / (len(assign) * (views - 1) * n)


def _checked(z: Tensor, prototypes: Tensor, assign_views: Sequence[int], queue: Tensor | None) -> tuple[int, ...]:
    check_float("z", z, "(N, V, D)", 3)
    check_float("prototypes", prototypes, "(K, D)", 2)
    views, assign = z.shape[1], tuple(assign_views)
    if views < 2:
        raise ShapeError("swapped prediction needs at least 2 views", found=f"z {tuple(z.shape)}")
    if prototypes.shape[1] != z.shape[2]:
        raise ShapeError(
            "prototypes must be as long as the projections",
            found=f"prototypes {tuple(prototypes.shape)}, z {tuple(z.shape)}",
        )
    if not assign or len(set(assign)) != len(assign) or not all(0 <= view < views for view in assign):
        raise InputError(f"assign_views must name different views from 0 to {views - 1}", found=str(assign))
    if queue is not None:
        check_float("queue", queue, "(A, Q, D)", 3)
        if queue.shape[0] != len(assign) or queue.shape[2] != z.shape[2]:
            raise ShapeError(
                "the queue must hold rows of every assigning view",
                found=str(tuple(queue.shape)),
                fix=f"({len(assign)}, Q, {z.shape[2]})",
            )
    return assign
