"""L^thr: an item attracts others more than those whose weak labels are less alike."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import l_thr
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig
from medssl.methods.kernels import AGE_5, KernelConfig


class LThrConfig(HeadConfig):
    """Settings of L^thr."""

    name: Literal["l_thr"] = "l_thr"
    kernel: KernelConfig = AGE_5
    """How alike two people are; default: age, rbf with sigma 5 years. The published runs (Barbano et al. 2023) have
    age, gaussian with sigma 1; a factor of the kernel changes nothing here."""
    normalizer: Literal["all", "compared"] = "all"
    """all: divide by the sum of the anchor's weights; compared: by those of the less alike, as printed (Barbano et al.
    2023, Eq. (5)), which is nearly 0 for the least alike and makes the loss huge."""
    temperature: PositiveFloat = 0.1
    """Barbano et al. 2023: 0.1."""
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of the head; null: as many as the encoder gives (Barbano et al. 2023)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Barbano et al. 2023)."""

    def needs(self) -> Needs:
        """One view or more of anything, and the kernel's columns."""
        return Needs(views=1, more_views=True, min_batch=2, labels=self.kernel.columns, features=("h", "z"))

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the kernel's columns must be."""
        return self.kernel.uses("method.kernel")


class LThr(Method):
    r"""Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction"
    (arXiv:2211.08326), Eq. (5).

    An item attracts another more strongly than all those whose label is less alike than that one's. Only the order of
    the label distances decides who repels whom. Equal labels are never compared with each other.

    Formula:
        $$ \mathcal{L} = \frac{1}{M} \sum_a \sum_k \frac{w_{ak}}{\sum_t w_{at}}
        \Big[ \log \sum_{t :\, w_{at} < w_{ak}} e^{s_{at}} - s_{ak} \Big] $$
        M views of all items, w the kernel of the labels, s cosines over the temperature; a pair (a, k) with nobody less
        alike contributes 0.

    Use it when:
        The order of ages matters more than their distance.

    Leave it when:
        Steps must be cheap (it sorts the weights of each anchor), or many labels are equal. `normalizer: compared` is
        as printed but can make the loss huge.
    """

    def __init__(self, config: LThrConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """L^thr over the items of every process and all their views."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z, labels = gather((own, config.kernel.columns_of(batch.labels)))
        weights = config.kernel.weights(labels)
        loss = l_thr(z, weights, temperature=config.temperature, normalizer=config.normalizer)
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
