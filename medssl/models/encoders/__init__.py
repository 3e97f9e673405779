"""Encoders by name: images or rows of a feature table in, pooled features or a list of feature maps out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from medssl.core.schema import StrictModel
from medssl.models.encoders.alexnet import AlexNetIn2dConfig, AlexNetIn3dConfig, build_alexnet
from medssl.models.encoders.checks import auto_strides
from medssl.models.encoders.densenet import DenseNet121In2dConfig, DenseNet121In3dConfig, build_densenet
from medssl.models.encoders.mlp import MLPConfig, MLPEncoder, build_mlp
from medssl.models.encoders.resnet import (
    ResNet18In2dConfig,
    ResNet18In3dConfig,
    ResNet50In2dConfig,
    ResNet50In3dConfig,
    build_resnet,
)
from medssl.models.encoders.unet import UNet2dConfig, UNet3dConfig, UNetEncoder, build_unet
from medssl.models.encoders.vgg import VGGIn2dConfig, VGGIn3dConfig, build_vgg


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder that a configuration can name.

    Attributes:
        config: Validates its section of the YAML.
        build: ``build(config, in_channels, *, spatial=None, seed=0)`` gives the module, on the CPU.
        summary: One line for lists.
        source: Publication.
        decoder: Whether it has the maps that a U-Net's decoder needs.
    """

    config: type[StrictModel]
    build: Callable[..., nn.Module]
    summary: str
    source: str
    decoder: bool = False


_RESNET: Final = "He et al. 2016 (arXiv:1512.03385)"
_DENSENET: Final = "Huang et al. 2017 (arXiv:1608.06993)"
_VGG: Final = "Simonyan & Zisserman 2015 (arXiv:1409.1556); Ji et al. 2019 (arXiv:1807.06653)"
_ALEXNET: Final = "Abrol et al. 2021 (doi:10.1038/s41467-020-20655-6)"

ENCODERS: Final[Mapping[str, EncoderEntry]] = MappingProxyType(
    {
        "unet2d": EncoderEntry(
            UNet2dConfig,
            build_unet,
            "2D U-Net encoder; preset gcl is the network of the GCL and LCL paper",
            "Ronneberger et al. 2015 (arXiv:1505.04597)",
            decoder=True,
        ),
        "unet3d": EncoderEntry(
            UNet3dConfig,
            build_unet,
            "3D U-Net encoder with strides per axis, for volumes and slabs",
            "Cicek et al. 2016 (arXiv:1606.06650)",
            decoder=True,
        ),
        "resnet18_2d": EncoderEntry(ResNet18In2dConfig, build_resnet, "ResNet-18 for slices", _RESNET),
        "resnet18_3d": EncoderEntry(
            ResNet18In3dConfig, build_resnet, "ResNet-18 for volumes, its first convolution with stride 2", _RESNET
        ),
        "resnet50_2d": EncoderEntry(ResNet50In2dConfig, build_resnet, "ResNet-50 for slices", _RESNET),
        "resnet50_3d": EncoderEntry(
            ResNet50In3dConfig, build_resnet, "ResNet-50 for volumes, its first convolution with stride 2", _RESNET
        ),
        "densenet121_2d": EncoderEntry(DenseNet121In2dConfig, build_densenet, "DenseNet-121 for slices", _DENSENET),
        "densenet121_3d": EncoderEntry(DenseNet121In3dConfig, build_densenet, "DenseNet-121 for volumes", _DENSENET),
        "alexnet_2d": EncoderEntry(AlexNetIn2dConfig, build_alexnet, "2D form of alexnet_3d", _ALEXNET),
        "alexnet_3d": EncoderEntry(
            AlexNetIn3dConfig, build_alexnet, "AlexNet for brain volumes, of at least 69 voxels on each axis", _ALEXNET
        ),
        "vgg_2d": EncoderEntry(
            VGGIn2dConfig, build_vgg, "shallow VGG-like, total stride 4, for clusters of places in slices", _VGG
        ),
        "vgg_3d": EncoderEntry(
            VGGIn3dConfig, build_vgg, "shallow VGG-like, total stride 4, for clusters of places in volumes", _VGG
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
    "AlexNetIn2dConfig",
    "AlexNetIn3dConfig",
    "DenseNet121In2dConfig",
    "DenseNet121In3dConfig",
    "EncoderEntry",
    "MLPConfig",
    "MLPEncoder",
    "ResNet18In2dConfig",
    "ResNet18In3dConfig",
    "ResNet50In2dConfig",
    "ResNet50In3dConfig",
    "UNet2dConfig",
    "UNet3dConfig",
    "UNetEncoder",
    "VGGIn2dConfig",
    "VGGIn3dConfig",
    "auto_strides",
    "build_alexnet",
    "build_densenet",
    "build_encoder",
    "build_mlp",
    "build_resnet",
    "build_unet",
    "build_vgg",
]
