"""What encoders ask of their items, with one wording, and how far items can be halved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from medssl.core.errors import ConfigError, ShapeError

SMALLEST_AXIS: Final = 4
"""`strides: auto` halves no axis below this many voxels."""
Strides = tuple[tuple[int, ...], ...]


def check_axes(name: str, dims: int, spatial: Sequence[int] | None) -> None:
    """Refuse to build an encoder of ``dims`` axes for items of other axes; a size of None is not known yet.

    Raises:
        ConfigError: Another number of axes.
    """
    if spatial is not None and len(spatial) != dims:
        raise ConfigError(
            f"encoder `{name}` takes {f'{dims}D items' if dims else 'rows of a feature table'}",
            found=f"items of size {tuple(spatial)}" if len(spatial) else "rows of a feature table",
            fix="choose the encoder that fits items.geometry",
        )


def check_input(x: Tensor, dims: int, in_channels: int) -> None:
    """Refuse tensors that are not (N, in_channels, *spatial) with ``dims`` axes.

    Raises:
        ShapeError: Other axes or channels.
    """
    if x.ndim != dims + 2 or x.shape[1] != in_channels:
        layout = ", ".join(["N", str(in_channels), *"XYZ"[:dims]])
        raise ShapeError(
            f"a {dims}D encoder of {in_channels} channels takes ({layout})"
            if dims
            else f"an encoder of {in_channels} features takes ({layout})",
            found=str(tuple(x.shape)),
        )


def check_halving(x: Tensor, strides: Strides, fix: str) -> None:
    """Refuse images (N, C, *spatial) that poolings with these strides would halve to nothing.

    Raises:
        ShapeError: An axis is too short; ``fix`` names what may be used instead.
    """
    shortest = tuple(2 ** sum(stride[axis] == 2 for stride in strides) for axis in range(x.ndim - 2))
    if any(n < least for n, least in zip(x.shape[2:], shortest)):
        raise ShapeError(
            f"the image is smaller than the {len(strides)} poolings of the encoder can halve",
            found=f"spatial size {tuple(x.shape[2:])}, at least {shortest} is needed",
            fix=f"use {fix}",
        )


def resolve_strides(name: str, strides: str | Strides, spatial: Sequence[int] | None, levels: int) -> Strides:
    """The strides as configured, or for `auto` those that fit items of this size.

    Raises:
        ConfigError: `auto` without a size.
    """
    if not isinstance(strides, str):
        return strides
    if spatial is None:
        raise ConfigError(
            f"encoder `{name}`: strides auto needs the size of the items",
            fix="pass spatial=..., or write model.encoder.strides out",
        )
    return auto_strides(spatial, levels)


def auto_strides(spatial: Sequence[int], levels: int) -> Strides:
    """Strides between ``levels`` levels: an axis is halved while it keeps at least 4 voxels.

    A shallow stack is thus halved in plane only: (64, 64, 8) in 4 levels gives (2, 2, 2), (2, 2, 1), (2, 2, 1).
    """
    size, strides = list(spatial), []
    for _ in range(levels - 1):
        stride = tuple(2 if n // 2 >= SMALLEST_AXIS else 1 for n in size)
        size = [n // s for n, s in zip(size, stride)]
        strides.append(stride)
    return tuple(strides)
