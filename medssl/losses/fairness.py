"""Regularisers that take a bias label (a site, a background) out of an embedding: FairKL and EnD.

A pair is aligned when its items have one bias value, conflicting otherwise. Every function takes embeddings (N, D), one
row per item; pairs of an item with itself never count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from medssl.core.errors import InputError
from medssl.core.transfer import onto
from medssl.losses.numerics import (
    attached_zero,
    check_choice,
    check_float,
    check_labels,
    check_weights,
    exact_float32,
    poisoned,
    unit,
    warn_if,
)

SMALLEST_VARIANCE = 1e-8


@dataclass(frozen=True)
class FairKL:
    """The two terms of `fair_kl`, scalars; add them, each with the weight it is to have."""

    positive: Tensor
    """Distance between the aligned and the conflicting similarities of positive pairs."""
    negative: Tensor
    """The same of negative pairs."""


@dataclass(frozen=True)
class EnD:
    """The two terms of `end`, scalars; add them, each with the weight it is to have."""

    perpendicular: Tensor
    """How alike the items of one bias value are."""
    parallel: Tensor
    """How unlike the items of one label and different bias values are."""


def fair_kl(
    z: Tensor,
    bias: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    mode: Literal["kl", "moments"] = "kl",
) -> FairKL:
    """FairKL: similarities must be distributed alike for aligned and for conflicting pairs.

    Barbano et al. 2023, "Unbiased Supervised Contrastive Learning" (arXiv:2211.05568), Eq. (13). With mean m and
    population variance v of the cosines of aligned (a) and conflicting (c) pairs, each term is
    KL(N(m_a, v_a) || N(m_c, v_c)) = ((v_a + (m_a - m_c)^2) / v_c - log(v_a / v_c) - 1) / 2, pooled over the batch. The
    authors' program computes something else (self pairs, zero-filled deviations, linear terms).

    Args:
        z: (N, D) float. Raw embeddings, one view.
        bias: (N,) of any real dtype, compared for equality.
        labels: (N,): pairs of one label are positive, others negative. Without labels and weights all pairs are
            positive.
        weights: (N, N) from 0 to 1, instead of labels (see `label_kernel`): how positive a pair is. Moments of
            positives are weighted by w, of negatives by 1 - w.
        mode: "kl", or "moments": (m_a - m_c)^2 + (sqrt v_a - sqrt v_c)^2.

    Returns:
        Both terms. A term is 0 with gradient 0 where the aligned or the conflicting set has fewer than two unordered
        pairs (with weights: effective number (sum w)^2 / sum w^2 below 2). Variances are at least 1e-8.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A NaN bias or label (the message names the rows; on an accelerator, where nobody looks, the terms
            are NaN), weights outside 0 to 1, labels and weights together, or an unknown mode.
    """
    check_float("z", z, "(N, D)", 2)
    check_choice("mode", mode, ("kl", "moments"))
    if labels is not None and weights is not None:
        raise InputError("positive pairs are given by labels or by weights", found="both", fix="leave one of them out")
    aligned = _equal("bias", bias, z)
    given = [x for x in (bias, labels, weights) if x is not None]
    with exact_float32(z.device):
        u = unit(z)
        similarity = u @ u.T
        if labels is not None:
            positive = _equal("labels", labels, z).to(u.dtype)
        elif weights is not None:
            positive = onto(check_weights("weights", weights, len(z), highest=1.0), z.device).to(u.dtype)
        else:
            return FairKL(poisoned(_gap(similarity, aligned, None, mode), *given), attached_zero(z))
        return FairKL(
            poisoned(_gap(similarity, aligned, positive, mode), *given),
            poisoned(_gap(similarity, aligned, 1 - positive, mode), *given),
        )


def _gap(similarity: Tensor, aligned: Tensor, weights: Tensor | None, mode: str) -> Tensor:
    """Distance between the distributions of aligned and of conflicting similarities (N, N), weighted, off-diagonal."""
    off_diagonal = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    mean, variance, enough = [], [], []
    for pairs in (aligned & off_diagonal, ~aligned):
        share = pairs.to(similarity.dtype) if weights is None else pairs * weights
        total = share.sum()
        # Ordered pairs come twice. The margin is for rounding: two equal weights are two pairs.
        enough.append(total.square() / 2 >= (2 - 1e-5) * share.square().sum())
        enough.append(total > 0)
        share = share / torch.where(total > 0, total, 1.0)
        moments = _Moments.apply(similarity, share)
        mean.append(moments[0])
        variance.append(moments[1].clamp(min=SMALLEST_VARIANCE))
    warn_if(~torch.stack(enough).all(), "fewer than two aligned or conflicting pairs: the FairKL term is 0")
    distance = (mean[0] - mean[1]).square()
    if mode == "moments":
        value = distance + (variance[0].sqrt() - variance[1].sqrt()).square()
    else:
        ratio = variance[0] / variance[1]
        value = (distance / variance[1] + (ratio - 1) - ratio.log()) / 2
    return torch.where(torch.stack(enough).all(), value, 0.0)


class _Moments(torch.autograd.Function):
    """Mean and population variance of x under shares that sum to 1, in two passes: one gradient, no square kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.flatten().dot(share.flatten())
        # Centred first: the difference of the mean square and the squared mean would lose the small variances of
        # embeddings that have almost collapsed.
        variance = (x - mean).square_().flatten().dot(share.flatten())
        ctx.save_for_backward(x, share, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None]:
        x, share, mean = ctx.saved_tensors  # type: ignore[attr-defined]
        return (x - mean).mul_(2 * grad_variance).add_(grad_mean).mul_(share), None


def end(z: Tensor, bias: Tensor, labels: Tensor) -> EnD:
    """EnD: items of one bias value are spread apart, items of one label and different bias values pulled together.

    Tartaglione et al. 2021, "EnD: Entangling and Disentangling deep representations for bias correction"
    (arXiv:2103.02023), with cosines g. The perpendicular term is the sum over bias values of |sum of g over its
    unordered pairs|, divided by the number of all unordered aligned pairs; labels play no part. The parallel term is
    1 minus the mean of (1 + g) / 2 over all unordered conflicting pairs of one label (the authors' program loses about
    half of them, depending on the order of the batch).

    Args:
        z: (N, D) float. Raw embeddings, one view.
        bias: (N,) of any real dtype, compared for equality.
        labels: (N,), likewise.

    Returns:
        Both terms, not weighted (0.1 each is usual). A term without pairs is 0 with gradient 0.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A NaN bias or label (the message names the rows; on an accelerator, where nobody looks, the terms
            are NaN).
    """
    check_float("z", z, "(N, D)", 2)
    aligned, alike = _equal("bias", bias, z), _equal("labels", labels, z)
    off_diagonal = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    with exact_float32(z.device):
        u = unit(z)
        pairs = (aligned & off_diagonal).to(u.dtype)
        conflicting = (alike & ~aligned).to(u.dtype)
        warn_if(~(pairs.any() & conflicting.any()), "no aligned or no conflicting pairs: a term of EnD is 0")
        # Every item holds the sum of its whole bias value; the first one of each speaks for it.
        of_value = aligned.to(u.dtype) @ _sums(u, pairs) / 2
        first = ~aligned.tril(-1).any(1)
        perpendicular = (of_value.abs() * first).sum() / (pairs.sum() / 2).clamp(min=1)
        n_conflicting = conflicting.sum()
        mean = _sums(u, conflicting).sum() / n_conflicting.clamp(min=1)
        parallel = torch.where(n_conflicting > 0, (1 - mean) / 2, 0.0)
        return EnD(poisoned(perpendicular, bias, labels), poisoned(parallel, bias, labels))


def _sums(u: Tensor, pairs: Tensor) -> Tensor:
    """Sum of each item's cosines over its pairs (N,), without forming the cosines."""
    return (u * (pairs @ u)).sum(1)


def _equal(name: str, codes: Tensor, z: Tensor) -> Tensor:
    """Which items have one value (N, N)."""
    codes = onto(check_labels(name, codes, len(z)), z.device)
    return codes[:, None] == codes[None, :]
