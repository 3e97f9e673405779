"""Barlow Twins: each dimension agrees between views and with no other dimension."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import barlow_twins
from medssl.methods.entry import embed_views
from medssl.models.heads import ProjectionHead


class BarlowTwinsConfig(StrictModel):
    """Settings of Barlow Twins."""

    name: Literal["barlow_twins"] = "barlow_twins"
    redundancy_weight: NonNegativeFloat = 0.0051
    """Weight of the products of different dimensions (the authors' program; the paper prints 0.005)."""
    hidden_dim: PositiveInt = 512
    """Width of the two hidden layers of the projector. Zbontar et al. 2021: 8192, for batches of 2048."""
    projection_dim: PositiveInt = 512
    """Length of the projection. Zbontar et al. 2021: 8192, for batches of 2048; by chance alone D dimensions of N items
    have squared products of about D^2 / N in all, which then outweigh the D of the diagonal."""

    def needs(self) -> Needs:
        """Two views of anything, and items to take statistics over."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class BarlowTwins(Method):
    r"""Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv:2103.03230).

    Draws the cross-correlation matrix of the dimensions of two views to the identity. Each dimension is to agree
    between the views, and to say what no other dimension says; no item is compared with another. The statistics are of
    the batch of all processes, and both views share the batch norms of the projector, where the authors' program gives
    each view its own.

    Formula:
        $$ L = \sum_i (C_{ii}-1)^2 + \lambda\sum_{i\ne j} C_{ij}^2, \qquad
        C = \tfrac1N\, \hat z_1^{\top}\hat z_2 $$
        z-hat: projections of a view with each dimension standardised over the batch; N: items of the batch;
        lambda: redundancy_weight.

    Use it when:
        Items are alike, or several items show one subject, so that calling them negatives would be wrong. Batches of
        32 and more.

    Leave it when:
        The batch holds fewer than about 16 items: a correlation over them is mostly chance, whatever the width. Wide
        projections want large batches; narrow ones keep little.
    """

    def __init__(self, config: BarlowTwinsConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = ProjectionHead(
            parts.encoder.out_features, config.hidden_dim, config.projection_dim, "batch", n_hidden=2, bias=False
        )

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Cross-correlation over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        loss = barlow_twins(z[:, 0], z[:, 1], redundancy_weight=self.config.redundancy_weight)
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
