"""Invariant information clustering: of whole items, and of the places of a dense map."""

from __future__ import annotations

import math
from itertools import product
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from medssl.core.errors import InputError, ShapeError
from medssl.losses.numerics import attached_zero, check_float, check_paired, exact_float32, warn_if, widen
from medssl.transforms.geometry import warp

EPSILON: Final = 2.220446049250313e-16
"""Probabilities below it are set to it before their logarithm (the float64 epsilon, as the authors' program does)."""
NOTHING: Final = 1e-12
"""Share of the largest displacement's sum below which no place was seen at a displacement."""
MOST_SHIFTS: Final = 27
"""Up to so many displacements one matrix product for each is the fastest form; beyond, a Fourier transform is."""


def iic(logits1: Tensor, logits2: Tensor, *, lamb: float = 1.0) -> Tensor:
    """Negative mutual information between the cluster of an item and the cluster of its other view.

    Ji et al. 2019, "Invariant Information Clustering for Unsupervised Image Classification and Segmentation"
    (arXiv:1807.06653), Eqs. (2), (3). With p, q the softmax of both views, P = sum_i p_i q_i^T, symmetrised and
    divided by its sum; the loss is -sum_cd P_cd (log P_cd - lamb log P_c - lamb log P_d).

    Args:
        logits1: (N, K) float. Clusters of the first view, before the softmax.
        logits2: (N, K) float. Of the second view; row i of both is the same item.
        lamb: Above 0; weight of the entropy of both marginals (the paper: 1).

    Returns:
        Scalar in float32 or wider, in nats, in [-log K, 0] for lamb 1; a larger lamb goes below. A uniform guess gives
        -2 (lamb - 1) log K, one cluster for everything 0.

    Raises:
        ShapeError: The shapes differ or are not (N, K).
        InputError: lamb is not positive, or the tensors are not floating.
    """
    check_float("logits1", logits1, "(N, K)", 2)
    check_paired("logits1", logits1, "logits2", logits2)
    check_lamb(lamb)
    with exact_float32(logits1.device):
        p, q = (widen(logits).softmax(1) for logits in (logits1, logits2))
        return joint_loss((p.T @ q)[None], lamb=lamb)


def iic_segmentation(
    logits1: Tensor,
    logits2: Tensor,
    *,
    affine2_to_1: Tensor | None = None,
    mask: Tensor | None = None,
    max_displacement: int = 0,
    lamb: float = 1.0,
    collapsed: bool = False,
) -> Tensor:
    """Negative mutual information between the clusters of the same (or a near) place in two dense maps.

    Ji et al. 2019 (arXiv:1807.06653), section 3.3, Eq. (5). Softmax first; the second probabilities are brought onto
    the grid of the first; both are masked; then for every displacement t in [-T, T]^d

        P_t[c, d] = sum over items n and places u of p_n[c, u + t] q_n[d, u],

    outside the map 0. Every P_t is normalised and symmetrised and gives a loss as `iic`; the result is their mean
    (uncollapsed, which is what every published command runs), or one loss of their sum (collapsed).

    Args:
        logits1: (N, K, *spatial) float, 2 or 3 spatial axes, before the softmax.
        logits2: (N, K, *spatial) float; of another size only where ``affine2_to_1`` is given.
        affine2_to_1: (N, d, d + 1), brings the second map onto the grid of the first: theta as
            ``F.affine_grid(align_corners=False)`` takes it, from the first map's normalised coordinates to the
            second's. Sampled linearly, 0 outside. None: the maps lie on one grid.
        mask: (N, *spatial) boolean or float weights on the grid of the first: places that count. None: all.
        max_displacement: T, in voxels of the map.
        lamb: Above 0; weight of the entropy of both marginals.
        collapsed: Sum over displacements before the logarithms.

    Returns:
        Scalar in float32 or wider, in nats. A displacement at which no place counts contributes 0 and is counted;
        a batch that is masked everywhere gives 0 with gradient 0.

    Raises:
        ShapeError: Shapes other than the above.
        InputError: lamb is not positive, the displacement negative or as large as the map.
    """
    check_lamb(lamb)
    joints = segmentation_joints(
        logits1, logits2, affine2_to_1=affine2_to_1, mask=mask, max_displacement=max_displacement
    )
    return joint_loss(joints, lamb=lamb, collapsed=collapsed)


def segmentation_joints(
    logits1: Tensor,
    logits2: Tensor,
    *,
    affine2_to_1: Tensor | None = None,
    mask: Tensor | None = None,
    max_displacement: int = 0,
) -> Tensor:
    """The sums P_t of `iic_segmentation`, ((2T + 1)^d, K, K), not yet normalised.

    They add up over processes: ``joint_loss(all_reduce_sum(joints))`` is the loss of the whole batch for a few
    kilobytes of communication. Arguments and errors are those of `iic_segmentation`; with displacements in row-major
    order, from -T on the first axis.
    """
    _check_maps(logits1, logits2, affine2_to_1, mask, max_displacement)
    with exact_float32(logits1.device):
        p, q = (widen(logits).softmax(1) for logits in (logits1, logits2))
        if affine2_to_1 is not None:
            q = warp(q, affine2_to_1, tuple(p.shape[2:]))
        if mask is not None:
            weights = mask.to(p)[:, None]
            p, q = p * weights, q * weights
        return _displaced_joints(p, q, max_displacement)


def joint_loss(joints: Tensor, *, lamb: float = 1.0, collapsed: bool = False) -> Tensor:
    """The loss of sums of products of probabilities, as `iic` and `iic_segmentation` take it.

    Args:
        joints: (T, K, K) float, at least 0.
        lamb: Weight of the entropy of both marginals.
        collapsed: One loss of their sum, instead of the mean of their losses.

    Returns:
        Scalar; a sum without entries contributes 0, with gradient 0.
    """
    with exact_float32(joints.device):
        # Terms of both signs cancel to a value near 0 at the start: float64, on a table of a few clusters.
        joint = joints.double()
        if collapsed:
            joint = joint.sum(0, keepdim=True)
        joint = (joint + joint.mT) / 2
        total = joint.sum((1, 2), keepdim=True)
        # Above what rounding leaves of nothing; asked the other way round, so that a NaN goes through to the loss.
        seen = ~(total <= NOTHING * total.amax())
        warn_if(~seen.any(), "no place of the batch is seen in both views: the loss is 0 with gradient 0")
        joint = joint / torch.where(seen, total, 1.0)
        marginal = joint.sum(2)  # of rows and of columns: the joint is symmetric
        log_joint, log_marginal = joint.clamp(min=EPSILON).log(), marginal.clamp(min=EPSILON).log()
        terms = lamb * (log_marginal[:, :, None] + log_marginal[:, None, :]) - log_joint
        losses = (joint.clamp(min=EPSILON) * terms).sum((1, 2))
        loss = torch.where(seen.flatten(), losses, 0.0).mean() + attached_zero(joints)
        return loss.to(widen(joints).dtype)


def check_lamb(lamb: float) -> None:
    """Refuse weights of the marginal entropies that are not positive and finite."""
    if not (lamb > 0 and math.isfinite(lamb)):
        raise InputError("lamb must be a positive number", found=str(lamb), fix="1 is the paper's; 1.5 its largest")


def _displaced_joints(p: Tensor, q: Tensor, reach: int) -> Tensor:
    """Sums of p[n, c, u + t] q[n, d, u] over n and u, (displacements, K, K)."""
    dims = p.ndim - 2
    if (2 * reach + 1) ** dims > MOST_SHIFTS:
        return _by_transform(p, q, reach)
    # With a margin of zeros round every map, a displacement is one shift of the flattened batch: no value is copied.
    margin = (reach, reach) * dims
    p, q = (pad(x.transpose(0, 1), margin) for x in (p, q))
    strides = [math.prod(p.shape[axis + 1 :]) for axis in range(2, p.ndim)]
    p, q = p.flatten(1), q.flatten(1)
    first, last = reach * sum(strides), p.shape[1] - reach * sum(strides)
    inner = q[:, first:last].T
    shifts = [
        sum(t * stride for t, stride in zip(offset, strides, strict=True))
        for offset in product(range(-reach, reach + 1), repeat=dims)
    ]
    return torch.stack([p[:, first + shift : last + shift] @ inner for shift in shifts])


def _by_transform(p: Tensor, q: Tensor, reach: int) -> Tensor:
    """The same by the correlation theorem, whose cost hardly grows with the reach.

    In float64: the joint of two clusters that hardly ever meet is far below the rounding of float32 transforms.
    """
    axes = list(range(2, p.ndim))
    size = [length + reach for length in p.shape[2:]]  # zeros enough that nothing wraps round
    first, second = (torch.fft.rfftn(x.double(), s=size, dim=axes) for x in (p, q))
    spectrum = torch.einsum("nkf,nlf->klf", first.flatten(2), second.flatten(2).conj())
    joints = torch.fft.irfftn(spectrum.unflatten(2, first.shape[2:]), s=size, dim=axes)
    joints = joints.roll([reach] * len(axes), axes)[(..., *[slice(0, 2 * reach + 1)] * len(axes))]
    return joints.flatten(2).movedim(2, 0).clamp(min=0).to(p.dtype)


def _check_maps(logits1: Tensor, logits2: Tensor, affine2_to_1: Tensor | None, mask: Tensor | None, reach: int) -> None:
    if logits1.ndim not in (4, 5):
        raise ShapeError("logits1 must be (N, K, X, Y) or (N, K, X, Y, Z)", found=str(tuple(logits1.shape)))
    check_float("logits1", logits1, "(N, K, *spatial)", logits1.ndim)
    check_float("logits2", logits2, "(N, K, *spatial)", logits1.ndim)
    if affine2_to_1 is None:
        check_paired("logits1", logits1, "logits2", logits2)
    elif logits1.shape[:2] != logits2.shape[:2]:
        raise ShapeError(
            "logits1 and logits2 must agree in items and clusters",
            found=f"{tuple(logits1.shape)} and {tuple(logits2.shape)}",
        )
    spatial = tuple(logits1.shape[2:])
    if mask is not None and mask.shape != (len(logits1), *spatial):
        raise ShapeError(
            "mask must have one value per place of the first map",
            found=f"{tuple(mask.shape)}, the map is {(len(logits1), *spatial)}",
        )
    if not 0 <= reach < min(spatial):
        raise InputError(
            "max_displacement must be at least 0 and smaller than the map",
            found=f"{reach}, map {spatial}",
            fix=f"choose 0 to {min(spatial) - 1}",
        )
