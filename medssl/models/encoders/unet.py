"""U-Net encoders in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.models.blocks import MAX_POOL, double_conv
from medssl.models.encoders.checks import check_axes, check_halving, check_input, resolve_strides
from medssl.models.initialise import ENCODER, he_normal, seeded_init
from medssl.models.norm import Norm

Stride = Annotated[int, Field(ge=1, le=2)]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
_GCL: Final = {"widths": (16, 32, 64, 128, 128, 128), "norm": "batch", "strides": ((2, 2),) * 5}


class UNet2dConfig(StrictModel):
    """A 2D U-Net encoder."""

    name: Literal["unet2d"] = "unet2d"
    preset: Literal["gcl"] | None = None
    """gcl: the network of Chaitanya et al. 2020 (6 levels, 5 max-pools, batch norm); fixes the three keys below."""
    widths: Widths = (16, 32, 64, 128, 128, 128)
    """Channels of each level, fine to coarse."""
    norm: Norm = "group"
    """group, instance or batch (synchronised over processes)."""
    strides: Literal["auto"] | tuple[tuple[Stride, Stride], ...] = "auto"
    """Between levels, per axis; auto: 2 wherever the axis keeps at least 4 voxels, from the size of the items."""

    dims: ClassVar[int] = 2

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "gcl":
            return {**_GCL, **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> UNet2dConfig:
        if self.preset == "gcl":
            for key, value in _GCL.items():
                if getattr(self, key) != value:
                    raise ValueError(
                        f"preset gcl fixes {key} to {value}, found {getattr(self, key)}: remove preset or {key}"
                    )
        _check_strides(self.strides, self.widths)
        return self


class UNet3dConfig(StrictModel):
    """A 3D U-Net encoder."""

    name: Literal["unet3d"] = "unet3d"
    widths: Widths = (16, 32, 64, 128)
    """Channels of each level, fine to coarse."""
    norm: Norm = "group"
    """group, instance or batch (synchronised over processes)."""
    strides: Literal["auto"] | tuple[tuple[Stride, Stride, Stride], ...] = "auto"
    """Between levels, per axis; auto: 2 wherever the axis keeps at least 4 voxels, from the size of the items."""

    dims: ClassVar[int] = 3

    @model_validator(mode="after")
    def _consistent(self) -> UNet3dConfig:
        _check_strides(self.strides, self.widths)
        return self


def _check_strides(strides: Any, widths: tuple[int, ...]) -> None:
    if strides != "auto" and len(strides) != len(widths) - 1:
        raise ValueError(f"strides: {len(widths)} levels need {len(widths) - 1} entries, found {len(strides)}")


class UNetEncoder(nn.Module):
    """The contracting half of a U-Net: per level two 3^d convolutions with norm and ReLU, max-pooling in between.

    Ronneberger et al. 2015 (arXiv:1505.04597), 3D as Cicek et al. 2016 (arXiv:1606.06650), convolutions padded.

    Attributes:
        dims: 2 or 3.
        width: Channels of each level, fine to coarse.
        strides: Between levels, one tuple of ``dims`` per pooling.
        out_features: Features of ``forward``: the channels of the coarsest level.
        architecture: What is needed to build it again (configuration with its strides, and the input channels).
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        widths: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        norm: Norm,
    ) -> None:
        super().__init__()
        self.dims = len(strides[0])
        self.in_channels, self.width, self.strides, self.norm = in_channels, tuple(widths), strides, norm
        self.out_features = widths[-1]
        config = {"name": name, "widths": list(widths), "norm": norm, "strides": [list(s) for s in strides]}
        self.architecture = {"config": config, "in_channels": in_channels}
        inputs = (in_channels, *widths[:-1])
        self.levels = nn.ModuleList(double_conv(self.dims, i, o, norm) for i, o in zip(inputs, widths))
        self.pools = nn.ModuleList(MAX_POOL[self.dims](stride) for stride in strides)
        he_normal(self)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """One map per level, fine to coarse: (N, width[k], *spatial of level k).

        Raises:
            ShapeError: Other axes or channels than it was built for, or an axis too short for the strides.
        """
        self._check(x)
        maps = [self.levels[0](x)]
        for pool, level in zip(self.pools, list(self.levels)[1:]):
            maps.append(level(pool(maps[-1])))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, F): the coarsest map averaged over its voxels."""
        return self.feature_maps(x)[-1].flatten(2).mean(2)

    def blocks(self) -> list[list[nn.Module]]:
        """The modules that make each map from the one before; all of them hold all weights."""
        return [[level] for level in self.levels]

    def _check(self, x: Tensor) -> None:
        check_input(x, self.dims, self.in_channels)
        check_halving(
            x, self.strides, "larger items, fewer levels (model.encoder.widths) or model.encoder.strides: auto"
        )


def build_unet(
    config: UNet2dConfig | UNet3dConfig, in_channels: int, *, spatial: Sequence[int] | None = None, seed: int = 0
) -> UNetEncoder:
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
    strides = resolve_strides(config.name, config.strides, spatial, len(config.widths))
    with seeded_init(seed, ENCODER):
        return UNetEncoder(
            name=config.name, in_channels=in_channels, widths=config.widths, strides=strides, norm=config.norm
        )
