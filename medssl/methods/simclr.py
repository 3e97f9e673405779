"""SimCLR: two views of an image attract, all other images of the batch repel."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import nt_xent
from medssl.methods.entry import embed_views
from medssl.models.heads import ProjectionHead


class SimCLRConfig(StrictModel):
    """Settings of SimCLR."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """Chen et al. 2020, Table 5: 0.1 for large batches; up to 0.5 for small ones."""
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of the head; null: as many as the encoder gives (the paper)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Chen et al. 2020, section 2.1)."""

    def needs(self) -> Needs:
        """Two views of anything."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class SimCLR(Method):
    """Chen et al. 2020, "A Simple Framework for Contrastive Learning" (arXiv:2002.05709)."""

    def __init__(self, config: SimCLRConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features = parts.encoder.out_features
        self.head = ProjectionHead(features, config.hidden_dim or features, config.projection_dim)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """NT-Xent over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        loss = nt_xent(z[:, 0], z[:, 1], temperature=self.config.temperature)
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
