"""The convolution blocks that encoders and decoders are made of."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from torch import nn

from medssl.models.norm import Norm, make_norm

CONV: Final = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL: Final = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


def conv_norm_relu(dims: int, in_channels: int, out_channels: int, norm: Norm, *, kernel: int = 3) -> nn.Sequential:
    """Convolution that keeps the size (odd ``kernel``), norm, ReLU. No bias: the norm has one."""
    conv = CONV[dims](in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(
        OrderedDict(conv=conv, norm=make_norm(norm, out_channels, dims), relu=nn.ReLU(inplace=True)),
    )


def double_conv(dims: int, in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Two 3^d convolutions, each with norm and ReLU."""
    return nn.Sequential(
        conv_norm_relu(dims, in_channels, out_channels, norm), conv_norm_relu(dims, out_channels, out_channels, norm)
    )
