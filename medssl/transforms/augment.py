"""Random augmentation in two halves: ``draw`` the parameters of N items, ``apply`` them.

Order: geometry (crop, flip and affine as one map and one resampling), blur, bias field, gamma, brightness and contrast,
noise, clip, cutout. On a CPU volumes pass one by one (their temporaries stay in the cache), slices and anything on an
accelerator as one batch; both follow the same parameters and agree to rounding. Noise comes from the device's own
generator, so it differs between device types.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from medssl.core.errors import ConfigError, ShapeError, nearest
from medssl.core.transfer import onto
from medssl.transforms import intensity
from medssl.transforms.augment_config import (
    Affine,
    AugmentConfig,
    BiasField,
    Blur,
    Brightness,
    Contrast,
    CropResize,
    Cutout,
    Flip,
    Gamma,
    Noise,
)
from medssl.transforms.augment_params import Params, draw
from medssl.transforms.resampling import resample_batch, resample_item, resample_labels

__all__ = [
    "Affine",
    "AugmentConfig",
    "BiasField",
    "Blur",
    "Brightness",
    "Contrast",
    "CropResize",
    "Cutout",
    "Flip",
    "Gamma",
    "Noise",
    "Params",
    "apply",
    "apply_labels",
    "draw",
]

Way = Literal["auto", "items", "batched"]
_SMALL = 2**16  # values of an item: up to here a batch costs less on a CPU than calls item by item (192 x 192: a third)


def apply(images: Tensor, params: Params, config: AugmentConfig, *, method: Way = "auto") -> Tensor:
    """The augmented images; ``images`` themselves stay as they are.

    Args:
        images: (N, C, *spatial) float, on any device.
        params: What ``draw`` drew for these N items, with the same ``config``.
        config: The policy.
        method: "items" works item by item (CPU only), "batched" on the whole batch; "auto" takes items on the CPU
            where one has more than 65 536 values.

    Returns:
        (N, C, *size) float32 on the same device.

    Raises:
        ShapeError: The parameters were drawn for other images.
        ConfigError: ``method`` is unknown, or "items" was asked of an accelerator.
    """
    if tuple(images.shape[2:]) != params.spatial:
        raise ShapeError(
            "parameters were drawn for images of another shape",
            found=f"images {tuple(images.shape)}, parameters for {params.spatial}",
        )
    batched = _is_batched(images, method)
    images = images.detach().float()
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        if batched:
            views = _move_batch(images, params, config)
            _change(views, params, config)
            return views
        views = images.new_empty((*images.shape[:2], *params.size))
        for item in range(len(images)):
            one = params.item(item)
            _move_item(images[item], one, config, views[item])
            _change(views[item : item + 1], one, config)
        return views


def apply_labels(label_maps: Tensor, params: Params, config: AugmentConfig) -> Tensor:
    """Label maps moved as ``apply`` moves the images: nearest voxel, same geometry, nothing else.

    Args:
        label_maps: (N, *spatial) integers, -1 where unlabelled.
        params: What ``draw`` drew for these N items.
        config: The policy.

    Returns:
        (N, *size), a new tensor. Outside the image lies its border, or with ``padding: zeros`` the background.
    """
    if params.theta is None or params.moved is None or params.rotated is None:
        return label_maps.clone()
    if not bool(params.moved.any()):
        return label_maps.clone()
    return resample_labels(label_maps, params.theta, params.size, _padding(config), ~params.rotated)


def _is_batched(images: Tensor, method: str) -> bool:
    if method not in ("auto", "items", "batched"):
        raise ConfigError("unknown way to apply augmentations", found=method, fix=nearest(method, get_args(Way)))
    on_cpu = images.device.type == "cpu"
    if method == "items" and not on_cpu:
        raise ConfigError(
            "item by item is for the CPU", found=f"images on {images.device}", fix="use method='auto' or 'batched'"
        )
    return method == "batched" or (method == "auto" and (not on_cpu or images.shape[1:].numel() <= _SMALL))


def _padding(config: AugmentConfig) -> Literal["border", "zeros"]:
    return "border" if config.affine is None else config.affine.padding


def _move_batch(images: Tensor, params: Params, config: AugmentConfig) -> Tensor:
    if params.theta is None or params.moved is None or params.rotated is None or not bool(params.moved.any()):
        return images.clone()
    rows = params.moved.nonzero()[:, 0]
    theta = params.theta[rows]
    if len(rows) == len(images):
        return resample_batch(images, theta, params.size, _padding(config))
    # A size other than the images' moves every item, so sizes agree here.
    views = images.clone()
    index = onto(rows, images.device)
    views[index] = resample_batch(images[index], theta, params.size, _padding(config))
    return views


def _move_item(image: Tensor, params: Params, config: AugmentConfig, out: Tensor) -> None:
    if params.theta is None or params.rotated is None or params.moved is None or not bool(params.moved):
        out.copy_(image)
        return
    resample_item(image, params.theta[0], out, _padding(config), not bool(params.rotated))


def _change(views: Tensor, params: Params, config: AugmentConfig) -> None:
    """Everything after geometry, in place."""
    if params.sigma is not None:
        sigma = params.sigma
        intensity.on_active(views, sigma > 0, lambda x, i: intensity.blur(x, sigma[i], config.slice_axis))
    if params.bias is not None and config.bias_field is not None:
        bias, degree = params.bias, config.bias_field.degree
        intensity.on_active(views, (bias != 0).any(dim=1), lambda x, i: intensity.bias_field(x, bias[i], degree))
    if params.gamma is not None:
        gamma = params.gamma
        intensity.on_active(views, gamma != 1, lambda x, i: intensity.gamma(x, gamma[i]))
    _change_levels(views, params, config)
    if params.noise is not None and params.noise_seed is not None:
        std, seeds = params.noise, params.noise_seed
        intensity.on_active(views, std > 0, lambda x, i: intensity.noise(x, std[i], seeds[i].tolist()))
    if config.clip is not None:
        views.clamp_(*config.clip)
    if params.cutout is not None and config.cutout is not None:
        intensity.cutout(views, params.cutout, config.cutout.fill)


def _change_levels(views: Tensor, params: Params, config: AugmentConfig) -> None:
    amount, factor = params.brightness, params.contrast
    if amount is None and factor is None:
        return
    active = torch.zeros(len(views), dtype=torch.bool)
    if amount is not None:
        active |= amount != 0
    if factor is not None:
        active |= factor != 1
    centre = "mean" if config.contrast is None else config.contrast.centre

    def change(x: Tensor, rows: Tensor) -> None:
        intensity.brightness_contrast(
            x, None if amount is None else amount[rows], None if factor is None else factor[rows], centre
        )

    intensity.on_active(views, active, change)
