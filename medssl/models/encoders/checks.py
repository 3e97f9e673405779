"""What every encoder asks of its items, with one wording."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medssl.core.errors import ConfigError, ShapeError


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
