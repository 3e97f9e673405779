import gzip
import os
import shutil
from concurrent.futures.process import BrokenProcessPool

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medssl.data import integrity
from medssl.data.integrity import CODES, Finding, check_manifest
from medssl.data.integrity_files import Inspection
from medssl.data.manifest import ManifestMeta, read_manifest, write_manifest

AFFINE = np.diag([1.0, 1.0, 4.0, 1.0])
SHAPE = (6, 7, 5)


def image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def label(seed=0):
    return np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def cohort(tmp_path):
    """Three good volumes; the tests damage the second, on line 3."""
    rows = []
    for i in range(3):
        save(tmp_path / f"i{i}.nii.gz", image(i))
        save(tmp_path / f"l{i}.nii.gz", label(i))
        rows.append({"subject": f"s{i}", "image": f"i{i}.nii.gz", "label": f"l{i}.nii.gz"})
    meta = ManifestMeta(label_names={1: "left", 2: "right"})
    write_manifest(pd.DataFrame(rows), meta, tmp_path / "manifest.csv")
    return tmp_path


def codes(folder, *, deep=True, **options):
    return [(one.code, one.row) for one in check_manifest(read_manifest(folder), deep=deep, **options)]


def change_row(folder, row, **cells):
    manifest = read_manifest(folder)
    table = manifest.table.astype(object)
    for name, value in cells.items():
        table.loc[row, name] = value
    write_manifest(table, manifest.meta, folder / "manifest.csv")


def test_a_good_cohort_has_no_findings(cohort):
    seen = []
    for deep in (False, True):
        summary = check_manifest(read_manifest(cohort), deep=deep, progress=lambda *done: seen.append(done))
        assert list(summary) == []
        assert (summary.n_volumes, summary.n_groups, summary.n_labelled, summary.n_errors) == (3, 3, 3, 0)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


def with_nan(path):
    array = image(1)
    array[2, 3, 1] = np.nan
    save(path, array)


def with_inf(path):
    array = image(1)
    array[0, 0, 0] = np.inf
    save(path, array)


def one_bright_voxel(path):
    array = image(1, (20, 20, 20))
    array[3, 3, 3] = 1e6
    save(path, array)


def replaced_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


HEADER_FAULTS = [
    ("E-MISSING-FILE", lambda path: path.unlink()),
    ("E-NOT-A-FILE", replaced_by(lambda path: path.mkdir())),
    ("E-NOT-A-FILE", replaced_by(os.mkfifo)),
    ("E-EMPTY-FILE", lambda path: path.write_bytes(b"")),
    ("E-HEADER", lambda path: path.write_bytes(b"<html>not found</html>" * 50)),
    ("E-HEADER", lambda path: path.write_bytes(gzip.compress(b"<html>not found</html>" * 50))),
    ("E-DIMENSIONS", lambda path: save(path, image(1, (6, 7)))),
    ("E-DIMENSIONS", lambda path: save(path, image(1, (2, 3, 4, 5, 6)))),
    ("E-FRAME-NEEDED", lambda path: save(path, image(1, (*SHAPE, 4)))),
    ("E-LABEL-SHAPE", lambda path: save(path, image(1, (6, 7, 4)))),
]
VOXEL_FAULTS = [
    ("E-DAMAGED", truncate),
    ("E-DAMAGED", flip_a_bit),
    ("E-NOT-FINITE", with_nan),
    ("E-NOT-FINITE", with_inf),
    ("E-CONSTANT", lambda path: save(path, np.zeros(SHAPE, np.float32))),
    ("E-CONSTANT", lambda path: save(path, np.full(SHAPE, 7, np.int16))),
    ("W-INTENSITY", lambda path: save(path, image(1) * 1e8)),
]


@pytest.mark.parametrize(("code", "damage"), HEADER_FAULTS)
def test_header_pass_finds_the_damaged_image_and_goes_on(cohort, code, damage):
    damage(cohort / "i1.nii.gz")
    for deep in (False, True):
        found = codes(cohort, deep=deep)
        assert (code, 3) in found
        assert {row for _, row in found} == {3}


@pytest.mark.parametrize(("code", "damage"), VOXEL_FAULTS)
def test_deep_pass_finds_the_damaged_voxels_and_goes_on(cohort, code, damage):
    damage(cohort / "i1.nii.gz")
    assert codes(cohort, deep=False) == []
    assert codes(cohort) == [(code, 3)]


def test_a_single_bright_voxel_is_noted(cohort):
    one_bright_voxel(cohort / "i1.nii.gz")
    change_row(cohort, 1, label=None)
    assert codes(cohort) == [("W-INTENSITY", 3)]


@pytest.mark.parametrize("seed", range(12))
def test_no_damage_to_the_compressed_bytes_passes_or_stops_the_check(cohort, seed):
    rng = np.random.default_rng(seed)
    path = cohort / "i1.nii.gz"
    raw = bytearray(path.read_bytes())
    if seed % 2:
        raw[int(rng.integers(10, len(raw)))] ^= 1 << int(rng.integers(8))
    else:
        raw = raw[: int(rng.integers(1, len(raw)))]
    path.write_bytes(bytes(raw))
    summary = check_manifest(read_manifest(cohort), deep=True)
    assert summary.n_errors >= 1
    assert {one.row for one in summary} == {3}


@pytest.mark.parametrize("shift", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_shifted_label_is_found_with_its_distance(cohort, shift, axis):
    affine = AFFINE.copy()
    affine[axis, 3] = shift
    save(cohort / "l1.nii.gz", label(1), affine)
    for deep in (False, True):
        (finding,) = check_manifest(read_manifest(cohort), deep=deep)
        assert (finding.code, finding.row) == ("E-LABEL-GEOMETRY", 3)
        assert f"{shift:.3g} mm" in finding.message


@pytest.mark.parametrize(
    "affine",
    [np.diag([-1.0, 1, 4, 1]), np.diag([1.0, 1, 3, 1]), AFFINE[:, [1, 0, 2, 3]]],
    ids=["flip", "spacing", "swap"],
)
def test_a_flipped_scaled_or_swapped_label_is_found(cohort, affine):
    save(cohort / "l1.nii.gz", label(1), affine)
    assert codes(cohort, deep=False)[0] == ("E-LABEL-GEOMETRY", 3)


def test_rounding_of_the_affine_is_not_flagged(cohort):
    affine = AFFINE.copy()
    affine[:3, 3] = 2e-4
    save(cohort / "l1.nii.gz", label(1), affine)
    assert codes(cohort) == []


def probabilities(path):
    save(path, np.random.default_rng(0).random(SHAPE).astype(np.float32))


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("E-LABEL-SHAPE", lambda path: save(path, label(1)[:, :, :4])),
        ("E-LABEL-FRACTIONS", probabilities),
        ("E-LABEL-RANGE", lambda path: save(path, label(1).astype(np.int16) - 1)),
        ("E-LABEL-UNKNOWN", lambda path: save(path, np.where(label(1) == 2, 9, label(1)).astype(np.uint8))),
        ("W-LABEL-EMPTY", lambda path: save(path, np.zeros(SHAPE, np.uint8))),
        ("E-MISSING-FILE", lambda path: path.unlink()),
        ("E-DAMAGED", truncate),
        ("E-FRAME-NEEDED", lambda path: save(path, np.zeros((*SHAPE, 2), np.uint8))),
        ("W-DUPLICATE-LABEL", lambda path: save(path, label(0))),
    ],
)
def test_faults_of_a_label_map_are_found(cohort, code, damage):
    damage(cohort / "l1.nii.gz")
    assert codes(cohort) == [(code, 3)]


def test_labels_of_resampling_tools_that_are_nearly_whole_pass(cohort):
    save(cohort / "l1.nii.gz", label(1).astype(np.float32) * np.float32(0.9999))
    assert codes(cohort) == []


def test_without_label_names_no_value_is_unknown(cohort):
    (cohort / "manifest.meta.yaml").unlink()
    save(cohort / "l1.nii.gz", label(1) * 50)
    assert codes(cohort) == []


def test_frames_and_channels(cohort):
    save(cohort / "t.nii.gz", image(5, (*SHAPE, 2)))
    change_row(cohort, 1, image="t.nii.gz", frame=1)
    assert codes(cohort) == []
    change_row(cohort, 1, frame=2)
    assert codes(cohort, deep=False) == [("E-FRAME-RANGE", 3)]
    change_row(cohort, 1, frame=None, modality="T2;ADC")
    assert codes(cohort) == [("W-CHANNELS", 3)]
    change_row(cohort, 1, modality="T2;ADC;DWI")
    assert ("E-CHANNEL-GRID", 3) in codes(cohort)


def test_channels_on_different_grids_are_found(cohort):
    save(cohort / "b.nii.gz", image(7, (6, 7, 4)))
    change_row(cohort, 1, image="i1.nii.gz;b.nii.gz")
    assert codes(cohort) == [("E-CHANNEL-GRID", 3), ("W-CHANNELS", 3)]
    save(cohort / "b.nii.gz", image(7))
    assert codes(cohort) == [("W-CHANNELS", 3)]
    save(cohort / "b.nii.gz", image(7) * np.nan)
    (finding, _) = check_manifest(read_manifest(cohort), deep=True)
    assert (finding.code, finding.file) == ("E-NOT-FINITE", str(cohort / "b.nii.gz"))  # names the channel


def reoriented(path, source):
    original = nib.load(source)
    turned = original.as_reoriented(nib.io_orientation(np.diag([-1, 1, -1, 1]))).as_reoriented(
        np.array([[2, 1], [0, 1], [1, 1]])
    )
    nib.save(turned, path)


DUPLICATES = {
    "copied": lambda path, source: shutil.copy(source, path),
    "re-compressed": lambda path, source: path.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), 1)),
    "uncompressed": lambda path, source: nib.save(nib.load(source), path.with_suffix("")),
    "other type": lambda path, source: save(path, image(0).astype(np.float64)),
    "re-oriented": reoriented,
}


@pytest.mark.parametrize("kind", DUPLICATES)
def test_identical_voxels_are_found_under_any_disguise(cohort, kind):
    name = "other.nii" if kind == "uncompressed" else "other.nii.gz"
    DUPLICATES[kind](cohort / "other.nii.gz", cohort / "i0.nii.gz")
    change_row(cohort, 1, image=name, label=None)
    found = codes(cohort)
    assert ("E-DUPLICATE-IMAGE", 3) in found
    assert {code for code, _ in found} <= {"E-DUPLICATE-IMAGE", "W-ORIENTATION", "W-SPACING"}
    change_row(cohort, 1, group="s0")
    assert ("W-DUPLICATE-IMAGE", 3) in codes(cohort)  # within one group it cannot leak


def test_rows_that_name_one_image_twice_are_found_without_reading(cohort):
    change_row(cohort, 1, image="i0.nii.gz")
    assert codes(cohort, deep=False) == [("E-DUPLICATE-IMAGE", 3)]
    change_row(cohort, 1, group="s0")
    assert codes(cohort, deep=False) == [("W-DUPLICATE-IMAGE", 3)]  # two raters
    change_row(cohort, 1, label="l0.nii.gz")
    assert codes(cohort, deep=False) == [("E-DUPLICATE-ROW", 3)]


def test_mixed_spacing_and_orientation_are_noted_once_at_the_odd_one(cohort):
    for name in ("i2.nii.gz", "l2.nii.gz"):
        array = image(2) if name[0] == "i" else label(2)
        save(cohort / name, array, np.diag([-1.0, 1, 3, 1]))
    summary = check_manifest(read_manifest(cohort))
    assert [(one.code, one.row) for one in summary] == [("W-SPACING", 4), ("W-ORIENTATION", 4)]
    assert "1 x 1 x 4 (2), 1 x 1 x 3 (1)" in summary[0].message


def conflicting_header(path, seed):
    broken = nib.Nifti1Image(image(seed), None)
    broken.header.set_zooms((1.316, 1.316, 10))
    broken.header.set_sform(np.eye(4), code=2)
    broken.header.set_qform(np.diag([1.316, 1.316, 10, 1]), code=1)
    nib.save(broken, path)


def test_a_header_that_contradicts_itself_is_a_warning_and_not_an_error(cohort):
    conflicting_header(cohort / "i1.nii.gz", 1)
    change_row(cohort, 1, label=None)
    summary = check_manifest(read_manifest(cohort), deep=True)
    assert ("W-HEADER", 3) in [(one.code, one.row) for one in summary]
    assert summary.n_errors == 0


def test_the_same_note_on_many_files_becomes_one(tmp_path):
    rows = []
    for i in range(9):
        np.save(tmp_path / f"{i}.npy", image(i)[None])
        rows.append({"subject": f"s{i}", "image": f"{i}.npy"})
    write_manifest(pd.DataFrame(rows), ManifestMeta(), tmp_path / "manifest.csv")
    (finding,) = check_manifest(read_manifest(tmp_path), deep=True)
    assert finding.code == "W-HEADER"
    assert "8 more files" in finding.message


def test_everything_wrong_at_once_is_reported_in_one_pass(cohort):
    (cohort / "i0.nii.gz").unlink()
    truncate(cohort / "i1.nii.gz")
    save(cohort / "l2.nii.gz", label(2)[:, :, :3])
    summary = check_manifest(read_manifest(cohort), deep=True)
    assert [(one.code, one.row) for one in summary] == [("E-MISSING-FILE", 2), ("E-DAMAGED", 3), ("E-LABEL-SHAPE", 4)]
    assert summary.n_errors == 3
    assert summary.by_code == {"E-MISSING-FILE": 1, "E-DAMAGED": 1, "E-LABEL-SHAPE": 1}
    table = summary.table()
    assert table.columns.tolist() == ["code", "row", "file", "message", "fix"]
    assert len(table) == 3
    assert all(table["fix"].str.len() > 10)
    text = "\n".join(summary.lines())
    assert "3 errors, 0 warnings (headers and voxels)" in text
    assert summary.to_json()["findings"][0]["file"] == str(cohort / "i0.nii.gz")
    assert all(code in CODES for code in summary.by_code)


def test_codes_say_their_severity_and_meaning():
    assert all(code.startswith(("E-", "W-")) and meaning.endswith(".") for code, meaning in CODES.items())
    assert Finding("E-CONSTANT", 2, "f", "m", "x").is_error
    assert not Finding("W-SPACING", 2, "f", "m", "x").is_error


def die_on_the_second(task):
    if task.row == 3:
        os._exit(9)
    return Inspection(task.volume)


class PoolThatBreaks:
    """Stands in for joblib's pool in this process: raises where a worker would have ended."""

    def __init__(self, **settings):
        pass

    def __call__(self, calls):
        return self._results(calls) if not isinstance(calls, list) else list(self._results(calls))

    def _results(self, calls):
        for _, (task,), _ in calls:
            if task.row == 3:
                raise BrokenProcessPool("a worker was ended")
            yield Inspection(task.volume)


def test_a_file_that_brings_its_process_down_becomes_a_finding(cohort, monkeypatch, caplog):
    monkeypatch.setattr(integrity, "Parallel", PoolThatBreaks)
    seen = []
    manifest = read_manifest(cohort)
    summary = check_manifest(manifest, deep=True, jobs=2, progress=lambda *done: seen.append(done))
    assert [(one.code, one.row) for one in summary] == [("E-CRASHED", 3)]
    assert seen == [(1, 3), (2, 3), (3, 3)]  # nothing twice, nothing left out
    assert "remaining 2 are read one at a time" in caplog.text


@pytest.mark.faults
def test_a_process_that_really_ends_is_survived(cohort, monkeypatch):
    if os.environ.get("MEDSSL_FAULTS") != "full":
        pytest.skip("starts six processes that each load torch: `make faults`")
    monkeypatch.setattr(integrity, "inspect", die_on_the_second)
    summary = check_manifest(read_manifest(cohort), deep=True, jobs=2)
    assert [(one.code, one.row) for one in summary] == [("E-CRASHED", 3)]


@pytest.mark.real_data
def test_real_volumes_are_sound_and_real_damage_is_found(real_data, tmp_path):
    source = read_manifest(real_data / "hippocampus", mapping={"group": "person"})
    assert list(check_manifest(source, deep=True)) == []
    table = source.select(source.table["volume"] < 6).relocated(tmp_path / "manifest.csv")
    broken = {1: truncate, 2: flip_a_bit, 3: lambda path: path.write_bytes(b"")}
    for row, damage in broken.items():
        copy = tmp_path / f"copy{row}.nii.gz"
        shutil.copy(source.image_paths(row)[0], copy)
        damage(copy)
        table.loc[row, "image"] = copy.name
    shutil.copy(source.image_paths(0)[0], tmp_path / "renamed.nii.gz")
    table.loc[5, ["image", "label"]] = ["renamed.nii.gz", table.loc[0, "label"]]
    write_manifest(table, source.meta, tmp_path / "manifest.csv")
    found = {(one.code, one.row) for one in check_manifest(read_manifest(tmp_path), deep=True)}
    assert found == {("E-DAMAGED", 3), ("E-DAMAGED", 4), ("E-EMPTY-FILE", 5), ("E-DUPLICATE-IMAGE", 7)}
