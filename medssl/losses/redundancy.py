"""Losses on the dimensions of an embedding instead of its items: agreement of views without redundancy."""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.core.errors import InputError
from medssl.losses.numerics import check_float, check_paired, exact_float32, widen

_EPS = 1e-5  # inside the root of the standardisation (the batch norm of the authors' program)
_FLOOR = 1e-4  # inside the root of VICReg's standard deviation (the paper): the gradient at 0 is finite


def barlow_twins(z1: Tensor, z2: Tensor, *, redundancy_weight: float = 0.0051) -> Tensor:
    """Cross-correlation of the dimensions of two views, drawn to the identity matrix.

    Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv:2103.03230), Eqs. (1),
    (2): with each dimension standardised over the batch (biased variance, 1e-5 added to it) and C = z1^T z2 / N, the
    sum over i of (C[i, i] - 1)^2 plus ``redundancy_weight`` times the sum over i != j of C[i, j]^2. Not divided by D.

    Args:
        z1: (N, D) float. Raw projections of the first view; not normalised by row.
        z2: (N, D) float. Raw projections of the second view; row i of both is the same item.
        redundancy_weight: At least 0 (the authors' program: 0.0051; the paper: 0.005).

    Returns:
        Scalar in float32 or wider, at least 0. A constant dimension costs 1, with gradient 0 from its diagonal.

    Raises:
        ShapeError: The shapes differ or are not (N, D).
        InputError: A batch of one item, a negative weight, or tensors that are not floating.
    """
    _check(z1, z2, redundancy_weight=redundancy_weight)
    with exact_float32(z1.device):
        a, b = _standardised(widen(z1)), _standardised(widen(z2))
        diagonal = (a * b).mean(0)  # (D,)
        return (diagonal - 1).square().sum() + redundancy_weight * _off_diagonal(a, b) / len(a) ** 2


def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Invariance of two views, a floor under the variance of each dimension, and no covariance between dimensions.

    Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization" (arXiv:2105.04906), as its authors'
    program weighs it: ``invariance_weight`` times the mean over N D of (z1 - z2)^2; ``variance_weight`` times half the
    sum over both views of the mean over dimensions of max(0, 1 - sqrt(var + 1e-4)); ``covariance_weight`` times the
    sum over both views of sum over i != j of Cov[i, j]^2 / D. var and Cov divide by N - 1. (The paper prints the
    first without 1 / D and the second without the half; its pseudocode is this.)

    Args:
        z1: (N, D) float. Raw projections of the first view; not normalised by row.
        z2: (N, D) float. Raw projections of the second view; row i of both is the same item.
        invariance_weight: At least 0 (lambda of the paper).
        variance_weight: At least 0 (mu).
        covariance_weight: At least 0 (nu).

    Returns:
        Scalar in float32 or wider, at least 0. ``variance_weight`` (but for 1 %) when all embeddings are equal.

    Raises:
        ShapeError: The shapes differ or are not (N, D).
        InputError: A batch of one item, a negative weight, or tensors that are not floating.
    """
    weights = {"invariance_weight": invariance_weight, "variance_weight": variance_weight}
    _check(z1, z2, **weights, covariance_weight=covariance_weight)
    n, d = z1.shape
    with exact_float32(z1.device):
        a, b = widen(z1), widen(z2)
        loss = invariance_weight * (a - b).square().mean()
        for view in (a, b):
            centred = view - view.mean(0)
            deviation = (centred.square().sum(0) / (n - 1) + _FLOOR).sqrt()
            loss = loss + variance_weight / 2 * (1 - deviation).clamp(min=0).mean()
            loss = loss + covariance_weight * _off_diagonal(centred, centred) / ((n - 1) ** 2 * d)
        return loss


def _standardised(x: Tensor) -> Tensor:
    """Each dimension with mean 0 and variance 1 over the batch."""
    centred = x - x.mean(0)
    return centred * torch.rsqrt(centred.square().mean(0) + _EPS)


def _off_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Sum over i != j of (a^T b)[i, j]^2, of columns i of ``a`` and j of ``b``, both (N, D).

    With fewer items than dimensions through the (N, N) products of rows, of which the trace of a a^T b b^T is the sum
    over all i and j: a projection to 8192 from a batch of 32 costs 1/256 of the time and memory of its D x D matrix.
    """
    n, d = a.shape
    if n < d:
        return ((a @ a.T) * (b @ b.T)).sum() - (a * b).sum(0).square().sum()
    products = a.T @ b
    diagonal = torch.eye(d, dtype=torch.bool, device=a.device)
    return products.masked_fill(diagonal, 0.0).square().sum()


def _check(z1: Tensor, z2: Tensor, **weights: float) -> None:
    check_float("z1", z1, "(N, D)", 2)
    check_float("z2", z2, "(N, D)", 2)
    check_paired("z1", z1, "z2", z2)
    if len(z1) < 2:
        raise InputError("the statistics of a batch of one item are not defined", fix="use a batch of two or more")
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise InputError(f"{name} must be at least 0", found=str(weight))
