"""A multilayer perceptron for rows of a feature table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.encoders.checks import check_axes, check_input
from medssl.models.initialise import ENCODER, he_normal, seeded_init
from medssl.models.norm import SyncBatchNorm

TableNorm = Literal["none", "batch", "layer"]
Activation = Literal["relu", "gelu"]

_NORM: Final = {"batch": SyncBatchNorm, "layer": nn.LayerNorm}
_ACTIVATION: Final = {"relu": nn.ReLU, "gelu": nn.GELU}


class MLPConfig(StrictModel):
    """A multilayer perceptron for feature tables."""

    name: Literal["mlp"] = "mlp"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (64, 32)
    """Length of each layer; the last is the length of the embedding."""
    norm: TableNorm = "none"
    """none, batch (synchronised over processes) or layer, after each linear map."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the values of each layer that is set to 0 in training."""
    activation: Activation = "relu"
    """relu or gelu, after each layer."""

    dims: ClassVar[int] = 0


class MLPEncoder(nn.Module):
    """Per layer a linear map, norm, activation and dropout; the last layer has them too, so that h is what a ReLU
    leaves, as with the pooled features of the image encoders.

    Attributes:
        dims: 0: its items have no spatial axes.
        width: Length of each layer.
        out_features: Length of the last.
        architecture: What is needed to build it again.
    """

    dims: Final = 0

    def __init__(self, config: MLPConfig, in_features: int) -> None:
        super().__init__()
        self.in_channels, self.width, self.norm = in_features, tuple(config.widths), config.norm
        self.out_features = config.widths[-1]
        self.architecture = {"config": config.model_dump(mode="json"), "in_channels": in_features}
        inputs = (in_features, *config.widths[:-1])
        self.levels = nn.ModuleList(_layer(config, i, o) for i, o in zip(inputs, config.widths))
        he_normal(self)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The output of each layer, (N, width[k]).

        Raises:
            ShapeError: Not (N, in_features).
        """
        check_input(x, 0, self.in_channels)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    def blocks(self) -> list[list[nn.Module]]:
        """The modules that make each map from the one before; all of them hold all weights."""
        return [[level] for level in self.levels]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        return self.feature_maps(x)[-1]


def _layer(config: MLPConfig, in_features: int, out_features: int) -> nn.Sequential:
    parts = OrderedDict[str, nn.Module]()
    parts["linear"] = nn.Linear(in_features, out_features, bias=config.norm == "none")
    if config.norm != "none":
        parts["norm"] = _NORM[config.norm](out_features)
    parts["activation"] = _ACTIVATION[config.activation]()
    if config.dropout > 0:
        parts["dropout"] = nn.Dropout(config.dropout)
    return nn.Sequential(parts)


def build_mlp(
    config: MLPConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> MLPEncoder:
    """An encoder on the CPU with weights determined by ``seed``.

    Args:
        config: What to build.
        in_channels: Features of a row.
        spatial: () for rows of a table, or None.
        seed: Seed of the run.

    Raises:
        ConfigError: Items with spatial axes.
    """
    check_axes(config.name, 0, spatial)
    with seeded_init(seed, ENCODER):
        return MLPEncoder(config, in_channels)
