"""Settings of the random augmentations: one class per operation, absent meaning off.

Intensities are taken to lie in about [0, 1] (percentile scaling). Every default names where it comes from; "ours" marks
a choice of this package. GCL is Chaitanya et al. 2020 (arXiv:2006.10511), LCL its local loss and fine-tuning, y-aware
Dufumier et al. 2021 (arXiv:2106.08808), nnU-Net Isensee et al. 2021 (its published training transforms).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError(f"a range goes from low to high, not {values[0]} to {values[1]}")
    return values


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"an axis is named twice: {values}")
    return values


Probability = Annotated[float, Field(ge=0, le=1)]
Axis = Annotated[int, Field(ge=0, le=2)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
PositiveRange = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]
NotNegativeRange = Annotated[tuple[_NotNegative, _NotNegative], AfterValidator(_ordered)]
ShareRange = Annotated[tuple[_Share, _Share], AfterValidator(_ordered)]


class CropResize(StrictModel):
    """A random box, the same share of every axis, resized linearly (no smoothing) to the size of the view."""

    probability: Probability = 1.0
    scale: ShareRange = (0.75, 1.0)
    """Length of the box over that of the image, per axis (not area or volume); y-aware crops to 0.75."""


class Flip(StrictModel):
    """Mirrors each listed axis, independently of the others."""

    probability: Probability = 0.5
    axes: Annotated[tuple[Axis, ...], Field(min_length=1), AfterValidator(_distinct)] = (0,)
    """Axis 0 is left-right in RAS order: leave it out where labels tell left from right."""


class Affine(StrictModel):
    """Rotation, isotropic scale and translation about the centre of the image, in physical space."""

    probability: Probability = 0.5
    degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Each rotation angle is uniform in +-degrees (LCL fine-tuning: 15)."""
    scale: PositiveRange = (0.9, 1.1)
    """Above 1 enlarges; ours, twice the 0.95 to 1.05 of LCL fine-tuning."""
    translation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each shift is uniform in +- this share of the axis length."""
    spacing: tuple[_Positive, ...] | None = None
    """Voxel size per axis (any unit): a rotation then stays rigid on anisotropic voxels. None: cubes."""
    padding: Literal["border", "zeros"] = "border"
    """What lies outside the image: its border voxels (no black wedge tells a network the angle) or zeros."""


class Blur(StrictModel):
    """Gaussian blur, the kernel cut at 3 sigma and scaled to sum one, border voxels repeated."""

    probability: Probability = 0.2
    sigma: PositiveRange = (0.5, 1.0)
    """In voxels, drawn once per item for all axes (nnU-Net)."""


class BiasField(StrictModel):
    """Multiplies by exp(p), p a polynomial of the coordinates in [-1, 1] without constant term (van Leemput 1999)."""

    probability: Probability = 0.3
    coefficient: Annotated[float, Field(gt=0)] = 0.3
    """Every coefficient is uniform in +- this; TorchIO takes 0.5 with a constant term. Ours."""
    degree: Annotated[int, Field(ge=1, le=4)] = 3
    """Total degree, as in TorchIO and MONAI."""


class Gamma(StrictModel):
    """sign(x) |x| ** gamma: values below 0 and above 1 stay finite and ordered."""

    probability: Probability = 0.3
    gamma: PositiveRange = (0.7, 1.5)
    """nnU-Net."""


class Brightness(StrictModel):
    """Adds one number to all channels."""

    probability: Probability = 1.0
    amount: Annotated[float, Field(ge=0)] = 0.3
    """Uniform in +-amount (GCL)."""


class Contrast(StrictModel):
    """Multiplies the distance from a centre."""

    probability: Probability = 1.0
    factor: NotNegativeRange = (0.7, 1.3)
    """GCL."""
    centre: Literal["mean"] | float = "mean"
    """The mean of the channel, or a fixed intensity."""


class Noise(StrictModel):
    """Adds Gaussian noise, independent between voxels and channels."""

    probability: Probability = 0.5
    std: NotNegativeRange = (0.0, 0.1)
    """For intensities in [0, 1]. Ours: up to a tenth of the range, about nnU-Net's strength on z-scored images."""


class Cutout(StrictModel):
    """Fills one box, the same in all channels; labels are left alone."""

    probability: Probability = 0.5
    size: ShareRange = (0.25, 0.25)
    """Length of the box over that of the view, per axis (y-aware: a quarter)."""
    fill: float = 0.0


class Mask(StrictModel):
    """Sets features of a row to 0, which is their mean once they are standardised; only for feature tables."""

    probability: Probability = 1.0
    share: Annotated[tuple[Probability, Probability], AfterValidator(_ordered)] = (0.1, 0.4)
    """Each feature is masked with this probability, drawn once per item from the range. Ours."""


class AugmentConfig(StrictModel):
    """One policy. Operations run in the order of the fields below, with ``clip`` between noise and cutout."""

    crop_resize: CropResize | None = None
    flip: Flip | None = None
    affine: Affine | None = None
    blur: Blur | None = None
    bias_field: BiasField | None = None
    gamma: Gamma | None = None
    brightness: Brightness | None = None
    contrast: Contrast | None = None
    noise: Noise | None = None
    cutout: Cutout | None = None
    mask: Mask | None = None
    """Rows of feature tables take `noise` (in standard deviations) and `mask`, images everything but `mask`."""
    clip: Annotated[tuple[float, float], AfterValidator(_ordered)] | None = None
    """Limits of the intensities after noise, for every item; None: no limits."""
    size: tuple[PositiveInt, ...] | None = None
    """Voxels per axis of the view; None: those of the image. Small views beside large ones: `views.crops`."""
    slice_axis: Axis | None = None
    """Axis of thick slices: nothing is cropped, rotated, scaled, shifted or blurred along it. None: all alike."""

    @model_validator(mode="after")
    def _resizes_by_geometry(self) -> AugmentConfig:
        if self.slice_axis is not None and not (self.crop_resize or self.affine or self.blur):
            raise ValueError("slice_axis changes nothing without crop_resize, affine or blur: leave it out")
        return self

    @property
    def moves(self) -> bool:
        """Whether a view can differ from its item in where voxels lie."""
        return bool(self.crop_resize or self.flip or self.affine or self.size)

    def check(self, spatial_dims: int) -> None:
        """Refuse settings that images of ``spatial_dims`` axes cannot follow.

        Raises:
            ConfigError: An axis that does not exist, a list of the wrong length, a change of voxels for rows of a
                feature table (0 axes), or a mask of features for images.
        """
        if spatial_dims == 0:
            self._check_features()
            return
        where = f"augment, for images with {spatial_dims} spatial axes"
        if self.mask is not None:
            raise ConfigError("mask is for feature tables", where=where, fix="use cutout for images")
        if self.slice_axis is not None and spatial_dims != 3:
            raise ConfigError(
                "slice_axis is for volumes and slabs", where=where, fix="leave slice_axis out: a slice has no such axis"
            )
        if self.flip is not None and max(self.flip.axes) >= spatial_dims:
            raise ConfigError(
                "flip names an axis that the images do not have",
                where=where,
                found=f"flip.axes: {list(self.flip.axes)}",
                fix=f"take axes from {list(range(spatial_dims))}",
            )
        for name, values in (("size", self.size), ("affine.spacing", self.affine.spacing if self.affine else None)):
            if values is not None and len(values) != spatial_dims:
                raise ConfigError(
                    f"{name} needs one number per spatial axis",
                    where=where,
                    found=f"{name}: {list(values)}",
                    fix=f"give {spatial_dims} numbers",
                )

    def _check_features(self) -> None:
        given = [name for name in type(self).model_fields if name not in ("noise", "mask")]
        others = [name for name in given if getattr(self, name) is not None]
        if others:
            raise ConfigError(
                "rows of a feature table have no voxels to change",
                where="views",
                found=", ".join(others),
                fix="set views.preset: features, or an augment with noise and mask only",
            )


class CropSet(StrictModel):
    """More views of each item that show a small part of it in few voxels (multi-crop)."""

    count: PositiveInt = 6
    """Views of this set (Caron et al. 2020: 6)."""
    size: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]
    """Voxels per axis of these views; at most those of the items (Caron et al. 2020: 96 x 96 of 224 x 224)."""
    scale: ShareRange = (0.22, 0.37)
    """Length of the box over that of the image, per axis. Caron et al. 2020 take 0.05 to 0.14 of the area of a slice;
    these are the roots of that, and in volumes the same lengths."""
    augment: AugmentConfig | None = None
    """Everything else that is done to these views; null: what is done to the last view of full size."""

    @model_validator(mode="after")
    def _crops_itself(self) -> CropSet:
        given = [name for name in ("crop_resize", "size") if self.augment and getattr(self.augment, name) is not None]
        if given:
            raise ValueError(
                f"augment.{' and augment.'.join(given)}: the crops of a set are made by its size and scale"
            )
        return self

    def policy(self, like: AugmentConfig) -> AugmentConfig:
        """Of one of these views; ``like`` is that of a view of full size."""
        base = like if self.augment is None else self.augment
        return base.model_copy(update={"crop_resize": CropResize(scale=self.scale), "size": self.size})
