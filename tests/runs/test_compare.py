"""A comparison of arms on a small table: folds, cells, resuming, what is refused, and what is left behind."""

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import write_yaml
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import CompareConfig
from medssl.core.errors import ConfigError, DataError
from medssl.core.schema import validate
from medssl.data.manifest import ManifestMeta, write_manifest
from medssl.models import ENCODERS, build_encoder, save_weights
from medssl.runs.compare import check_arms, compare, plan_cells
from medssl.runs.compare_cells import PER_PERSON, CompareCell, CompareRunner, unit_rows
from medssl.runs.compare_folds import open_people, plan_folds, rows_of

N, SITES = 60, {"a": 30, "b": 20, "NA": 10}
L_EXP = {"name": "l_exp", "projection_dim": 4}
ARMS = [
    {"name": "raw"},
    {"name": "l_exp", "method": L_EXP},
    {"name": "l_exp+fair_kl", "method": L_EXP, "debias": {"name": "fair_kl", "on": "z", "weight": 5}},
    {"name": "l_exp+combat", "method": L_EXP, "combat": {"on": "z"}},
]


def people(folder: Path, **columns) -> Path:
    """A manifest of people of three sites, one of them called NA, whose features follow age and site."""
    rng = np.random.default_rng(5)
    site = np.repeat(list(SITES), list(SITES.values()))
    age = rng.uniform(20, 80, N).round(1)
    shift = {"a": 0.0, "b": 2.0, "NA": -2.0}
    known = {"subject": [f"s{i:02d}" for i in range(N)], "site": site, "age": age, "sex": ["F", "M"] * (N // 2)}
    table = pd.DataFrame(known).assign(**columns)
    values = rng.normal(0, 1, (N, 6))
    values[:, :3] += 0.05 * age[:, None]
    values[:, 3:] += np.vectorize(shift.get)(site)[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(values.round(4), columns=[f"f{i}" for i in range(6)]).to_csv(folder / "features.csv", index=False)
    manifest = table.assign(image="features.csv", frame=range(N))
    write_manifest(manifest, ManifestMeta(name="people"), folder / "manifest.csv")
    return folder / "manifest.csv"


def plan(manifest: Path, **changes) -> CompareConfig:
    protocol = {"folds": 2, "seeds": [0], "solver": "lbfgs", "n_bootstrap": 100, "n_permutations": 100}
    values = {
        "kind": "compare",
        "name": "compare",
        "runs": str(manifest.parent / "runs"),
        "data": {"manifest": str(manifest)},
        "items": {"geometry": "features"},
        "model": {"encoder": {"name": "mlp", "widths": [8, 4]}},
        "views": {"preset": "features", "n_views": 2},
        "sampler": {"name": "random", "batch_size": 16},
        "training": {"steps": 4, "accelerator": "cpu"},
        "arms": ARMS,
        **changes,
    }
    values["protocol"] = {**protocol, **changes.get("protocol", {})}
    return validate(CompareConfig, values, source="plan")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def done(manifest):
    """Both folds of every arm, and every site left out."""
    return compare(plan(manifest, protocol={"leave_site_out": True}))


def folds_of(config: CompareConfig):
    cohort = open_people(config)
    return cohort, plan_folds(config, cohort)[0]


def test_every_person_is_evaluated_once_and_never_trained_on(manifest):
    cohort, folds = folds_of(plan(manifest, protocol={"folds": 5}))
    assert sorted(volume for fold in folds for volume in fold.internal) == list(range(N))
    for fold in folds:
        assert not set(fold.train) & set(fold.internal)
        counts = rows_of(cohort.chosen, fold.internal).table["site"].value_counts()
        assert counts.to_dict() == {"a": 6, "b": 4, "NA": 2}


def test_visits_of_a_person_stay_together_whatever_the_order_of_rows(tmp_path):
    pairs = [f"p{i // 2}" for i in range(N)]
    cohort, folds = folds_of(plan(people(tmp_path / "one", group=pairs)))
    turned = people(tmp_path / "two", group=pairs)
    table = pd.read_csv(turned, keep_default_na=False)
    table.iloc[::-1].to_csv(turned, index=False)
    other, again = folds_of(plan(turned))
    for fold, same in zip(folds, again, strict=True):
        groups = [set(rows_of(cohort.chosen, volumes).table["group"]) for volumes in (fold.train, fold.internal)]
        assert not groups[0] & groups[1]
        assert groups[1] == set(rows_of(other.chosen, same.internal).table["group"])


def test_validation_leaves_test_people_untouched(manifest):
    _, tested = folds_of(plan(manifest, protocol={"folds": 4}))
    _, validated = folds_of(plan(manifest, protocol={"folds": 4, "evaluate_on": "validation"}))
    for test, fold in zip(tested, validated, strict=True):
        assert not set(test.internal) & {*fold.train, *fold.internal}
        assert {*fold.train, *fold.internal} == set(test.train)
        assert len(fold.internal) == round(0.2 * len(test.train))


def test_manifest_splits_divide_people_by_the_sites_that_are_trained_on(tmp_path):
    split = np.array(["train", "internal_test"] * (N // 2), dtype=object)
    split[-SITES["NA"] :] = "external_test"
    split[0] = "external_test"  # at site a, which is trained on
    config = plan(people(tmp_path, split=split), protocol={"folds": None})
    cohort = open_people(config)
    (fold,), notes = plan_folds(config, cohort)
    assert set(rows_of(cohort.chosen, fold.external).table["site"]) == {"NA"}
    assert 0 in fold.internal
    assert any("1 rows of the split external_test count as internal" in note for note in notes)
    with pytest.raises(DataError, match="nobody is evaluated|holds none"):
        folds_of(plan(people(tmp_path / "none"), protocol={"folds": None}))


def test_people_that_cannot_be_divided_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 11 people") as caught:
        folds_of(plan(people(tmp_path / "few"), protocol={"folds": 11}))
    assert "NA has 10" in caught.value.found
    age = np.full(N, 30.0)
    with pytest.raises(DataError, match="people of several ages"):
        folds_of(plan(people(tmp_path / "equal", age=age)))
    age[3] = np.nan
    with pytest.raises(DataError, match="`age` is missing for 1 of 60") as caught:
        folds_of(plan(people(tmp_path / "ageless", age=age)))
    assert "s03" in caught.value.where
    twins = people(tmp_path / "twins")
    rows = pd.read_csv(twins.parent / "features.csv")
    rows.loc[range(1, 40)] = rows.loc[[0] * 39].to_numpy()
    rows.to_csv(twins.parent / "features.csv", index=False)
    with pytest.raises(DataError, match="leak") as caught:
        folds_of(plan(twins))
    assert "identical image" in caught.value.found


def test_arms_that_cannot_be_trained_are_refused_before_the_first_is(manifest, tmp_path):
    def check(**changes):
        config = plan(manifest, **changes)
        cohort, folds = folds_of(config)
        return check_arms(config, cohort, folds)

    with pytest.raises(ConfigError, match="more items than there are"):
        check(sampler={"name": "random", "batch_size": 31})
    with pytest.raises(DataError, match="iq"):
        check(arms=[{"name": "x", "method": {**L_EXP, "kernel": {"attributes": {"iq": {"sigma": 5}}}}}])
    # As many keys as there are people, but not as a fold leaves to train on.
    with pytest.raises(ConfigError, match="arm `queue`, fold0: the queue is longer"):
        check(arms=[*ARMS, {"name": "queue", "method": {"name": "moco", "queue_size": 40}}])
    cohort, _ = folds_of(plan(manifest))
    encoder = build_encoder(ENCODERS["mlp"].config(widths=(8, 4)), (6,), seed=0)
    seen = [cohort.store.voxels(7)[:16]]
    save_weights(tmp_path / "weights", encoder, info={"pretrained_on": seen})
    arms = [{"name": "x", "method": L_EXP, "weights": str(tmp_path / "weights")}]
    with pytest.raises(DataError, match="were pretrained on images that are evaluated") as caught:
        check(arms=arms)
    assert "s07" in caught.value.found
    data = {"manifest": str(manifest), "transductive": True}
    assert any("s07" in note for note in check(arms=arms, data=data).notes)


def test_run_leaves_tables_for_the_report(done):
    summary = json.loads((done.folder / "eval" / "age_site.json").read_text())
    rows = {(row["arm"], row["layer"]): row for row in summary["rows"]}
    assert list(rows) == [("raw", "input"), *((arm, layer) for arm in ("l_exp", "l_exp+fair_kl") for layer in "zh"),
                          ("l_exp+combat", "z")]  # fmt: skip
    assert all(row["n_people"] == N and row["n_seeds"] == 1 for row in rows.values())
    assert {row["family"] for row in rows.values()} == {"raw", "l_exp"}
    assert rows["l_exp+fair_kl", "z"]["debias"] == {"name": "fair_kl", "weight": 5.0, "on": "z"}
    assert rows["l_exp+combat", "z"]["bacc"] < rows["raw", "input"]["bacc"]
    assert summary["n_sites"] == 3
    paired = {(row["arm"], row["layer"], row["metric"]) for row in summary["paired"]}
    assert ("l_exp+combat", "z", "bacc") in paired
    assert ("l_exp", "h", "mae_internal") in paired
    predictions = pd.read_csv(done.folder / "eval" / PER_PERSON, keep_default_na=False)
    assert set(predictions["site"]) == set(SITES)
    assert (predictions.groupby(["arm", "layer"])["subject"].nunique() == N).all()
    maps = pd.read_csv(done.folder / "eval" / "embedding_maps.csv", keep_default_na=False)
    assert set(maps["kind"]) == {"pca", "tsne"}
    assert maps["arm"].nunique() == 2
    assert "NA" in (done.folder / "report.html").read_text()
    assert "l_exp+combat" in done.text()


def test_sites_left_out_are_predicted_by_models_that_never_saw_them(done):
    left = {(row["arm"], row["layer"], row["site"]): row for row in done.summary["leave_site_out"]["rows"]}
    assert left["l_exp", "z", "all"]["n_people"] == N
    assert left["l_exp", "h", "NA"]["n_people"] == SITES["NA"]
    assert not any(arm == "l_exp+combat" for arm, *_ in left)
    assert any("`l_exp+combat`: ComBat cannot harmonise sites" in note for note in done.summary["notes"])
    cells = pd.read_csv(done.folder / "eval" / "cells.csv", keep_default_na=False)
    assert len(cells) == len(ARMS) * (2 + len(SITES))


def test_resuming_adds_what_is_new_and_repeats_nothing(manifest, done):
    begun = {path: path.stat().st_mtime_ns for path in done.folder.glob("cells/*/result.json")}
    more = [*ARMS, {"name": "h", "method": {"name": "supervised"}, "steps": 2}]
    with pytest.raises(ConfigError, match="exists already"):
        compare(plan(manifest, arms=more))
    again = compare(plan(manifest, arms=more, protocol={"baseline": "l_exp"}), resume=True)
    assert {path: path.stat().st_mtime_ns for path in begun} == begun
    assert len(list(done.folder.glob("cells/*/result.json"))) == len(begun) + 2
    assert [row["layer"] for row in again.summary["rows"] if row["arm"] == "h"] == ["h"]
    assert {row["baseline"] for row in again.summary["paired"]} == {"l_exp"}
    with pytest.raises(ConfigError, match="other settings"):
        compare(plan(manifest, training={"steps": 5, "accelerator": "cpu"}), resume=True)


def test_a_cell_is_the_same_in_another_process_and_after_an_interruption(manifest, tmp_path):
    config = plan(manifest)
    cohort, folds = folds_of(config)
    runner = CompareRunner(config, cohort, {fold.name: fold for fold in folds})
    cell = CompareCell("l_exp+fair_kl", "fold1", 3)
    result = runner(cell, tmp_path / "one")
    begun = tmp_path / "two" / "logs" / "metrics.csv"
    begun.parent.mkdir(parents=True)
    begun.write_text("step,loss\n1,9.0\n3,9.0\n")
    other = pickle.loads(pickle.dumps(runner))
    assert other(cell, tmp_path / "two")["loss"] == result["loss"]
    assert other.key(cell) == runner.key(cell) != runner.key(CompareCell("l_exp+fair_kl", "fold1", 4))
    assert (tmp_path / "one" / PER_PERSON).read_bytes() == (tmp_path / "two" / PER_PERSON).read_bytes()
    assert pd.read_csv(begun)["step"].tolist() == [1, 4]
    assert not (tmp_path / "one" / "checkpoints").exists()


def test_names_of_cells_are_safe_and_their_own(manifest):
    assert CompareCell("a", "without-x/y z", 0).name != CompareCell("a", "without-x_y_z", 0).name
    assert "/" not in CompareCell("a", "without-../x", 0).name
    config = plan(manifest, protocol={"leave_site_out": True, "seeds": [0, 1]})
    _, folds = folds_of(config)
    cells = plan_cells(config, {fold.name: fold for fold in folds})
    assert len({cell.name for cell in cells}) == len(cells) == len(ARMS) * (2 * 2 + 3)


def test_unit_rows_leave_nothing_infinite():
    assert np.allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_command_line(manifest, tmp_path):
    values = plan(manifest, name="cli", runs=str(tmp_path), arms=ARMS[:1]).model_dump(mode="json")
    path = write_yaml(tmp_path / "plan.yaml", values)
    result = CliRunner().invoke(app, ["compare", "--plan", str(path), "--json", "--set", "protocol.folds=3"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{") :])["rows"][0]["arm"] == "raw"
    assert CliRunner().invoke(app, ["report", str(tmp_path / "cli")]).exit_code == 0
