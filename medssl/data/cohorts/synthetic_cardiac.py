"""Synthetic cardiac-like short-axis stacks: geometry, tissues and acquisition.

No threshold solves them, by construction: fat and a neighbouring vessel are as bright as the blood in the ventricles,
muscle of the chest and liver as dark as the myocardium, papillary muscles are dark inside the labelled cavity, and
brightness varies within an image (coil) and between sites. What a slice shows depends on its position: the basal slices
cut the atrium and the great vessels, the apical ones the liver and, last, no heart at all.

The numbers below were set by looking at pictures, before any network saw the result, and are not tuned to results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

LABEL_NAMES: Final = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
FIELD_OF_VIEW: Final = 170.0  # mm, in plane, at every site
Array = np.ndarray


@dataclass(frozen=True)
class Site:
    """How one site acquires: in-plane spacing relative to nominal, slice thickness, blur, contrast, coil and noise."""

    name: str
    zoom: float
    thickness: float
    blur: float
    gamma: float
    coil: float
    noise: float
    scale: float


SITES: Final = (
    Site("A", 1.00, 10.0, 0.55, 1.00, 0.35, 0.035, 300.0),
    Site("B", 1.08, 8.0, 0.80, 0.75, 0.55, 0.050, 900.0),
    Site("C", 0.94, 10.0, 0.65, 1.35, 0.75, 0.060, 150.0),
    Site("D", 1.04, 9.0, 0.95, 0.90, 0.50, 0.045, 1500.0),
)


@dataclass(frozen=True)
class Stack:
    """One volume: image int16 (X, Y, Z), labels uint8 (X, Y, Z), spacing in mm."""

    image: Array
    label: Array
    spacing: tuple[float, float, float]


def draw_stack(rng: np.random.Generator, site: Site, *, size: int, n_slices: int) -> Stack:
    """One subject's stack, slice 0 at the base.

    Args:
        rng: All randomness comes from here.
        site: The acquisition.
        size: Pixels along both in-plane axes.
        n_slices: Slices from above the valves to below the apex.
    """
    pixel = FIELD_OF_VIEW / size * site.zoom
    # z runs from 0 (valve plane) to 1 (apex); stacks begin above the one and end below the other.
    z = np.linspace(-rng.uniform(0.06, 0.16), 1 + rng.uniform(0.02, 0.14), n_slices)
    x, y = _coordinates(rng, size, pixel, z)
    image, label = _anatomy(rng, x, y, z)
    image = _acquire(rng, site, image)
    return Stack(image, label, (pixel, pixel, site.thickness))


def _coordinates(rng: np.random.Generator, size: int, pixel: float, z: Array) -> tuple[Array, Array]:
    """Anatomical coordinates in mm of every voxel, (X, Y, Z): pose, breath-hold shifts and a smooth warp."""
    axis = (np.arange(size) - (size - 1) / 2) * pixel
    x0, y0 = axis[:, None, None], axis[None, :, None]
    angle = rng.normal(0, np.deg2rad(10))
    scale = np.exp(rng.normal(0, 0.07))
    shift = rng.normal(0, 7, size=(2, 1)) + rng.normal(0, 1.3, size=(2, len(z)))
    x = (np.cos(angle) * x0 + np.sin(angle) * y0) / scale - shift[0]
    y = (-np.sin(angle) * x0 + np.cos(angle) * y0) / scale - shift[1]
    warp = [np.zeros_like(x), np.zeros_like(x)]
    for wave in (2 * np.pi / 110, 2 * np.pi / 60, 2 * np.pi / 38):
        for part in warp:
            direction, phase, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.normal(0, 1.2)
            along = np.cos(direction) * x0 + np.sin(direction) * y0
            part += 0.055 / wave * np.sin(wave * along + phase + slope * z)
    return x + warp[0], y + warp[1]


def _anatomy(rng: np.random.Generator, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Tissue brightness before acquisition, (X, Y, Z), and the label map."""
    tissue = _tissues(rng)
    image = _chest(rng, x, y, z, tissue)
    label = np.zeros(image.shape, np.uint8)
    depth = np.clip(z, 0, 1)
    drift = rng.normal(0, 4, size=2)
    dx, dy = x - drift[0] * z, y - drift[1] * z
    r, theta = np.hypot(dx, dy), np.arctan2(dy, dx)
    taper = np.sqrt(np.clip(1 - (0.97 * depth) ** rng.uniform(2.0, 2.8), 0, 1))
    wobble = _wobble(rng, theta, 0.045)
    cavity = rng.uniform(18, 27) * taper * wobble
    wall = (
        rng.uniform(7.5, 13)
        * (1 - 0.35 * depth**2)
        * (1 + rng.uniform(0.0, 0.25) * np.cos(theta - rng.uniform(-np.pi, np.pi)))
    )
    outer = cavity + wall * _wobble(rng, theta, 0.05)
    in_heart = (z >= 0) & (z <= 1)
    right, right_edge = _right_ventricle(rng, dx, dy, z, outer, rng.uniform(18, 25) * np.ones_like(z))
    # Around the heart: a bright rim of fat that comes and goes, then the thin right wall.
    fat = np.clip(1 - np.abs(np.minimum(r - outer - 4, right_edge - 5)) / 3.5, 0, 1) * _patches(rng, theta, z)
    image = _mix(image, tissue["fat"], fat * (z < 0.97))
    _basal(rng, image, dx, dy, z, tissue)
    heart_z = in_heart * 1.0
    image = _mix(image, tissue["muscle"], _soft(2.6 - right_edge) * heart_z * (z < 0.9))
    image = _mix(image, tissue["blood"] * rng.uniform(0.82, 1.0), _soft(-right_edge) * heart_z * right.any((0, 1)))
    image = _mix(image, tissue["muscle"] * 1.15, _trabeculae(rng, x, y, z) * _soft(-right_edge - 1) * heart_z)
    image = _mix(image, tissue["muscle"] * (1 + 0.12 * np.cos(theta - rng.uniform(-3, 3))), _soft(outer - r) * heart_z)
    image = _mix(image, tissue["blood"] * _flow(rng, dx, dy), _soft(cavity - r) * heart_z)
    image = _mix(image, tissue["muscle"] * 1.1, _papillary(rng, dx, dy, z, cavity) * _soft(cavity - r) * heart_z)
    label[right & in_heart] = 1
    label[(r <= outer) & in_heart] = 2
    label[(r <= cavity) & in_heart & (taper > 0.25)] = 3
    return image, label


def _tissues(rng: np.random.Generator) -> dict[str, float]:
    """Brightness of each tissue for one subject; fat overlaps blood, liver and chest wall overlap myocardium."""
    muscle = rng.uniform(0.24, 0.36)
    return {
        "blood": muscle + rng.uniform(0.28, 0.46),
        "muscle": muscle,
        "fat": rng.uniform(0.6, 0.95),
        "liver": muscle * rng.uniform(0.85, 1.4),
        "spleen": muscle * rng.uniform(0.9, 1.6),
        "wall": muscle * rng.uniform(0.85, 1.2),
        "lung": rng.uniform(0.03, 0.09),
        "air": 0.01,
    }


def _chest(rng: np.random.Generator, x: Array, y: Array, z: Array, tissue: dict[str, float]) -> Array:
    """Everything that is not the heart: body outline, chest wall, lungs with vessels, liver, stomach, spleen, aorta."""
    shape = np.broadcast_shapes(x.shape, y.shape)
    image = np.full(shape, tissue["air"])
    theta = np.arctan2(y, x)
    body = _ellipse(x, y + 8, 92, 72) * _wobble(rng, theta, 0.02)
    image = _mix(image, tissue["fat"], _soft((1.0 - body) * 70))
    image = _mix(image, tissue["wall"], _soft((rng.uniform(0.86, 0.93) - body) * 70))
    chest = _soft((rng.uniform(0.74, 0.8) - body) * 70)
    vessels = np.clip(_texture(rng, x, y, z, 13) - 1.15, 0, 1) * 0.5
    image = _mix(image, tissue["lung"] + vessels, chest)
    # The mediastinum: fat and soft tissue on which the heart lies.
    image = _mix(
        image,
        tissue["fat"] * 0.75 * (1 + 0.1 * _texture(rng, x, y, z, 25)),
        _soft((1 - _ellipse(x + 22, y + 34, 26, 24)) * 20),
    )
    dome = -44 + 46 * np.clip(z - rng.uniform(0.25, 0.5), 0, 1)
    liver_distance = dome - (y + 0.35 * (x + 10)) - 6 * _texture(rng, x, y, z, 60) * 0.3
    image = _mix(image, tissue["liver"] * (1 + 0.08 * _texture(rng, x, y, z, 15)), _soft(liver_distance) * chest)
    stomach = _ellipse(x - rng.uniform(40, 52), y + rng.uniform(30, 42), 17, 13)
    image = _mix(image, tissue["spleen"], _soft((1 - stomach) * 14) * chest * (z > rng.uniform(0.3, 0.6)))
    image = _mix(image, tissue["air"], _soft((0.55 - stomach) * 14) * chest * (z > rng.uniform(0.5, 0.8)))
    aorta = np.hypot(x - rng.uniform(22, 34), y + rng.uniform(44, 52)) - rng.uniform(8, 11)
    image = _mix(image, tissue["muscle"], _soft(1.8 - aorta))
    return _mix(image, tissue["blood"] * rng.uniform(0.9, 1.1), _soft(-aorta))


def _right_ventricle(
    rng: np.random.Generator, dx: Array, dy: Array, z: Array, outer: Array, reach: Array
) -> tuple[Array, Array]:
    """The crescent that wraps the left ventricle: (mask, signed distance in mm, negative inside)."""
    angle = np.pi + rng.normal(0.15, 0.2)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, -np.sin(angle) * dx + np.cos(angle) * dy
    end = rng.uniform(0.78, 0.97)
    size = np.sqrt(np.clip(1 - (np.clip(z, 0, None) / end) ** 1.8, 0, 1))
    base = 1 + 0.35 * np.clip(0.35 - z, 0, 1)
    across, along = rng.uniform(1.25, 1.6) * reach * size * base, rng.uniform(1.45, 1.85) * reach * size
    centre = rng.uniform(0.75, 1.05) * reach * (0.55 + 0.45 * size)
    radius = np.hypot((u - centre) / np.maximum(across, 1e-3), (v + 4 * (1 - size)) / np.maximum(along, 1e-3))
    radius = radius / _wobble(rng, np.arctan2(v, u - centre), 0.06)
    distance = np.maximum((radius - 1) * np.maximum(np.minimum(across, along), 0.1), outer - np.hypot(dx, dy))
    distance = np.where(size > 0.2, distance, 99.0)
    # Slivers that reach around the left ventricle are no ventricle: only the largest piece stays.
    pieces, n = ndimage.label(distance <= 0)
    if n > 1:
        largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
        distance = np.where((pieces > 0) & (pieces != largest), 1.0, distance)
    return distance <= 0, distance


def _basal(rng: np.random.Generator, image: Array, dx: Array, dy: Array, z: Array, tissue: dict[str, float]) -> None:
    """Above the valves (z < 0) the left atrium and the outflow tracts replace the ventricles; none is labelled."""
    above = z < 0.0
    near = z < rng.uniform(0.05, 0.2)
    atrium = 1 - _ellipse(dx - rng.uniform(-2, 8), dy + rng.uniform(26, 36), 25, 15)
    for shape, where, bright in (
        (atrium * 17, near, 0.95),
        ((1 - _ellipse(dx, dy, 21, 19)) * 18, above, 0.98),
        ((1 - _ellipse(dx + rng.uniform(26, 34), dy - rng.uniform(8, 20), 17, 21)) * 17, above, 0.92),
    ):
        image[...] = _mix(image, tissue["muscle"] * 1.1, _soft(shape + 2) * where)
        image[...] = _mix(image, tissue["blood"] * bright, _soft(shape) * where)


def _papillary(rng: np.random.Generator, dx: Array, dy: Array, z: Array, cavity: Array) -> Array:
    """Two dark muscles inside the cavity, in the middle third; they belong to the cavity in the label map."""
    total = np.zeros(cavity.shape)
    for centre in (rng.normal(-0.9, 0.25), rng.normal(1.4, 0.25)):
        radius, start, end = rng.uniform(2.6, 4.6), rng.uniform(0.18, 0.35), rng.uniform(0.6, 0.8)
        mean = np.mean(cavity, axis=(0, 1))
        px, py = 0.66 * mean * np.cos(centre), 0.66 * mean * np.sin(centre)
        total = np.maximum(total, _soft(radius - np.hypot(dx - px, dy - py)) * ((z > start) & (z < end)))
    return total


def _trabeculae(rng: np.random.Generator, x: Array, y: Array, z: Array) -> Array:
    return np.clip(_texture(rng, x, y, z, 11) - 0.9, 0, 1) * 0.8


def _flow(rng: np.random.Generator, dx: Array, dy: Array) -> Array:
    """Blood is darker where it flows: a broad dip at a random place."""
    dip = rng.uniform(0.0, 0.28)
    px, py, width = rng.normal(0, 9), rng.normal(0, 9), rng.uniform(7, 12)
    return 1 - dip * np.exp(-((dx - px) ** 2 + (dy - py) ** 2) / (2 * width**2))


def _acquire(rng: np.random.Generator, site: Site, image: Array) -> Array:
    """Partial volume, coil sensitivity, contrast, Rician noise and the scanner's arbitrary units, as int16."""
    image = ndimage.gaussian_filter(image, (site.blur, site.blur, 0.25), mode="nearest")
    axes = [np.linspace(-1, 1, n).reshape([-1 if k == d else 1 for d in range(3)]) for k, n in enumerate(image.shape)]
    slope = rng.normal(0, 0.6, size=3) * (1, 1, 0.3)
    bend = rng.normal(0, 0.35, size=3)
    coil = slope[0] * axes[0] + slope[1] * axes[1] + slope[2] * axes[2]
    coil = coil + bend[0] * axes[0] * axes[1] + bend[1] * axes[0] ** 2 + bend[2] * axes[1] ** 2
    image = np.clip(image, 0, None) ** (site.gamma * np.exp(rng.normal(0, 0.06))) * np.exp(site.coil * coil)
    noise = rng.normal(0, site.noise, size=(2, *image.shape))
    image = np.hypot(image + noise[0], noise[1])
    return np.clip(np.rint(image * site.scale * np.exp(rng.normal(0, 0.15))), 0, 32_000).astype(np.int16)


def _wobble(rng: np.random.Generator, theta: Array, amount: float) -> Array:
    """A closed outline's radius around 1: a few low harmonics of the angle."""
    total = np.ones_like(theta)
    for order in (2, 3, 4):
        total += rng.normal(0, amount / np.sqrt(order - 1)) * np.cos(order * theta - rng.uniform(0, 2 * np.pi))
    return total


def _patches(rng: np.random.Generator, theta: Array, z: Array) -> Array:
    """Where along the outline the fat is thick, 0 to 1."""
    wave = np.cos(theta - rng.uniform(0, 6.3) + rng.normal(0, 1) * z) + 0.6 * np.cos(2 * theta - rng.uniform(0, 6.3))
    return np.clip(0.45 + 0.5 * wave, 0, 1)


def _texture(rng: np.random.Generator, x: Array, y: Array, z: Array, length: float) -> Array:
    """A smooth random pattern of about unit variance with the given wavelength in mm."""
    total = 0.0
    for _ in range(5):
        direction, phase = rng.uniform(0, 2 * np.pi, size=2)
        wave = 2 * np.pi / (length * rng.uniform(0.7, 1.4))
        total = total + np.sin(wave * (np.cos(direction) * x + np.sin(direction) * y) + phase + rng.normal(0, 3) * z)
    return np.asarray(total) * np.sqrt(2 / 5)


def _ellipse(x: Array, y: Array, a: float, b: float) -> Array:
    return np.hypot(x / a, y / b)


def _soft(distance: Array) -> Array:
    """1 well inside (distance in mm positive), 0 outside, a ramp of about a pixel between: partial volume."""
    return np.clip(0.5 + distance / 2.0, 0, 1)


def _mix(image: Array, value: Array | float, weight: Array) -> Array:
    return image + (value - image) * weight
