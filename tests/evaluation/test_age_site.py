"""The score equals the published rows; every number equals a slow one; intervals speak of people."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score

from medssl.core.errors import InputError
from medssl.evaluation import (
    People,
    compare_age_site,
    openbhb_score,
    person_folds,
    predict_age_site,
    site_probe,
    summarise_age_site,
)

# Balanced accuracy in per cent, external MAE in years, score: means of the authors' runs on the challenge's server.
# Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction" (ISBI), the twelve rows
# of the kernel ablation as the authors publish them (github.com/EIDOSLAB/contrastive-brain-age-prediction,
# src/figures/ablation.csv).
PUBLISHED = {
    "threshold, cauchy 2": (9.2667, 6.183, 3.025333),
    "expw, cauchy 2": (5.0, 4.547, 1.848667),
    "y-aware, rbf 2": (6.6, 4.102, 1.815333),
    "y-aware, cauchy 2": (8.1667, 5.267333, 2.482333),
    "expw, rbf 2": (5.1, 3.761, 1.539667),
    "threshold, rbf 2": (5.7333, 4.098333, 1.738333),
    "threshold, rbf 1": (8.5, 5.508333, 2.627),
    "expw, cauchy 1": (4.8667, 4.502667, 1.816),
    "y-aware, rbf 1": (6.6333, 5.492667, 2.428),
    "threshold, cauchy 1": (8.5333, 4.775333, 2.282333),
    "expw, rbf 1": (4.9667, 3.877667, 1.575667),
    "y-aware, cauchy 1": (7.7333, 4.633667, 2.147333),
}
# The paper's table, ResNet-18, to the two decimals that it prints.
PRINTED = {
    "l1": (6.7, 4.18, 1.86),
    "combat": (4.5, 4.76, 1.88),
    "y-aware": (6.60, 4.10, 1.82),
    "threshold": (5.73, 4.10, 1.74),
    "exp": (5.1, 3.76, 1.54),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_score_equals_the_published_rows(row):
    percent, mae, score = PUBLISHED[row]
    # Each row is a mean over three runs of rounded accuracies, and the score is concave in them.
    assert openbhb_score(mae, percent / 100) == pytest.approx(score, abs=0.006)


@pytest.mark.parametrize("row", PRINTED)
def test_score_equals_the_printed_table(row):
    percent, mae, score = PRINTED[row]
    assert openbhb_score(mae, percent / 100) == pytest.approx(score, abs=0.01)


def test_score_of_the_best_row_and_of_percentages():
    assert round(openbhb_score(3.761, 0.051), 3) == 1.540
    with pytest.raises(InputError, match="fraction"):
        openbhb_score(3.761, 5.1)


def cohort(seed=0, n=90, sites=("a", "b", "c"), strength=0.8):
    rng = np.random.default_rng(seed)
    site = rng.choice(sites, n)
    age = rng.uniform(20, 80, n) + 10 * (site == "a")
    X = rng.standard_normal((n, 4))
    X[:, 0] += age / 10
    X[:, 1] += strength * (site == "b")
    return People(X, age, site, np.array([f"{seed}-{i}" for i in range(n)]))


def predictions(seed=0, seeds=2, scans=1, noise=4.0, knows=0.5, external=True):
    """A table as the probes leave it, of random quality, without fitting any."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, n, sites in (("internal", 60, ["a", "b", "c"]), ("external", 25, ["x", "y"])):
        if name == "external" and not external:
            continue
        site, age = np.resize(sites, n), np.random.default_rng(n).uniform(18, 85, n)
        for draw in range(seeds):
            for _ in range(scans):
                guess = np.where(rng.random(n) < knows, site, rng.choice(sites, n))
                rows.append(
                    pd.DataFrame(
                        {
                            "subject": [f"{name}{i}" for i in range(n)],
                            "set": name,
                            "site": site,
                            "age": age,
                            "age_pred": age + noise * rng.standard_normal(n),
                            "site_pred": guess if name == "internal" else None,
                            "site_pred_age_only": rng.choice(sites, n) if name == "internal" else None,
                            "seed": draw,
                        }
                    )
                )
    return pd.concat(rows, ignore_index=True)


def test_point_values_equal_scikit_learn():
    table = predictions(scans=2)
    summary = summarise_age_site(table)
    wanted = {}
    for name in ("internal", "external"):
        parts = [part for _, part in table[table["set"] == name].groupby("seed")]
        wanted[f"mae_{name}"] = np.mean([(one["age"] - one["age_pred"]).abs().mean() for one in parts])
        wanted[f"r_{name}"] = np.mean([np.corrcoef(one["age"], one["age_pred"])[0, 1] for one in parts])
        wanted[f"r2_{name}"] = np.mean([r2_score(one["age"], one["age_pred"]) for one in parts])
    parts = [part for _, part in table[table["set"] == "internal"].groupby("seed")]
    accuracies = [balanced_accuracy_score(one["site"], one["site_pred"]) for one in parts]
    wanted["bacc"], wanted["bacc_sd"] = np.mean(accuracies), np.std(accuracies, ddof=1)
    wanted["bacc_age_only"] = np.mean(
        [balanced_accuracy_score(one["site"], one["site_pred_age_only"]) for one in parts]
    )
    wanted["bacc_chance"] = 1 / 3
    for name, value in wanted.items():
        assert getattr(summary, name) == pytest.approx(value), name
    external = table[table["set"] == "external"].groupby("seed")
    scores = [
        openbhb_score((part["age"] - part["age_pred"]).abs().mean(), bacc)
        for (_, part), bacc in zip(external, accuracies)
    ]
    assert summary.score == pytest.approx(np.mean(scores))
    assert (summary.n_people, summary.n_seeds) == (85, 2)
    confusion = summary.confusion
    assert confusion["sites"] == ["a", "b", "c"]
    assert np.sum(confusion["counts"]) == (table["set"] == "internal").sum()
    assert np.trace(confusion["counts"]) == (table["site"] == table["site_pred"]).sum()
    decade = {(one["set"], one["decade"]): one for one in summary.mae_by_decade}[("internal", "30-39")]
    part = table[(table["set"] == "internal") & table["age"].between(30, 39.9999)]
    assert decade["mae"] == pytest.approx((part["age"] - part["age_pred"]).abs().mean())
    assert decade["n_people"] == part["subject"].nunique()


def test_intervals_resample_people_and_not_their_scans():
    once = summarise_age_site(predictions(seeds=1))
    table = predictions(seeds=1)
    many = summarise_age_site(pd.concat([table] * 10))
    for name in ("mae_internal_ci", "mae_external_ci", "bacc_ci", "score_ci", "bacc_permutation"):
        low, high = getattr(once, name)
        assert getattr(many, name) == pytest.approx((low, high)), name
    error = (table["age"] - table["age_pred"]).abs()[table["set"] == "internal"]
    low, high = once.mae_internal_ci
    assert high - low == pytest.approx(2 * 1.96 * error.std() / math.sqrt(60), rel=0.15)
    assert low < once.mae_internal < high


def test_permutations_show_what_ignorance_looks_like():
    ignorant, knowing = summarise_age_site(predictions(knows=0)), summarise_age_site(predictions(knows=0.8))
    for one in (ignorant, knowing):
        low, high = one.bacc_permutation
        assert low < 1 / 3 < high
    assert ignorant.bacc_permutation[0] < ignorant.bacc < ignorant.bacc_permutation[1]
    assert not ignorant.below_chance
    assert knowing.bacc > knowing.bacc_permutation[1]
    # Every permutation of four people, by hand.
    table = (
        predictions(seeds=1, external=False).head(4).assign(site=["a", "a", "b", "b"], site_pred=["a", "b", "b", "b"])
    )
    assert summarise_age_site(table).bacc_permutation == (0.25, 0.75)
    assert summarise_age_site(table.assign(site_pred=["b", "b", "a", "a"])).bacc == 0
    many = pd.concat(
        [table.assign(subject=[f"{k}-{i}" for i in range(4)], site_pred=["b", "b", "a", "a"]) for k in range(9)]
    )
    assert summarise_age_site(many).below_chance


def test_without_external_people_there_is_no_score():
    summary = summarise_age_site(predictions(external=False))
    nothing = ("mae_external", "mae_external_sd", "mae_external_ci", "r_external", "r2_external", "score", "score_ci")
    assert all(getattr(summary, name) is None for name in nothing)
    only = predictions()
    summary = summarise_age_site(only[only["set"] == "external"])
    assert (summary.bacc, summary.bacc_permutation, summary.confusion, summary.below_chance) == (
        None,
        None,
        None,
        False,
    )
    assert summary.mae_external is not None
    assert None not in (value for value in summarise_age_site(predictions()).to_json().values())


def test_a_constant_prediction_has_no_correlation():
    table = predictions(external=False).assign(age_pred=123.4)
    summary = summarise_age_site(table)
    assert summary.r_internal is None
    assert summary.r2_internal < 0


def test_predictions_come_from_other_people_and_the_floor_from_age_alone():
    train, internal = cohort(0), cohort(1, n=30)
    external = cohort(2, n=20, sites=("x", "y"))
    table = predict_age_site(train, internal, external, seed=4)
    assert list(table["set"]) == ["internal"] * 30 + ["external"] * 20
    assert table.loc[table["set"] == "external", ["site_pred", "site_pred_age_only"]].isna().all(None)
    alone = site_probe(train.age[:, None], train.site, train.subject, seed=4)
    inside = table[table["set"] == "internal"]
    assert list(inside["site_pred_age_only"]) == list(alone.predict(internal.age[:, None]))
    assert (inside["age"] - inside["age_pred"]).abs().mean() < 12
    only = predict_age_site(train, None, external, seed=4)
    pd.testing.assert_series_equal(only["age_pred"], table["age_pred"][30:].reset_index(drop=True))


def test_refusals_name_people_and_sites():
    train, internal, external = cohort(0), cohort(1, n=30), cohort(2, n=20, sites=("x", "y"))
    with pytest.raises(InputError, match="1 internal people are also among(.|\n)*0-5"):
        predict_age_site(train, train.select(np.array([5])), None)
    with pytest.raises(InputError, match="2 internal sites hold no training people(.|\n)*x, y"):
        predict_age_site(train, external, None)
    with pytest.raises(InputError, match="3 external sites also hold training people"):
        predict_age_site(train, None, internal)
    with pytest.raises(InputError, match="nobody"):
        predict_age_site(train, None, None)
    with pytest.raises(InputError, match="age is missing or no number\n.*2"):
        People(train.X[:3], [30, 40, np.nan], train.site[:3], train.subject[:3])
    with pytest.raises(InputError, match="two sites"):
        predict_age_site(train.select(train.site == "a"), internal.select(internal.site == "a"), None)
    with pytest.raises(InputError, match="several values of `arm`"):
        summarise_age_site(pd.concat([predictions().assign(arm="p"), predictions().assign(arm="q")]))


def test_paired_differences_use_the_same_people_and_are_corrected():
    base, same = predictions(0, noise=4).assign(arm="plain"), predictions(0, noise=4).assign(arm="same")
    worse = predictions(1, noise=9, knows=0.95).assign(arm="worse")
    worse["age_pred"] += 3
    table = pd.concat([base, same, worse])
    for metric in ("mae_internal", "mae_external", "bacc", "score"):
        result = compare_age_site(table, "plain", metric, n_bootstrap=2000).set_index("arm")
        nothing, much = result.loc["same"], result.loc["worse"]
        assert (nothing["difference"], nothing["low"], nothing["high"], nothing["p"]) == (0, 0, 0, 1)
        assert much["low"] > 0
        assert much["p"] < 0.05
        assert much["p_holm"] == pytest.approx(min(1, 2 * much["p"]))
        apart = [getattr(summarise_age_site(one.drop(columns="arm")), metric) for one in (worse, base)]
        assert much["difference"] == pytest.approx(apart[0] - apart[1])
    layers = pd.concat([table.assign(layer="z"), table[table["arm"] != "same"].assign(layer="h")])
    assert list(compare_age_site(layers, "plain")["layer"]) == ["z", "z", "h"]
    with pytest.raises(InputError, match="not evaluated on the same people"):
        compare_age_site(pd.concat([base, worse.iloc[1:]]), "plain")
    with pytest.raises(InputError, match="no arm `nobody`"):
        compare_age_site(table, "nobody")
    with pytest.raises(InputError, match="does not hold `score`"):
        compare_age_site(table[table["set"] == "internal"], "plain", "score")


def test_a_thousand_resamples_of_six_hundred_people_are_quick():
    rng = np.random.default_rng(0)
    sites = np.array([f"s{i}" for i in range(12)])
    table = pd.DataFrame({"subject": np.arange(600), "set": "internal", "site": rng.choice(sites, 600)})
    table["age"], table["age_pred"] = rng.uniform(20, 80, (2, 600))
    table["site_pred"], table["site_pred_age_only"] = rng.choice(sites, (2, 600))
    start = time.process_time()
    summarise_age_site(table)
    assert time.process_time() - start < 0.5


@pytest.mark.real_data
def test_site_can_be_told_from_raw_features_and_hardly_from_age(real_data):
    table = pd.read_csv(real_data / "brain-tables" / "ixi.csv")
    X = table.filter(regex="^[lr]h_").to_numpy()
    people = People(X, table["age"], table["site"], table["participant_id"])
    folds = person_folds(people.subject, people.site, seed=0)
    parts = [
        predict_age_site(people.select(folds != k), people.select(folds == k), None, solver="lbfgs") for k in range(5)
    ]
    summary = summarise_age_site(pd.concat(parts))
    assert summary.mae_internal == pytest.approx(8.77, abs=0.3)
    assert summary.bacc == pytest.approx(0.92, abs=0.03)
    assert summary.bacc_age_only == pytest.approx(0.33, abs=0.03)
