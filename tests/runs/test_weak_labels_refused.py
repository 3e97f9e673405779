"""Weak labels and priors that would mislead a training are refused before anything is prepared, with one message."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import pretrain_values, small_cohort

from medssl.config import PretrainConfig
from medssl.core.errors import CheckpointError, ConfigError, DataError
from medssl.core.files import atomic_write
from medssl.core.schema import validate
from medssl.data.features import FeatureTable, numbered, read_features, write_features
from medssl.models import encoder_from_weights, head_from_weights, read_model
from medssl.runs.embed import embed
from medssl.runs.labels import check_labels, label_uses, prior_of, training_items
from medssl.runs.pretrain import pretrain
from medssl.runs.volumes import (
    image_hashes,
    load_manifest,
    open_run_cohort,
    pretraining_manifests,
    voxel_hashes,
)

N = 12


def people(**columns) -> pd.DataFrame:
    """Twelve people of two sites, one row of features each, two of them tested on."""
    table = {
        "subject": [f"p{number:02d}" for number in range(N)],
        "age": [20.0 + 5 * number for number in range(N)],
        "site": ["A", "B"] * (N // 2),
        "diagnosis": ["control", "control", "patient"] * (N // 3),
        "split": ["train"] * (N - 2) + ["test"] * 2,
    }
    return pd.DataFrame({**table, **columns})


def cohort(folder: Path, **columns) -> Path:
    """A manifest of rows of a table, written without the checks that `data scan` makes."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, 5)).astype(np.float32)
    pd.DataFrame(features, columns=[f"thickness_{k}" for k in range(5)]).to_csv(folder / "measures.csv", index=False)
    table = people(**columns).assign(image="measures.csv", frame=range(N))
    atomic_write(folder / "manifest.csv", table.to_csv(index=False))
    return folder / "manifest.csv"


def values(manifest: Path, **changes):
    own = {
        "name": "ages",
        "items": {"geometry": "features"},
        "model": {"encoder": {"name": "mlp", "widths": [8, 4]}},
        "views": {"preset": "features", "n_views": 2},
        "method": {"name": "y_aware", "hidden_dim": 8, "projection_dim": 4},
        "sampler": {"name": "random", "batch_size": 6},
    }
    result = pretrain_values(manifest, manifest.parent, **{**own, **changes})
    result["data"].pop("prepare", None)  # of images
    return result


def config_of(manifest: Path, **changes) -> PretrainConfig:
    return validate(PretrainConfig, values(manifest, **changes), source="test")


def refused(manifest: Path, error: type[Exception] = DataError, **changes) -> str:
    """The message; nothing may have been left behind."""
    with pytest.raises(error) as caught:
        pretrain(config_of(manifest, **changes))
    assert not (manifest.parent / "runs").exists()
    return str(caught.value)


AGES = people()["age"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"age": AGES.mask(AGES.index.isin([2, 7]))}, ["`age` is missing for 2 of the 10", "lines 4, 9 (p02, p07)"]),
        ({"age": AGES.replace(30.0, -30.0)}, ["line 4, age: '-30.0' is not an age of 0 to 130 years"]),
        ({"age": 12 * AGES}, ["line 2, age: '240.0' is not an age", "months are divided by 12", "12 problems"]),
        ({"age": 40.0}, ["all 10 volumes that are trained on have the same label", "age is 40"]),
        ({"age": ""}, ["method.kernel needs the column `age`, which is empty"]),
    ],
    ids=["missing", "negative", "months", "all equal", "empty"],
)
def test_ages_that_cannot_be_learnt_from(tmp_path, columns, expected):
    message = refused(cohort(tmp_path, **columns))
    for part in expected:
        assert part in message
    assert str(tmp_path / "manifest.csv") in message
    assert "fix:" in message


def test_missing_ages_may_be_ignored_and_people_who_are_not_trained_on_may_lack_theirs(tmp_path):
    kernel = {"attributes": {"age": {"sigma": 5}}, "missing": "ignore"}
    method = {"name": "y_aware", "hidden_dim": 8, "projection_dim": 4}
    manifest = cohort(tmp_path, age=AGES.mask(AGES.index.isin([2, 11])))
    done = pretrain(config_of(manifest, method={**method, "kernel": kernel}))
    assert np.isfinite(done.summary["last"]["loss"])
    only_tested = cohort(tmp_path / "other", age=AGES.mask(AGES.index == 11))
    assert pretrain(config_of(only_tested)).summary["label_notes"] == []


@pytest.mark.parametrize("sigma", [0, -5])
def test_sigma_of_no_width_is_refused_when_the_configuration_is_read(tmp_path, sigma):
    method = {"name": "y_aware", "kernel": {"attributes": {"age": {"sigma": sigma}}}}
    with pytest.raises(ConfigError, match=r"method\.y_aware\.kernel\.attributes\.age\.sigma.*greater than 0"):
        config_of(cohort(tmp_path), method=method)


def test_differences_of_text_are_refused(tmp_path):
    message = refused(cohort(tmp_path), method={"name": "l_exp", "kernel": {"attributes": {"site": {"sigma": 1}}}})
    assert "`site` holds text" in message
    assert "kind: equal" in message


def test_one_site_leaves_nothing_to_remove(tmp_path):
    message = refused(cohort(tmp_path, site="Paris"), debias={"name": "fair_kl"})
    assert "every volume that is trained on has the same `site`" in message
    assert "site Paris, 10 people" in message


def test_a_site_that_only_some_have_is_missing(tmp_path):
    site = people()["site"].mask(people().index == 3)
    assert "debias.attribute: `site` is missing for 1 of the 10" in refused(
        cohort(tmp_path, site=site), debias={"name": "end"}
    )


def test_a_site_with_one_person_is_named_and_trained_on(tmp_path):
    manifest = cohort(tmp_path, site=["alone", *people()["site"][1:]])
    done = pretrain(config_of(manifest, debias={"name": "fair_kl", "on": "z"}))
    notes = [line for line in done.summary["label_notes"] if "one person alone has site alone" in line]
    assert len(notes) == 1
    assert "line 2 (p00)" in notes[0]
    assert "WARNING: " + notes[0] in done.text()
    page = done.report.read_text()
    assert "one person alone has site alone" in page
    assert "y_aware with fair_kl against site on z, weight 1 was trained" in page
    assert {"main_loss", "debias", "debias_aligned_pairs"} <= set(done.summary["last"])


@pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")
def test_batches_in_which_a_regulariser_did_nothing_are_reported(tmp_path):
    manifest = cohort(tmp_path, site=[f"site {number}" for number in range(N)])
    done = pretrain(config_of(manifest, debias={"name": "end"}))
    assert any("3 batches had no aligned or no conflicting pairs" in line for line in done.summary["label_notes"])


def test_a_debiased_run_keeps_its_head_and_says_what_it_removed(tmp_path):
    done = pretrain(config_of(cohort(tmp_path), debias={"name": "end", "on": "z", "weight": 2}))
    about = read_model(done.weights)
    assert about["info"]["debias"] == done.summary["debias"]
    assert (about["info"]["debias"]["on"], about["info"]["debias"]["weight"]) == ("z", 2.0)
    assert head_from_weights(done.weights).out_features == 4
    assert encoder_from_weights(done.weights).out_features == head_from_weights(done.weights).in_features == 4


def test_a_regulariser_on_a_projection_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"method `supervised` has no z \(it has h\)"):
        config_of(cohort(tmp_path), method={"name": "supervised"}, debias={"name": "fair_kl", "on": "z"})


def test_what_is_asked_of_every_column_is_known_from_the_configuration(tmp_path):
    kernel = {"attributes": {"age": {"sigma": 5}, "sex": {"kind": "equal"}}}
    config = config_of(
        cohort(tmp_path),
        method={"name": "l_thr", "kernel": kernel},
        debias={"name": "fair_kl", "target": {"column": "diagnosis"}},
    )
    assert [use.column for use in label_uses(config)] == ["age", "sex", "site", "diagnosis"]
    assert config.needs.labels == ("age", "sex", "site", "diagnosis")


# --- priors ------------------------------------------------------------------------------------------------------


def prior(path: Path, ids: list[str], *, by: str = "subject", n: int = 3) -> Path:
    rows = np.arange(len(ids) * n, dtype=np.float32).reshape(len(ids), n)
    return write_features(FeatureTable(numbered(n), rows, pd.DataFrame({by: ids})), path)


def with_prior(path: Path, **settings):
    head = {"hidden_dim": 8, "projection_dim": 4}
    return {"name": "decoupled_uniformity", "prior": {"table": str(path), **settings}, **head}


TRAINED = [f"p{number:02d}" for number in range(N - 2)]


@pytest.mark.parametrize(
    ("ids", "by", "expected"),
    [
        (TRAINED[:3], "subject", ["no row for 7 of the 10 people", "p03, p04, p05, p06, p07, p08, p09"]),
        ([*TRAINED, "p03"], "subject", ["several rows of one subject", "p03", "column `case`"]),
        (TRAINED, "code", ["does not say whose its rows are"]),
    ],
    ids=["missing people", "twice", "no ids"],
)
def test_a_prior_that_does_not_fit_the_people_is_refused(tmp_path, ids, by, expected):
    manifest = cohort(tmp_path)
    path = prior(tmp_path / "prior.csv", ids, by=by)
    message = refused(manifest, method=with_prior(path))
    for part in (*expected, str(path), "fix:"):
        assert part in message


def test_a_prior_with_gaps_is_refused(tmp_path):
    manifest = cohort(tmp_path)
    rows = np.ones((len(TRAINED), 2), dtype=np.float32)
    rows[4, 1] = np.nan
    table = FeatureTable(numbered(2), rows, pd.DataFrame({"subject": TRAINED}))
    message = refused(manifest, method=with_prior(write_features(table, tmp_path / "prior.parquet")))
    assert "missing or infinite values" in message
    assert "p04" in message


def test_a_prior_table_that_is_not_there_is_named(tmp_path):
    assert "nowhere.csv" in refused(cohort(tmp_path), method=with_prior(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize(("by", "suffix"), [("subject", "csv"), ("case", "parquet"), ("subject", "npy")])
def test_priors_follow_the_people_whatever_the_order_of_either_table(tmp_path, by, suffix):
    manifest = cohort(tmp_path)
    rows, _ = load_manifest(config_of(manifest).data)
    ids = list(rows.table[by])[::-1]  # in another order, with the people that are tested on among them
    path = prior(tmp_path / f"prior.{suffix}", ids, by=by)
    assert prior_of(rows, path)[:, 0].tolist() == [3.0 * (N - 1 - number) for number in range(N)]


def test_a_run_with_a_prior_trains_and_goes_on_only_with_the_same_one(tmp_path):
    manifest = cohort(tmp_path)
    path = prior(tmp_path / "prior.csv", TRAINED)
    config = config_of(manifest, method=with_prior(path))
    opened = open_run_cohort(config)
    table, reader = training_items(config, opened, opened.chosen)
    assert reader.table is table
    assert table.labels["prior"].tolist() == np.arange(30, dtype=np.float32).reshape(10, 3).tolist()
    done = pretrain(config)
    assert np.isfinite(done.summary["last"]["loss"])
    write_features(
        FeatureTable(numbered(3), np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32),
                     pd.DataFrame({"subject": TRAINED})),
        path,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="prior"):
        pretrain(config, resume=True)


def test_the_code_of_an_autoencoder_is_a_prior_unless_it_was_trained_on_test_people(tmp_path):
    manifest = cohort(tmp_path)
    small = {"latent_dim": 3}
    first = pretrain(config_of(manifest, name="code", method={"name": "vae", **small}))
    table = embed(first.folder, manifest, tmp_path / "code.parquet", layer="z").path
    assert read_features(table).values.shape == (N, 3)
    done = pretrain(config_of(manifest, name="guided", method=with_prior(table)))
    assert np.isfinite(done.summary["last"]["loss"])

    everybody = {**values(manifest)["data"], "splits": None, "transductive": True}
    seen = pretrain(config_of(manifest, name="seen", data=everybody, method={"name": "vae", **small}))
    leaking = embed(seen.folder, manifest, tmp_path / "seen.csv", layer="z").path
    with pytest.raises(DataError, match="was trained on 2 of the test visits") as caught:
        pretrain(config_of(manifest, name="leaking", method=with_prior(leaking)))
    assert "p10, p11" in str(caught.value)


def other_split(manifest: Path, name: str, **columns) -> Path:
    """The same people with other columns, beside the manifest."""
    table = pd.read_csv(manifest).assign(**columns)
    atomic_write(manifest.with_name(name), table.to_csv(index=False))
    return manifest.with_name(name)


@pytest.fixture(scope="module")
def seen_prior(tmp_path_factory):
    """A code that was trained on p10 too, of the rows that another split trains on; (manifest, table, its run)."""
    manifest = cohort(tmp_path_factory.mktemp("prior"))
    earlier = other_split(manifest, "earlier.csv", split=["train"] * (N - 1) + ["test"])
    data = {**values(earlier)["data"], "transductive": False}
    first = pretrain(config_of(earlier, name="code", data=data, method={"name": "vae", "latent_dim": 3}))
    return manifest, embed(first.folder, manifest, manifest.with_name("code.csv"), splits=("train",)).path, first


def test_a_prior_whose_network_saw_test_people_is_refused_though_they_are_not_in_it(seen_prior):
    manifest, table, first = seen_prior
    assert set(read_features(table).keys["subject"]) == set(TRAINED)
    with pytest.raises(DataError, match="group p10 is in the pretraining of the network behind the prior table code"):
        pretrain(config_of(manifest, name="leaking", method=with_prior(table)))
    assert not (manifest.parent / "runs" / "leaking").exists()
    (first.folder / "manifest.csv").rename(first.folder / "elsewhere.csv")  # then only the fingerprints can tell
    try:
        with pytest.raises(DataError, match="was trained on 1 of the test visits(.|\n)*p10"):
            pretrain(config_of(manifest, name="leaking", method=with_prior(table)))
    finally:
        (first.folder / "elsewhere.csv").rename(first.folder / "manifest.csv")


def test_a_prior_that_does_not_say_whom_its_network_saw_is_noted(tmp_path):
    manifest = cohort(tmp_path)
    path = prior(tmp_path / "measured.csv", TRAINED)
    config = config_of(manifest, method=with_prior(path))
    (note,) = check_labels(config, *halves(config))
    assert "measured.csv: nothing beside it says whom its network was trained on" in note
    atomic_write(tmp_path / "measured.csv.json", json.dumps({"pretrained_on": [], "features": ["volume_of_another"]}))
    (note,) = check_labels(config, *halves(config))
    assert "trained on other measures, so only people were looked for" in note
    atomic_write(tmp_path / "measured.csv.json", "no json")
    with pytest.raises(DataError, match="not readable as JSON"):
        check_labels(config, *halves(config))


def halves(config: PretrainConfig):
    rows, _ = load_manifest(config.data)
    test = (rows.table["split"] == "test").to_numpy()
    return rows.select(~test), rows.select(test)


def test_whom_the_network_behind_a_prior_saw_counts_as_pretrained_on(seen_prior):
    manifest, table, first = seen_prior
    no_test = other_split(manifest, "guided.csv", split=["train"] * (N - 2) + ["validation"] * 2)
    done = pretrain(config_of(no_test, name="guided", method=with_prior(table)))
    seen = set(read_model(done.weights)["info"]["pretrained_on"])
    assert len(seen) == N - 1
    assert seen == set(read_model(first.weights)["info"]["pretrained_on"])
    assert [len(one) for one in pretraining_manifests(done.folder)] == [N - 2, N - 1]
    embedded = read_features(embed(done.folder, manifest, manifest.with_name("again.csv")).path).keys
    assert list(embedded["subject"][~embedded["pretrained_on"]]) == ["p11"]


def test_images_are_compared_with_what_a_prior_of_images_saw(tmp_path):
    manifest = small_cohort(tmp_path, n_subjects=5, n_test=1)
    changes = {"method": with_prior(tmp_path / "code.csv"), "views": {"preset": "gcl", "n_views": 2}}
    config = validate(PretrainConfig, pretrain_values(manifest, tmp_path, **changes), source="test")
    rows, tested = halves(config)
    hashes = image_hashes(tested)
    opened = open_run_cohort(config, splits=("test",))
    assert hashes == voxel_hashes(opened)
    prior(tmp_path / "code.csv", list(rows.table["subject"].unique()))
    about = {"features": None, "pretrained_on": [next(iter(hashes.values()))[:16]]}
    atomic_write(tmp_path / "code.csv.json", json.dumps(about))
    for voxels in (None, hashes):
        with pytest.raises(DataError, match="was trained on 1 of the test visits"):
            check_labels(config, rows, tested, voxels=voxels)
    atomic_write(tmp_path / "code.csv.json", json.dumps({**about, "pretrained_on": ["0" * 16]}))
    assert check_labels(config, rows, tested) == []
