"""Fine-tuning tasks on one label of a person: a number such as age, or a class such as a diagnosis."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.types import ModelParts, Needs
from medssl.data.weak_labels import LabelUse
from medssl.methods.supervised import Supervised, SupervisedConfig


class LastBlocks(StrictModel):
    """Train the last blocks of the encoder and the output."""

    last_blocks: PositiveInt
    """How many blocks (levels, stages, layers) are trained, counted from the coarsest; the others are frozen."""


Trained = Literal["whole", "head"] | LastBlocks


class RegressionConfig(StrictModel):
    """Settings of regression."""

    name: Literal["regression"] = "regression"
    target: str = "age"
    """Column of the manifest that is predicted; a volume counts as labelled where it is filled."""
    loss: Literal["l1", "mse"] = "l1"
    """Of the target in units of its standard deviation over the training people."""
    train: Trained = "whole"
    """What is trained of an arm that begins from weights: whole (everything), head (only the linear output, on a frozen
    encoder), or {last_blocks: k}. Frozen parts stay in evaluation mode. An arm from scratch is always trained whole."""

    def supervised(self) -> SupervisedConfig:
        """The same as an objective."""
        return SupervisedConfig(target=self.target, loss=self.loss)

    def needs(self) -> Needs:
        """One view of anything, and the target."""
        return _needs(self)

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the target must be."""
        return (LabelUse(self.target, "task.target", number=True),)


class ClassificationConfig(StrictModel):
    """Settings of classification."""

    name: Literal["classification"] = "classification"
    target: str = "diagnosis"
    """Column of the manifest that is predicted; a volume counts as labelled where it is filled."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: the loss of each class is weighted by the inverse of its share of the training people."""
    n_classes: Annotated[int, Field(ge=2)] | None = None
    """null: as many as the column has values among the training people."""
    train: Trained = "whole"
    """As for regression."""

    def supervised(self) -> SupervisedConfig:
        """The same as an objective."""
        return SupervisedConfig(
            target=self.target, loss="cross_entropy", n_classes=self.n_classes, class_weights=self.class_weights
        )

    def needs(self) -> Needs:
        """One view of anything, and the target."""
        return _needs(self)

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the target must be."""
        return (LabelUse(self.target, "task.target"),)


TargetTaskConfig = RegressionConfig | ClassificationConfig


def _needs(config: TargetTaskConfig) -> Needs:
    return Needs(
        views=1, labels=(config.target,), trains=("encoder",) if config.train == "whole" else (), features=("h",)
    )


class TargetTask(Supervised):
    """The objective `Supervised` on an encoder that is trained whole, in its last blocks, or not at all.

    What is frozen gets no gradient and stays in evaluation mode, so that the running statistics of its norms and its
    dropout do not change what was pretrained. The linear output is always trained.

    Raises:
        ConfigError: More blocks to train than the encoder has; no number of classes.
    """

    def __init__(self, config: TargetTaskConfig, parts: ModelParts) -> None:
        super().__init__(config.supervised(), parts)
        self._frozen = frozen_modules(parts.encoder, config.train)
        for module in self._frozen:
            module.requires_grad_(False)
            module.eval()

    def train(self, mode: bool = True) -> TargetTask:
        """Training mode for what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, *spatial) or (N, F) to predictions (N, 1) in the target's unit, or (N, n_classes) probabilities."""
        values = self.predict(images)
        return values[:, None] if values.ndim == 1 else values


def frozen_modules(encoder: Any, trained: Trained) -> list[nn.Module]:
    """The parts of an encoder that are not trained.

    Raises:
        ConfigError: More blocks than the encoder has.
    """
    if trained == "whole":
        return []
    if trained == "head":
        return [encoder]
    assert isinstance(trained, LastBlocks)
    blocks = encoder.blocks()
    if trained.last_blocks > len(blocks):
        raise ConfigError(
            f"the encoder has {len(blocks)} blocks",
            where="task.train.last_blocks",
            found=str(trained.last_blocks),
            fix=f"choose 1 to {len(blocks)}, or task.train: whole",
        )
    return [module for block in blocks[: len(blocks) - trained.last_blocks] for module in block]
