"""Supervised contrastive losses: SupCon and epsilon-SupInfoNCE.

With s the cosines over the temperature, the positives of an anchor are the other rows of its label (other views of its
own item among them), its negatives the rows of other labels. Epsilon is a margin on s: e^-epsilon multiplies positives
in the denominator; nothing divides it by the temperature.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from medssl.core.errors import InputError
from medssl.core.transfer import onto
from medssl.losses.numerics import (
    attached_zero,
    check_choice,
    check_float,
    check_labels,
    check_temperature,
    exact_float32,
    excess,
    poisoned,
    warn_if,
)
from medssl.losses.pairwise import mean_over_anchors


def sup_con(z: Tensor, labels: Tensor, *, temperature: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """Supervised contrastive loss, the logarithm inside the mean over positives.

    Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv:2004.11362), Eq. (2); with epsilon the epsilon-SupCon
    of Barbano et al. 2023, "Unbiased Supervised Contrastive Learning" (arXiv:2211.05568), whose constant + epsilon is
    dropped. Anchor a contributes the LSE of s[a, t] - epsilon (t positive) and s[a, t] (t negative), minus the mean of
    s[a, p] over positives p. Exact: the authors' program adds 1e-6 inside the logarithm.

    Args:
        z: (N, V, D) float. Raw embeddings; V = 1 is allowed.
        labels: (N,) of any real dtype, compared for equality. With a label for every item apart, and epsilon 0, this
            is `nt_xent`.
        temperature: Above 0, dimensionless.
        epsilon: Finite; 0.1 to 0.5 published.

    Returns:
        Scalar in float32 or wider, in nats. An anchor without positives contributes 0 and is counted.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A label that is NaN (the message names the rows; on an accelerator, where nobody looks, the loss is
            NaN), a temperature that is not positive, an epsilon that is not finite, or a z that is not floating.
    """
    same, share, has_positive = _positives(z, labels, temperature, epsilon)
    if _nothing_attracts(z, has_positive):
        return attached_zero(z)

    def terms(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        moved = s - epsilon * same[items, None].to(s.dtype) if epsilon else s  # (V, C, V, N)
        everything = moved.masked_fill(itself, -torch.inf).logsumexp((2, 3))
        attracted = (s.masked_fill(itself, 0.0).sum(2) * share[items]).sum(2)
        return everything * has_positive[items] - attracted

    with exact_float32(z.device):
        return poisoned(mean_over_anchors(z, temperature, terms), labels)


def sup_info_nce(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.0,
    form: Literal["out", "in"] = "out",
) -> Tensor:
    """epsilon-SupInfoNCE: a positive is compared with the negatives, never with other positives.

    Barbano et al. 2023, "Unbiased Supervised Contrastive Learning" (arXiv:2211.05568), Eq. (6), (7). Anchor a with P
    positives p and negatives n contributes

    - "out": the mean over p of -log of e^s[a, p] / (e^(s[a, p] - epsilon) + sum over n of e^s[a, n]);
    - "in": -log of sum over p of e^s[a, p] / (1/P sum over p of e^(s[a, p] - epsilon) + sum over n of e^s[a, n]).

    With a label for every item apart this is epsilon-InfoNCE ("out", epsilon 0, two views: `nt_xent`). Exact: the
    authors' program adds 1e-6 inside the logarithm, which at temperature 0.07 is more than an orthogonal negative.

    Args:
        z: (N, V, D) float. Raw embeddings; V = 1 is allowed.
        labels: (N,) of any real dtype, compared for equality.
        temperature: Above 0, dimensionless.
        epsilon: Finite; 0.1 to 0.5 published.
        form: Whether the sum over positives is outside or inside the logarithm.

    Returns:
        Scalar in float32 or wider, in nats. An anchor without positives contributes 0 and is counted; one with
        positives but without negatives contributes the constant that the formula gives (-epsilon for "out").

    Raises:
        ShapeError: Shapes other than the above.
        InputError: A label that is NaN (the message names the rows; on an accelerator, where nobody looks, the loss is
            NaN), a temperature that is not positive, an epsilon that is not finite, an unknown form, or a z that is
            not floating.
    """
    check_choice("form", form, ("out", "in"))
    same, share, has_positive = _positives(z, labels, temperature, epsilon)
    if _nothing_attracts(z, has_positive):
        return attached_zero(z)
    log_count = -torch.where(has_positive > 0, share.amax(1), 1.0).log()  # share is 1 / P at the positives

    def outside(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        repelled = _log_sum_exp(s, ~same[items])
        terms = excess(repelled[:, :, None, None], s - epsilon).masked_fill(itself, 0.0).sum(2)
        return (terms * share[items]).sum(2) - epsilon * has_positive[items]

    def inside(s: Tensor, itself: Tensor, items: slice) -> Tensor:
        repelled = _log_sum_exp(s, ~same[items])
        attracted = s.masked_fill(itself, -torch.inf)
        attracted = attracted.masked_fill(~same[items, None] & (has_positive[items] > 0)[:, None, None], -torch.inf)
        moved = epsilon + log_count[items]  # e^-moved is what multiplies the sum over positives
        # An anchor without positives keeps its row above, whose finite term is selected out here.
        return (excess(repelled, attracted.logsumexp((2, 3)) - moved) - moved) * has_positive[items]

    with exact_float32(z.device):
        return poisoned(mean_over_anchors(z, temperature, outside if form == "out" else inside), labels)


def _positives(z: Tensor, labels: Tensor, temperature: float, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same label (N, N); 1 / number of positives at them, else 0 (N, N); whether an anchor has any (N,), as 0 or 1."""
    check_float("z", z, "(N, V, D)", 3)
    check_temperature(temperature)
    if not math.isfinite(epsilon):
        raise InputError("epsilon must be a finite number", found=str(epsilon))
    labels = onto(check_labels("labels", labels, len(z)), z.device)
    dtype = torch.promote_types(z.dtype, torch.float32)
    same = labels[:, None] == labels[None, :]
    count = z.shape[1] * same.sum(1) - 1  # all views of the label's items, without the anchor
    warn_if(same.all(), "all items have one label: no negatives")
    return same, same / count.clamp(min=1).to(dtype)[:, None], (count > 0).to(dtype)


def _nothing_attracts(z: Tensor, has_positive: Tensor) -> bool:
    """Whether no anchor can have a positive whatever the labels; warns where the labels leave none."""
    warn_if(~has_positive.any(), "no anchor has a positive: the loss is 0 with gradient 0")
    return z.shape[0] * z.shape[1] == 1


def _log_sum_exp(similarity: Tensor, chosen: Tensor) -> Tensor:
    """LSE of the chosen (C, N) columns of each row (V, C, V, N); -inf without gradient where there are none."""
    some = chosen.any(1)
    # A row of -inf alone would have gradient NaN: such rows stay whole here and are selected out below.
    hidden = ~chosen & some[:, None]
    return torch.where(some, similarity.masked_fill(hidden[:, None], -torch.inf).logsumexp((2, 3)), -torch.inf)
