import io

import numpy as np
import pytest
from matplotlib.image import imread

from medssl.core.errors import DataError
from medssl.reporting.montage import COLOURS, Picture, cut_of, write_montage


def picture(title="case", *, axis=2, labelled=5, affine=None):
    """A block of label 1 in slice ``labelled`` along ``axis``, a smaller one of label 2 in slice 1."""
    shape = [12, 12, 12]
    shape[axis] = 8
    image = np.random.default_rng(0).normal(100, 5, shape).astype(np.float32)
    label = np.zeros(shape, np.int16)
    np.moveaxis(label, axis, 0)[labelled, 2:9, 3:10] = 1
    np.moveaxis(label, axis, 0)[1, 2:4, 3:5] = 2
    if affine is None:
        spacing = np.ones(4)
        spacing[axis] = 5
        affine = np.diag(spacing)
    return Picture(image, label, affine, title)


def pixels(path, colour):
    """How many pixels have nearly this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(imread(io.BytesIO(path.read_bytes()))[..., :3] - wanted).max(-1) < 0.05).sum())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shows_the_slice_with_most_labels_across_the_thick_voxels(axis):
    one = picture(axis=axis)
    cut = cut_of(one)
    assert cut.image.shape == (12, 12)
    assert np.array_equal(cut.image, np.take(one.image, 5, axis).T)
    assert (cut.label == 1).sum() == 49
    assert cut.aspect == 1


def test_shows_the_middle_of_the_last_axis_without_labels_or_thick_voxels():
    one = picture(affine=np.diag([1.0, 1.1, 1, 1]))
    plain = Picture(one.image, None, one.affine, "x")
    assert np.array_equal(cut_of(plain).image, one.image[:, :, 4].T)
    assert cut_of(plain).aspect == pytest.approx(1.1)


def test_orientation_on_disk_does_not_change_what_is_seen():
    one = picture()
    flipped = Picture(one.image[::-1], one.label[::-1], one.affine @ np.diag([-1.0, 1, 1, 1]), "x")
    swapped = Picture(one.image.transpose(2, 0, 1), one.label.transpose(2, 0, 1), one.affine[:, [2, 0, 1, 3]], "x")
    for other in (flipped, swapped):
        assert np.array_equal(cut_of(other).image, cut_of(one).image)
        assert np.array_equal(cut_of(other).label, cut_of(one).label)


def test_outlines_and_legend_have_the_colours_of_their_labels(tmp_path):
    path = write_montage([picture()], tmp_path / "new" / "m.png", label_names={1: "costs $5_"})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pixels(path, COLOURS[0]) > 100
    assert pixels(path, COLOURS[1]) > 5  # label 2 is in another slice: its colour is in the legend only
    bare = write_montage([Picture(picture().image, None, np.eye(4), "x")], tmp_path / "bare.png")
    assert pixels(bare, COLOURS[0]) == 0


def test_any_title_constant_image_and_number_of_pictures_can_be_drawn(tmp_path):
    flat = Picture(np.zeros((5, 5, 5), np.float32), np.ones((5, 5, 5), np.int16), np.eye(4), "$\\frac{" + "x" * 90)
    path = write_montage([flat] * 5, tmp_path / "m.png", columns=4)
    height, width = imread(io.BytesIO(path.read_bytes())).shape[:2]
    assert width == 960  # four columns of 2 inches at 120 dpi
    assert height > 480


def test_a_label_of_another_shape_and_nothing_at_all_are_refused(tmp_path):
    one = picture("patient7")
    with pytest.raises(DataError, match="patient7"):
        cut_of(Picture(one.image, one.label[:-1], one.affine, one.title))
    with pytest.raises(DataError, match="no volume to draw"):
        write_montage([], tmp_path / "m.png")
