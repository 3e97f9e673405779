"""The probes are scikit-learn's with the challenge's grids, never divide a person and do not see the order of rows."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medssl.core.errors import InputError
from medssl.evaluation import age_probe, person_folds, site_probe
from medssl.evaluation.probes import GRID, balanced_accuracy


def people(seed=0, n=60, n_features=5, n_sites=3):
    rng = np.random.default_rng(seed)
    site = rng.integers(0, n_sites, n)
    age = rng.uniform(20, 80, n)
    X = rng.standard_normal((n, n_features)) * [1e-3, 1, 1, 10, 1e4][:n_features]
    X[:, 0] += 1e-3 * (age - 50) / 30
    X[:, 1] += site
    return X, age, np.array([f"site {one}" for one in site]), np.array([f"p{i}" for i in range(n)])


def splits(folds):
    return [(np.flatnonzero(folds != k), np.flatnonzero(folds == k)) for k in range(folds.max() + 1)]


def test_age_probe_equals_a_grid_search_over_ridge():
    X, age, _, subject = people()
    probe = age_probe(X, age, subject, seed=3)
    cv = splits(person_folds(subject, seed=3))
    grid = {"ridge__alpha": list(GRID)}
    search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), grid, cv=cv, scoring="r2").fit(X, age)
    assert probe.alpha == search.best_params_["ridge__alpha"]
    assert probe.r2 == pytest.approx(search.best_score_)
    np.testing.assert_allclose(probe.predict(X), search.predict(X), rtol=1e-10)


@pytest.mark.parametrize("solver", ["saga", "lbfgs"])
def test_site_probe_equals_a_grid_search_over_logistic_regression(solver):
    X, _, site, subject = people(1)
    probe = site_probe(X, site, subject, seed=2, solver=solver)
    cv = splits(person_folds(subject, site, seed=2))
    model = make_pipeline(StandardScaler(), LogisticRegression(solver=solver, max_iter=150, random_state=2))
    grid = {"logisticregression__C": list(GRID)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = GridSearchCV(model, grid, cv=cv, scoring="balanced_accuracy").fit(X, site)
    assert search.best_params_["logisticregression__C"] == probe.C
    assert probe.balanced_accuracy == pytest.approx(search.best_score_)
    assert np.array_equal(probe.predict(X), search.predict(X))
    np.testing.assert_allclose(probe.predict_proba(X), search.predict_proba(X))


def test_reaching_the_cap_of_iterations_is_told_and_not_warned_about():
    # The site is in the small difference of two large numbers: found only with large weights, many steps away.
    common, site = np.random.default_rng(0).standard_normal(60), np.resize(["a", "b"], 60)
    close = np.column_stack([common, common + 0.2 * (site == "a")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hard = site_probe(close, site)
        easy = site_probe(close @ [[1, -1], [1, 1]], site)
    assert not hard.converged
    assert easy.converged


@given(
    n_people=st.integers(2, 40),
    n_sites=st.integers(1, 6),
    scans=st.integers(1, 3),
    n_folds=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_folds_keep_people_whole_and_spread_sites_evenly(n_people, n_sites, scans, n_folds, seed):
    rng = np.random.default_rng(seed)
    site_of = rng.integers(0, n_sites, n_people)
    subject = np.repeat(np.arange(n_people), scans)
    site = np.repeat(site_of, scans)
    folds = person_folds(subject, site, n_folds=n_folds, seed=seed)
    of_person = folds.reshape(n_people, scans)
    assert (of_person == of_person[:, :1]).all()
    assert set(folds) == set(range(min(n_folds, n_people)))
    sizes = np.bincount(of_person[:, 0])
    assert sizes.max() - sizes.min() <= 1
    for one in set(site_of):
        shares = np.bincount(of_person[site_of == one, 0], minlength=len(sizes))
        assert shares.max() - shares.min() <= 1
    order = rng.permutation(len(subject))
    assert np.array_equal(person_folds(subject[order], site[order], n_folds=n_folds, seed=seed), folds[order])


def test_the_order_of_rows_changes_nothing():
    X, age, site, subject = people(3)
    order = np.random.default_rng(1).permutation(len(X))
    one, other = age_probe(X, age, subject), age_probe(X[order], age[order], subject[order])
    assert one.alpha == other.alpha
    np.testing.assert_allclose(one.predict(X), other.predict(X), rtol=1e-9)
    one, other = (
        site_probe(*data, solver="lbfgs") for data in ((X, site, subject), (X[order], site[order], subject[order]))
    )
    assert (one.C, one.balanced_accuracy) == (other.C, other.balanced_accuracy)


def test_two_scans_of_a_person_never_stand_on_both_sides():
    # Noise that only names the person: a divided person would be recognised.
    rng = np.random.default_rng(0)
    X = np.repeat(rng.standard_normal((30, 400)), 2, axis=0) + 1e-3 * rng.standard_normal((60, 400))
    age, site = np.repeat(rng.uniform(20, 80, 30), 2), np.repeat(rng.choice(["a", "b"], 30), 2)
    subject = np.repeat(np.arange(30), 2)
    assert age_probe(X, age, subject).r2 < 0.3 < 0.6 < age_probe(X, age).r2
    assert site_probe(X, site, subject, solver="lbfgs").balanced_accuracy < 0.75
    assert site_probe(X, site, solver="lbfgs").balanced_accuracy > 0.85


def test_small_sites_and_few_people_follow_the_rule():
    rng = np.random.default_rng(0)
    site = np.array(["big"] * 20 + ["two"] * 2 + ["one"])
    X = rng.standard_normal((23, 2)) + (site == "two")[:, None] * 8
    probe = site_probe(X, site)
    assert list(probe.classes) == ["big", "one", "two"]
    assert probe.n_folds == 5
    assert age_probe(X[:3], [20, 30, 40]).n_folds == 3
    assert np.isfinite(age_probe(np.zeros((6, 2)), [30.0] * 6).predict(np.ones((2, 2)))).all()


def test_refusals_name_the_rows_and_sites():
    X, age, site, subject = people()
    broken = X.copy()
    broken[[3, 7], 1] = np.nan
    with pytest.raises(InputError, match="not finite\n.*3, 7"):
        age_probe(broken, age)
    with pytest.raises(InputError, match="age is missing or no number\n.*5"):
        age_probe(X, np.where(np.arange(len(X)) == 5, np.nan, age))
    with pytest.raises(InputError, match="site is missing\n.*rows \\(from 0\\) 0"):
        site_probe(X, [None, *site[1:]])
    with pytest.raises(InputError, match="nothing to tell apart: two sites"):
        site_probe(X[:4], ["a", "a", "a", "b"])
    with pytest.raises(InputError, match="nothing to tell apart: two sites"):
        site_probe(X[:4], ["a", "a", "b", "b"], ["p", "q", "r", "r"])
    with pytest.raises(InputError, match="differ in length"):
        age_probe(X, age, subject[1:])


def test_balanced_accuracy_is_the_mean_recall():
    true, predicted = ["a", "a", "a", "b"], ["a", "b", "a", "c"]
    assert balanced_accuracy(true, predicted) == pytest.approx((2 / 3 + 0) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert balanced_accuracy(true, predicted) == pytest.approx(balanced_accuracy_score(true, predicted))


def test_people_scanned_at_several_sites_may_fall_into_one_fold():
    subject, site = [*(f"p{i}" for i in range(6)), "p0", "p1"], [*"AAAAAA", *"BB"]
    X = np.random.default_rng(0).standard_normal((8, 3))
    for seed in range(20):
        assert set(site_probe(X, site, subject, seed=seed, solver="lbfgs").predict(X)) <= {"A", "B"}
