"""SimCLR: two views of an image attract, all other images of the batch repel."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import nt_xent
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig


class SimCLRConfig(HeadConfig):
    """Settings of SimCLR."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """Chen et al. 2020, Table 5: 0.1 for large batches; up to 0.5 for small ones."""

    def needs(self) -> Needs:
        """Two views of anything."""
        return Needs(views=2, min_batch=2, features=("h", "z"))


class SimCLR(Method):
    r"""Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv:2002.05709).

    Two augmented views of an item attract, all other items of the batch repel. It knows nothing of volumes or anatomy
    and is the plain baseline that a more special method has to beat. The encoder's averaged output is trained; a
    decoder starts from random weights.

    Formula:
        $$ \mathcal{L} = \frac{1}{2N} \sum_{a=1}^{2N} \Big[ \log \sum_{k \ne a} e^{u_a \cdot u_k / \tau}
        - u_a \cdot u_{p(a)} / \tau \Big] $$
        N items, 2N views; $u_a$ the projection of view a, of length 1; p(a) the other view of its item; $\tau$ the
        temperature.

    Use it when:
        You have whole volumes or slabs of many people, and as the baseline of every comparison. Intensity augmentation
        (`bias_field`, `gamma`, `contrast`) matters more than in photographs: without it the site is the easiest way to
        tell items apart.

    Leave it when:
        Items are slices: neighbouring slices of a volume look alike, and the same slice of two people shows the same
        anatomy, yet all of them repel. MRI batches are small, so that negatives are few: moco keeps more, byol, vicreg
        and swav need none.
    """

    def __init__(self, config: SimCLRConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """NT-Xent over the items of every process."""
        h, own = embed_views(self.encoder, self.head, batch, 2)
        z = gather(own)  # (N, 2, D)
        loss = nt_xent(z[:, 0], z[:, 1], temperature=self.config.temperature)
        logs = {"chance_loss": torch.full_like(loss.detach(), math.log(2 * len(z) - 1))}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
