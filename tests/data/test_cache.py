import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medssl.core.errors import DataError, DiskError
from medssl.data.cache import prepare
from medssl.data.hashes import HashMemory, file_hash
from medssl.data.store import CaseGeometry, VolumeStore
from medssl.transforms.preprocess import PrepareConfig, preprocess

CONFIG = PrepareConfig(spacing=(1.5, None, None), size=(8, 10, None))


@dataclass
class Table:
    """The part of a manifest that the cache uses."""

    table: pd.DataFrame
    folder: Path
    names: tuple[str, ...] = ("image",)
    fourth_axis: int | None = None

    def channels(self, volume):
        return self.fourth_axis

    def image_paths(self, volume):
        return [self.folder / f"{volume}_{name}.nii.gz" for name in self.names]

    def label_path(self, volume):
        path = self.folder / f"{volume}_label.nii.gz"
        return path if path.exists() else None


def make_table(folder, n=3, channels=("image",), labels=True, shape=(9, 11, 7), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-2.0, 1.0, 5.0, 1.0])
    for volume in range(n):
        rng = np.random.default_rng(seed + volume)
        for name in channels:
            image = nib.Nifti1Image(rng.normal(100, 20, shape).astype(np.float32), affine)
            nib.save(image, folder / f"{volume}_{name}.nii.gz")
        if labels and volume != 1:
            label = nib.Nifti1Image(rng.integers(0, 4, shape).astype(np.uint8), affine)
            nib.save(label, folder / f"{volume}_label.nii.gz")
    table = pd.DataFrame({"volume": range(n), "case": [f"case{v}" for v in range(n)]})
    table["frame"] = pd.array([pd.NA] * n, dtype="Int64")
    return Table(table, folder, channels)


def direct(table, volume, config=CONFIG):
    images = [nib.load(path) for path in table.image_paths(volume)]
    label = table.label_path(volume)
    return preprocess(
        np.stack([image.get_fdata(dtype=np.float32) for image in images]),
        images[0].affine,
        config,
        None if label is None else np.asarray(nib.load(label).dataobj, dtype=np.int16),
    )


def entries(cache):
    return sorted(path.name for path in (cache / "volumes").iterdir())


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_the_store_gives_what_preprocess_gives_by_volume_slice_and_slab(tmp_path, slice_axis):
    table = make_table(tmp_path / "data", channels=("t1", "t2"))
    store = prepare(table, CONFIG, tmp_path / "cache", slice_axis=slice_axis)
    assert (store.volumes, store.channels, store.slice_axis, len(store)) == ([0, 1, 2], 2, slice_axis, 3)
    for volume in store.volumes:
        expected = direct(table, volume)
        np.testing.assert_array_equal(store.image(volume), expected.image)
        assert store.has_label(volume) == (volume != 1)
        n = store.n_slices(volume)
        assert n == expected.image.shape[slice_axis + 1]
        for position in range(n):
            piece = store.image_slice(volume, position)
            np.testing.assert_array_equal(piece, np.take(expected.image, position, axis=slice_axis + 1))
            assert type(piece) is np.ndarray
            assert piece.flags.writeable
        for centre, depth in ((0, 5), (n - 1, 4), (n // 2, 1), (1, 3 * n)):
            index = np.clip(np.arange(depth) + centre - depth // 2, 0, n - 1)
            slab = store.image_slab(volume, centre, depth)
            np.testing.assert_array_equal(slab, np.take(expected.image, index, axis=slice_axis + 1))
            if expected.label is not None:
                np.testing.assert_array_equal(
                    store.label_slab(volume, centre, depth), np.take(expected.label, index, axis=slice_axis)
                )
        if expected.label is None:
            assert store.label(volume) is store.label_slice(volume, 0) is store.label_slab(volume, 0, 2) is None
        else:
            np.testing.assert_array_equal(store.label(volume), expected.label)
            np.testing.assert_array_equal(store.label_slice(volume, 2), np.take(expected.label, 2, axis=slice_axis))
        geometry = store.geometry(volume)
        np.testing.assert_array_equal(geometry.affine, expected.affine)
        np.testing.assert_array_equal(geometry.native_affine, np.diag([-2.0, 1.0, 5.0, 1.0]))
        assert (geometry.native_shape, geometry.shape) == ((9, 11, 7), expected.image.shape[1:])


def test_images_are_views_of_the_file_that_cannot_be_written(tmp_path):
    store = prepare(make_table(tmp_path / "data"), CONFIG, tmp_path / "cache")
    image = store.image(0)
    assert isinstance(image.base, np.memmap)
    assert not image.flags.writeable
    assert np.moveaxis(image, -1, 0).flags.c_contiguous


def test_a_position_outside_the_volume_is_refused(tmp_path):
    store = prepare(make_table(tmp_path / "data"), CONFIG, tmp_path / "cache")
    for position in (-1, 7):
        with pytest.raises(DataError, match="no slice"):
            store.image_slice(0, position)
        with pytest.raises(DataError, match="no slice"):
            store.image_slab(0, position, 3)


def test_nothing_is_prepared_twice_and_a_changed_file_or_setting_is_a_new_entry(tmp_path):
    table, cache = make_table(tmp_path / "data"), tmp_path / "cache"
    prepare(table, CONFIG, cache)
    first = entries(cache)
    times = [(cache / "volumes" / name / "image.npy").stat().st_mtime_ns for name in first]
    prepare(table, CONFIG, cache)
    assert entries(cache) == first
    assert [(cache / "volumes" / name / "image.npy").stat().st_mtime_ns for name in first] == times
    prepare(table, CONFIG.model_copy(update={"clip": True}), cache)
    assert len(entries(cache)) == 6
    prepare(table, CONFIG, cache, slice_axis=0)
    assert len(entries(cache)) == 9
    make_table(tmp_path / "data", n=1, seed=7)
    store = prepare(table, CONFIG, cache)
    assert len(entries(cache)) == 10
    np.testing.assert_array_equal(store.image(0), direct(table, 0).image)


def test_equal_files_under_two_names_share_an_entry(tmp_path):
    table = make_table(tmp_path / "data", n=2, labels=False)
    (tmp_path / "data/1_image.nii.gz").write_bytes((tmp_path / "data/0_image.nii.gz").read_bytes())
    store = prepare(table, CONFIG, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1
    np.testing.assert_array_equal(store.image(0), store.image(1))


def test_frames_of_one_file_are_separate_entries(tmp_path):
    table = make_table(tmp_path / "data", n=2, labels=False)
    frames = np.random.default_rng(0).normal(size=(9, 11, 7, 2)).astype(np.float32)
    for volume in (0, 1):
        nib.save(nib.Nifti1Image(frames, np.eye(4)), tmp_path / f"data/{volume}_image.nii.gz")
    table.table["frame"] = pd.array([0, 1], dtype="Int64")
    store = prepare(table, PrepareConfig(intensity="none"), tmp_path / "cache")
    for volume in (0, 1):
        np.testing.assert_array_equal(store.image(volume)[0], frames[..., volume])


def test_channels_along_the_fourth_axis_of_one_file_are_read_together(tmp_path):
    table = make_table(tmp_path / "data", n=2, labels=False)
    both = np.random.default_rng(0).normal(size=(9, 11, 7, 2)).astype(np.float32)
    for volume in (0, 1):
        nib.save(nib.Nifti1Image(both + volume, np.eye(4)), tmp_path / f"data/{volume}_image.nii.gz")
    table.fourth_axis = 2
    store = prepare(table, PrepareConfig(intensity="none"), tmp_path / "cache")
    assert store.channels == 2
    np.testing.assert_array_equal(store.image(1), np.moveaxis(both + 1, -1, 0))


def test_the_same_image_in_other_files_is_recognised_by_its_voxels(tmp_path):
    table = make_table(tmp_path / "data", n=3, labels=False)
    copied = nib.load(tmp_path / "data/0_image.nii.gz")
    (tmp_path / "data/1_image.nii.gz").write_bytes(gzip.compress(copied.to_bytes(), 1))
    store = prepare(table, CONFIG, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 3
    assert store.voxels(0) == store.voxels(1) != store.voxels(2)


def test_two_jobs_give_the_same_bytes_as_one(tmp_path):
    table = make_table(tmp_path / "data")
    seen = []
    prepare(table, CONFIG, tmp_path / "two", jobs=2, progress=lambda done, total: seen.append((done, total)))
    prepare(table, CONFIG, tmp_path / "one")
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert entries(tmp_path / "one") == entries(tmp_path / "two")
    for name in entries(tmp_path / "one"):
        for file in (tmp_path / "one/volumes" / name).iterdir():
            assert file.read_bytes() == (tmp_path / "two/volumes" / name / file.name).read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_failures_are_reported_together_and_the_rest_is_kept(tmp_path, jobs):
    table, cache = make_table(tmp_path / "data", n=6), tmp_path / "cache"
    data = tmp_path / "data"
    (data / "0_image.nii.gz").write_bytes((data / "0_image.nii.gz").read_bytes()[:200])
    nib.save(nib.Nifti1Image(np.full((9, 11, 7), 3.0), np.diag([-2.0, 1, 5, 1])), data / "2_image.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 11, 6), np.uint8), np.eye(4)), data / "3_label.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 11, 7), np.uint8), np.diag([2.0, 1, 5, 1])), data / "4_label.nii.gz")
    (data / "5_image.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        prepare(table, CONFIG, cache, jobs=jobs)
    message = str(caught.value)
    assert "5 of 6 volumes" in message
    for case, cause in {
        "case0": "truncated",
        "case2": "constant",
        "case3": "different shapes",
        "case4": "different places",
        "case5": "no such file",
    }.items():
        assert cause in message.split(f"- {case}:")[1].split("\n- ")[0]
    assert "case1" not in message
    assert len(entries(cache)) == 1


def test_no_space_stops_with_a_disk_error_and_leaves_no_litter(tmp_path, monkeypatch):
    import shutil

    table = make_table(tmp_path / "data")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DiskError, match="not enough space"):
        prepare(table, CONFIG, tmp_path / "cache")
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(DiskError, match="no space"):
        prepare(table, CONFIG, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_killed_preparation_goes_on_and_its_litter_is_removed(tmp_path):
    table, cache = make_table(tmp_path / "data", n=30, shape=(40, 40, 20)), tmp_path / "cache"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_cache import *\n"
        f"prepare(make_table(Path({str(tmp_path / 'data')!r}), n=30, shape=(40, 40, 20)), CONFIG, Path({str(cache)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(cache.glob("volumes/[!.]*/geometry.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survivors = {name for name in entries(cache) if not name.startswith(".")}
    assert 0 < len(survivors) < 30
    (cache / "volumes" / f".{os.uname().nodename}.{process.pid}.abc.tmp").mkdir(exist_ok=True)
    store = prepare(table, CONFIG, cache)
    assert len(entries(cache)) == 30
    assert survivors < set(entries(cache))
    for volume in store.volumes[::7]:
        np.testing.assert_array_equal(store.image(volume), direct(table, volume).image)


def _prepare_in_child(folder, cache, barrier):
    table = Table(pd.read_pickle(folder / "table.pkl"), folder)  # noqa: S301 - written by this test
    barrier.wait()
    prepare(table, CONFIG, cache)


def test_two_processes_may_prepare_the_same_volumes_at_once(tmp_path):
    table = make_table(tmp_path / "data", n=6)
    table.table.to_pickle(tmp_path / "data/table.pkl")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    children = [
        context.Process(target=_prepare_in_child, args=(tmp_path / "data", tmp_path / "cache", barrier))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(entries(tmp_path / "cache")) == 6
    store = prepare(table, CONFIG, tmp_path / "cache")
    np.testing.assert_array_equal(store.image(5), direct(table, 5).image)


def test_many_threads_read_more_volumes_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("medssl.data.store.OPEN_FILES", 2)
    table = make_table(tmp_path / "data", n=8)
    store = prepare(table, CONFIG, tmp_path / "cache")
    expected = [np.array(store.image(volume)) for volume in store.volumes]
    wrong = []

    def read(seed):
        for volume in np.random.default_rng(seed).integers(0, 8, 200):
            if not np.array_equal(store.image_slice(int(volume), 3), expected[volume][..., 3]):
                wrong.append(volume)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(store._open) <= 2


def test_a_store_can_be_sent_to_another_process(tmp_path):
    import pickle

    store = prepare(make_table(tmp_path / "data"), CONFIG, tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own object
    np.testing.assert_array_equal(copy.image_slice(2, 1), store.image_slice(2, 1))


def test_a_damaged_entry_is_named_with_its_remedy(tmp_path):
    table, cache = make_table(tmp_path / "data", n=1), tmp_path / "cache"
    prepare(table, CONFIG, cache)
    entry = cache / "volumes" / entries(cache)[0]
    content = (entry / "image.npy").read_bytes()
    (entry / "image.npy").write_bytes(content[:-4])
    with pytest.raises(DataError, match="damaged entry"):
        prepare(table, CONFIG, cache)
    (entry / "image.npy").write_bytes(content)
    info = json.loads((entry / "geometry.json").read_text())
    (entry / "geometry.json").write_text(json.dumps({**info, "affine": "none"}))
    with pytest.raises(DataError, match="damaged entry"):
        VolumeStore({0: entry}, {0: "a"})


def test_volumes_with_different_channels_are_refused_together(tmp_path):
    one = prepare(make_table(tmp_path / "one", n=1, channels=("a",)), CONFIG, tmp_path / "cache")
    two = prepare(make_table(tmp_path / "two", n=1, channels=("a", "b")), CONFIG, tmp_path / "cache")
    with pytest.raises(DataError, match="channels"):
        VolumeStore({0: one._entries[0], 1: two._entries[0]}, {0: "first", 1: "second"})


def test_geometry_survives_json_to_the_last_digit():
    rng = np.random.default_rng(0)
    geometry = CaseGeometry(rng.normal(size=(4, 4)), (1, 2, 3), rng.normal(size=(4, 4)), (4, 5, 6), 1)
    back = CaseGeometry.from_json(json.loads(json.dumps(geometry.to_json())))
    np.testing.assert_array_equal(back.native_affine, geometry.native_affine)
    np.testing.assert_array_equal(back.affine, geometry.affine)
    assert (back.native_shape, back.shape, back.slice_axis) == ((1, 2, 3), (4, 5, 6), 1)


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.nii"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    memory = HashMemory(tmp_path / "hashes.json")
    first = memory.hash(path)
    assert first == file_hash(path)
    memory.save()
    calls = []
    monkeypatch.setattr("medssl.data.hashes.file_hash", lambda p: calls.append(p) or file_hash(p))
    again = HashMemory(tmp_path / "hashes.json")
    assert again.hash(path) == first
    assert calls == []
    path.write_bytes(b"two")
    assert again.hash(path) != first
    path.write_bytes(b"six")  # same size, and changed a moment ago: a remembered hash could be wrong
    assert again.hash(path) == file_hash(path)
    (tmp_path / "hashes.json").write_text("{damaged")
    assert HashMemory(tmp_path / "hashes.json").hash(path) == file_hash(path)
