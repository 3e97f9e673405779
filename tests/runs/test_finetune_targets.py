"""Fine-tuning on one label of a person: the grid, its scores, predictions and report, and what is refused before."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from small_runs import contents
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import FinetuneConfig, PretrainConfig, load_any
from medssl.core.errors import ConfigError, DataError
from medssl.core.schema import validate
from medssl.data.manifest import read_manifest
from medssl.data.splits import label_draws
from medssl.evaluation.probes import balanced_accuracy
from medssl.runs import cohort
from medssl.runs.finetune import finetune, open_finetune, plan_draws
from medssl.runs.init import write_config
from medssl.runs.predict import predict
from medssl.runs.pretrain import pretrain
from medssl.runs.targets import measures, scored_rows

N = 60
SPLITS = ("train", "train", "train", "internal_test", "external_test")
NETWORK = {"encoder": {"name": "mlp", "widths": [16, 8]}}
TRAINING = {"steps": 4, "validate_every": 2, "workers": 0, "accelerator": "cpu"}


def people(folder, **columns):
    """Rows of features that know the age and a little of the diagnosis."""
    rng = np.random.default_rng(0)
    age, ill = rng.uniform(20, 80, N).round(1), np.resize(["no", "no", "yes"], N)
    frame = pd.DataFrame({"participant_id": [f"p{i:02d}" for i in range(N)], "age": age})
    for number in range(5):
        frame[f"f{number}"] = rng.standard_normal(N) + (age / 15 if number < 2 else 2 * (ill == "yes"))
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "table.csv", index=False)
    manifest = folder / "manifest.csv"
    cohort.scan(folder / "table.csv", manifest, kind="table", options={"features": "f*"}, force=True)
    table = pd.read_csv(manifest).assign(**{"split": np.resize(SPLITS, N), "diagnosis": ill, **columns})
    table.to_csv(manifest, index=False)
    return manifest


def settings(manifest, root, **changes) -> FinetuneConfig:
    values = {
        "kind": "finetune",
        "name": "ages",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest), "cache": str(root / "cache")},
        "items": {"geometry": "features"},
        "model": NETWORK,
        "views": {"n_views": 1, "preset": "none"},
        "task": {"name": "regression"},
        "batch_size": 4,
        "training": TRAINING,
        "grid": {"n_labelled": [6], "draws": 2, "n_validation": 4, "upper_bound": True},
        "evaluate_on": ["internal_test", "external_test"],
        **changes,
    }
    return validate(FinetuneConfig, values, source="test")


def with_grid(manifest, root, changes=None, **grid):
    grid = {"n_labelled": [6], "draws": 2, "n_validation": 4, "upper_bound": False, **grid}
    return settings(manifest, root, grid=grid, **(changes or {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def manifest(root):
    return people(root / "data")


@pytest.fixture(scope="module")
def weights(root, manifest):
    values = {
        "kind": "pretrain",
        "name": "y_aware",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest)},
        "items": {"geometry": "features"},
        "model": NETWORK,
        "views": {"n_views": 2, "preset": "features"},
        "method": {"name": "y_aware", "projection_dim": 4},
        "sampler": {"name": "random", "batch_size": 12},
        "training": {"steps": 3, "workers": 0, "accelerator": "cpu"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medssl.runs.pretrain.build_report", lambda folder: None)
        return pretrain(validate(PretrainConfig, values, source="test")).folder


@pytest.fixture(scope="module")
def ages(root, manifest, weights):
    """Two arms, one size, two draws, and the upper bound; with its configuration."""
    arms = [{"name": "scratch"}, {"name": "y_aware", "weights": str(weights)}]
    config = with_grid(manifest, root, arms=arms, upper_bound=True)
    return config, finetune(config)


def test_scores_of_both_splits_follow_from_the_predictions(ages):
    _, done = ages
    summary = done.summary
    assert (summary["task"], summary["metric"], summary["unit"], summary["target"]) == (
        "regression",
        "mae",
        "years",
        "age",
    )
    rows = pd.read_csv(done.folder / "eval" / "per_case.csv")
    assert len(rows) == (2 * 2 + 1) * 24
    np.testing.assert_allclose(rows["abs_error"], (rows["predicted"] - rows["true"]).abs())
    for entry in summary["table"]:
        for split, found in entry["splits"].items():
            own = rows[(rows["arm"] == entry["arm"]) & (rows["split"] == split)]
            by_draw = own.groupby("draw")
            assert found["mae"]["mean"] == pytest.approx(by_draw["abs_error"].mean().mean(), abs=1e-5)
            r = [np.corrcoef(one["true"], one["predicted"])[0, 1] for _, one in by_draw]
            assert found["r"]["mean"] == pytest.approx(np.mean(r), abs=1e-5)
        assert entry["mean"] == entry["splits"]["internal_test"]["mae"]["mean"]
    assert {row["split"] for row in summary["paired"]} == {"internal_test", "external_test"}
    differences = rows.groupby(["arm", "split"])["abs_error"].mean().unstack("arm")
    for row in summary["paired"]:
        expected = differences.loc[row["split"], "y_aware"] - differences.loc[row["split"], "scratch"]
        assert row["difference"] == pytest.approx(expected, abs=1e-5)
    assert summary["upper_bound"]["n_labelled"] == 32
    assert any("was pretrained with the column `age` of 36" in note for note in summary["notes"])


def test_the_verdict_knows_that_less_error_is_better(ages):
    from medssl.reporting.metric import metric_of
    from medssl.reporting.verdict import finetune_verdict
    from medssl.runs.summary import _verdict

    row = {"arm": "b", "baseline": "a", "n_labelled": 8, "difference": -2.0, "low": -3.0, "high": -1.0}
    mae, dice = metric_of(ages[1].summary), metric_of({"metric": "dice"})
    assert _verdict([], [row], "test", mae).startswith("b is better than a with 8 labelled: -2.00 years MAE")
    assert _verdict([], [row], "test", dice).startswith("b is worse than a")
    assert finetune_verdict({"metric": "mae", "paired": [row]}).headline.startswith("b reached lower MAE than a")


def test_people_of_training_validation_and_evaluation_are_distinct(ages, manifest):
    split = pd.read_csv(manifest).set_index("subject")["split"]
    for path in (ages[1].folder / "cells").glob("*/result.json"):
        result = json.loads(path.read_text())["result"]
        assert not set(result["train"]) & set(result["validation"])
        assert set(split[[*result["train"], *result["validation"]]]) == {"train"}
        assert result["best_score"] < 0  # minus an error
        assert (result["weights"] != {}) == path.parent.name.startswith("y_aware")


def test_resuming_repeats_nothing_and_a_changed_target_is_noticed(ages, root):
    config, done = ages
    before = contents(done.folder / "cells")
    assert finetune(config, resume=True).summary == done.summary
    assert contents(done.folder / "cells") == before
    manifest = config.data.manifest
    text = manifest.read_text()
    try:
        table = pd.read_csv(manifest)
        table.assign(age=table["age"] + 1).to_csv(manifest, index=False)
        with pytest.raises(ConfigError, match="other settings or data"):
            finetune(config, resume=True)
    finally:
        manifest.write_text(text)


def test_a_cell_predicts_what_it_was_scored_with(ages, manifest, tmp_path):
    _, done = ages
    for name in ("y_aware-n6-draw1-seed0", "scratch-n6-draw2-seed0"):
        out = predict(done.folder / "cells" / name, manifest, tmp_path / name, accelerator="cpu")
        found = pd.read_csv(out.written[0]).set_index("case")["predicted"]
        assert (out.n_rows, len(found)) == (N, N)
        known = pd.read_csv(done.folder / "cells" / name / "per_case.csv").set_index("case")["predicted"]
        np.testing.assert_allclose(found[known.index], known, rtol=1e-5)
    damaged = done.folder / "cells" / "y_aware-n6-draw1-seed0" / "weights" / "features.json"
    text = damaged.read_text()
    damaged.unlink()
    try:
        with pytest.raises(DataError, match="statistics of the features cannot be read"):
            predict(damaged.parent, manifest, tmp_path / "no", accelerator="cpu")
    finally:
        damaged.write_text(text)
    same = manifest.rename(manifest.with_name("predictions.csv"))
    try:
        with pytest.raises(ConfigError, match="overwrite"):
            predict(damaged.parent, same, manifest.parent, accelerator="cpu")
    finally:
        same.rename(manifest)


def test_the_report_speaks_of_years_and_shows_people(ages):
    page = ages[1].report.read_text()
    assert "MAE (years)" in page
    assert "lower is better" in page
    assert "Dice" not in page
    figures = {path.stem for path in (ages[1].folder / "figures").iterdir()}
    assert figures == {"mae-by-labels", "paired-differences", "predicted-values", "training-curves"}


@pytest.fixture(scope="module")
def ill(root, manifest):
    """One cell of classification."""
    config = with_grid(manifest, root, {"name": "ill", "task": {"name": "classification"}}, draws=1)
    return finetune(config)


def test_classes_are_scored_by_balanced_accuracy_beside_chance(ill):
    summary = ill.summary
    assert (summary["metric"], summary["classes"]) == ("balanced_accuracy", ["no", "yes"])
    assert summary["reference"] == {"value": 0.5, "what": "chance"}
    rows = pd.read_csv(ill.folder / "eval" / "per_case.csv").query("split == 'internal_test'")
    expected = balanced_accuracy(rows["true"].to_numpy(str), rows["predicted"].to_numpy(str))
    assert summary["table"][0]["mean"] == pytest.approx(expected, abs=1e-5)
    assert 0 <= summary["table"][0]["splits"]["external_test"]["auc"]["mean"] <= 1
    np.testing.assert_allclose(rows["p_no"] + rows["p_yes"], 1, atol=1e-5)
    assert (ill.folder / "figures" / "class-confusion.svg").is_file()
    assert "log-probability" in ill.report.read_text()


def test_people_with_several_volumes_count_once():
    rows = pd.DataFrame({"case": list("abcde"), "subject": list("aabcd"), "group": list("aabcd"), "split": "test"})
    rows = rows.assign(site=None, d=["x", "x", "x", "y", "y"])
    values = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    table = scored_rows(rows, "d", values, ("x", "y"))
    by_person = table.groupby("group")["balanced"].mean().mean()
    assert by_person == pytest.approx(((0.5 + 1) / 2 + 1 / 2) / 2)  # a is half right, b right; c right, d wrong
    assert measures(table, ("x", "y"))["balanced_accuracy"] == pytest.approx(by_person)
    ages = scored_rows(rows.assign(age=[10.0, 20, 30, 40, 50]), "age", np.array([[12.0], [20], [33], [40], [55]]), ())
    assert measures(ages, ())["mae"] == pytest.approx((1 + 3 + 0 + 5) / 4)


def test_draws_hold_every_class_and_stay_nested(manifest):
    loaded = read_manifest(manifest)
    draws = label_draws(
        loaded, n_labelled=[2, 6, 12], draws=8, n_validation=6, column="diagnosis", by_class=True, seed=1
    )
    truth = loaded.table.set_index("volume")["diagnosis"]
    for one in draws:
        assert set(truth[one.train]) == {"no", "yes"}
        assert set(truth[one.validation]) == {"no", "yes"}
        assert not set(one.train) & set(one.validation)
    for draw in range(1, 9):
        small, middle, large = (one.train for one in draws if one.draw == draw)
        assert middle[:2] == small
        assert large[:6] == middle
        assert (truth[large] == "yes").sum() in (3, 4, 5)  # a third of them
    with pytest.raises(ConfigError, match="cannot hold every class"):
        label_draws(loaded, n_labelled=[1], draws=1, column="diagnosis", by_class=True)


def gaps(values, rows, to=None):
    values = list(values)
    for row in rows:
        values[row] = to
    return values


AGES = np.random.default_rng(0).uniform(20, 80, N).round(1)
CLASSES = {"task": {"name": "classification"}}


@pytest.mark.parametrize(
    ("columns", "changes", "grid", "parts"),
    [
        ({"age": None}, {}, {}, ["`age`"]),
        ({"age": gaps(AGES, [3])}, {}, {}, ["`age` is missing for 1 of the 24", "line 5 (p03)"]),
        ({"age": 50.0}, {}, {}, ["the same for everybody"]),
        ({"diagnosis": "no"}, CLASSES, {}, ["the same for everybody"]),
        ({"diagnosis": gaps(np.resize(["a", "b"], N), [4], "c")}, CLASSES, {}, ["a class that nobody", "line 6 (p04)"]),
        ({}, {"task": {"name": "regression", "target": "diagnosis"}}, {}, ["holds text"]),
        ({}, {"task": {"name": "regression", "target": "agee"}}, {}, ["not in the manifest", "Did you mean `age`"]),
        ({}, {}, {"n_labelled": [33]}, ["more labelled volumes", "36 groups with a value of `age`"]),
        ({"age": gaps(AGES, range(0, N, 5))}, {}, {"n_labelled": [21]}, ["24 groups with a value of `age`"]),
        ({}, {}, {"n_labelled": [1]}, ["one value of `age`"]),
        ({}, CLASSES, {"n_labelled": [1]}, ["cannot hold every class"]),
        ({}, {"task": {"name": "classification", "n_classes": 5}}, {}, ["another number of values"]),
        ({}, {"evaluate_on": ["internal_test", "test"]}, {}, ["no volume has the split test"]),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_learnt_or_scored_are_refused_before_training(tmp_path, columns, changes, grid, parts):
    config = with_grid(people(tmp_path, **columns), tmp_path, changes, **grid)
    with pytest.raises((DataError, ConfigError)) as caught:
        finetune(config)
    assert all(part in str(caught.value) for part in parts)
    assert not (tmp_path / "runs").exists()


def test_weights_that_saw_evaluated_people_or_other_features_are_refused(manifest, weights, root, tmp_path):
    arms = [{"name": "y_aware", "weights": str(weights)}]
    other = people(tmp_path / "other")
    table = pd.read_csv(other)
    table.assign(split=np.where(table["split"] == "train", "internal_test", "train")).to_csv(other, index=False)
    changes = {"evaluate_on": "internal_test"}
    with pytest.raises(DataError, match="pretrain"):
        finetune(with_grid(other, tmp_path, changes, arms=arms))
    wide = people(tmp_path / "wide")
    features = pd.read_csv(tmp_path / "wide" / "table.csv").rename(columns={"f0": "g0"})
    features.to_csv(tmp_path / "wide" / "table.csv", index=False)
    with pytest.raises(DataError, match="weights were trained on"):
        finetune(with_grid(wide, tmp_path, changes, arms=arms))


def test_people_without_a_target_are_never_drawn(tmp_path):
    train = np.flatnonzero(np.resize(SPLITS, N) == "train")
    config = with_grid(people(tmp_path, age=gaps(AGES, train[:20])), tmp_path, n_labelled=[8])
    opened = open_finetune(config)
    for draw in plan_draws(config, opened).values():
        assert not {*draw.train, *draw.validation} & set(train[:20])


def test_init_writes_a_run_that_works_and_the_command_line_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medssl.runs.finetune.build_report", lambda folder: None)
    manifest = people(tmp_path / "data", diagnosis=None, age=gaps(AGES, [3]))
    assert "60 rows of 5 features" in write_config("finetune", manifest, None).text()
    text = (tmp_path / "finetune.yaml").read_text()
    assert "change to test" not in text
    short = ["training.steps=2", "training.accelerator=cpu", "grid.draws=1", "grid.n_labelled=[8]", "name=f"]
    config = load_any(tmp_path / "finetune.yaml", short)
    assert (config.task.name, config.task.target, config.data.exclude) == ("regression", "age", ("p03",))
    finetune(config)
    ran = CliRunner().invoke(
        app, ["predict", "runs/f/cells/scratch-n8-draw1-seed0", str(manifest), "-o", "out", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == N


@pytest.mark.parametrize("geometry", ["volume", "slice"])
def test_images_are_predicted_whole_and_slices_averaged(tmp_path, monkeypatch, geometry):
    monkeypatch.setattr("medssl.runs.finetune.build_report", lambda folder: None)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        image = rng.normal(number, 1, (16, 16, 16)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"v{number}.nii.gz")
        rows.append({"subject": f"v{number}", "image": f"v{number}.nii.gz", "age": 20.0 + number,
                     "split": "test" if number > 8 else "train"})  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    dims = 2 if geometry == "slice" else 3
    config = with_grid(
        tmp_path / "manifest.csv",
        tmp_path,
        {
            "items": {"geometry": geometry},
            "data": {
                "manifest": str(tmp_path / "manifest.csv"),
                "cache": str(tmp_path / "cache"),
                "prepare": {"intensity": "none"},
            },
            "model": {"encoder": {"name": f"unet{dims}d", "widths": [4, 8]}},
            "evaluate_on": "test",
        },
        n_labelled=[4],
        draws=1,
        n_validation=2,
    )
    done = finetune(config)
    known = pd.read_csv(done.folder / "eval" / "per_case.csv").set_index("case")["predicted"]
    assert len(known) == 3
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    table = pd.read_csv(tmp_path / "manifest.csv").drop(columns=["split", "age"])
    bad = pd.DataFrame({"subject": ["bad"], "image": ["bad.nii.gz"]})
    pd.concat([table, bad]).to_csv(tmp_path / "new.csv", index=False)
    out = predict(done.folder / "cells" / "scratch-n4-draw1-seed0", tmp_path / "new.csv", tmp_path, accelerator="cpu")
    assert list(out.failed) == ["bad"]
    found = pd.read_csv(out.written[0]).set_index("case")["predicted"]
    np.testing.assert_allclose(found[known.index], known, rtol=1e-4)
