"""A few-label comparison on a small generated cohort: what it leaves, resuming, parts, failures, what is refused."""

import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from small_runs import ENCODER, SIZE, small_cohort, write_yaml
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import CompareConfig
from medssl.core.errors import ConfigError, DataError, Interrupted
from medssl.core.files import read_yaml
from medssl.core.schema import validate
from medssl.runs import pretrain
from medssl.runs.compare import compare
from medssl.runs.few_label import open_plan
from medssl.runs.parts import Part, read_part

GCL = {"name": "gcl", "pool": "avg", "hidden_dim": 8, "projection_dim": 8}
SIMCLR = {"name": "simclr", "hidden_dim": 8, "projection_dim": 8}
LOCAL = {"method": {"name": "lcl", "n_negatives": 2}, "sampler": {"name": "random", "batch_size": 3},
         "views": {"preset": "intensity"}, "decoder_blocks": 1}  # fmt: skip
GLOBAL = {"method": GCL, "sampler": {"name": "partition", "n_volumes": 2}, "views": {"n_views": 3, "original": True},
          "items": {"geometry": "slice", "partitions": 2}}  # fmt: skip
ARMS = [
    {"name": "scratch"},
    {"name": "simclr", "method": SIMCLR},
    {"name": "both", "stages": [{**GLOBAL, "share": 0.75}, {**LOCAL, "share": 0.25}]},
]


def plan_values(manifest: Path, root: Path, **changes) -> dict:
    """Pretrainings of four steps, fine-tunings of two."""
    protocol = {
        "name": "few_label",
        "n_labelled": [1],
        "draws": 2,
        "n_validation": 0,
        "finetune": {
            "task": {"name": "segmentation"},
            "views": {"preset": "segmentation", "n_views": 1},
            "batch_size": 2,
            "training": {"steps": 2, "workers": 0, "accelerator": "cpu"},
        },
        **changes.pop("protocol", {}),
    }
    return {
        "kind": "compare",
        "name": "few",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest), "cache": str(manifest.parent / "cache"),
                 "prepare": {"size": [SIZE, SIZE, None]}},
        "items": {"geometry": "slice"},
        "model": {"encoder": ENCODER},
        "views": {"preset": "simclr"},
        "sampler": {"name": "random", "batch_size": 4},
        "training": {"steps": 4, "workers": 0, "accelerator": "cpu"},
        "arms": ARMS,
        "protocol": protocol,
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return small_cohort(tmp_path_factory.mktemp("cohort"))


def plan(manifest: Path, root: Path, **changes) -> CompareConfig:
    return validate(CompareConfig, plan_values(manifest, root, **changes), source="plan")


@pytest.fixture(scope="module")
def done(manifest, tmp_path_factory):
    """The whole plan through the command line, on two encoders."""
    root = tmp_path_factory.mktemp("done")
    wide = {**ENCODER, "widths": [4, 8, 12]}
    values = plan_values(manifest, root, protocol={"more_encoders": {"wide": wide}})
    result = CliRunner().invoke(app, ["compare", "--plan", str(write_yaml(root / "plan.yaml", values)), "--json"])
    assert result.exit_code == 0, result.output
    return root, values, json.loads(result.stdout[result.stdout.index("{") :])


def results(folder: Path) -> dict[str, dict]:
    """What each cell of a stage left, by the cell's name."""
    return {path.parent.name: json.loads(path.read_text())["result"] for path in folder.glob("*/result.json")}


def test_every_arm_gets_the_same_draws_and_its_own_weights(done):
    root, _, summary = done
    cells = results(root / "runs/few/cells")
    assert len(cells) == 3 * 2 * 2 + 2  # arms, encoders, draws; the upper bound on each encoder
    for draw in (1, 2):
        assert len({tuple(one["train"]) for name, one in cells.items() if f"-draw{draw}-" in name}) == 1
    assert cells["scratch@wide-n1-draw1-seed0"]["weights"] == {}
    assert cells["simclr@unet2d-n1-draw1-seed0"]["weights"]["encoder"]["missing"] == 0
    assert cells["both@wide-n1-draw2-seed0"]["weights"]["decoder"]["matched"] > 0
    assert {(row["arm"], row["encoder"]) for row in summary["table"]} == {
        (arm["name"], encoder) for arm in ARMS for encoder in ("unet2d", "wide")
    }
    assert summary["baseline"] == "scratch"
    assert [(row["arm"], row["encoder"]) for row in summary["paired"]] == [
        (arm, encoder) for encoder in ("unet2d", "wide") for arm in ("simclr", "both")
    ]
    assert all(row["p_holm"] >= row["p_value"] for row in summary["paired"])
    best = {(row["encoder"], row["arm"]) for row in summary["best"]}
    assert {(row["encoder"], row["baseline"]) for row in summary["paired_best"]} == best
    assert [row["encoder"] for row in summary["upper_bound"]] == ["unet2d", "wide"]


def test_stages_share_the_budget_and_begin_from_each_other(done):
    root, _, summary = done
    folder = root / "runs/few/pretraining/both@unet2d@seed0"
    stages = [row for row in summary["pretraining"] if (row["arm"], row["encoder"]) == ("both", "unet2d")]
    assert [(row["folder"], row["steps"]) for row in stages] == [("1-gcl", 3), ("2-lcl", 1)]
    second = read_yaml(folder / "2-lcl" / "config.yaml")
    assert Path(second["weights"]) == folder / "1-gcl"
    assert second["model"]["decoder_blocks"] == 1
    assert read_yaml(folder / "1-gcl" / "config.yaml")["views"]["preset"] == "simclr"  # the plan's
    for name in ("1-gcl", "2-lcl"):
        assert json.loads((folder / name / "status.json").read_text())["state"] == "done"
        assert (folder / name / "report.html").is_file()


def test_the_report_says_what_the_summary_does(done):
    root, _, summary = done
    text = (root / "runs/few/report.html").read_text()
    assert summary["verdict"][:40] in text
    assert "simclr on wide" in text
    figures = {path.name for path in (root / "runs/few/figures").iterdir()}
    assert figures == {
        f"{kind}-{encoder}-n1.svg" for kind in ("scores", "differences") for encoder in ("unet2d", "wide")
    }
    assert CliRunner().invoke(app, ["report", str(root / "runs/few")]).exit_code == 0
    assert (root / "runs/few/report.html").read_text() == text


def test_resuming_repeats_nothing_and_adds_an_arm(done):
    root, values, _ = done
    folder = root / "runs/few"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/result.json")}
    with pytest.raises(ConfigError, match="exists already"):
        compare(validate(CompareConfig, values, source="plan"))
    more = {**values, "arms": [*ARMS, {"name": "vicreg", "method": {"name": "vicreg", "hidden_dim": 8}}]}
    again = compare(validate(CompareConfig, more, source="plan"), resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    new = {path.parent.name for path in folder.glob("*/*/result.json") if path not in before}
    assert len(new) == 2 + 4
    assert all(name.startswith("vicreg@") for name in new)
    assert len(again.summary["table"]) == 8
    changed = {**values, "optimizer": {"learning_rate": 0.5}}
    with pytest.raises(ConfigError, match="other settings"):
        compare(validate(CompareConfig, changed, source="plan"), resume=True)


def test_parts_in_any_order_give_what_one_run_gives(done, manifest, tmp_path):
    root, *_ = done
    config = plan(manifest, tmp_path, arms=ARMS[:2])
    with pytest.raises(ConfigError, match="no pretraining that this part begins from"):
        compare(config, part=Part("cells", 2, 2), resume=True)
    for part in (Part("pretraining", 1, 2), Part("pretraining", 2, 2), Part("cells", 2, 2), Part("cells", 1, 2)):
        found = compare(config, part=part, resume=True)
        assert not (tmp_path / "runs/few/status.json").exists()
        assert not found.failed
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/few").glob("*/*/result.json")}
    compare(config, resume=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    one, parts = (pd.read_csv(folder / "runs/few/eval/per_case.csv") for folder in (root, tmp_path))
    one = one[(one["encoder"] == "unet2d") & one["arm"].isin(parts["arm"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, parts)


@pytest.mark.parametrize(("share", "again"), [(0.5, 1), (1.0, 0)], ids=["in the middle", "at its end"])
def test_asked_to_stop_it_goes_on_where_it_was(manifest, tmp_path, monkeypatch, share, again):
    arms = [ARMS[0], *({"name": name, "method": SIMCLR} for name in ("one", "other"))]
    config = plan(manifest, tmp_path, arms=arms, protocol={"draws": 1, "upper_bound": False})
    whole, begun = pretrain.train, []

    def stops(method, *given, **options):
        def after(progress):
            if len(begun) == 2 and progress >= share:
                os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does, in the last pretraining

        begun.append(options["run_dir"])
        method.after_optimizer_step = after
        return whole(method, *given, **options)

    monkeypatch.setattr(pretrain, "train", stops)
    with pytest.raises(Interrupted):
        compare(config)
    folder = tmp_path / "runs/few"
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert not (folder / "cells").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("pretraining/*/result.json")}
    found = compare(config, resume=True)
    assert begun[2:] == begun[1:2] * again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(found.summary["table"]) == 3
    one, other = found.summary["pretraining"]
    assert one["loss"] == other["loss"]  # the same method and seed, stopped or not


def test_an_arm_that_fails_is_named_and_the_others_stay(manifest, tmp_path):
    wild = {
        "name": "wild",
        "stages": [{"method": {"name": "vae", "latent_dim": 4}, "optimizer": {"learning_rate": 1e30}}],
    }
    values = plan_values(manifest, tmp_path, arms=[*ARMS[:2], wild], protocol={"draws": 1, "upper_bound": False})
    result = CliRunner().invoke(app, ["compare", "--plan", str(write_yaml(tmp_path / "plan.yaml", values))])
    assert result.exit_code == 1, result.output
    assert "FAILED wild@unet2d@seed0" in result.stdout
    summary = json.loads((tmp_path / "runs/few/eval/summary.json").read_text())
    assert [row["arm"] for row in summary["table"]] == ["scratch", "simclr"]
    assert list(summary["failed"]) == ["wild@unet2d@seed0"]
    assert "`wild` is not compared" in " ".join(summary["notes"])
    assert "wild@unet2d@seed0" in (tmp_path / "runs/few/report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arms": [ARMS[0], {"name": "big", "method": SIMCLR, "sampler": {"name": "random", "batch_size": 99}}]},
         ConfigError, r"arm `big`.*more items than there are"),
        ({"arms": [ARMS[0], {"name": "old", "method": {"name": "y_aware"}}]}, DataError, "arm `old`.*age"),
        ({"protocol": {"n_labelled": [50]}}, DataError, "50"),
        ({"protocol": {"evaluate_on": "nowhere"}}, DataError, "nowhere"),
    ],
    ids=["batch", "labels", "too-few", "split"],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is(manifest, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        compare(plan(manifest, tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


def test_people_who_are_scored_are_in_no_other_half(manifest, tmp_path):
    table = pd.read_csv(manifest)
    table["group"] = table["subject"]
    table.loc[table["split"] == "test", "group"] = table.loc[table["split"] == "train", "group"].iloc[0]
    other = manifest.with_name("mixed.csv")
    table.to_csv(other, index=False)
    with pytest.raises(DataError, match="leak|both|sides"):
        open_plan(plan(other, tmp_path))


@pytest.mark.parametrize(
    ("stage", "part", "message"),
    [(None, "1/2", "divides a stage"), ("cells", "3/2", "I/N"), ("cells", "0/2", "I/N"), ("cells", "x", "I/N"),
     ("training", None, "no stage `training`")],
)  # fmt: skip
def test_parts_that_are_none_are_refused(stage, part, message):
    with pytest.raises(ConfigError, match=message):
        read_part(stage, part)


def test_parts_are_disjoint_and_whole():
    cells = list(range(11))
    assert sorted(cell for i in range(1, 5) for cell in Part("cells", i, 4).of_cells(cells)) == cells
    assert read_part(None, None) is None
    assert read_part("pretraining", None) == Part("pretraining", 1, 1)
