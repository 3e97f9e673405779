"""Operations that change intensities and leave voxels where they are.

Each works in place on (n, C, *spatial) float32 with one parameter per item: with n = 1 on the CPU, where small
temporaries stay in the cache, with the whole batch on an accelerator. Neutral items are left exactly as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from medssl.core.transfer import onto
from medssl.transforms.augment_params import exponents
from medssl.transforms.resampling import along_axis, product


def on_active(images: Tensor, active: Tensor, change: Callable[[Tensor, Tensor], None]) -> None:
    """Call ``change(rows of images, their numbers)`` for the items where ``active`` (CPU, bool) is true."""
    rows = active.nonzero()[:, 0]
    if len(rows) == 0:
        return
    if len(rows) == len(images):
        change(images, rows)
        return
    index = onto(rows, images.device)
    part = images[index]
    change(part, rows)
    images[index] = part


def per_item(values: Tensor, images: Tensor) -> Tensor:
    """(n,) values shaped to broadcast against images on their device."""
    return onto(values.to(images.dtype), images.device).reshape(-1, *(1,) * (images.dim() - 1))


def blur(images: Tensor, sigma: Tensor, skip_axis: int | None = None) -> None:
    """Gaussian blur of the spatial axes by one small matrix each, border voxels repeated.

    Args:
        images: (n, C, *spatial), changed in place.
        sigma: (n,) in voxels, above 0, CPU.
        skip_axis: Spatial axis that is not blurred.
    """
    for axis, length in enumerate(images.shape[2:]):
        if axis == skip_axis or length == 1:
            continue
        if len(images) == 1:
            images.copy_(along_axis(images, gaussian_matrix(sigma, length)[0], axis + 2))
        else:
            images.copy_(product(images, onto(gaussian_matrix(sigma, length), images.device), axis + 2))


def reach(sigma: float) -> int:
    """Voxels to each side that a Gaussian kernel takes in: 3 sigma, at least one."""
    return max(1, math.ceil(3 * sigma))


def gaussian_matrix(sigma: Tensor, length: int) -> Tensor:
    """(n, length, length) float32 matrices of a Gaussian blur along an axis; every row sums to one."""
    position = torch.arange(length, dtype=torch.float64)
    far = max(reach(float(value)) for value in sigma)
    offsets = torch.arange(-far, far + 1, dtype=torch.float64)
    widths = sigma.double()[:, None]
    kernel = torch.exp(-0.5 * (offsets / widths) ** 2)
    kernel[offsets.abs() > torch.ceil(3 * widths).clamp(min=1)] = 0
    kernel /= kernel.sum(dim=1, keepdim=True)
    matrix = torch.zeros(len(sigma), length, length, dtype=torch.float64)
    column = (position[:, None] + offsets).clamp(0, length - 1).long()
    matrix.scatter_add_(2, column.expand(len(sigma), -1, -1), kernel[:, None, :].expand(-1, length, -1))
    return matrix.float()


def bias_field(images: Tensor, coefficients: Tensor, degree: int) -> None:
    """Multiply by exp of a polynomial; the polynomial is built up axis by axis, by small matrix products.

    Args:
        images: (n, C, *spatial), changed in place.
        coefficients: (n, terms), of ``exponents(spatial_dims, degree)``; coordinates are voxel centres in [-1, 1].
        degree: Total degree.
    """
    spatial = images.shape[2:]
    dims = len(spatial)
    table = torch.zeros(*(degree + 1,) * dims, len(images))
    for term, powers in enumerate(exponents(dims, degree)):
        table[powers] = coefficients[:, term]
    field = onto(table.movedim(-1, 0), images.device)
    for axis, length in enumerate(spatial):
        centres = (2 * torch.arange(length, device=images.device, dtype=torch.float32) + 1) / length - 1
        field = product(field, centres[:, None] ** torch.arange(degree + 1, device=images.device), axis + 1)
    images.mul_(field.exp_()[:, None])


def gamma(images: Tensor, exponent: Tensor) -> None:
    """sign(x) |x| ** exponent, as exp(exponent log |x|): faster than a power; 0 stays 0."""
    sign = images.sign()
    images.abs_().log_().mul_(per_item(exponent, images)).exp_().mul_(sign)


def brightness_contrast(
    images: Tensor, amount: Tensor | None, factor: Tensor | None, centre: Literal["mean"] | float
) -> None:
    """(x + amount - m) * factor + m, m the mean of each channel of x + amount or a number, in one pass."""
    if factor is None:
        if amount is not None:
            images.add_(per_item(amount, images))
        return
    scale = per_item(factor, images)
    shift = scale.new_zeros(()) if amount is None else per_item(amount, images)
    middle = images.mean(dim=tuple(range(2, images.dim())), keepdim=True) + shift if centre == "mean" else centre
    images.mul_(scale).add_((shift - middle) * scale + middle)


def noise(images: Tensor, std: Tensor, seeds: Sequence[int]) -> None:
    """Add Gaussian noise, item by item from its own stream: neighbours in a batch do not matter."""
    generator = torch.Generator(device=images.device)
    for image, deviation, seed in zip(images, std.tolist(), seeds, strict=True):
        generator.manual_seed(seed)
        image.add_(torch.randn(image.shape, generator=generator, device=image.device), alpha=deviation)


def cutout(images: Tensor, boxes: Tensor, fill: float) -> None:
    """Fill the box of each item: (n, 2, d) first voxel and number of voxels per axis."""
    for image, (start, length) in zip(images, boxes.tolist(), strict=True):
        image[(slice(None), *(slice(a, a + n) for a, n in zip(start, length, strict=True)))] = fill
