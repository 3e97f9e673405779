"""Regions of items: where they lie, how strong their boundaries are, and the cache that keeps them."""

import math

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.core.errors import DataError
from medssl.data.cache import prepare
from medssl.data.items import ItemReader, ItemsConfig, build_items
from medssl.data.manifest import read_manifest
from medssl.data.region_store import prepare_regions
from medssl.data.regions import RegionsConfig, adjacency, find_regions, gradient_strength
from medssl.transforms.preprocess import PrepareConfig

PREPARE = PrepareConfig(size=(12, 10, 8))


def blocks(*shape):
    """An image (1, *shape) of two halves along its first axis, the first of which has two halves along its second."""
    image = np.zeros((1, *shape), dtype=np.float32)
    image[0, shape[0] // 2 :] = 4.0
    image[0, : shape[0] // 2, shape[1] // 2 :] = 1.0
    return image


@pytest.mark.parametrize("shape", [(16, 12), (16, 12, 6)])
def test_regions_of_blocks_are_the_blocks_and_the_weaker_boundary_joins_first(shape):
    strength = gradient_strength(blocks(*shape), (1.0,) * len(shape), smoothing=0.5)
    found = find_regions(strength, (1.0,) * len(shape))
    assert found.n_regions == 3
    here, beside, other = (int(found.map[at[: len(shape)]]) - 1 for at in ((2, 2, 3), (2, 9, 3), (13, 5, 3)))
    assert len({here, beside, other}) == 3
    heights = found.heights()
    assert 0 < heights[here, beside] < heights[here, other] == heights[beside, other] <= 1
    relative = found.heights("relative")
    assert relative.max() == 1.0
    np.testing.assert_allclose(relative * heights.max(), heights)


def test_an_image_without_boundaries_is_one_region():
    for image in (np.full((1, 6, 6), 3.0), np.zeros((2, 4, 4, 4))):
        strength = gradient_strength(image, (1.0,) * (image.ndim - 1))
        assert not strength.any()
        found = find_regions(strength, (1.0,) * (image.ndim - 1))
        assert found.n_regions == 1
        assert (found.map == 1).all()
        assert found.heights().tolist() == [[0.0]]


@given(st.integers(2, 60), st.integers(0, 2**31 - 1), st.booleans())
def test_there_are_never_more_regions_than_asked_for(max_regions, seed, deep):
    shape = (9, 8, 7) if deep else (24, 21)
    strength = np.random.default_rng(seed).random(shape).astype(np.float32)
    found = find_regions(strength, (1.0,) * len(shape), max_regions=max_regions)
    assert np.array_equal(np.unique(found.map), np.arange(1, found.n_regions + 1))
    assert 2 <= found.n_regions <= max_regions
    assert np.isfinite(found.heights()).all()
    again = find_regions(strength.copy(), (1.0,) * len(shape), max_regions=max_regions)
    assert np.array_equal(found.map, again.map)
    assert np.array_equal(found.edges, again.edges)


def test_crumbs_do_not_take_the_places_of_parts():
    """Four flat parts behind broad boundaries full of small basins: each of four regions must be one of the parts."""
    rng = np.random.default_rng(0)
    strength = np.zeros((40, 40), dtype=np.float32)
    strength[18:22] = strength[:, 18:22] = 1.0
    ridge = strength > 0
    strength[ridge] = rng.uniform(0.6, 1.0, ridge.sum())
    found = find_regions(strength, (1.0, 1.0), max_regions=4)
    corners = {int(found.map[at]) for at in ((3, 3), (3, 36), (36, 3), (36, 36))}
    assert corners == {1, 2, 3, 4}


def test_a_thin_boundary_does_not_leak_at_its_corners():
    strength = np.eye(9, dtype=np.float32)  # a diagonal line, voxels of which touch by corners only
    strength += np.eye(9, k=1, dtype=np.float32)
    found = find_regions(strength, (1.0, 1.0))
    assert found.n_regions == 2
    assert found.map[8, 0] != found.map[0, 8]


def test_crowds_of_basins_are_thinned_without_losing_the_large_ones():
    strength = np.random.default_rng(1).uniform(0.5, 1, (60, 60)).astype(np.float32)
    strength[5:25, 5:25] = strength[35:55, 35:55] = 0.1
    found = find_regions(strength, (1.0, 1.0), max_regions=2)  # hundreds of basins, 100 at most are looked at
    assert (found.map[5:25, 5:25] == found.map[6, 6]).all()
    assert found.map[6, 6] != found.map[40, 40]


@given(st.integers(0, 2**31 - 1), st.booleans())
def test_adjacency_is_a_sum_over_faces(seed, deep):
    rng, shape = np.random.default_rng(seed), (4, 3, 3) if deep else (5, 4)
    spacing = (0.5, 1.0, 3.0)[: len(shape)]
    regions, strength = rng.integers(0, 4, shape), rng.random(shape)
    regions.flat[0] = 3
    expected = {}
    for at in np.ndindex(shape):
        for axis in range(len(shape)):
            beyond = tuple(x + (i == axis) for i, x in enumerate(at))
            if beyond[axis] < shape[axis] and regions[at] != regions[beyond]:
                pair = tuple(sorted((int(regions[at]), int(regions[beyond]))))
                face = math.prod(s for i, s in enumerate(spacing) if i != axis)
                total, length = expected.get(pair, (0.0, 0.0))
                expected[pair] = (total + face * max(strength[at], strength[beyond]), length + face)
    found = adjacency(regions, strength, spacing)
    assert [tuple(row[:2].astype(int)) for row in found] == sorted(expected)
    np.testing.assert_allclose(found[:, 2:], [expected[pair] for pair in sorted(expected)])


def test_gradient_is_per_mm_and_knows_neither_scale_nor_channel_units():
    image = np.random.default_rng(0).random((1, 8, 9, 5))
    strength = gradient_strength(image, (1.0, 2.0, 0.5))
    np.testing.assert_allclose(gradient_strength(1000 * image + 3, (1.0, 2.0, 0.5)), strength, atol=1e-6)
    both = gradient_strength(np.concatenate([image, 1e-3 * image]), (1.0, 2.0, 0.5))
    np.testing.assert_allclose(both, strength, atol=1e-6)
    assert strength.max() == 1.0
    ramp = np.add.outer(np.arange(6.0), np.arange(6.0))[None]  # one unit a voxel along both axes
    far = gradient_strength(np.stack([ramp[0], ramp[0] ** 2]), (1.0, 4.0), smoothing=0)
    np.testing.assert_allclose(far[2, 2], 1.0, rtol=1e-6)  # of channel 0 everywhere alike
    assert gradient_strength(image[..., :1], (1.0, 1.0, 1.0)).shape == (8, 9, 1)  # an axis of one voxel has no slope


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two volumes with a box each, boundaries of a part that is not to be seen in them, and what is wrong with some."""
    folder = tmp_path_factory.mktemp("regions")
    rng = np.random.default_rng(0)
    flipped = np.diag([-1.0, -1.0, 2.0, 1.0])  # stored right to left and front to back, slices of 2 mm
    rows = ["subject,image,edges,wrong"]
    for n in range(2):
        image = rng.normal(0, 0.05, (14, 10, 8))
        image[4:10, 3:8, 2:6] += 5
        edges = np.zeros((14, 10, 8), dtype=np.float32)
        edges[5 + n] = 0.25
        for name, array in ((f"i{n}", image), (f"e{n}", edges), (f"w{n}", 255 * edges if n else edges[1:])):
            nib.save(nib.Nifti1Image(array.astype(np.float32), flipped), folder / f"{name}.nii.gz")
        rows.append(f"s{n},i{n}.nii.gz,e{n}.nii.gz,w{n}.nii.gz")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    manifest = read_manifest(folder / "manifest.csv")
    return folder, manifest, prepare(manifest, PREPARE, folder / "cache")


def regions_of(cohort, items, config=None, column=None):
    folder, manifest, store = cohort
    column = None if column is None else {n: folder / f"{column}{n}.nii.gz" for n in range(2)}
    return prepare_regions(
        store, [0, 1], items, config or RegionsConfig(), prepare=PREPARE, cache=folder / "cache", boundaries=column
    )


@pytest.mark.parametrize(
    ("items", "shape"),
    [
        (ItemsConfig(geometry="volume"), (12, 10, 8)),
        (ItemsConfig(geometry="slice"), (12, 10)),
        (ItemsConfig(geometry="slab", depth=3), (12, 10, 3)),
    ],
)
def test_every_item_has_regions_of_its_own_which_are_found_once(cohort, items, shape):
    store = regions_of(cohort, items)
    reader = ItemReader(store, build_items(cohort[1], store, items), items)
    images, maps = reader.read(reader.table.row)
    spacing = (1.0, 1.0, 2.0)[: len(shape)]
    for row, (volume, position) in enumerate(zip(reader.table.volume, reader.table.position)):
        found = find_regions(gradient_strength(images[row].numpy(), spacing), spacing)
        assert maps[row].shape == shape
        assert np.array_equal(maps[row].numpy(), found.map)
        heights = store.heights(int(volume))[position].reshape(40, 40)
        np.testing.assert_allclose(heights[: found.n_regions, : found.n_regions], found.heights("relative"), rtol=1e-6)
        assert np.isinf(heights[found.n_regions :]).all()
    files = {path: path.stat().st_mtime_ns for path in (cohort[0] / "cache" / "regions").iterdir()}
    regions_of(cohort, items)
    assert files == {path: path.stat().st_mtime_ns for path in (cohort[0] / "cache" / "regions").iterdir()}
    assert regions_of(cohort, items, RegionsConfig(max_regions=5)).key(0) != store.key(0)


def test_supplied_boundaries_move_as_the_images_do(cohort):
    items = ItemsConfig(geometry="volume")
    store = regions_of(cohort, items, RegionsConfig(boundaries="edges", heights="strength"), "e")
    for volume, plane in ((0, 5), (1, 6)):
        found = store.label(volume)
        # Stored right to left: voxel 5 of 14 is 8 from the other end, and 7 after cropping 14 to 12.
        before, after = found[: 12 - plane, 5, 4], found[13 - plane :, 5, 4]
        assert len(set(before.tolist())) == len(set(after.tolist())) == 1
        assert before[0] != after[0]
        heights = store.heights(volume)[0]
        assert sorted(heights[np.isfinite(heights)].tolist()) == [0.0, 0.0, 0.25, 0.25]
    assert store.key(0) != regions_of(cohort, items, RegionsConfig(heights="strength")).key(0)
    sliced = regions_of(cohort, ItemsConfig(geometry="slice"), RegionsConfig(boundaries="edges"), "e")
    assert np.array_equal(sliced.label_slice(1, 3) == 1, store.label(1)[..., 3] == 1)


def test_boundaries_that_do_not_fit_are_all_named(cohort):
    with pytest.raises(DataError) as caught:
        regions_of(cohort, ItemsConfig(geometry="volume"), RegionsConfig(boundaries="wrong"), "w")
    text = str(caught.value)
    assert "regions of 2 of 2 volumes" in text
    assert "boundaries (13, 10, 8), image (14, 10, 8)" in text
    assert "0 to 63.75" in text
    assert "255 for 8-bit" in text


def test_a_damaged_entry_says_which_file_to_delete(cohort):
    store = regions_of(cohort, ItemsConfig(geometry="volume"), RegionsConfig(max_regions=3))
    path = cohort[0] / "cache" / "regions" / f"{store.key(0)}.maps.npy"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=store.key(0)):
        store.label(0)
    path.unlink()
    assert regions_of(cohort, ItemsConfig(geometry="volume"), RegionsConfig(max_regions=3)).label(0).max() <= 3
