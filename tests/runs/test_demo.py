import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import contents

from medssl.config import FinetuneConfig, PretrainConfig, load_config
from medssl.core.errors import ConfigError
from medssl.runs.demo import FULL, QUICK, SMOKE, SYNTHETIC, demo, run_demo, write_configs

TINY = dataclasses.replace(QUICK, n_subjects=7, n_test=2, gcl_steps=2, lcl_steps=2, finetune_steps=2, n_labelled=(1,))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished demo, and what it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    outcome = run_demo(out, TINY, smoke=True)
    assert torch.get_num_threads() == threads
    return out, outcome


def test_ends_with_the_report_and_a_plain_verdict(done):
    out, outcome = done
    lines = outcome.text().splitlines()
    summary = json.loads((out / "finetune" / "eval" / "summary.json").read_text())
    assert lines[0] == f"report: {out / 'finetune' / 'report.html'}"
    assert Path(outcome.to_json()["report"]).stat().st_size > 10_000
    assert summary["verdict"] in lines
    assert SYNTHETIC in lines
    assert SMOKE in lines
    assert {row["arm"] for row in outcome.to_json()["table"]} == {"scratch", "pretrained"}


def test_report_says_that_the_data_are_synthetic(done):
    page = (done[0] / "finetune" / "report.html").read_text()
    assert SYNTHETIC in page
    assert SMOKE in page
    assert "not finished" not in page


def test_pretraining_never_saw_test_people(done):
    out = done[0]
    test = set(pd.read_csv(out / "manifest.csv").query("split == 'test'")["subject"])
    assert len(test) == 2
    for run in ("gcl", "lcl"):
        assert not test & set(pd.read_csv(out / run / "manifest.csv")["subject"])


def test_running_again_repeats_nothing(done):
    out, outcome = done
    cells, data, weights = (contents(out / name) for name in ("finetune/cells", "data", "lcl/weights"))
    again = run_demo(out, TINY, smoke=True)
    assert again.to_json()["table"] == outcome.to_json()["table"]
    assert contents(out / "finetune/cells") == cells
    assert contents(out / "data") == data
    assert contents(out / "lcl/weights") == weights


def test_folder_of_something_else_is_refused_and_left_alone(done, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="something else"):
        demo(tmp_path, smoke=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    before = contents(done[0])
    with pytest.raises(ConfigError, match="other settings"):
        demo(done[0])
    assert contents(done[0]) == before


def test_interrupted_generation_is_begun_again(tmp_path, monkeypatch):
    from medssl.data.cohorts import synthetic

    def stopped(*arguments, **settings):
        (tmp_path / "out" / "data" / "images").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "out", TINY, smoke=True)
    assert run_demo(tmp_path / "out", TINY, smoke=True).to_json()["table"]


def test_written_configurations_are_complete_runs(tmp_path):
    out = tmp_path / "a folder: with 'odd' # characters"
    files = write_configs(out, FULL)
    gcl, lcl = (load_config(PretrainConfig, files[name]) for name in ("gcl", "lcl"))
    tuned = load_config(FinetuneConfig, files["finetune"])
    assert gcl.data.manifest == out / "manifest.csv"
    assert lcl.weights == out / "gcl"
    assert [arm.weights for arm in tuned.grid.arms] == [None, out / "lcl"]
    assert gcl.model.encoder == lcl.model.encoder == tuned.model.encoder
    assert (tuned.grid.draws, tuned.grid.n_labelled) == (3, (1, 2))
