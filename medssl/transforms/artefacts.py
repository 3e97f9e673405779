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
    """One artefact and how often it appears; TorchIO's default ranges, but shifts up to 5 % of the axis, not 10 mm."""

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
            changed = _apply(artefact.name, volume[:, None] if flat else volume, own, flat)
            result[number] = (changed[:, 0] if flat else changed).to(result.device)
    return result


def _apply(name: str, volume: Tensor, rng: np.random.Generator, flat: bool) -> Tensor:
    """One artefact on (C, X, Y, Z). A flat image has X = 1, because motion blends along Z; nothing happens along X."""
    import torchio  # takes seconds, and most runs never need it

    sizes = np.asarray(volume.shape[1:])
    transform: torchio.Transform
    if name == "motion":
        degrees, shift = rng.uniform(-10, 10, (2, 3)), rng.uniform(-0.05, 0.05, (2, 3)) * sizes
        if flat:
            degrees[:, 1:], shift[:, 0] = 0, 0
        times = np.sort(rng.uniform(0.1, 0.9, 2))
        transform = torchio.Motion(degrees=degrees, translation=shift, times=times, image_interpolation="linear")
    elif name == "ghosting":
        transform = torchio.Ghosting(
            num_ghosts=int(rng.integers(4, 11)),
            axis=int(rng.integers(1 if flat else 0, 3)),
            intensity=rng.uniform(0.5, 1),
            restore=0.02,
        )
    else:
        position = rng.uniform(0, 1, (1, 3))  # along a flat axis any position is the only one
        transform = torchio.Spike(spikes_positions=position, intensity=rng.choice([-1, 1]) * rng.uniform(1, 3))
    # TorchIO turns about the origin of the coordinates: put it in the middle.
    affine = np.eye(4)
    affine[:3, 3] = -(sizes - 1) / 2
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=volume, affine=affine))
    # Not transform(subject): that asks torch's global generator whether to apply it.
    return transform.apply_transform(subject).get_first_image().data.to(torch.float32)
