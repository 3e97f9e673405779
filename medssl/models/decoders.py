"""The expanding half of a U-Net, buildable block by block, and a network for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.core.errors import ConfigError
from medssl.models.blocks import CONV, double_conv
from medssl.models.initialise import DECODER, he_normal, seeded_init
from medssl.models.norm import Norm, make_norm


class DecoderBlock(nn.Module):
    """Nearest upsampling to the skip's size, a convolution of the stride's size, concatenation, two 3^d convolutions.

    Chaitanya et al. 2020 (arXiv:2006.10511): x2 upsampling, 2x2 convolution, skip, two 3x3 convolutions, each with norm
    and ReLU. An axis that was not halved is neither enlarged nor convolved before the skip (kernel 1).
    """

    def __init__(self, below: int, skip: int, stride: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        dims = len(stride)
        self.up = CONV[dims](below, skip, stride, bias=False)
        self.up_norm = make_norm(norm, skip, dims)
        self.merge = double_conv(dims, 2 * skip, skip, norm)
        # An even kernel has no centre: the padding goes to the end of each axis. F.pad counts from the last axis.
        self._padding = [p for s in reversed(stride) for p in (0, s - 1)]

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, below, coarse) and (N, skip, fine) to (N, skip, fine)."""
        x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
        x = F.relu(self.up_norm(self.up(F.pad(x, self._padding))))
        return self.merge(torch.cat([skip, x], dim=1))


class Decoder(nn.Module):
    """The first ``blocks`` decoder blocks, counted from the coarsest.

    Parameters are named by that count, so that a decoder of few blocks loads into one of more.

    Attributes:
        out_channels: Channels of the map that it returns.
        norm: Norm of its convolutions.
        complete: Whether it reaches the finest level.
        architecture: What it was built with.
    """

    def __init__(self, width: Sequence[int], strides: Sequence[tuple[int, ...]], *, blocks: int, norm: Norm) -> None:
        super().__init__()
        levels = range(len(width) - 2, len(width) - 2 - blocks, -1)
        self.blocks = nn.ModuleList(DecoderBlock(width[k + 1], width[k], tuple(strides[k]), norm) for k in levels)
        self.out_channels, self.norm = width[levels[-1]], norm
        self.complete = blocks == len(width) - 1
        self.architecture = {"name": "unet_decoder", "blocks": blocks, "norm": norm}
        he_normal(self)

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Maps of the encoder, fine to coarse, to one map (N, out_channels, *spatial of the last block's level)."""
        x = feature_maps[-1]
        for block, skip in zip(self.blocks, reversed(feature_maps[:-1])):
            x = block(x, skip)
        return x


def build_decoder(encoder: Any, *, blocks: int | None = None, norm: Norm | None = None, seed: int = 0) -> Decoder:
    """A decoder for ``encoder``, on the CPU, with weights determined by ``seed``.

    Args:
        encoder: A U-Net's: has ``width`` and ``strides``.
        blocks: How many, counted from the coarsest; None: all.
        norm: None: the encoder's.
        seed: Seed of the run.

    Raises:
        ConfigError: An encoder without the maps that skips need; more blocks than it has poolings, or none.
    """
    if getattr(encoder, "strides", None) is None:
        name = getattr(encoder, "architecture", {}).get("config", {}).get("name", type(encoder).__name__)
        raise ConfigError(
            "a decoder needs the maps of a U-Net's encoder, one at the resolution of the image",
            where="model.encoder",
            found=f"`{name}`",
            fix="use unet2d or unet3d for segmentation, lcl and other methods that train a decoder",
        )
    most = len(encoder.width) - 1
    blocks = most if blocks is None else blocks
    if not 1 <= blocks <= most:
        raise ConfigError(
            f"a decoder for {most + 1} levels has 1 to {most} blocks",
            where="model.decoder_blocks",
            found=str(blocks),
            fix=f"choose 1 to {most}",
        )
    with seeded_init(seed, DECODER):
        return Decoder(encoder.width, encoder.strides, blocks=blocks, norm=norm or encoder.norm)


class SegmentationNet(nn.Module):
    """Encoder, decoder and a 1^d convolution to classes: (N, C, *spatial) to logits (N, K, *spatial)."""

    def __init__(self, encoder: nn.Module, decoder: Decoder, n_classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.n_classes = encoder, decoder, n_classes
        dims = len(encoder.strides[0])
        self.classifier = CONV[dims](decoder.out_channels, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits on the grid of ``x``; those of an incomplete decoder are enlarged to it by linear interpolation."""
        logits = self.classifier(self.decoder(self.encoder.feature_maps(x)))
        if logits.shape[2:] == x.shape[2:]:
            return logits
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        return F.interpolate(logits, size=x.shape[2:], mode=mode, align_corners=False)
