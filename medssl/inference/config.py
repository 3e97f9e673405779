"""Settings of whole-volume inference."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from medssl.core.schema import StrictModel


class InferenceConfig(StrictModel):
    """How a trained network is run over a whole volume."""

    window: tuple[PositiveInt, ...] | None = None
    """Voxels of a sliding window, one number per spatial axis; null: the whole volume (or slice) in one pass."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window that its neighbour covers."""
    batch_size: PositiveInt = 8
    """Slices or windows in one pass."""
