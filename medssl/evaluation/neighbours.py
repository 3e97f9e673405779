"""What an embedding knows of any label: k nearest neighbours, a linear probe and a small network on frozen features.

All three standardise features on the people they are fitted on, choose one setting by folds that never divide a person,
and are scored on other people with intervals over people.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from medssl.core import seeding
from medssl.core.errors import InputError, ShapeError
from medssl.evaluation.probes import (
    GRID,
    Floats,
    Texts,
    balanced_accuracy,
    check_sites,
    features,
    names,
    numbers,
    person_folds,
    r_squared,
)
from medssl.losses import alignment, uniformity

Task = Literal["regression", "classification"]
NEIGHBOURS: Final = (1, 3, 5, 10, 20, 50)
MLP_UNITS: Final = 64
MLP_PENALTIES: Final = (1e-3, 1e-1, 10.0)
_LEVEL: Final = 0.95


@dataclass(frozen=True)
class Labelled:
    """Embeddings with one label a row.

    Attributes:
        X: (n, F) features.
        y: (n,) numbers (regression) or names (classification).
        subject: (n,) who each row is.
    """

    X: npt.ArrayLike
    y: npt.ArrayLike
    subject: npt.ArrayLike


@dataclass(frozen=True)
class ProbeScore:
    """What a probe knew of other people. Intervals hold 95 %, from resamples of people.

    Attributes:
        probe: knn, linear or mlp.
        task: regression (metrics mae, r, r2) or classification (bacc, auc).
        settings: What the folds chose, of each fit: the number of neighbours, or the penalty (ridge alpha, C, the
            network's alpha).
        metrics: By name; None where undefined (r of constant predictions, AUC with one class).
        intervals: By name; None where undefined.
        chance: Of the balanced accuracy: 1 / number of classes evaluated; None for regression.
        n_train, n_test: People; of `folded` the fewest that one fit saw, and everyone.
        converged: False when a last fit stopped at its cap of iterations.
        predictions: (n,) of the evaluated rows.
        probabilities: (n, K) of the evaluated rows, columns as ``classes``; None for regression.
        classes: Sites, diagnoses, ...; empty for regression. AUC of more than two is the mean of each against the rest.
    """

    probe: str
    task: Task
    settings: tuple[float, ...]
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    chance: float | None
    n_train: int
    n_test: int
    converged: bool
    predictions: npt.NDArray[Any]
    probabilities: Floats | None
    classes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions."""
        fields = asdict(self)
        del fields["predictions"], fields["probabilities"]
        return fields


def knn_probe(
    train: Labelled,
    test: Labelled,
    *,
    task: Task,
    n_neighbours: Sequence[int] = NEIGHBOURS,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> ProbeScore:
    """The mean, or the vote, of the nearest people; how many is chosen by 5 folds.

    Args:
        train: Whose labels are known.
        test: Other people.
        task: What ``y`` is.
        n_neighbours: To choose from; more than the smallest training fold holds are left out.
        n_bootstrap: Resamples of people, at least 100.
        seed: Of folds and resamples.

    Raises:
        InputError: Missing values, shared people, labels that cannot be told apart, or a class without training people.
    """
    folds = 5
    people = len(np.unique(np.asarray(train.subject)))
    # A fold leaves at least this many rows to look among.
    most = max(1, people - -(-people // folds))
    kind = KNeighborsClassifier if task == "classification" else KNeighborsRegressor
    usable = [one for one in n_neighbours if 1 <= one <= most] or [1]
    return _probe("knn", train, test, task, usable, lambda k: kind(n_neighbors=int(k)), n_bootstrap, seed)


def linear_probe(train: Labelled, test: Labelled, *, task: Task, n_bootstrap: int = 1000, seed: int = 0) -> ProbeScore:
    """Ridge or logistic regression, its penalty chosen by 5 folds; arguments and errors as `knn_probe`."""

    def make(penalty: float) -> Any:
        return LogisticRegression(C=penalty, max_iter=1000) if task == "classification" else Ridge(alpha=penalty)

    return _probe("linear", train, test, task, GRID, make, n_bootstrap, seed)


def mlp_probe(train: Labelled, test: Labelled, *, task: Task, n_bootstrap: int = 1000, seed: int = 0) -> ProbeScore:
    """A network of one hidden layer of 64 units, its penalty chosen by 5 folds; the rest as `knn_probe`."""

    def make(penalty: float) -> Any:
        kind = MLPClassifier if task == "classification" else MLPRegressor
        return kind(hidden_layer_sizes=(MLP_UNITS,), alpha=penalty, max_iter=200, random_state=seed)

    return _probe("mlp", train, test, task, MLP_PENALTIES, make, n_bootstrap, seed)


def folded(
    probe: Callable[..., ProbeScore],
    rows: Labelled,
    *,
    task: Task,
    n_folds: int = 5,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> ProbeScore:
    """A probe of everyone by folds of people, scored on the pooled predictions.

    Args:
        probe: `knn_probe`, `linear_probe` or `mlp_probe`.
        rows: Everyone.
        task: What ``y`` is.
        n_folds: At least 2; classes are spread evenly over folds.
        n_bootstrap: Resamples of people, at least 100.
        seed: Of folds and resamples.

    Raises:
        InputError: As the probe; a class that one fold holds alone cannot be learnt in that fold.
    """
    X, y, subject = _checked(rows, task)
    folds = person_folds(subject, y if task == "classification" else None, n_folds=n_folds, seed=seed)
    classes = tuple(sorted(set(y.tolist()))) if task == "classification" else ()
    predictions = np.empty(len(y), dtype=y.dtype)
    probabilities = np.zeros((len(y), len(classes))) if classes else None
    scores = []
    for fold in range(folds.max() + 1):
        held = folds == fold
        train, test = (Labelled(X[which], y[which], subject[which]) for which in (~held, held))
        scores.append(probe(train, test, task=task, n_bootstrap=100, seed=seed))
        predictions[held] = scores[-1].predictions
        if probabilities is not None and scores[-1].probabilities is not None:
            columns = [classes.index(one) for one in scores[-1].classes]
            probabilities[np.ix_(held, columns)] = scores[-1].probabilities
    return _scored(
        scores[0].probe, task, y, subject, predictions, probabilities, classes, n_bootstrap, seed,
        settings=tuple(one.settings[0] for one in scores), n_train=min(one.n_train for one in scores),
        converged=all(one.converged for one in scores),
    )  # fmt: skip


def alignment_uniformity(views: npt.ArrayLike) -> tuple[float | None, float]:
    """How close views of one person lie, and how evenly people are spread; rows are set to unit length first.

    Wang & Isola 2020 (arXiv:2005.10242): `medssl.losses.alignment` and `uniformity` with their defaults.

    Args:
        views: (N, V, D): V augmented views of N people.

    Returns:
        Alignment, the mean over pairs of views (None with one view), and uniformity, the mean over views. Both are
        better when lower; 0 and about -2 times the expected squared distance at best.

    Raises:
        ShapeError: Another shape, or fewer than two people.
        InputError: Values that are not finite.
    """
    z = np.asarray(views, dtype=np.float64)
    if z.ndim != 3 or len(z) < 2:
        raise ShapeError("views must be (N, V, D) of at least two people", found=str(z.shape))
    features(z.reshape(len(z), -1))
    unit = torch.nn.functional.normalize(torch.from_numpy(z), dim=2)
    pairs = [float(alignment(unit[:, i], unit[:, j])) for i, j in itertools.combinations(range(z.shape[1]), 2)]
    spread = [float(uniformity(unit[:, i])) for i in range(z.shape[1])]
    return float(np.mean(pairs)) if pairs else None, float(np.mean(spread))


def auc(positive: npt.NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve for several weightings of the rows at once, ties counting half.

    Args:
        positive: (n,).
        score: (n,), higher for positives.
        weights: (B, n), not negative.

    Returns:
        (B,), NaN where positives or negatives have no weight.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    up = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    down = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = (up * below).sum(1) / (up.sum(1) * down.sum(1))
    return area


def _probe(
    name: str,
    train: Labelled,
    test: Labelled,
    task: Task,
    grid: Sequence[float],
    make: Callable[[float], Any],
    n_bootstrap: int,
    seed: int,
) -> ProbeScore:
    X, y, subject = _checked(train, task)
    new, truth, people = _checked(test, task)
    _refuse_unfit(y, subject, truth, people, task, n_bootstrap)
    setting = _chosen(X, y, subject, task, grid, make, seed)
    scaler = StandardScaler().fit(X)
    model, undo, converged = _fit(make(setting), scaler.transform(X), y, task)
    classes = tuple(str(one) for one in model.classes_) if task == "classification" else ()
    predictions = undo(model.predict(scaler.transform(new)))
    probabilities = model.predict_proba(scaler.transform(new)) if classes else None
    return _scored(
        name, task, truth, people, predictions, probabilities, classes, n_bootstrap, seed,
        settings=(float(setting),), n_train=len(np.unique(subject)), converged=converged,
    )  # fmt: skip


def _scored(
    name: str,
    task: Task,
    truth: npt.NDArray[Any],
    people: Texts,
    predictions: npt.NDArray[Any],
    probabilities: Floats | None,
    classes: tuple[str, ...],
    n_bootstrap: int,
    seed: int,
    *,
    settings: tuple[float, ...],
    n_train: int,
    converged: bool,
) -> ProbeScore:
    who, person = np.unique(people, return_inverse=True)
    counts = seeding.numpy_rng(seed, seeding.BOOTSTRAP).multinomial(
        len(who), np.full(len(who), 1 / len(who)), size=n_bootstrap
    )
    weights = np.vstack([np.ones(len(who)), counts])[:, person]
    measured = (
        regression_metrics(truth, predictions, weights)
        if probabilities is None
        else classification_metrics(truth, predictions, probabilities, classes, weights)
    )
    return ProbeScore(
        probe=name,
        task=task,
        settings=settings,
        metrics={key: None if np.isnan(one[0]) else float(one[0]) for key, one in measured.items()},
        intervals={key: _interval(one) for key, one in measured.items()},
        chance=1 / len(set(truth.tolist())) if task == "classification" else None,
        n_train=n_train,
        n_test=len(who),
        converged=converged,
        predictions=predictions,
        probabilities=probabilities,
        classes=classes,
    )


def _checked(rows: Labelled, task: Task) -> tuple[Floats, npt.NDArray[Any], Texts]:
    X, subject = features(rows.X), names(rows.subject, "subject")
    y = names(rows.y, "the label") if task == "classification" else numbers(rows.y, "the label")
    if not len(X) == len(y) == len(subject):
        raise InputError("features, labels and subjects differ in length", found=f"{len(X)}, {len(y)}, {len(subject)}")
    return X, y, subject


def _refuse_unfit(
    y: npt.NDArray[Any], subject: Texts, truth: npt.NDArray[Any], people: Texts, task: Task, n_bootstrap: int
) -> None:
    shared = sorted(set(subject.tolist()) & set(people.tolist()))
    if shared:
        raise InputError(
            f"{len(shared)} evaluated people are also among those that the probe is fitted on",
            found=", ".join(shared[:20]),
            fix="evaluate other people, or use folds",
        )
    if n_bootstrap < 100:
        raise InputError("resamples must be at least 100", found=str(n_bootstrap))
    if task == "classification":
        check_sites(y, subject)
        unknown = sorted(set(truth.tolist()) - set(y.tolist()))
        if unknown:
            raise InputError(
                "classes without anybody to learn them from",
                found=", ".join(unknown[:20]),
                fix="evaluate by folds (--folds 5) if nobody was pretrained on, or leave these people out, such as "
                "those of external sites: medssl embed RUN MANIFEST --split train --split internal_test -o TABLE",
            )


def _chosen(
    X: Floats,
    y: npt.NDArray[Any],
    subject: Texts,
    task: Task,
    grid: Sequence[float],
    make: Callable[[float], Any],
    seed: int,
) -> float:
    """The setting with the best mean R2 or balanced accuracy over folds; of equals the first."""
    if len(grid) == 1:
        return grid[0]
    folds = person_folds(subject, y if task == "classification" else None, seed=seed)
    scores = np.zeros((folds.max() + 1, len(grid)))
    for fold in range(len(scores)):
        fitted, held = folds != fold, folds == fold
        scaler = StandardScaler().fit(X[fitted])
        inside, outside = scaler.transform(X[fitted]), scaler.transform(X[held])
        for place, setting in enumerate(grid):
            model, undo, _ = _fit(make(setting), inside, y[fitted], task)
            predicted = undo(model.predict(outside))
            score = balanced_accuracy if task == "classification" else r_squared
            scores[fold, place] = score(y[held], predicted)
    known = scores[np.isfinite(scores).all(1)]  # a fold of people with one value has no R2
    return grid[int(known.mean(0).argmax())] if len(known) else grid[len(grid) // 2]


def _fit(
    model: Any, X: Floats, y: npt.NDArray[Any], task: Task
) -> tuple[Any, Callable[[npt.NDArray[Any]], npt.NDArray[Any]], bool]:
    """The fitted model, what turns its predictions into labels, and whether it converged.

    Numbers are standardised: a network starts near 0.
    """
    mean, spread = (0.0, 1.0) if task == "classification" else (float(y.mean()), float(y.std()) or 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y if task == "classification" else (y - mean) / spread)
    capped = [one for one in caught if issubclass(one.category, ConvergenceWarning)]
    for one in caught:
        if one not in capped:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def undo(predicted: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return predicted if task == "classification" else predicted * spread + mean

    return model, undo, not capped


def regression_metrics(truth: Floats, predicted: Floats, weights: Floats) -> dict[str, Floats]:
    """``mae``, ``r`` and ``r2`` of (n,) predictions, each (B,), for weights (B, n) of the rows; NaN where undefined."""
    truth, predicted = truth - truth.mean(), predicted - truth.mean()
    n = weights.sum(1)
    y, p = weights @ truth / n, weights @ predicted / n
    yy, pp = weights @ truth**2 / n - y**2, weights @ predicted**2 / n - p**2
    tiny = 1e-12 * float(np.mean(truth**2))
    error = weights @ (predicted - truth) ** 2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where((yy > tiny) & (pp > tiny), (weights @ (truth * predicted) / n - y * p) / np.sqrt(yy * pp), np.nan)
        r2 = np.where(yy > tiny, 1 - error / yy, np.nan)
    return {"mae": weights @ np.abs(predicted - truth) / n, "r": r, "r2": r2}


def classification_metrics(
    truth: Texts, predicted: Texts, probabilities: Floats, classes: tuple[str, ...], weights: Floats
) -> dict[str, Floats]:
    """``bacc`` and ``auc`` of (n,) predictions and (n, K) probabilities, each (B,), for weights (B, n) of the rows.

    Over the classes that ``truth`` holds; NaN where undefined. With more than two classes the AUC is the mean of each
    against the rest.
    """
    present = [one for one in classes if (truth == one).any()]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = [(weights @ ((truth == one) & (predicted == one))) / (weights @ (truth == one)) for one in present]
    # Two classes: the second one against the first; more: each against the rest.
    scored = classes[1:] if len(classes) == 2 else present
    areas = [auc(truth == one, probabilities[:, classes.index(one)], weights) for one in scored]
    return {"bacc": _mean_known(recall), "auc": _mean_known(areas)}


def _mean_known(values: Sequence[Floats]) -> Floats:
    """Mean over classes that a resample holds."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, stacked, 0.0).sum(0) / known.sum(0)
    return mean


def _interval(values: Floats) -> tuple[float, float] | None:
    if np.isnan(values[1:]).all() or np.isnan(values[0]):
        return None
    low, high = np.nanquantile(values[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
