import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from small_runs import contents, finetune_values, pretrain_values, small_cohort

from medssl.config import FinetuneConfig, PretrainConfig
from medssl.core.errors import CheckpointError, ConfigError, DataError
from medssl.core.schema import validate
from medssl.runs.finetune import finetune
from medssl.runs.pretrain import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def manifest(root) -> Path:
    return small_cohort(root / "data")


def settings(manifest, root, **changes) -> FinetuneConfig:
    return validate(FinetuneConfig, finetune_values(manifest, root, **changes), source="test")


@pytest.fixture(scope="module")
def finished(root, manifest):
    """A grid that ran to its end, and its folder."""
    return finetune(settings(manifest, root))


def test_finished_grid_holds_what_the_run_folder_promises(finished):
    folder = finished.folder
    cells = ["scratch-n1-draw1-seed0", "scratch-n2-draw1-seed0"]
    assert sorted(path.name for path in (folder / "cells").iterdir()) == cells
    per_case = pd.read_csv(folder / "eval" / "per_case.csv")
    assert per_case.groupby("n_labelled").size().to_dict() == {1: 9, 2: 9}  # 3 test people, 3 structures
    assert per_case["dice"].between(0, 1).all()
    assert len(list((folder / "predictions").rglob("*.nii.gz"))) == 6
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert finished.report.stat().st_size > 10_000


def test_training_validation_and_test_people_are_distinct(finished, manifest):
    table = pd.read_csv(manifest).set_index("subject")
    for result in (finished.folder / "cells").glob("*/result.json"):
        cell = json.loads(result.read_text())
        train, validation = cell["result"]["train"], cell["result"]["validation"]
        assert len(train) == cell["cell"]["n_labelled"]
        assert len(validation) == 1
        assert not set(train) & set(validation)
        assert set(table.loc[[*train, *validation], "split"]) == {"train"}


def test_resuming_a_finished_grid_repeats_nothing(finished, root, manifest):
    before = {path: path.stat().st_mtime_ns for path in (finished.folder / "cells").rglob("*") if path.is_file()}
    again = finetune(settings(manifest, root), resume=True)
    assert again.summary == finished.summary
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_changed_settings_are_refused_and_harm_nothing(finished, root, manifest):
    before = contents(finished.folder)
    with pytest.raises(ConfigError, match="other settings"):
        finetune(settings(manifest, root, optimizer={"learning_rate": 0.01}), resume=True)
    assert contents(finished.folder) == before


def test_other_label_fractions_add_cells_to_a_finished_grid(finished, root, manifest):
    grid = {"n_labelled": [1, 2, 3], "draws": 1, "n_validation": 1, "upper_bound": False}
    before = contents(finished.folder / "cells")
    wider = finetune(settings(manifest, root, grid=grid), resume=True)
    assert [row["n_labelled"] for row in wider.summary["table"]] == [1, 2, 3]
    assert contents(finished.folder / "cells").items() >= before.items()


def test_two_processes_give_what_one_gives(finished, root, manifest):
    grid = {"n_labelled": [1, 2], "draws": 1, "n_validation": 1, "upper_bound": False, "jobs": 2}
    parallel = finetune(settings(manifest, root, name="parallel", grid=grid))
    for cell in ("scratch-n1-draw1-seed0", "scratch-n2-draw1-seed0"):
        for file in ("per_case.csv", "weights/network.safetensors"):
            one, two = finished.folder / "cells" / cell / file, parallel.folder / "cells" / cell / file
            assert one.read_bytes() == two.read_bytes()


def test_arms_share_the_draw_and_only_the_pretrained_one_loads_weights(root, manifest):
    pretrained = pretrain(validate(PretrainConfig, pretrain_values(manifest, root), source="test"))
    arms = [{"name": "scratch"}, {"name": "gcl", "weights": str(pretrained.folder)}]
    grid = {"arms": arms, "n_labelled": [1], "draws": 1, "n_validation": 1, "upper_bound": True}
    done = finetune(settings(manifest, root, name="arms", grid=grid))
    results = {
        path.parent.name: json.loads(path.read_text())["result"]
        for path in (done.folder / "cells").glob("*/result.json")
    }
    scratch, gcl = results["scratch-n1-draw1-seed0"], results["gcl-n1-draw1-seed0"]
    assert scratch["train"] == gcl["train"]
    assert scratch["validation"] == gcl["validation"]
    assert scratch["weights"] == {}
    assert gcl["weights"]["encoder"]["matched"] > 0
    assert gcl["weights"]["encoder"]["missing"] == 0
    bound = next(result for name, result in results.items() if name.startswith("upper_bound"))
    assert len(bound["train"]) == 5  # 6 training people less one for validation
    assert done.summary["upper_bound"]["n_labelled"] == 5
    assert {row["arm"] for row in done.summary["paired"]} == {"gcl"}


def test_refused_resumption_of_a_pretraining_harms_nothing(root, manifest):
    values = pretrain_values(manifest, root, name="refused")
    folder = pretrain(validate(PretrainConfig, values, source="test")).folder
    before = contents(folder)
    with pytest.raises(CheckpointError, match="changed"):
        pretrain(validate(PretrainConfig, {**values, "seed": 1}, source="test"), resume=True)
    assert contents(folder) == before


def test_more_labels_than_people(root, manifest):
    grid = {"n_labelled": [6], "draws": 1, "n_validation": 1, "upper_bound": False}
    with pytest.raises(DataError, match="more labelled volumes are asked for") as caught:
        finetune(settings(manifest, root, name="too-many", grid=grid))
    assert caught.value.fix
    assert not (root / "runs" / "too-many").exists()


def test_a_label_file_edited_between_two_sittings_is_not_mixed_in(tmp_path):
    """The manifest is the same; only the content of one training label changed."""
    manifest = small_cohort(tmp_path / "data")
    config = validate(FinetuneConfig, finetune_values(manifest, tmp_path), source="test")
    finetune(config)
    train = next(iter((tmp_path / "runs/finetune/cells").glob("scratch-n1-*"))) / "result.json"
    case = json.loads(train.read_text())["result"]["train"][0]
    table = pd.read_csv(manifest)
    label = manifest.parent / table.loc[table["subject"] == case.split("_")[0], "label"].iloc[0]
    image = nib.load(label)
    voxels = np.asarray(image.dataobj).copy()
    voxels[:4] = 0
    nib.save(nib.Nifti1Image(voxels, image.affine), label)
    with pytest.raises(ConfigError, match="other settings or data"):
        finetune(config, resume=True)


def test_a_label_value_without_a_name_is_refused_before_training_and_names_the_case(tmp_path):
    manifest = small_cohort(tmp_path / "data")
    label = manifest.parent / pd.read_csv(manifest)["label"].iloc[0]
    image = nib.load(label)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(voxels, image.affine), label)
    config = validate(FinetuneConfig, finetune_values(manifest, tmp_path), source="test")
    with pytest.raises(DataError, match=r"found: 9(.|\n)*label_names") as caught:
        finetune(config)
    assert pd.read_csv(manifest)["subject"].iloc[0] in str(caught.value)
    assert not (tmp_path / "runs").exists()
