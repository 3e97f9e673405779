from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from medssl.core.errors import InputError, ShapeError
from medssl.data.store import CaseGeometry
from medssl.data.volume import read_header, read_label, read_volume, write_nifti
from medssl.inference import save_prediction, to_native
from medssl.transforms.preprocess import PrepareConfig, preprocess

SHAPE = (11, 8, 6)
SPACING = (0.7, 1.3, 9.0)


def native_affine(order, signs, spacing=SPACING, tilt=0.0):
    c, s = np.cos(tilt), np.sin(tilt)
    affine = np.eye(4)
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign * spacing[axis]
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ matrix
    affine[:3, 3] = (-31.7, 12.9, 88.1)
    return affine


def prepared(affine, label, **settings):
    image = np.random.default_rng(3).normal(size=(1, *label.shape)).astype(np.float32)
    ready = preprocess(image, affine, PrepareConfig(intensity="none", **settings), label)
    return ready, CaseGeometry(affine, label.shape, ready.affine, ready.image.shape[1:])


def random_label(shape=SHAPE):
    return np.random.default_rng(0).integers(0, 4, shape).astype(np.int16)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_round_trip_of_all_48_orientations_moves_no_voxel(tmp_path, order, signs, tilt):
    label, affine = random_label(), native_affine(order, signs, tilt=tilt)
    source = write_nifti(tmp_path / "label.nii.gz", label, affine, dtype=np.uint8)
    stored, stored_affine = read_label(source)
    ready, geometry = prepared(stored_affine, stored, size=(16, 20, 13))
    back = to_native(ready.label, geometry)
    assert int((back != label).sum()) == 0
    one_hot = np.moveaxis(np.eye(4, dtype=np.float32)[ready.label], -1, 0)
    assert int((to_native(torch.from_numpy(one_hot), geometry) != label).sum()) == 0
    written = save_prediction(tmp_path / "prediction.nii.gz", back, geometry)
    again, affine_again = read_label(written)
    np.testing.assert_array_equal(again, label)
    np.testing.assert_array_equal(affine_again, stored_affine)
    assert read_header(written).shape == read_header(source).shape


def test_what_was_cropped_away_comes_back_as_background():
    label = random_label() % 3 + 1
    ready, geometry = prepared(native_affine((0, 1, 2), (1, 1, 1)), label, size=(5, 20, 3))
    back = to_native(ready.label, geometry)
    kept = back > 0
    assert kept.sum() == 5 * 8 * 3
    np.testing.assert_array_equal(back[kept], label[kept])
    rows = np.flatnonzero(kept.any((1, 2)))
    assert rows.tolist() == [3, 4, 5, 6, 7]


def ball(shape, affine, radius):
    """A ball of ``radius`` millimetres about the centre of the grid, and the probability that a soft edge gives."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    return np.clip((radius - np.linalg.norm(places - centre, axis=-1)) / 4 + 0.5, 0, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_resampled_predictions_come_back_where_they_belong(order):
    shape, affine = (40, 44, 30), native_affine(order, (1, -1, -1), spacing=(1.0, 1.2, 1.6), tilt=0.2)
    soft = ball(shape, affine, 14)
    label = (soft > 0.5).astype(np.int16)
    ready, geometry = prepared(affine, label, spacing=(2.0, 1.5, 1.0), size=(None, 48, None))
    nearest = to_native(ready.label, geometry)
    dice = 2 * (nearest & label).sum() / (nearest.sum() + label.sum())
    assert dice > 0.93
    config = PrepareConfig(intensity="none", spacing=(2.0, 1.5, 1.0), size=(None, 48, None))
    foreground = preprocess(soft[None].astype(np.float32), affine, config).image
    smooth = to_native(np.concatenate([1 - foreground, foreground]), geometry)
    assert 2 * (smooth & label).sum() / (smooth.sum() + label.sum()) > 0.985
    centre = [np.array(np.nonzero(array)).mean(1) for array in (label, smooth)]
    np.testing.assert_allclose(centre[0], centre[1], atol=0.1)


def test_resampling_back_agrees_with_an_independent_one():
    affine = native_affine((1, 0, 2), (1, -1, 1), spacing=(1.0, 1.2, 1.6), tilt=0.4)
    _, geometry = prepared(affine, random_label((20, 22, 12)), spacing=(1.7, 1.1, 1.3))
    probability = np.random.default_rng(5).dirichlet(np.ones(3), geometry.shape).astype(np.float32)
    probability = np.moveaxis(probability, -1, 0)
    matrix = np.linalg.inv(geometry.affine) @ geometry.native_affine

    def moved(values):
        inside = values.astype(np.float64)
        return affine_transform(
            inside, matrix[:3, :3], matrix[:3, 3], geometry.native_shape, order=1, mode="grid-constant"
        )

    expected = np.stack([moved(probability[0] - 1) + 1, *map(moved, probability[1:])])
    np.testing.assert_allclose(expected.sum(0), 1, atol=1e-6)
    margin = np.sort(expected, axis=0)[-1] - np.sort(expected, axis=0)[-2]
    clear = margin > 1e-3
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(to_native(probability, geometry)[clear], expected.argmax(0)[clear])


def test_outside_the_prepared_grid_is_background_after_resampling_too():
    affine = native_affine((0, 1, 2), (1, 1, 1), spacing=(1.0, 1.0, 1.0))
    _, geometry = prepared(affine, random_label((20, 20, 20)), spacing=(2.0, 2.0, 2.0), size=(4, 4, 4))
    certain = np.zeros((2, 4, 4, 4), np.float32)
    certain[1] = 1
    for prediction in (certain, np.ones((4, 4, 4), np.int16)):
        back = to_native(prediction, geometry)
        assert 7**3 <= back.sum() <= 9**3
        assert not back[:5].any()
        assert not back[:, -5:].any()


def test_logits_are_not_taken_for_probabilities():
    _, geometry = prepared(native_affine((0, 1, 2), (1, 1, 1)), random_label(), spacing=(2.0, 2.0, 2.0))
    with pytest.raises(InputError, match="softmax"):
        to_native(np.random.default_rng(0).normal(size=(3, *geometry.shape)), geometry)


def test_predictions_of_another_shape_are_refused():
    _, geometry = prepared(native_affine((0, 1, 2), (1, 1, 1)), random_label())
    with pytest.raises(ShapeError, match=r"\(11, 8, 6\)"):
        to_native(np.zeros((11, 8, 7)), geometry)
    with pytest.raises(ShapeError, match="native grid"):
        save_prediction("a.nii.gz", np.zeros((11, 8, 7), np.int16), geometry)


@pytest.mark.real_data
def test_real_labels_survive_the_round_trip(real_data, tmp_path):
    for name, config in {
        "hippocampus/labels/hippocampus_003": {"size": (48, 64, 48)},
        "ms-lesions/labels/patient07": {"size": (182, 218, 182)},
    }.items():
        path = real_data / f"{name}.nii.gz"
        label, affine = read_label(path)
        ready, geometry = prepared(affine, label, **config)
        back = to_native(ready.label, geometry)
        assert label.any()
        assert int((back != label).sum()) == 0
        again, affine_again = read_label(save_prediction(tmp_path / "a.nii.gz", back, geometry))
        np.testing.assert_array_equal(again, label)
        np.testing.assert_array_equal(affine_again, nib.load(path).affine)


@pytest.mark.real_data
def test_a_real_oblique_brain_mask_survives_resampling_there_and_back(real_data):
    volume = read_volume(real_data / "brain-t1-age/images/patient03_study2_T1W.nii.gz")
    head = (volume.data[0] > np.percentile(volume.data, 70)).astype(np.int16)
    ready, geometry = prepared(volume.affine, head, spacing=(1.0, 1.0, 3.0))
    back = to_native(ready.label, geometry)
    assert 2 * (back & head).sum() / (back.sum() + head.sum()) > 0.93
