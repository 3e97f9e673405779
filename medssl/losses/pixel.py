"""Contrast between pixels by a tree of regions: pixels that are joined early attract, those joined late repel."""

from __future__ import annotations

import numpy.typing as npt
import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.core.merging import merge_order, pairwise_heights
from medssl.core.transfer import onto
from medssl.losses.numerics import attached_zero, check_float, check_temperature, exact_float32, excess, unit, warn_if


def pixel_contrast(
    z: Tensor, anchors: Tensor, positives: Tensor, negatives: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """InfoNCE between pixels: every positive of an anchor against the anchor's negatives.

    Zhang & Maire 2020, "Self-Supervised Visual Representation Learning from Hierarchical Grouping" (arXiv:2012.03044).
    With s the cosine over the temperature, anchor i contributes the mean over its positives j of
    -log of e^s[i, j] / (e^s[i, j] + sum over its negatives k of e^s[i, k]): other positives are never in the
    denominator. The mean is over anchors. The paper's temperature is not known to us.

    Args:
        z: (P, D) float. Embeddings of pixels; need not be unit length.
        anchors: (A,) integer, rows of ``z``; -1: no anchor, left out of the mean.
        positives: (A, p) integer, rows of ``z``; -1: none. Repeats count.
        negatives: (A, n) integer likewise.
        temperature: Above 0, dimensionless.

    Returns:
        Scalar in float32 or wider, in nats: log(1 + n) when all embeddings are equal. An anchor without positives or
        without negatives contributes 0 and is counted; without any anchor the loss is 0 with gradient 0.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: Indices that are not integers or (on the CPU) not rows of ``z``, or a temperature that is not
            positive.
    """
    check_float("z", z, "(P, D)", 2)
    check_temperature(temperature)
    if anchors.ndim != 1 or any(rows.ndim != 2 or len(rows) != len(anchors) for rows in (positives, negatives)):
        raise ShapeError(
            "anchors must be (A,), positives (A, p) and negatives (A, n)",
            found=f"{tuple(anchors.shape)}, {tuple(positives.shape)}, {tuple(negatives.shape)}",
        )
    for name, rows in (("anchors", anchors), ("positives", positives), ("negatives", negatives)):
        _check_rows(name, rows, len(z))
    anchors, positives, negatives = (onto(rows, z.device) for rows in (anchors, positives, negatives))
    is_anchor = anchors >= 0
    warn_if(~is_anchor.any(), "there is no anchor pixel: the pixel contrast is 0 with gradient 0")
    if len(anchors) == 0:
        return attached_zero(z)
    with exact_float32(z.device):
        u = unit(z)
        own = u[anchors.clamp(min=0)] / temperature  # (A, D)
        attract, repel = (torch.einsum("ad,akd->ak", own, u[rows.clamp(min=0)]) for rows in (positives, negatives))
        is_positive, is_negative = positives >= 0, negatives >= 0
        compared = is_anchor & is_negative.any(1)
        # A row of -inf alone would have gradient NaN: such rows stay whole here and are selected out below.
        hidden = ~is_negative & compared[:, None]
        against = repel.masked_fill(hidden, -torch.inf).logsumexp(1) if negatives.shape[1] else repel.sum(1)
        terms = excess(against[:, None], attract) * (is_positive & compared[:, None])  # (A, p)
        per_anchor = terms.sum(1) / is_positive.sum(1).clamp(min=1)
        return per_anchor.sum() / is_anchor.sum().clamp(min=1)


def _check_rows(name: str, rows: Tensor, n: int) -> None:
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise InputError(f"{name} must hold integer row numbers", found=str(rows.dtype))
    if rows.device.type == "cpu" and rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= n):
        raise InputError(
            f"{name} must be rows of z, 0 to {n - 1}, or -1 for none",
            found=f"{int(rows.min())} to {int(rows.max())}",
        )


def ultrametric_tree(edges: Tensor | npt.ArrayLike, n_regions: int) -> tuple[Tensor, Tensor]:
    """The tree of regions that greedy merging of neighbours gives, weakest boundary first.

    See `medssl.core.merging.merge_order` for the rule and its sources. The pairwise heights are an ultrametric,
    d[i, j] <= max(d[i, k], d[k, j]).

    Args:
        edges: (E, 4) rows (a, b, strength sum, length) of neighbouring regions; rows of one pair are added.
        n_regions: Regions are numbered from 0.

    Returns:
        Heights float64 (n_regions, n_regions) at which two regions are joined, 0 on the diagonal and infinite where no
        path of neighbours leads from one to the other; and the merges float64 (M, 3) in their order: rows
        (a, b, height) with a < b, the result of merge k being number n_regions + k.

    Raises:
        ShapeError: ``edges`` is not (E, 4).
        InputError: A region that does not exist or borders on itself, a negative strength, a length that is not
            positive.
    """
    merges = merge_order(edges.detach().cpu().numpy() if isinstance(edges, Tensor) else edges, n_regions)
    return torch.from_numpy(pairwise_heights(merges, n_regions)), torch.from_numpy(merges)
