"""Projection heads: trained with a method; only the plain one is kept afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from medssl.core.errors import ConfigError, ShapeError
from medssl.models.blocks import CONV, conv_norm_relu
from medssl.models.norm import Norm, SyncBatchNorm

Pool = Literal["flatten", "avg"]
HeadNorm = Literal["none", "batch"]


def mlp(in_features: int, hidden: int, out_features: int, *, bias: bool = True) -> nn.Sequential:
    """Linear, ReLU, linear (the projection of SimCLR, Chen et al. 2020, arXiv:2002.05709, section 2.1)."""
    return nn.Sequential(
        nn.Linear(in_features, hidden, bias=bias), nn.ReLU(inplace=True), nn.Linear(hidden, out_features, bias=bias)
    )


class ProjectionHead(nn.Module):
    """Encoder output h (N, F) to projection z (N, D): hidden layers (linear, optional norm, ReLU), then a linear map.

    One hidden layer is the head of Chen et al. 2020 (arXiv:2002.05709), section 2.1; with batch norm, the projector
    and predictor of BYOL (arXiv:2006.07733); two hidden layers with batch norm, the projector of Barlow Twins
    (arXiv:2103.03230) and expander of VICReg (arXiv:2105.04906). Exported beside the encoder, because some protocols
    evaluate z.

    Args:
        in_features: F.
        hidden: Width of the hidden layers.
        out_features: D.
        norm: "none" (the paper's formula), or "batch": batch norm over all processes after each hidden layer.
        n_hidden: Number of hidden layers.
        bias: Whether the last layer adds one. A loss that does not see the mean of z cannot learn it.

    Attributes:
        architecture: What ``build_head`` needs to build it again.
    """

    kind: Final = "projection"

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        norm: HeadNorm = "none",
        n_hidden: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.architecture: dict[str, Any] = {
            "kind": self.kind,
            "in_features": in_features,
            "hidden": hidden,
            "out_features": out_features,
            "norm": norm,
            "n_hidden": n_hidden,
            "bias": bias,
        }
        layers: list[nn.Module] = []
        for _ in range(n_hidden):
            layers.append(nn.Linear(in_features, hidden, bias=norm == "none"))
            if norm == "batch":
                layers.append(SyncBatchNorm(hidden))
            layers.append(nn.ReLU(inplace=True))
            in_features = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(in_features, out_features, bias=bias))

    def forward(self, h: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features), raw: comparisons normalise."""
        z: Tensor = self.layers(h)
        return z


class LinearHead(nn.Module):
    """Encoder output h (N, F) to z (N, D) by one linear map: the mean of a variational autoencoder's posterior.

    Args:
        in_features: F.
        out_features: D.

    Attributes:
        architecture: What ``build_head`` needs to build it again.
    """

    kind: Final = "linear"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.architecture: dict[str, Any] = {
            "kind": self.kind,
            "in_features": in_features,
            "out_features": out_features,
        }
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, h: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features), raw."""
        z: Tensor = self.linear(h)
        return z


HEADS: Final = {head.kind: head for head in (ProjectionHead, LinearHead)}


def build_head(architecture: Mapping[str, Any]) -> ProjectionHead | LinearHead:
    """The head that ``architecture`` describes, with fresh weights.

    Raises:
        ConfigError: A description that this version does not know.
    """
    settings = {name: value for name, value in architecture.items() if name != "kind"}
    kind = HEADS.get(architecture.get("kind", ""))
    if kind is None or settings.get("norm", "none") not in ("none", "batch"):
        raise ConfigError("a projection head of an unknown kind", found=str(dict(architecture))[:200])
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError("the description of a projection head is incomplete", found=str(error)) from error


class GlobalHead(nn.Module):
    """g1 of the global contrast: the coarsest map, flattened or averaged, to 1024 with ReLU to 128, without biases.

    Chaitanya et al. 2020 (arXiv:2006.10511); the paper flattens. A flattening head fits one image size only.

    Args:
        encoder: Read for the size of its coarsest map.
        image_shape: (C, *spatial) of an image.
        pool: "flatten" or "avg".
        hidden: Width between the two layers.
        out_features: Length of the projection.
    """

    def __init__(
        self,
        encoder: nn.Module,
        image_shape: tuple[int, ...],
        *,
        pool: Pool = "flatten",
        hidden: int = 1024,
        out_features: int = 128,
    ) -> None:
        super().__init__()
        self.pool = pool
        _, channels, *spatial = coarsest_shape(encoder, image_shape)
        self.map_size = tuple(spatial)
        voxels = math.prod(spatial) if pool == "flatten" else 1
        self.project = mlp(channels * voxels, hidden, out_features, bias=False)

    def forward(self, coarsest: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, out_features)."""
        if self.pool == "avg":
            return self.project(coarsest.flatten(2).mean(2))
        if tuple(coarsest.shape[2:]) != self.map_size:
            raise ShapeError(
                "a flattening head fits one image size only",
                found=f"coarsest map {tuple(coarsest.shape[2:])}, built for {self.map_size}",
                fix="give every view the size of the items, or set method.pool: avg",
            )
        return self.project(coarsest.flatten(1))


def coarsest_shape(encoder: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (1, C, *spatial) of the coarsest map of one image."""
    training = encoder.training
    encoder.eval()  # running statistics must not see the empty image
    try:
        with torch.no_grad():
            like = next(encoder.parameters())
            return tuple(encoder.feature_maps(torch.zeros(1, *image_shape, device=like.device))[-1].shape)
    finally:
        encoder.train(training)


class LocalHead(nn.Module):
    """g2 of the local contrast: two 1^d convolutions without biases, the first with norm and ReLU.

    Chaitanya et al. 2020 (arXiv:2006.10511). With ``region_features``, the shared linear map of the K^d voxels of a
    region to a vector follows; it is a convolution of that size without padding, so that voxel ``corner`` of the
    result is the region that begins at ``corner``.

    Args:
        channels: Channels of the decoder's map; kept.
        dims: 2 or 3.
        norm: Norm of the first convolution.
        region_size: K.
        region_features: Length of the vector of a region; None: no such map, regions are compared voxel by voxel.
    """

    def __init__(
        self, channels: int, dims: int, *, norm: Norm, region_size: int = 3, region_features: int | None = 128
    ) -> None:
        super().__init__()
        self.hidden = conv_norm_relu(dims, channels, channels, norm, kernel=1)
        self.out = CONV[dims](channels, channels, 1, bias=False)
        self.region: nn.Module | None = None
        if region_features is not None:
            self.region = CONV[dims](channels, region_features, region_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, C, *spatial), or (N, region_features, *(spatial - K + 1)) with the map of regions."""
        x = self.out(self.hidden(x))
        return x if self.region is None else self.region(x)
