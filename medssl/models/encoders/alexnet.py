"""AlexNet for brain volumes, and its 2D form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.blocks import CONV, MAX_POOL
from medssl.models.encoders.checks import check_axes
from medssl.models.encoders.staged import StagedEncoder
from medssl.models.initialise import ENCODER, he_normal, seeded_init
from medssl.models.norm import Norm, make_norm

SMALLEST: Final = 69
"""The first convolution leaves 33 of 69 voxels, then 11, 9, 3 and 1."""
# Kernel, stride and padding of each convolution, and whether a max-pooling of 3 by 3 follows.
_LAYERS: Final = ((5, 2, 0, True), (3, 1, 0, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))


class AlexNetConfig(StrictModel):
    """What both forms share."""

    name: str
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 192, 192, 128)
    """Channels of the five convolutions (Abrol et al. 2021)."""
    norm: Norm = "batch"
    """group, instance or batch (synchronised over processes; the paper)."""

    dims: ClassVar[int]


class AlexNetIn2dConfig(AlexNetConfig):
    """AlexNet for slices."""

    name: Literal["alexnet_2d"] = "alexnet_2d"
    dims = 2


class AlexNetIn3dConfig(AlexNetConfig):
    """AlexNet for volumes."""

    name: Literal["alexnet_3d"] = "alexnet_3d"
    dims = 3


class AlexNetEncoder(StagedEncoder):
    """Five convolutions with norm and ReLU (5^d with stride 2, then 3^d), max-pooling after the first, second, fifth.

    The 3D AlexNet of Abrol et al. 2021, "Deep learning encodes robust discriminative neuroimaging representations"
    (doi:10.1038/s41467-020-20655-6), used for brain age by Barbano et al. 2023 (arXiv:2211.08326). There the last map
    is flattened into a classifier that fits one size of volume; here it is averaged over its voxels, as in the other
    encoders, so that any size from 69 voxels on will do. Convolutions have no bias, since the norm has one. The maps
    are what each convolution leaves, the first two before their pooling, the last one after it.
    """

    def __init__(self, config: AlexNetConfig, in_channels: int) -> None:
        super().__init__(config, in_channels, width=config.widths, smallest=SMALLEST)
        dims = config.dims
        self.layers = nn.ModuleList()
        for i, o, (kernel, stride, padding, _) in zip((in_channels, *config.widths), config.widths, _LAYERS):
            conv = CONV[dims](i, o, kernel, stride=stride, padding=padding, bias=False)
            layer = OrderedDict(conv=conv, norm=make_norm(config.norm, o, dims), relu=nn.ReLU(inplace=True))
            self.layers.append(nn.Sequential(layer))
        self.pool = MAX_POOL[dims](3)
        he_normal(self)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map of each convolution."""
        last = len(_LAYERS) - 1
        for number, (layer, (_, _, _, pooled)) in enumerate(zip(self.layers, _LAYERS)):
            x = layer(x)
            if number == last:
                x = self.pool(x)
            yield x
            if pooled and number != last:
                x = self.pool(x)

    def blocks(self) -> list[list[nn.Module]]:
        """The modules behind each of them."""
        return [[layer] for layer in self.layers]


def build_alexnet(
    config: AlexNetConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> AlexNetEncoder:
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
        return AlexNetEncoder(config, in_channels)
