"""Regularisers that any embedding method can carry: what gives a bias (the site) away is taken out of h or z."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from medssl.core.distributed import gather
from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.types import EmbedAll, Ints, ItemTable, LossOutput, Method, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import EmptyComparisonWarning, end, fair_kl, label_kernel
from medssl.methods.classes import check_bins, class_labels
from medssl.methods.kernels import label_values


class TargetConfig(StrictModel):
    """Which people should be alike, whatever their bias."""

    column: str
    """Column of the manifest."""
    sigma: PositiveFloat | None = None
    """Of a column of numbers, fair_kl only: how alike two people are is an rbf kernel of this width, in its units."""
    bin_width: PositiveFloat | None = None
    """Of a column of numbers: people of one bin are alike."""

    @model_validator(mode="after")
    def _one_way(self) -> TargetConfig:
        if self.sigma is not None and self.bin_width is not None:
            raise ValueError("give sigma or bin_width, not both")
        if self.sigma is None:
            check_bins(self.column, self.bin_width)
        return self

    def use(self) -> LabelUse:
        """What the column must be."""
        number = self.sigma is not None or self.bin_width is not None
        return LabelUse(self.column, "debias.target", number=number, may_be_constant=True)


class FairKLConfig(StrictModel):
    """FairKL: similarities of pairs are distributed alike within and between sites (Barbano et al. 2023)."""

    name: Literal["fair_kl"] = "fair_kl"
    attribute: str = "site"
    """Column of the manifest that shall not show."""
    weight: PositiveFloat = 1.0
    """Factor of the regulariser beside the method's loss."""
    on: Literal["h", "z"] = "h"
    """h: the encoder's output of view 0 (as published); z: its projection. Only the layer it acts on changes much."""
    mode: Literal["kl", "moments"] = "kl"
    """kl: divergence of two normal distributions; moments: squared differences of mean and standard deviation."""
    target: TargetConfig | None = None
    """Which pairs are positive; null: all pairs count as one kind."""

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the columns must be."""
        return _uses(self.attribute, self.target)


class EnDConfig(StrictModel):
    """EnD: people of one site are spread apart, like people of different sites pulled together (Tartaglione et al.
    2021)."""

    name: Literal["end"] = "end"
    attribute: str = "site"
    """Column of the manifest that shall not show."""
    weight: PositiveFloat = 1.0
    """Factor of both terms beside the method's loss."""
    perpendicular_weight: NonNegativeFloat = 0.1
    """Of the term that spreads people of one site apart (Tartaglione et al. 2021: 0 to 1)."""
    parallel_weight: NonNegativeFloat = 0.1
    """Of the term that pulls like people of different sites together (Tartaglione et al. 2021: 0 to 1)."""
    on: Literal["h", "z"] = "h"
    """h: the encoder's output of view 0; z: its projection. Only the layer it acts on changes much."""
    target: TargetConfig | None = None
    """Which people are alike; null: all."""

    @model_validator(mode="after")
    def _does_something(self) -> EnDConfig:
        if self.perpendicular_weight == self.parallel_weight == 0:
            raise ValueError("both weights are 0, which changes nothing: remove the section debias")
        if self.target is not None and self.target.sigma is not None:
            raise ValueError("target.sigma: end compares equal labels; set bin_width instead")
        return self

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the columns must be."""
        return _uses(self.attribute, self.target)


DebiasConfig = Annotated[FairKLConfig | EnDConfig, Field(discriminator="name")]


def _uses(attribute: str, target: TargetConfig | None) -> tuple[LabelUse, ...]:
    bias = LabelUse(attribute, "debias.attribute", bias=True)
    return (bias,) if target is None else (bias, target.use())


def with_debias(method: Method, config: FairKLConfig | EnDConfig | None) -> Method:
    """``method`` with a regulariser, or as it is for None."""
    return method if config is None else Debiased(config, method)


class Debiased(Method):
    """A method whose loss is its own plus ``weight`` times a regulariser of its features.

    The regulariser sees the features ``on`` of the items of every process: one row an item, view 0. Logged beside what
    the method logs: ``main_loss``, ``debias`` (before the weight), and how many unordered pairs of the batch are
    aligned (one bias value) and conflicting. Batches without one of the two change nothing; they are counted in the
    buffer ``batches_without_pairs``, and the first one warns (on a CPU: elsewhere looking would wait for the device).

    Args:
        config: Which regulariser.
        inner: The method; what is exported after training is its.
    """

    batches_without_pairs: Tensor

    def __init__(self, config: FairKLConfig | EnDConfig, inner: Method) -> None:
        super().__init__()
        self.config, self.inner = config, inner
        self.register_buffer("batches_without_pairs", torch.zeros((), dtype=torch.int64))
        self._warned = False

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]  # read-only here
        """The encoder of the method."""
        return self.inner.encoder

    @property
    def decoder(self) -> nn.Module | None:  # type: ignore[override]  # read-only here
        """The decoder of the method."""
        return self.inner.decoder

    @property
    def head(self) -> nn.Module | None:  # type: ignore[override]  # read-only here
        """The head of the method."""
        return self.inner.head

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]  # the method's own
        """As the method has it."""
        return self.inner.steps_per_epoch

    @steps_per_epoch.setter
    def steps_per_epoch(self, steps: int) -> None:
        self.inner.steps_per_epoch = steps

    def fit_labels(self, table: ItemTable) -> None:
        """As the method does."""
        self.inner.fit_labels(table)

    def after_optimizer_step(self, progress: float) -> None:
        """As the method does."""
        self.inner.after_optimizer_step(progress)

    def refresh_steps(self, total_steps: int) -> Collection[int]:
        """As the method does."""
        return self.inner.refresh_steps(total_steps)

    def refresh(self, embed_all: EmbedAll) -> None:
        """As the method does."""
        self.inner.refresh(embed_all)

    def reinitialised(self) -> Collection[nn.Parameter]:
        """As the method does."""
        return self.inner.reinitialised()

    def clusters(self) -> Ints | None:
        """As the method does."""
        return self.inner.clusters()

    def assign(self, h: Tensor) -> Tensor | None:
        """As the method does."""
        return self.inner.assign(h)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """The method's loss plus the regulariser, over the items of every process.

        Raises:
            ConfigError: The method hands out no such features.
        """
        config = self.config
        output = self.inner.training_loss(batch)
        if config.on not in output.features:
            raise ConfigError(
                f"debias works on {config.on}, which this method does not have",
                where="debias.on",
                found=f"features: {', '.join(output.features) or 'none'}",
                fix="choose another layer, or a method that has it",
            )
        columns = {config.attribute, *([config.target.column] if config.target else [])}
        own = {column: label_values(batch.labels, column) for column in sorted(columns)}
        features, labels = gather((output.features[config.on], own))
        counts = self._count_pairs(labels[config.attribute])
        value = self._regulariser(features, labels)
        logs = {"main_loss": output.loss.detach(), "debias": value.detach(), **counts}
        return LossOutput(
            output.loss + config.weight * value, {**output.logs, **logs}, output.embedding, output.features
        )

    def _regulariser(self, features: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        config, bias = self.config, labels[self.config.attribute]
        target = config.target
        if isinstance(config, EnDConfig):
            alike = torch.zeros_like(bias) if target is None else class_labels(labels, target.column, target.bin_width)
            terms = end(features, bias, alike)
            return config.perpendicular_weight * terms.perpendicular + config.parallel_weight * terms.parallel
        positive: dict[str, Any] = {}
        if target is not None and target.sigma is not None:
            positive = {"weights": label_kernel(labels[target.column], sigma=target.sigma)}
        elif target is not None:
            positive = {"labels": class_labels(labels, target.column, target.bin_width)}
        gap = fair_kl(features, bias, mode=config.mode, **positive)
        return gap.positive + gap.negative

    @torch.no_grad()
    def _count_pairs(self, bias: Tensor) -> dict[str, Tensor]:
        same = bias[:, None] == bias[None, :]
        aligned = same.sum().sub(len(bias)).div(2, rounding_mode="floor")
        conflicting = (~same).sum().div(2, rounding_mode="floor")
        nothing = (aligned == 0) | (conflicting == 0)
        self.batches_without_pairs += nothing
        if not self._warned and bias.device.type == "cpu" and bool(nothing):
            self._warned = True
            kind = "aligned" if not bool(aligned) else "conflicting"
            warnings.warn(
                f"a batch has no {kind} pairs: {self.config.name} has nothing to compare there. The samplers "
                "site_balanced and age_site_balanced give every batch both kinds",
                EmptyComparisonWarning,
                stacklevel=3,
            )
        return {"debias_aligned_pairs": aligned, "debias_conflicting_pairs": conflicting}
