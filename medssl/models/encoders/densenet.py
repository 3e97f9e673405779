"""Densely connected networks in 2D and 3D."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Final, Literal

from monai.networks.nets import DenseNet
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.encoders.checks import check_axes
from medssl.models.encoders.staged import StagedEncoder, replace_norms
from medssl.models.initialise import ENCODER, seeded_init
from medssl.models.norm import Norm

DEPTHS: Final = (6, 12, 24, 16)
SMALLEST: Final = 29
"""The stem rounds up twice and each of the three transitions rounds down: 29, 15, 8, 4, 2, 1."""


class DenseNetConfig(StrictModel):
    """What the densely connected networks share."""

    name: str
    init_features: Annotated[int, Field(ge=2)] = 64
    """Channels of the first convolution (Huang et al. 2017: twice the growth rate)."""
    growth_rate: PositiveInt = 32
    """Channels that each layer adds."""
    norm: Norm = "batch"
    """group, instance or batch (synchronised over processes; the paper)."""

    dims: ClassVar[int]


class DenseNet121In2dConfig(DenseNetConfig):
    """DenseNet-121 for slices."""

    name: Literal["densenet121_2d"] = "densenet121_2d"
    dims = 2


class DenseNet121In3dConfig(DenseNetConfig):
    """DenseNet-121 for volumes."""

    name: Literal["densenet121_3d"] = "densenet121_3d"
    dims = 3


class DenseNetEncoder(StagedEncoder):
    """DenseNet-121 without its classifier: stem, and four dense blocks with transitions that halve the image.

    Huang et al. 2017 (arXiv:1608.06993), Table 1; the network is MONAI's. The maps are what the stem and each dense
    block leave, at 1/2, 1/4, ... 1/32 of the image; the last one after the final norm and ReLU, as the classifier of
    the paper sees it. Names of the weights are those of MONAI.
    """

    def __init__(self, config: DenseNetConfig, in_channels: int) -> None:
        network = DenseNet(
            config.dims,
            in_channels,
            1,
            init_features=config.init_features,
            growth_rate=config.growth_rate,
            block_config=DEPTHS,
        )
        replace_norms(network, config.norm, config.dims)
        super().__init__(config, in_channels, width=_widths(config), smallest=SMALLEST)
        self.features = network.features
        self.relu = nn.ReLU(inplace=True)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map of the stem and of each dense block."""
        for name, layer in self.features.named_children():
            x = self.relu(layer(x)) if name == "norm5" else layer(x)
            if name == "relu0" or name == "norm5" or (name.startswith("denseblock") and name != "denseblock4"):
                yield x

    def blocks(self) -> list[list[nn.Module]]:
        """The modules behind each of them."""
        found: list[list[nn.Module]] = [[]]
        for name, layer in self.features.named_children():
            if name.startswith(("transition", "denseblock1")):  # what begins the next map
                found.append([])
            found[-1].append(layer)
        return found


def _widths(config: DenseNetConfig) -> tuple[int, ...]:
    widths = [config.init_features]
    channels = config.init_features
    for depth in DEPTHS:
        widths.append(channels + depth * config.growth_rate)
        channels = widths[-1] // 2
    return tuple(widths)


def build_densenet(
    config: DenseNetConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> DenseNetEncoder:
    """An encoder on the CPU with weights determined by ``seed``.

    Args:
        config: What to build.
        in_channels: Channels of an image.
        spatial: Size of an image, or None.
        seed: Seed of the run.

    Raises:
        ConfigError: A size with the wrong number of axes.
    """
    check_axes(config.name, config.dims, spatial)
    with seeded_init(seed, ENCODER):
        return DenseNetEncoder(config, in_channels)
