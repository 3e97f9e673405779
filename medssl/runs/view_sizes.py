"""Whether the views of a run, crops above all, fit its items, its encoder and its method."""

from __future__ import annotations

from torch import nn

from medssl.config import PretrainConfig
from medssl.core.errors import ConfigError, ShapeError
from medssl.models.vae import map_sizes
from medssl.transforms.views import check_sizes


def view_shape(config: PretrainConfig, encoder: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, *spatial) of the first view, which is what networks are built for; rows of features (F,) stay what they are.

    Refuses views that the items are too small for, that the encoder cannot halve, or of sizes the method cannot mix.

    Raises:
        ConfigError: Says which.
    """
    whole = image_shape[1:]
    if not whole:
        return image_shape
    check_sizes(config.views, whole)
    in_order = config.views.sizes(whole)
    sizes = set(in_order)
    if len(sizes) > 1 and not config.needs.multi_crop:
        raise ConfigError(
            f"method `{config.method.name}` takes views of one size",
            where="views.augment",
            found=", ".join(str(size) for size in sorted(sizes)),
            fix="give every view the same size, or none",
        )
    for size in sorted(sizes - {whole}):
        try:
            map_sizes(encoder, (image_shape[0], *size))
        except ShapeError as error:
            raise ConfigError(
                f"views of {' x '.join(map(str, size))} voxels do not fit the encoder: {error.message}",
                where="views.crops" if config.views.crops else "views.augment",
                found=error.found,
                fix="use larger crops, or an encoder with fewer levels or strides",
            ) from error
    return (image_shape[0], *in_order[0])
