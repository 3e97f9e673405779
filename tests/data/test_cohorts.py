import hashlib
import json
import time
from pathlib import Path

import layouts
import nibabel
import numpy as np
import pytest

from medssl.core.errors import ConfigError, DataError
from medssl.data.cohorts import COHORTS, discover_any, recognise_any
from medssl.data.cohorts.base import Discovery, is_nifti, list_files
from medssl.data.manifest import read_manifest, write_manifest

WRITERS = {
    "acdc": layouts.write_acdc,
    "msd": layouts.write_msd_prostate,
    "mmwhs": layouts.write_mmwhs,
    "bids": layouts.write_bids,
    "nnunet": layouts.write_nnunet,
    "folder": layouts.write_folder,
}


def reasons(found: Discovery) -> dict[str, str]:
    return dict(found.skipped)


def cells(found: Discovery, *columns: str) -> list[tuple]:
    return [tuple(row) for row in found.table[list(columns)].itertuples(index=False)]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_is_recognised_and_becomes_a_manifest_that_reads_back(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path / "data")
    found = discover_any(root)
    assert found.cohort == kind
    assert found.why == COHORTS[kind].recognise(root).why != ""
    assert found.meta.cohort == kind
    write_manifest(found.table, found.meta, root / "manifest.csv")
    manifest = read_manifest(root / "manifest.csv")
    assert len(manifest.table) == len(found.table)
    assert manifest.table["case"].is_unique
    for volume in manifest.table["volume"]:
        assert all(path.is_file() for path in manifest.image_paths(volume))
        label = manifest.label_path(volume)
        assert label is None or label.is_file()


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_is_either_listed_or_skipped_with_a_reason(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path)
    (root / ".DS_Store").write_bytes(b"x")
    found = discover_any(root)
    listed = {p for cell in found.table["image"] for p in cell.split(";")}
    listed |= set(found.table["label"].dropna()) if "label" in found.table else set()
    named = listed | {path for path, _ in found.skipped}
    images = {path for path in list_files(root, []) if is_nifti(path) and not path.endswith("_4d.nii.gz")}
    assert images <= named
    assert reasons(found)[".DS_Store"] == "hidden or system file"
    assert all(why for _, why in found.skipped)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_order_of_rows_does_not_depend_on_the_file_system(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = WRITERS[kind](tmp_path)
    first = discover_any(root)
    forward = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(forward(self))))
    second = discover_any(root)
    assert first.table.equals(second.table)
    assert first.skipped == second.skipped


def test_acdc_lists_ed_and_es_with_diagnosis_and_split(tmp_path: Path) -> None:
    root = layouts.write_acdc(tmp_path)
    found = discover_any(root)
    assert cells(found, "subject", "session", "diagnosis", "split") == [
        ("patient001", "ED", "DCM", "train"),
        ("patient001", "ES", "DCM", "train"),
        ("patient002", "ED", "HCM", "train"),
        ("patient002", "ES", "HCM", "train"),
        ("patient101", "ED", "MINF", "test"),
        ("patient101", "ES", "MINF", "test"),
    ]
    assert found.table["image"][1] == "training/patient001/patient001_frame03.nii.gz"
    assert found.table["label"][1] == "training/patient001/patient001_frame03_gt.nii.gz"
    assert "frame" not in found.table
    assert found.table["height_cm"][0] == 184.0
    assert found.meta.label_names == {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    assert reasons(found) == {"MANDATORY_CITATION.md": "not part of the ACDC layout"}


def test_acdc_part_folder_and_database_folder_give_the_same_people(tmp_path: Path) -> None:
    layouts.write_acdc(tmp_path / "database")
    assert len(discover_any(tmp_path).table) == 6
    training = discover_any(tmp_path / "database" / "training")
    assert set(training.table["split"]) == {"train"}
    assert training.table["image"][0] == "patient001/patient001_frame01.nii.gz"


def test_acdc_cine_adds_the_other_frames_without_labels(tmp_path: Path) -> None:
    root = layouts.write_acdc(tmp_path, n_training=1, n_testing=0)
    found = discover_any(root, "acdc", frames="cine")
    assert found.table["frame"].tolist()[2:] == [1, 3]
    assert found.table["frame"].isna().tolist()[:2] == [True, True]
    assert found.table["label"].isna().tolist() == [False, False, True, True]
    write_manifest(found.table, found.meta, root / "manifest.csv")
    cases = read_manifest(root / "manifest.csv").table["case"].tolist()
    assert len(set(cases)) == 4


def test_acdc_layout_has_the_header_conflict_of_the_real_files(tmp_path: Path) -> None:
    header = nibabel.load(layouts.write_acdc(tmp_path) / "training/patient001/patient001_frame01.nii.gz").header
    np.testing.assert_allclose(header.get_zooms(), layouts.ACDC_SPACING, rtol=1e-6)
    np.testing.assert_allclose(np.diag(header.get_sform())[:3], 1.0)
    np.testing.assert_allclose(np.diag(header.get_qform())[:3], layouts.ACDC_SPACING, rtol=1e-6)


def test_acdc_missing_files_are_skipped_by_name(tmp_path: Path) -> None:
    root = layouts.write_acdc(tmp_path, n_testing=0)
    folder = root / "training" / "patient001"
    (folder / "patient001_frame01.nii.gz").unlink()
    (folder / "patient001_frame03_gt.nii.gz").unlink()
    (root / "training" / "patient002" / "Info.cfg").unlink()
    found = discover_any(root, "acdc")
    assert cells(found, "subject", "session") == [("patient001", "ES")]
    why = reasons(found)
    assert "the file is missing" in why["training/patient001/patient001_frame01.nii.gz"]
    assert "listed without one" in why["training/patient001/patient001_frame03_gt.nii.gz"]
    assert "no Info.cfg" in why["training/patient002"]


@pytest.mark.parametrize(
    "content",
    [b"ES: 3\nGroup: DCM\n", b"ED: one\nES: 3\n", b"ED: 0\nES: 3\n", b"ED 1\nES: 3\n", b"\xff\xfe\x00ED", b""],
)
def test_acdc_damaged_info_names_the_file(tmp_path: Path, content: bytes) -> None:
    root = layouts.write_acdc(tmp_path)
    (root / "training" / "patient002" / "Info.cfg").write_bytes(content)
    with pytest.raises(DataError) as error:
        discover_any(root)
    assert "patient002/Info.cfg" in str(error.value)


def test_msd_lists_both_channels_or_one_frame(tmp_path: Path) -> None:
    root = layouts.write_msd_prostate(tmp_path)
    both = discover_any(root)
    assert both.table["subject"].tolist() == ["prostate_00", "prostate_01", "prostate_03", "prostate_10"]
    assert both.table["split"].tolist() == ["train", "train", "test", "train"]
    assert both.table["label"].isna().tolist() == [False, False, True, False]
    assert set(both.table["modality"]) == {"T2;ADC"}
    assert "frame" not in both.table
    assert both.meta.label_names == {0: "background", 1: "PZ", 2: "TZ"}
    one = discover_any(root, "msd", channels="ADC")
    assert one.table["frame"].tolist() == [1, 1, 1, 1]
    assert set(one.table["modality"]) == {"ADC"}
    with pytest.raises(ConfigError, match="no modality `T1`"):
        discover_any(root, "msd", channels="T1")


def test_msd_skips_what_is_junk_missing_or_outside(tmp_path: Path) -> None:
    root = layouts.write_msd_prostate(tmp_path / "task")
    layouts.save(tmp_path / "secret.nii.gz", layouts.voxels(0, (4, 4, 4)))
    content = json.loads((root / "dataset.json").read_text())
    content["training"] += [
        {"image": "../secret.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"},
        {"image": "./imagesTr/prostate_99.nii.gz", "label": "./labelsTr/prostate_99.nii.gz"},
    ]
    (root / "dataset.json").write_text(json.dumps(content))
    (root / "labelsTr" / "prostate_01.nii.gz").unlink()
    found = discover_any(root)
    assert found.table["label"].isna().tolist() == [False, True, True, False]
    why = reasons(found)
    assert "macOS" in why["imagesTr/._prostate_00.nii.gz"]
    assert "outside" in why["../secret.nii.gz"]
    assert "missing" in why["imagesTr/prostate_99.nii.gz"]
    assert "listed without one" in why["labelsTr/prostate_01.nii.gz"]


def test_msd_hippocampus_groups_the_two_sides_of_a_person(tmp_path: Path) -> None:
    found = discover_any(layouts.write_msd_hippocampus(tmp_path))
    assert cells(found, "subject", "group") == [
        ("hippocampus_001", "person_001"),
        ("hippocampus_002", "person_001"),
        ("hippocampus_003", "person_002"),
        ("hippocampus_004", "person_002"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"modality": {"0": "T2"}, "labels": {"x": "PZ"}, "training": []}',
        '{"modality": [], "training": []}',
    ],
)
@pytest.mark.parametrize("kind", ["msd", "nnunet"])
def test_damaged_dataset_json_names_the_file(kind: str, content: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path)
    (root / "dataset.json").write_text(content)
    with pytest.raises(DataError) as error:
        discover_any(root, kind)
    assert "dataset.json" in str(error.value)


@pytest.mark.parametrize("kind", ["msd", "nnunet"])
def test_a_broken_dataset_json_is_not_read_as_a_plain_folder(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path)
    (root / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        discover_any(root)


def test_mmwhs_lists_mr_and_ct_with_the_challenge_values(tmp_path: Path) -> None:
    root = layouts.write_mmwhs(tmp_path)
    found = discover_any(root)
    assert cells(found, "subject", "modality", "split") == [
        ("ct_test_2001", "CT", "test"),
        ("ct_train_1001", "CT", "train"),
        ("ct_train_1002", "CT", "train"),
        ("mr_test_2001", "MR", "test"),
        ("mr_train_1001", "MR", "train"),
        ("mr_train_1002", "MR", "train"),
    ]
    assert tuple(found.meta.label_names) == layouts.MMWHS_VALUES
    assert found.table["label"].isna().tolist() == [True, False, False, True, False, False]
    assert found.table["label_alias"].dropna().unique().tolist() == ["421=420"]
    only = discover_any(root, "mmwhs", modality="MR")
    assert set(only.table["modality"]) == {"MR"}
    assert reasons(only)["ct_train/ct_train_1001_image.nii.gz"] == "modality is CT, asked for MR"


def test_mmwhs_reports_doubles_and_orphans(tmp_path: Path) -> None:
    root = layouts.write_mmwhs(tmp_path)
    layouts.save(root / "zz" / "mr_train_1001_image.nii.gz", layouts.voxels(0, (4, 4, 4)))
    (root / "ct_train" / "ct_train_1001_image.nii.gz").unlink()
    why = reasons(discover_any(root))
    assert "second image of mr_train_1001" in why["zz/mr_train_1001_image.nii.gz"]
    assert why["ct_train/ct_train_1001_label.nii.gz"] == "label map without its image"


def test_bids_reads_entities_and_participants(tmp_path: Path) -> None:
    found = discover_any(layouts.write_bids(tmp_path))
    assert cells(found, "subject", "site", "sex") == [
        ("sub-01", "leuven", "F"),
        ("sub-01", "leuven", "F"),
        ("sub-02", "gent", "M"),
        ("sub-03", "gent", "F"),
    ]
    assert found.table["session"].tolist() == ["1", "2", None, None]
    np.testing.assert_array_equal(found.table["age"], [34.5, 34.5, np.nan, np.nan])
    assert found.table["diagnosis"].tolist() == ["MS", "MS", None, "control"]
    assert found.table["acq"].tolist() == [None, None, None, "mprage"]
    assert (found.meta.name, found.meta.licence) == ("Tiny", "CC0")
    why = reasons(found)
    assert why["participants.tsv"] == "sub-03: age '89+' is no number of years; left missing"
    assert why["sub-02/anat/sub-02_FLAIR.nii.gz"] == "suffix is FLAIR, asked for T1w"
    assert "below derivatives" in why["derivatives/lesions/sub-01/ses-1/anat/sub-01_ses-1_label-lesion_dseg.nii.gz"]


def test_bids_joins_channels_and_finds_label_maps(tmp_path: Path) -> None:
    root = layouts.write_bids(tmp_path)
    found = discover_any(root, "bids", suffix="T1w;FLAIR", labels="dseg")
    assert found.table["image"].tolist() == [
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz;sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz;sub-02/anat/sub-02_FLAIR.nii.gz",
    ]
    assert found.table["label"].tolist() == [
        "derivatives/lesions/sub-01/ses-1/anat/sub-01_ses-1_label-lesion_dseg.nii.gz",
        None,
    ]
    assert reasons(found)["sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"] == "no FLAIR of this session and run"
    separate = discover_any(root, "bids", suffix="T1w,FLAIR")
    assert sorted(separate.table["modality"]) == ["FLAIR", "FLAIR", "T1w", "T1w", "T1w", "T1w"]


@pytest.mark.parametrize("content", ["", "id\tage\n", "participant_id\tage\nsub-01\n"])
def test_bids_damaged_participants_names_the_file(tmp_path: Path, content: str) -> None:
    root = layouts.write_bids(tmp_path)
    (root / "participants.tsv").write_text(content)
    with pytest.raises(DataError) as error:
        discover_any(root)
    assert "participants.tsv" in str(error.value)


def test_bids_lines_that_contradict_each_other_leave_the_value_missing(tmp_path: Path) -> None:
    root = layouts.write_bids(tmp_path)
    with (root / "participants.tsv").open("a") as file:
        file.write("sub-01\t36.5\tF\tleuven\tMS\n")
    found = discover_any(root)
    assert "age" not in found.table  # nobody else has one
    assert found.table["sex"][0] == "F"
    assert "sub-01: two lines differ in age; left missing" in [why for _, why in found.skipped]


@pytest.mark.parametrize(
    ("kind", "pattern"), [("bids", "**/*T1w.nii.gz"), ("mmwhs", "**/*_image.nii.gz"), ("folder", "**/*T1*")]
)
def test_links_without_content_are_skipped(kind: str, pattern: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path)
    image = sorted(root.glob(pattern))[0]
    image.unlink()
    image.symlink_to(".git/annex/objects/absent")
    found = discover_any(root, kind)
    path = image.relative_to(root).as_posix()
    assert path not in found.table["image"].tolist()
    assert reasons(found)[path] == "link to a file that is not here"


@pytest.mark.parametrize(
    "change",
    [{"labels": {"0": "a", "1": "a"}}, {"test": "x"}, {"training": [{"image": "./imagesTr/a.nii.gz", "label": 3}]}],
)
def test_msd_impossible_entries_name_the_file(change: dict, tmp_path: Path) -> None:
    root = layouts.write_msd_prostate(tmp_path)
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError) as error:
        discover_any(root, "msd")
    assert "dataset.json" in str(error.value)


def test_bids_names_that_contradict_themselves_are_skipped(tmp_path: Path) -> None:
    root = layouts.write_bids(tmp_path)
    for name in ("sub-02_sub-03_T1w", "sub-01_T1w", "sub-02_orig T1w"):
        layouts.save(root / "sub-02" / "anat" / f"{name}.nii.gz", layouts.voxels(1, (4, 4, 4)))
    found = discover_any(root)
    assert len(found.table) == 4
    assert sum("no BIDS file name" in why for _, why in found.skipped) == 3


def test_nnunet_joins_channels_and_skips_incomplete_cases(tmp_path: Path) -> None:
    found = discover_any(layouts.write_nnunet(tmp_path))
    assert cells(found, "subject", "image", "split") == [
        ("case_001", "imagesTr/case_001_0000.nii.gz;imagesTr/case_001_0001.nii.gz", "train"),
        ("case_002", "imagesTr/case_002_0000.nii.gz;imagesTr/case_002_0001.nii.gz", "train"),
        ("case_101", "imagesTs/case_101_0000.nii.gz;imagesTs/case_101_0001.nii.gz", "test"),
    ]
    assert found.table["modality"][0] == "T2;ADC"
    assert found.table["label"].tolist() == ["labelsTr/case_001.nii.gz", "labelsTr/case_002.nii.gz", None]
    assert found.meta.label_names == {0: "background", 1: "PZ", 2: "TZ"}
    assert reasons(found)["imagesTr/case_003_0000.nii.gz"] == "dataset.json names 2 channels, found _0000"
    assert sum("label `" in why for path, why in found.skipped if path == "dataset.json") == 2


def test_folder_pattern_names_fields_and_finds_labels(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path)
    options = {"pattern": "images/{subject}_{session}_T1.nii.gz", "label": "labels/{subject}_{session}_seg.nii.gz"}
    found = discover_any(root, "folder", **options)
    assert cells(found, "subject", "session", "label") == [
        ("a", "s1", "labels/a_s1_seg.nii.gz"),
        ("a", "s2", None),
        ("b", "s1", "labels/b_s1_seg.nii.gz"),
    ]
    why = reasons(found)
    assert "not part of the pattern" in why["images/scout.nii.gz"]
    assert "is missing" in why["labels/a_s2_seg.nii.gz"]
    assert "notes.txt" in why


def test_folder_refuses_names_that_can_be_read_in_two_ways(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path)
    layouts.save(root / "images" / "c_x_s1_T1.nii.gz", layouts.voxels(1, (4, 4, 4)))
    found = discover_any(root, "folder", pattern="**/{subject}_{session}_T1.nii.gz")
    assert len(found.table) == 3
    assert "in two ways" in reasons(found)["images/c_x_s1_T1.nii.gz"]


def test_folder_without_pattern_takes_every_image_but_not_label_folders(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path)
    layouts.save(root / "more" / "scout.nii", layouts.voxels(1, (4, 4, 4)))
    found = discover_any(root)
    assert found.table["subject"].tolist() == [
        "images_a_s1_T1",
        "images_a_s2_T1",
        "images_b_s1_T1",
        "images_scout",
        "more_scout",
    ]
    assert "named like a folder of label maps" in reasons(found)["labels/a_s1_seg.nii.gz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "{session}.nii.gz"}, "no {subject}"),
        ({"pattern": "{subject}{session}.nii.gz"}, "touch"),
        ({"pattern": "{subject}_{image}.nii.gz"}, "cannot be a field"),
        ({"pattern": "{subject}.nii.gz", "label": "{person}_seg.nii.gz"}, "only use the fields"),
        ({"pattern": "{subject}.nii.gz", "label": "*_seg.nii.gz"}, "only use the fields"),
        ({"patern": "{subject}.nii.gz"}, "unknown option `patern`"),
    ],
)
def test_folder_patterns_that_cannot_work_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        discover_any(layouts.write_folder(tmp_path), "folder", **options)


def test_nothing_recognised_lists_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        discover_any(tmp_path)
    assert all(f"{name}: {cohort.looks_for}" in str(error.value) for name, cohort in COHORTS.items())
    with pytest.raises(DataError, match="does not exist"):
        discover_any(tmp_path / "absent")
    with pytest.raises(ConfigError, match="Did you mean `acdc`"):
        discover_any(tmp_path, "acdx")


def test_two_layouts_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    layouts.write_acdc(tmp_path)
    layouts.write_msd_prostate(tmp_path)
    with pytest.raises(DataError, match="more than one layout") as error:
        recognise_any(tmp_path)
    assert "--kind acdc or --kind msd" in str(error.value)


def test_options_given_as_text_are_converted_or_refused(tmp_path: Path) -> None:
    root = layouts.write_bids(tmp_path)
    assert len(discover_any(root, "bids", suffix="dseg", derivatives="true").table) == 1
    with pytest.raises(ConfigError, match="option `derivatives`"):
        discover_any(root, "bids", derivatives="perhaps")


def test_synthetic_same_seed_same_bytes_and_subjects_do_not_depend_on_their_number(tmp_path: Path) -> None:
    digests = {}
    for name, options in {"a": {}, "b": {}, "more": {"n_subjects": 4}, "other": {"seed": 1}}.items():
        found = discover_any(tmp_path / name, "synthetic", **{"n_subjects": 2, "sites": 2, **options})
        images = [(tmp_path / name / path).read_bytes() for path in found.table["image"][:2]]
        digests[name] = hashlib.sha256(b"".join(images)).hexdigest()
    assert digests["a"] == digests["b"] == digests["more"] != digests["other"]


def test_synthetic_cohort_is_listed_again_recognised_and_guarded(tmp_path: Path) -> None:
    first = discover_any(tmp_path / "a", "synthetic", n_subjects=3)
    again = discover_any(tmp_path / "a")
    assert again.cohort == "synthetic"
    assert first.table.equals(again.table)
    assert first.table["site"].tolist() == ["A", "B", "C"]
    with pytest.raises(DataError, match="another n_subjects"):
        discover_any(tmp_path / "a", n_subjects=4)
    (tmp_path / "a" / "labels" / "heart002.nii.gz").unlink()
    with pytest.raises(DataError, match="missing"):
        discover_any(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="no complete synthetic cohort"):
        discover_any(tmp_path / "b", "synthetic")
    with pytest.raises(ConfigError, match="out of range"):
        discover_any(tmp_path / "c", "synthetic", n_subjects=0, sites=9)
    assert not (tmp_path / "c").exists()


def best_threshold_dice(image: np.ndarray, truth: np.ndarray) -> float:
    """The best Dice of any interval of brightness, ends chosen with the truth in hand."""
    edges = np.percentile(image, np.linspace(0, 100, 41))
    inside = [np.histogram(image[truth], edges)[0], np.histogram(image, edges)[0]]
    true, total = (np.concatenate([[0], np.cumsum(part)]) for part in inside)
    spans = [(true[j] - true[i], total[j] - total[i]) for i in range(40) for j in range(i + 1, 41)]
    return max(2 * hit / (size + truth.sum()) for hit, size in spans)


def test_synthetic_cardiac_is_not_solved_by_a_threshold_and_changes_along_the_heart(tmp_path: Path) -> None:
    found = discover_any(tmp_path / "a", "synthetic", n_subjects=8, sites=4)
    scores: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for row in found.table.itertuples():
        image = np.asarray(nibabel.load(tmp_path / "a" / row.image).dataobj)
        label = np.asarray(nibabel.load(tmp_path / "a" / row.label).dataobj)
        assert image.shape == label.shape
        assert image.shape[:2] == (64, 64)
        assert set(np.unique(label)) == {0, 1, 2, 3}
        area = (label == 3).sum((0, 1))
        inner = np.flatnonzero(area)
        assert area[0] == 0 or inner[0] == 0  # the cavity is one run of slices, wider at the base than at the apex
        assert (np.diff(inner) == 1).all()
        assert area[inner[0]] > 2 * area[inner[-1]]
        for value, list_ in scores.items():
            list_.append(best_threshold_dice(image, label == value))
    assert {value: round(float(np.mean(s)), 2) < 0.6 for value, s in scores.items()} == {1: True, 2: True, 3: True}


def test_synthetic_volume_takes_less_than_a_fifth_of_a_second(tmp_path: Path) -> None:
    start = time.process_time()
    discover_any(tmp_path / "a", "synthetic", n_subjects=5)
    assert time.process_time() - start < 5 * 0.2


def test_synthetic_brain_ventricles_grow_with_age_and_sites_differ(tmp_path: Path) -> None:
    found = discover_any(tmp_path / "a", "synthetic", anatomy="brain", n_subjects=60, sites=2)
    dark, spread = [], []
    for path in found.table["image"]:
        image = np.asarray(nibabel.load(tmp_path / "a" / path).dataobj, dtype=float)
        assert image.shape == (32, 32, 32)
        centre = image[10:22, 8:24, 14:22]
        dark.append(float((centre < 0.75 * np.median(centre)).mean()))
        spread.append(float(np.median(centre)))
    age = found.table["age"].to_numpy()
    assert 20 <= age.min() < 35
    assert 65 < age.max() <= 80
    assert 0.6 < np.corrcoef(age, dark)[0, 1] < 0.99
    site = found.table["site"].to_numpy()
    assert np.median(np.array(spread)[site == "B"]) > 2 * np.median(np.array(spread)[site == "A"])
    assert set(found.table["sex"]) == {"F", "M"}


@pytest.mark.real_data
def test_real_hippocampus_folder(real_data: Path) -> None:
    options = {"pattern": "images/{subject}.nii.gz", "label": "labels/{subject}.nii.gz"}
    found = discover_any(real_data / "hippocampus", "folder", **options)
    assert len(found.table) == 199
    assert found.table["label"].notna().all()
    assert {path for path, _ in found.skipped} == {"README.md", "manifest.csv"}
