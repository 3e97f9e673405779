"""The path from real volumes to scores: hippocampus crops, split by person, two steps of training."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medssl.config import FinetuneConfig, PretrainConfig
from medssl.core.errors import DataError
from medssl.core.schema import validate
from medssl.runs import cohort
from medssl.runs.finetune import finetune
from medssl.runs.predict import predict
from medssl.runs.pretrain import pretrain

STRIDES = [[2, 2, 2], [2, 2, 2]]
ENCODER = {"name": "unet3d", "widths": [4, 8, 8], "strides": STRIDES}


@pytest.fixture(scope="module")
def few_people(real_data, tmp_path_factory):
    """A manifest of 12 people of the real cohort, split by person."""
    folder = tmp_path_factory.mktemp("hippocampus")
    table = pd.read_csv(real_data / "hippocampus" / "manifest.csv")
    table = table[table["person"].isin(sorted(table["person"].unique())[:12])]
    for name in ("image", "label"):
        table[name] = [str(real_data / "hippocampus" / path) for path in table[name]]
    table.to_csv(folder / "all.csv", index=False)
    cohort.split(
        folder / "all.csv",
        test=3,
        validation=2,
        seed=0,
        stratify=("intensity_group",),
        mapping={"group": "person"},
        out=folder / "manifest.csv",
        force=False,
    )
    return folder


def run_settings(folder, **sections):
    return {
        "runs": str(folder / "runs"),
        "data": {
            "manifest": str(folder / "manifest.csv"),
            "map": {"group": "person"},
            "cache": str(folder / "cache"),
            "prepare": {"size": [32, 40, 32]},
        },
        "optimizer": {"name": "adamw"},
        "training": {"steps": 2, "workers": 0, "accelerator": "cpu"},
        **sections,
    }


@pytest.mark.real_data
def test_no_person_is_on_two_sides_of_the_split(few_people):
    table = pd.read_csv(few_people / "manifest.csv")
    assert (table.groupby("person")["split"].nunique() == 1).all()
    assert set(table["split"]) == {"train", "validation", "test"}


@pytest.mark.real_data
def test_pretraining_then_fine_tuning_scores_real_volumes_in_their_own_geometry(few_people):
    pretraining = run_settings(
        few_people,
        name="gcl",
        items={"geometry": "slab", "depth": 16, "partitions": 4, "slice_axis": 1},
        model={"encoder": ENCODER},
        method={"name": "gcl", "strategy": "gd", "pool": "avg", "hidden_dim": 16, "projection_dim": 8},
        sampler={"name": "partition", "n_volumes": 2},
        views={"preset": "gcl", "n_views": 3, "original": True},
    )
    pretrained = pretrain(validate(PretrainConfig, pretraining, source="test"))
    assert np.isfinite(pretrained.summary["last"]["loss"])

    tuning = run_settings(
        few_people,
        name="few",
        items={"geometry": "volume", "slice_axis": 0},
        model={"encoder": ENCODER},
        task={"name": "segmentation"},
        batch_size=2,
        views={"preset": "segmentation", "n_views": 1},
        grid={
            "arms": [{"name": "scratch"}, {"name": "gcl", "weights": str(few_people / "runs" / "gcl")}],
            "n_labelled": [1],
            "draws": 1,
            "n_validation": 1,
            "upper_bound": False,
        },
    )
    done = finetune(validate(FinetuneConfig, tuning, source="test"))
    rows = pd.read_csv(done.folder / "eval" / "per_case.csv")
    manifest = pd.read_csv(few_people / "manifest.csv").set_index("subject")
    test = manifest[manifest["split"] == "test"]
    assert set(rows["subject"]) == set(test.index)
    assert len(rows) == 2 * 2 * len(test)  # arms x classes x volumes
    for subject in test.index:
        image = nib.load(test.loc[subject, "image"])
        predicted = nib.load(done.folder / "predictions" / "gcl-n1-draw1-seed0" / f"{subject}.nii.gz")
        assert predicted.shape == image.shape
        np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-4)
        label = np.asarray(nib.load(test.loc[subject, "label"]).dataobj).round().astype(int)
        row = rows[(rows["subject"] == subject) & (rows["arm"] == "gcl") & (rows["class"] == "label 1")]
        voxels = np.asarray(predicted.dataobj) == 1
        overlap = 2 * np.count_nonzero(voxels & (label == 1)) / (voxels.sum() + np.count_nonzero(label == 1))
        assert row["dice"].item() == pytest.approx(overlap, abs=1e-6)

    cell = done.folder / "cells" / "gcl-n1-draw1-seed0"
    again = predict(cell, few_people / "manifest.csv", few_people / "predicted")
    assert not again.failed
    first = next(iter(test.index))
    np.testing.assert_array_equal(
        np.asarray(nib.load(few_people / "predicted" / f"{first}.nii.gz").dataobj),
        np.asarray(nib.load(done.folder / "predictions" / "gcl-n1-draw1-seed0" / f"{first}.nii.gz").dataobj),
    )


@pytest.mark.real_data
def test_pretraining_on_test_people_is_refused(few_people):
    leaking = run_settings(
        few_people,
        name="leak",
        items={"geometry": "volume", "slice_axis": 0},
        model={"encoder": ENCODER},
        method={"name": "simclr"},
        sampler={"name": "random", "batch_size": 2},
        views={"n_views": 2},
    )
    leaking["data"]["splits"] = None
    with pytest.raises(DataError, match="leak"):
        pretrain(validate(PretrainConfig, leaking, source="test"))
    assert not (few_people / "runs" / "leak").exists()


@pytest.mark.real_data
def test_oblique_anisotropic_heads_are_segmented_in_their_own_geometry(real_data, few_people):
    """The cell of the test above predicts a head it was never meant for: only the geometry is looked at."""
    cell = few_people / "runs" / "few" / "cells" / "scratch-n1-draw1-seed0"
    if not cell.is_dir():
        pytest.skip("the test that fine-tunes did not run")
    head = sorted((real_data / "brain-t1-age" / "images").glob("*.nii.gz"))[0]
    result = predict(cell, head, few_people / "heads")
    predicted, image = nib.load(result.written[0]), nib.load(head)
    assert predicted.shape == image.shape
    np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-3)
