"""Each operation against hand-computed values, and the two ways of applying against each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.transforms.augment import AugmentConfig, Params, apply, apply_labels, draw
from medssl.transforms.augment_params import exponents
from medssl.transforms.geometry import grid, inverse_theta, rotation, theta_from_voxels, warp
from medssl.transforms.intensity import bias_field, blur, brightness_contrast, cutout, gamma, gaussian_matrix
from medssl.transforms.resampling import along_axis, interpolation_matrix, product, resample_batch, resample_item

EVERYTHING = {
    "crop_resize": {"probability": 0.7, "scale": (0.5, 1.0)},
    "flip": {"axes": (0, 1)},
    "affine": {"degrees": 30, "translation": 0.1, "padding": "zeros"},
    "blur": {"probability": 0.6, "sigma": (0.4, 1.5)},
    "bias_field": {"probability": 0.6},
    "gamma": {"probability": 0.6},
    "brightness": {"probability": 0.6},
    "contrast": {"probability": 0.6},
    "noise": {"probability": 0.6},
    "cutout": {"probability": 0.6, "size": (0.2, 0.4)},
}
SHAPES = [(13, 10), (1, 9), (9, 7, 11), (8, 1, 6), (1, 1, 1)]


def image(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def drawn(config, spatial, n=4, step=0, view=0, seed=5):
    return draw(config, spatial, seed=seed, step=step, slots=range(n), view=view)


def views(config, images, method="auto", **kwargs):
    return apply(images, drawn(config, images.shape[2:], len(images), **kwargs), config, method=method)


# --- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_grid_equals_affine_grid_of_torch(shape):
    theta = torch.randn(2, len(shape), len(shape) + 1, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.affine_grid(theta, (2, 1, *shape), align_corners=False)
    assert_close(grid(theta, shape), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["items", "batched"])
def test_flip_reverses_exactly_the_listed_axes(way):
    images = image(2, 3, 5, 4, 7)
    config = AugmentConfig(flip={"probability": 1, "axes": (0, 2)})
    assert_close(views(config, images, way), images.flip(2, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["items", "batched"])
def test_half_crop_doubles_by_linear_interpolation(way):
    config = AugmentConfig(crop_resize={"scale": (0.5, 0.5)})
    images = torch.arange(8.0).reshape(1, 1, 8, 1)
    params = drawn(config, (8, 1), 1)
    # On a ramp x, the view reads start + (i + 0.5) / 2 - 0.5, no further than the border voxels.
    start = float((params.theta[0, 1, 2] + 1) / 2 * 8 - 2)
    expected = (start + (torch.arange(8.0) + 0.5) / 2 - 0.5).clamp(0, 7)
    assert_close(apply(images, params, config, method=way)[0, 0, :, 0], expected, atol=1e-5, rtol=0)
    assert 0 <= start <= 4


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_quarter_turn_moves_voxels_as_rot90(axis, padding):
    shape = [6, 6, 6]
    shape[axis] = 4
    images = image(1, 1, *shape)
    angles = np.zeros((1, 3))
    angles[0, axis] = math.pi / 2
    matrix = rotation(angles, 3).transpose(0, 2, 1)  # a view looks where the inverse turn points
    half = np.asarray(shape) / 2
    theta = theta_from_voxels(matrix, half - matrix @ half, shape, shape)
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    expected = torch.rot90(images, 1, dims=(first + 2, second + 2))
    assert_close(resample_batch(images, theta, shape, padding), expected, atol=1e-5, rtol=0)
    out = torch.empty(1, *shape)
    resample_item(images[0], theta[0], out, padding, inside=False)
    assert_close(out, expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", [None, (1.0, 2.0, 0.5)])
def test_rotation_keeps_distances_in_physical_space_when_axes_differ_in_length(spacing):
    shape = (10, 40, 21)
    config = AugmentConfig(affine={"probability": 1, "degrees": 60, "scale": (1, 1), "spacing": spacing})
    theta = drawn(config, shape).theta.double().flip(1)  # rows in array order
    theta = torch.cat([theta[:, :, :3].flip(2), theta[:, :, 3:]], dim=2)
    mm = torch.tensor(shape, dtype=torch.float64) / 2 * torch.tensor(spacing or (1, 1, 1), dtype=torch.float64)
    turn = theta[:, :, :3] * mm[None, :, None] / mm[None, None, :]
    assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64).expand(4, 3, 3), atol=1e-5, rtol=0)
    assert (turn - torch.eye(3)).abs().amax() > 0.1


def test_scale_above_one_enlarges_and_translation_is_a_share_of_the_axis():
    ramp = torch.linspace(-1, 1, 101)[None, None, :, None].expand(1, 1, 101, 5)
    config = AugmentConfig(affine={"probability": 1, "degrees": 0, "scale": (2, 2)})
    assert_close(views(config, ramp)[0, 0, :, 2], ramp[0, 0, :, 2] / 2, atol=1e-4, rtol=0)
    shifted = AugmentConfig(affine={"probability": 1, "degrees": 0, "scale": (1, 1), "translation": 0.2})
    shift = drawn(shifted, (101, 5), 50).theta[:, 1, 2] / 2
    assert 0.1 < shift.abs().max() <= 0.2 + 1e-6


def test_slice_axis_is_left_alone_by_crop_affine_and_blur():
    config = AugmentConfig(
        crop_resize={"scale": (0.5, 0.6)},
        affine={"probability": 1, "degrees": 40, "translation": 0.3},
        blur={"probability": 1},
        slice_axis=1,
    )
    images = image(2, 1, 9, 1, 8).expand(-1, -1, -1, 4, -1) * torch.tensor([1.0, 5.0, 2.0, 8.0])[:, None]
    result = views(config, images)
    for position, factor in enumerate((1.0, 5.0, 2.0, 8.0)):
        assert_close(result[:, :, :, position], factor * result[:, :, :, 0], atol=1e-5, rtol=1e-5)


def test_zeros_padding_puts_zeros_outside_and_border_padding_repeats_the_edge():
    ones = torch.ones(1, 1, 9, 9, 9)
    for padding, outside in (("zeros", 0.0), ("border", 1.0)):
        config = AugmentConfig(affine={"probability": 1, "degrees": 0, "scale": (0.5, 0.5), "padding": padding})
        for way in ("items", "batched"):
            result = views(config, ones, way)
            assert result[0, 0, 0, 0, 0] == outside
            assert result[0, 0, 4, 4, 4] == 1


def test_a_view_far_larger_than_its_image_still_repeats_the_border():
    config = AugmentConfig(affine={"probability": 1, "degrees": 5, "scale": (0.05, 0.05)})
    images = image(1, 1, 12, 12, 12)
    assert_close(views(config, images, "items"), views(config, images, "batched"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(30, 22), (20, 26, 23)])
def test_warp_by_the_inverse_brings_a_view_back(shape):
    lines = torch.meshgrid(*(torch.linspace(0, 3, s) for s in shape), indexing="ij")
    smooth = torch.stack([sum(torch.sin(line + k) for line in lines) for k in range(2)])[None].repeat(3, 1, 1, 1, 1)
    smooth = smooth.reshape(3, 2, *shape)
    config = AugmentConfig(flip={}, affine={"probability": 1, "degrees": 20, "scale": (0.9, 1.1)})
    params = drawn(config, shape, 3)
    back = warp(apply(smooth, params, config), inverse_theta(params.theta), padding="border")
    inner = (slice(None), slice(None), *(slice(s // 4, -(s // 4)) for s in shape))
    assert_close(back[inner], smooth[inner], atol=0.03, rtol=0)
    assert (apply(smooth, params, config)[inner] - smooth[inner]).abs().max() > 0.2


def test_warp_passes_gradients_and_refuses_a_theta_of_another_batch():
    features = image(2, 3, 6, 5).requires_grad_()
    theta = torch.eye(2, 3).expand(2, 2, 3)
    warp(features, theta, (4, 4)).sum().backward()
    assert features.grad.abs().sum() > 0
    with pytest.raises(ShapeError, match="theta does not fit"):
        warp(features, theta[:1])


@given(old=st.integers(1, 40), new=st.integers(1, 40), axis=st.integers(0, 2), seed=st.integers(0, 99))
def test_banded_products_equal_dense_ones(old, new, axis, seed):
    shape = [3, 2, 4]
    shape[axis] = old
    x, step = image(*shape, seed=seed), old / new
    matrix = interpolation_matrix(step, step / 2 - 0.5, old, new)
    assert_close(matrix.sum(dim=1), torch.ones(new))
    expected = torch.einsum("os,...s->...o", matrix, x.movedim(axis, -1)).movedim(-1, axis)
    assert_close(along_axis(x, matrix, axis, block=7), expected)
    assert_close(product(x, matrix, axis), expected)
    if axis:
        assert_close(product(x, matrix.expand(3, -1, -1) if axis != 0 else matrix, axis), expected)


# --- intensities ----------------------------------------------------------------------------------------------------


def test_blur_of_a_point_is_the_normalised_gaussian():
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 7, 7] = 1
    blur(x, torch.tensor([1.0]))
    line = [math.exp(-0.5 * k * k) for k in range(-3, 4)]
    kernel = torch.tensor(line) / sum(line)
    assert_close(x[0, 0, 4:11, 4:11], torch.outer(kernel, kernel))
    assert_close(x.sum(), torch.tensor(1.0))


@given(length=st.integers(1, 30), sigma=st.floats(0.05, 6))
def test_blur_keeps_constants_whatever_the_length(length, sigma):
    matrix = gaussian_matrix(torch.tensor([sigma, 1.0]), length)
    assert_close(matrix.sum(dim=2), torch.ones(2, length))
    assert (matrix >= 0).all()


def test_bias_field_is_the_exponential_of_the_polynomial():
    terms = exponents(2, 2)
    assert terms == ((0, 1), (0, 2), (1, 0), (1, 1), (2, 0))
    x = torch.full((1, 1, 4, 2), 2.0)
    bias_field(x, torch.tensor([[0.1, -0.2, 0.3, 0.4, -0.5]]), 2)
    u, v = torch.tensor([-0.75, -0.25, 0.25, 0.75])[:, None], torch.tensor([-0.5, 0.5])[None, :]
    expected = 2 * torch.exp(0.1 * v - 0.2 * v**2 + 0.3 * u + 0.4 * u * v - 0.5 * u**2)
    assert_close(x[0, 0], expected)


def test_gamma_is_a_power_with_sign_and_never_nan():
    x = torch.tensor([-2.0, -0.25, 0.0, 0.25, 1.0, 4.0]).reshape(1, 1, 6, 1)
    gamma(x, torch.tensor([0.5]))
    assert_close(x.flatten(), torch.tensor([-(2**0.5), -0.5, 0.0, 0.5, 1.0, 2.0]))


def test_brightness_comes_before_contrast_about_the_mean_or_a_number():
    x = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 3, 1)
    for centre, expected in (("mean", [0.5, 1.25 + 0.25, 2.5]), (0.0, [1.0, 3.0, 5.0])):
        y = x.clone()
        brightness_contrast(y, torch.tensor([0.5]), torch.tensor([1.0 if centre == "mean" else 2.0]), centre)
        assert_close(y.flatten(), torch.tensor(expected))
    y = x.clone()
    brightness_contrast(y, torch.tensor([0.5]), torch.tensor([2.0]), "mean")
    assert_close(y.flatten(), torch.tensor([-0.5, 1.5, 3.5]))
    y = x.clone()
    brightness_contrast(y, torch.tensor([0.5]), None, "mean")
    assert_close(y.flatten(), torch.tensor([0.5, 1.5, 2.5]))


def test_cutout_fills_its_box_and_nothing_else():
    x = torch.ones(2, 2, 6, 5)
    cutout(x, torch.tensor([[[1, 2], [3, 2]], [[0, 0], [0, 0]]]), 0.5)
    expected = torch.ones(2, 2, 6, 5)
    expected[0, :, 1:4, 2:4] = 0.5
    assert_close(x, expected)


def test_noise_has_the_drawn_strength_and_clip_comes_after_it():
    config = AugmentConfig(noise={"probability": 1, "std": (0.2, 0.2)})
    difference = views(config, torch.zeros(1, 1, 60, 60))
    assert abs(float(difference.std()) - 0.2) < 0.01
    assert abs(float(difference.mean())) < 0.02
    clipped = views(config.model_copy(update={"clip": (-0.1, 0.1)}), torch.zeros(1, 1, 60, 60))
    assert_close(clipped, difference.clamp(-0.1, 0.1))


@pytest.mark.parametrize("way", ["items", "batched"])
def test_noise_is_independent_between_items_views_steps_and_seeds(way):
    config, still = AugmentConfig(noise={"probability": 1, "std": (1, 1)}), torch.zeros(3, 1, 30, 30)
    keys = ({}, {"view": 1}, {"step": 1}, {"seed": 6})
    fields = torch.cat([views(config, still, way, **key) for key in keys]).flatten(1)
    likeness = torch.corrcoef(fields) - torch.eye(12)
    assert likeness.abs().max() < 0.2


# --- drawing and applying -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_items_and_batch_agree(shape):
    config = AugmentConfig(**EVERYTHING)
    images = image(8, 2, *shape)
    for step in range(3):
        items, batch = views(config, images, "items", step=step), views(config, images, "batched", step=step)
        assert_close(items, batch, atol=2e-5, rtol=1e-5)
        assert items.isfinite().all()


@pytest.mark.parametrize("way", ["items", "batched"])
def test_an_item_does_not_depend_on_how_the_batch_is_split(way):
    config, images = AugmentConfig(**EVERYTHING), image(6, 1, 8, 9, 7)
    whole = apply(images, draw(config, (8, 9, 7), seed=1, step=4, slots=range(6), view=1), config, method=way)
    for rows in ([0, 1, 2], [3, 4, 5], [5, 0], [2]):
        params = draw(config, (8, 9, 7), seed=1, step=4, slots=torch.tensor(rows), view=1)
        assert_close(apply(images[rows], params, config, method=way), whole[rows], atol=2e-6, rtol=1e-5)


def test_volumes_pass_one_by_one_and_slices_as_a_batch():
    config = AugmentConfig(crop_resize={"scale": (0.5, 0.9)}, noise={})
    for shape, way, other in (((42, 41, 43), "items", "batched"), ((40, 41), "batched", "items")):
        images = image(3, 1, *shape)
        assert torch.equal(views(config, images), views(config, images, way))
        assert not torch.equal(views(config, images), views(config, images, other))  # they differ in rounding


def test_the_same_keys_repeat_a_view_and_every_other_key_changes_it():
    config, images = AugmentConfig(**EVERYTHING), image(1, 1, 12, 12)
    keys = {"seed": 1, "step": 2, "slots": [3], "view": 4}
    first = apply(images, draw(config, (12, 12), **keys), config)
    assert torch.equal(first, apply(images, draw(config, (12, 12), **keys), config))
    for name, value in (("seed", 9), ("step", 9), ("slots", [9]), ("view", 9)):
        other = apply(images, draw(config, (12, 12), **{**keys, name: value}), config)
        assert not torch.equal(first, other), name


def test_switching_an_operation_off_leaves_the_other_draws_as_they_were():
    full = drawn(AugmentConfig(**EVERYTHING), (12, 12, 12), 16)
    for name, fields in (("crop_resize", ("sigma", "bias", "cutout")), ("noise", ("theta", "gamma", "contrast"))):
        fewer = drawn(AugmentConfig(**{k: v for k, v in EVERYTHING.items() if k != name}), (12, 12, 12), 16)
        for field in fields:
            assert torch.equal(getattr(full, field), getattr(fewer, field))


@pytest.mark.parametrize("way", ["items", "batched"])
@pytest.mark.parametrize("name", list(EVERYTHING))
def test_probability_zero_changes_nothing_and_one_changes_every_item(name, way):
    images = image(5, 1, 11, 12, 10) + 0.1
    settings = {**EVERYTHING[name]}
    never = AugmentConfig(**{name: {**settings, "probability": 0}})
    assert torch.equal(views(never, images, way), images)
    always = AugmentConfig(**{name: {**settings, "probability": 1}})
    changed = (views(always, images, way) - images).abs().flatten(1).amax(dim=1)
    assert (changed > 1e-5).all()


def test_operations_that_are_off_are_not_drawn_and_images_are_never_written_to():
    images = image(2, 1, 6, 6)
    before = images.clone()
    params = drawn(AugmentConfig(), (6, 6), 2)
    assert params == Params((6, 6), (6, 6))
    result = apply(images, params, AugmentConfig())
    assert result.data_ptr() != images.data_ptr()
    views(AugmentConfig(**EVERYTHING), images)
    assert torch.equal(images, before)


def test_size_gives_views_of_another_size():
    config = AugmentConfig(crop_resize={"scale": (0.3, 0.5)}, size=(6, 5, 4), noise={})
    images = image(3, 2, 12, 10, 9)
    items, batch = views(config, images, "items"), views(config, images, "batched")
    assert items.shape == (3, 2, 6, 5, 4)
    assert_close(items, batch, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 12), (10, 12, 9)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_labels_move_with_the_image(shape, padding):
    config = AugmentConfig(
        crop_resize={"probability": 0.5, "scale": (0.6, 1)},
        flip={},
        affine={"degrees": 25, "padding": padding},
        noise={},
    )
    labels = (image(8, *shape, seed=3) * 4).long()
    params = drawn(config, shape, 8)
    moved = apply_labels(labels, params, config)
    # Nearest voxel by definition: the index whose image, moved by nearest sampling, is the same.
    expected = warp(labels[:, None].float(), params.theta, mode="nearest", padding=padding)[:, 0].long()
    assert (moved != expected).float().mean() < 0.005
    assert (moved != labels).any()
    assert moved.dtype == labels.dtype


def test_an_item_without_labels_stays_without_labels():
    config = AugmentConfig(affine={"probability": 1, "degrees": 40, "scale": (0.5, 0.5), "padding": "zeros"})
    for shape in ((12, 12), (8, 9, 8)):
        labels = torch.full((2, *shape), -1)
        labels[1] = 3
        moved = apply_labels(labels, drawn(config, shape, 2), config)
        assert (moved[0] == -1).all()
        assert set(moved[1].unique().tolist()) == {0, 3}


@pytest.mark.parametrize(
    ("config", "spatial", "message"),
    [
        ({"flip": {"axes": (2,)}}, (8, 8), "flip names an axis"),
        ({"affine": {}, "slice_axis": 0}, (8, 8), "slice_axis is for volumes"),
        ({"affine": {"spacing": (1, 1)}}, (8, 8, 8), "affine.spacing needs one number"),
        ({"size": (4, 4, 4)}, (8, 8), "size needs one number"),
    ],
)
def test_a_policy_that_does_not_fit_the_images_is_refused(config, spatial, message):
    with pytest.raises(ConfigError, match=message):
        drawn(AugmentConfig(**config), spatial)


def test_wrong_settings_are_refused():
    for wrong in (
        {"gamma": {"gamma": (2, 1)}},
        {"flip": {"axes": (0, 0)}},
        {"noise": {"std": (-1, 1)}},
        {"slice_axis": 2, "noise": {}},
        {"elastic": {}},
    ):
        with pytest.raises(ValidationError):
            AugmentConfig(**wrong)
    images = image(1, 1, 4, 4)
    with pytest.raises(ConfigError, match="unknown way"):
        views(AugmentConfig(), images, "gpu")
    with pytest.raises(ShapeError, match="another shape"):
        apply(images, drawn(AugmentConfig(), (5, 5), 1), AugmentConfig())


@given(seed=st.integers(0, 10**6), low=st.floats(0.5, 0.9))
def test_a_crop_never_leaves_the_image(seed, low):
    config = AugmentConfig(crop_resize={"scale": (low, 1.0)}, flip={"axes": (0, 1)})
    params = drawn(config, (9, 14), 8, seed=seed)
    corners = params.theta[:, :, 2].abs() + params.theta[:, :, :2].abs().sum(dim=2)
    assert (corners <= 1 + 1e-5).all()
