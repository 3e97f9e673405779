"""Drawing the random numbers of a view, apart from applying them.

Every item draws one row of uniform numbers from its own generator, and every operation reads its own columns of it. So
switching one operation on or off leaves the draws of the others as they were, and an item's view depends on
(seed, step, slot, view) alone, however the batch is split over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.core.errors import ShapeError
from medssl.core.seeding import NOISE, VIEWS, derive_seed, numpy_rng
from medssl.transforms.augment_config import AugmentConfig
from medssl.transforms.geometry import rotation, theta_from_voxels

Floats = npt.NDArray[np.float64]

# First column and number of columns of each operation; the first one decides whether it happens (flip: one per axis).
_COLUMNS: Final[dict[str, tuple[int, int]]] = {
    "crop_resize": (0, 5),
    "flip": (5, 3),
    "affine": (8, 8),
    "blur": (16, 2),
    "gamma": (18, 2),
    "brightness": (20, 2),
    "contrast": (22, 2),
    "noise": (24, 2),
    "cutout": (26, 5),
    "bias_field": (31, 70),
}
_WIDTH: Final = 101


@dataclass(frozen=True)
class Params:
    """What was drawn for N items; a field is None where its operation is off. CPU tensors.

    Attributes:
        spatial: Voxels per axis of the images.
        size: Voxels per axis of the views.
        theta: (N, d, d + 1) float32, view -> image, all geometry in one.
        rotated: (N,) bool: the affine part happened; elsewhere theta is a crop and flips.
        moved: (N,) bool: theta is not the identity, or the size changes.
        sigma: (N,) Gaussian blur in voxels, 0 for none.
        bias: (N, terms) coefficients of ``intensity.exponents``, all 0 for none.
        gamma: (N,) 1 for none.
        brightness: (N,) 0 for none.
        contrast: (N,) 1 for none.
        noise: (N,) standard deviation, 0 for none.
        noise_seed: (N,) int64, one stream of noise per item.
        cutout: (N, 2, d) int64, first voxel and number of voxels per axis; 0 voxels for none.
    """

    spatial: tuple[int, ...]
    size: tuple[int, ...]
    theta: Tensor | None = None
    rotated: Tensor | None = None
    moved: Tensor | None = None
    sigma: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    brightness: Tensor | None = None
    contrast: Tensor | None = None
    noise: Tensor | None = None
    noise_seed: Tensor | None = None
    cutout: Tensor | None = None

    def item(self, index: int) -> Params:
        """The parameters of one item, N = 1."""
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spatial", "size")}
        kept = {name: None if value is None else value[index : index + 1] for name, value in rows.items()}
        return Params(self.spatial, self.size, **kept)


def exponents(spatial_dims: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Exponents of the monomials of total degree 1 to ``degree``, in the order of the bias coefficients."""
    every = np.ndindex(*(degree + 1,) * spatial_dims)
    return tuple(powers for powers in every if 1 <= sum(powers) <= degree)


def draw(
    config: AugmentConfig, spatial: Sequence[int], *, seed: int, step: int, slots: Sequence[int] | Tensor, view: int
) -> Params:
    """Draw the parameters of one view of N items.

    Args:
        config: The policy.
        spatial: Voxels per axis of the images.
        seed: The run's seed.
        step: The training step.
        slots: (N,) place of each item in the global batch.
        view: Number of the view; views of one item draw independently.

    Raises:
        ConfigError: The policy names an axis that the images do not have.
    """
    spatial = tuple(int(length) for length in spatial)
    if len(spatial) not in (2, 3):
        raise ShapeError("augmentation is for images with 2 or 3 spatial axes", found=f"spatial shape {spatial}")
    config.check(len(spatial))
    keys = [(int(seed), int(step), int(slot), int(view)) for slot in slots]
    uniform = np.empty((len(keys), _WIDTH))
    for row, (run, at, slot, which) in enumerate(keys):
        numpy_rng(run, VIEWS, at, slot, which).random(out=uniform[row])
    size = spatial if config.size is None else config.size
    seeds = None
    if config.noise is not None:
        seeds = torch.tensor([derive_seed(run, NOISE, at, slot, which) for run, at, slot, which in keys])
    return Params(
        spatial,
        size,
        **_draw_geometry(config, spatial, size, uniform),
        **_draw_intensity(config, len(spatial), uniform),
        noise_seed=seeds,
        cutout=_draw_cutout(config, size, uniform),
    )


def _columns(uniform: Floats, name: str) -> Floats:
    first, count = _COLUMNS[name]
    return uniform[:, first : first + count]


def _between(uniform: Floats, limits: tuple[float, float]) -> Floats:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _draw_geometry(
    config: AugmentConfig, spatial: tuple[int, ...], size: tuple[int, ...], uniform: Floats
) -> dict[str, Tensor]:
    """Theta of crop, then flip, then affine, as seen from the view."""
    if not config.moves:
        return {}
    n, dims = len(uniform), len(spatial)
    lengths = np.asarray(spatial, dtype=np.float64)
    start, share, flipped = np.zeros((n, dims)), np.ones((n, dims)), np.zeros((n, dims), dtype=bool)
    along = np.ones(dims, dtype=bool)
    if config.slice_axis is not None:
        along[config.slice_axis] = False
    if config.crop_resize is not None:
        u = _columns(uniform, "crop_resize")
        on = (u[:, :1] < config.crop_resize.probability) & along
        share = np.where(on, _between(u[:, 1:2], config.crop_resize.scale), 1.0)
        start = u[:, 2 : 2 + dims] * (1 - share) * lengths
    if config.flip is not None:
        axes = list(config.flip.axes)
        flipped[:, axes] = _columns(uniform, "flip")[:, axes] < config.flip.probability
    rotated, matrix, shift = _draw_affine(config, spatial, along, uniform)
    # view -> box -> mirrored -> turned about the centre
    step = share * lengths / np.asarray(size)
    step, start = np.where(flipped, -step, step), np.where(flipped, lengths - start, start)
    linear = matrix * step[:, None, :]
    offset = (matrix @ (start - lengths / 2 - shift)[:, :, None])[:, :, 0] + lengths / 2
    moved = rotated | flipped.any(axis=1) | (share != 1).any(axis=1) | (size != spatial)
    return {
        "theta": theta_from_voxels(linear, offset, size, spatial),
        "rotated": torch.from_numpy(rotated),
        "moved": torch.from_numpy(moved),
    }


def _draw_affine(
    config: AugmentConfig, spatial: tuple[int, ...], along: npt.NDArray[np.bool_], uniform: Floats
) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Which items turn, their matrices view -> image in voxels, and their shifts in voxels."""
    n, dims = len(uniform), len(spatial)
    identity = np.broadcast_to(np.eye(dims), (n, dims, dims))
    if config.affine is None:
        return np.zeros(n, dtype=bool), identity, np.zeros((n, dims))
    affine, u = config.affine, _columns(uniform, "affine")
    rotated = u[:, 0] < affine.probability
    angles = np.deg2rad(affine.degrees) * (2 * u[:, 1:4] - 1)
    if config.slice_axis is not None:
        angles[:, [axis for axis in range(3) if axis != config.slice_axis]] = 0
    spacing = np.ones(dims) if affine.spacing is None else np.asarray(affine.spacing)
    # A turn of the image is the inverse turn of where a view looks; in millimetres, or it would shear.
    turn = rotation(angles, dims).transpose(0, 2, 1) * spacing[None, None, :] / spacing[None, :, None]
    zoom = _between(u[:, 4:5], affine.scale)
    matrix = np.where(along, 1 / zoom, 1.0)[:, :, None] * turn
    shift = affine.translation * (2 * u[:, 5 : 5 + dims] - 1) * np.asarray(spatial) * along
    return rotated, np.where(rotated[:, None, None], matrix, identity), np.where(rotated[:, None], shift, 0.0)


def _draw_intensity(config: AugmentConfig, spatial_dims: int, uniform: Floats) -> dict[str, Tensor]:
    drawn: dict[str, Floats] = {}

    def one(name: str, probability: float, limits: tuple[float, float], neutral: float) -> Floats:
        u = _columns(uniform, name)
        return np.where(u[:, 0] < probability, _between(u[:, 1], limits), neutral)

    if config.blur is not None:
        drawn["sigma"] = one("blur", config.blur.probability, config.blur.sigma, 0.0)
    if config.gamma is not None:
        drawn["gamma"] = one("gamma", config.gamma.probability, config.gamma.gamma, 1.0)
    if config.brightness is not None:
        amount = config.brightness.amount
        drawn["brightness"] = one("brightness", config.brightness.probability, (-amount, amount), 0.0)
    if config.contrast is not None:
        drawn["contrast"] = one("contrast", config.contrast.probability, config.contrast.factor, 1.0)
    if config.noise is not None:
        drawn["noise"] = one("noise", config.noise.probability, config.noise.std, 0.0)
    if config.bias_field is not None:
        u = _columns(uniform, "bias_field")
        terms = len(exponents(spatial_dims, config.bias_field.degree))
        values = config.bias_field.coefficient * (2 * u[:, 1 : 1 + terms] - 1)
        drawn["bias"] = np.where(u[:, :1] < config.bias_field.probability, values, 0.0)
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in drawn.items()}


def _draw_cutout(config: AugmentConfig, size: tuple[int, ...], uniform: Floats) -> Tensor | None:
    if config.cutout is None:
        return None
    u = _columns(uniform, "cutout")
    share = _between(u[:, 1:2], config.cutout.size)
    length = np.maximum(1, np.rint(share * np.asarray(size)))
    start = np.floor(u[:, 2 : 2 + len(size)] * (np.asarray(size) - length + 1))
    length = np.where(u[:, :1] < config.cutout.probability, length, 0)
    return torch.from_numpy(np.stack([start, length], axis=1).astype(np.int64))
