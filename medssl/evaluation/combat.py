"""ComBat: remove the shift and the scale of each site from every feature, and keep what covariates explain.

Johnson, Li and Rabinovic 2007, "Adjusting batch effects in microarray expression data using empirical Bayes methods"
(Biostatistics 8(1)); Fortin et al. 2018, "Harmonization of cortical thickness measurements across scanners and sites"
(NeuroImage 167).

    y_ijv = alpha_v + x_ij beta_v + gamma_iv + delta_iv eps_ijv        person j of site i, feature v

Everything is estimated by `ComBat.fit`, on training people; `ComBat.transform` applies it to others of the same sites.
A covariate that is kept is handed on to whatever reads the features later: keeping age at test time, and then
predicting it, leaks the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from medssl.core.errors import InputError
from medssl.evaluation.probes import Floats, Ints, Texts, features, names, numbers

log = logging.getLogger(__name__)

Covariates = pd.DataFrame | pd.Series | Mapping[str, Any] | npt.NDArray[Any] | None
TOLERANCE: Final = 1e-4
"""The iteration stops when no posterior mean or variance changes by more than this share of itself, as elsewhere."""
_MAX_ITERATIONS: Final = 10_000
_CONSTANT: Final = 1e-24
"""Residual variance as a share of the mean square under which a feature counts as explained: rounding, not spread."""
_CONFOUNDED: Final = 1e-9
"""Share of a covariate's spread that sites and earlier covariates must leave for its effect to be told from theirs."""


class ComBat(TransformerMixin, BaseEstimator):
    """Harmonise features over sites; a scikit-learn transformer over (n_samples, n_features).

    Rules for what the formulas leave undefined:

    - A feature without residual variance (constant within every site, or in the reference site) is shifted to the
      common mean, not scaled, and has no part in the priors; one that is constant everywhere passes through unchanged.
    - A feature that is constant within one site, and every feature of a site of one row, has scale 1 there.
    - A site without spread of its scales over features (a site of one row) keeps its own scale in place of a posterior.
    - ``mean_only`` shrinks the shift of a site as if it had one row, as the published programs do.

    Args:
        reference_site: Site whose rows stay as they are; mean and variance come from it, and the others are moved to
            it. None: to the mean over all rows.
        empirical_bayes: Shrink shifts and scales of a site towards what they are over features.
        parametric: Shrink with a normal and an inverse gamma prior; False: with the estimates of the other features
            as the prior (time and memory grow with the square of the number of features).
        mean_only: Leave the scales alone.

    Attributes:
        sites_: (I,) sites in sorted order.
        gamma_, delta_: (I, F) shifts and variances that are removed, in units of the pooled standard deviation.
        beta_: (columns, F) weights of the covariates.
        grand_mean_, pooled_variance_: (F,).
        n_features_in_: F.
    """

    def __init__(
        self,
        reference_site: str | None = None,
        empirical_bayes: bool = True,
        parametric: bool = True,
        mean_only: bool = False,
    ) -> None:
        self.reference_site = reference_site
        self.empirical_bayes = empirical_bayes
        self.parametric = parametric
        self.mean_only = mean_only

    def fit(self, X: npt.ArrayLike, y: None = None, *, sites: npt.ArrayLike, covariates: Covariates = None) -> ComBat:
        """Estimate everything from training people.

        Args:
            X: (n, F) features.
            y: Ignored, as scikit-learn's transformers have it.
            sites: (n,) names.
            covariates: What to keep: columns of (n,) numbers (continuous) or texts and booleans (categories); of an
                array (n,) or (n, columns) they are called 0, 1, ...

        Raises:
            InputError: Values that are missing, fewer than two sites, an unknown reference site, fewer than two
                features that vary (with empirical Bayes), or covariates that cannot be told from sites or each other.
        """
        X, site = features(X), names(sites, "site")
        _check_length(len(X), site, "sites")
        self.sites_, code = np.unique(site, return_inverse=True)
        self._check_sites()
        table = _covariate_table(covariates, len(X))
        self.encoding_ = {name: _encoding(name, series) for name, series in table.items()}
        kept = self._encode(table, len(X))
        one_hot = (code[:, None] == np.arange(len(self.sites_))).astype(np.float64)
        _check_rank(one_hot, kept, self._column_names())
        self.n_features_in_ = X.shape[1]

        design = np.hstack([one_hot, kept])
        weights = np.linalg.lstsq(design, X, rcond=None)[0]
        by_site, self.beta_ = weights[: len(self.sites_)], weights[len(self.sites_) :]
        rows = np.full(len(X), True)
        self.grand_mean_ = one_hot.mean(0) @ by_site
        if self.reference_site is not None:
            reference = int(np.flatnonzero(self.sites_ == str(self.reference_site))[0])
            rows, self.grand_mean_ = code == reference, by_site[reference]
        residual = (X - design @ weights)[rows]
        self.pooled_variance_ = (residual**2).mean(0)
        varies = self.pooled_variance_ > _CONSTANT * (X[rows] ** 2).mean(0)
        self.pooled_variance_ = np.where(varies, self.pooled_variance_, 1.0)
        self.gamma_ = by_site - self.grand_mean_  # of features that do not vary: the shift as it is
        self.gamma_[:, (X.max(0) == X.min(0))] = 0.0  # a constant is not moved by rounding
        self.delta_ = np.ones_like(self.gamma_)
        if self.empirical_bayes and rows.sum() == 1:
            raise InputError(
                f"reference site `{self.reference_site}` has one row, so no feature varies in it: its variance, to "
                "which the other sites would be scaled, is not known",
                fix="choose a reference site of several rows, or none; empirical_bayes=False moves the others to that "
                "row without scaling",
            )
        if self.empirical_bayes and varies.sum() < 2:
            raise InputError(
                "empirical Bayes needs at least two features that vary: the priors are taken over features",
                found=f"{int(varies.sum())} of {X.shape[1]}",
                fix="set empirical_bayes=False, or give more features",
            )
        z = self._standardise(X[:, varies], kept, varies)
        self.gamma_[:, varies], self.delta_[:, varies] = self._adjustments(z, code)
        return self

    def transform(
        self,
        X: npt.ArrayLike,
        *,
        sites: npt.ArrayLike,
        covariates: Covariates = None,
        target: npt.ArrayLike | None = None,
    ) -> Floats:
        """Harmonise rows of the sites that were fitted.

        Args:
            X: (n, F) features.
            sites: (n,) names.
            covariates: The columns that `fit` was given, by name and in any order (of an array: in the same order).
            target: (n,) what will be predicted from the result, if anything: it may not be among the covariates.

        Returns:
            (n, F) float64.

        Raises:
            InputError: A site, a covariate or a category that `fit` did not see, values that are missing, another
                number of features, or ``target`` among the covariates.
        """
        check_is_fitted(self)
        X, site = features(X), names(sites, "site")
        _check_length(len(X), site, "sites")
        if X.shape[1] != self.n_features_in_:
            raise InputError("another number of features than fitted", found=f"{X.shape[1]}, not {self.n_features_in_}")
        unseen = sorted(set(site.tolist()) - set(self.sites_.tolist()))
        if unseen:
            raise InputError(
                f"ComBat cannot harmonise {len(unseen)} sites that it was not fitted on",
                found=", ".join(unseen[:20]),
                fix="leave their rows out, or fit on training people of these sites too",
            )
        table = _covariate_table(covariates, len(X))
        if set(table) != set(self.encoding_):
            raise InputError("other covariates than fitted", found=f"{list(table)}, not {list(self.encoding_)}")
        table = {name: table[name] for name in self.encoding_}  # the order in which their weights stand
        if target is not None:
            refuse_target(table, target)
        kept = self._encode(table, len(X))
        code = np.searchsorted(self.sites_, site)
        everything = np.full(X.shape[1], True)
        z = self._standardise(X, kept, everything)
        scale = np.sqrt(self.pooled_variance_)
        common = self.grand_mean_ + kept @ self.beta_
        # Where nothing is to be moved the row comes back bit for bit: constants, and the reference site.
        still = (self.gamma_[code] == 0) & (self.delta_[code] == 1)
        moved = (z - self.gamma_[code]) / np.sqrt(self.delta_[code]) * scale + common
        return np.where(still, X, moved)

    def fit_transform(
        self, X: npt.ArrayLike, y: None = None, *, sites: npt.ArrayLike, covariates: Covariates = None
    ) -> Floats:
        """`fit` and `transform` on the same rows."""
        return self.fit(X, sites=sites, covariates=covariates).transform(X, sites=sites, covariates=covariates)

    def _check_sites(self) -> None:
        if len(self.sites_) < 2:
            raise InputError("ComBat needs at least two sites", found=", ".join(self.sites_))
        if self.reference_site is not None and str(self.reference_site) not in self.sites_:
            raise InputError(
                f"reference site `{self.reference_site}` has no rows", found=", ".join(self.sites_.tolist()[:20])
            )

    def _standardise(self, X: Floats, kept: Floats, which: npt.NDArray[np.bool_]) -> Floats:
        common = self.grand_mean_[which] + kept @ self.beta_[:, which]
        return (X - common) / np.sqrt(self.pooled_variance_[which])

    def _adjustments(self, z: Floats, code: Ints) -> tuple[Floats, Floats]:
        """Shifts and variances (I, F) of standardised features."""
        gammas, deltas, alone = [], [], []
        for number, site in enumerate(self.sites_):
            rows = z[code == number]
            gamma, delta = rows.mean(0), np.ones(z.shape[1])
            if len(rows) < 2:
                alone.append(str(site))
            elif not self.mean_only:
                delta = rows.var(0, ddof=1)
                delta[(rows == rows[:1]).all(0) | (delta == 0)] = 1.0
            if str(site) == str(self.reference_site) and self.reference_site is not None:
                gamma, delta = np.zeros_like(gamma), np.ones_like(delta)
            elif self.empirical_bayes and not self.parametric:
                gamma, delta = _nonparametric(rows, gamma, delta)
            elif self.empirical_bayes and self.mean_only:
                gamma = _posterior_mean(gamma, 1, 1.0)
            elif self.empirical_bayes:
                gamma, delta = _parametric(rows, gamma, delta)
            gammas.append(gamma)
            deltas.append(np.ones_like(delta) if self.mean_only else delta)
        if alone and not self.mean_only:
            log.warning("ComBat: sites of one row are shifted but not scaled: %s", ", ".join(alone[:20]))
        return np.array(gammas), np.array(deltas)

    def _encode(self, table: Mapping[str, pd.Series], n: int) -> Floats:
        """(n, columns): categories but the first as 0 or 1, numbers less their mean and divided by their spread."""
        columns: list[Floats] = []
        for name, series in table.items():
            how = self.encoding_[name]
            if isinstance(how, tuple):
                mean, spread = how
                columns.append((numbers(series.to_numpy(), f"covariate {name}")[:, None] - mean) / spread)
                continue
            values = names(series.to_numpy(), f"covariate {name}")
            unseen = sorted(set(values.tolist()) - set(how.tolist()))
            if unseen:
                raise InputError(
                    f"covariate {name} has values that were not fitted",
                    found=", ".join(unseen[:20]),
                    fix="leave these rows or the covariate out",
                )
            columns.append((values[:, None] == how[1:]).astype(np.float64))
        return np.hstack([np.zeros((n, 0)), *columns])

    def _column_names(self) -> list[str]:
        columns = []
        for name, how in self.encoding_.items():
            columns += [name] if isinstance(how, tuple) else [name] * (len(how) - 1)
        return columns


def refuse_target(covariates: Covariates, target: npt.ArrayLike) -> None:
    """Refuse a covariate that is what a probe predicts, as it is or in another unit.

    Args:
        covariates: Columns of (n,) values.
        target: (n,) numbers or names.

    Raises:
        InputError: A column equals ``target`` up to its zero and unit (numbers), or divides the rows alike (names).
    """
    wanted = pd.Series(np.asarray(target))
    for name, series in _covariate_table(covariates, len(wanted)).items():
        if _is_number(wanted) and _is_number(series):
            a, b = (one.to_numpy(dtype=np.float64) - float(one.mean()) for one in (wanted, series))
            norm = float(np.sqrt((a @ a) * (b @ b)))
            same = norm > 0 and abs(float(a @ b)) > (1 - 1e-9) * norm
        else:
            codes = [pd.factorize(one.astype(str))[0] for one in (wanted, series)]
            same = np.array_equal(codes[0], codes[1])
        if same:
            raise InputError(
                f"covariate {name} is what will be predicted: keeping it at test time leaks the answer",
                fix=f"leave {name} out of the covariates",
            )


def _covariate_table(covariates: Covariates, n: int) -> dict[str, pd.Series]:
    if isinstance(covariates, pd.Series):
        covariates = covariates.to_frame()
    elif isinstance(covariates, np.ndarray):
        covariates = pd.DataFrame(covariates)
    given: dict[Any, Any] = {} if covariates is None else dict(covariates.items())
    table = {str(name): pd.Series(np.asarray(values)) for name, values in given.items()}
    for name, series in table.items():
        _check_length(n, series, f"covariate {name}")
    return table


def _is_number(series: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series))


def _encoding(name: str, series: pd.Series) -> tuple[float, float] | Texts:
    """Mean and spread of numbers, or the categories in sorted order."""
    if not _is_number(series):
        return np.unique(names(series.to_numpy(), f"covariate {name}"))
    values = numbers(series.to_numpy(), f"covariate {name}")
    spread = float(values.std())
    return float(values.mean()), spread if spread > 0 else 1.0


def _check_length(n: int, values: Any, what: str) -> None:
    if len(values) != n:
        raise InputError(f"features and {what} differ in length", found=f"{n} and {len(values)}")


def _check_rank(one_hot: Floats, kept: Floats, columns: list[str]) -> None:
    """Refuse a design without full column rank, naming the covariates that add nothing to sites and those before."""
    design, confounded = one_hot, []
    for position, name in enumerate(columns):
        column = kept[:, position : position + 1]
        unexplained = column - design @ np.linalg.lstsq(design, column, rcond=None)[0]
        if np.linalg.norm(unexplained) <= _CONFOUNDED * np.linalg.norm(column):
            confounded.append(name)
        else:
            design = np.hstack([design, column])
    if confounded:
        raise InputError(
            "covariates are confounded with sites or with each other, so their effects cannot be told apart",
            found=", ".join(dict.fromkeys(confounded)),
            fix="leave them out, or add people (both sexes at some site, several ages at a site)",
        )
    if design.shape[0] <= design.shape[1]:
        raise InputError("ComBat needs more rows than columns of sites and covariates", found=f"{design.shape}")


def _posterior_mean(gamma: Floats, n: int, delta: Floats | float) -> Floats:
    """Johnson et al. 2007, with mean and variance of the prior taken over features."""
    bar, tau2 = gamma.mean(), gamma.var(ddof=1)
    shrunk: Floats = (n * tau2 * gamma + delta * bar) / (n * tau2 + delta)
    return shrunk


def _parametric(rows: Floats, gamma_hat: Floats, delta_hat: Floats) -> tuple[Floats, Floats]:
    """Posterior shifts and variances, alternating until neither changes by more than `TOLERANCE` of itself.

    With m and s2 the mean and variance of the variances over features, a = (2 s2 + m^2) / s2 and b = (m s2 + m^3) / s2.
    Both fractions are multiplied out by s2, so that s2 = 0 (a site of one row) gives its limit, the variance m.
    """
    n, m, s2 = len(rows), float(delta_hat.mean()), float(delta_hat.var(ddof=1))
    mean, spread = rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)
    gamma, delta = gamma_hat, delta_hat
    for _ in range(_MAX_ITERATIONS):
        new_gamma = _posterior_mean(gamma_hat, n, delta)
        squares = spread + n * (mean - new_gamma) ** 2
        new_delta = (0.5 * squares * s2 + m * s2 + m**3) / (n / 2 * s2 + s2 + m**2)
        still = (np.abs(new_gamma - gamma) <= TOLERANCE * np.abs(gamma)) & (
            np.abs(new_delta - delta) <= TOLERANCE * delta
        )
        gamma, delta = new_gamma, new_delta
        if still.all():
            return gamma, delta
    raise InputError("ComBat's iteration did not converge", found=f"{n} rows, {rows.shape[1]} features")


def _nonparametric(rows: Floats, gamma: Floats, delta: Floats) -> tuple[Floats, Floats]:
    """Estimates of the other features, weighted by how likely they make the rows of a feature."""
    n, n_features = rows.shape
    mean, spread = rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)
    new_gamma, new_delta = np.empty(n_features), np.empty(n_features)
    for start in range(0, n_features, 512):
        part = np.arange(start, min(start + 512, n_features))
        squares = spread[part, None] + n * (mean[part, None] - gamma) ** 2
        likelihood = -n / 2 * np.log(2 * np.pi * delta) - squares / (2 * delta)
        likelihood[np.arange(len(part)), part] = -np.inf
        # Largest first: of many rows all likelihoods underflow.
        weight = np.exp(likelihood - likelihood.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        new_gamma[part], new_delta[part] = weight @ gamma, weight @ delta
    return new_gamma, new_delta
