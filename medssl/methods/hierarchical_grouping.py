"""Hierarchical grouping: pixels of regions that join early in a tree attract, those that join late repel."""

from __future__ import annotations

import logging
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from medssl.core import seeding
from medssl.core.distributed import gather, world_size
from medssl.core.errors import ConfigError, DataError
from medssl.core.schema import StrictModel
from medssl.core.transfer import onto
from medssl.core.types import IMAGES, ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.regions import HEIGHTS, REGION_MAP, RegionsConfig
from medssl.data.weak_labels import LabelUse
from medssl.losses import pixel_contrast
from medssl.models.blocks import CONV, conv_norm_relu
from medssl.models.norm import Norm

log = logging.getLogger(__name__)

LINEAR = {2: "bilinear", 3: "trilinear"}


class HierarchicalGroupingConfig(StrictModel):
    """Settings of hierarchical grouping."""

    name: Literal["hierarchical_grouping"] = "hierarchical_grouping"
    regions: RegionsConfig = RegionsConfig()
    """How the regions of every item are found, before training."""
    temperature: PositiveFloat = 0.1
    """Ours: the paper's is not known to us."""
    n_anchors: PositiveInt = 7
    """Regions of an image that have an anchor pixel, in each step (Zhang & Maire 2020: 7)."""
    n_positives: PositiveInt = 10
    """Pixels that attract an anchor (Zhang & Maire 2020: 10)."""
    n_negatives: PositiveInt = 5
    """Pixels that repel it, of the same image (Zhang & Maire 2020: 5)."""
    sigma_positive: PositiveFloat = 0.1
    """A pixel at height d attracts with a probability proportional to exp(-d / sigma_positive). Ours: the paper asks
    for one that falls with d; for relative heights, which most pairs of regions have between 0.5 and 1."""
    sigma_negative: PositiveFloat = 0.5
    """It repels with a probability proportional to 1 - exp(-d / sigma_negative). Ours, likewise. The two are not
    complements: pixels between may rarely be either."""
    levels: tuple[int, int] = (-2, -1)
    """Maps of the encoder that form the hypercolumn, counted from the finest (0) or the coarsest (-1). The paper takes
    Res3 and Res4 of a ResNet-50 (-3, -2); ours are the two coarsest, so that every weight of the encoder is trained.
    What is coarser than both is neither trained nor of use."""
    hidden_dim: PositiveInt = 256
    """Channels of each of the two maps after their convolution (Zhang & Maire 2020: 256)."""
    projection_dim: PositiveInt = 32
    """Channels of the hypercolumn (Zhang & Maire 2020: 32)."""
    map_stride: PositiveInt = 4
    """Voxels of the image per voxel of the hypercolumn's grid, along each axis (Zhang & Maire 2020: 4)."""
    norm: Norm = "batch"
    """After the two convolutions (Zhang & Maire 2020: batch)."""

    @model_validator(mode="after")
    def _enough_regions(self) -> HierarchicalGroupingConfig:
        if self.n_anchors > self.regions.max_regions:
            raise ValueError(f"n_anchors {self.n_anchors} is more than regions.max_regions {self.regions.max_regions}")
        return self

    def needs(self) -> Needs:
        """One view of images, moved in any way, and the map of its regions."""
        return Needs(spatial_dims=IMAGES, views=1, labels=(REGION_MAP,), features=())

    def label_uses(self) -> tuple[LabelUse, ...]:
        """The column of supplied boundaries."""
        column = self.regions.boundaries
        return () if column is None else (LabelUse(column, "method.regions.boundaries", may_be_constant=True),)


class HierarchicalGrouping(Method):
    r"""Zhang & Maire 2020, "Self-Supervised Visual Representation Learning from Hierarchical Grouping" (arXiv:2012.03044).

    Every image is divided into at most 40 regions, and neighbours are joined one pair after the other, weakest boundary
    first; the height at which two regions join says how far apart their pixels are. In every step a few anchor pixels
    are drawn, for each of them positives, likely from regions near by in the tree, and negatives, likely from regions
    far away, all in the same image. Where the paper has edges learned from a small annotated set, the boundaries here
    are a stand-in, the magnitude of the image's gradient, unless `regions.boundaries` names maps of a detector.

    Formula:
        $$ L = \frac{1}{|A|} \sum_{i \in A} \frac{1}{|P_i|} \sum_{j \in P_i}
        -\log \frac{e^{s_{ij}}}{e^{s_{ij}} + \sum_{k \in N_i} e^{s_{ik}}}, \qquad
        \Pr(j \in P_i) \propto e^{-d_{ij} / \sigma_p}, \quad \Pr(k \in N_i) \propto 1 - e^{-d_{ik} / \sigma_n} $$
        A: anchor pixels; P_i, N_i: positives and negatives of anchor i; s: cosine of two pixels' hypercolumns over the
        temperature; d: height at which their regions join, the length-weighted mean strength of the boundary between.

    Use it when:
        The task is segmentation, structures differ from their surroundings in intensity, and volumes are few: one
        image gives its own positives and negatives, so that neither large batches nor partitions are needed.

    Leave it when:
        Boundaries are not visible (a lesion that only texture tells, subfields of the hippocampus), intensities are
        dominated by bias field or noise, or the task is about whole images (age, diagnosis): nothing compares images.

    An image, or a view of it, that shows one region only has no negatives: it is skipped, left out of the mean and
    counted (`skipped_items`). The decoder of a U-Net is not trained.

    Raises:
        ConfigError: Levels that the encoder does not have.
    """  # noqa: E501 - one line for the source

    head: nn.Module

    def __init__(self, config: HierarchicalGroupingConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        width = list(parts.encoder.width)
        self.levels = tuple(level + len(width) * (level < 0) for level in config.levels)
        if not all(0 <= level < len(width) for level in self.levels) or self.levels[0] == self.levels[1]:
            raise ConfigError(
                "a hypercolumn needs two different maps of the encoder",
                where="method.levels",
                found=f"{list(config.levels)}, the encoder has {len(width)} maps",
                fix="use [-2, -1], the two coarsest",
            )
        self.head = Hypercolumn(
            [width[level] for level in self.levels],
            parts.spatial_dims,
            hidden=config.hidden_dim,
            out_channels=config.projection_dim,
            norm=config.norm,
        )
        for block in parts.encoder.blocks()[max(self.levels) + 1 :]:
            for module in block:
                module.requires_grad_(False)

    def fit_labels(self, table: ItemTable) -> None:
        """Refuse a training set without a single boundary.

        Raises:
            DataError: Every item is one region.
            ConfigError: The table has no heights of regions.
        """
        if HEIGHTS not in table.labels:
            raise ConfigError("items have no regions", fix="find them with medssl.data.region_store.prepare_regions")
        single = np.isfinite(table.labels[HEIGHTS]).sum(1) <= 1
        if single.all():
            raise DataError(
                f"each of the {len(table)} items is one single region: there are no boundaries to learn from",
                where="method.regions",
                fix="lower method.regions.smoothing, or supply boundaries (method.regions.boundaries)",
            )
        if single.any():
            log.warning("%d of %d items are one single region each and will be skipped", single.sum(), len(table))

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Pixel contrast over the images of every process."""
        config, image = self.config, batch.views[0]
        maps = self.encoder.feature_maps(image)
        size = [-(-length // config.map_stride) for length in image.shape[2:]]
        z = self.head([maps[level] for level in self.levels], size).flatten(2).mT  # (N, M, D)
        regions = F.interpolate(batch.labels["label_map"][:, None].float(), size=size, mode="nearest-exact")
        heights = batch.labels[HEIGHTS].unflatten(1, (math.isqrt(batch.labels[HEIGHTS].shape[1]), -1))
        chosen = draw_pixels(regions.flatten(1).long(), heights, self._uniforms(batch, heights.shape[1]), config)
        # What is compared is gathered, not the maps: (N, A, 1 + p + n, D).
        pixels = z.gather(1, chosen.clamp(min=0).flatten(1)[..., None].expand(-1, -1, z.shape[2]))
        pixels, is_anchor = gather((pixels.unflatten(1, chosen.shape[1:]), chosen[..., 0] >= 0))
        rows = torch.arange(pixels[..., 0].numel(), device=z.device).view(-1, chosen.shape[2])
        rows = rows.masked_fill(~is_anchor.view(-1, 1), -1)
        loss = pixel_contrast(
            pixels.flatten(0, 2),
            rows[:, 0],
            rows[:, 1 : 1 + config.n_positives],
            rows[:, 1 + config.n_positives :],
            temperature=config.temperature,
        )
        logs = {
            "skipped_items": (~is_anchor.any(1)).sum().float(),
            "chance_loss": torch.full((), math.log1p(config.n_negatives), device=loss.device),
        }
        return LossOutput(loss, logs=logs, embedding=pixels[:, :, 0].detach().flatten(0, 1))

    def _uniforms(self, batch: ViewBatch, max_regions: int) -> Tensor:
        """Random numbers (N, ...) of this process's items, from the seed, the step and their slot."""
        slot = batch.items["slot"]
        shape = (len(slot) * world_size(), n_uniforms(max_regions, self.config))
        rng = torch.Generator().manual_seed(seeding.derive_seed(batch.seed, seeding.PIXELS, batch.step))
        return onto(torch.rand(shape, generator=rng), slot.device)[slot]


class Hypercolumn(nn.Module):
    """Two maps of an encoder, each through a 3^d convolution with norm and ReLU, on one grid, to one embedding a voxel.

    Args:
        channels: Channels of the two maps.
        dims: 2 or 3.
        hidden: Channels that each is brought to.
        out_channels: Channels of the result, by a last 3^d convolution.
        norm: Norm of the first convolutions.
    """

    def __init__(self, channels: list[int], dims: int, *, hidden: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(conv_norm_relu(dims, n, hidden, norm) for n in channels)
        self.out = CONV[dims](hidden * len(channels), out_channels, 3, padding=1)
        self._mode = LINEAR[dims]

    def forward(self, maps: list[Tensor], size: list[int]) -> Tensor:
        """Maps (N, C, *spatial) to (N, out_channels, *size)."""
        grids = [
            F.interpolate(layer(x), size=size, mode=self._mode, align_corners=False)
            for layer, x in zip(self.hidden, maps, strict=True)
        ]
        column: Tensor = self.out(torch.cat(grids, dim=1))
        return column


def n_uniforms(max_regions: int, config: HierarchicalGroupingConfig) -> int:
    """Random numbers that ``draw_pixels`` needs for an image."""
    anchors = min(config.n_anchors, max_regions)
    return max_regions + anchors * (1 + 2 * (config.n_positives + config.n_negatives))


def draw_pixels(regions: Tensor, heights: Tensor, uniforms: Tensor, config: HierarchicalGroupingConfig) -> Tensor:
    """Draw anchors, positives and negatives in every image.

    Anchors: different regions, all equally likely, and in each any pixel. Partners are drawn with repeats, pixel j of
    all others with a probability proportional to exp(-d / sigma_positive) and 1 - exp(-d / sigma_negative), where d is
    the height at which its region joins the anchor's.

    Args:
        regions: int64 (N, M), region of every pixel, 1 to R; others are outside.
        heights: (N, R, R), row a - 1 and column b - 1: where a and b join.
        uniforms: (N, n_uniforms) in [0, 1).
        config: Numbers and sigmas.

    Returns:
        int64 (N, A, 1 + positives + negatives), pixels in that order; all -1 where there is no such anchor: the image
        shows fewer regions, or none that could be positive, or none that could be negative.
    """
    n_regions, n_pairs = heights.shape[1], config.n_positives + config.n_negatives
    n_anchors = min(config.n_anchors, n_regions)
    u_region, u_anchor, u_pair = uniforms.split([n_regions, n_anchors, 2 * n_anchors * n_pairs], dim=1)
    u_which, u_where = u_pair.view(len(regions), 2, n_anchors, n_pairs).unbind(1)

    regions = regions.where((regions > 0) & (regions <= n_regions), 0)
    all_counts = torch.zeros(len(regions), n_regions + 1, dtype=torch.int64, device=regions.device)
    all_counts.scatter_add_(1, regions, torch.ones_like(regions))
    counts, starts = all_counts[:, 1:], all_counts.cumsum(1)[:, :-1]  # (N, R): pixels, and where they begin in
    in_order = regions.argsort(dim=1, stable=True)  # (N, M): pixels sorted by region

    rank, region = u_region.masked_fill(counts == 0, -1).topk(n_anchors, dim=1)  # (N, A)
    place = _up_to(u_anchor, counts.gather(1, region))
    anchor = _at(in_order, starts.gather(1, region) + place)

    distance = heights.double().gather(1, region[..., None].expand(-1, -1, n_regions))  # (N, A, R)
    itself = region[..., None] == torch.arange(n_regions, device=region.device)
    available = (counts[:, None] - itself.long()).clamp(min=0)
    attract = (-distance / config.sigma_positive).exp() * available
    repel = -torch.expm1(-distance / config.sigma_negative) * available
    which_positive, which_negative = u_which.split([config.n_positives, config.n_negatives], dim=2)
    partner = torch.cat([_categorical(attract, which_positive), _categorical(repel, which_negative)], dim=2)

    expanded = (len(regions), n_anchors, n_regions)
    place_in = _up_to(u_where, available.gather(2, partner))
    place_in = place_in + ((partner == region[..., None]) & (place_in >= place[..., None]))  # pass over the anchor
    chosen = _at(in_order, (starts[:, None].expand(expanded).gather(2, partner) + place_in).flatten(1))
    pixels = torch.cat([anchor[..., None], chosen.view_as(partner)], dim=2)
    valid = (rank >= 0) & (attract.sum(2) > 0) & (repel.sum(2) > 0)
    return pixels.masked_fill(~valid[..., None], -1)


def _categorical(weights: Tensor, u: Tensor) -> Tensor:
    """Draw with probabilities proportional to ``weights`` (N, A, R) float64, one for each of ``u`` (N, A, k)."""
    cumulated = weights.cumsum(2)
    # u has 24 bits, so that its product with the sum stays below the sum: no region of weight 0 is drawn at the end.
    return torch.searchsorted(cumulated, u.double() * cumulated[..., -1:], right=True).clamp(max=weights.shape[2] - 1)


def _up_to(u: Tensor, n: Tensor) -> Tensor:
    """A whole number from 0 to n - 1 for each ``u`` in [0, 1); 0 where n is 0."""
    return (u.double() * n).long().minimum((n - 1).clamp(min=0))


def _at(in_order: Tensor, index: Tensor) -> Tensor:
    """Pixels at places (N, k) of the sorted pixels (N, M)."""
    return in_order.gather(1, index.clamp(max=in_order.shape[1] - 1))
