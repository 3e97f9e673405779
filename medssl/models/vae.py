"""Decoders that draw an item from a short code: the second half of a variational autoencoder."""

from __future__ import annotations

import copy
import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.core.errors import ShapeError
from medssl.models.blocks import CONV, conv_norm_relu
from medssl.models.encoders import MLPConfig, MLPEncoder
from medssl.models.initialise import he_normal
from medssl.models.norm import Norm

START_VALUES: Final = 16_384
"""The linear map from the code makes about as many values at most, whatever the size of the coarsest map."""


class MirroredDecoder(nn.Module):
    """A code (N, L) to images (N, C, *spatial), level by level through the sizes of the encoder's maps.

    A linear map makes the coarsest level; each further one is nearest upsampling to the size of the encoder's map, then
    a 3^d convolution with norm and ReLU; at the end upsampling to the size of the image and a 3^d convolution to its
    channels. There are no skips: everything comes from the code. Since each size is the encoder's own, any image that
    the encoder takes is drawn in its size (121 x 145 x 121 too).

    Args:
        sizes: Spatial size of each map of the encoder, fine to coarse.
        width: Channels of each.
        image_shape: (C, *spatial).
        latent_dim: L.
        channels: Most channels of a level, so that wide encoders do not get decoders of hundreds of millions of
            weights.
        norm: group, instance or batch.
    """

    def __init__(
        self,
        sizes: list[tuple[int, ...]],
        width: tuple[int, ...],
        image_shape: tuple[int, ...],
        latent_dim: int,
        *,
        channels: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        dims, widths = len(sizes[0]), [min(w, channels) for w in width]
        voxels = math.prod(sizes[-1])
        self.image_shape, self.latent_dim = tuple(image_shape), latent_dim
        self._start = (min(widths[-1], max(1, START_VALUES // voxels)), *sizes[-1])
        self._sizes = [*reversed(sizes), tuple(image_shape[1:])]
        # The last level is the largest by far: a quarter of the channels will do there.
        outputs = [*reversed(widths), max(1, widths[0] // 4)]
        self.start = nn.Linear(latent_dim, math.prod(self._start))
        inputs = [self._start[0], *outputs[:-1]]
        self.levels = nn.ModuleList(conv_norm_relu(dims, i, o, norm) for i, o in zip(inputs, outputs))
        self.image = CONV[dims](outputs[-1], image_shape[0], 3, padding=1)
        he_normal(self)

    def forward(self, z: Tensor) -> Tensor:
        """(N, L) to (N, C, *spatial)."""
        x = self.start(z).unflatten(1, self._start)
        for level, size in zip(self.levels, self._sizes[:-1]):
            x = level(_resized(x, size))
        # At the size of the image only after the convolution that leaves few channels.
        drawn: Tensor = self.image(_resized(self.levels[-1](x), self._sizes[-1]))
        return drawn


class MirroredTableDecoder(nn.Module):
    """A code (N, L) to rows (N, F): the layers of an `mlp` encoder in reverse order, then a linear map.

    Args:
        encoder: Read for its widths and settings.
        latent_dim: L.
    """

    def __init__(self, encoder: MLPEncoder, latent_dim: int) -> None:
        super().__init__()
        config = {**encoder.architecture["config"], "widths": encoder.width[::-1]}
        self.image_shape, self.latent_dim = (encoder.in_channels,), latent_dim
        self.levels = MLPEncoder(MLPConfig(**config), latent_dim)
        self.row = nn.Linear(encoder.width[0], encoder.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, L) to (N, F)."""
        row: Tensor = self.row(self.levels(z))
        return row


def mirrored_decoder(
    encoder: Any, image_shape: tuple[int, ...], latent_dim: int, *, channels: int = 256
) -> MirroredDecoder | MirroredTableDecoder:
    """The decoder that mirrors ``encoder``, with its norm, on the CPU.

    Args:
        encoder: Any of ENCODERS.
        image_shape: (C, *spatial) of one item, or (F,) of a row.
        latent_dim: Length of the code.
        channels: Most channels of a level of an image.

    Raises:
        ShapeError: An item that the encoder does not take.
    """
    if isinstance(encoder, MLPEncoder):
        if image_shape != (encoder.in_channels,):
            raise ShapeError(f"the encoder takes rows of {encoder.in_channels} features", found=str(image_shape))
        return MirroredTableDecoder(encoder, latent_dim)
    sizes = map_sizes(encoder, image_shape)
    return MirroredDecoder(sizes, encoder.width, image_shape, latent_dim, channels=channels, norm=encoder.norm)


def map_sizes(encoder: nn.Module, image_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Spatial size of each map of one image, fine to coarse; nothing is computed, only shapes are followed."""
    shadow: Any = copy.deepcopy(encoder).to("meta").eval()
    with torch.no_grad():
        return [tuple(m.shape[2:]) for m in shadow.feature_maps(torch.zeros(1, *image_shape, device="meta"))]


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size=size, mode="nearest")
