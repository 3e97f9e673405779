"""Predictions and their scores: the right file for each case, in the values of the label files, over nobody's data."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medssl.core.errors import ConfigError, DataError
from medssl.data.integrity import check_manifest
from medssl.data.manifest import ManifestMeta, read_manifest, write_manifest
from medssl.data.volume import write_nifti
from medssl.runs import predict as module
from medssl.runs.evaluate import evaluate_segmentation
from medssl.runs.predict import input_manifest, predict
from medssl.runs.scoring import native_label
from medssl.runs.volumes import LabelClass, listed_classes, named_classes, with_label_values
from medssl.transforms.preprocess import PrepareConfig

SHAPE = (4, 5, 6)


@dataclass(frozen=True)
class Threshold:
    """Stands for a fine-tuned network: 1 where the image is above 0.5; refuses what is named `bad`."""

    channels: int = 1

    def __call__(self, image, affine, *, where):
        del affine
        if where == "bad":
            raise DataError("cannot be segmented", where=where)
        return (image[0] > 0.5).astype(np.int16)


@pytest.fixture
def threshold(monkeypatch):
    monkeypatch.setattr(module, "load_segmenter", lambda path, device: Threshold())


def cohort(folder: Path, rows: list[dict], meta: ManifestMeta | None = None) -> Path:
    """A manifest whose images and labels are written: random images, labels of 0 and what `value` says."""
    rng = np.random.default_rng(0)
    for row in rows:
        value = row.pop("value", 1)
        write_nifti(folder / row["image"], rng.random(SHAPE), np.eye(4), dtype=np.float32)
        label = np.zeros(SHAPE, np.int16)
        label[1:3, 1:3, 1:4] = value
        if row.get("label"):
            write_nifti(folder / row["label"], label, np.eye(4), dtype=np.int16)
    write_manifest(pd.DataFrame(rows), meta or ManifestMeta(label_names={1: "heart"}), folder / "manifest.csv")
    return folder / "manifest.csv"


def people(*names: str, **more) -> list[dict]:
    return [{"subject": n, "image": f"images/{n}.nii.gz", "label": f"labels/{n}.nii.gz", **more} for n in names]


@pytest.mark.parametrize("folder", ["labels", "images"])
def test_predictions_never_replace_labels_or_images(tmp_path, threshold, folder):
    rows = people("a", "b")
    rows[0]["image"] = "images/other_name.nii.gz"  # the first case alone would be harmless
    manifest = cohort(tmp_path, rows)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    with pytest.raises(ConfigError, match="overwrite"):
        predict(tmp_path, manifest, tmp_path / folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")} == before


def test_two_inputs_of_one_name_are_refused(tmp_path):
    for name in ("scan.nii", "scan.nii.gz"):
        write_nifti(tmp_path / name, np.zeros(SHAPE), np.eye(4), dtype=np.int16)
    with pytest.raises(DataError, match="one file") as caught:
        input_manifest(tmp_path)
    assert "scan.nii.gz" in caught.value.found


def test_volume_that_fails_is_told_by_the_exit_code(tmp_path, threshold, monkeypatch, capsys):
    from medssl.cli.main import main

    manifest = cohort(tmp_path, people("good", "bad"))
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["medssl", "predict", str(tmp_path), str(manifest), "-o", str(out)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    assert "FAILED bad" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["good.nii.gz"]


def test_fourth_axis_of_a_lone_file_is_the_channels_of_the_network(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 2), np.float32), np.eye(4)), tmp_path / "t2_and_adc.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.eye(4)), tmp_path / "t2.nii.gz")
    channels = {
        name: input_manifest(tmp_path / name, channels=2).channels(0) for name in ("t2_and_adc.nii.gz", "t2.nii.gz")
    }
    assert channels == {"t2_and_adc.nii.gz": 2, "t2.nii.gz": None}
    assert (
        input_manifest(tmp_path / "t2_and_adc.nii.gz", channels=1).channels(0) is None
    )  # frames, of which one is asked


def scored(predictions: Path, manifest: Path, split: str | None = None) -> dict:
    return evaluate_segmentation(predictions, manifest, out=None, split=split, mapping={}).fields


def test_one_prediction_is_not_scored_for_two_rows(tmp_path):
    rows = [{"subject": n, "image": f"{n}/t1.nii.gz", "label": f"{n}/label.nii.gz"} for n in ("s1", "s2")]
    manifest = cohort(tmp_path, rows)
    write_nifti(tmp_path / "out" / "t1.nii.gz", np.zeros(SHAPE), np.eye(4), dtype=np.int16)
    with pytest.raises(DataError, match="2 of 2 cases have no prediction"):
        scored(tmp_path / "out", manifest)


def test_prediction_named_by_image_or_subject_is_found(tmp_path):
    rows = people("s1", "s2", session="x")
    rows[0]["image"] = "images/first.nii.gz"
    manifest = cohort(tmp_path, rows)
    for name, label in (("first", "s1"), ("s2", "s2")):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / f"{name}.nii.gz").write_bytes((tmp_path / "labels" / f"{label}.nii.gz").read_bytes())
    assert scored(tmp_path / "out", manifest)["dice"] == 1


def test_two_predictions_of_one_name_are_refused(tmp_path):
    manifest = cohort(tmp_path, people("s1"))
    for suffix in ("nii", "nii.gz"):
        write_nifti(tmp_path / "out" / f"s1.{suffix}", np.zeros(SHAPE), np.eye(4), dtype=np.int16)
    with pytest.raises(DataError, match="two predictions have one name"):
        scored(tmp_path / "out", manifest)


def test_split_of_a_manifest_without_one_is_an_error_not_everything(tmp_path):
    manifest = cohort(tmp_path, people("s1"))
    with pytest.raises(DataError, match="holds no split"):
        scored(tmp_path / "labels", manifest, split="test")


def test_class_numbers_are_not_scored_as_label_values(tmp_path):
    meta = ManifestMeta(label_names={205: "myocardium", 420: "left atrium"})
    manifest = cohort(tmp_path, people("s1", value=205), meta)
    write_nifti(tmp_path / "out" / "s1.nii.gz", np.ones(SHAPE), np.eye(4), dtype=np.int16)
    with pytest.raises(DataError, match="cannot be scored") as caught:
        scored(tmp_path / "out", manifest)
    assert "none of the label values [205, 420]" in caught.value.found


def aliased(tmp_path: Path, alias: str = "421=420") -> Path:
    meta = ManifestMeta(label_names={205: "myocardium", 420: "left atrium"})
    return cohort(tmp_path, people("s1", value=421, label_alias=alias), meta)


def test_stray_label_value_is_scored_as_what_it_means(tmp_path):
    manifest = read_manifest(aliased(tmp_path))
    assert set(np.unique(native_label(manifest, 0))) == {0, 420}
    write_nifti(tmp_path / "out" / "s1.nii.gz", native_label(manifest, 0), np.eye(4), dtype=np.int16)
    assert scored(tmp_path / "out", manifest.path)["classes"]["left atrium"]["dice"] == 1
    assert not [one for one in check_manifest(manifest, deep=True).findings if one.code == "E-LABEL-UNKNOWN"]


@pytest.mark.parametrize(("alias", "message"), [("421-420", "cannot be understood"), ("421=500", "does not name")])
def test_alias_that_says_nothing_is_one_message(tmp_path, alias, message):
    manifest = read_manifest(aliased(tmp_path, alias))
    with pytest.raises(DataError, match=message):
        with_label_values(PrepareConfig(), named_classes(manifest), manifest)


def test_label_values_against_the_names_are_refused(tmp_path):
    manifest = read_manifest(aliased(tmp_path))
    classes = named_classes(manifest)
    right = PrepareConfig(label_values={0: 0, 205: 1, 420: 2, 421: 2})
    assert with_label_values(right, classes, manifest).label_values == right.label_values
    swapped = PrepareConfig(label_values={205: 2, 420: 1, 421: 1})
    with pytest.raises(ConfigError, match="otherwise than the names"):
        with_label_values(swapped, classes, manifest)


def test_label_values_without_names_give_the_values_of_the_files():
    listed = listed_classes(PrepareConfig(label_values={0: 0, 420: 1, 205: 2}))
    assert listed == (LabelClass(1, 420, "label 420"), LabelClass(2, 205, "label 205"))
    with pytest.raises(ConfigError, match="several values"):
        listed_classes(PrepareConfig(label_values={205: 1, 420: 1}))
