"""Alignment and uniformity: views of an item attract, all items spread evenly over the sphere."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import alignment, uniformity
from medssl.losses.numerics import unit
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig


class AlignUniformConfig(HeadConfig):
    """Settings of alignment and uniformity."""

    name: Literal["align_uniform"] = "align_uniform"
    align_weight: NonNegativeFloat = 1.0
    """Weight of the alignment of views (Wang & Isola 2020: 1)."""
    uniform_weight: NonNegativeFloat = 1.0
    """Weight of the uniformity of items, of which both views give half (Wang & Isola 2020: 1)."""
    alpha: PositiveFloat = 2.0
    """Power of the distance between views (Wang & Isola 2020: 2)."""
    t: PositiveFloat = 2.0
    """Sharpness of the potential between items (Wang & Isola 2020: 2)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Wang & Isola 2020: 128)."""

    def needs(self) -> Needs:
        """Two views of anything; one item alone has nothing to keep away from."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class AlignUniform(Method):
    r"""Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (arXiv:2005.10242).

    The two things that a contrastive loss does, as two terms with a weight each. Alignment draws the two views of an
    item together; uniformity spreads all items over the unit sphere, by the logarithm of their mean Gaussian potential.
    There is no temperature and no positive in a denominator.

    Formula:
        $$ L = w_a \frac1N\sum_i \lVert u^1_i - u^2_i\rVert^{\alpha}
        + \frac{w_u}{2}\sum_{v}\log\frac{2}{N(N-1)}\sum_{i<j} e^{-t\lVert u^v_i-u^v_j\rVert^2} $$
        u: unit projections of both views v; N: items of the batch; w_a, w_u: align_weight and uniform_weight.

    Use it when:
        You want to see, and set, how much views agree and how much people spread: both are logged. Works from batches
        of a few dozen volumes.

    Leave it when:
        The batch holds a handful of items, whose mean potential says little of the cohort (moco keeps a queue), or
        weak labels are known: decoupled_uniformity is this idea with prior knowledge. With a uniform_weight well
        below align_weight everything collapses to a point.
    """

    def __init__(self, config: AlignUniformConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Weighted sum of both terms over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        u, config = unit(z), self.config
        apart = alignment(u[:, 0], u[:, 1], alpha=config.alpha)
        potential = (uniformity(u[:, 0], t=config.t) + uniformity(u[:, 1], t=config.t)) / 2
        return LossOutput(
            config.align_weight * apart + config.uniform_weight * potential,
            logs={"alignment": apart.detach(), "uniformity": potential.detach()},
            embedding=z[:, 0].detach(),
            features={"h": h, "z": own[:, 0]},
        )
