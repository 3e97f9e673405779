"""A template mask: what is outside is 0, whatever is done to intensities, and another mask is another cache entry."""

import nibabel as nib
import numpy as np
import pytest

from medssl.core.errors import DataError
from medssl.data.cache import prepare
from medssl.data.manifest import read_manifest
from medssl.data.masks import mask_for, read_mask
from medssl.data.volume import Volume
from medssl.transforms.preprocess import PrepareConfig, preprocess

SHAPE = (11, 13, 9)
RAW = {"intensity": "none"}


def template(path, seed=0, affine=None):
    """A template of grey matter probability: 0 to 1, about half of it above 0.05."""
    values = np.clip(np.random.default_rng(seed).normal(0.05, 0.3, SHAPE), 0, 1).astype(np.float32)
    if path.suffix == ".npy":
        np.save(path, values[None])
    else:
        nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path, values > 0.05


@pytest.fixture
def people(tmp_path):
    """Two arrays as OpenBHB stores them, 1 x X x Y x Z, and their manifest."""
    arrays = np.random.default_rng(1).uniform(0.2, 1, (2, 1, *SHAPE)).astype(np.float32)
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    (tmp_path / "manifest.csv").write_text("subject,image\na,0.npy\nb,1.npy\n")
    return arrays, read_manifest(tmp_path / "manifest.csv")


def test_arrays_pass_untouched_but_for_the_mask(tmp_path, people):
    arrays, manifest = people
    plain = prepare(manifest, PrepareConfig(**RAW), tmp_path / "cache")
    path, inside = template(tmp_path / "gm.nii.gz", affine=np.diag([-1.5, 1.5, 1.5, 1.0]))
    masked = prepare(manifest, PrepareConfig(**RAW, mask=path), tmp_path / "cache")
    for volume in (0, 1):
        np.testing.assert_array_equal(plain.image(volume), arrays[volume])
        np.testing.assert_array_equal(masked.image(volume), arrays[volume] * inside)
        assert plain.key(volume) != masked.key(volume)
        assert plain.voxels(volume) == masked.voxels(volume)


def test_cache_follows_the_content_of_the_mask_and_not_its_path(tmp_path, people):
    _, manifest = people
    first, _ = template(tmp_path / "one.npy")
    copy, _ = template(tmp_path / "copy.npy")
    keys = [prepare(manifest, PrepareConfig(**RAW, mask=path), tmp_path / "cache").key(0) for path in (first, copy)]
    assert keys[0] == keys[1]
    _, inside = template(copy, seed=5)
    changed = prepare(manifest, PrepareConfig(**RAW, mask=copy), tmp_path / "cache")
    assert changed.key(0) != keys[0]
    np.testing.assert_array_equal(changed.image(0)[0] != 0, inside)
    stricter = prepare(manifest, PrepareConfig(**RAW, mask=copy, mask_above=0.5), tmp_path / "cache")
    assert 0 < (stricter.image(0) != 0).sum() < (changed.image(0) != 0).sum()


@pytest.mark.parametrize("intensity", ["percentile", "zscore", "none"])
def test_outside_stays_zero_and_does_not_weigh_in_intensities(tmp_path, intensity):
    path, inside = template(tmp_path / "gm.npy")
    config = PrepareConfig(intensity=intensity, lower=60, mask=path)
    data = np.random.default_rng(2).uniform(5, 9, (1, *SHAPE)).astype(np.float32)
    other = np.where(inside, data, np.float32(1000))
    results = [preprocess(image, np.eye(4), config, mask=inside).image for image in (data, other)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not results[0][:, ~inside].any()
    assert results[0][:, inside].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(SHAPE), "keeps no voxel"),
        (np.ones(SHAPE), "keeps every voxel"),
        (np.eye(4)[None].repeat(4, 0), "has another shape"),
        (None, "no such file"),
    ],
)
def test_mask_that_cannot_be_used_is_refused_before_anything_is_stored(tmp_path, people, values, message):
    if values is not None:
        np.save(tmp_path / "gm.npy", values.astype(np.float32))
    with pytest.raises(DataError, match=message):
        prepare(people[1], PrepareConfig(mask=tmp_path / "gm.npy"), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "volumes").iterdir())


def test_mask_at_another_place_is_refused(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    path, inside = template(tmp_path / "gm.nii.gz", affine=affine)
    config, moved = PrepareConfig(mask=path), affine.copy()
    moved[0, 3] = 4.0
    image = np.zeros((1, *SHAPE), np.float32)
    np.testing.assert_array_equal(mask_for(Volume(image, affine, "a"), config, where="a"), inside)
    with pytest.raises(DataError, match="lies at another place"):
        mask_for(Volume(image, moved, "a"), config, where="a")
    assert mask_for(Volume(image, moved, "a"), PrepareConfig(), where="a") is None
    assert read_mask(path, 0.05)[1] is not None
