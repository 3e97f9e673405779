"""The projection head that most embedding methods share."""

from __future__ import annotations

from pydantic import PositiveInt

from medssl.core.schema import StrictModel
from medssl.models.heads import HeadNorm, ProjectionHead


class HeadConfig(StrictModel):
    """Settings of a method with a projection head of one hidden layer; a field with another origin is told there."""

    name: str
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of the head; null: as many as the encoder gives (Chen et al. 2020, SimCLR)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Chen et al. 2020, section 2.1)."""
    head_norm: HeadNorm = "none"
    """Between the layers of the head: none (the published formula), or batch (the program of SimCLR). An encoder with
    group norm gives all items nearly one direction at first, from which a small training may not find away without
    it."""

    def projection_head(self, features: int) -> ProjectionHead:
        """The head on ``features`` numbers per item."""
        return ProjectionHead(features, self.hidden_dim or features, self.projection_dim, self.head_norm)
