"""The deformations of Models Genesis: local shuffling, a non-linear change of intensities, in- and out-painting.

Zhou et al. 2021, "Models Genesis" (Medical Image Analysis 67; arXiv:2004.07882), section 2. In two halves, as
``transforms.augment``: ``draw`` the parameters of N items, ``deform`` them. A CPU works through items in groups that
stay in its cache, an accelerator through the batch in groups that stay in its memory; noise and the order of shuffled
voxels come from the device's own generator, item by item, so that neighbours in a batch do not matter.

Where the authors' ranges of whole numbers are empty (sides below about 14 voxels), or would do nothing, ours go on:
windows have sides of at least 2 voxels, boxes of at least 1, and the margin of 3 voxels around boxes gives way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from medssl.core.errors import ShapeError
from medssl.core.schema import StrictModel
from medssl.core.seeding import DEFORMATION, derive_seed, numpy_rng
from medssl.core.transfer import onto
from medssl.transforms.intensity import on_active

Probability = Annotated[float, Field(ge=0, le=1)]

_BOXES: Final = 5
_ANOTHER: Final = 0.95
_MARGIN: Final = 3
_GATES: Final = 4
_WINDOWS: Final = {2: 500, 3: 10_000}
# Steps of the curve's parameter. The authors take 100 000; straight lines between 1000 are within 1e-6 of the curve.
_KNOTS: Final = 1001
# Voxels that are deformed at once: a CPU's cache, and about a GiB of an accelerator's memory.
_GROUP: Final = {"cpu": 2**16}
_ACCELERATOR_GROUP: Final = 2**22


class DeformationConfig(StrictModel):
    """How often an item is deformed in which way; defaults are the paper's (its published settings)."""

    shuffle_probability: Probability = 0.5
    """Share of items whose voxels are shuffled within small windows."""
    shuffle_windows: PositiveInt | None = None
    """Windows per item; null: 10 000 for volumes (the authors), 500 for slices, which covers them about as often."""
    nonlinear_probability: Probability = 0.9
    """Share of items whose intensities go through a random curve, rising or falling."""
    paint_probability: Probability = 0.9
    """Share of items of which boxes are painted over with noise (in-painting) or spared from it (out-painting)."""
    inpaint_share: Probability = 0.2
    """Share of in-painting among these; the rest is out-painting."""


@dataclass(frozen=True)
class Deformations:
    """What was drawn for N items. CPU tensors.

    Attributes:
        spatial: Voxels per axis of the images.
        windows: (N, W, 2, d) int64, first voxel and number of voxels per axis, in the order in which they are written;
            of 0 voxels where an item is not shuffled.
        curved: (N,) bool: intensities change.
        curve: (N, 2, knots) float64: intensities, rising, and what becomes of them.
        painted: (N,) bool: noise covers a part.
        inside: (N,) bool: noise covers the boxes (in-painting), otherwise what lies outside them all.
        boxes: (N, 5, 2, d) int64, first voxel and number of voxels per axis; 0 voxels for none.
        seeds: (N, 2) int64, of the order of shuffled voxels and of the noise.
    """

    spatial: tuple[int, ...]
    windows: Tensor
    curved: Tensor
    curve: Tensor
    painted: Tensor
    inside: Tensor
    boxes: Tensor
    seeds: Tensor


def draw(
    config: DeformationConfig, spatial: Sequence[int], *, seed: int, step: int, slots: Sequence[int]
) -> Deformations:
    """Draw the deformations of N items, each from its own generator: switching one off leaves the others as they were.

    Args:
        config: How often what happens.
        spatial: Voxels per axis, 2 or 3 axes.
        seed: The run's seed.
        step: The training step.
        slots: (N,) place of each item in the global batch.

    Raises:
        ShapeError: Not 2 or 3 axes.
    """
    spatial = tuple(int(length) for length in spatial)
    if len(spatial) not in _WINDOWS:
        raise ShapeError("deformations are for images with 2 or 3 spatial axes", found=f"spatial shape {spatial}")
    sides = np.asarray(spatial)
    n_windows = config.shuffle_windows or _WINDOWS[len(spatial)]
    windows = np.zeros((len(slots), n_windows, 2, len(spatial)), dtype=np.int64)
    boxes = np.zeros((len(slots), _BOXES, 2, len(spatial)), dtype=np.int64)
    gates, points = np.empty((len(slots), _GATES)), np.empty((len(slots), 5))
    for item, slot in enumerate(slots):
        rng = numpy_rng(seed, DEFORMATION, step, slot)
        rng.random(out=gates[item])
        rng.random(out=points[item])
        uniform = rng.random((_BOXES, 3, len(spatial)))  # as many for in- as for out-painting
        boxes[item] = _boxes(uniform, sides, inside=bool(gates[item, 3] < config.inpaint_share))
        if gates[item, 0] < config.shuffle_probability:
            windows[item] = _windows(rng.random((n_windows, 2, len(spatial))), sides)
    seeds = [[derive_seed(seed, DEFORMATION, step, slot, what) for what in (0, 1)] for slot in slots]
    return Deformations(
        spatial,
        windows=torch.from_numpy(windows),
        curved=torch.from_numpy(gates[:, 1] < config.nonlinear_probability),
        curve=torch.from_numpy(_curve(points)),
        painted=torch.from_numpy(gates[:, 2] < config.paint_probability),
        inside=torch.from_numpy(gates[:, 3] < config.inpaint_share),
        boxes=torch.from_numpy(boxes),
        seeds=torch.tensor(seeds, dtype=torch.int64).reshape(-1, 2),
    )


def deform(images: Tensor, drawn: Deformations) -> Tensor:
    """The deformed images; ``images``, which are to be restored, stay as they are.

    Args:
        images: (N, C, *spatial) in [0, 1], on any device. Channels share windows, curve and boxes.
        drawn: What ``draw`` drew for these N items.

    Returns:
        A new tensor of the same shape, type and device.

    Raises:
        ShapeError: The deformations were drawn for other images.
    """
    if tuple(images.shape[2:]) != drawn.spatial or len(images) != len(drawn.curved):
        raise ShapeError(
            "deformations were drawn for other images",
            found=f"images {tuple(images.shape)}, deformations of {len(drawn.curved)} items of {drawn.spatial}",
        )
    deformed = images.detach().clone(memory_format=torch.contiguous_format)
    size = max(1, _GROUP.get(images.device.type, _ACCELERATOR_GROUP) // math.prod(drawn.spatial))
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        for rows in torch.arange(len(images)).split(size):
            group = slice(int(rows[0]), int(rows[-1]) + 1)
            _deform_group(deformed[group], drawn, group)
    return deformed


def _deform_group(images: Tensor, drawn: Deformations, group: slice) -> None:
    """In the authors' order, in place."""
    windows, curve, boxes, inside = drawn.windows[group], drawn.curve[group], drawn.boxes[group], drawn.inside[group]
    order, noise = drawn.seeds[group].T.tolist()
    shuffled = (windows[:, 0, 1] > 0).all(dim=1)
    on_active(images, shuffled, lambda x, i: shuffle_windows(x, windows[i], [order[k] for k in i.tolist()]))
    on_active(images, drawn.curved[group], lambda x, i: follow_curve(x, curve[i]))
    on_active(images, drawn.painted[group], lambda x, i: paint(x, boxes[i], inside[i], [noise[k] for k in i.tolist()]))


def shuffle_windows(images: Tensor, windows: Tensor, seeds: Sequence[int]) -> None:
    """Shuffle the voxels of every window, in place; each reads the untouched image, and the last one written stays.

    Args:
        images: (n, C, *spatial).
        windows: (n, W, 2, d) on the CPU.
        seeds: n, one stream per item.
    """
    n, device, spatial = len(images), images.device, images.shape[2:]
    voxels, per_item = spatial.numel(), windows.shape[1]
    first, length = (windows[:, :, k].reshape(n * per_item, -1) for k in (0, 1))
    counts = length.prod(dim=1)
    totals = counts.view(n, per_item).sum(dim=1).tolist()
    keys = torch.cat([_uniform((total,), torch.float64, device, seed) for total, seed in zip(totals, seeds)])
    first, length, counts = (onto(values, device) for values in (first, length, counts))
    # One entry per window and voxel in it, window after window.
    window = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=len(keys))
    rest = torch.arange(len(keys), device=device) - (counts.cumsum(0) - counts)[window]
    place, stride = window.div(per_item, rounding_mode="floor") * voxels, 1
    for axis in reversed(range(len(spatial))):
        along = length[:, axis][window]
        place += (first[:, axis][window] + rest % along) * stride
        rest, stride = rest.div(along, rounding_mode="floor"), stride * spatial[axis]
    moved = place[(window + keys).argsort()]  # random keys keep entries within their window
    last = torch.full((n * voxels,), -1, device=device)
    last.scatter_reduce_(0, place, torch.arange(len(keys), device=device), "amax")
    itself = torch.arange(n * voxels, device=device)
    source = torch.where(last >= 0, moved[last.clamp(min=0)], itself).view(n, 1, voxels) % voxels
    images.copy_(images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images))


def follow_curve(images: Tensor, curve: Tensor) -> None:
    """Replace intensities by their value on a curve, in place, straight lines between its knots.

    Args:
        images: (n, C, *spatial) in [0, 1].
        curve: (n, 2, knots): intensities, rising from 0 to 1, and their values.
    """
    x, y = (onto(curve[:, k].to(images.dtype).contiguous(), images.device) for k in (0, 1))
    values = images.flatten(1)
    above = torch.searchsorted(x, values).clamp_(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (knots.gather(1, above - k) for knots in (x, y) for k in (1, 0))
    share = ((values - x0) / (x1 - x0).clamp_(min=torch.finfo(values.dtype).tiny)).clamp_(0, 1)
    images.copy_((y0 + share * (y1 - y0)).view_as(images))


def paint(images: Tensor, boxes: Tensor, inside: Tensor, seeds: Sequence[int]) -> None:
    """Put noise, uniform in [0, 1], into the boxes or around them, in place.

    Args:
        images: (n, C, *spatial).
        boxes: (n, boxes, 2, d) on the CPU.
        inside: (n,) on the CPU: into them.
        seeds: n, one stream per item.
    """
    device, spatial = images.device, images.shape[2:]
    first, end = onto(boxes[:, :, 0], device), onto(boxes.sum(dim=2), device)  # (n, boxes, d)
    covered = torch.zeros((len(images), *spatial), dtype=torch.bool, device=device)
    for box in range(boxes.shape[1]):
        within = torch.ones((), dtype=torch.bool, device=device)
        for axis, length in enumerate(spatial):
            line = torch.arange(length, device=device)
            on = (line >= first[:, box, axis, None]) & (line < end[:, box, axis, None])
            within = within & on.view(len(images), *(1,) * axis, length, *(1,) * (len(spatial) - axis - 1))
        covered |= within
    noisy = covered == onto(inside, device).view(-1, *(1,) * len(spatial))
    noise = torch.stack([_uniform(images.shape[1:], images.dtype, device, seed) for seed in seeds])
    images.copy_(torch.where(noisy[:, None], noise, images))


def _uniform(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)


def _between(uniform: npt.NDArray[np.float64], low: npt.ArrayLike, high: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Whole numbers from ``low`` to ``high``, both included."""
    numbers = np.asarray(high) - np.asarray(low) + 1
    return np.asarray(low) + np.floor(uniform * numbers).astype(np.int64)


def _windows(uniform: npt.NDArray[np.float64], sides: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(W, 2, d): sides up to a tenth of the axis, anywhere."""
    longest = np.minimum(np.maximum(sides // 10, 2), sides)
    length = _between(uniform[:, 0], 1, longest)
    return np.stack([_between(uniform[:, 1], 0, sides - length), length], axis=1)


def _boxes(uniform: npt.NDArray[np.float64], sides: npt.NDArray[np.int64], *, inside: bool) -> npt.NDArray[np.int64]:
    """(5, 2, d): a first box (in-painting: with probability 0.95), and another with 0.95, and so on, up to five."""
    if inside:
        length = _between(uniform[:, 0], np.maximum(sides // 6, 1), np.maximum(sides // 3, 1))
    else:
        length = sides - _between(uniform[:, 0], 3 * sides // 7, 4 * sides // 7)
    margin = np.minimum(_MARGIN, (sides - length) // 2)
    first = _between(uniform[:, 1], margin, sides - length - margin)
    another = uniform[:, 2, 0] < _ANOTHER
    another[0] |= not inside
    length[~np.logical_and.accumulate(another)] = 0
    return np.stack([first, length], axis=1)


def _curve(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, 2, knots) of cubic Bezier curves through (0, 0) and (1, 1) with two random points between.

    Points in the unit square make both coordinates rise with the parameter t. Where the authors sort only the first
    one, values run backwards: x(t) becomes y(1 - t), an inverted image.

    Args:
        points: (N, 5) uniform: both points' x, both points' y, and whether the curve falls.
    """
    t = np.linspace(0, 1, _KNOTS)
    basis = np.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])
    x, y = (np.maximum.accumulate(points[:, k : k + 2] @ basis + t**3, axis=1) for k in (0, 2))
    falls = points[:, 4] < 0.5
    y[falls] = y[falls, ::-1]
    return np.stack([x, y], axis=1)
