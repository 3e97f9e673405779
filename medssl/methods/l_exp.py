"""L^exp: items repel with a strength that falls with how alike their weak labels are."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import l_exp
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig
from medssl.methods.kernels import AGE_5, KernelConfig


class LExpConfig(HeadConfig):
    """Settings of L^exp.

    The defaults are the printed formula. The published table (Barbano et al. 2023) was run with
    `kernel: {attributes: {age: {kind: gaussian, sigma: 1}}}`, `similarity: neg_sqdist` and
    `positive_in_denominator: true`, and a loss times temperature / 0.07.
    """

    name: Literal["l_exp"] = "l_exp"
    kernel: KernelConfig = AGE_5
    """How alike two people are; default: age, rbf with sigma 5 years. A factor of the kernel matters here: gaussian
    with sigma 1 is at most 0.4, so that even people of one age repel."""
    similarity: Literal["cosine", "neg_sqdist"] = "cosine"
    """cosine over the temperature (the formula), or the same minus 1 / temperature (as the published table ran)."""
    positive_in_denominator: bool = False
    """Whether the attracting item also repels (as the published table ran)."""
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


class LExp(Method):
    r"""Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction"
    (arXiv:2211.08326), Eq. (6).

    Every other item attracts by its label weight and repels with a strength that falls with how alike its label is. So
    people decades apart repel most, and nobody needs a threshold. It did best in its authors' comparison for brain age
    over several sites.

    Formula:
        $$ \mathcal{L} = \frac{1}{M} \sum_a \sum_k \frac{w_{ak}}{\sum_t w_{at}}
        \Big[ \log \sum_{t \ne a, k} e^{s_{at} (1 - w_{at})} - s_{ak} \Big] $$
        M views of all items, w the kernel of the labels, s cosines over the temperature.

    Use it when:
        The aim is brain age, or another number, over several sites.

    Leave it when:
        Batches are small and the kernel wide: with `neg_sqdist` and a wide rbf kernel the embedding can collapse. Watch
        `spread`.

    The largest value of the kernel matters: `rbf` reaches 1, so that people of one age do not repel; `gaussian` with
    sigma 1 reaches 0.4. The published table was run with the latter, `similarity: neg_sqdist` and
    `positive_in_denominator: true`.
    """

    def __init__(self, config: LExpConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """L^exp over the items of every process and all their views."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z, labels = gather((own, config.kernel.columns_of(batch.labels)))
        loss = l_exp(
            z,
            config.kernel.weights(labels),
            temperature=config.temperature,
            similarity=config.similarity,
            positive_in_denominator=config.positive_in_denominator,
        )
        return LossOutput(loss, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
