"""ComBat equals the published program where that one runs, loops where it does not, and has a rule for every hole."""

import contextlib
import io
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from medssl.core.errors import InputError
from medssl.evaluation import ComBat

SETTINGS = [
    {"parametric": True},
    {"parametric": False},
    {"parametric": True, "mean_only": True},
    {"parametric": False, "mean_only": True},
    {"empirical_bayes": False},
]


def cohort(seed=0, sizes=(9, 12, 7), n_features=6):
    """Features that follow age and sex, with a shift and a scale of each site."""
    rng = np.random.default_rng(seed)
    site = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    covariates = pd.DataFrame({"age": rng.integers(20, 80, len(site)), "sex": rng.choice(["f", "m"], len(site))})
    shift, scale = rng.normal(0, 2, (len(sizes), n_features)), rng.uniform(0.5, 2, (len(sizes), n_features))
    code = np.unique(site, return_inverse=True)[1]
    noise = rng.standard_normal((len(site), n_features))
    X = 100 + 0.1 * covariates["age"].to_numpy()[:, None] * rng.standard_normal(n_features)
    X = X + (covariates["sex"] == "m").to_numpy()[:, None] * rng.standard_normal(n_features)
    return X + shift[code] + scale[code] * noise, site, covariates


def published(X, site, covariates, *, empirical_bayes=True, parametric=True, mean_only=False):
    neuro = pytest.importorskip("neuroCombat")
    covars = pd.DataFrame({"site": site}) if covariates is None else covariates.assign(site=site)
    with contextlib.redirect_stdout(io.StringIO()):
        result = neuro.neuroCombat(
            X.T.astype(np.float64),
            covars,
            "site",
            categorical_cols=None if covariates is None else ["sex"],
            continuous_cols=None if covariates is None else ["age"],
            eb=empirical_bayes,
            parametric=parametric,
            mean_only=mean_only,
        )
    return result["data"].T


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_covariates", [True, False])
def test_equals_the_published_program(settings, with_covariates):
    X, site, covariates = cohort()
    kept = covariates if with_covariates else None
    ours = ComBat(**settings).fit_transform(X, sites=site, covariates=kept)
    # Both stop iterating at a relative change of 1e-4; the published test of it misses negative shifts.
    tolerance = 1e-9 if settings != {"parametric": True} else 3e-4
    np.testing.assert_allclose(ours, published(X, site, kept, **settings), rtol=0, atol=tolerance * X.std())


def by_loops(X, site, age, reference, empirical_bayes, mean_only):
    """Parametric ComBat with a reference site, feature by feature, with one continuous covariate."""
    sites, n_features = sorted(set(site)), X.shape[1]
    z, beta, mean, sd = np.empty_like(X), [], [], []
    for v in range(n_features):
        design = np.array([[float(s == t) for t in sites] + [a] for s, a in zip(site, age)])
        w = np.linalg.solve(design.T @ design, design.T @ X[:, v])
        beta.append(w[-1])
        mean.append(w[sites.index(reference)])
        residuals = [X[j, v] - design[j] @ w for j in range(len(X)) if site[j] == reference]
        sd.append(np.sqrt(sum(r * r for r in residuals) / len(residuals)))
        for j in range(len(X)):
            z[j, v] = (X[j, v] - mean[v] - age[j] * beta[v]) / sd[v]
    result = X.copy()
    for s in sites:
        rows = [j for j in range(len(X)) if site[j] == s]
        if s == reference:
            continue
        g_hat = np.array([np.mean([z[j, v] for j in rows]) for v in range(n_features)])
        d_hat = np.array([np.var([z[j, v] for j in rows], ddof=1) for v in range(n_features)])
        bar, tau2 = g_hat.mean(), g_hat.var(ddof=1)
        g, d = g_hat.copy(), np.ones(n_features) if mean_only else d_hat.copy()
        if empirical_bayes and mean_only:
            g = (tau2 * g_hat + bar) / (tau2 + 1)
        elif empirical_bayes:
            m, s2 = d_hat.mean(), d_hat.var(ddof=1)
            a, b = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
            for _ in range(200):
                for v in range(n_features):
                    g[v] = (len(rows) * tau2 * g_hat[v] + d[v] * bar) / (len(rows) * tau2 + d[v])
                    d[v] = (0.5 * sum((z[j, v] - g[v]) ** 2 for j in rows) + b) / (len(rows) / 2 + a - 1)
        for v in range(n_features):
            for j in rows:
                result[j, v] = (z[j, v] - g[v]) / np.sqrt(d[v]) * sd[v] + mean[v] + age[j] * beta[v]
    return result


@pytest.mark.parametrize("settings", [{}, {"mean_only": True}, {"empirical_bayes": False}], ids=str)
def test_a_reference_site_stays_and_draws_the_others_to_it(settings):
    X, site, covariates = cohort(1)
    kept = covariates[["age"]]
    ours = ComBat(reference_site="s1", **settings).fit_transform(X, sites=site, covariates=kept)
    assert np.array_equal(ours[site == "s1"], X[site == "s1"])
    wanted = by_loops(
        X, site, kept["age"].to_numpy(), "s1", settings.get("empirical_bayes", True), settings.get("mean_only", False)
    )
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-4 * X.std())


def test_new_people_are_moved_by_what_training_people_taught():
    X, site, covariates = cohort(2, sizes=(40, 40))
    train = np.arange(len(X)) % 2 == 0
    combat = ComBat(empirical_bayes=False).fit(X[train], sites=site[train], covariates=covariates[train])
    whole = combat.transform(X, sites=site, covariates=covariates)
    alone = combat.transform(X[7:8], sites=site[7:8], covariates=covariates[7:8])
    np.testing.assert_allclose(alone, whole[7:8], rtol=1e-12)

    def gap(values, rows):
        return np.abs(values[rows & (site == "s0")].mean(0) - values[rows & (site == "s1")].mean(0)).mean()

    assert gap(whole, ~train) < 0.5 * gap(X, ~train)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_constant_features_and_sites_of_one_row(settings, caplog):
    X, site, covariates = cohort(3, sizes=(9, 12, 1))
    code = np.unique(site, return_inverse=True)[1]
    X = np.column_stack([X, np.full(len(X), 0.1), np.array([5.0, 7.0, 6.0])[code]])  # constant; constant in each site
    X[site == "s0", 0] = 3.3  # constant in one site
    combat = ComBat(**settings)
    with caplog.at_level(logging.WARNING):
        harmonised = combat.fit_transform(X, sites=site)
    assert np.isfinite(harmonised).all()
    assert np.array_equal(harmonised[:, -2], X[:, -2])
    np.testing.assert_allclose(harmonised[:, -1], X[:, -1].mean(), rtol=1e-12)
    assert ("sites of one row" in caplog.text) is not settings.get("mean_only", False)
    # Neither takes part in the priors of the others.
    without = ComBat(**settings).fit_transform(X[:, :-2], sites=site)
    np.testing.assert_allclose(harmonised[:, :-2], without, rtol=1e-12)
    # A person for whom a constant is something else keeps it.
    assert combat.transform(X[:1] + 1, sites=site[:1])[0, -2] == 1.1


def test_many_rows_do_not_underflow_the_nonparametric_prior():
    X, site, _ = cohort(4, sizes=(2000, 1500))
    assert np.isfinite(ComBat(parametric=False).fit_transform(X, sites=site)).all()


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 100))
def test_unit_and_order_do_not_matter(scale, shift, seed):
    X, site, covariates = cohort(seed)
    plain = ComBat().fit_transform(X, sites=site, covariates=covariates)
    order = np.random.default_rng(seed).permutation(len(X))
    other = ComBat().fit_transform(scale * X[order] + shift, sites=site[order], covariates=covariates.iloc[order])
    np.testing.assert_allclose((other - shift) / scale, plain[order], rtol=1e-6, atol=1e-6)


def test_refusals_name_what_is_wrong():
    X, site, covariates = cohort()
    combat = ComBat().fit(X, sites=site, covariates=covariates)
    with pytest.raises(InputError, match="not fitted on\n.*elsewhere"):
        combat.transform(X[:2], sites=["s0", "elsewhere"], covariates=covariates[:2])
    with pytest.raises(InputError, match="sex has values that were not fitted\n.*other"):
        combat.transform(X[:1], sites=site[:1], covariates={"age": [30], "sex": ["other"]})
    with pytest.raises(InputError, match="other covariates"):
        combat.transform(X, sites=site)
    with pytest.raises(InputError, match="number of features"):
        combat.transform(X[:, 1:], sites=site, covariates=covariates)
    with pytest.raises(InputError, match="covariate age is missing or no number\n.*rows \\(from 0\\) 1"):
        ComBat().fit(X, sites=site, covariates={"age": np.where(np.arange(len(X)) == 1, np.nan, 30.0)})
    with pytest.raises(InputError, match="two sites"):
        ComBat().fit(X, sites=["s0"] * len(X))
    with pytest.raises(InputError, match="reference site `s9`"):
        ComBat(reference_site="s9").fit(X, sites=site)
    one = np.r_[np.flatnonzero(site == "s0")[:1], np.flatnonzero(site != "s0")]
    with pytest.raises(InputError, match="reference site `s0` has one row"):
        ComBat(reference_site="s0").fit(X[one], sites=site[one])
    with pytest.raises(InputError, match="at least two features"):
        ComBat().fit(X[:, :1], sites=site)
    assert np.isfinite(ComBat(empirical_bayes=False).fit_transform(X[:, :1], sites=site)).all()


@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_a_covariate_confounded_with_sites_is_named(noise):
    X, site, covariates = cohort()
    jitter = 1 + noise * np.random.default_rng(0).standard_normal(len(X))
    covariates["scanner"] = np.where(site == "s1", 3.0, 1.5) * jitter
    with pytest.raises(InputError, match="confounded(.|\n)*found: scanner"):
        ComBat().fit(X, sites=site, covariates=covariates)


def test_the_probed_target_is_no_covariate_at_test_time():
    X, site, covariates = cohort()
    months = {"grown": 12.0 * covariates["age"] + 5, "sex": covariates["sex"]}
    combat = ComBat().fit(X, sites=site, covariates=months)
    with pytest.raises(InputError, match="covariate grown is what will be predicted"):
        combat.transform(X, sites=site, covariates=months, target=covariates["age"])
    with pytest.raises(InputError, match="covariate sex is what will be predicted"):
        combat.transform(X, sites=site, covariates=months, target=covariates["sex"].map({"f": "woman", "m": "man"}))
    combat.transform(X, sites=site, covariates=months, target=X[:, 0])


def test_is_a_scikit_learn_transformer():
    X, site, _ = cohort()
    combat = ComBat(reference_site="s1", parametric=False)
    assert (
        clone(combat).get_params()
        == combat.get_params()
        == {
            "reference_site": "s1",
            "empirical_bayes": True,
            "parametric": False,
            "mean_only": False,
        }
    )
    with pytest.raises(NotFittedError):
        combat.transform(X, sites=site)
    assert combat.fit(X, sites=site) is combat


def test_covariates_come_as_a_frame_a_series_an_array_or_by_name():
    rng = np.random.default_rng(3)
    X, sites = rng.standard_normal((40, 5)), np.repeat(["a", "b"], 20)
    age, sex = rng.uniform(20, 80, 40), rng.integers(2, size=40).astype(float)
    expected = ComBat().fit_transform(X, sites=sites, covariates={"age": age, "sex": sex})
    for table in (pd.DataFrame({"age": age, "sex": sex}), np.column_stack([age, sex])):
        np.testing.assert_array_equal(ComBat().fit_transform(X, sites=sites, covariates=table), expected)
    expected = ComBat().fit_transform(X, sites=sites, covariates={"age": age})
    for alone in (pd.Series(age, name="age"), age):
        np.testing.assert_array_equal(ComBat().fit_transform(X, sites=sites, covariates=alone), expected)


def test_covariates_are_matched_by_name_not_by_place():
    X, site, covariates = cohort()
    combat = ComBat().fit(X, sites=site, covariates=covariates)
    expected = combat.transform(X, sites=site, covariates=covariates)
    turned = covariates[covariates.columns[::-1]]
    np.testing.assert_array_equal(combat.transform(X, sites=site, covariates=turned), expected)
    with pytest.raises(InputError, match="other covariates"):
        combat.transform(X, sites=site, covariates=turned.rename(columns={"age": "years"}))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, ""])
def test_a_missing_site_is_named_whatever_stands_for_it(missing):
    sites = ["a", "b", missing, "a"]
    with pytest.raises(InputError, match="site is missing(.|\n)*rows .from 0. 2"):
        ComBat().fit(np.eye(4), sites=sites)
    with pytest.raises(InputError, match="site is missing"):
        ComBat().fit(np.eye(4), sites=pd.Series(sites, dtype="string").replace("", pd.NA))
