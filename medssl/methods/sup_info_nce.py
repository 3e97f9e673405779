"""epsilon-SupInfoNCE: positives of the same class, each compared with the negatives alone."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from medssl.core.distributed import gather
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import sup_info_nce
from medssl.methods.classes import Bins, check_bins, class_labels, class_use
from medssl.methods.entry import embed_views, loss_of_equals
from medssl.methods.heads import HeadConfig


class SupInfoNCEConfig(HeadConfig):
    """Settings of epsilon-SupInfoNCE."""

    name: Literal["sup_info_nce"] = "sup_info_nce"
    label: str = "diagnosis"
    """Column of the manifest whose values are the classes."""
    bins: Bins | None = None
    """Of a column of numbers: a width (2.0: two years of age), or rising edges; null: equal values are one class."""
    form: Literal["out", "in"] = "out"
    """Whether the sum over positives is outside or inside the logarithm (Barbano et al. 2023, Eq. (6), (7))."""
    epsilon: float = 0.5
    """Margin by which a positive must be closer than the closest negative, on the logits (Barbano et al. 2023: 0.1,
    0.25 or 0.5, the last best on ImageNet-100)."""
    temperature: PositiveFloat = 0.1
    """Barbano et al. 2023: 0.1."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Barbano et al. 2023)."""

    @model_validator(mode="after")
    def _numbers_in_bins(self) -> SupInfoNCEConfig:
        check_bins(self.label, self.bins)
        return self

    def needs(self) -> Needs:
        """One view or more of anything, and the label."""
        return Needs(views=1, more_views=True, min_batch=2, labels=(self.label,), features=("h", "z"))

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the label's column must be."""
        return (class_use(self.label, self.bins, "method.label"),)


class SupInfoNCE(Method):
    r"""Barbano et al. 2023, "Unbiased Supervised Contrastive Learning" (arXiv:2211.05568).

    Like `supcon`, but positives never compete with each other: each is compared with the negatives alone, and must be
    closer by a margin epsilon. The margin says how far classes shall be apart, which the plain loss leaves open. Its
    authors pair it with a regulariser that takes a bias out of the embedding.

    Formula:
        $$ \mathcal{L}_{out} = \frac{1}{M} \sum_a \frac{1}{|P(a)|} \sum_{p \in P(a)}
        \Big[ \log\Big( e^{s_{ap} - \epsilon} + \sum_{n \in N(a)} e^{s_{an}} \Big) - s_{ap} \Big] $$
        M views of all items, P(a) the other views of the class of a, N(a) those of other classes, s cosines over the
        temperature; in the form `in` the sum over positives is inside the logarithm.

    Use it when:
        A class is to be learnt together with a regulariser against a bias such as the site (`debias`).

    Leave it when:
        Classes do not repeat in a batch, or the label is a number. Values are not comparable with those of `supcon`;
        where a batch has no negatives the loss is the constant $-\epsilon$.

    With one view an item has positives only where another item of the batch has its class.
    """

    def __init__(self, config: SupInfoNCEConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """epsilon-SupInfoNCE over the items of every process and all their views."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z, label = gather((own, class_labels(batch.labels, config.label, config.bins)))
        settings = {"temperature": config.temperature, "epsilon": config.epsilon, "form": config.form}
        compare = functools.partial(sup_info_nce, labels=label, **settings)
        loss = compare(z)
        logs = {"chance_loss": loss_of_equals(compare, z)}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})
