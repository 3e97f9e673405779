"""Encoders by name: images or rows of a feature table in, pooled features or a list of feature maps out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from medssl.core.schema import StrictModel
from medssl.models.encoders.mlp import MLPConfig, MLPEncoder, build_mlp
from medssl.models.encoders.unet import UNet2dConfig, UNet3dConfig, UNetEncoder, auto_strides, build_unet


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder that a configuration can name.

    Attributes:
        config: Validates its section of the YAML.
        build: ``build(config, in_channels, *, spatial=None, seed=0)`` gives the module, on the CPU.
        summary: One line for lists.
        source: Publication.
    """

    config: type[StrictModel]
    build: Callable[..., nn.Module]
    summary: str
    source: str


ENCODERS: Final[Mapping[str, EncoderEntry]] = MappingProxyType(
    {
        "unet2d": EncoderEntry(
            UNet2dConfig,
            build_unet,
            "2D U-Net encoder; preset gcl is the network of the GCL and LCL paper",
            "Ronneberger et al. 2015 (arXiv:1505.04597)",
        ),
        "unet3d": EncoderEntry(
            UNet3dConfig,
            build_unet,
            "3D U-Net encoder with strides per axis, for volumes and slabs",
            "Cicek et al. 2016 (arXiv:1606.06650)",
        ),
        "mlp": EncoderEntry(
            MLPConfig,
            build_mlp,
            "multilayer perceptron, for feature tables",
            "Rumelhart et al. 1986 (doi:10.1038/323533a0)",
        ),
    }
)


def build_encoder(config: Any, image_shape: Sequence[int], *, seed: int = 0) -> nn.Module:
    """The encoder that ``config`` names, for images ``(C, *spatial)`` or rows ``(F,)`` of a table."""
    return ENCODERS[config.name].build(config, image_shape[0], spatial=tuple(image_shape[1:]), seed=seed)


__all__ = [
    "ENCODERS",
    "EncoderEntry",
    "MLPConfig",
    "MLPEncoder",
    "UNet2dConfig",
    "UNet3dConfig",
    "UNetEncoder",
    "auto_strides",
    "build_encoder",
    "build_mlp",
    "build_unet",
]
