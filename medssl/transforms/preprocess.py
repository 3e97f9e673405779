"""Preparation that is the same every time, done once before the cache: intensities, orientation, spacing, size.

Order as published for the global and local contrastive recipes: bias field, intensities on the native grid, then
orientation, resampling and crop or pad. Image and label go through one geometry. A template mask is applied on the
native grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - the name its users know
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Orientation, ResizeWithPadOrCrop, Spacing
from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

from medssl.core.errors import DataError
from medssl.core.schema import StrictModel

AXES = (("L", "R"), ("P", "A"), ("I", "S"))
Percent = Annotated[float, Field(ge=0, le=100)]


class PrepareConfig(StrictModel):
    """What is done to every volume before it is cached."""

    n4: bool = False
    """Correct the bias field with N4 (threshold 1e-3, 4 levels of 50 iterations); slow, once per volume."""
    n4_shrink: PositiveInt = 4
    """Estimate the field on every nth voxel of an axis, but on 16 at least; 1 takes minutes for one head."""
    orientation: Literal["RAS"] = "RAS"
    spacing: tuple[PositiveFloat | None, PositiveFloat | None, PositiveFloat | None] | None = None
    """Millimetres along X, Y, Z after reorientation; null keeps an axis as it is."""
    size: tuple[PositiveInt | None, PositiveInt | None, PositiveInt | None] | None = None
    """Voxels along X, Y, Z, cropped or padded about the centre; null keeps an axis as it is."""
    intensity: Literal["percentile", "zscore", "none"] = "percentile"
    """percentile: (x - p_lower) / (p_upper - p_lower). zscore: mean 0, deviation 1 over non-zero voxels, zeros stay."""
    lower: Percent = 1.0
    upper: Percent = 99.0
    clip: bool = False
    """Cut percentile-scaled values at 0 and 1."""
    mask: Path | None = None
    """Image of a template on the grid of the files (.nii, .nii.gz, .npy): voxels outside are set to 0, before the
    bias field is corrected and after intensities are scaled."""
    mask_above: FiniteFloat = 0.05
    """Values of the mask image that count as inside are those above (OpenBHB's grey-matter template: 0.05)."""
    label_values: dict[int, int] = {}
    """Class number for each value of the label files (205: 1, 420: 2, ...); empty: values are class numbers."""

    @model_validator(mode="after")
    def _ordered(self) -> PrepareConfig:
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        wrong = [value for value in self.label_values.values() if not 0 <= value <= 255]
        if wrong:
            raise ValueError(f"label_values: class numbers must be 0 to 255, not {wrong}")
        return self


@dataclass(frozen=True)
class Prepared:
    """A volume ready for training: ``image`` (C, X, Y, Z) float32, ``label`` (X, Y, Z) uint8 or None, RAS axes.

    ``affine`` maps prepared voxel indices to the millimetres of the native file, so the way back needs nothing else.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8] | None
    affine: npt.NDArray[np.float64]


def preprocess(
    image: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    config: PrepareConfig,
    label: npt.NDArray[np.int16] | None = None,
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    where: str = "volume",
) -> Prepared:
    """Prepare one volume; the same input gives the same output.

    Args:
        image: (C, X, Y, Z), finite.
        affine: (4, 4), voxel to millimetres (RAS).
        config: What to do.
        label: (X, Y, Z) on the same grid, or None.
        mask: (X, Y, Z) on the same grid, as `medssl.data.masks` reads it; needed where ``config.mask`` names one.
        where: Name for messages.

    Raises:
        DataError: Shapes differ, the image is constant (inside the mask), or a label value has no class.
    """
    if (mask is None) != (config.mask is None):
        raise AssertionError("a mask goes with the setting that names it")
    if label is not None and label.shape != image.shape[1:]:
        raise DataError(
            "label map and image have different shapes",
            where=where,
            found=f"label map {label.shape}, image {image.shape[1:]}",
            fix="extract the files again, or leave the volume out",
        )
    classes = None if label is None else class_numbers(label, config.label_values, where=where)
    if mask is not None:
        image = np.where(mask, image, np.float32(0))
    if config.n4:
        image = np.stack([n4(channel, affine, shrink=config.n4_shrink, where=where) for channel in image])
    image = np.stack([scale_intensity(channel, config, where=where) for channel in image])
    if mask is not None:
        image = np.where(mask, image, np.float32(0))  # scaling moves 0 where the lower percentile is not 0
    moved, grid = to_grid(image, affine, config, nearest=False)
    if not np.isfinite(moved).all():
        raise DataError("voxels are not finite after preparation", where=where, fix="check the intensities of the file")
    if classes is None:
        return Prepared(moved, None, grid)
    moved_label, label_grid = to_grid(classes[None].astype(np.float32), affine, config, nearest=True)
    if moved_label.shape[1:] != moved.shape[1:] or not np.allclose(grid, label_grid):
        raise AssertionError("image and label left the same geometry with different grids")
    return Prepared(moved, moved_label[0].astype(np.uint8), grid)


def class_numbers(
    label: npt.NDArray[np.int16], label_values: dict[int, int], *, where: str = "volume"
) -> npt.NDArray[np.uint8]:
    """Class numbers (uint8) of a label map; background stays 0.

    Raises:
        DataError: A value that ``label_values`` does not list, or above 255 when nothing is listed.
    """
    present = np.unique(label)
    table = {0: 0, **label_values} if label_values else {int(value): int(value) for value in present}
    unknown = [int(value) for value in present if table.get(int(value), 256) > 255]
    if unknown:
        raise DataError(
            "label values without a class number",
            where=where,
            found=", ".join(str(value) for value in unknown[:10]),
            fix="name these values in manifest.meta.yaml (label_names), or give each its class number, 0 to 255, "
            "under data.prepare.label_values",
        )
    lookup = np.zeros(int(present.max()) + 1, dtype=np.uint8)
    for value in present:
        lookup[int(value)] = table[int(value)]
    return lookup[label]


def scale_intensity(
    channel: npt.NDArray[np.float32], config: PrepareConfig, *, where: str = "volume"
) -> npt.NDArray[np.float32]:
    """Normalise one channel (X, Y, Z); background becomes (or stays) 0, which is also what padding adds.

    Raises:
        DataError: A constant image, or one whose two percentiles are equal.
    """
    if channel.min() == channel.max():
        raise DataError(
            "the image is constant", where=where, found=f"every voxel is {channel.flat[0]:g}", fix="leave it out"
        )
    values = channel.astype(np.float64)
    if config.intensity == "none":
        return channel
    if config.intensity == "zscore":
        inside = values != 0
        deviation = values[inside].std()
        if deviation == 0:
            raise DataError("all non-zero voxels are equal", where=where, fix="use intensity: percentile or none")
        return np.where(inside, (values - values[inside].mean()) / deviation, 0.0).astype(np.float32)
    low, high = np.percentile(values, [config.lower, config.upper])
    if not high > low:
        raise DataError(
            "the two percentiles of the image are equal: almost every voxel has one value",
            where=where,
            found=f"percentiles {config.lower:g} and {config.upper:g} are both {low:g}",
            fix="crop the background away, raise `upper`, or use intensity: zscore",
        )
    scaled = (values - low) / (high - low)
    return (np.clip(scaled, 0, 1) if config.clip else scaled).astype(np.float32)


def to_grid(
    data: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], config: PrepareConfig, *, nearest: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Reorient to RAS, resample (linear, or nearest for labels), crop or pad with 0.

    Args:
        data: (C, X, Y, Z).
        affine: (4, 4) of ``data``.
        config: Gives spacing and size.
        nearest: For label maps.

    Returns:
        The array (C, X, Y, Z), C-ordered, and its affine.
    """
    tensor = MetaTensor(torch.from_numpy(np.ascontiguousarray(data)), affine=torch.from_numpy(affine.copy()))
    tensor = Orientation(axcodes=config.orientation, labels=AXES)(tensor)
    if config.spacing is not None and any(config.spacing):
        # MONAI keeps the voxel size of an axis whose target is not positive.
        target = [wanted or -1.0 for wanted in config.spacing]
        mode = "nearest" if nearest else "bilinear"
        tensor = Spacing(pixdim=target, mode=mode, padding_mode="border", dtype=np.float64)(tensor)
    if config.size is not None and any(config.size):
        wanted = [length or -1 for length in config.size]
        tensor = ResizeWithPadOrCrop(spatial_size=wanted, mode="constant", value=0)(tensor)
    array = np.ascontiguousarray(tensor.as_tensor().numpy(), dtype=np.float32)
    return array, np.asarray(tensor.affine, dtype=np.float64)


def prepared_shape(shape: Sequence[int], affine: npt.NDArray[np.float64], config: PrepareConfig) -> tuple[int, ...]:
    """About the shape that ``preprocess`` will give (one voxel more or less where it resamples)."""
    axes = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).argmax(axis=0)
    lengths, spacing = [0, 0, 0], np.linalg.norm(affine[:3, :3], axis=0)
    for native, axis in enumerate(axes):
        wanted = (config.spacing or (None,) * 3)[axis]
        scale = spacing[native] / wanted if wanted else 1.0
        lengths[axis] = (config.size or (None,) * 3)[axis] or round(shape[native] * scale) + 1
    return tuple(lengths)


def n4(
    channel: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], *, shrink: int = 4, where: str = "volume"
) -> npt.NDArray[np.float32]:
    """Correct the bias field of one channel (X, Y, Z) inside an Otsu mask.

    Tustison et al. 2010, "N4ITK: Improved N3 Bias Correction"; threshold 1e-3 and 4 levels of 50 iterations as in the
    contrastive recipes. The field is smooth: it is estimated on a shrunken image (by at most ``shrink``, leaving 16
    voxels per axis) and divided out at full size. One thread, so that the result does not depend on the machine.

    Raises:
        DataError: The filter fails (an image far too small, say).
    """
    picture = sitk.GetImageFromArray(channel.T)
    picture.SetSpacing([float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)])
    correct = sitk.N4BiasFieldCorrectionImageFilter()
    correct.SetConvergenceThreshold(1e-3)
    correct.SetMaximumNumberOfIterations([50] * 4)
    correct.SetNumberOfThreads(1)
    try:
        factors = [max(1, min(shrink, length // 16)) for length in channel.shape]
        mask = sitk.OtsuThreshold(picture, 0, 1, 200)
        correct.Execute(sitk.Shrink(picture, factors), sitk.Shrink(mask, factors))
        corrected = picture / sitk.Exp(correct.GetLogBiasFieldAsImage(picture))
    except RuntimeError as error:
        raise DataError(
            "the bias field could not be corrected",
            where=where,
            found=str(error).strip().splitlines()[-1],
            fix="set n4: false, or leave the volume out",
        ) from error
    return np.ascontiguousarray(sitk.GetArrayFromImage(corrected).T, dtype=np.float32)
