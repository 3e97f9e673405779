"""Contrastive loss between regions of dense feature maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.core.transfer import onto
from medssl.losses.numerics import (
    attached_zero,
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


def local_contrastive(
    feat_a: Tensor,
    feat_b: Tensor,
    corners: Tensor,
    *,
    region_size: int = 3,
    negatives: Tensor | None = None,
    strategy: Literal["lr", "ld"] = "lr",
    partition: Tensor | None = None,
    volume: Tensor | None = None,
    temperature: float = 0.1,
) -> Tensor:
    """Local contrastive loss: a region attracts its counterpart and repels other regions.

    Chaitanya et al. 2020 (arXiv:2006.10511), Eqs. (3), (4). A region of an anchor map A with counterpart in a partner
    map P contributes -log of e^s(A_r, P_r) / (e^s(A_r, P_r) + sum over negatives q of e^s(A_r, A_q) + e^s(A_r, P_q)),
    s the cosine of the flattened regions over the temperature.

    - "lr": A and P are the two versions of an item, in both directions; the mean is over items, directions and
      regions (half of the paper's sum of both directions).
    - "ld": A is feat_a of an item; P is feat_b of the item, and feat_a of every item of another volume at the same
      partition. The mean is over all (anchor item, partner, region); not symmetrised. An item without partners
      elsewhere contributes its own pair alone.

    A learned linear map of a region is a convolution of that size before, then ``region_size=1``.

    Args:
        feat_a: (N, C, *spatial) float, 2 or 3 spatial axes. Not normalised. Same voxels as feat_b.
        feat_b: As feat_a.
        corners: (R, dims) integer. First voxel of each region.
        region_size: Voxels on a side, the same on every spatial axis.
        negatives: (R, M, dims) integer, the corners that repel each region (repeats count); None: all other regions.
        strategy: Which maps attract.
        partition: (N,) integer, needed by "ld".
        volume: (N,) integer, needed by "ld".
        temperature: Above 0, dimensionless.

    Returns:
        Scalar in float32 or wider, in nats; 0 with gradient 0 when no region has negatives.

    Raises:
        ShapeError: Shapes other than the above, or a missing partition or volume.
        InputError: A region outside the map, an unknown strategy, a temperature or region size that is not positive.
    """
    check_choice("strategy", strategy, ("lr", "ld"))
    if feat_a.ndim not in (4, 5):
        raise ShapeError("feat_a must be (N, C, X, Y) or (N, C, X, Y, Z)", found=str(tuple(feat_a.shape)))
    check_float("feat_a", feat_a, "(N, C, *spatial)", feat_a.ndim)
    check_paired("feat_a", feat_a, "feat_b", feat_b)
    check_temperature(temperature)
    voxels, at, places = _places(corners, negatives, tuple(feat_a.shape[2:]), region_size)
    if strategy == "ld":
        partition = onto(check_codes("partition", partition, len(feat_a), "strategy ld"), feat_a.device)
        volume = onto(check_codes("volume", volume, len(feat_a), "strategy ld"), feat_a.device)
    if places.shape[1] == 0:
        warn_if(True, "no region has negatives: the local contrastive loss is 0 with gradient 0")
        return attached_zero(feat_a, feat_b)
    with exact_float32(feat_a.device):
        voxels, at, places = (onto(table, feat_a.device) for table in (voxels, at, places))
        a, b = (_regions(feat, voxels) for feat in (feat_a, feat_b))  # (N, U, F) each
        if partition is not None and volume is not None and strategy == "ld":
            return _ld(a, b, at, places, partition, volume, temperature)
        terms = (_directed(a, b, at, places, temperature), _directed(b, a, at, places, temperature))
        return torch.stack(terms).mean()


def _directed(anchor: Tensor, partner: Tensor, at: Tensor, places: Tensor, temperature: float) -> Tensor:
    """Terms (N, R) of anchors in one map (N, U, F) and counterparts in the other."""
    own, positive, other = _similarities(anchor, partner, at, places, temperature)
    return excess(torch.logaddexp(own, other), positive)


def _similarities(
    anchor: Tensor, partner: Tensor, at: Tensor, places: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LSE over the anchor's own map, positive, LSE over the partner's map: (N, R) each."""
    regions = anchor.index_select(1, at) / temperature
    own, across = regions @ anchor.mT, regions @ partner.mT  # (N, R, U)
    chosen, counterpart = places.expand(len(anchor), -1, -1), at[:, None].expand(len(anchor), -1, 1)
    return (
        own.gather(2, chosen).logsumexp(2),
        across.gather(2, counterpart).squeeze(2),
        across.gather(2, chosen).logsumexp(2),
    )


def _ld(
    a: Tensor, b: Tensor, at: Tensor, places: Tensor, partition: Tensor, volume: Tensor, temperature: float
) -> Tensor:
    """Mean over (anchor item, partner, region). Forms all N x N pairs of maps: choosing first would need a sync."""
    n, (r, m) = len(a), places.shape
    own, positive, other = _similarities(a, b, at, places, temperature)
    same_item = excess(torch.logaddexp(own, other), positive).sum()

    partners = (partition[:, None] == partition[None, :]) & (volume[:, None] != volume[None, :])  # (N, N)
    similarity = (a.index_select(1, at).flatten(0, 1) / temperature) @ a.flatten(0, 1).T
    similarity = similarity.view(n, r, n, -1).transpose(1, 2)  # (N, N, R, U): anchor item, partner item
    others = similarity.gather(3, places.expand(n, n, r, m)).logsumexp(3)
    counterpart = similarity.gather(3, at[:, None].expand(n, n, r, 1)).squeeze(3)
    terms = excess(torch.logaddexp(own[:, None], others), counterpart)
    across = (terms * partners[..., None]).sum()
    return (same_item + across) / (r * (n + partners.sum()))


def _regions(feat: Tensor, voxels: Tensor) -> Tensor:
    """Unit vectors (N, U, C * region voxels) of the regions whose flat voxel numbers are ``voxels`` (U, k)."""
    n, c = feat.shape[:2]
    picked = feat.flatten(2).index_select(2, voxels.flatten()).view(n, c, *voxels.shape)
    return unit(picked.permute(0, 2, 1, 3).reshape(n, len(voxels), -1).contiguous())


def _places(
    corners: Tensor, negatives: Tensor | None, spatial: tuple[int, ...], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat voxel numbers (U, k) of the distinct regions; which are the anchors (R,), and their negatives (R, M)."""
    _check_corners(corners, negatives, spatial, size)
    corners = corners.detach().cpu().long()
    r, dims = corners.shape
    if negatives is not None:
        # A table of neighbours names most regions several times: each distinct one is read and compared once.
        corners = torch.cat([corners, negatives.detach().cpu().long().flatten(0, 1)])
    distinct, number = corners.unique(dim=0, return_inverse=True)
    if negatives is None:
        places = number.expand(r, r)[~torch.eye(r, dtype=torch.bool)].view(r, r - 1)
    else:
        places = number[r:].view(negatives.shape[:2])
    limit = torch.tensor(spatial) - size
    if bool((distinct < 0).any()) or bool((distinct > limit).any()):
        raise InputError(
            "a region reaches outside the feature map",
            found=f"corners from {distinct.amin(0).tolist()} to {distinct.amax(0).tolist()}, "
            f"map {spatial}, region_size {size}",
            fix=f"keep corners between 0 and {limit.tolist()}",
        )
    steps = torch.cartesian_prod(*[torch.arange(size)] * dims).view(-1, dims)
    stride = torch.tensor(spatial).flip(0).cumprod(0).flip(0).roll(-1)
    stride[-1] = 1
    return ((distinct[:, None] + steps) * stride).sum(-1), number[:r], places


def _check_corners(corners: Tensor, negatives: Tensor | None, spatial: tuple[int, ...], size: int) -> None:
    dims = len(spatial)
    if size < 1:
        raise InputError("region_size must be at least 1", found=str(size))
    if corners.ndim != 2 or corners.shape[1] != dims or len(corners) == 0:
        raise ShapeError(f"corners must be (R, {dims}) with R at least 1", found=str(tuple(corners.shape)))
    if negatives is not None and (negatives.ndim != 3 or len(negatives) != len(corners) or negatives.shape[2] != dims):
        raise ShapeError(f"negatives must be ({len(corners)}, M, {dims})", found=str(tuple(negatives.shape)))
    for name, table in (("corners", corners), ("negatives", negatives)):
        if table is not None and (table.is_floating_point() or table.dtype == torch.bool):
            raise InputError(f"{name} must hold integer voxel numbers", found=str(table.dtype))
