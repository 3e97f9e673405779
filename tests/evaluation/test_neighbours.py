"""Probes of any label: scikit-learn's answers, other people only, AUC with ties, intervals over people."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from medssl.core.errors import InputError, ShapeError
from medssl.evaluation.neighbours import Labelled, alignment_uniformity, auc, folded, knn_probe, linear_probe, mlp_probe

PROBES = {"knn": knn_probe, "linear": linear_probe, "mlp": mlp_probe}


def people(seed, n, classes=("control", "patient"), prefix="p"):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 3)) * [1, 10, 0.1]
    number = 40 + 15 * X[:, 0] + rng.standard_normal(n)
    group = np.array(classes)[np.searchsorted(np.linspace(0, 0.6, len(classes) - 1), X[:, 0])]
    subject = np.array([f"{prefix}{i}" for i in range(n)])
    return X, number, group, subject


def pair(task, classes=("control", "patient"), n=80, n_test=40):
    rows = people(0, n, classes), people(1, n_test, classes, "q")
    which = 1 if task == "regression" else 2
    return tuple(Labelled(one[0], one[which], one[3]) for one in rows)


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("name", PROBES)
def test_every_probe_finds_what_is_there(name, task):
    train, test = pair(task)
    score = PROBES[name](train, test, task=task, n_bootstrap=200)
    assert (score.probe, score.task, score.n_train, score.n_test) == (name, task, 80, 40)
    if task == "regression":
        assert score.metrics["mae"] == pytest.approx(np.abs(score.predictions - test.y).mean())
        assert score.metrics["r2"] == pytest.approx(r2_score(test.y, score.predictions))
        assert score.metrics["r"] == pytest.approx(np.corrcoef(test.y, score.predictions)[0, 1])
        assert score.metrics["r2"] > 0.7
        assert score.chance is None
    else:
        assert score.metrics["bacc"] == pytest.approx(balanced_accuracy_score(test.y, score.predictions))
        assert score.metrics["bacc"] > 0.75
        assert score.metrics["auc"] > 0.9
        assert score.chance == 0.5
    for key, value in score.metrics.items():
        low, high = score.intervals[key]
        assert low <= value <= high
        assert low < high
    assert score.to_json()["settings"] == score.settings


def test_settings_are_chosen_and_models_are_scikit_learns():
    train, test = pair("regression")
    scaler = StandardScaler().fit(train.X)
    score = knn_probe(train, test, task="regression", n_neighbours=(4,), n_bootstrap=100)
    wanted = KNeighborsRegressor(4).fit(scaler.transform(train.X), train.y).predict(scaler.transform(test.X))
    np.testing.assert_allclose(score.predictions, wanted)
    assert knn_probe(train, test, task="regression", n_bootstrap=100).settings[0] in (3, 5, 10)
    few = Labelled(train.X[:4], train.y[:4], train.subject[:4])
    assert knn_probe(few, test, task="regression", n_bootstrap=100).settings[0] in (1, 3)


def test_several_classes_are_scored_against_the_rest():
    train, test = pair("classification", ("a", "b", "c"), n=150)
    score = linear_probe(train, test, task="classification", n_bootstrap=100)
    scaler = StandardScaler().fit(train.X)
    model = LogisticRegression(C=score.settings[0], max_iter=1000).fit(scaler.transform(train.X), train.y)
    wanted = roc_auc_score(test.y, model.predict_proba(scaler.transform(test.X)), multi_class="ovr")
    assert score.metrics["auc"] == pytest.approx(wanted)
    assert score.chance == pytest.approx(1 / 3)
    assert score.classes == ("a", "b", "c")


@given(n=st.integers(2, 30), levels=st.integers(1, 8), seed=st.integers(0, 1000))
def test_auc_equals_the_count_of_pairs(n, levels, seed):
    rng = np.random.default_rng(seed)
    positive, score = rng.random(n) < 0.5, rng.integers(0, levels, n).astype(float)
    weights = np.vstack([np.ones(n), rng.integers(0, 3, n)])
    for area, w in zip(auc(positive, score, weights), weights):
        pairs = [(i, j) for i in range(n) for j in range(n) if positive[i] and not positive[j]]
        total = sum(w[i] * w[j] for i, j in pairs)
        won = sum(w[i] * w[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j])) for i, j in pairs)
        assert np.isnan(area) if total == 0 else area == pytest.approx(won / total)


def test_undefined_values_are_none_and_scans_are_no_people():
    train, test = pair("classification")
    one_class = Labelled(test.X, ["patient"] * len(test.X), test.subject)
    score = linear_probe(train, one_class, task="classification", n_bootstrap=100)
    assert score.metrics["auc"] is score.intervals["auc"] is None
    train, test = pair("regression")
    constant = Labelled(test.X, [30.0] * len(test.X), test.subject)
    score = linear_probe(train, constant, task="regression", n_bootstrap=100)
    assert score.metrics["r"] is score.metrics["r2"] is None
    thrice = Labelled(np.repeat(test.X, 3, axis=0), np.repeat(test.y, 3), np.repeat(test.subject, 3))
    once, many = (linear_probe(train, one, task="regression", n_bootstrap=300) for one in (test, thrice))
    assert many.intervals["mae"] == pytest.approx(once.intervals["mae"])


def test_refusals():
    train, test = pair("classification")
    with pytest.raises(InputError, match="80 evaluated people are also"):
        knn_probe(train, train, task="classification")
    strange = Labelled(test.X, ["unheard", *test.y[1:]], test.subject)
    with pytest.raises(
        InputError, match="without anybody to learn them from\n.*unheard(.|\n)*--folds 5(.|\n)*--split train"
    ):
        knn_probe(train, strange, task="classification")
    with pytest.raises(InputError, match="the label is missing or no number\n.*rows \\(from 0\\) 2"):
        linear_probe(
            Labelled(train.X, np.ones(80), train.subject),
            Labelled(test.X[:3], [1, 2, np.nan], test.subject[:3]),
            task="regression",
        )
    with pytest.raises(InputError, match="at least two people"):
        linear_probe(Labelled(train.X, ["a"] * 80, train.subject), test, task="classification")


def test_alignment_and_uniformity_are_the_losses_on_unit_rows():
    z = np.random.default_rng(0).standard_normal((20, 3, 5))
    near, spread = alignment_uniformity(z * 7)
    unit = z / np.linalg.norm(z, axis=2, keepdims=True)
    wanted = np.mean([((unit[:, i] - unit[:, j]) ** 2).sum(1).mean() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert near == pytest.approx(wanted)
    pairs = np.triu_indices(20, 1)
    distance = ((unit[:, None] - unit[None]) ** 2).sum(-1)[pairs]
    assert spread == pytest.approx(np.log(np.exp(-2 * distance).mean(0)).mean())
    assert alignment_uniformity(z[:, :1])[0] is None
    assert alignment_uniformity(np.ones((3, 2, 4))) == pytest.approx((0, 0))
    with pytest.raises(ShapeError, match="two people"):
        alignment_uniformity(torch.randn(1, 2, 3).numpy())


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_folds_predict_everyone_once_from_others(task):
    everyone, _ = pair(task, ("a", "b", "c"))
    score = folded(linear_probe, everyone, task=task, n_bootstrap=200)
    assert (score.n_test, score.n_train, len(score.settings)) == (80, 64, 5)
    eighths = folded(linear_probe, everyone, task=task, n_bootstrap=100, n_folds=8)
    assert eighths.n_train == 70
    if task == "regression":
        assert score.metrics["r2"] == pytest.approx(r2_score(everyone.y, score.predictions))
        assert score.metrics["r2"] > 0.7
    else:
        assert score.metrics["bacc"] == pytest.approx(balanced_accuracy_score(everyone.y, score.predictions))
        wanted = roc_auc_score(everyone.y, score.probabilities, multi_class="ovr")
        assert score.metrics["auc"] == pytest.approx(wanted)
