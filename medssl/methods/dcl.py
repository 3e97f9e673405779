"""DCL: SimCLR without the positive in the denominator."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import decoupled_contrastive
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig


class DCLConfig(HeadConfig):
    """Settings of decoupled contrastive learning."""

    name: Literal["dcl"] = "dcl"
    temperature: PositiveFloat = 0.1
    """Yeh et al. 2022: 0.1."""
    weight_sigma: PositiveFloat | None = None
    """null: DCL. A number: DCLW, which weighs pairs of views that are far apart more; 0.5 in Yeh et al. 2022."""

    def needs(self) -> Needs:
        """Two views of anything; one item alone has nothing to repel."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class DCL(Method):
    r"""Yeh et al. 2022, "Decoupled Contrastive Learning" (arXiv:2110.06848).

    SimCLR whose denominator holds the other images alone. The positive in the denominator of NT-Xent shrinks the
    gradient of pairs that already agree, the more so the smaller the batch; without it, small batches learn nearly as
    well as large ones. DCLW also weighs pairs of views that disagree more.

    Formula:
        $$ L = \frac12\sum_{v}\frac1N\sum_i\Big[-w_i\,s_{i,p(i)} + \log\sum_{j\ne i}\sum_{v'}
        e^{s(z^v_i, z^{v'}_j)}\Big],
        \qquad w_i = 1 \;\text{ or }\; w_i = 2 - N\,\mathrm{softmax}_i(u^1_i\cdot u^2_i/\sigma) $$
        s: cosine similarity divided by the temperature; p(i): the other view of item i; v, v': views; N: items of the
        batch; u: unit projections; sigma: weight_sigma, which DCLW has and DCL has not.

    Use it when:
        A batch of volumes is small (8 to 64), which is where it gains over simclr; otherwise it asks for the same.
        The loss may be negative: follow the spread of the embedding and a probe, not its value.

    Leave it when:
        Several items of a batch show one subject, or the cohort is of few people scanned often: all of them repel
        each other, harder than in simclr. gcl knows partitions, moco leaves the same subject out.
    """

    def __init__(self, config: DCLConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Decoupled contrast over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        config = self.config
        loss = decoupled_contrastive(z[:, 0], z[:, 1], temperature=config.temperature, weight_sigma=config.weight_sigma)
        logs = {"chance_loss": torch.full_like(loss.detach(), math.log(2 * (len(z) - 1)))}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
