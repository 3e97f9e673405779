"""The reader of OpenBHB: whole and partial downloads, other spellings, people whom two lines contradict."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.core.errors import DataError
from medssl.data.cohorts import discover_any
from medssl.data.integrity import check_manifest
from medssl.data.manifest import read_manifest
from medssl.data.splits import TEST_SPLITS

HEADER = ("participant_id", "study", "sex", "age", "site", "siteXacq", "split", "tiv")
PEOPLE = (
    ("101", "1", "male", "21.5", "7", "70.0", "train", "1400.5"),
    ("102", "1", "female", "64", "7", "71.0", "train", "1300"),
    ("103", "1", "female", "30", "7", "70.0", "internal_test", "1350"),
    ("104", "2", "male", "45", "9", "n/a", "external_test", "1500"),
)
VBM = "preproc-cat12vbm_desc-gm_T1w"


def write_people(root: Path, rows=PEOPLE, header=HEADER) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "participants.tsv").write_text("\n".join("\t".join(row) for row in (header, *rows)) + "\n")


def write_array(root: Path, subject: str, folder: str, what: str = VBM, shape=(1, 8, 9, 7), session="1") -> Path:
    path = root / folder / "derivatives" / f"sub-{subject}" / f"ses-{session}" / f"sub-{subject}_{what}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(int(subject)).random(shape, dtype=np.float32))
    return path


def write_table(root: Path, folder: str, subjects, name="freesurfer_roi/desikan") -> Path:
    path = root / folder / "derivatives" / f"{name}_roi_features.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["participant_id,lh_a_thickness,rh_a_thickness", *(f"{s},{i}.5,{i}.25" for i, s in enumerate(subjects))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    write_people(tmp_path)
    for subject, folder in (("101", "train"), ("102", "train"), ("103", "val"), ("104", "val")):
        write_array(tmp_path, subject, folder)
    return tmp_path


def reasons(found) -> dict[str, str]:
    return {one.path: one.why for one in found.skipped}


def test_every_person_with_a_file_is_listed_with_site_split_age_and_sex(root):
    found = discover_any(root)
    assert (found.cohort, found.meta.cohort, found.skipped) == ("openbhb", "openbhb", [])
    assert found.table.drop(columns=["image", "session"]).to_dict("records")[0] == {
        "subject": "sub-101", "site": "70", "age": 21.5, "sex": "M", "split": "train",
        "centre": "7", "study": "1", "tiv": "1400.5",
    }  # fmt: skip
    assert found.table["site"].tolist() == ["70", "71", "70", None]  # external sites need not be known
    assert found.table["split"].tolist() == ["train", "train", "internal_test", "external_test"]
    assert set(found.table["split"]) - {"train"} <= set(TEST_SPLITS)


def test_scan_and_check_pass_on_arrays_with_their_leading_axis(root):
    done = CliRunner().invoke(app, ["data", "scan", str(root), "-o", str(root / "manifest.csv"), "--modality", "vbm"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("openbhb: found train/derivatives/")
    checked = check_manifest(read_manifest(root / "manifest.csv"), deep=True)
    assert checked.n_errors == 0
    assert set(checked.by_code) <= {"W-HEADER"}


def test_partial_download_says_who_is_missing(root):
    for path in (root / "val").rglob("*.npy"):
        path.unlink()
    write_array(root, "102", "train", "preproc-quasiraw_T1w")
    found = discover_any(root)
    assert found.table["subject"].tolist() == ["sub-101", "sub-102"]
    assert reasons(found) == {
        "sub-103": "in participants.tsv, but without vbm here",
        "sub-104": "in participants.tsv, but without vbm here",
        "train/derivatives/sub-102/ses-1/sub-102_preproc-quasiraw_T1w.npy": "holds quasiraw, asked for vbm",
    }
    assert discover_any(root, modality="quasiraw").table["subject"].tolist() == ["sub-102"]
    with pytest.raises(DataError, match=r"no volume found in the OpenBHB \(roi_desikan\) layout"):
        discover_any(root, modality="roi_desikan")


def test_spelling_of_ids_columns_and_missing_values_does_not_matter(root):
    header = ("Participant_ID", "AGE", "Gender", "Site", "Set")
    rows = [("sub-101", "21.5", "m", "3.0", "train"), ("103", "N/A", "", "unknown", "internal_test")]
    write_people(root, rows, header)
    table = discover_any(root).table
    assert table["subject"].tolist() == ["sub-101", "sub-103"]
    assert table["site"].tolist() == ["3", None]
    assert table["sex"].tolist() == ["M", None]
    assert np.isnan(table["age"][1])
    assert "centre" not in table


def test_people_whom_two_lines_contradict_are_left_out_and_named(root):
    extra = [
        ("sub-101", "1", "male", "21.50", "7", "70", "train", "1400.5"),  # the same, written otherwise
        ("102", "1", "female", "65", "7", "71.0", "train", "1300"),
        ("103", "1", "female", "30", "7", "70.0", "train", "1350"),
        ("105", "1", "female", "30", "7", "70.0", "validation", "1350"),
    ]
    write_people(root, [*PEOPLE, *extra])
    found = discover_any(root)
    assert found.table["subject"].tolist() == ["sub-101", "sub-104"]
    why = reasons(found)
    assert why["participants.tsv, line 6"] == "sub-101 again, as in an earlier line"
    assert why["sub-102"] == "two lines of participants.tsv differ in age; left out"
    assert why["sub-103"] == "two lines of participants.tsv differ in split; left out"
    assert why["sub-105"].startswith("the split in participants.tsv is validation")
    assert [one for one in why.values() if one.startswith("of nobody")] != []


@pytest.mark.parametrize("age", ["-3", "264", "young"])
def test_ages_that_are_no_years_are_left_missing_and_named(root, age):
    write_people(root, [(*PEOPLE[0][:3], age, *PEOPLE[0][4:]), *PEOPLE[1:]])
    found = discover_any(root)
    assert np.isnan(found.table["age"][0])
    assert reasons(found)["sub-101"] == f"age '{age}' is no number of years; left missing"


def test_files_in_the_folder_of_another_split_are_left_out(root):
    write_array(root, "103", "train")
    found = discover_any(root)
    assert found.table["image"].str.startswith("val/").sum() == 2
    assert found.table["subject"].is_unique
    assert list(reasons(found).values()) == ["lies in train/, but the person's split is internal_test"]


def test_without_a_column_split_people_of_val_are_test_people(root):
    write_people(root, [row[:6] for row in PEOPLE], HEADER[:6])
    found = discover_any(root)
    assert found.table["split"].tolist() == ["train", "train", "test", "test"]
    assert reasons(found) == {"participants.tsv": "no column split: people of val/ are listed as `test`"}


def test_rows_of_tables_are_named_by_their_number(root):
    table = write_table(root, "train", ["sub-102", "999", "101"])
    write_table(root, "val", ["104", "103", "103", "101"])
    found = discover_any(root, modality="roi_desikan")
    assert found.table[["subject", "frame"]].values.tolist() == [["sub-101", 2], ["sub-102", 0], ["sub-104", 0]]
    assert set(found.table["image"]) == {f"{f}/derivatives/freesurfer_roi/{table.name}" for f in ("train", "val")}
    name = f"val/derivatives/freesurfer_roi/{table.name}"
    why = reasons(found)
    assert why[f"{name}, row 1 (sub-103)"] == why[f"{name}, row 2 (sub-103)"] == "several rows of one person; left out"
    assert why[f"{name}, row 3 (sub-101)"] == "lies in val/, but the person's split is train"
    assert why["sub-103"] == "in participants.tsv, but without roi_desikan here"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column participant_id"):
        discover_any(root, modality="roi_desikan")


def test_measures_come_from_one_kind_of_source_the_one_that_holds_more_people(root):
    what = "preproc-freesurfer_desc-desikan_ROI"
    for subject, folder in (("101", "train"), ("103", "val")):
        write_array(root, subject, folder, what, (7, 68))
    found = discover_any(root, modality="roi_desikan")
    assert found.table["subject"].tolist() == ["sub-101", "sub-103"]
    assert "frame" not in found.table
    write_table(root, "train", ["101", "102"])
    found = discover_any(root, modality="roi_desikan")
    assert found.table["subject"].tolist() == ["sub-101", "sub-102"]
    assert list(reasons(found).values()).count("the same measures are listed from the tables") == 2


@pytest.mark.parametrize(("text", "message"), [(None, "no participants.tsv"), ("age\tsex\n1\tM\n", "participant_id")])
def test_without_a_usable_table_of_participants_there_is_an_error(root, text, message):
    (root / "participants.tsv").unlink() if text is None else (root / "participants.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        discover_any(root, kind="openbhb")
