"""SupCon: all views of all items of one class attract."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import sup_con
from medssl.methods.classes import Bins, check_bins, class_labels, class_use
from medssl.methods.entry import embed_views, loss_of_equals
from medssl.methods.heads import HeadConfig


class SupConConfig(HeadConfig):
    """Settings of the supervised contrastive loss."""

    name: Literal["supcon"] = "supcon"
    label: str = "diagnosis"
    """Column of the manifest whose values are the classes."""
    bins: Bins | None = None
    """Of a column of numbers: a width (2.0: two years of age), or rising edges; null: equal values are one class."""
    temperature: PositiveFloat = 0.1
    """Khosla et al. 2020, section 4: 0.1."""
    epsilon: float = 0.0
    """Margin on the logits of positives (epsilon-SupCon, Barbano et al. 2023); 0: SupCon."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Khosla et al. 2020, section 3.1)."""

    @model_validator(mode="after")
    def _numbers_in_bins(self) -> SupConConfig:
        check_bins(self.label, self.bins)
        return self

    def needs(self) -> Needs:
        """One view or more of anything, and the label."""
        return Needs(views=1, more_views=True, min_batch=2, labels=(self.label,), features=("h", "z"))

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the label's column must be."""
        return (class_use(self.label, self.bins, "method.label"),)


class SupCon(Method):
    r"""Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv:2004.11362), form "out".

    All views of all items of one class attract, everything else repels. Classes are the values of a column, or bins of
    a number. Unlike cross-entropy it asks nothing of a last layer, so that the embedding itself is arranged.

    Formula:
        $$ \mathcal{L} = \frac{1}{M} \sum_a \frac{1}{|P(a)|} \sum_{p \in P(a)}
        \Big[ \log \sum_{k \ne a} e^{s_{ak} - \epsilon [k \in P(a)]} - s_{ap} \Big] $$
        M views of all items, P(a) the other views of the class of a, s cosines over the temperature, $\epsilon$ a
        margin (0 in the paper; Barbano et al. 2023, arXiv:2211.05568).

    Use it when:
        There is a diagnosis or another category for everybody, and batches in which classes repeat.

    Leave it when:
        The label is a number such as age: bins cut people apart who are a month apart; `y_aware` and `l_exp` do not.
        Labels that go with the site teach the site.

    With one view an item has positives only where another item of the batch has its class; an anchor without positives
    contributes nothing.
    """

    def __init__(self, config: SupConConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """SupCon over the items of every process and all their views."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z, label = gather((own, class_labels(batch.labels, config.label, config.bins)))
        compare = functools.partial(sup_con, labels=label, temperature=config.temperature, epsilon=config.epsilon)
        loss = compare(z)
        logs = {"chance_loss": loss_of_equals(compare, z)}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
