"""The deformations of Models Genesis against loops, closed forms and the published ranges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from medssl.core.errors import ShapeError
from medssl.transforms import genesis
from medssl.transforms.genesis import (
    DeformationConfig,
    deform,
    draw,
    follow_curve,
    paint,
    shuffle_windows,
)

NEVER = {"shuffle_probability": 0, "nonlinear_probability": 0, "paint_probability": 0}
ALWAYS = {"shuffle_probability": 1, "nonlinear_probability": 1, "paint_probability": 1}


def numbered(n, channels, *spatial):
    """Every voxel of an item another number, channels apart by a constant."""
    voxels = torch.arange(math.prod(spatial), dtype=torch.float64).view(spatial)
    return torch.stack([voxels + 1000 * c for c in range(channels)]).repeat(n, *(1,) * (len(spatial) + 1))


def inside(box, *spatial):
    mask = np.zeros(spatial, dtype=bool)
    mask[tuple(slice(int(a), int(a) + int(n)) for a, n in zip(*box))] = True
    return mask


# --- local shuffling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(9, 7), (6, 5, 7)])
def test_windows_are_shuffled_from_the_untouched_image_and_the_last_one_stays(spatial):
    d = len(spatial)
    windows = torch.tensor([[[0] * d, [4, 3, 4][:d]], [[1] * d, [3, 3, 4][:d]]]).repeat(2, 1, 1, 1)
    before = numbered(2, 2, *spatial)
    after = before.clone()
    shuffle_windows(after, windows, [3, 4])
    first, second = (inside(box, *spatial) for box in windows[0].tolist())
    for old, new in zip(before.numpy(), after.numpy()):
        assert (new[1] == new[0] + 1000).all()  # channels move together
        assert (new[0] == old[0])[~first & ~second].all()
        assert sorted(new[0][second]) == sorted(old[0][second])  # the second window read what was there originally
        left = new[0][first & ~second]
        assert len(set(left)) == len(left)
        assert set(left) <= set(old[0][first])
        assert (new[0] != old[0])[second].any()
        assert (new[0] != old[0])[first & ~second].any()
    assert not torch.equal(after[0], after[1])  # by the seed


def test_every_order_of_a_window_is_equally_likely():
    windows = torch.tensor([[[[1, 1], [1, 3]]]]).expand(1200, 1, 2, 2)
    images = numbered(1200, 1, 3, 5)
    shuffle_windows(images, windows, range(1200))
    _, counts = np.unique(images[:, 0, 1, 1:4].numpy(), axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 200) ** 2 / 200).sum() < 20.5  # chi-squared, 5 degrees of freedom: 0.1 %


# --- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [(0.2, 0.9, 0.7, 0.1), (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0), (0.5,) * 4])
@pytest.mark.parametrize("falls", [False, True])
def test_the_curve_equals_the_authors_sorted_samples(points, falls):
    t = np.linspace(0, 1, 100_000)
    ends = ((0.0, *points[:2], 1.0), (0.0, *points[2:], 1.0))
    xs, ys = (sum(math.comb(3, k) * (1 - t) ** (3 - k) * t**k * p for k, p in enumerate(ps)) for ps in ends)
    xs, ys = np.sort(xs), np.sort(ys)[::-1] if falls else np.sort(ys)
    grey = np.linspace(0, 1, 5001)
    expected = np.interp(grey, xs, ys)
    image = torch.from_numpy(grey).view(1, 1, 1, -1)
    follow_curve(image, torch.from_numpy(genesis._curve(np.array([[*points, 0.4 if falls else 0.6]]))))
    # Where a curve is steep, compare along it: either the value or the intensity at which it is taken.
    off = np.minimum(np.abs(image.flatten().numpy() - expected), np.abs(np.interp(
        image.flatten().numpy(), np.sort(expected), grey[::-1] if falls else grey) - grey))  # fmt: skip
    assert off.max() < 1e-4
    assert image.min() >= 0
    assert image.max() <= 1


# --- painting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(12, 9), (7, 8, 9)])
def test_noise_lies_in_the_boxes_or_around_them(spatial):
    d = len(spatial)
    boxes = torch.zeros(2, 5, 2, d, dtype=torch.int64)
    boxes[:, 0] = torch.tensor([[1] * d, [3] * d])
    boxes[:, 1] = torch.tensor([[2] * d, [4, 5, 6][:d]])
    images = torch.full((2, 2, *spatial), 7.0)
    paint(images, boxes, torch.tensor([True, False]), [1, 2])
    covered = inside(boxes[0, 0].tolist(), *spatial) | inside(boxes[0, 1].tolist(), *spatial)
    for item, noisy in zip(images.numpy(), (covered, ~covered)):
        for channel in item:
            assert (channel[~noisy] == 7).all()
            assert ((channel[noisy] >= 0) & (channel[noisy] < 1)).all()
            assert len(set(channel[noisy])) == noisy.sum()
        assert not (item[0] == item[1])[noisy].any()


@given(sides=st.lists(st.integers(1, 70), min_size=2, max_size=3), seed=st.integers(0, 1000))
def test_windows_and_boxes_lie_in_the_image_and_in_the_published_ranges(sides, seed):
    settings = {**ALWAYS, "shuffle_windows": 40}
    for share in (0, 1):
        drawn = draw(DeformationConfig(inpaint_share=share, **settings), sides, seed=seed, step=1, slots=[0, 5])
        first, length = (drawn.windows[:, :, k].numpy() for k in (0, 1))
        assert (first >= 0).all()
        assert (first + length <= sides).all()
        assert (length >= 1).all()
        assert (length <= np.minimum(np.maximum(np.array(sides) // 10, 2), sides)).all()
        first, length = (drawn.boxes[:, :, k].numpy() for k in (0, 1))
        assert (first >= 0).all()
        assert (first + length <= sides).all()
        there = length.any(axis=-1)
        assert (length[there] >= 1).all()
        assert (there[:, 0] | share).all()  # out-painting always spares one box
        for axis, side in enumerate(sides):
            if side < 14:
                continue
            low, high = (side // 6, side // 3) if share else (side - 4 * side // 7, side - 3 * side // 7)
            assert (low <= length[there][:, axis]).all()
            assert (length[there][:, axis] <= high).all()
            assert (first[there][:, axis] >= 3).all()
            assert ((first + length)[there][:, axis] <= side - 3).all()


def test_how_often_what_happens():
    n = 4000
    drawn = draw(DeformationConfig(shuffle_windows=1), (20, 20), seed=0, step=0, slots=range(n))
    falls = drawn.curve[:, 1, 0] == 1
    boxes = (drawn.boxes[:, :, 1].sum(dim=2) > 0).sum(dim=1)
    for share, expected in (
        (drawn.windows[:, 0, 1].any(dim=1), 0.5), (drawn.curved, 0.9), (drawn.painted, 0.9), (drawn.inside, 0.2),
        (falls, 0.5), (boxes[~drawn.inside] == 5, 0.95**4), (boxes[drawn.inside] == 0, 0.05),
    ):  # fmt: skip
        deviation = math.sqrt(expected * (1 - expected) / len(share))
        assert float(share.float().mean()) == pytest.approx(expected, abs=4 * deviation)


def test_a_slice_is_covered_by_windows_about_as_often_as_a_volume():
    cover = []
    for spatial in [(120, 120), (60, 60, 60)]:
        drawn = draw(DeformationConfig(shuffle_probability=1), spatial, seed=0, step=0, slots=[0])
        cover.append(int(drawn.windows[:, :, 1].prod(dim=2).sum()) / math.prod(spatial))
    assert 0.7 < cover[0] / cover[1] < 1.4


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(16, 12), (8, 10, 9)])
def test_an_item_is_deformed_the_same_in_any_batch_and_any_group_and_stays_as_it_was(spatial, monkeypatch):
    config = DeformationConfig(shuffle_windows=30)
    images = torch.rand(6, 2, *spatial, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    whole = deform(images, draw(config, spatial, seed=3, step=2, slots=range(6)))
    assert torch.equal(images, kept)
    assert whole.min() >= 0
    assert whole.max() <= 1
    part = deform(images[4:], draw(config, spatial, seed=3, step=2, slots=[4, 5]))
    assert torch.equal(part, whole[4:])
    for voxels in (1, 4 * math.prod(spatial)):
        monkeypatch.setitem(genesis._GROUP, "cpu", voxels)
        assert_close(deform(images, draw(config, spatial, seed=3, step=2, slots=range(6))), whole)
    other = deform(images, draw(config, spatial, seed=3, step=3, slots=range(6)))
    assert all(not torch.equal(a, b) for a, b in zip(whole, other))
    assert torch.equal(deform(images, draw(DeformationConfig(**NEVER), spatial, seed=3, step=2, slots=range(6))), kept)


def test_draws_depend_on_seed_step_and_place_and_not_on_what_is_switched_off():
    spatial, slots = (16, 16, 16), range(8)
    everything = draw(DeformationConfig(shuffle_windows=5), spatial, seed=1, step=1, slots=slots)
    unshuffled = draw(DeformationConfig(shuffle_windows=5, shuffle_probability=0), spatial, seed=1, step=1, slots=slots)
    for name in ("curved", "curve", "painted", "inside", "boxes", "seeds"):
        assert torch.equal(getattr(everything, name), getattr(unshuffled, name))
    assert not unshuffled.windows.any()
    for change in ({"step": 2}, {"seed": 2}, {"slots": range(8, 16)}):
        other = draw(DeformationConfig(shuffle_windows=5), spatial, **{"seed": 1, "step": 1, "slots": slots, **change})
        for name in ("curve", "boxes", "seeds"):
            assert not torch.equal(getattr(everything, name), getattr(other, name))


def test_deformations_of_other_images_are_refused():
    drawn = draw(DeformationConfig(), (16, 16), seed=0, step=0, slots=[0, 1])
    for images in (torch.rand(3, 1, 16, 16), torch.rand(2, 1, 16, 15)):
        with pytest.raises(ShapeError, match="drawn for other images"):
            deform(images, drawn)
    with pytest.raises(ShapeError, match="2 or 3 spatial axes"):
        draw(DeformationConfig(), (16,), seed=0, step=0, slots=[0])
