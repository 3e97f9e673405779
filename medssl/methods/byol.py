"""BYOL: the prediction from one view is to be a slow teacher's projection of the other."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import byol
from medssl.methods.entry import split_views, stacked_views
from medssl.methods.teacher import Teacher
from medssl.models.heads import HeadNorm, ProjectionHead


class BYOLConfig(StrictModel):
    """Settings of BYOL."""

    name: Literal["byol"] = "byol"
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.996
    """How much of its weights the teacher keeps at step 0; rises to 1 on a cosine. Grill et al. 2020: 0.996 for 1000
    epochs, 0.99 for 100 and 300; a training of some hundred steps wants less still."""
    hidden_dim: PositiveInt = 4096
    """Width between the two layers of projector and predictor (Grill et al. 2020)."""
    projection_dim: PositiveInt = 256
    """Length of the compared vectors (Grill et al. 2020)."""
    head_norm: HeadNorm = "batch"
    """Norm in projector and predictor: batch (Grill et al. 2020), or none, with which small batches often collapse."""

    def needs(self) -> Needs:
        """Two views of anything; a batch norm has nothing to tell of one item."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class BYOL(Method):
    r"""Grill et al. 2020, "Bootstrap your own latent: A new approach to self-supervised learning" (arXiv:2006.07733).

    A predictor on one view's projection is to give what a teacher makes of the other view. The teacher is the average
    of the network's own past and gets no gradient; nothing repels, and what prevents collapse is the predictor, the
    slow teacher and the batch norm in the heads. The network sees both views as one batch, so that both share its
    batch norms' statistics, where the authors' program gives each view its own; so does the teacher, with its own.

    Formula:
        $$ L = \frac1N\sum_i \lVert \bar q^1_i - \bar t^2_i\rVert^2 + \lVert \bar q^2_i - \bar t^1_i\rVert^2,
        \qquad \xi \leftarrow \tau_k\,\xi + (1-\tau_k)\,\theta, \qquad
        \tau_k = 1-(1-\tau_0)\,\tfrac12\big(\cos(\pi k/K)+1\big) $$
        q: predictions, t: the teacher's projections, of views 1 and 2, bars: unit length; N: items of the batch;
        theta, xi: weights of network and teacher; k of K: steps done; tau_0: ema_decay.

    Use it when:
        Items are alike, or several items show one subject, so that calling them negatives would be wrong; it has no
        temperature and depends less on the size of the batch than contrast does.

    Leave it when:
        You cannot watch for collapse: its loss falls to 0 then, and looks like success. Batches below about 8 items
        starve the batch norms; a teacher costs a second forward pass and a copy of the weights.
    """

    def __init__(self, config: BYOLConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        hidden, width = config.hidden_dim, config.projection_dim
        self.head = ProjectionHead(parts.encoder.out_features, hidden, width, config.head_norm, bias=False)
        self.predictor = ProjectionHead(width, hidden, width, config.head_norm, bias=False)
        self.teacher = Teacher(self.encoder, self.head)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Both directions over the items of every process."""
        images = stacked_views(batch, 2)
        target = self.teacher(images)  # first: its activations are gone before those that are kept are made
        h = self.encoder(images)
        z = self.head(h)
        own = [split_views(rows, 2) for rows in (self.predictor(z), target, z.detach())]
        p, t, embedded = gather(own)  # (N, 2, D) each
        n = len(batch.views[0])
        return LossOutput(
            byol(p[:, 0], p[:, 1], t[:, 0], t[:, 1]),
            embedding=embedded[:, 0],
            features={"h": h[:n], "z": z[:n]},
        )

    def decay(self, progress: float) -> float:
        """What the teacher keeps of its weights when the share ``progress`` of the steps is done."""
        return 1 - (1 - self.config.ema_decay) * (math.cos(math.pi * progress) + 1) / 2

    def after_optimizer_step(self, progress: float) -> None:
        """The teacher follows."""
        self.teacher.update(self.encoder, self.head, decay=self.decay(progress))
