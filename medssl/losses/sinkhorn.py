"""Sinkhorn-Knopp: soft assignments of a batch to prototypes that use all prototypes alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medssl.core.errors import InputError
from medssl.losses.numerics import check_float, exact_float32, widen


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes of a batch: each row a distribution over prototypes, every prototype asked for about equally.

    Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
    (arXiv:2006.09882), Eqs. (3) to (5); Cuturi 2013 (arXiv:1306.0895). Q = e^(scores / epsilon); each iteration scales
    the columns to 1 / K and then the rows to 1 / B; the result is B Q. The last step is that of the rows: they sum to
    1 exactly, the columns to B / K only approximately.

    The first iteration runs on logarithms. After it every row sums to 1 and no column to less than 1 / K, so that the
    others neither overflow nor divide by 0, whatever ``epsilon``. They only find one factor per row and column, as
    products of the matrix with a vector.

    Args:
        scores: (B, K) float, similarity of each row to each prototype; cosines in the paper.
        epsilon: Above 0, in units of the scores; small: nearly one-hot codes.
        iterations: At least 1.

    Returns:
        (B, K) in float32 or wider, without gradient.

    Raises:
        ShapeError: ``scores`` is not (B, K), or empty.
        InputError: Not floating, an epsilon that is not positive, or no iteration.
    """
    check_float("scores", scores, "(B, K)", 2)
    check_sinkhorn(epsilon, iterations)
    with exact_float32(scores.device):
        log_q = widen(scores.detach()) / epsilon
        q = torch.softmax(log_q - log_q.logsumexp(0), dim=1)  # (B, K): columns, then rows
        rows = q.new_ones(len(q))
        columns = q.new_ones(q.shape[1])
        # Constants (K, B and the total) cancel, because the last step makes every row sum to one.
        for _ in range(iterations - 1):
            columns = 1 / (rows @ q)
            rows = 1 / (q @ columns)
        return q.mul_(columns).mul_(rows[:, None]) if iterations > 1 else q


def check_sinkhorn(epsilon: float, iterations: int) -> None:
    """Refuse settings that are no transport problem."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise InputError("epsilon must be a positive number", found=str(epsilon), fix="0.05 is usual")
    if iterations < 1:
        raise InputError("Sinkhorn needs at least one iteration", found=str(iterations), fix="3 is usual")
