"""Brain age and what remains of the site: predictions of the two probes, and the numbers and intervals drawn from them.

An embedding is asked two questions with the same people: how old they are (it should know, at sites it has seen and at
others) and where they were scanned (it should not). Where age differs between sites, age alone tells something about
the site; the same site probe on true age is therefore the floor that can be reached while age is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.core import seeding
from medssl.core.errors import InputError
from medssl.evaluation.probes import (
    Floats,
    Ints,
    SiteProbe,
    Solver,
    Texts,
    age_probe,
    features,
    names,
    numbers,
    site_probe,
)
from medssl.evaluation.statistics import holm

SCORE_EXPONENT: Final = 0.3
METRICS: Final = ("mae_internal", "mae_external", "bacc", "score")
_LEVEL: Final = 0.95


@dataclass(frozen=True)
class People:
    """Embeddings and what is known of each row.

    Attributes:
        X: (n, F) float64 features.
        age: (n,) years.
        site: (n,) names.
        subject: (n,) who each row is; several rows may be one person.

    Raises:
        InputError: A value is missing (rows are named), or lengths differ.
    """

    X: Floats
    age: Floats
    site: Texts
    subject: Texts

    def __post_init__(self) -> None:
        object.__setattr__(self, "X", features(self.X))
        object.__setattr__(self, "age", numbers(self.age, "age"))
        object.__setattr__(self, "site", names(self.site, "site"))
        object.__setattr__(self, "subject", names(self.subject, "subject"))
        lengths = {name: len(getattr(self, name)) for name in ("X", "age", "site", "subject")}
        if len(set(lengths.values())) > 1:
            raise InputError("features, ages, sites and subjects differ in length", found=str(lengths))

    def __len__(self) -> int:
        return len(self.X)

    def select(self, keep: npt.NDArray[Any]) -> People:
        """The rows where ``keep`` (a boolean mask, or positions) points."""
        return People(self.X[keep], self.age[keep], self.site[keep], self.subject[keep])


def openbhb_score(mae_external: float, site_balanced_accuracy: float) -> float:
    """The challenge's score: external MAE in years times the site's balanced accuracy, a fraction, to the 0.3.

    Lower is better.

    Raises:
        InputError: A negative MAE, or an accuracy outside [0, 1] (a percentage, for instance).
    """
    if not (mae_external >= 0 and 0 <= site_balanced_accuracy <= 1):
        raise InputError(
            "the score takes an MAE in years and a balanced accuracy as a fraction",
            found=f"MAE {mae_external}, balanced accuracy {site_balanced_accuracy}",
            fix="divide percentages by 100",
        )
    return float(mae_external * site_balanced_accuracy**SCORE_EXPONENT)


def predict_age_site(
    train: People,
    internal: People | None,
    external: People | None,
    *,
    seed: int = 0,
    solver: Solver = "saga",
    age_only: SiteProbe | None = None,
) -> pd.DataFrame:
    """Fit both probes on ``train`` and predict the people of seen sites (internal) and of other sites (external).

    Args:
        train: Whom the probes are fitted on.
        internal: Other people of the same sites. None: only external people are evaluated (leave-site-out).
        external: People of sites that ``train`` does not hold, or None. Only their age is predicted.
        seed: Of the folds and of the solver.
        solver: As `site_probe`.
        age_only: The site probe on true age alone, where it was fitted on these ``train`` people before (it is the
            same for every embedding of them); None: fitted here.

    Returns:
        One row a person and scan: ``subject``, ``set`` (internal or external), ``site``, ``age``, ``age_pred``,
        ``site_pred``, ``site_pred_age_only`` (the same probe on true age alone); the last two are missing for external.

    Raises:
        InputError: People in both ``train`` and the evaluation, internal sites that ``train`` lacks, external sites
            that it holds, nobody to evaluate, or what the probes refuse.
    """
    if internal is None and external is None:
        raise InputError("there is nobody to evaluate", fix="give internal or external people")
    _refuse_shared(train, internal, external)
    parts = []
    age = age_probe(train.X, train.age, train.subject, seed=seed)
    for name, people in (("internal", internal), ("external", external)):
        if people is None:
            continue
        table = pd.DataFrame({"subject": people.subject, "set": name, "site": people.site, "age": people.age})
        table["age_pred"] = age.predict(people.X)
        for column in ("site_pred", "site_pred_age_only"):
            table[column] = pd.Series([None] * len(table), dtype=object)
        if name == "internal":
            site = site_probe(train.X, train.site, train.subject, seed=seed, solver=solver)
            floor = age_only or site_probe(train.age[:, None], train.site, train.subject, seed=seed, solver=solver)
            table["site_pred"] = site.predict(people.X).astype(object)
            table["site_pred_age_only"] = floor.predict(people.age[:, None]).astype(object)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _refuse_shared(train: People, internal: People | None, external: People | None) -> None:
    known = set(train.site.tolist())
    for name, people in (("internal", internal), ("external", external)):
        if people is None:
            continue
        shared = sorted(set(train.subject.tolist()) & set(people.subject.tolist()))
        if shared:
            raise InputError(
                f"{len(shared)} {name} people are also among those that the probes are fitted on",
                found=", ".join(shared[:20]),
                fix="evaluate other people, or use folds",
            )
        wrong = sorted(set(people.site.tolist()) - known if name == "internal" else set(people.site.tolist()) & known)
        if wrong:
            rule = "hold no training people" if name == "internal" else "also hold training people"
            raise InputError(
                f"{len(wrong)} {name} sites {rule}",
                found=", ".join(wrong[:20]),
                fix="internal people come from sites of the training people, external people from other sites",
            )


@dataclass(frozen=True)
class AgeSiteSummary:
    """What an evaluation found. Years for MAE, fractions for accuracies; intervals hold 95 %, as (low, high).

    ``*_sd`` is the standard deviation over seeds (None with one). Fields of a set that was not evaluated are None, and
    so is r or R2 where ages or predictions do not vary.

    Attributes:
        bacc_chance: 1 / number of sites.
        bacc_permutation: Where 95 % of balanced accuracies lie if predictions knew nothing of the site.
        bacc_age_only: Balanced accuracy of the same probe on true age alone: the floor while age is kept.
        below_chance: ``bacc`` lies under ``bacc_permutation``: an artefact (sites that shift between training and
            evaluation, for instance), not a merit.
        score: `openbhb_score`, the mean over seeds.
        mae_by_decade: One dict a set and decade of age: set, decade ("20-29"), mae, n_people.
        confusion: ``sites``, and ``counts`` (true, predicted) over all seeds.
    """

    mae_internal: float | None
    mae_internal_sd: float | None
    mae_internal_ci: tuple[float, float] | None
    r_internal: float | None
    r2_internal: float | None
    mae_external: float | None
    mae_external_sd: float | None
    mae_external_ci: tuple[float, float] | None
    r_external: float | None
    r2_external: float | None
    bacc: float | None
    bacc_sd: float | None
    bacc_ci: tuple[float, float] | None
    bacc_chance: float | None
    bacc_permutation: tuple[float, float] | None
    bacc_age_only: float | None
    below_chance: bool
    score: float | None
    score_sd: float | None
    score_ci: tuple[float, float] | None
    n_people: int
    n_seeds: int
    mae_by_decade: list[dict[str, Any]] = field(default_factory=list)
    confusion: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, intervals as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def summarise_age_site(
    table: pd.DataFrame, *, n_bootstrap: int = 1000, n_permutations: int = 1000, seed: int = 0
) -> AgeSiteSummary:
    """Errors, accuracies, score and intervals of one arm.

    Folds of one seed are pooled; values are means over seeds. Resamples draw people (internal and external apart) with
    all their scans and seeds, so that seeds and scans never count as people. Permutations exchange the sites of people
    (of someone with several sites, the first in sorted order).

    Args:
        table: As `predict_age_site` returns it, and where they exist the columns ``seed`` and ``fold``.
        n_bootstrap: Resamples, at least 100.
        n_permutations: Permutations, at least 100.
        seed: Of both.

    Raises:
        InputError: Columns or rows are missing, or several arms are mixed.
    """
    _check(table, n_bootstrap, n_permutations)
    evidence = _Evidence(table)
    everyone, resamples = evidence.everyone(), evidence.resamples(n_bootstrap, seed)
    permutation = evidence.permuted(n_permutations, seed)
    values: dict[str, Any] = {}
    for name in METRICS:
        point = evidence.metric(name, everyone)
        values[name], values[f"{name}_sd"] = _mean(point), _sd(point)
        values[f"{name}_ci"] = _interval(evidence.metric(name, resamples))
    for name in ("r_internal", "r2_internal", "r_external", "r2_external", "bacc_age_only"):
        values[name] = _mean(evidence.metric(name, everyone))
    internal = evidence.sets.get("internal")
    n_sites = 0 if internal is None else len(internal.sites)
    bacc = values["bacc"]
    return AgeSiteSummary(
        **values,
        bacc_chance=1 / n_sites if n_sites else None,
        bacc_permutation=permutation,
        below_chance=bacc is not None and permutation is not None and bacc < permutation[0],
        n_people=int(table["subject"].nunique()),
        n_seeds=evidence.n_seeds,
        mae_by_decade=_by_decade(table),
        confusion=_confusion(table),
    )


def compare_age_site(
    table: pd.DataFrame, baseline: str, metric: str = "mae_internal", *, n_bootstrap: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Paired differences of every arm to ``baseline`` with intervals over people, corrected by Holm.

    The same resamples of people are applied to both arms. Arms are compared within a ``layer`` where the table has that
    column; a layer without the baseline is left out.

    Args:
        table: As `summarise_age_site` takes it, with the column ``arm``.
        baseline: The arm to subtract.
        metric: One of `METRICS`.
        n_bootstrap: Resamples, at least 100.
        seed: Of the resamples.

    Returns:
        One row per layer and arm: ``arm``, ``baseline``, ``layer``, ``metric``, ``difference``, ``low``, ``high``,
        ``p`` (two-sided, at least 2 / (n_bootstrap + 1)), ``p_holm`` (over all rows), ``n_people``.

    Raises:
        InputError: Unknown metric or baseline, no other arm, arms without the same people and seeds, or a metric that
            the table does not hold.
    """
    if metric not in METRICS:
        raise InputError(f"there is no metric `{metric}`", found=f"known: {', '.join(METRICS)}")
    if "arm" not in table or baseline not in set(table["arm"]):
        raise InputError(f"there is no arm `{baseline}` to compare with")
    rows: list[dict[str, Any]] = []
    layers = table["layer"] if "layer" in table else pd.Series("", index=table.index)
    for layer, part in table.groupby(layers, sort=False):
        arms = list(dict.fromkeys(part["arm"]))
        if baseline not in arms:
            continue
        base = _Evidence(part[part["arm"] == baseline])
        weights = base.resamples(n_bootstrap, seed)
        level, spread = base.metric(metric, base.everyone()), base.metric(metric, weights)
        for arm in (one for one in arms if one != baseline):
            other = _Evidence(part[part["arm"] == arm])
            other.check_paired(base, arm, baseline)
            difference = _mean(other.metric(metric, other.everyone()) - level)
            if difference is None:
                raise InputError(f"the table does not hold `{metric}`", where=f"arm {arm}, layer {layer}")
            means = np.nanmean(other.metric(metric, weights) - spread, axis=1)
            low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
            beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
            rows.append(
                {
                    "arm": arm,
                    "baseline": baseline,
                    "layer": layer,
                    "metric": metric,
                    "difference": difference,
                    "low": float(low),
                    "high": float(high),
                    "p": min(1.0, 2 * (beyond + 1) / (len(means) + 1)),
                    "n_people": sum(len(one.people) for one in base.sets.values()),
                }
            )
    if not rows:
        raise InputError(f"there is no arm to compare with `{baseline}`", found=str(sorted(set(table["arm"]))))
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    return frame


class _Set:
    """Sums per seed and person of one set, from which every metric of a weighting of people follows.

    ``age`` is (S, P, 8): rows, and the sums of |error|, error^2, age, age^2, prediction, prediction^2 and age times
    prediction. ``n_site``, ``right``, ``right_age_only`` and ``guessed`` are (S, P, K): rows at a site, rows there
    predicted right, rows predicted to be there.
    """

    def __init__(self, table: pd.DataFrame, seeds: Ints) -> None:
        person, self.people = pd.factorize(table["subject"], sort=True)
        draw = np.searchsorted(seeds, _seeds(table))
        place: tuple[Ints, ...] = (draw, person)
        shape: tuple[int, ...] = (len(seeds), len(self.people))
        age, predicted = (table[name].to_numpy(dtype=np.float64) for name in ("age", "age_pred"))
        # Sums of squares around a shift near the mean lose no digits.
        self.shift = float(age.mean())
        age, predicted = age - self.shift, predicted - self.shift
        error = predicted - age
        columns = (np.ones_like(age), np.abs(error), error**2, age, age**2, predicted, predicted**2, age * predicted)
        self.age = np.stack([_sum_at(shape, place, column) for column in columns], axis=-1)
        codes, self.sites = pd.factorize(table["site"], sort=True)
        place, shape = (*place, codes), (*shape, len(self.sites))
        self.n_site = _sum_at(shape, place, np.ones_like(age))
        self.right, self.right_age_only = (
            _sum_at(shape, place, (table[name] == table["site"]).to_numpy(dtype=np.float64))
            for name in ("site_pred", "site_pred_age_only")
        )
        # What was predicted, whatever the truth, and one site a person: for permutations.
        guess = pd.Index(self.sites).get_indexer(pd.Index(table["site_pred"]))
        place = (draw, person, np.maximum(guess, 0))
        self.guessed = _sum_at(shape, place, (guess >= 0).astype(np.float64))
        self.site_of = np.full(len(self.people), len(self.sites))
        np.minimum.at(self.site_of, person, codes)

    def accuracy(self, weights: Floats, right: Floats) -> Floats:
        """Balanced accuracy (B, S) of weights (B, P): mean recall of the sites that have weight."""
        return _mean_recall(
            np.stack([weights @ one for one in right], axis=1), np.stack([weights @ one for one in self.n_site], axis=1)
        )

    def mae(self, weights: Floats) -> Floats:
        """(B, S) mean absolute error of weights (B, P)."""
        n, absolute = np.moveaxis(self._sums(weights, 2), -1, 0)
        error: Floats = absolute / n
        return error

    def r(self, weights: Floats) -> Floats:
        """(B, S) Pearson correlation of weights (B, P); NaN where age or prediction does not vary."""
        n, _, _, y, yy, p, pp, yp = np.moveaxis(self._sums(weights, 8), -1, 0)
        varies = _varies(n, y, yy) & _varies(n, p, pp)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(varies, (n * yp - y * p) / np.sqrt((n * yy - y**2) * (n * pp - p**2)), np.nan)

    def r2(self, weights: Floats) -> Floats:
        """(B, S) share of the variance of age that predictions explain; NaN where age does not vary."""
        n, _, squared, y, yy = np.moveaxis(self._sums(weights, 5), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(_varies(n, y, yy), 1 - squared * n / (n * yy - y**2), np.nan)

    def _sums(self, weights: Floats, n_columns: int) -> Floats:
        return np.stack([weights @ one[:, :n_columns] for one in self.age], axis=1)


class _Evidence:
    """Both sets of one arm on common seeds."""

    def __init__(self, table: pd.DataFrame) -> None:
        seeds = np.unique(_seeds(table))
        self.n_seeds, self.seeds = len(seeds), seeds
        self.sets = {str(name): _Set(part, seeds) for name, part in table.groupby("set")}

    def metric(self, name: str, weights: Mapping[str, Floats]) -> Floats:
        """(B, S) of weights (B, P) of each set; NaN for a set that is not there."""
        if name == "score":
            score: Floats = self.metric("mae_external", weights) * self.metric("bacc", weights) ** SCORE_EXPONENT
            return score
        kind, _, which = name.partition("_")
        which = "internal" if kind == "bacc" else which
        if which not in self.sets:
            return np.full((len(next(iter(weights.values()))), self.n_seeds), np.nan)
        one = self.sets[which]
        if kind == "bacc":
            return one.accuracy(weights[which], one.right if name == "bacc" else one.right_age_only)
        measures = {"mae": one.mae, "r": one.r, "r2": one.r2}
        return measures[kind](weights[which])

    def everyone(self) -> dict[str, Floats]:
        """Weights (1, P) that count each person once."""
        return {name: np.ones((1, len(one.people))) for name, one in self.sets.items()}

    def resamples(self, n: int, seed: int) -> dict[str, Floats]:
        """How often each person of each set counts in each resample, (n, P)."""
        weights = {}
        for number, (name, one) in enumerate(sorted(self.sets.items())):
            rng = seeding.numpy_rng(seed, seeding.BOOTSTRAP, number)
            people = len(one.people)
            weights[name] = rng.multinomial(people, np.full(people, 1 / people), size=n).astype(np.float64)
        return weights

    def permuted(self, n: int, seed: int) -> tuple[float, float] | None:
        """Interval of the balanced accuracy when the sites of people are exchanged."""
        if "internal" not in self.sets:
            return None
        one = self.sets["internal"]
        rng = seeding.numpy_rng(seed, seeding.BOOTSTRAP, 99)
        site_of = rng.permuted(np.tile(one.site_of, (n, 1)), axis=1)  # (n, P)
        rows = one.age[..., 0]  # (S, P)
        right, count = np.empty((n, self.n_seeds, len(one.sites))), np.empty((n, self.n_seeds, len(one.sites)))
        for site in range(len(one.sites)):
            there = (site_of == site).astype(np.float64)
            right[..., site], count[..., site] = there @ one.guessed[..., site].T, there @ rows.T
        return _interval(_mean_recall(right, count))

    def check_paired(self, base: _Evidence, arm: str, baseline: str) -> None:
        """Refuse arms that were not evaluated on the same people, sets and seeds."""
        same = self.sets.keys() == base.sets.keys() and np.array_equal(self.seeds, base.seeds)
        for name, one in self.sets.items() if same else ():
            other = base.sets[name]
            same = same and list(one.people) == list(other.people) and np.array_equal(one.n_site, other.n_site)
        if not same:
            raise InputError(
                f"`{arm}` and `{baseline}` were not evaluated on the same people, sets and seeds",
                found=", ".join(f"{name}: {len(one.people)} people" for name, one in self.sets.items()),
                fix="finish the missing cells, or leave the arm out",
            )


def _sum_at(shape: tuple[int, ...], place: tuple[npt.NDArray[Any], ...], values: npt.NDArray[Any]) -> Floats:
    flat = np.ravel_multi_index(place, shape)
    counts = np.bincount(flat, weights=values, minlength=math.prod(shape))
    sums: Floats = counts.astype(np.float64, copy=False).reshape(shape)
    return sums


def _varies(n: Floats, total: Floats, squares: Floats) -> npt.NDArray[np.bool_]:
    """Rounding leaves a constant with a variance of about 1e-16 of its square."""
    varies: npt.NDArray[np.bool_] = n * squares - total**2 > 1e-12 * n * squares
    return varies


def _mean_recall(right: Floats, count: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = np.where(count > 0, right / count, 0.0)
    held: Floats = recall.sum(-1) / (count > 0).sum(-1)
    return held


def _seeds(table: pd.DataFrame) -> Ints:
    return table["seed"].to_numpy(dtype=np.int64) if "seed" in table else np.zeros(len(table), np.int64)


def _mean(values: Floats) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _sd(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else None


def _interval(values: Floats) -> tuple[float, float] | None:
    """Of (B, S) values, averaged over seeds."""
    if np.isnan(values).all():
        return None
    low, high = np.nanquantile(values.mean(1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _by_decade(table: pd.DataFrame) -> list[dict[str, Any]]:
    start = (table["age"] // 10 * 10).astype(int)
    error = (table["age_pred"] - table["age"]).abs()
    rows = pd.DataFrame({"set": table["set"], "start": start, "error": error, "subject": table["subject"]})
    return [
        {
            "set": str(name),
            "decade": f"{first}-{int(str(first)) + 9}",
            "mae": float(part["error"].mean()),
            "n_people": int(part["subject"].nunique()),
        }
        for (name, first), part in rows.groupby(["set", "start"])
    ]


def _confusion(table: pd.DataFrame) -> dict[str, Any] | None:
    internal = table[table["set"] == "internal"]
    if internal.empty:
        return None
    sites = sorted(set(internal["site"]) | set(internal["site_pred"]))
    counts = pd.crosstab(internal["site"], internal["site_pred"]).reindex(index=sites, columns=sites, fill_value=0)
    return {"sites": sites, "counts": counts.to_numpy().tolist()}


def _check(table: pd.DataFrame, n_bootstrap: int, n_permutations: int) -> None:
    wanted = {"subject", "set", "site", "age", "age_pred", "site_pred", "site_pred_age_only"}
    lacking = wanted - set(table.columns)
    if lacking or table.empty:
        raise InputError("the table of predictions lacks rows or columns", found=f"{len(table)} rows, {lacking}")
    strange = set(table["set"]) - {"internal", "external"}
    if strange:
        raise InputError("column `set` is internal or external", found=str(sorted(map(str, strange))))
    for column in ("arm", "layer"):
        if column in table and table[column].nunique() > 1:
            raise InputError(f"several values of `{column}` cannot be summarised as one", fix="select one")
    for name in ("age", "age_pred"):
        numbers(table[name].to_numpy(), name)
    if n_bootstrap < 100 or n_permutations < 100:
        raise InputError("resamples and permutations must be at least 100", found=f"{n_bootstrap}, {n_permutations}")
