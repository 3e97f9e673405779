"""medssl evaluate age-site, knn and probe: from a table to numbers, a report, and refusals of what would flatter."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import PretrainConfig
from medssl.core.errors import ConfigError, DataError, MedsslError
from medssl.core.schema import validate
from medssl.data.features import FeatureTable, numbered, write_features
from medssl.evaluation import People, predict_age_site
from medssl.runs import cohort, evaluate_embeddings
from medssl.runs.evaluate_embeddings import evaluate_age_site, evaluate_probe
from medssl.runs.pretrain import pretrain


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out maps and figures, which take longer than everything else."""
    monkeypatch.setattr(evaluate_embeddings, "flat_maps", lambda X: {})
    monkeypatch.setattr(evaluate_embeddings, "build_report", lambda folder: folder / "report.html")


QUICK = {"solver": "lbfgs", "n_bootstrap": 100, "n_permutations": 100}


def people(n=90, seed=0):
    """Embeddings that know age, sex and a little of the site; train, internal and external people."""
    rng = np.random.default_rng(seed)
    keys = pd.DataFrame({"subject": [f"p{i:03d}" for i in range(n)], "case": [f"c{i:03d}" for i in range(n)]})
    keys["split"] = np.resize(["train", "train", "train", "internal_test", "external_test"], n)
    keys["site"] = np.where(keys["split"] == "external_test", "x", rng.choice(["a", "b", "c"], n))
    keys["age"] = rng.uniform(20, 80, n).round(1)
    keys["sex"] = rng.choice(["f", "m"], n)
    keys["pretrained_on"] = keys["split"] == "train"
    X = rng.standard_normal((n, 6))
    X[:, 0] += keys["age"] / 10
    X[:, 1] += 2 * (keys["sex"] == "m")
    X[:, 2] += 2 * (keys["site"] == "a")
    return keys, X.astype(np.float32)


def table(folder, keys, X, name="z.parquet", layer="h"):
    about = {"layer": layer, "method": "y_aware"}
    return write_features(FeatureTable(numbered(X.shape[1]), X, keys), folder / name, about=about)


def test_public_splits_give_the_score_and_are_called_that(tmp_path):
    keys, X = people()
    result = evaluate_age_site(table(tmp_path, keys, X), tmp_path / "out", **QUICK)
    found = json.loads((tmp_path / "out" / "eval" / "age_site.json").read_text())
    assert found["kind"] == "age_site"
    assert found["evaluated_on"] == "internal_test, external_test"
    assert found["public_splits"] is True
    assert any("not the challenge's hidden test" in note for note in found["notes"])
    assert (found["n_people"], found["n_sites"], found["chance"]) == (36, 3, pytest.approx(1 / 3))
    (row,) = found["rows"]
    assert (row["arm"], row["layer"], row["method"], row["debias"], row["combat"]) == (
        "embedding",
        "h",
        "y_aware",
        None,
        None,
    )
    assert row["score"] == pytest.approx(row["mae_external"] * row["bacc"] ** 0.3)
    saved = pd.read_csv(tmp_path / "out" / "eval" / "per_person.csv")
    parts = []
    for split in ("train", "internal_test", "external_test"):
        rows = (keys["split"] == split).to_numpy()
        parts.append(People(X[rows].astype(float), keys["age"][rows], keys["site"][rows], keys["subject"][rows]))
    wanted = predict_age_site(*parts, solver="lbfgs")
    np.testing.assert_allclose(saved["age_pred"], wanted["age_pred"], rtol=1e-5)
    assert set(saved) >= {
        "arm",
        "layer",
        "seed",
        "fold",
        "set",
        "subject",
        "site",
        "age",
        "site_pred",
        "site_pred_age_only",
    }
    assert (tmp_path / "out" / "report.html").is_file()
    maps = pd.read_csv(tmp_path / "out" / "eval" / "embedding_maps.csv")
    assert maps.groupby(["kind", "set"]).size().to_dict() == {
        ("pca", "external"): 18, ("pca", "internal"): 18, ("tsne", "external"): 18, ("tsne", "internal"): 18,
    }  # fmt: skip
    assert np.isfinite(maps[["x", "y"]]).all(None)
    assert "not the challenge's" in result.text()


def test_the_plain_test_split_is_divided_by_what_sites_were_seen(tmp_path, no_report):
    keys, X = people()
    keys["split"] = keys["split"].replace({"internal_test": "test", "external_test": "test"})
    found = evaluate_age_site(table(tmp_path, keys, X), tmp_path / "out", **QUICK).fields
    assert found["public_splits"] is False
    assert found["rows"][0]["mae_external"] is not None
    assert found["rows"][0]["bacc"] is not None


def test_folds_combat_and_leave_site_out_of_a_table_of_measures(tmp_path, no_report):
    keys, X = people()
    path = tmp_path / "measures.csv"
    frame = keys.drop(columns=["pretrained_on", "split", "case"]).rename(columns={"site": "scanner"})
    frame.join(pd.DataFrame(X, columns=[f"area_{i}" for i in range(6)])).to_csv(path, index=False)
    options = {"folds": 3, "seeds": 2, "combat": True, "combat_covariates": ("sex",), "leave_site_out": True}
    found = evaluate_age_site(path, tmp_path / "out", mapping={"site": "scanner"}, **options, **QUICK).fields
    plain, combat = found["rows"]
    assert (plain["arm"], combat["arm"], combat["combat"], combat["family"]) == (
        "embedding", "embedding + ComBat", "input", "embedding",
    )  # fmt: skip
    assert plain["n_seeds"] == 2
    assert plain["bacc_age_only"] == combat["bacc_age_only"] == found["age_only"]
    assert combat["bacc"] < plain["bacc"] - 0.1
    assert {row["metric"] for row in found["paired"]} == {"mae_internal", "bacc"}
    sites = {row["site"]: row for row in found["leave_site_out"]["rows"]}
    assert set(sites) == {"all", "a", "b", "c", "x"}
    assert sites["all"]["n_people"] == 90 == sum(sites[one]["n_people"] for one in "abcx")
    assert found["evaluated_on"] == "3 folds"
    assert "hidden test" not in " ".join(found["notes"])


def test_projections_are_normalised_unless_told_otherwise(tmp_path):
    keys, X = people()
    stretched = X * np.random.default_rng(1).uniform(0.1, 10, (len(X), 1)).astype(np.float32)

    def error(name, values, layer, **options):
        path = table(tmp_path, keys, values, f"{name}.parquet", layer)
        rows = evaluate_probe(path, target="age", kinds=("linear",), n_bootstrap=100, **options).fields["rows"]
        return rows[0]["metrics"]["mae"]

    assert error("z", X, "z") == pytest.approx(error("long", stretched, "z"), rel=1e-4)
    assert error("h", X, "h") != pytest.approx(error("tall", stretched, "h"), rel=1e-2)
    assert error("on", stretched, "h", normalise=True) == pytest.approx(error("off", X, "h", normalise=True), rel=1e-4)


def test_probes_at_a_layer(tmp_path):
    keys, X = people()
    keys.loc[:9, "sex"] = None
    path = table(tmp_path, keys, X)
    out = tmp_path / "out"
    found = evaluate_probe(path, target="sex", kinds=("linear", "knn"), second=path, out=out, n_bootstrap=100).fields
    assert [row["probe"] for row in found["rows"]] == ["linear", "knn"]
    linear = found["rows"][0]
    assert linear["task"] == "classification"
    assert linear["metrics"]["bacc"] > 0.7
    assert linear["metrics"]["auc"] > 0.7
    assert "10 of 90 rows without sex are left out." in found["notes"]
    assert found["spread"][0]["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["spread"][0]["uniformity"] < 0
    assert json.loads((out / "eval" / "probes.json").read_text())["rows"][0]["metrics"] == linear["metrics"]
    age = evaluate_probe(path, target="age", kinds=("linear",), n_bootstrap=100).fields["rows"][0]
    assert (age["task"], set(age["metrics"])) == ("regression", {"mae", "r", "r2"})


def test_people_that_were_pretrained_on_are_never_evaluated(tmp_path):
    keys, X = people()
    path = table(tmp_path, keys, X)
    with pytest.raises(DataError, match="54 evaluated people were pretrained on(.|\n)*p000"):
        evaluate_age_site(path, tmp_path / "out", folds=5, **QUICK)
    with pytest.raises(DataError, match="54 evaluated people were pretrained on"):
        evaluate_age_site(path, tmp_path / "out", leave_site_out=True, **QUICK)
    with pytest.raises(DataError, match="54 evaluated people were pretrained on"):
        evaluate_probe(path, target="sex", kinds=("linear",), folds=5)
    keys.loc[3, "pretrained_on"] = True
    with pytest.raises(DataError, match="1 evaluated people were pretrained on(.|\n)*p003"):
        evaluate_age_site(table(tmp_path, keys, X, "leak.csv"), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"split": "train"}, {}, DataError, "one of them holds nobody(.|\n)*--folds 5"),
        ({"split": "internal_test"}, {}, DataError, "one of them holds nobody"),
        ({"site": None}, {}, DataError, "`site` is missing in 90 of 90 rows"),
        ({"age": 12 * 40.0}, {}, DataError, "no age of 0 to 130 years in 90 of 90(.|\n)*months"),
        ({"age": 40.0}, {}, DataError, "all ages are equal"),
        ({}, {"combat_covariates": ("age",), "combat": True}, ConfigError, "may not keep"),
        ({}, {"combat_covariates": ("sex",)}, ConfigError, "add --combat"),
        ({}, {"seeds": 2}, ConfigError, "add --folds"),
        ({}, {"layers": ("z",)}, ConfigError, "a table is one layer"),
        ({}, {"combat": True, "combat_covariates": ("weight",)}, DataError, "no column `weight`"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:40],
)  # fmt: skip
def test_wrong_input_has_one_message(tmp_path, change, options, error, message):
    keys, X = people()
    path = table(tmp_path, keys.assign(**change), X)
    with pytest.raises(error, match=message):
        evaluate_age_site(path, tmp_path / "out", **{**QUICK, **options})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", np.nan, "`age` is missing in 1 of 90 rows(.|\n)*z.csv, rows .from 0. 83 .p083."),
        ("age", -1.0, "no age of 0 to 130 years in 1 of 90 rows(.|\n)*83 .p083."),
        ("site", None, "`site` is missing in 1 of 90 rows(.|\n)*83 .p083."),
        ("subject", None, "the person is missing in 1 of 90 rows(.|\n)*83 "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folds", [None, 5])
def test_rows_that_cannot_be_used_are_named_as_they_are_in_the_table(tmp_path, column, value, message, folds):
    keys, X = people()
    keys.loc[83, column] = value
    with pytest.raises(DataError, match=message):
        evaluate_age_site(table(tmp_path, keys, X, "z.csv"), tmp_path / "out", folds=folds, **QUICK)
    if column == "subject":
        with pytest.raises(DataError, match=message):
            evaluate_probe(table(tmp_path, keys, X, "z.csv"), target="sex", kinds=("linear",), folds=folds)


def test_another_scan_of_somebody_who_was_pretrained_on_is_not_evaluated(tmp_path):
    keys, X = people()
    keys.loc[1, ["subject", "split"]] = ["p003", "validation"]  # seen, and p003 is evaluated
    with pytest.raises(DataError, match="1 evaluated people were pretrained on(.|\n)*p003"):
        evaluate_age_site(table(tmp_path, keys, X), tmp_path / "out", **QUICK)


def test_what_is_there_is_replaced_only_when_asked(tmp_path, no_report):
    keys, X = people()
    path = table(tmp_path, keys, X)
    evaluate_age_site(path, tmp_path / "out", **QUICK)
    with pytest.raises(ConfigError, match="--force"):
        evaluate_age_site(path, tmp_path / "out", **QUICK)
    evaluate_age_site(path, tmp_path / "out", force=True, **QUICK)
    np.save(tmp_path / "bare.npy", X)
    with pytest.raises(DataError, match="nothing says whose"):
        evaluate_age_site(tmp_path / "bare.npy", tmp_path / "other", **QUICK)
    with pytest.raises(ConfigError, match="embedded first"):
        evaluate_age_site(tmp_path, tmp_path / "other", **QUICK)
    with pytest.raises(ConfigError, match="no probe `knm`(.|\n)*knn"):
        evaluate_probe(path, target="sex", kinds=("knm",))


def test_command_line(tmp_path, no_report):
    keys, X = people()
    path = table(tmp_path, keys, X, "h.csv")
    runner = CliRunner()
    result = runner.invoke(
        app, ["evaluate", "age-site", str(path), "-o", str(tmp_path / "out"), "--solver", "lbfgs", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][0]["bacc_age_only"] > 0
    result = runner.invoke(app, ["evaluate", "knn", str(path), "--target", "sex"])
    assert result.exit_code == 0, result.output
    assert "auc" in result.output
    result = runner.invoke(app, ["evaluate", "probe", str(path), "--target", "age", "--kind", "linear"])
    assert result.exit_code == 0, result.output
    assert "mae" in result.output
    result = runner.invoke(app, ["evaluate", "probe", str(path), "--target", "shoe size"])
    assert isinstance(result.exception, MedsslError)
    assert "no column `shoe size`" in str(result.exception)
    assert runner.invoke(app, ["evaluate", "age-site", str(path), "-o", "x", "--solver", "adam"]).exit_code == 2


def test_a_run_is_embedded_at_its_layers_and_then_evaluated(tmp_path, no_report):
    keys, X = people(60)
    keys["split"] = np.where(keys["split"] == "train", "train", "test")
    measures = keys.drop(columns=["pretrained_on", "case", "split"])
    measures.join(pd.DataFrame(X, columns=[f"area_{i}" for i in range(6)])).to_csv(tmp_path / "people.csv", index=False)
    manifest = tmp_path / "manifest.csv"
    cohort.scan(tmp_path / "people.csv", manifest, kind="table", options={}, force=False)
    rows = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    rows["split"] = rows["subject"].map(dict(zip(keys["subject"], keys["split"])))
    rows.to_csv(manifest, index=False)
    config = {
        "name": "rows",
        "runs": str(tmp_path / "runs"),
        "data": {"manifest": str(manifest), "cache": str(tmp_path / "cache")},
        "items": {"geometry": "features"},
        "model": {"encoder": {"name": "mlp", "widths": [8, 6]}},
        "views": {"preset": "features"},
        "method": {"name": "simclr", "projection_dim": 4},
        "sampler": {"name": "random", "batch_size": 16},
        "training": {"steps": 3, "accelerator": "cpu", "workers": 0},
    }
    run = pretrain(validate(PretrainConfig, config, source="test")).folder
    found = evaluate_age_site(run, tmp_path / "out", manifest=manifest, **QUICK).fields
    assert [(row["layer"], row["method"]) for row in found["rows"]] == [("z", "simclr"), ("h", "simclr")]
    assert found["evaluated_on"] == "test"
    assert (tmp_path / "out" / "embeddings" / "z.parquet").is_file()
    with pytest.raises(DataError, match="pretrained on by these weights"):
        evaluate_age_site(run, tmp_path / "folds", manifest=manifest, layers=("h",), folds=3, **QUICK)
    found = evaluate_probe(
        run, target="sex", kinds=("knn",), manifest=manifest, layers=("block0",), out=tmp_path / "p", n_bootstrap=100
    ).fields
    assert found["rows"][0]["layer"] == "block0"
    # Another session of somebody who was pretrained on, in a manifest without the session that was.
    who, later = rows["subject"][rows["split"] == "train"].iloc[0], tmp_path / "later.csv"
    values = np.random.default_rng(1).standard_normal((len(measures), 6))
    again = measures.join(pd.DataFrame(values, columns=[f"area_{i}" for i in range(6)]))
    again.to_csv(tmp_path / "again.csv", index=False)
    cohort.scan(tmp_path / "again.csv", later, kind="table", options={}, force=False)
    sessions = pd.read_csv(later, dtype=str, keep_default_na=False)
    sessions["split"] = np.where(sessions["subject"] == who, "test", "train")
    sessions.to_csv(later, index=False)
    for evaluate in (
        lambda: evaluate_age_site(run, tmp_path / "a", manifest=later, layers=("h",), **QUICK),
        lambda: evaluate_probe(
            run, target="sex", kinds=("knn",), manifest=later, layers=("h",), out=tmp_path / "b", n_bootstrap=100
        ),
    ):
        with pytest.raises(DataError, match=f"evaluated people were pretrained on(.|\n)*group {who} is in") as caught:
            evaluate()
        assert "transductive" not in str(caught.value)
        assert "medssl compare" in caught.value.fix
