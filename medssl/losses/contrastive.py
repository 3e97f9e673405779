"""Contrastive losses between embeddings of whole images: NT-Xent, its decoupled and its partition-aware forms."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from medssl.core.errors import InputError, ShapeError
from medssl.core.transfer import onto
from medssl.losses.numerics import (
    check_choice,
    check_codes,
    check_float,
    check_paired,
    check_temperature,
    exact_float32,
    excess,
    unit,
    warn_if,
)


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.1) -> Tensor:
    """NT-Xent contrastive loss, averaged over both views.

    Chen et al. 2020, "A Simple Framework for Contrastive Learning" (arXiv:2002.05709), Eq. (1). With u the unit rows
    of both views and s = u u^T / temperature, anchor a with partner p contributes LSE of s[a, k] over k != a, minus
    s[a, p]; the mean is over the 2N anchors (some programs sum two per-view means, which is twice this).

    Args:
        z1: (N, D) float. Projections of the first view; need not be unit length.
        z2: (N, D) float. Projections of the second view; row i of both is the same item.
        temperature: Above 0, dimensionless.

    Returns:
        Scalar in float32 or wider: mean loss in nats. log(2N - 1) when all embeddings are equal; 0 for N = 1.

    Raises:
        ShapeError: The shapes differ or are not (N, D).
        InputError: The temperature is not positive, or the tensors are not floating.
    """
    check_float("z1", z1, "(N, D)", 2)
    check_paired("z1", z1, "z2", z2)
    check_temperature(temperature)
    warn_if(len(z1) == 1, "a batch of one item has no negatives: NT-Xent is 0 with gradient 0")
    with exact_float32(z1.device):
        z = unit(torch.cat([z1, z2]))  # (2N, D)
        similarity = (z / temperature) @ z.T  # (2N, 2N)
        similarity.fill_diagonal_(-torch.inf)
        partner = torch.arange(len(z), device=z.device).roll(len(z1))  # row i of z1 <-> row i of z2
        return cross_entropy(similarity, partner)


def decoupled_contrastive(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.1, weight_sigma: float | None = None
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent whose positive is left out of the denominator; the mean of both directions.

    Yeh et al. 2022, "Decoupled Contrastive Learning" (arXiv:2110.06848). With unit rows u and
    s = u u^T / temperature, anchor i of view 1 contributes -w[i] s[i, its other view] + LSE of s over the 2 (N - 1)
    rows of other items in both views; the same with the views exchanged. DCL has w = 1; DCLW has
    w[i] = 2 - N softmax over i of (u1[i] u2[i] / weight_sigma), in both directions, and is differentiated through it.

    Args:
        z1: (N, D) float. Projections of the first view; need not be unit length.
        z2: (N, D) float. Projections of the second view; row i of both is the same item.
        temperature: Above 0, dimensionless.
        weight_sigma: None for DCL; above 0 for DCLW (the paper: 0.5).

    Returns:
        Scalar in float32 or wider. Neither bounded below by 0 nor usually above it.

    Raises:
        ShapeError: The shapes differ or are not (N, D).
        InputError: A batch of one item (no negatives), a temperature or weight_sigma that is not positive, or tensors
            that are not floating.
    """
    check_float("z1", z1, "(N, D)", 2)
    check_paired("z1", z1, "z2", z2)
    check_temperature(temperature)
    if weight_sigma is not None and not (weight_sigma > 0 and math.isfinite(weight_sigma)):
        raise InputError("weight_sigma must be a positive number", found=str(weight_sigma), fix="the paper has 0.5")
    n = len(z1)
    if n < 2:
        raise InputError("a batch of one item has no negatives: the loss is not defined", fix="use two items or more")
    with exact_float32(z1.device):
        u = unit(torch.cat([z1, z2]))  # (2N, D)
        similarity = (u / temperature) @ u.T
        own = torch.arange(2 * n, device=u.device) % n
        negatives = similarity.masked_fill(own[:, None] == own[None, :], -torch.inf).logsumexp(1)
        agreement = (u[:n] * u[n:]).sum(1)  # (N,)
        positive = agreement / temperature
        if weight_sigma is not None:
            positive = positive * (2 - n * (agreement / weight_sigma).softmax(0))
        return negatives.mean() - positive.mean()


def global_contrastive(
    z: Tensor,
    partition: Tensor | None = None,
    volume: Tensor | None = None,
    *,
    strategy: Literal["gr", "gd-", "gd"],
    temperature: float = 0.1,
) -> Tensor:
    """Global contrastive loss of volumes cut into partitions: the mean over ordered positive pairs.

    Chaitanya et al. 2020, "Contrastive learning of global and local features for medical image segmentation with
    limited annotations" (arXiv:2006.10511), Eqs. (1), (2). An ordered pair (a, b) contributes
    -log of e^s[a, b] / (e^s[a, b] + sum over negatives k of a of e^s[a, k]): other positives are never in the
    denominator. The mean over ordered pairs is half of the paper's sum of both directions over unordered pairs.

    - "gr": the two versions of an item attract, every other row repels; this is `nt_xent`.
    - "gd-": original and both versions of an item attract (3 unordered pairs); rows of other partitions repel.
    - "gd": also originals of different volumes at one partition, and version a of one volume with version b of
      another. A partition at which the batch holds m volumes once has 3m + m(m-1)/2 + m(m-1) unordered pairs.

    Items of one volume at one partition neither attract nor repel each other.

    Args:
        z: (N, 2, D) two versions for "gr"; (N, 3, D) original, version a, version b otherwise. Raw embeddings.
        partition: (N,) integer. Needed by "gd-" and "gd".
        volume: (N,) integer. Needed by "gd"; "gd-" does not ask which volume an item is of.
        strategy: Which pairs attract.
        temperature: Above 0, dimensionless.

    Returns:
        Scalar in float32 or wider, in nats. Anchors without negatives contribute 0 and are counted.

    Raises:
        ShapeError: Shapes other than the above, or a partition or volume that is needed and missing.
        InputError: An unknown strategy, a temperature that is not positive, or codes that are not integers.
    """
    check_choice("strategy", strategy, ("gr", "gd-", "gd"))
    check_float("z", z, "(N, V, D)", 3)
    check_temperature(temperature)
    views = 2 if strategy == "gr" else 3
    if z.shape[1] != views:
        raise ShapeError(f"strategy {strategy} takes z with {views} views, (N, {views}, D)", found=str(tuple(z.shape)))
    if strategy == "gr":
        return nt_xent(z[:, 0], z[:, 1], temperature=temperature)
    partition = onto(check_codes("partition", partition, len(z), f"strategy {strategy}"), z.device)
    if strategy == "gd" or volume is not None:
        volume = onto(check_codes("volume", volume, len(z), f"strategy {strategy}"), z.device)
    with exact_float32(z.device):
        return _partition_contrastive(unit(z), partition, volume if strategy == "gd" else None, temperature)


def _partition_contrastive(u: Tensor, partition: Tensor, volume: Tensor | None, temperature: float) -> Tensor:
    """GD- (no volume) and GD of unit embeddings u (N, 3, D)."""
    n = len(u)
    rows = u.transpose(0, 1).reshape(3 * n, -1)  # view-major: row v N + i
    similarity = ((rows / temperature) @ rows.T).view(3, n, 3, n)
    elsewhere = partition[:, None] != partition[None, :]  # (N, N)
    negatives = _log_sum_exp(similarity, elsewhere)  # (3, N)
    warn_if(~elsewhere.any(), "all items share one partition: no negatives, the loss is 0 with gradient 0")

    versions = similarity.diagonal(dim1=1, dim2=3)  # (3, 3, N): the versions of one item
    within = excess(negatives[:, None], versions) * ~torch.eye(3, dtype=torch.bool, device=u.device)[..., None]
    total, count = within.sum(), torch.full((), 6 * n, dtype=u.dtype, device=u.device)
    if volume is not None:
        across = (~elsewhere & (volume[:, None] != volume[None, :])).to(u.dtype)  # (N, N), symmetric
        original = excess(negatives[0, :, None], similarity[0, :, 0])
        a_to_b = excess(negatives[1, :, None], similarity[1, :, 2])
        b_to_a = excess(negatives[2, :, None], similarity[2, :, 1])
        total = total + ((original + a_to_b + b_to_a) * across).sum()
        count = count + 3 * across.sum()
    return total / count


def _log_sum_exp(similarity: Tensor, elsewhere: Tensor) -> Tensor:
    """LSE over the negatives of each row of ``similarity`` (V, N, V, N); -inf without gradient where there are none."""
    has_negatives = elsewhere.any(1)
    # A row of -inf alone would have gradient NaN: such rows stay whole here and are selected out below.
    hidden = ~elsewhere & has_negatives[:, None]
    total = similarity.masked_fill(hidden[None, :, None, :], -torch.inf).logsumexp(dim=(2, 3))
    return torch.where(has_negatives, total, -torch.inf)
