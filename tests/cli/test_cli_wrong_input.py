"""Wrong input at the command line: one cause, one place, one remedy, the right exit code, and nothing harmed."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import contents, finetune_values, pretrain_values, small_cohort, write_yaml

from medssl.cli.main import main
from medssl.config import PretrainConfig
from medssl.core.schema import validate
from medssl.runs.pretrain import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("wrong")


@pytest.fixture(scope="module")
def manifest(root) -> Path:
    return small_cohort(root / "data")


@pytest.fixture(scope="module")
def pretrained(root, manifest) -> Path:
    """The folder of a finished pretraining, which nothing below may touch."""
    return pretrain(validate(PretrainConfig, pretrain_values(manifest, root), source="test")).folder


@pytest.fixture
def refused(capsys, monkeypatch, root):
    """Run a command that must fail; returns its message."""

    def run(*arguments: object, code: int) -> str:
        before = contents(root / "runs")
        monkeypatch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        assert "Traceback" not in out + err
        assert "Unexpected" not in err
        after = contents(root / "runs")
        assert {name: after.get(name) for name in before} == before
        return err

    return run


def changed(manifest: Path, name: str, change) -> Path:
    """A copy of the manifest beside it with another table."""
    table = pd.read_csv(manifest)
    path = manifest.with_name(f"{name}.csv")
    change(table).to_csv(path, index=False)
    path.with_suffix("").with_suffix(".meta.yaml").write_bytes(manifest.with_suffix(".meta.yaml").read_bytes())
    return path


def test_unknown_key_names_the_nearest(root, manifest, refused):
    values = pretrain_values(manifest, root, name="unknown")
    values["method"]["temprature"] = 0.2
    message = refused("pretrain", write_yaml(root / "unknown.yaml", values), code=2)
    assert "temprature" in message
    assert "Did you mean `temperature`?" in message
    assert "unknown.yaml" in message


def test_missing_manifest(root, refused):
    config = write_yaml(root / "missing.yaml", pretrain_values(root / "nowhere.csv", root, name="missing"))
    message = refused("pretrain", config, code=3)
    assert "nowhere.csv" in message
    assert "fix:" in message
    assert not (root / "runs" / "missing").exists()


def test_missing_and_broken_configuration(root, refused):
    assert "none.yaml" in refused("pretrain", root / "none.yaml", code=2)
    (root / "broken.yaml").write_text("a: [1, 2\nb: 3\n")
    message = refused("finetune", root / "broken.yaml", code=2)
    assert "broken.yaml" in message
    assert "line" in message


def test_more_labels_asked_than_volumes(root, manifest, refused):
    grid = {"n_labelled": [1, 20], "draws": 1, "n_validation": 1, "upper_bound": False}
    config = write_yaml(root / "labels.yaml", finetune_values(manifest, root, name="labels", grid=grid))
    message = refused("finetune", config, code=3)
    assert "6 groups with labels; 20 for training" in message
    assert "fix:" in message


def test_fewer_slices_than_partitions(root, manifest, refused):
    values = pretrain_values(manifest, root, name="slices", items={"geometry": "slice", "partitions": 9})
    message = refused("pretrain", write_yaml(root / "slices.yaml", values), code=3)
    assert "fewer slices than there are partitions (5 < 9)" in message
    assert "heart001" in message
    assert "items.partitions" in message


def test_person_on_both_sides(root, manifest, refused):
    def one_person(table: pd.DataFrame) -> pd.DataFrame:
        rows = [table.index[table["split"] == name][0] for name in ("train", "test")]
        table["group"] = table["subject"]
        table.loc[rows, "group"] = "same person"
        return table

    both = changed(manifest, "both", one_person)
    for verb, values in (("pretrain", pretrain_values), ("finetune", finetune_values)):
        config = write_yaml(root / "both.yaml", values(both, root, name=f"both-{verb}"))
        message = refused(verb, config, code=3)
        assert "same person" in message
        assert "fix:" in message


def test_pretraining_that_saw_test_people_is_refused_in_finetuning(root, manifest, refused):
    values = pretrain_values(manifest, root, name="everyone")
    values["data"] |= {"splits": None, "transductive": True}
    weights = pretrain(validate(PretrainConfig, values, source="test")).folder
    grid = {"arms": [{"name": "leak", "weights": str(weights)}], "n_labelled": [1], "draws": 1, "n_validation": 1}
    config = write_yaml(root / "leak.yaml", finetune_values(manifest, root, name="leak", grid=grid))
    message = refused("finetune", config, code=3)
    assert "pretrain" in message
    assert "transductive" in message


def test_weights_of_another_architecture(root, manifest, pretrained, refused):
    arms = [{"name": "other", "weights": str(pretrained)}]
    grid = {"arms": arms, "n_labelled": [1], "draws": 1, "n_validation": 1, "upper_bound": False}
    values = finetune_values(manifest, root, name="other", grid=grid)
    values["model"] = {"encoder": {"name": "unet2d", "widths": [6, 12, 24], "norm": "group"}}
    message = refused("finetune", write_yaml(root / "other.yaml", values), code=1)
    assert str(pretrained) in message
    assert "fix:" in message


def test_existing_run_folder(root, manifest, pretrained, refused):
    config = write_yaml(root / "again.yaml", pretrain_values(manifest, root))
    message = refused("pretrain", config, code=2)
    assert "exists already" in message
    assert "--resume" in message
    assert str(pretrained) in message


def test_run_folder_of_another_kind(root, manifest, pretrained, refused):
    config = write_yaml(root / "kind.yaml", finetune_values(manifest, root, name=pretrained.name))
    assert "holds a pretrain run" in refused("finetune", config, "--resume", code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_asked_where_there_is_none(root, manifest, refused):
    config = write_yaml(root / "gpu.yaml", pretrain_values(manifest, root, name="gpu"))
    message = refused("pretrain", config, "--accelerator", "gpu", code=2)
    assert "GPU" in message
    assert "fix:" in message
    assert not (root / "runs" / "gpu").exists()


def test_empty_split(root, manifest, refused):
    values = finetune_values(manifest, root, name="empty", evaluate_on="validation")
    message = refused("finetune", write_yaml(root / "empty.yaml", values), code=3)
    assert "validation" in message
    assert "medssl data split" in message


def test_truncated_volume(root, manifest, tmp_path, refused):
    cohort = small_cohort(tmp_path / "data", n_subjects=6, n_test=2)
    broken = sorted((tmp_path / "data" / "images").glob("*.nii.gz"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    values = pretrain_values(cohort, root, name="truncated")
    values["data"] |= {"splits": None, "transductive": True, "cache": str(tmp_path / "cache")}
    message = refused("pretrain", write_yaml(root / "truncated.yaml", values), code=3)
    assert broken.name in message
    assert "fix:" in message


def test_check_finds_the_truncated_volume(tmp_path, root, capsys, monkeypatch):
    cohort = small_cohort(tmp_path / "data", n_subjects=6, n_test=2)
    broken = sorted((tmp_path / "data" / "images").glob("*.nii.gz"))[2]
    broken.write_bytes(broken.read_bytes()[:-40])
    monkeypatch.setattr(sys, "argv", ["medssl", "data", "check", str(cohort), "--deep"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    assert broken.name in capsys.readouterr().out


def test_predict_without_a_network(root, pretrained, manifest, refused, tmp_path):
    message = refused("predict", pretrained, manifest, "-o", tmp_path / "out", code=1)
    assert "cell" in message
    assert not (tmp_path / "out").exists()


def test_override_that_is_no_override(root, manifest, refused):
    config = write_yaml(root / "override.yaml", pretrain_values(manifest, root, name="override"))
    assert "KEY=VALUE" in refused("pretrain", config, "--set", "training.steps", code=2)
    assert "runs/NAME" not in refused("pretrain", config, "--set", "name=../out", code=2)


def test_real_process_fails_with_one_message(root):
    done = subprocess.run(
        [sys.executable, "-m", "medssl.cli.main", "data", "check", str(root / "nowhere.csv")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("DataError: ")
    assert "Traceback" not in done.stderr
    assert "nowhere.csv" in done.stderr
