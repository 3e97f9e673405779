"""Encoders by name: images in, pooled features or a list of feature maps out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from medssl.core.schema import StrictModel
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
    }
)


def build_encoder(config: Any, image_shape: Sequence[int], *, seed: int = 0) -> nn.Module:
    """The encoder that ``config`` names, for images ``(C, *spatial)``."""
    return ENCODERS[config.name].build(config, image_shape[0], spatial=tuple(image_shape[1:]), seed=seed)


__all__ = [
    "ENCODERS",
    "EncoderEntry",
    "UNet2dConfig",
    "UNet3dConfig",
    "UNetEncoder",
    "auto_strides",
    "build_encoder",
    "build_unet",
]
