"""Synthetic T1-like heads whose ventricles widen and whose cortex thins with age, at several sites.

Age explains only part of the anatomy (a person's own rate of ageing and head size explain the rest), so that even a
perfect reader of the anatomy is a few years off. Sites differ in contrast, coil, noise and resolution: a site changes
the image, never the anatomy. In the plain brain cohort age does not depend on the site; in the one that is laid out
as OpenBHB (`synthetic_openbhb`) it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

FIELD_OF_VIEW: Final = 190.0  # mm along every axis
AGES: Final = (20.0, 80.0)
RATE_SD: Final = 4.0  # years: how far a person's anatomy is ahead of or behind the calendar
Array = np.ndarray


@dataclass(frozen=True)
class Site:
    """How one site acquires: blur in voxels along each axis, grey-white contrast, coil, noise and units."""

    name: str
    blur: tuple[float, float, float]
    gamma: float
    contrast: float
    coil: float
    noise: float
    scale: float


SITES: Final = (
    Site("A", (0.45, 0.45, 0.45), 1.00, 1.00, 0.20, 0.025, 250.0),
    Site("B", (0.45, 0.45, 0.90), 0.80, 0.80, 0.35, 0.040, 900.0),
    Site("C", (0.70, 0.50, 0.50), 1.25, 1.15, 0.45, 0.045, 120.0),
    Site("D", (0.60, 0.60, 0.70), 0.90, 0.90, 0.30, 0.035, 1500.0),
)


@dataclass(frozen=True)
class Head:
    """One volume: image int16 (X, Y, Z), spacing in mm, age in years, sex F or M."""

    image: Array
    spacing: tuple[float, float, float]
    age: float
    sex: str


def draw_site(rng: np.random.Generator, name: str) -> Site:
    """A site of its own: all of its properties come from `rng`."""
    blur = rng.uniform(0.4, 0.85, size=3)
    return Site(
        name,
        (float(blur[0]), float(blur[1]), float(blur[2])),
        gamma=float(np.exp(rng.uniform(-0.3, 0.3))),
        contrast=float(rng.uniform(0.75, 1.2)),
        coil=float(rng.uniform(0.1, 0.5)),
        noise=float(rng.uniform(0.015, 0.05)),
        scale=float(np.exp(rng.uniform(np.log(100), np.log(1500)))),
    )


def draw_head(rng: np.random.Generator, site: Site, *, size: int) -> Head:
    """One subject's head, `size` voxels along every axis; all randomness comes from `rng`."""
    age = float(rng.uniform(*AGES))
    sex = "F" if rng.random() < 0.5 else "M"
    return draw_head_of(rng, site, age=age, sex=sex, shape=(size, size, size))


def draw_head_of(rng: np.random.Generator, site: Site, *, age: float, sex: str, shape: tuple[int, int, int]) -> Head:
    """The head of someone whose age and sex are known, on a grid whose shortest axis spans the field of view."""
    ageing = (age + rng.normal(0, RATE_SD) - AGES[0]) / (AGES[1] - AGES[0])
    voxel = FIELD_OF_VIEW / min(shape)
    x, y, z = _coordinates(rng, shape, voxel, 1.0 if sex == "F" else 1.06)
    image = _anatomy(rng, x, y, z, ageing, site)
    return Head(_acquire(rng, site, image), (voxel, voxel, voxel), age, sex)


def centred_grid(shape: tuple[int, int, int], voxel: float) -> Array:
    """(3, X, Y, Z): millimetres from the centre of a grid, the coordinates of a head that is straight and average."""
    return np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) * voxel for n in shape), indexing="ij"))


def _coordinates(
    rng: np.random.Generator, shape: tuple[int, int, int], voxel: float, scale: float
) -> tuple[Array, Array, Array]:
    """Anatomical coordinates in mm of every voxel: head size, a small rotation about each axis, a smooth warp."""
    grid = centred_grid(shape, voxel)
    rotation = np.eye(3)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        turn, angle = np.eye(3), rng.normal(0, np.deg2rad(4))
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    grid = np.tensordot(rotation, grid, axes=1) / (scale * np.exp(rng.normal(0, 0.035)))
    grid -= rng.normal(0, 2.5, size=(3, 1, 1, 1))
    for part in range(3):
        along = np.tensordot(rng.normal(0, 1, 3) * 2 * np.pi / 150, grid, axes=1)
        grid[part] += rng.uniform(1, 3) * np.sin(along + rng.uniform(0, 2 * np.pi))
    return grid[0], grid[1], grid[2]


def _anatomy(rng: np.random.Generator, x: Array, y: Array, z: Array, ageing: float, site: Site) -> Array:
    """Brightness before acquisition: scalp, skull, fluid, cortex, white matter, deep grey matter, ventricles."""
    white = rng.uniform(0.72, 0.82)
    grey = white - rng.uniform(0.22, 0.30) * site.contrast
    fluid = rng.uniform(0.12, 0.2)
    head = np.sqrt((x / 76) ** 2 + (y / 90) ** 2 + ((z - 4) / 84) ** 2)
    image = np.full(x.shape, 0.02)
    image = _mix(image, rng.uniform(0.75, 0.95), _soft((1.0 - head) * 80))
    image = _mix(image, 0.1, _soft((0.93 - head) * 80))
    image = _mix(image, fluid, _soft((0.875 - head) * 80))
    shrink = 1.0 + rng.normal(0.8, 0.5) + 3.0 * ageing  # mm of fluid between skull and brain
    folds = _folds(rng, x, y, z) * (3.0 + 1.8 * ageing)
    cleft = 5.0 * np.exp(-((x / (1.6 + 1.0 * ageing)) ** 2)) * (z > -10)
    depth = (0.865 - head) * 80 - shrink - np.clip(folds, 0, None) - cleft
    thickness = 8.5 - 2.5 * ageing + rng.normal(0, 0.3)
    image = _mix(image, grey, _soft(depth))
    image = _mix(image, white * (1 - 0.05 * ageing), _soft(depth - thickness + 0.5 * folds))
    for side in (-1, 1):
        nucleus = np.sqrt(((x - side * 22) / 10) ** 2 + ((y - 6) / 17) ** 2 + ((z - 2) / 12) ** 2)
        image = _mix(image, grey * 1.08, _soft((1 - nucleus) * 11))
        image = _mix(image, fluid, _soft(_ventricle(rng, side * x, y, z, ageing)))
    cerebellum = np.sqrt((x / 42) ** 2 + ((y + 48) / 26) ** 2 + ((z + 46) / 20) ** 2)
    stripes = 0.5 + 0.5 * np.sin(z * 0.9 + 0.2 * y)
    return _mix(image, grey + (white - grey) * 0.4 * stripes, _soft((1 - cerebellum) * 22) * _soft(depth))


def _ventricle(rng: np.random.Generator, x: Array, y: Array, z: Array, ageing: float) -> Array:
    """Distance in mm (positive inside) to one lateral ventricle: an arched tube that widens with age."""
    width = 4.2 + 6.2 * ageing + rng.normal(0, 0.6)
    arch = 16 - 0.012 * (y + 4) ** 2
    bend = 8 + 0.0045 * (y + 4) ** 2
    length = np.clip(np.abs(y + 4) - (28 + 6 * ageing), 0, None)
    return width - np.sqrt(((x - bend) / 0.85) ** 2 + ((z - arch) / 1.3) ** 2 + length**2)


def _folds(rng: np.random.Generator, x: Array, y: Array, z: Array) -> Array:
    """A smooth random pattern of about unit variance: where the sulci cut into the cortex."""
    total = np.zeros_like(x)
    for _ in range(5):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / (rng.uniform(18, 34) * np.linalg.norm(direction))
        total += np.sin(direction[0] * x + direction[1] * y + direction[2] * z + rng.uniform(0, 2 * np.pi))
    return total * np.sqrt(2 / 5)


def _acquire(rng: np.random.Generator, site: Site, image: Array) -> Array:
    """Blur, coil, contrast, Rician noise and the scanner's arbitrary units, as int16."""
    image = ndimage.gaussian_filter(image, site.blur, mode="nearest")
    axes = [np.linspace(-1, 1, n).reshape([-1 if k == d else 1 for d in range(3)]) for k, n in enumerate(image.shape)]
    slope, bend = rng.normal(0, 0.6, size=3), rng.normal(0, 0.4, size=3)
    coil = sum((s * a + b * a**2 for s, b, a in zip(slope, bend, axes)), np.zeros(image.shape))
    image = np.clip(image, 0, None) ** (site.gamma * np.exp(rng.normal(0, 0.05))) * np.exp(site.coil * coil)
    noise = rng.normal(0, site.noise, size=(2, *image.shape))
    image = np.hypot(image + noise[0], noise[1])
    return np.clip(np.rint(image * site.scale * np.exp(rng.normal(0, 0.15))), 0, 32_000).astype(np.int16)


def _soft(distance: Array) -> Array:
    """1 well inside (distance in mm positive), 0 outside, a ramp of about a voxel between: partial volume."""
    return np.clip(0.5 + distance / 4.0, 0, 1)


def _mix(image: Array, value: Array | float, weight: Array) -> Array:
    return image + (value - image) * weight
