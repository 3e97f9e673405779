"""What a method receives: the views of a batch, their geometry, and the label map that moved with view 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pydantic import PositiveInt, model_validator
from torch import Tensor

from medssl.core.errors import ConfigError, ShapeError, nearest
from medssl.core.schema import StrictModel
from medssl.core.transfer import onto
from medssl.transforms.artefacts import Artefact, add_artefacts
from medssl.transforms.augment import Way, apply, apply_labels, draw
from medssl.transforms.augment_config import (
    Affine,
    AugmentConfig,
    BiasField,
    Blur,
    Brightness,
    Contrast,
    CropResize,
    CropSet,
    Flip,
    Gamma,
    Mask,
    Noise,
)
from medssl.transforms.feature_views import augment_rows
from medssl.transforms.geometry import inverse_theta, warp

__all__ = ["PRESETS", "Artefact", "Views", "ViewsConfig", "inverse_theta", "make_views", "resolve_views", "warp"]

PRESETS: Final[Mapping[str, AugmentConfig]] = MappingProxyType(
    {
        # Chaitanya et al. 2020: 100 of 192 voxels per axis, resized; brightness, then contrast. The program draws the
        # intensities once for a batch and the corner in [10, 70) of [0, 92]; here each item draws, over all the image.
        "gcl": AugmentConfig(
            crop_resize=CropResize(scale=(100 / 192, 100 / 192)),
            brightness=Brightness(),
            contrast=Contrast(),
            clip=(0.0, 1.5),
        ),
        # Chaitanya et al. 2020, local loss: intensities only, so that regions of both views stay in place.
        "intensity": AugmentConfig(brightness=Brightness(), contrast=Contrast(), clip=(0.0, 1.5)),
        # Joint embedding methods: the spirit of Chen et al. 2020 without colour; strengths of augment_config.
        "simclr": AugmentConfig(
            crop_resize=CropResize(scale=(0.6, 1.0)),
            flip=Flip(),
            affine=Affine(),
            blur=Blur(probability=0.5),
            bias_field=BiasField(),
            gamma=Gamma(probability=0.5),
            brightness=Brightness(probability=0.5),
            contrast=Contrast(probability=0.5),
            noise=Noise(),
        ),
        # Fine-tuning with few labels. Chaitanya et al. 2020 rotate by 15 degrees and scale by 5 %; the wider scale is
        # ours. No flips: left and right are different structures.
        "segmentation": AugmentConfig(
            affine=Affine(scale=(0.85, 1.15)),
            bias_field=BiasField(probability=0.2),
            gamma=Gamma(),
            brightness=Brightness(probability=0.5, amount=0.1),
            contrast=Contrast(probability=0.5, factor=(0.8, 1.2)),
            noise=Noise(probability=0.2, std=(0.0, 0.05)),
        ),
        # Rows of standardised features: jitter in standard deviations, and features taken away. Strengths are ours.
        "features": AugmentConfig(noise=Noise(probability=0.8, std=(0.0, 0.3)), mask=Mask()),
        "none": AugmentConfig(),
    }
)
_DEFAULT: Final = "simclr"


class ViewsConfig(StrictModel):
    """How many views of each item, and how they are made."""

    n_views: PositiveInt = 2
    """All views of full size, the original included; `crops` come after them."""
    original: bool = False
    """View 0 is the item itself."""
    preset: str | None = None
    """A policy of ``PRESETS`` for every augmented view; ``simclr`` where ``augment`` is not given either."""
    augment: AugmentConfig | tuple[AugmentConfig, ...] | None = None
    """Instead of a preset: one policy for every augmented view, or a list with one for each."""
    crops: tuple[CropSet, ...] = ()
    """Multi-crop: sets of small views beside those of full size; any number of sets, for methods that take them."""
    artefacts: tuple[Artefact, ...] = ()
    """TorchIO artefacts, before everything else, in augmented views; slow, always on the CPU."""

    @model_validator(mode="after")
    def _one_source(self) -> ViewsConfig:
        if self.preset is not None and self.augment is not None:
            raise ValueError("give preset or augment, not both")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"unknown preset `{self.preset}`. {nearest(self.preset, PRESETS)}")
        if isinstance(self.augment, tuple) and len(self.augment) != self.n_augmented:
            raise ValueError(
                f"augment lists {len(self.augment)} policies for {self.n_augmented} augmented views "
                f"(n_views {self.n_views}{', one of them the original' if self.original else ''})"
            )
        if (
            self.n_augmented == 0
            and not self.crops
            and (self.preset is not None or self.augment is not None or self.artefacts)
        ):
            raise ValueError("the only view is the original: leave preset, augment and artefacts out, or raise n_views")
        return self

    @property
    def n_augmented(self) -> int:
        """Views that are not the original."""
        return self.n_views - int(self.original)

    @property
    def full(self) -> tuple[AugmentConfig, ...]:
        """One policy per augmented view of full size, the preset looked up."""
        if isinstance(self.augment, tuple):
            return self.augment
        return (self._common,) * self.n_augmented

    @property
    def _common(self) -> AugmentConfig:
        if isinstance(self.augment, AugmentConfig):
            return self.augment
        return self.augment[-1] if self.augment else PRESETS[self.preset or _DEFAULT]

    @property
    def policies(self) -> tuple[AugmentConfig, ...]:
        """One policy per augmented view, crops last."""
        crops = tuple(crop.policy(self._common) for crop in self.crops for _ in range(crop.count))
        return (*self.full, *crops)

    def sizes(self, image: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Voxels per axis of each view of images of ``image`` voxels per axis."""
        whole = tuple(image)
        original = (whole,) if self.original else ()
        return (*original, *(policy.size or whole for policy in self.policies))

    @property
    def moves(self) -> bool:
        """Whether any view moves voxels (what dense methods without geometry refuse)."""
        return any(policy.moves for policy in self.policies)


@dataclass(frozen=True)
class Views:
    """The views of one batch.

    Attributes:
        views: One (N, C, *size) float32 per view.
        geometry: Per view theta (N, d, d + 1), view -> item, on the device of the images, or None where nothing moves.
        label_map: (N, *size) moved with view 0, or None.
    """

    views: tuple[Tensor, ...]
    geometry: tuple[Tensor | None, ...]
    label_map: Tensor | None = None


def resolve_views(config: ViewsConfig, spatial_dims: int) -> ViewsConfig:
    """The same configuration with the preset written out as one policy per view, checked for these images.

    Raises:
        ConfigError: A policy does not fit images of so many axes (0: rows of a feature table).
    """
    if spatial_dims == 0 and config.artefacts:
        raise ConfigError("artefacts are for images", where="views.artefacts", fix="remove them for feature tables")
    if spatial_dims == 0 and config.crops:
        raise ConfigError("a row of a feature table has nothing to crop", where="views.crops", fix="remove it")
    for policy in config.policies:
        policy.check(spatial_dims)
    if config.n_augmented == 0:
        return config
    return config.model_copy(update={"preset": None, "augment": config.full})


def check_sizes(config: ViewsConfig, image: Sequence[int]) -> None:
    """Refuse crops that are larger than the images of ``image`` voxels per axis.

    Raises:
        ConfigError: Names the set and the axes.
    """
    for number, crop in enumerate(config.crops):
        axes = [axis for axis, (size, length) in enumerate(zip(crop.size, image, strict=True)) if size > length]
        if axes:
            raise ConfigError(
                f"crops are larger than the items on ax{'i' if len(axes) == 1 else 'e'}s {', '.join(map(str, axes))}",
                where=f"views.crops[{number}].size",
                found=f"crops of {' x '.join(map(str, crop.size))}, items of {' x '.join(map(str, image))} voxels",
                fix="give smaller crops, or larger items (items, data.prepare.size)",
            )


def make_views(
    images: Tensor,
    config: ViewsConfig,
    *,
    seed: int,
    step: int,
    slots: Sequence[int] | Tensor,
    label_maps: Tensor | None = None,
    method: Way = "auto",
) -> Views:
    """Make the views of a batch; determined by (seed, step, slot, view) for each item on its own.

    Args:
        images: (N, C, *spatial) float, or rows of features (N, F).
        config: What to make.
        seed: The run's seed.
        step: The training step.
        slots: (N,) place of each item in the global batch.
        label_maps: (N, *spatial) integers, -1 where unlabelled; moved with view 0.
        method: See ``augment.apply``; rows of features are always one batch.

    Raises:
        ShapeError: Numbers of images, slots and label maps differ, or shapes do.
        ConfigError: A policy does not fit the images.
    """
    if len(slots) != len(images):
        raise ShapeError("every image needs its slot", found=f"{len(images)} images, {len(slots)} slots")
    if label_maps is not None and label_maps.shape != (len(images), *images.shape[2:]):
        raise ShapeError(
            "label maps and images differ in shape",
            found=f"label maps {tuple(label_maps.shape)}, images {tuple(images.shape)}",
        )
    slots = slots.tolist() if isinstance(slots, Tensor) else [int(slot) for slot in slots]
    views: list[Tensor] = []
    geometry: list[Tensor | None] = []
    label_map = label_maps
    if config.original:
        views.append(images.float())
        geometry.append(None)
    for policy in config.policies:
        view = len(views)
        if images.dim() == 2:
            views.append(augment_rows(images, policy, seed=seed, step=step, slots=slots, view=view))
            geometry.append(None)
            continue
        source = images
        if config.artefacts:
            source = add_artefacts(images, config.artefacts, seed=seed, step=step, slots=slots, view=view)
        params = draw(policy, images.shape[2:], seed=seed, step=step, slots=slots, view=view)
        views.append(apply(source, params, policy, method=method))
        geometry.append(None if params.theta is None else onto(params.theta, images.device))
        if view == 0 and label_maps is not None:
            label_map = apply_labels(label_maps, params, policy)
    return Views(tuple(views), tuple(geometry), label_map)
