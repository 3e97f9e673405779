"""A shallow VGG-like encoder in 2D and 3D, for dense maps without skip connections."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.blocks import CONV, MAX_POOL
from medssl.models.encoders.checks import check_axes, check_halving, check_input, resolve_strides
from medssl.models.encoders.staged import StagedEncoder
from medssl.models.initialise import ENCODER, he_normal, seeded_init
from medssl.models.norm import Norm, make_norm

N_POOLS: Final = 2
"""Max-poolings, after the first and the second convolution: a total stride of 4."""

Stride = Annotated[int, Field(ge=1, le=2)]


class VGGConfig(StrictModel):
    """What both forms share."""

    name: str
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=N_POOLS + 1)] = (64, 128, 256, 256, 512, 512)
    """Channels of the convolutions (Simonyan & Zisserman 2015, the first six of configuration A)."""
    norm: Norm = "batch"
    """group, instance or batch (synchronised over processes; the paper)."""
    padding: Literal["zeros", "replicate"] = "zeros"
    """What convolutions see beyond the border: zeros (the paper), from which a network can tell where the border is, or
    the outermost voxel again, from which it cannot: an image of one intensity then gives the same everywhere."""

    dims: ClassVar[int]


class VGGIn2dConfig(VGGConfig):
    """VGG-like, for slices."""

    name: Literal["vgg_2d"] = "vgg_2d"
    strides: Literal["auto"] | tuple[tuple[Stride, Stride], tuple[Stride, Stride]] = "auto"
    """Of both poolings, per axis; auto: 2 wherever the axis keeps at least 4 voxels, from the size of the items."""
    dims = 2


class VGGIn3dConfig(VGGConfig):
    """VGG-like, for volumes and slabs."""

    name: Literal["vgg_3d"] = "vgg_3d"
    strides: Literal["auto"] | tuple[tuple[Stride, Stride, Stride], tuple[Stride, Stride, Stride]] = "auto"
    """Of both poolings, per axis; auto: 2 wherever the axis keeps at least 4 voxels, from the size of the items."""
    dims = 3


class VGGEncoder(StagedEncoder):
    """3^d convolutions with norm and ReLU, max-pooling after the first two: a total stride of 4, no skip connections.

    Simonyan & Zisserman 2015, "Very Deep Convolutional Networks" (arXiv:1409.1556), cut off after a few layers, as
    Ji et al. 2019 (arXiv:1807.06653) cluster its last map: too shallow for a place to know where in the image it is,
    except within about 20 voxels of the border. Convolutions have no bias, since the norm has one. The maps are what
    each convolution leaves, the first two before their pooling.
    """

    def __init__(self, config: Any, in_channels: int) -> None:
        super().__init__(config, in_channels, width=config.widths)
        dims = config.dims
        self.pool_strides: tuple[tuple[int, ...], ...] = config.strides
        self.layers = nn.ModuleList()
        for i, o in zip((in_channels, *config.widths), config.widths):
            conv = CONV[dims](i, o, 3, padding=1, bias=False, padding_mode=config.padding)
            layer = OrderedDict(conv=conv, norm=make_norm(config.norm, o, dims), relu=nn.ReLU(inplace=True))
            self.layers.append(nn.Sequential(layer))
        self.pools = nn.ModuleList(MAX_POOL[dims](stride) for stride in config.strides)
        he_normal(self)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map of each convolution."""
        for number, layer in enumerate(self.layers):
            x = layer(x)
            yield x
            if number < N_POOLS:
                x = self.pools[number](x)

    def blocks(self) -> list[list[nn.Module]]:
        """The modules behind each of them."""
        return [[layer] for layer in self.layers]

    def _check(self, x: Tensor) -> None:
        check_input(x, self.dims, self.in_channels)
        check_halving(x, self.pool_strides, "larger items, or model.encoder.strides: auto")


def build_vgg(
    config: VGGIn2dConfig | VGGIn3dConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> VGGEncoder:
    """An encoder on the CPU with weights determined by ``seed``.

    Args:
        config: What to build.
        in_channels: Channels of an image.
        spatial: Size of an image; needed by `strides: auto`.
        seed: Seed of the run.

    Raises:
        ConfigError: `strides: auto` without a size, or a size with the wrong number of axes.
    """
    check_axes(config.name, config.dims, spatial)
    strides = resolve_strides(config.name, config.strides, spatial, N_POOLS + 1)
    config = config.model_copy(update={"strides": strides})
    with seeded_init(seed, ENCODER):
        return VGGEncoder(config, in_channels)
