"""Artefacts of acquisition from TorchIO: motion, ghosting and spikes in k-space.

They are slow (Fourier transforms and, for motion, resampling of each whole image) and always run on the CPU, item by
item. Their parameters are drawn here and handed to TorchIO's deterministic transforms, because its random ones read
torch's global generator, which threads would share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from medssl.core.errors import ShapeError
from medssl.core.schema import StrictModel
from medssl.core.seeding import VIEWS, numpy_rng

_STREAM = 1  # apart from the augmentation's stream, which has no fifth key


class Artefact(StrictModel):
    """One artefact and how often it appears; ranges are TorchIO's defaults."""

    name: Literal["motion", "ghosting", "spike"]
    probability: Annotated[float, Field(ge=0, le=1)] = 0.2


def add_artefacts(
    images: Tensor, artefacts: Sequence[Artefact], *, seed: int, step: int, slots: Sequence[int] | Tensor, view: int
) -> Tensor:
    """The images with the listed artefacts, in that order, each item drawing for itself.

    Args:
        images: (N, C, *spatial) float, 2 or 3 spatial axes; a slice is treated as a volume one voxel thick.
        artefacts: What can happen.
        seed, step, slots, view: What determines the draw, as in ``augment.draw``.

    Returns:
        (N, C, *spatial) float32 on the device of ``images``; a new tensor, or ``images`` where nothing happened.
    """
    if images.dim() not in (4, 5):
        raise ShapeError("artefacts are for images with 2 or 3 spatial axes", found=f"shape {tuple(images.shape)}")
    result = images
    for number, slot in enumerate(slots):
        rng = numpy_rng(seed, VIEWS, step, int(slot), view, _STREAM)
        for artefact in artefacts:
            happens = rng.random() < artefact.probability
            own = np.random.default_rng(rng.integers(2**63))  # so that one artefact does not shift the next one's draw
            if not happens:
                continue
            if result is images:
                result = images.detach().float().clone()
            volume = result[number].cpu()
            flat = volume.dim() == 3
            changed = _apply(artefact.name, volume[..., None] if flat else volume, own, flat)
            result[number] = (changed[..., 0] if flat else changed).to(result.device)
    return result


def _apply(name: str, volume: Tensor, rng: np.random.Generator, flat: bool) -> Tensor:
    """One artefact on (C, X, Y, Z); in a flat image nothing happens along Z."""
    import torchio  # takes seconds, and most runs never need it

    axes = 2 if flat else 3
    if name == "motion":
        degrees, shift = rng.uniform(-10, 10, (2, 3)), rng.uniform(-10, 10, (2, 3))
        if flat:
            degrees[:, :2], shift[:, 2] = 0, 0
        times = np.sort(rng.uniform(0.1, 0.9, 2))
        transform = torchio.Motion(degrees=degrees, translation=shift, times=times, image_interpolation="linear")
    elif name == "ghosting":
        transform = torchio.Ghosting(
            num_ghosts=int(rng.integers(4, 11)),
            axis=int(rng.integers(axes)),
            intensity=rng.uniform(0.5, 1),
            restore=0.02,
        )
    else:
        position = rng.uniform(0, 1, (1, 3))
        if flat:
            position[:, 2] = 0
        transform = torchio.Spike(spikes_positions=position, intensity=rng.choice([-1, 1]) * rng.uniform(1, 3))
    return transform(volume).to(torch.float32)
