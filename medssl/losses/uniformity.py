"""Alignment, uniformity, and uniformity of the views' centroids with a kernel of prior knowledge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medssl.core.errors import InputError
from medssl.core.transfer import onto
from medssl.losses.numerics import check_float, check_paired, check_weights, exact_float32, unit, widen


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean over items of |x - y|^alpha.

    Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (arXiv:2005.10242), Eq. (3).

    Args:
        x: (N, D) float, unit rows: the definition does not normalise, so neither does this.
        y: (N, D) float, unit rows; row i of both is the same item.
        alpha: Above 0. Where x = y the gradient is 0.

    Returns:
        Scalar in float32 or wider.

    Raises:
        ShapeError: The shapes differ or are not (N, D).
        InputError: alpha is not positive, or the tensors are not floating.
    """
    check_float("x", x, "(N, D)", 2)
    check_float("y", y, "(N, D)", 2)
    check_paired("x", x, "y", y)
    _check_positive("alpha", alpha)
    with exact_float32(x.device):
        squared = (widen(x) - widen(y)).square().sum(1)
        if alpha == 2:
            return squared.mean()
        apart = squared > 0
        return (torch.where(apart, squared, 1.0).pow(alpha / 2) * apart).mean()


def uniformity(x: Tensor, *, t: float = 2.0) -> Tensor:
    """Logarithm of the mean over unordered pairs of e^(-t |x_i - x_j|^2).

    Wang & Isola 2020 (arXiv:2005.10242), Eq. (4).

    Args:
        x: (N, D) float, unit rows: the definition does not normalise, so neither does this.
        t: Above 0.

    Returns:
        Scalar in float32 or wider, at most 0; 0 where all rows are equal.

    Raises:
        ShapeError: Not (N, D).
        InputError: Fewer than two rows, a t that is not positive, or an x that is not floating.
    """
    check_float("x", x, "(N, D)", 2)
    _check_positive("t", t)
    _check_pairs(len(x))
    with exact_float32(x.device):
        return _log_mean_potential(widen(x), t)


def decoupled_uniformity(
    z: Tensor, *, t: float = 2.0, prior_kernel: Tensor | None = None, regularization: float = 0.01
) -> Tensor:
    """Uniformity of the centroids of each item's views; with a kernel, of centroids shared between like items.

    Dufumier et al. 2023, "Integrating Prior Knowledge in Contrastive Learning with Kernel" (arXiv:2206.01646), Eq. (3)
    and (8). With u the unit embeddings and m[i] their mean over the views (not normalised again), the loss is the log
    of the mean over i != j of e^(-t |m[i] - m[j]|^2). The paper has t = 1, its program 2. With a kernel K between items
    m becomes (K + regularization I)^-1 K m, whose weights are constant.

    Args:
        z: (N, V, D) float. Raw embeddings. With V = 1 nothing aligns views.
        t: Above 0.
        prior_kernel: (N, N), symmetric and positive semidefinite. See `label_kernel`; one that ignores missing labels
            need not be.
        regularization: Above 0. The kernel is solved in float64 whatever its dtype.

    Returns:
        Scalar in float32 or wider, at most 0.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: Fewer than two items, a t or regularization that is not positive, a z that is not floating, or a
            kernel that is not finite, not symmetric, or not positive semidefinite (on an accelerator, where nobody
            looks, the loss is NaN for the first and last of these).
    """
    check_float("z", z, "(N, V, D)", 3)
    _check_positive("t", t)
    _check_positive("regularization", regularization)
    _check_pairs(len(z))
    with exact_float32(z.device):
        centroids = unit(z).mean(1)  # (N, D)
        if prior_kernel is not None:
            centroids = _shared(centroids, prior_kernel, regularization)
        return _log_mean_potential(centroids, t)


def _shared(centroids: Tensor, kernel: Tensor, regularization: float) -> Tensor:
    """(K + r I)^-1 K applied to the centroids, as centroids - r (K + r I)^-1 centroids: the matrix is never formed."""
    kernel = onto(check_weights("prior_kernel", kernel, len(centroids), lowest=-math.inf), centroids.device).double()
    if kernel.device.type == "cpu" and not torch.allclose(kernel, kernel.T, rtol=1e-4, atol=1e-6):
        raise InputError("prior_kernel must be symmetric")
    system = kernel.clone()
    system.diagonal().add_(regularization)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.device.type == "cpu" and int(failed):
        raise InputError(
            "prior_kernel must be positive semidefinite: it is no kernel otherwise",
            fix="a label kernel that ignores missing labels need not be: leave the items without labels out",
        )
    factor = torch.where(failed == 0, factor, torch.nan)
    # The loss depends on centroids through this alone: in their own dtype again, but solved in float64.
    residual = torch.cholesky_solve(centroids.double(), factor) * regularization
    return (centroids.double() - residual).to(centroids.dtype)


def _log_mean_potential(x: Tensor, t: float) -> Tensor:
    """Log of the mean over ordered pairs of distinct rows of e^(-t |x_i - x_j|^2)."""
    n = len(x)
    length = x.square().sum(1)
    distance = (length[:, None] + length[None, :] - 2 * x @ x.T).clamp(min=0)
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    return (-t * distance).masked_fill(itself, -torch.inf).logsumexp((0, 1)) - math.log(n * (n - 1))


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be a positive number", found=str(value))


def _check_pairs(n: int) -> None:
    if n < 2:
        raise InputError("uniformity compares items: the batch must hold at least two", found=str(n))
