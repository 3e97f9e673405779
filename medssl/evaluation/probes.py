"""Linear probes of an embedding, as the OpenBHB challenge defines them: age by ridge, site by logistic regression.

Dufumier et al. 2022, "OpenBHB: a Large-Scale Multi-Site Brain MRI Data-set for Age Prediction and Debiasing"
(NeuroImage 263, 119637). The strength of the penalty is chosen by cross-validation. Two things differ from the code
that the challenge's entrants publish: features are standardised with the mean and standard deviation of the rows that
are fitted on, inside every fold, so that a probe does not depend on the scale of an embedding; and folds are dealt by
person (two scans of one person never stand on both sides) and do not depend on the order of the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medssl.core import seeding
from medssl.core.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[Any]
GRID: Final = (1e-2, 1e-1, 1.0, 1e1, 1e2)
"""The challenge's alphas of the ridge and its C of the logistic regression."""
N_FOLDS: Final = 5
MAX_ITER: Final = 150
Solver = Literal["saga", "lbfgs"]


@dataclass(frozen=True)
class AgeProbe:
    """A fitted ridge regression of one number.

    Attributes:
        alpha: The penalty that cross-validation chose.
        r2: Mean cross-validated R2 at ``alpha``, on the people fitted on.
        n_folds: Folds that chose it.
    """

    alpha: float
    r2: float
    n_folds: int
    scaler: StandardScaler
    coefficients: Floats
    intercept: float

    def predict(self, X: npt.ArrayLike) -> Floats:
        """(n,) predictions for (n, F) features."""
        scaled: Floats = self.scaler.transform(features(X))
        return scaled @ self.coefficients + self.intercept


@dataclass(frozen=True)
class SiteProbe:
    """A fitted logistic regression of sites.

    Attributes:
        C: The inverse penalty that cross-validation chose.
        balanced_accuracy: Mean cross-validated balanced accuracy at ``C``, on the people fitted on.
        n_folds: Folds that chose it.
        converged: Whether the last fit met its tolerance within 150 iterations. The challenge stops there, so False
            is common and no fault; with many features the cap then acts as a further penalty.
        classes: Sites in the order of `predict_proba`.
    """

    C: float
    balanced_accuracy: float
    n_folds: int
    converged: bool
    classes: Texts
    scaler: StandardScaler
    model: LogisticRegression

    def predict(self, X: npt.ArrayLike) -> Texts:
        """(n,) predicted sites for (n, F) features."""
        predicted: Texts = self.model.predict(self.scaler.transform(features(X)))
        return predicted

    def predict_proba(self, X: npt.ArrayLike) -> Floats:
        """(n, K) probabilities for (n, F) features, columns as ``classes``."""
        probabilities: Floats = self.model.predict_proba(self.scaler.transform(features(X)))
        return probabilities


def age_probe(X: npt.ArrayLike, age: npt.ArrayLike, subject: npt.ArrayLike | None = None, *, seed: int = 0) -> AgeProbe:
    """Ridge regression of age, alpha in 10^-2 .. 10^2 by 5-fold cross-validated R2, refitted on everyone.

    Args:
        X: (n, F) features.
        age: (n,) years, or any other number.
        subject: (n,) who each row is; folds never divide a person. None: every row is a person.
        seed: Of the folds.

    Raises:
        InputError: Values that are not finite, or fewer than two people.
    """
    X, y = features(X), numbers(age, "age")
    folds = person_folds(_people(subject, len(X)), n_folds=N_FOLDS, seed=seed)
    scores = np.zeros((folds.max() + 1, len(GRID)))
    for fold in range(len(scores)):
        fitted, held = folds != fold, folds == fold
        scaler = StandardScaler().fit(X[fitted])
        weights, intercept = _ridge(scaler.transform(X[fitted]), y[fitted])
        predicted = scaler.transform(X[held]) @ weights + intercept
        scores[fold] = [r_squared(y[held], one) for one in predicted.T]
    # A fold whose people all have one age has no R2; it then has no say. With no fold left, the middle alpha stands.
    known = scores[np.isfinite(scores).all(1)]
    best = int(known.mean(0).argmax()) if len(known) else len(GRID) // 2
    scaler = StandardScaler().fit(X)
    weights, intercept = _ridge(scaler.transform(X), y)
    r2 = float(known.mean(0)[best]) if len(known) else float("nan")
    return AgeProbe(GRID[best], r2, len(scores), scaler, weights[:, best], intercept)


def site_probe(
    X: npt.ArrayLike,
    site: npt.ArrayLike,
    subject: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
    solver: Solver = "saga",
) -> SiteProbe:
    """Logistic regression of the site, C in 10^-2 .. 10^2 by 5-fold cross-validated balanced accuracy, refitted.

    Folds hold every site in equal shares as far as people allow: a site of k < 5 people is in k folds, and the balanced
    accuracy of a fold is the mean recall of the sites that it holds. A site of one person is never predicted while that
    person is held out, and counts 0 in that fold.

    Args:
        X: (n, F) features.
        site: (n,) names or codes of sites.
        subject: (n,) who each row is; folds never divide a person. None: every row is a person.
        seed: Of the folds and of the solver.
        solver: "saga" stops after 150 iterations and is the challenge's; its time grows with n F K (0.5 s a fit, 26
            fits, at n = 500, F = 218, K = 12). "lbfgs" goes to the optimum of the same objective, 10 to 40 times
            faster: for tuning.

    Raises:
        InputError: Values that are not finite, or fewer than two sites with at least two people each.
    """
    X, site = features(X), names(site, "site")
    subject = _people(subject, len(X))
    check_sites(site, subject)
    folds = person_folds(subject, site, n_folds=N_FOLDS, seed=seed)
    scores = np.zeros((folds.max() + 1, len(GRID)))
    for fold in range(len(scores)):
        fitted, held = folds != fold, folds == fold
        if len(np.unique(site[fitted])) < 2:  # whoever tells the sites apart is held out: such a fold has no say
            scores[fold] = np.nan
            continue
        scaler = StandardScaler().fit(X[fitted])
        inside, outside = scaler.transform(X[fitted]), scaler.transform(X[held])
        for position, C in enumerate(GRID):
            model, _ = _logistic(inside, site[fitted], C, seed, solver)
            scores[fold, position] = balanced_accuracy(site[held], model.predict(outside))
    known = scores[np.isfinite(scores).all(1)]
    best = int(known.mean(0).argmax()) if len(known) else len(GRID) // 2
    scaler = StandardScaler().fit(X)
    model, converged = _logistic(scaler.transform(X), site, GRID[best], seed, solver)
    accuracy = float(known.mean(0)[best]) if len(known) else float("nan")
    return SiteProbe(GRID[best], accuracy, len(scores), converged, model.classes_, scaler, model)


def person_folds(
    subject: npt.ArrayLike, stratum: npt.ArrayLike | None = None, *, n_folds: int = N_FOLDS, seed: int = 0
) -> Ints:
    """A fold number for every row: people are never divided, strata spread evenly, folds of equal size.

    People are shuffled inside their stratum and dealt in turn, stratum after stratum, so that sizes of folds differ by
    one person at most, and so do the shares of a stratum. The order of the rows does not matter.

    Args:
        subject: (n,) who each row is.
        stratum: (n,) what to balance, for instance the site; a person with several counts for the first in sorted
            order.
        n_folds: At least 2; with fewer people than folds there are as many folds as people.
        seed: Of the shuffling.

    Returns:
        (n,) int64 in [0, n_folds).

    Raises:
        InputError: ``n_folds`` below 2, fewer than two people, or lengths that differ.
    """
    people, row = np.unique(np.asarray(subject), return_inverse=True)
    codes = np.zeros(len(row), np.int64) if stratum is None else np.unique(np.asarray(stratum), return_inverse=True)[1]
    if n_folds < 2 or len(people) < 2 or len(codes) != len(row):
        raise InputError(
            "folds need at least two folds, two people and one stratum for every row",
            found=f"n_folds {n_folds}, {len(people)} people, {len(row)} rows, {len(codes)} strata",
        )
    own = np.full(len(people), np.iinfo(np.int64).max)
    np.minimum.at(own, row, codes)
    shuffled = seeding.permutation(len(people), seed, seeding.SPLIT, n_folds)
    dealt = shuffled[np.argsort(own[shuffled], kind="stable")]
    fold = np.empty(len(people), np.int64)
    fold[dealt] = np.arange(len(people)) % min(n_folds, len(people))
    return fold[row]


def balanced_accuracy(true: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Mean over the classes in ``true`` of the share of their rows that is predicted right; a fraction.

    Raises:
        InputError: Nothing to score, or lengths that differ.
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    if len(true) == 0 or len(true) != len(predicted):
        raise InputError("nothing to score, or lengths differ", found=f"{len(true)} true, {len(predicted)} predicted")
    _, codes = np.unique(true, return_inverse=True)
    return float((np.bincount(codes, weights=true == predicted) / np.bincount(codes)).mean())


def r_squared(true: Floats, predicted: Floats) -> float:
    """1 - residual over total sum of squares; NaN where ``true`` does not vary."""
    total = float(((true - true.mean()) ** 2).sum())
    return 1 - float(((true - predicted) ** 2).sum()) / total if total > 0 else float("nan")


def features(X: npt.ArrayLike) -> Floats:
    """(n, F) finite float64.

    Raises:
        InputError: Another shape, or rows that hold values which are not finite.
    """
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or 0 in X.shape:
        raise InputError("features must have the shape (rows, features)", found=str(X.shape))
    _refuse_rows(~np.isfinite(X).all(1), "features are not finite")
    return X


def numbers(values: npt.ArrayLike, what: str) -> Floats:
    """(n,) finite float64; ``what`` names them in the message.

    Raises:
        InputError: Another shape, or rows without a finite value.
    """
    given = np.asarray(values)
    if given.ndim != 1:
        raise InputError(f"{what} must have one value a row", found=str(given.shape))
    numeric = np.asarray(pd.to_numeric(pd.Series(given), errors="coerce"), dtype=np.float64)
    _refuse_rows(~np.isfinite(numeric), f"{what} is missing or no number")
    return numeric


def names(values: npt.ArrayLike, what: str) -> Texts:
    """(n,) class names as text, so that 3 and "3" are one class; ``what`` names them in the message.

    Raises:
        InputError: Another shape, or rows without a value.
    """
    given = np.asarray(values, dtype=object)
    if given.ndim != 1:
        raise InputError(f"{what} must have one value a row", found=str(given.shape))
    missing = np.asarray(pd.isna(given)) | np.array([isinstance(one, str) and one == "" for one in given], dtype=bool)
    _refuse_rows(missing, f"{what} is missing")
    return np.array([str(one) for one in given])


def check_sites(site: Texts, subject: Texts) -> None:
    """Refuse what leaves nothing to tell apart.

    Raises:
        InputError: Fewer than two sites with at least two people each.
    """
    pairs = np.unique(np.column_stack([site, subject]), axis=0)
    sites, people = np.unique(pairs[:, 0], return_counts=True)
    if (people >= 2).sum() < 2:
        raise InputError(
            "nothing to tell apart: two sites (or classes) with at least two people each are needed",
            found=", ".join(f"{name}: {n}" for name, n in list(zip(sites, people))[:20]),
            fix="evaluate something else, or add people of another site or class",
        )


def _refuse_rows(bad: npt.NDArray[np.bool_], message: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad)
        more = f" and {len(rows) - 20} more" if len(rows) > 20 else ""
        raise InputError(message, where=f"rows (from 0) {', '.join(map(str, rows[:20]))}{more}")


def _people(subject: npt.ArrayLike | None, n: int) -> Texts:
    if subject is None:
        return np.array([f"row {row:09d}" for row in range(n)])
    people = names(subject, "subject")
    if len(people) != n:
        raise InputError("features and subjects differ in length", found=f"{n} and {len(people)}")
    return people


def _ridge(X: Floats, y: Floats, alphas: Sequence[float] = GRID) -> tuple[Floats, float]:
    """Weights (F, alphas) and the intercept of a ridge on centred features, all alphas from one decomposition."""
    u, s, vt = np.linalg.svd(X, full_matrices=False)
    shrink = s[:, None] / (s[:, None] ** 2 + np.asarray(alphas))
    mean = float(y.mean())
    return vt.T @ (shrink * (u.T @ (y - mean))[:, None]), mean


def _logistic(X: Floats, y: Texts, C: float, seed: int, solver: Solver) -> tuple[LogisticRegression, bool]:
    """The fitted model, and whether it converged."""
    model = LogisticRegression(C=C, solver=solver, max_iter=MAX_ITER, random_state=seed)
    with warnings.catch_warnings():
        # The cap of 150 iterations is part of the challenge's definition; `converged` says that it was reached.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    return model, bool(np.max(model.n_iter_) < MAX_ITER)
