"""LCL: local contrast between regions of the decoder's map."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from medssl.core.distributed import gather
from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.seeding import REGIONS, numpy_rng
from medssl.core.transfer import onto
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import local_contrastive, nearest_negatives, region_corners
from medssl.methods.entry import stacked_views
from medssl.models.heads import LocalHead


class LCLConfig(StrictModel):
    """Settings of the local contrastive loss."""

    name: Literal["lcl"] = "lcl"
    strategy: Literal["lr", "ld"] = "lr"
    """lr: the two versions of an item; ld: also the same place in the same partition of other volumes."""
    temperature: PositiveFloat = 0.1
    """Chaitanya et al. 2020, section 4."""
    region_size: Literal[1, 3] = 3
    """Voxels on a side of a region (Chaitanya et al. 2020: 3)."""
    regions: Literal["full", "outer", "random"] = "full"
    """full: 13 fixed places in 2D, 35 in 3D; outer: the 9 (27) of them on the coarse grid; random: as many as full,
    anew at each step."""
    n_negatives: PositiveInt | None = 5
    """Nearest other regions that repel (the authors' program: 5 for lr, 4 for ld); null: all others (the paper)."""
    region_features: PositiveInt | None = 128
    """Length to which a learned map shared by all regions brings them; null: compare their voxels as they are."""
    freeze_encoder: bool = True
    """The paper trains the decoder on top of a pretrained encoder; false: train both."""

    def needs(self) -> Needs:
        """Views that leave every voxel where it is, and a decoder; ld also partitions."""
        samplers = frozenset({"partition", "partition_pairs"}) if self.strategy == "ld" else frozenset[str]()
        return Needs(
            spatial_dims=IMAGES,
            views=2,
            moves="none",
            samplers=samplers,
            partitions=self.strategy == "ld",
            decoder=True,
            trains=("decoder",) if self.freeze_encoder else ("encoder", "decoder"),
            features=(),
        )


class LCL(Method):
    r"""Chaitanya et al. 2020, "Contrastive learning of global and local features for medical image segmentation with
    limited annotations" (arXiv:2006.10511), section 3.2.

    Regions of the decoder's map at the same place in two versions of an image attract, regions elsewhere repel. It
    trains the first l decoder blocks (`model.decoder_blocks`) on top of a pretrained, frozen encoder, so that a decoder
    too starts from learnt weights. With `ld`, the same place in the same partition of other volumes attracts as well.

    Formula:
        $$ \ell(r) = -\log \frac{e^{s(A_r, P_r)}}
        {e^{s(A_r, P_r)} + \sum_{q \in \Lambda(r)} \left(e^{s(A_r, A_q)} + e^{s(A_r, P_q)}\right)} $$
        A and P the maps of both versions, r a region, $\Lambda(r)$ its negatives (other regions), s the cosine of two
        regions over the temperature. The loss is the mean over regions, images and, with `lr`, both directions.

    Use it when:
        The target is dense, after gcl or another pretraining of the encoder (`weights: runs/NAME`).

    Leave it when:
        Volumes are not aligned in plane and `ld` is meant: it pulls together places, not structures. Voxel position can
        be told from padding and image borders, and a region of pure background is like any other, so crop tightly.
        With few blocks the map is coarse, and the regions are few.

    Views may change intensities only (`views.preset: intensity`); `ld` also needs partitions and the sampler
    `partition` or `partition_pairs`. A frozen encoder runs in evaluation mode, unlike in the authors' program: batch
    statistics would make the features of an image depend on the rest of its batch, and would move running statistics
    that are exported beside weights which did not move.

    Raises:
        ConfigError: No decoder, or its map is too small for the regions.
    """

    def __init__(self, config: LCLConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        if parts.decoder is None:
            raise ConfigError("lcl trains decoder blocks, but there is no decoder", fix="set model.decoder_blocks: 3")
        self.decoder = parts.decoder
        if config.freeze_encoder:
            self.encoder.requires_grad_(False)
            self.encoder.eval()
        self.head = LocalHead(
            parts.decoder.out_channels,
            parts.spatial_dims,
            norm=parts.decoder.norm,
            region_size=config.region_size,
            region_features=config.region_features,
        )
        self._map_size = _map_size(parts)
        corners = _fixed_corners(self._map_size, config)
        if len(corners) <= (config.n_negatives or 1):
            raise ConfigError(
                f"the decoder's map of {self._map_size} voxels has {len(corners)} regions, too few for the negatives",
                where="method.n_negatives",
                fix=f"set it to at most {len(corners) - 1}, or train more decoder blocks (model.decoder_blocks)",
            )
        self._corners = corners

    def train(self, mode: bool = True) -> LCL:
        """Training mode for what is trained; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Local contrast over the items of every process."""
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.freeze_encoder):
            maps = self.encoder.feature_maps(stacked_views(batch, 2))
        feat_a, feat_b = self.head(self.decoder(maps)).chunk(2)
        feat_a, feat_b, partition, volume = gather((feat_a, feat_b, batch.items["partition"], batch.items["volume"]))
        corners = self.corners(batch.seed, batch.step)
        loss = local_contrastive(
            feat_a,
            feat_b,
            corners,
            # The map of regions has made one voxel of each region already.
            region_size=1 if config.region_features else config.region_size,
            negatives=None if config.n_negatives is None else nearest_negatives(corners, config.n_negatives),
            strategy=config.strategy,
            partition=partition if config.strategy == "ld" else None,
            volume=volume if config.strategy == "ld" else None,
            temperature=config.temperature,
        )
        at_corners = feat_a.detach()[(..., *onto(corners, feat_a.device).T)]  # (N, D, R)
        return LossOutput(loss, embedding=at_corners.transpose(1, 2).flatten(0, 1))

    def corners(self, seed: int, step: int) -> Tensor:
        """First voxels of the regions of a step, int64 (R, dims); the same on every process."""
        if self.config.regions != "random":
            return self._corners
        places = [size - self.config.region_size + 1 for size in self._map_size]
        drawn = numpy_rng(seed, REGIONS, step).choice(math.prod(places), len(self._corners), replace=False)
        return torch.stack(torch.unravel_index(torch.from_numpy(drawn), places), dim=1)


def _map_size(parts: ModelParts) -> tuple[int, ...]:
    """Spatial size of the decoder's map for one image."""
    networks = nn.ModuleList([parts.encoder, parts.decoder])
    modes = [network.training for network in networks]
    networks.eval()  # running statistics must not see the empty image
    try:
        with torch.no_grad():
            image = torch.zeros(1, *parts.image_shape, device=next(networks.parameters()).device)
            return tuple(networks[1](networks[0].feature_maps(image)).shape[2:])
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


def _fixed_corners(spatial: tuple[int, ...], config: LCLConfig) -> Tensor:
    if min(spatial) < config.region_size:
        raise ConfigError(
            f"the decoder's map of {spatial} voxels is smaller than a region of {config.region_size}",
            where="model.decoder_blocks",
            fix="train more decoder blocks, or set method.region_size: 1",
        )
    corners = region_corners(spatial, config.region_size)
    if config.regions != "outer":
        return corners
    # The first of them are the grid {0, m/2, m} on every axis, coinciding ones once.
    return corners[: math.prod(len({0, last // 2, last}) for last in corners.amax(0).tolist())]
