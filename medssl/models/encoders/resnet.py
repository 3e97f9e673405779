"""Residual networks in 2D and 3D."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from monai.networks.nets import resnet
from pydantic import PositiveInt
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.encoders.checks import check_axes
from medssl.models.encoders.staged import StagedEncoder, replace_norms
from medssl.models.initialise import ENCODER, seeded_init
from medssl.models.norm import Norm


class ResNetConfig(StrictModel):
    """What all residual networks share."""

    name: str
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 512)
    """Channels of the four stages, in ResNet-50 before its four-fold expansion (He et al. 2016, Table 1)."""
    norm: Norm = "batch"
    """group, instance or batch (synchronised over processes; the paper)."""
    stem_stride: Literal[1, 2] = 2
    """Of the first convolution. 2 is the paper; 1 is what MONAI builds: 8 times the work and memory in 3D, 4 in 2D."""

    dims: ClassVar[int]
    depths: ClassVar[tuple[int, ...]]
    block: ClassVar[type[resnet.ResNetBlock | resnet.ResNetBottleneck]]


class ResNet18In2dConfig(ResNetConfig):
    """ResNet-18 for slices."""

    name: Literal["resnet18_2d"] = "resnet18_2d"
    dims, depths, block = 2, (2, 2, 2, 2), resnet.ResNetBlock


class ResNet18In3dConfig(ResNetConfig):
    """ResNet-18 for volumes."""

    name: Literal["resnet18_3d"] = "resnet18_3d"
    dims, depths, block = 3, (2, 2, 2, 2), resnet.ResNetBlock


class ResNet50In2dConfig(ResNetConfig):
    """ResNet-50 for slices."""

    name: Literal["resnet50_2d"] = "resnet50_2d"
    dims, depths, block = 2, (3, 4, 6, 3), resnet.ResNetBottleneck


class ResNet50In3dConfig(ResNetConfig):
    """ResNet-50 for volumes."""

    name: Literal["resnet50_3d"] = "resnet50_3d"
    dims, depths, block = 3, (3, 4, 6, 3), resnet.ResNetBottleneck


class ResNetEncoder(StagedEncoder):
    """A residual network without its classifier: stem and four stages, each of which halves the image.

    He et al. 2016 (arXiv:1512.03385), in 3D as Hara et al. 2018 (arXiv:1711.09577); the network is MONAI's, without
    the biases that it adds before norms. With ``stem_stride`` 2 the maps are at 1/2, 1/4, ... 1/32 of the image (sizes
    rounded up, so that any image will do), with 1 at 1, 1/2, ... 1/16: every layer then works on 8 times the voxels
    (4 in 2D), for the same number of weights. Names of the weights are those of MONAI and torchvision.
    """

    def __init__(self, config: ResNetConfig, in_channels: int) -> None:
        network = resnet.ResNet(
            config.block,
            list(config.depths),
            list(config.widths),
            spatial_dims=config.dims,
            n_input_channels=in_channels,
            conv1_t_stride=config.stem_stride,
            feed_forward=False,
            bias_downsample=False,
        )
        replace_norms(network, config.norm, config.dims)
        expansion = config.block.expansion
        super().__init__(config, in_channels, width=(config.widths[0], *(expansion * w for w in config.widths)))
        self.conv1, self.bn1, self.act, self.maxpool = network.conv1, network.bn1, network.act, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map of the stem and of each stage."""
        x = self.act(self.bn1(self.conv1(x)))
        yield x
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            yield x

    def blocks(self) -> list[list[nn.Module]]:
        """The modules behind each of them."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]


def build_resnet(
    config: ResNetConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> ResNetEncoder:
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
        return ResNetEncoder(config, in_channels)
