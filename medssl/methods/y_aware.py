"""y-aware InfoNCE: items attract by how alike their weak labels are."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import y_aware
from medssl.methods.entry import embed_views, loss_of_equals
from medssl.methods.heads import HeadConfig
from medssl.methods.kernels import AGE_5, KernelConfig


class YAwareConfig(HeadConfig):
    """Settings of y-aware InfoNCE."""

    name: Literal["y_aware"] = "y_aware"
    kernel: KernelConfig = AGE_5
    """How alike two people are; default: age, rbf with sigma 5 years (Dufumier et al. 2021)."""
    temperature: PositiveFloat = 0.1
    """Dufumier et al. 2021: 0.1."""
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of the head; null: as many as the encoder gives (Dufumier et al. 2021: half)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Dufumier et al. 2021)."""

    def needs(self) -> Needs:
        """One view or more of anything, and the kernel's columns."""
        return Needs(views=1, more_views=True, min_batch=2, labels=self.kernel.columns, features=("h", "z"))

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the kernel's columns must be."""
        return self.kernel.uses("method.kernel")


class YAware(Method):
    r"""Dufumier et al. 2021, "Contrastive Learning with Continuous Proxy Meta-Data for 3D MRI Classification"
    (arXiv:2106.08808).

    Every other item attracts, by its share of the anchor's label weights: people of one age more than people decades
    apart. How alike labels are is a kernel over one or several columns. With a width towards 0 this is SimCLR; with a
    very large one everybody attracts everybody alike.

    Formula:
        $$ \mathcal{L} = \frac{1}{M} \sum_a \sum_{k \ne a} \frac{w_{ak}}{\sum_{t \ne a} w_{at}}
        \Big[ \log \sum_{t \ne a} e^{s_{at}} - s_{ak} \Big], \qquad w_{ak} = K_\sigma(y_a, y_k) $$
        M views of all items, y their labels, K the kernel and $\sigma$ its width in the labels' units, s cosines over
        the temperature.

    Use it when:
        There are ages or similar labels for everybody: it is the first choice for them, and needs little of the batch.

    Leave it when:
        The width would have to be larger than the spread of ages (such weights say nothing), or sites differ in age:
        the ages that attract are then also those of one site.

    With one view an item attracts other people only; with several also its own other views.
    """

    def __init__(self, config: YAwareConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """y-aware InfoNCE over the items of every process and all their views."""
        kernel = self.config.kernel
        h, own = embed_views(self.encoder, self.head, batch)
        z, labels = gather((own, kernel.columns_of(batch.labels)))
        weights = kernel.weights(labels)
        compare = functools.partial(y_aware, weights=weights, temperature=self.config.temperature)
        loss = compare(z)
        logs = {"chance_loss": loss_of_equals(compare, z)}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
