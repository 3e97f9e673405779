"""GCL: global contrast between volumes that are cut into partitions."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import global_contrastive
from medssl.methods.entry import loss_of_equals, split_views, stacked_views
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
    r"""Chaitanya et al. 2020, "Contrastive learning of global and local features for medical image segmentation with
    limited annotations" (arXiv:2006.10511), section 3.1.

    Volumes of one anatomy, roughly aligned, are cut along one axis into S partitions; slices of the same partition
    show similar structures. With `gd-` only slices of other partitions repel, with `gd` slices of the same partition of
    other volumes also attract, and `gr` ignores partitions. It pretrains the encoder, from the coarsest map through a
    head that is thrown away.

    Formula:
        $$ \mathcal{L} = \frac{1}{|P|} \sum_{(a, b) \in P} -\log \frac{e^{s_{ab}}}
        {e^{s_{ab}} + \sum_{k \in \Lambda(a)} e^{s_{ak}}}, \qquad s_{ab} = u_a \cdot u_b / \tau $$
        P the ordered pairs that attract, $\Lambda(a)$ the rows of other partitions, u projections of length 1, $\tau$
        the temperature. Other positives are never in the denominator; the mean over ordered pairs is half of the
        paper's sum over both directions.

    Use it when:
        The field of view is standardised: cardiac short-axis stacks, prostate, brains in one space. Crop to the organ
        first, and check that few-label Dice improves, not only the loss.

    Leave it when:
        Position along the axis says little: varied fields of view, lesions anywhere, volumes cropped at random places.
        Partition membership is position, and position can be read from the outline of the body, the number of dark
        voxels or padding, without any anatomy; `gd` rewards that. A volume that is flipped along the axis, or that
        covers another range, gives wrong positives without any error.

    `gd-` and `gd` need three views, the first of them the item itself (`views: {n_views: 3, original: true}`),
    `items.partitions` and the sampler `partition`; `gr` needs two views and any sampler. The paper uses S = 4 (ACDC,
    Prostate, MMWHS), n_volumes 3 and the preset `gcl`. The flattening head fits one image size.
    """

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
        compare = functools.partial(
            global_contrastive,
            partition=partition,
            volume=volume,
            strategy=self.config.strategy,
            temperature=self.config.temperature,
        )
        loss = compare(z)
        logs = {"chance_loss": loss_of_equals(compare, z)}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
