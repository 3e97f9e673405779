"""Supervised learning of one label: the baseline of every method that uses labels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from medssl.core.distributed import gather
from medssl.core.errors import ConfigError, InputError, nearest
from medssl.core.schema import StrictModel
from medssl.core.types import ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.models.heads import ProjectionHead


class SupervisedConfig(StrictModel):
    """Settings of supervised learning."""

    name: Literal["supervised"] = "supervised"
    target: str = "age"
    """Column of the manifest that is learnt."""
    loss: Literal["l1", "mse", "cross_entropy"] = "l1"
    """l1 and mse learn a number, in units of its standard deviation over the training items; cross_entropy a class."""
    n_classes: PositiveInt | None = None
    """Of cross_entropy; null: as many values as the column has in the training items."""
    class_weights: Literal["none", "balanced"] = "none"
    """Of cross_entropy; balanced: each class by the inverse of its share of the training items, 1 on their average."""
    projection_dim: PositiveInt | None = None
    """Length of a projection z between the features h and the linear output; null: the output is linear in h."""
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of that projection; null: as many as the encoder gives."""

    @model_validator(mode="after")
    def _consistent(self) -> SupervisedConfig:
        if self.n_classes is not None and self.loss != "cross_entropy":
            raise ValueError(f"n_classes: loss {self.loss} learns a number; remove n_classes or choose cross_entropy")
        if self.class_weights != "none" and self.loss != "cross_entropy":
            raise ValueError(f"class_weights: loss {self.loss} learns a number; choose cross_entropy, or remove it")
        if self.n_classes == 1:
            raise ValueError("n_classes: at least 2")
        if self.hidden_dim is not None and self.projection_dim is None:
            raise ValueError("hidden_dim: there is no projection without projection_dim")
        return self

    def needs(self) -> Needs:
        """One view of anything, and the label."""
        features = ("h",) if self.projection_dim is None else ("h", "z")
        return Needs(views=1, labels=(self.target,), features=features)

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the target must be."""
        return (LabelUse(self.target, "method.target", number=self.loss != "cross_entropy"),)


class Supervised(Method):
    r"""The L1 baseline of brain-age comparisons, for instance Barbano et al. 2023 (arXiv:2211.08326), Table 1.

    One column of the manifest is learnt directly: a number (age) by the absolute or squared error, or a class
    (diagnosis, sex) by cross-entropy. It is the baseline that every method with labels has to beat, on seen and on
    unseen sites. With `projection_dim` the output is linear in a projection z, so that a regulariser can work on z and
    `embed` can hand it on.

    Formula:
        $$ \mathcal{L} = \frac{1}{N} \sum_i \left| \frac{y_i - \bar y}{\mathrm{sd}(y)} - f(x_i) \right|
        \quad \text{or its square, or} \quad \frac{1}{N} \sum_i -\log \mathrm{softmax}(f(x_i))_{y_i} $$
        N items, f the network, y the column; mean and sd are those of the people that are trained on. A loss of 1 is
        about the spread of the population; predictions, and `mae` in `metrics.csv`, are in the column's unit.

    Use it when:
        A few thousand labels support a number, and always as the baseline.

    Leave it when:
        Labels are few, or sites differ in what is learnt: what predicts the site then also predicts age, and nothing in
        this loss holds the network back.

    Needs one view of anything and the column without a gap; missing targets and a column with one value are refused.
    `collapse_alarm` is not computed here, because features on a line are what a single number asks for.

    Raises:
        ConfigError: cross_entropy without a number of classes.
    """

    target_mean: Tensor
    target_scale: Tensor
    classes: Tensor
    class_weights: Tensor

    def __init__(self, config: SupervisedConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features = parts.encoder.out_features
        if config.projection_dim is not None:
            self.head = ProjectionHead(features, config.hidden_dim or features, config.projection_dim)
            features = config.projection_dim
        if config.loss == "cross_entropy":
            if config.n_classes is None:
                raise ConfigError(
                    "the number of classes is not known", where="method.n_classes", fix="set it, at least 2"
                )
            self.register_buffer("classes", torch.arange(config.n_classes, dtype=torch.float64))
            self.register_buffer("class_weights", torch.ones(config.n_classes))
        else:
            self.register_buffer("target_mean", torch.zeros(()))
            self.register_buffer("target_scale", torch.ones(()))
        self.output = nn.Linear(features, config.n_classes or 1)

    def fit_labels(self, table: ItemTable) -> None:
        """Mean and standard deviation of the target, or the values that are its classes.

        Raises:
            ConfigError: No such column, text where a number is learnt, another number of classes than was given.
            InputError: A missing target, or all targets equal.
        """
        target = target_of(table, self.config.target)
        values, counts = np.unique(target, return_counts=True)
        if len(values) < 2:
            raise InputError(
                f"`{self.config.target}` is the same for all items: there is nothing to learn",
                found=str(values[0]),
                fix="name another column in method.target",
            )
        if self.config.loss == "cross_entropy":
            if len(values) != self.config.n_classes:
                raise ConfigError(
                    f"`{self.config.target}` has another number of values than there are classes",
                    where="method.n_classes",
                    found=f"{len(values)} values in the training items, n_classes {self.config.n_classes}",
                    fix=f"set it to {len(values)}",
                )
            self.classes.copy_(torch.from_numpy(values.astype(np.float64)))
            if self.config.class_weights == "balanced":
                self.class_weights.copy_(torch.from_numpy(counts.sum() / (len(counts) * counts)))
        elif target.dtype.kind != "f":
            raise ConfigError(
                f"`{self.config.target}` holds text, which loss {self.config.loss} cannot learn",
                where="method.target",
                fix="name a column of numbers, or set method.loss: cross_entropy",
            )
        else:
            self.target_mean.fill_(target.mean())
            self.target_scale.fill_(target.std())

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Mean loss over the items of every process."""
        h = self.encoder(batch.views[0])
        features = {"h": h} if self.head is None else {"h": h, "z": self.head(h)}
        last = features["h" if self.head is None else "z"]
        output, target = gather((self.output(last), batch.labels[self.config.target]))
        output = output.to(torch.promote_types(output.dtype, torch.float32))  # autocast leaves half precision
        if self.config.loss == "cross_entropy":
            loss, logs = self._classification(output, target)
        else:
            loss, logs = self._regression(output[:, 0], target)
        # No embedding is watched: labels keep it from collapsing, and features on a line are what a number asks for.
        return LossOutput(loss, logs=logs, features=features)

    def _regression(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = (target.to(output.dtype) - self.target_mean) / self.target_scale
        loss = F.l1_loss(output, wanted) if self.config.loss == "l1" else F.mse_loss(output, wanted)
        return loss, {"mae": (output.detach() - wanted).abs().mean() * self.target_scale}

    def _classification(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = torch.searchsorted(self.classes, target.to(self.classes.dtype)).clamp(max=len(self.classes) - 1)
        # A value that is no class must not pass for one: the loss is then NaN, and the loop names the items.
        known = torch.where(self.classes[wanted] == target, 1.0, torch.nan)
        known = known * self.class_weights[wanted]
        loss = (F.cross_entropy(output, wanted, reduction="none") * known).mean()
        return loss, {"accuracy": (output.detach().argmax(1) == wanted).to(output.dtype).mean()}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """What the network says of images (N, C, *spatial), in evaluation mode whatever mode it is in.

        Returns:
            (N,) in the target's unit (years), or (N, n_classes) probabilities in the order of the sorted values.
        """
        training = self.training
        self.eval()
        try:
            h = self.encoder(images)
            output = self.output(h if self.head is None else self.head(h))
        finally:
            self.train(training)
        if self.config.loss == "cross_entropy":
            return output.softmax(1)
        return output[:, 0] * self.target_scale + self.target_mean


def target_of(table: ItemTable, column: str) -> npt.NDArray[Any]:
    """The labels of a column: numbers as float64, or int64 codes.

    Raises:
        ConfigError: No such column.
        InputError: A missing value; it names the volumes.
    """
    if column not in table.labels:
        raise ConfigError(
            f"the column `{column}` is not in the manifest, or empty",
            where="method.target",
            found=", ".join(table.labels) or "no labels",
            fix=nearest(column, table.labels) if table.labels else "add it to the manifest",
        )
    target = table.labels[column]
    missing = np.isnan(target) if target.dtype.kind == "f" else target < 0
    if missing.any():
        volumes = np.unique(table.volume[missing])
        raise InputError(
            f"`{column}` is missing for {len(volumes)} volumes",
            where=f"volumes (rows of the manifest) {', '.join(map(str, volumes[:10]))}",
            fix="fill the cells, or leave the volumes out",
        )
    return target


def n_classes_of(table: ItemTable, column: str) -> int:
    """How many values a column has, for a configuration that leaves `n_classes` open."""
    return len(np.unique(target_of(table, column)))
