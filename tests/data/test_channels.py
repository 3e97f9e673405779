"""Channels along the fourth axis of one file, as MSD Prostate stores T2 and ADC."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medssl.core.errors import DataError
from medssl.data.cache import prepare
from medssl.data.manifest import ManifestMeta, read_manifest, write_manifest
from medssl.data.volume import read_volume
from medssl.transforms.preprocess import PrepareConfig


@pytest.fixture
def two_channels(tmp_path):
    data = np.random.default_rng(0).normal(size=(6, 7, 5, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([1, 1, 3, 1])), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz", data


def test_the_fourth_axis_is_read_as_channels(two_channels):
    path, data = two_channels
    np.testing.assert_array_equal(read_volume(path, channels=2).data, np.moveaxis(data, 3, 0))


def test_another_number_of_channels_than_the_file_holds_is_refused(two_channels):
    with pytest.raises(DataError, match="3 modalities"):
        read_volume(two_channels[0], channels=3)


def test_a_frame_and_channels_together_are_refused(two_channels):
    with pytest.raises(DataError, match="no frame"):
        read_volume(two_channels[0], frame=0, channels=2)


def test_a_manifest_row_with_two_modalities_is_prepared_with_two_channels(two_channels, tmp_path):
    table = pd.DataFrame({"subject": ["a"], "image": ["a.nii.gz"], "modality": ["T2;ADC"]})
    write_manifest(table, ManifestMeta(), tmp_path / "manifest.csv")
    store = prepare(read_manifest(tmp_path / "manifest.csv"), PrepareConfig(), tmp_path / "cache")
    assert store.image(0).shape == (2, 6, 7, 5)
    assert store.channels == 2


def test_the_voxel_hash_survives_another_name_and_compression(two_channels, tmp_path):
    path, data = two_channels
    nib.save(nib.Nifti1Image(data, np.diag([1, 1, 3, 1])), tmp_path / "b.nii")
    table = pd.DataFrame({"subject": ["a", "b"], "image": ["a.nii.gz", "b.nii"], "modality": ["T2;ADC", "T2;ADC"]})
    write_manifest(table, ManifestMeta(), tmp_path / "manifest.csv")
    store = prepare(read_manifest(tmp_path / "manifest.csv"), PrepareConfig(), tmp_path / "cache")
    assert store.voxels(0) == store.voxels(1)
