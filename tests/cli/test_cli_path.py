"""The real command line, from a folder of volumes to a report; each command is a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from small_runs import ENCODER, SIZE, contents, finetune_values, pretrain_values, write_yaml

from medssl.cli.main import main
from medssl.data.cohorts.synthetic import generate


def medssl(*arguments: object, expect: int = 0) -> str:
    """What a real process prints."""
    done = subprocess.run(
        [sys.executable, "-m", "medssl.cli.main", *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def here(capsys, *arguments: object, expect: int = 0) -> str:
    """The same entry point in this process, which spares the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    out, err = capsys.readouterr()
    assert (left.value.code or 0) == expect, err
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    generate(folder / "data", "cardiac", n_subjects=8, size=SIZE, n_slices=(5, 5), seed=3)
    return folder


def test_help_imports_neither_torch_nor_monai():
    code = (
        "import sys; sys.argv = ['medssl', '--help']\n"
        "from medssl.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'monai', 'pandas'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("data", "init", "pretrain", "finetune", "predict", "evaluate", "report", "doctor", "demo"):
        assert verb in done.stdout


def test_from_a_folder_of_volumes_to_a_report(root, capsys):
    manifest, cell = root / "manifest.csv", root / "runs" / "finetune" / "cells" / "gcl-n1-draw1-seed0"
    scanned = json.loads(medssl("data", "scan", root / "data", "-o", manifest, "--json"))
    assert (scanned["cohort"], scanned["n_volumes"], scanned["n_labelled"]) == ("synthetic", 8, 8)
    checked = json.loads(here(capsys, "data", "check", manifest, "--deep", "--json"))
    assert checked["n_errors"] == 0
    here(capsys, "data", "split", manifest, "--test", 2, "--seed", 1)
    assert pd.read_csv(manifest)["split"].value_counts().to_dict() == {"train": 6, "test": 2}
    here(capsys, "data", "show", manifest, "-o", root / "montage.png", "--n", 4)
    assert (root / "montage.png").read_bytes().startswith(b"\x89PNG")

    config = write_yaml(root / "gcl.yaml", pretrain_values(manifest, root))
    trained = json.loads(medssl("pretrain", config, "--set", "training.steps=4", "--json"))
    assert trained["steps"] == 4
    assert np.isfinite(trained["last"]["loss"])
    assert trained["n_volumes"] == 6

    arms = [{"name": "scratch"}, {"name": "gcl", "weights": str(root / "runs" / "gcl")}]
    grid = {"arms": arms, "n_labelled": [1], "draws": 1, "n_validation": 1, "upper_bound": False}
    config = write_yaml(root / "finetune.yaml", finetune_values(manifest, root, grid=grid))
    tuned = json.loads(medssl("finetune", config, "--json"))
    assert [(row["arm"], row["n_labelled"]) for row in tuned["table"]] == [("scratch", 1), ("gcl", 1)]
    assert all(0 <= row["mean"] <= 1 for row in tuned["table"])
    assert tuned["verdict"]
    assert Path(tuned["report"]).read_text().startswith("<!")

    medssl("predict", cell, root / "data" / "images", "-o", root / "predicted")
    images = sorted((root / "data" / "images").glob("*.nii.gz"))
    for path in images:
        image, label = nibabel.load(path), nibabel.load(root / "predicted" / path.name)
        assert label.shape == image.shape
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-5)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2, 3}

    scored = json.loads(
        here(
            capsys, "evaluate", "seg", root / "predicted", manifest, "--split", "test", "-o", root / "scores", "--json"
        )
    )
    own = pd.read_csv(cell / "per_case.csv")
    assert scored["dice"] == pytest.approx(own.groupby("class")["dice"].mean().mean(), abs=1e-6)
    assert len(pd.read_csv(root / "scores" / "per_case.csv")) == len(own) == 6
    assert "report.html" in here(capsys, "report", root / "runs" / "finetune")


def test_sigterm_exits_75_and_resuming_gives_the_weights_of_an_undisturbed_run(root):
    manifest = root / "data" / "manifest.csv"
    for name in ("calm", "stopped"):
        values = pretrain_values(manifest, root, name=name, model={"encoder": {**ENCODER, "widths": [8, 16, 16]}})
        values["training"] = {"steps": 60, "accelerator": "cpu", "log_every": 1, "workers": 2}
        write_yaml(root / f"{name}.yaml", values)
    folder = root / "runs" / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "medssl.cli.main", "pretrain", str(root / "stopped.yaml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_rows(folder / "logs" / "metrics.csv", 5, process)
        os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert not (folder / "weights").exists()

    medssl("pretrain", root / "stopped.yaml", "--resume")
    medssl("pretrain", root / "calm.yaml")
    calm = root / "runs" / "calm"
    assert contents(folder / "weights") == contents(calm / "weights")
    assert (folder / "weights" / "encoder.safetensors").stat().st_size > 1000
    losses = [pd.read_csv(run / "logs" / "metrics.csv")[["step", "loss"]] for run in (folder, calm)]
    pd.testing.assert_frame_equal(*losses, check_exact=True)
    assert losses[0]["step"].tolist() == list(range(1, 61))


def wait_for_rows(path: Path, rows: int, process: subprocess.Popen) -> None:
    """Until a run has logged a few steps; fails when it ends before."""
    for _ in range(2000):
        if path.is_file() and len(path.read_text().splitlines()) > rows:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError("the run did not begin to train")
