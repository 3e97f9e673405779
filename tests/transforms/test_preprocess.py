from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import affine_transform, gaussian_filter

from medssl.core.errors import DataError
from medssl.transforms.preprocess import PrepareConfig, class_numbers, n4, prepared_shape, preprocess, scale_intensity

SHAPE = (12, 14, 9)
RAW = PrepareConfig(intensity="none")


def image(seed=0, channels=1, shape=SHAPE):
    noise = np.random.default_rng(seed).normal(100, 30, (channels, *shape))
    return np.stack([gaussian_filter(channel, 1.0) for channel in noise]).astype(np.float32)


def oriented(order, signs, spacing=(1.5, 1.0, 4.0)):
    """An affine whose array axis i runs along world axis order[i], in the direction of signs[i]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * spacing[axis]
    affine[:3, 3] = (-20, 15, 7)
    return affine


def sampled(data, affine, prepared_affine, shape, order):
    """Oracle: the native array at the millimetre positions of the prepared grid."""
    matrix = np.linalg.inv(affine) @ prepared_affine
    return affine_transform(
        data.astype(np.float64), matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=order, mode="nearest"
    )


@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_reorientation_puts_every_voxel_at_its_own_place(order, signs):
    data, affine = image(channels=2), oriented(order, signs)
    label = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.int16)
    prepared = preprocess(data, affine, RAW, label)
    assert nib.aff2axcodes(prepared.affine) == ("R", "A", "S")
    assert prepared.image.flags.c_contiguous
    for voxel in product((0, 3, 8), (0, 5, 11), (0, 4, 7)):
        world = affine @ [*voxel, 1]
        there = np.rint(np.linalg.inv(prepared.affine) @ world)[:3].astype(int)
        np.testing.assert_array_equal(prepared.image[:, *there], data[:, *voxel])
        assert prepared.label[*there] == label[*voxel]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, None, 2.0), (None, 0.7, None)])
def test_resampling_agrees_with_an_independent_one_for_image_and_label(spacing):
    rotation = np.array([[0.98, -0.19, 0.02], [0.19, 0.98, -0.05], [-0.01, 0.05, 1.0]])
    affine = oriented((1, 0, 2), (-1, 1, -1))
    affine[:3, :3] = np.linalg.qr(rotation)[0] @ affine[:3, :3]
    data, label = image(), (image(2)[0] > 105).astype(np.int16) * 3
    prepared = preprocess(data, affine, RAW.model_copy(update={"spacing": spacing}), label)
    got = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    native = np.linalg.norm(preprocess(data, affine, RAW).affine[:3, :3], axis=0)
    np.testing.assert_allclose(got, [w or n for w, n in zip(spacing, native, strict=True)], rtol=1e-6)
    shape = prepared.image.shape[1:]
    expected = sampled(data[0], affine, prepared.affine, shape, order=1)
    np.testing.assert_allclose(prepared.image[0], expected, atol=2e-3)
    # The nearest voxel is ambiguous halfway between two; those places are the only ones that may differ.
    differing = prepared.label != sampled(label, affine, prepared.affine, shape, order=0)
    matrix = np.linalg.inv(affine) @ prepared.affine
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[differing] @ matrix[:3, :3].T
    halfway = np.abs(np.abs((places + matrix[:3, 3]) % 1 - 0.5)) < 1e-3
    assert halfway.any(axis=1).all()
    assert differing.mean() < 0.2


@pytest.mark.parametrize("size", [(8, 20, None), (12, None, 3), (30, 30, 30)])
def test_crop_and_pad_keep_the_place_of_every_voxel_and_pad_with_background(size):
    data, affine = image(), oriented((0, 1, 2), (1, 1, 1))
    label = np.full(SHAPE, 2, np.int16)
    prepared = preprocess(data, affine, RAW.model_copy(update={"size": size}), label)
    assert prepared.image.shape[1:] == tuple(w or n for w, n in zip(size, SHAPE, strict=True))
    matrix = np.linalg.inv(affine) @ prepared.affine
    start = np.rint(matrix[:3, 3]).astype(int)
    np.testing.assert_allclose(matrix[:3, 3], start, atol=1e-6)
    index = np.stack(np.meshgrid(*map(np.arange, prepared.image.shape[1:]), indexing="ij"), -1) + start
    inside = ((index >= 0) & (index < SHAPE)).all(-1)
    np.testing.assert_array_equal(prepared.image[0][inside], data[0][tuple(index[inside].T)])
    assert not prepared.image[0][~inside].any()
    np.testing.assert_array_equal(prepared.label, np.where(inside, 2, 0))


def test_percentile_scaling_is_the_published_formula_with_and_without_clip():
    channel = image()[0]
    low, high = np.percentile(channel, [1, 99])
    expected = (channel - low) / (high - low)
    np.testing.assert_allclose(scale_intensity(channel, PrepareConfig()), expected, atol=1e-6)
    assert expected.max() > 1
    np.testing.assert_allclose(scale_intensity(channel, PrepareConfig(clip=True)), expected.clip(0, 1), atol=1e-6)


def test_channels_are_scaled_on_their_own():
    data = image(channels=2)
    data[1] *= 1000
    prepared = preprocess(data, np.eye(4), PrepareConfig())
    for channel in range(2):
        np.testing.assert_allclose(np.percentile(prepared.image[channel], [1, 99]), [0, 1], atol=1e-4)


def test_zscore_uses_the_object_and_leaves_background_at_zero():
    channel = image()[0]
    channel[:4] = 0
    scaled = scale_intensity(channel, PrepareConfig(intensity="zscore"))
    assert not scaled[:4].any()
    assert scaled[4:].mean() == pytest.approx(0, abs=1e-5)
    assert scaled[4:].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("intensity", ["percentile", "zscore", "none"])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_volume_is_refused_by_name(intensity, value):
    with pytest.raises(DataError, match="constant") as caught:
        preprocess(np.full((1, *SHAPE), value, np.float32), np.eye(4), PrepareConfig(intensity=intensity), where="p7")
    assert "p7" in str(caught.value)


def test_a_single_bright_voxel_or_a_single_grey_is_refused():
    data = np.zeros((1, *SHAPE), np.float32)
    data[0, 3, 3, 3] = 1000
    with pytest.raises(DataError, match="percentiles"):
        preprocess(data, np.eye(4), PrepareConfig())
    with pytest.raises(DataError, match="equal"):
        preprocess(data, np.eye(4), PrepareConfig(intensity="zscore"))


def test_label_and_image_of_different_shape_are_refused():
    with pytest.raises(DataError, match=r"different shapes[\s\S]*\(12, 14, 8\)"):
        preprocess(image(), np.eye(4), RAW, np.zeros((12, 14, 8), np.int16))


def test_label_values_become_class_numbers_and_unlisted_ones_are_named():
    label = np.array([[[0, 205, 420, 421]]], np.int16)
    table = {205: 1, 420: 2, 421: 2}
    np.testing.assert_array_equal(class_numbers(label, table), [[[0, 1, 2, 2]]])
    with pytest.raises(DataError, match="421"):
        class_numbers(label, {205: 1, 420: 2})
    with pytest.raises(DataError, match="420, 421"):
        class_numbers(label, {})
    np.testing.assert_array_equal(class_numbers(np.array([[[0, 3, 255]]], np.int16), {}), [[[0, 3, 255]]])


@pytest.mark.parametrize(
    "values",
    [
        {"spacing": (0, 1, 1)},
        {"size": (0, 1, 1)},
        {"lower": 99.0, "upper": 1.0},
        {"upper": 101.0},
        {"label_values": {500: 256}},
        {"orientation": "LPS"},
        {"colour": 1},
    ],
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValidationError):
        PrepareConfig(**values)


def test_the_announced_shape_is_right_up_to_one_voxel():
    affine = oriented((2, 0, 1), (-1, 1, 1))
    for config in (RAW, RAW.model_copy(update={"spacing": (2.0, None, 0.9), "size": (None, 5, None)})):
        shape = preprocess(image(), affine, config).image.shape[1:]
        expected = prepared_shape(SHAPE, affine, config)
        assert np.abs(np.subtract(shape, expected)).max() <= 2
        assert all(e >= s for e, s in zip(expected, shape, strict=True))


@pytest.mark.parametrize("shrink", [1, 4])
def test_n4_removes_most_of_a_known_bias_field_and_is_repeatable(shrink):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (32, 32, 16)), indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8
    tissue = np.where(inside, np.where(x**2 + y**2 < 0.2, 120.0, 150.0), 0.0)
    tissue += np.random.default_rng(0).normal(0, 1, x.shape)
    biased = (tissue * np.exp(0.25 * x - 0.2 * y)).astype(np.float32)
    corrected = n4(biased, np.diag([1.0, 1.0, 2.0, 1.0]), shrink=shrink)
    outer = inside & (x**2 + y**2 > 0.25)

    def unevenness(values):
        return values[outer].std() / values[outer].mean()

    assert unevenness(biased) > 0.12
    assert unevenness(corrected) < 0.3 * unevenness(biased)
    np.testing.assert_array_equal(corrected, n4(biased, np.diag([1.0, 1.0, 2.0, 1.0]), shrink=shrink))


def test_n4_is_applied_before_the_intensities_are_scaled():
    data = image(shape=(20, 20, 12))
    prepared = preprocess(data, np.eye(4), PrepareConfig(n4=True))
    expected = scale_intensity(n4(data[0], np.eye(4)), PrepareConfig())
    np.testing.assert_allclose(prepared.image[0], expected, atol=1e-5)


@pytest.mark.real_data
def test_a_real_oblique_anisotropic_brain_lands_on_its_grid(real_data):
    from medssl.data.volume import read_volume

    volume = read_volume(real_data / "brain-t1-age/images/patient01_study1_T1W.nii.gz")
    prepared = preprocess(volume.data, volume.affine, PrepareConfig(spacing=(1.5, 1.5, None), size=(128, 160, 36)))
    assert prepared.image.shape == (1, 128, 160, 36)
    np.testing.assert_allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), (1.5, 1.5, 3.0), rtol=1e-4)
    assert nib.aff2axcodes(prepared.affine) == ("R", "A", "S")
    inner = np.ix_(range(20, 100), range(30, 120), range(5, 30))
    expected = sampled(volume.data[0], volume.affine, prepared.affine, (128, 160, 36), order=1)
    low, high = np.percentile(volume.data, [1, 99])
    np.testing.assert_allclose(prepared.image[0][inner], ((expected - low) / (high - low))[inner], atol=2e-3)
