"""What the convolutional encoders without skips have in common: stages, one after the other, then the mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from medssl.core.errors import ShapeError
from medssl.models.encoders.checks import check_input
from medssl.models.norm import Norm, make_norm


class ImageEncoderConfig(Protocol):
    """What `StagedEncoder` asks of the configuration of an encoder."""

    dims: int
    norm: Norm

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Values for JSON."""


class StagedEncoder(nn.Module, ABC):
    """Stages that coarsen an image, and the mean of the last map over its voxels as features.

    Attributes:
        dims: 2 or 3.
        width: Channels of each map, fine to coarse.
        out_features: Features of ``forward``: the channels of the last map.
        smallest: Shortest axis of an image that every stage leaves a voxel of.
        architecture: What is needed to build it again (configuration and input channels).
    """

    def __init__(
        self, config: ImageEncoderConfig, in_channels: int, *, width: tuple[int, ...], smallest: int = 1
    ) -> None:
        super().__init__()
        self.dims, self.norm, self.in_channels = config.dims, config.norm, in_channels
        self.width, self.out_features, self.smallest = width, width[-1], smallest
        self.architecture = {"config": config.model_dump(mode="json"), "in_channels": in_channels}

    @abstractmethod
    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The map that each stage leaves, fine to coarse; no later stage writes into it."""

    @abstractmethod
    def blocks(self) -> list[list[nn.Module]]:
        """The modules that make each map from the one before; all of them hold all weights."""

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """One map per stage, fine to coarse: (N, width[k], *spatial of stage k).

        Raises:
            ShapeError: Other axes or channels than it was built for, or an axis too short for the strides.
        """
        self._check(x)
        return list(self.stages(x))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, F): the last map averaged over its voxels."""
        self._check(x)
        for last in self.stages(x):  # keeps one map at a time where no gradient is wanted
            x = last
        return x.flatten(2).mean(2)

    def _check(self, x: Tensor) -> None:
        check_input(x, self.dims, self.in_channels)
        if min(x.shape[2:]) < self.smallest:
            raise ShapeError(
                "the image is smaller than the strides of the encoder leave a voxel of",
                found=f"spatial size {tuple(x.shape[2:])}, at least {self.smallest} on each axis is needed",
                fix=f"use larger items, or an encoder that takes small ones (unet{self.dims}d, resnet18_{self.dims}d)",
            )


def replace_norms(module: nn.Module, norm: Norm, dims: int) -> None:
    """Put our normalisation layers in the places of torch's batch norms: those of two processes equal one."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm2d, nn.BatchNorm3d)):
                setattr(parent, name, make_norm(norm, child.num_features, dims))
