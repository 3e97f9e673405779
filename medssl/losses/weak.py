"""Contrastive losses weighted by how alike the labels are: y-aware InfoNCE, L^thr and L^exp.

All take raw embeddings z (N, V, D) and a label kernel ``weights`` (N, N), constant, which is tiled over the views:
another view of the anchor's item has ``weights[i, i]``. An anchor's row never holds the anchor itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from medssl.core.transfer import onto
from medssl.losses.numerics import (
    attached_zero,
    check_choice,
    check_float,
    check_temperature,
    check_weights,
    exact_float32,
    warn_if,
)
from medssl.losses.pairwise import mean_over_anchors


def y_aware(z: Tensor, weights: Tensor, *, temperature: float = 0.1) -> Tensor:
    """y-aware InfoNCE: every other row attracts by its share of the anchor's label weights.

    Dufumier et al. 2021, "Contrastive Learning with Continuous Proxy Meta-Data for 3D MRI Classification"
    (arXiv:2106.08808), Eq. (2). Anchor a contributes the sum over k != a of w[a, k] / sum over t != a of w[a, t],
    times LSE of s[a, t] over t != a minus s[a, k]. Each row of weights sums to 1, as printed (the authors' program
    normalises the columns), and the mean is over the V N anchors (there: twice that). Weights of 1 for an item with
    itself and 0 otherwise give `nt_xent`.

    Args:
        z: (N, V, D) float. Raw embeddings; V = 1 is allowed.
        weights: (N, N), at least 0. See `label_kernel`.
        temperature: Above 0, dimensionless.

    Returns:
        Scalar in float32 or wider, in nats. An anchor whose weights are all 0 contributes 0 and is counted.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A negative or not finite weight (not looked at on an accelerator), a temperature that is not
            positive, or a z that is not floating.
    """
    weights = _checked(z, weights, temperature)
    if _too_few(z, 2):
        return attached_zero(z)
    shares, has_positive = _shares(weights, z)

    def terms(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        everything = s.masked_fill(itself, -torch.inf).logsumexp((2, 3))  # (V, C)
        attracted = (s.masked_fill(itself, 0.0).sum(2) * shares[items]).sum(2)
        return everything * has_positive[items] - attracted

    with exact_float32(z.device):
        return mean_over_anchors(z, temperature, terms)


def l_thr(
    z: Tensor, weights: Tensor, *, temperature: float = 0.1, normalizer: Literal["all", "compared"] = "all"
) -> Tensor:
    """L^thr: every other row k attracts against those whose label weight is strictly smaller than its own.

    Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction" (arXiv:2211.08326),
    Eq. (5). With A the rows t other than a and k with w[a, t] < w[a, k], anchor a contributes the sum over k of
    w[a, k] / norm, times the LSE of s[a, t] over A minus s[a, k]. One denominator per pair (a, k), as printed (the
    authors' program pools one per anchor). Ties, both views of an item among them, are never compared.

    Args:
        z: (N, V, D) float. Raw embeddings; V = 1 is allowed.
        weights: (N, N), at least 0. See `label_kernel`. Compared in their own dtype.
        temperature: Above 0, dimensionless.
        normalizer: norm is, with "all", the sum of the weights of all rows but the anchor; with "compared" that over
            A (as printed), at least the smallest normal number: for well spread labels it can be so small that the
            loss is 1e5 and more, so it is not the default.

    Returns:
        Scalar in float32 or wider, in nats. A row with nothing to compare with (the least alike one; every one if
        all weights are equal, or in a batch of one) contributes 0 and its anchor is counted.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A negative or not finite weight (not looked at on an accelerator), a temperature that is not
            positive, a z that is not floating, or an unknown normalizer.
    """
    weights = _checked(z, weights, temperature)
    check_choice("normalizer", normalizer, ("all", "compared"))
    order = weights.argsort(1)  # (N, N): the least alike item first
    ranked = weights.gather(1, order)
    below = _last_below(ranked)
    warn_if((below < 0).all(), "all label weights are equal: nothing to compare, L^thr is 0 with gradient 0")
    # How many rows of each item an anchor meets: all its views, but one fewer of its own item.
    copies = z.shape[1] - (order == torch.arange(len(z), device=z.device)[:, None]).to(weights.dtype)
    if normalizer == "compared":
        norm = (ranked * copies).cumsum(1).gather(1, below.clamp(min=0))
    else:
        norm = (ranked * copies).sum(1, keepdim=True)
    dtype = torch.promote_types(z.dtype, torch.float32)
    # In the wider of both dtypes: the other one may hold the smallest normal number of this one as 0.
    norm = norm.to(torch.promote_types(weights.dtype, dtype)).clamp(min=torch.finfo(dtype).tiny)
    shares = (ranked / norm).to(dtype)
    copies = copies.to(dtype)

    def terms(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        sort = order[items].expand(len(s), -1, -1)  # (V, C, N)
        by_item = s.masked_fill(itself, -torch.inf).logsumexp(2).gather(2, sort)
        attracted = s.masked_fill(itself, 0.0).sum(2).gather(2, sort)
        lower: Tensor = _RunningLogSumExp.apply(by_item)
        lower = lower.gather(2, below[items].clamp(min=0).expand_as(sort))
        comparable = (below[items] >= 0) & (lower > -torch.inf)
        return (torch.where(comparable, copies[items] * lower - attracted, 0.0) * shares[items]).sum(2)

    with exact_float32(z.device):
        return mean_over_anchors(z, temperature, terms)


def _last_below(ranked: Tensor) -> Tensor:
    """Position of the last strictly smaller value in each ascending row (N, N); -1 where there is none."""
    rises = torch.ones_like(ranked, dtype=torch.bool)
    rises[:, 1:] = ranked[:, 1:] > ranked[:, :-1]
    position = torch.arange(ranked.shape[1], device=ranked.device)
    return torch.where(rises, position, 0).cummax(1).values - 1


class _RunningLogSumExp(torch.autograd.Function):
    """`torch.logcumsumexp` over the last axis, for gradients that are not negative: half the passes of torch's own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        running = x.logcumsumexp(-1)
        ctx.save_for_backward(x, running)
        return running

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> Tensor:
        x, running = ctx.saved_tensors  # type: ignore[attr-defined]
        # Row t is part of every later sum p, by e^(x[t] - running[p]).
        later = torch.where(grad_output > 0, grad_output.log() - running, -torch.inf)
        return torch.exp(x + later.flip(-1).logcumsumexp(-1).flip(-1))


def l_exp(
    z: Tensor,
    weights: Tensor,
    *,
    temperature: float = 0.1,
    similarity: Literal["cosine", "neg_sqdist"] = "cosine",
    positive_in_denominator: bool = False,
) -> Tensor:
    """L^exp: every other row repels with a strength that falls with its label weight.

    Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction" (arXiv:2211.08326),
    Eq. (6). Anchor a contributes the sum over k != a of w[a, k] / sum over t of w[a, t], times the LSE of
    s[a, t] (1 - w[a, t]) over t other than a and k, minus s[a, k].

    The loss changes when a constant is added to the similarities. The paper prints cosines; the program behind its
    table subtracts 1 / temperature first, which makes them -|u_a - u_t|^2 / (2 temperature), and keeps k in the
    denominator: ``similarity="neg_sqdist", positive_in_denominator=True`` (times temperature / 0.07).

    Args:
        z: (N, V, D) float. Raw embeddings; V = 1 is allowed.
        weights: (N, N), at least 0. See `label_kernel`; where they exceed 1 a row attracts in the denominator too.
        temperature: Above 0, dimensionless.
        similarity: "cosine" over the temperature, or the same minus 1 / temperature.
        positive_in_denominator: Whether k itself repels.

    Returns:
        Scalar in float32 or wider, in nats. A pair without anything to compare with (two rows in all) and an anchor
        whose weights are all 0 contribute 0 and are counted.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A negative or not finite weight (not looked at on an accelerator), a temperature that is not
            positive, a z that is not floating, or an unknown similarity.
    """
    weights = _checked(z, weights, temperature)
    check_choice("similarity", similarity, ("cosine", "neg_sqdist"))
    if _too_few(z, 2 if positive_in_denominator else 3):
        return attached_zero(z)
    shares, has_positive = _shares(weights, z)
    repulsion = (1 - weights).to(shares.dtype)
    shift = 1 / temperature if similarity == "neg_sqdist" else 0.0

    def terms(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        s, share, valid = s - shift, shares[items], has_positive[items]
        repelled = (s * repulsion[items, None]).masked_fill(itself, -torch.inf)  # (V, C, V, N)
        attracted = (s.masked_fill(itself, 0.0).sum(2) * share).sum(2)
        if positive_in_denominator:
            return repelled.logsumexp((2, 3)) * valid - attracted
        return _mean_without_one(repelled, share, valid) - attracted

    with exact_float32(z.device):
        return mean_over_anchors(z, temperature, terms)


def _mean_without_one(x: Tensor, share: Tensor, total: Tensor) -> Tensor:
    """Sum over k, weighted by ``share`` (C, N), of the LSE of x (V, C, V, N) over all columns but k: (V, C).

    ``total`` (C,) is the sum of the shares: 1, or 0 for an anchor without weights.

    Taking e^x[k] out of the whole is exact while it is at most half of it. Only the largest one can be more, so the
    rest without it is summed separately.
    """
    row = x.flatten(2)  # (V, C, V N)
    at = row.detach().argmax(2, keepdim=True)
    top = row.gather(2, at)
    rest = row.scatter(2, at, -torch.inf).logsumexp(2, keepdim=True)
    whole = torch.logaddexp(rest, top)
    part = (row - whole).exp().scatter(2, at, 0.0)  # 0 for the anchor itself, at most 1/2 elsewhere
    share_of_top = share.expand(len(x), -1, -1).gather(2, at % share.shape[1])
    removed = (torch.log1p(-part).view(x.shape).sum(2) * share).sum(2, keepdim=True)
    without_top = whole * (total[:, None] - share_of_top) + removed
    return (without_top + share_of_top * rest).squeeze(2)


def _checked(z: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """The weights in float32 or wider, on z's device."""
    check_float("z", z, "(N, V, D)", 3)
    check_temperature(temperature)
    warn_if(len(z) == 1, "a batch of one item has nobody to compare with")
    return onto(check_weights("weights", weights, len(z)), z.device)


def _too_few(z: Tensor, least: int) -> bool:
    """Whether z (N, V, D) has fewer than ``least`` rows."""
    return z.shape[0] * z.shape[1] < least


def _shares(weights: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's weights (N, N) over the sum of all rows but the anchor, and whether that sum is above 0 (N,) as 0, 1.

    Divided before they become float32, where a very small kernel would be 0.
    """
    dtype, views = torch.promote_types(z.dtype, torch.float32), z.shape[1]
    others = weights - torch.diag(weights.diagonal())
    total = views * others.sum(1) + (views - 1) * weights.diagonal()
    shares = weights / torch.where(total > 0, total, 1.0)[:, None]
    return shares.to(dtype), (total > 0).to(dtype)
