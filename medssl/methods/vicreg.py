"""VICReg: views agree, each dimension keeps its variance, and no two dimensions covary."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import vicreg
from medssl.methods.entry import embed_views
from medssl.models.heads import ProjectionHead


class VICRegConfig(StrictModel):
    """Settings of VICReg."""

    name: Literal["vicreg"] = "vicreg"
    invariance_weight: NonNegativeFloat = 25.0
    """Of the distance between views (lambda of Bardes et al. 2022: 25)."""
    variance_weight: NonNegativeFloat = 25.0
    """Of the floor under the standard deviation of each dimension (mu of Bardes et al. 2022: 25)."""
    covariance_weight: NonNegativeFloat = 1.0
    """Of the covariance of different dimensions (nu of Bardes et al. 2022: 1)."""
    hidden_dim: PositiveInt = 512
    """Width of the two hidden layers of the expander. Bardes et al. 2022: 8192, for batches of 2048."""
    projection_dim: PositiveInt = 512
    """Length of the embedding. Bardes et al. 2022: 8192, for batches of 2048; by chance alone the covariance term of
    N items is about D / N."""

    def needs(self) -> Needs:
        """Two views of anything, and items to take statistics over."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class VICReg(Method):
    r"""Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization" (arXiv:2105.04906).

    Draws the two views of an item together, and prevents collapse by two terms on each view alone: a floor under the
    standard deviation of every dimension, and no covariance between dimensions. Nothing is normalised by row and no
    item is compared with another. The weights are those of the authors' program; both views share the batch norms of
    the expander, where that program gives each view its own.

    Formula:
        $$ L = \lambda\,\frac1{ND}\sum_{i,j}(z^1_{ij}-z^2_{ij})^2
        + \frac{\mu}{2}\sum_v\frac1D\sum_j\Big[1-\sqrt{\mathrm{var}(z^v_j)+10^{-4}}\Big]_+
        + \nu\sum_v\frac1D\sum_{i\ne j}\mathrm{Cov}(z^v)_{ij}^2 $$
        z: raw embeddings of view v; N: items of the batch; D: dimensions; lambda, mu, nu: invariance_weight,
        variance_weight and covariance_weight.

    Use it when:
        Items are alike, or several items show one subject, so that calling them negatives would be wrong. Unlike
        barlow_twins it never asks for the correlation of both views, so the weights of its terms can be set one by one.

    Leave it when:
        The batch holds fewer than about 16 items, whose variances and covariances are mostly chance.
    """

    def __init__(self, config: VICRegConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = ProjectionHead(
            parts.encoder.out_features, config.hidden_dim, config.projection_dim, "batch", n_hidden=2, bias=False
        )

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """The three terms over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        config = self.config
        loss = vicreg(
            z[:, 0],
            z[:, 1],
            invariance_weight=config.invariance_weight,
            variance_weight=config.variance_weight,
            covariance_weight=config.covariance_weight,
        )
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
