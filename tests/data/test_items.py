from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.core.errors import ConfigError, DataError, InputError
from medssl.data.items import ItemReader, ItemsConfig, build_items
from medssl.data.manifest import Manifest, ManifestMeta


@dataclass
class Geometry:
    shape: tuple[int, int, int]


class ArrayStore:
    """Volumes in memory, with the methods of the store of prepared volumes."""

    def __init__(self, images: list[np.ndarray], labels: list[np.ndarray | None] | None = None, slice_axis: int = 2):
        self.images, self.labels, self.slice_axis = images, labels or [None] * len(images), slice_axis
        self.volumes = list(range(len(images)))
        self.channels = images[0].shape[0]

    def case(self, volume: int) -> str:
        return f"case{volume}"

    def geometry(self, volume: int) -> Geometry:
        return Geometry(self.images[volume].shape[1:])

    def n_slices(self, volume: int) -> int:
        return self.images[volume].shape[1 + self.slice_axis]

    def has_label(self, volume: int) -> bool:
        return self.labels[volume] is not None

    def image(self, volume: int) -> np.ndarray:
        return self.images[volume]

    def label(self, volume: int) -> np.ndarray | None:
        return self.labels[volume]

    def image_slice(self, volume: int, position: int) -> np.ndarray:
        return self.images[volume].take(position, axis=1 + self.slice_axis)

    def label_slice(self, volume: int, position: int) -> np.ndarray:
        return self.labels[volume].take(position, axis=self.slice_axis)

    def _span(self, volume: int, centre: int, depth: int) -> np.ndarray:
        return np.clip(np.arange(depth) + centre - depth // 2, 0, self.n_slices(volume) - 1)

    def image_slab(self, volume: int, centre: int, depth: int) -> np.ndarray:
        return self.images[volume].take(self._span(volume, centre, depth), axis=1 + self.slice_axis)

    def label_slab(self, volume: int, centre: int, depth: int) -> np.ndarray:
        return self.labels[volume].take(self._span(volume, centre, depth), axis=self.slice_axis)


def manifest_of(n: int, **columns) -> Manifest:
    table = pd.DataFrame(
        {
            "subject": [f"s{i}" for i in range(n)],
            "image": [f"{i}.nii" for i in range(n)],
            "group": [f"s{i}" for i in range(n)],
            "volume": range(n),
            "case": [f"case{i}" for i in range(n)],
        }
        | columns
    )
    return Manifest(table, ManifestMeta(), Path("manifest.csv"))


def volume(n_slices: int, seed: int = 0, size: int = 4, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(channels, size, size + 1, n_slices)).astype(np.float32)


@given(n=st.integers(1, 40), partitions=st.integers(1, 40))
def test_partitions_are_equal_consecutive_stacks_and_the_remainder_is_never_sampled(n, partitions):
    store = ArrayStore([volume(n)])
    config = ItemsConfig(geometry="slice", partitions=partitions)
    if n < partitions:
        with pytest.raises(DataError, match="case0"):
            build_items(manifest_of(1), store, config)
        return
    table = build_items(manifest_of(1), store, config)
    size = n // partitions
    assert table.position.tolist() == list(range(size * partitions))
    assert [int((table.partition == s).sum()) for s in range(partitions)] == [size] * partitions
    assert (np.diff(table.partition) >= 0).all()
    assert table.n_partitions == partitions


def test_without_partitions_every_slice_is_an_item_of_none():
    table = build_items(manifest_of(2), ArrayStore([volume(5), volume(3)]), ItemsConfig(geometry="slice"))
    assert len(table) == 8
    assert set(table.partition.tolist()) == {-1}
    assert table.volume.tolist() == [0] * 5 + [1] * 3
    assert table.row.tolist() == list(range(8))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("geometry", ["slice", "slab", "volume"])
def test_reader_returns_the_voxels_of_the_item(axis, geometry):
    images = [volume(6, seed, channels=2) for seed in (1, 2)]
    labels = [(image[0] > 0).astype(np.uint8) for image in images]
    store = ArrayStore(images, labels, slice_axis=axis)
    config = ItemsConfig(geometry=geometry, slice_axis=axis, depth=3 if geometry == "slab" else None)
    table = build_items(manifest_of(2), store, config)
    reader = ItemReader(store, table, config)
    rows = table.row[[len(table) - 1, 0]]
    read, maps = reader.read(rows)
    assert read.dtype == torch.float32
    assert maps.dtype == torch.int64
    assert read.shape == (2, *reader.image_shape)
    for i, row in enumerate(rows):
        image, label = images[table.volume[row]], labels[table.volume[row]]
        position = table.position[row]
        if geometry == "slice":
            image, label = image.take(position, axis + 1), label.take(position, axis)
        elif geometry == "slab":
            span = np.clip([position - 1, position, position + 1], 0, image.shape[axis + 1] - 1)
            image, label = image.take(span, axis + 1), label.take(span, axis)
        np.testing.assert_array_equal(read[i].numpy(), image)
        np.testing.assert_array_equal(maps[i].numpy(), label)


def test_reading_one_item_does_not_depend_on_the_others_and_leaves_the_store_alone():
    store = ArrayStore([volume(6), volume(6, 1)])
    config = ItemsConfig(geometry="slice")
    reader = ItemReader(store, build_items(manifest_of(2), store, config), config)
    alone, none = reader.read([7])
    together, _ = reader.read([0, 7, 3])
    assert none is None
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=0)
    before = store.images[1].copy()
    alone.zero_()
    np.testing.assert_array_equal(store.images[1], before)


def test_a_volume_without_label_map_is_unlabelled_everywhere():
    label = np.ones((4, 5, 3), np.uint8)
    store = ArrayStore([volume(3), volume(3, 1)], [label, None])
    config = ItemsConfig(geometry="slice")
    reader = ItemReader(store, build_items(manifest_of(2), store, config), config)
    _, maps = reader.read([0, 3])
    assert (maps[0] == 1).all()
    assert (maps[1] == -1).all()
    silent = ItemReader(store, reader.table, config, with_labels=False)
    assert silent.read([0])[1] is None


def test_labels_are_numbers_or_codes_and_missing_is_never_a_value():
    manifest = manifest_of(
        3,
        group=["b", "a", "b"],
        age=[20.5, np.nan, 61.0],
        site=["two", None, "one"],
        diagnosis=[None, None, None],
    )
    table = build_items(manifest, ArrayStore([volume(2)] * 3), ItemsConfig(geometry="volume"))
    assert table.subject.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(table.labels["age"], [20.5, np.nan, 61.0])
    assert table.labels["site"].tolist() == [1, -1, 0]
    assert set(table.labels) == {"age", "site"}


def test_different_shapes_name_the_volumes_and_the_setting():
    store = ArrayStore([volume(5), volume(5, size=8), volume(5)])
    with pytest.raises(DataError) as caught:
        build_items(manifest_of(3), store, ItemsConfig(geometry="slice"))
    assert "case1" in str(caught.value)
    assert "data.prepare.size" in str(caught.value)
    # Depth along the slice axis is free for slices and slabs, but not for whole volumes.
    uneven = ArrayStore([volume(5), volume(7)])
    assert len(build_items(manifest_of(2), uneven, ItemsConfig(geometry="slab", depth=3))) == 12
    with pytest.raises(DataError, match="different shapes"):
        build_items(manifest_of(2), uneven, ItemsConfig(geometry="volume"))


def test_settings_that_contradict_each_other_are_refused():
    for wrong in (
        {"geometry": "slab"},
        {"geometry": "slice", "depth": 3},
        {"geometry": "volume", "partitions": 4},
        {"geometry": "slice", "slice_axis": 3},
    ):
        with pytest.raises(ValueError):
            ItemsConfig(**wrong)
    with pytest.raises(ConfigError, match="axis 2"):
        build_items(manifest_of(1), ArrayStore([volume(4)]), ItemsConfig(geometry="slice", slice_axis=0))


def test_rows_outside_the_table_and_unreadable_items_are_named():
    store = ArrayStore([volume(4), volume(4)])
    config = ItemsConfig(geometry="slice")
    table = build_items(manifest_of(2), store, config)
    reader = ItemReader(store, table.select(table.volume == 1), config)
    assert reader.describe([6]) == ["row 6: case1, slice 2"]
    with pytest.raises(InputError, match="not in the table"):
        reader.read([0])
    store.images[1] = store.images[1][..., :2]
    with pytest.raises(DataError) as caught:
        reader.read([7])
    assert "case1, slice 3" in str(caught.value)


@pytest.mark.parametrize("geometry", ["slice", "slab", "volume"])
def test_items_of_the_real_cache_are_the_voxels_of_the_files(tmp_path, geometry):
    nib = pytest.importorskip("nibabel")
    from medssl.data.cache import prepare
    from medssl.data.manifest import read_manifest, write_manifest
    from medssl.transforms.preprocess import PrepareConfig

    images = [volume(7, seed)[0] for seed in (3, 4)]
    for i, image in enumerate(images):
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image((image > 0).astype(np.uint8), np.eye(4)), tmp_path / f"{i}_label.nii.gz")
    table = pd.DataFrame(
        {
            "subject": ["a", "b"],
            "image": ["0.nii.gz", "1.nii.gz"],
            "label": ["0_label.nii.gz", "1_label.nii.gz"],
            "age": [30.0, 40.0],
        }
    )
    write_manifest(table, ManifestMeta(label_names={1: "bright"}), tmp_path / "manifest.csv")
    manifest = read_manifest(tmp_path / "manifest.csv")
    store = prepare(manifest, PrepareConfig(intensity="none", spacing=None, size=None), tmp_path / "cache")
    config = ItemsConfig(geometry=geometry, depth=3 if geometry == "slab" else None)
    items = build_items(manifest, store, config)
    reader = ItemReader(store, items, config)
    read, maps = reader.read(items.row)
    assert items.labels["age"].tolist() == [30.0 if v == 0 else 40.0 for v in items.volume]
    for i, (index, position) in enumerate(zip(items.volume, items.position)):
        expected = images[index]
        if geometry == "slice":
            expected = expected[..., position]
        elif geometry == "slab":
            expected = expected[..., np.clip(np.arange(position - 1, position + 2), 0, 6)]
        np.testing.assert_array_equal(read[i, 0].numpy(), expected)
        np.testing.assert_array_equal(maps[i].numpy(), expected > 0)
