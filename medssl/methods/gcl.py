"""GCL: global contrast between volumes that are cut into partitions."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import global_contrastive
from medssl.methods.entry import split_views, stacked_views
from medssl.models.heads import GlobalHead, Pool


class GCLConfig(StrictModel):
    """Settings of the global contrastive loss."""

    name: Literal["gcl"] = "gcl"
    strategy: Literal["gr", "gd-", "gd"] = "gd"
    """gr: random pairs; gd-: only other partitions repel; gd: also the same partition of other volumes attracts."""
    temperature: PositiveFloat = 0.1
    """Chaitanya et al. 2020, section 4."""
    pool: Pool = "flatten"
    """What the head sees of the coarsest map: flatten (the paper; fits one image size) or avg."""
    hidden_dim: PositiveInt = 1024
    """Width between the two layers of the head g1 (Chaitanya et al. 2020)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Chaitanya et al. 2020)."""

    @property
    def n_views(self) -> int:
        """gr compares two versions; gd- and gd the original and two versions."""
        return 2 if self.strategy == "gr" else 3

    def needs(self) -> Needs:
        """gd- and gd need whole sets of partitions of several volumes, and the item itself as view 0."""
        if self.strategy == "gr":
            return Needs(views=2, spatial_dims=IMAGES, min_batch=2, features=("h", "z"))
        return Needs(
            views=3,
            original=True,
            samplers=frozenset({"partition"}),
            partitions=True,
            spatial_dims=IMAGES,
            min_batch=2,
            features=("h", "z"),
        )


class GCL(Method):
    """Chaitanya et al. 2020, "Contrastive learning of global and local features" (arXiv:2006.10511), section 3.1."""

    def __init__(self, config: GCLConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = GlobalHead(
            parts.encoder,
            parts.image_shape,
            pool=config.pool,
            hidden=config.hidden_dim,
            out_features=config.projection_dim,
        )

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Global contrast over the items of every process."""
        n_views = self.config.n_views
        coarsest = self.encoder.feature_maps(stacked_views(batch, n_views))[-1]
        own = split_views(self.head(coarsest), n_views)  # (N, V, D)
        h = coarsest[: len(own)].flatten(2).mean(2)
        z, partition, volume = gather((own, batch.items["partition"], batch.items["volume"]))
        loss = global_contrastive(
            z, partition, volume, strategy=self.config.strategy, temperature=self.config.temperature
        )
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
