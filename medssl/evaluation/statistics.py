"""Comparing arms of an experiment that share their test people and their draws of labelled people.

A result of few-label training varies with who was labelled (the draw), with the seed, and with whom it is tested on.
Scores of one person in several draws, or of several cases of a person, are not independent: people and draws are
resampled here, never their products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from medssl.core import seeding
from medssl.core.errors import InputError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Mean paired difference of two arms and its interval.

    Attributes:
        difference: Mean over (draw, person) of the arm minus the baseline, seeds and cases averaged before.
        low, high: Bounds of the interval; NaN where nothing could be resampled.
        level: Of the interval, 0.95 for 95 %.
        p_value: Two-sided, from the resamples; at least 2 / (n_resamples + 1). NaN where nothing could be resampled.
        n_draws, n_people: What was compared.
        resampled: "draws", "people": the levels with at least two members. With one draw the interval speaks about
            people only, and the other way round.
        left_out: Pairs of (draw, person) without a score in one of the arms.
    """

    difference: float
    low: float
    high: float
    level: float
    p_value: float
    n_draws: int
    n_people: int
    resampled: tuple[str, ...]
    left_out: int


def paired_bootstrap(
    table: pd.DataFrame,
    arm: str,
    baseline: str,
    *,
    metric: str = "dice",
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Two-level paired bootstrap over draws and people.

    Scores are averaged over cases and then seeds to one value per (arm, draw, person); draws and people are then
    resampled together, with replacement, and the interval taken between percentiles. The weights are widened by
    sqrt(n / (n - 1)) on either level (Rao and Wu 1988, "Resampling inference with complex survey data"): a plain
    bootstrap of n means has a variance too small by (n - 1) / n, half of it with two draws.

    Args:
        table: Columns ``arm``, ``draw``, ``group`` (the person), ``metric``, and where they exist ``seed`` and
            ``n_labelled``; one row per case (or case and class). NaN scores are left out.
        arm: Its name in the table.
        baseline: The arm to subtract.
        metric: Column to compare.
        n_resamples: Number of resamples, at least 100.
        level: Of the interval, between 0 and 1.
        seed: Of the resampling.

    Raises:
        InputError: Columns or arms are missing, several ``n_labelled`` are mixed, or the arms were not scored on the
            same draws and people.
    """
    _check(table, {"arm", "draw", "group", metric}, n_resamples, level)
    if "n_labelled" in table and table["n_labelled"].nunique() > 1:
        raise InputError("several n_labelled cannot be compared as one", fix="use compare_arms, or select one")
    difference, left_out = _paired_cells(table, arm, baseline, metric)
    observed = ~np.isnan(difference)
    values = np.where(observed, difference, 0.0)
    n_draws, n_people = difference.shape
    resampled = tuple(name for name, n in (("draws", n_draws), ("people", n_people)) if n > 1)
    mean = float(values.sum() / observed.sum())
    low = high = p_value = float("nan")
    if resampled:
        rng = seeding.numpy_rng(seed, seeding.BOOTSTRAP)
        draws, people = _weights(n_draws, n_resamples, rng), _weights(n_people, n_resamples, rng)
        counted = ((draws @ observed) * people).sum(1)
        means = ((draws @ values) * people).sum(1)[counted > 0] / counted[counted > 0]
        low, high = (float(q) for q in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
        beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
        p_value = min(1.0, 2 * (beyond + 1) / (len(means) + 1))
    return PairedDifference(mean, low, high, level, p_value, n_draws, n_people, resampled, left_out)


def compare_arms(
    table: pd.DataFrame,
    baseline: str,
    *,
    metric: str = "dice",
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """`paired_bootstrap` of every other arm against ``baseline`` at every ``n_labelled``, corrected by Holm.

    Args:
        table: As `paired_bootstrap` takes it, with ``n_labelled``.
        baseline: The arm to subtract.
        metric: Column to compare.
        n_resamples: Number of resamples.
        level: Of the intervals (not corrected for their number; the p-values are).
        seed: Of the resampling.

    Returns:
        One row per arm and n_labelled: ``arm``, ``baseline``, ``n_labelled``, the fields of `PairedDifference`, and
        ``p_holm``, corrected over all rows.
    """
    _check(table, {"arm", "draw", "group", "n_labelled", metric}, n_resamples, level)
    rows: list[dict[str, Any]] = []
    for n_labelled, part in table.groupby("n_labelled"):
        for arm in dict.fromkeys(part["arm"]):
            if arm == baseline:
                continue
            result = paired_bootstrap(
                part, arm, baseline, metric=metric, n_resamples=n_resamples, level=level, seed=seed
            )
            rows.append({"arm": arm, "baseline": baseline, "n_labelled": n_labelled, **asdict(result)})
    if not rows:
        raise InputError(f"there is no arm to compare with `{baseline}`", found=str(sorted(table["arm"].unique())))
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p_value"].to_numpy(dtype=np.float64))
    return frame


@dataclass(frozen=True)
class BlockDifference:
    """Difference of an arm to the baseline, judged by how arms vary between draws.

    Attributes:
        difference: Mean over draws of the arm minus the baseline.
        low, high: Bounds of the interval; NaN with one draw.
        p_value: Two-sided t-test; NaN with one draw.
        degrees: Of freedom: (arms - 1) (draws - 1).
    """

    difference: float
    low: float
    high: float
    p_value: float
    degrees: int


def compare_in_blocks(
    table: pd.DataFrame, baseline: str, *, metric: str = "dice", level: float = 0.95
) -> dict[str, BlockDifference]:
    """Every other arm against ``baseline``, with the draws as the blocks of a two-way analysis of variance.

    Each draw is trained anew, so that arms vary between draws even where they are worth the same. A bootstrap of two or
    three draws does not see how much (all of its resamples agree as soon as the draws do); here the noise is what is
    left of the scores of all arms once every arm and every draw has its mean (Fisher 1935, "The Design of
    Experiments", randomised blocks). It is taken to be alike for all arms; which people are tested does not enter.

    Args:
        table: Columns ``arm``, ``draw``, ``group``, ``metric`` and where it exists ``seed``, of one ``n_labelled``.
        baseline: The arm to subtract.
        metric: Column to compare.
        level: Of the intervals.

    Raises:
        InputError: Columns or the baseline are missing, or arms were not scored on the same draws.
    """
    _check(table, {"arm", "draw", "group", metric}, level=level)
    keys = ["arm", "draw", *(name for name in ("seed",) if name in table)]
    runs = table.groupby([*keys, "group"])[metric].mean().groupby(level=keys).mean()
    scores = runs.groupby(level=["arm", "draw"]).mean().unstack("draw")
    if baseline not in scores.index or len(scores) < 2 or scores.isna().to_numpy().any():
        raise InputError(
            f"arms and `{baseline}` must be scored on the same draws", found=f"arms {', '.join(map(str, scores.index))}"
        )
    values = scores.to_numpy(dtype=np.float64)
    n_arms, n_draws = values.shape
    rest = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    degrees = (n_arms - 1) * (n_draws - 1)
    error = np.sqrt(2 * (rest**2).sum() / degrees / n_draws) if degrees else float("nan")
    half = float(stats.t.ppf((1 + level) / 2, degrees) * error) if degrees else float("nan")
    found = {}
    for arm, difference in (scores.mean(axis=1) - scores.loc[baseline].mean()).items():
        if arm == baseline:
            continue
        p = float("nan")
        if degrees:
            p = float(2 * stats.t.sf(abs(difference) / error, degrees)) if error > 0 else float(difference == 0)
        found[str(arm)] = BlockDifference(float(difference), difference - half, difference + half, p, degrees)
    return found


def over_draws(table: pd.DataFrame, *, metric: str = "dice") -> pd.DataFrame:
    """Mean and standard deviation over draws of each arm and ``n_labelled``.

    Inside a draw, scores are averaged over cases of a person and seed, then people, then seeds.

    Args:
        table: Columns ``arm``, ``n_labelled``, ``draw``, ``group``, ``metric`` and where it exists ``seed``.
        metric: Column to average.

    Returns:
        Columns ``arm``, ``n_labelled``, ``mean``, ``sd`` (n - 1; NaN with one draw), ``n_draws``, ``n_people``.

    Raises:
        InputError: Columns are missing.
    """
    _check(table, {"arm", "n_labelled", "draw", "group", metric})
    keys = ["arm", "n_labelled"]
    seeds = [name for name in ("seed",) if name in table]
    person = table.groupby([*keys, "draw", *seeds, "group"])[metric].mean()
    run = person.groupby(level=[*keys, "draw", *seeds]).mean()
    draw = run.groupby(level=[*keys, "draw"]).mean()
    grouped = draw.groupby(level=keys)
    people = table.groupby(keys)["group"].nunique()
    result = pd.DataFrame({"mean": grouped.mean(), "sd": grouped.std(), "n_draws": grouped.count(), "n_people": people})
    return result.reset_index()


def holm(p_values: npt.ArrayLike) -> Floats:
    """Holm's step-down correction: the p-values of a family, adjusted in place of their order.

    NaN stays NaN and does not count. Holm 1979, "A simple sequentially rejective multiple test procedure".

    Raises:
        InputError: A value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise InputError("p-values must lie in [0, 1]", found=str(p.tolist()))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _paired_cells(table: pd.DataFrame, arm: str, baseline: str, metric: str) -> tuple[Floats, int]:
    """Differences (draws, people), NaN where there is none, and the number of pairs without a score."""
    seeds = [name for name in ("seed",) if name in table]
    cells = []
    for name in (arm, baseline):
        rows = table[table["arm"] == name]
        if rows.empty:
            raise InputError(f"there is no arm `{name}`", found=str(sorted(table["arm"].unique())))
        per_run = rows.groupby(["draw", *seeds, "group"])[metric].mean()
        cells.append(per_run.groupby(level=["draw", "group"]).mean())
    alone = cells[0].index.symmetric_difference(cells[1].index)
    if len(alone):
        raise InputError(
            f"`{arm}` and `{baseline}` were not scored on the same draws and people",
            where=f"draw {alone[0][0]}, person {alone[0][1]} ({len(alone)} in all)",
            fix="finish the missing runs, or leave the draw out of both arms",
        )
    difference = cells[0] - cells[1]
    left_out = int(difference.isna().sum())
    if left_out == len(difference):
        raise InputError(f"no person has a score of `{metric}` in both arms")
    return difference.dropna().unstack("group").to_numpy(dtype=np.float64), left_out


def _weights(n: int, n_resamples: int, rng: np.random.Generator) -> Floats:
    """How often each of n counts in each resample, (n_resamples, n): 1 on average, widened as Rao and Wu."""
    if n == 1:
        return np.ones((n_resamples, 1))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return 1 + (counts - 1) * np.sqrt(n / (n - 1))


def _check(table: pd.DataFrame, columns: set[str], n_resamples: int = 100, level: float = 0.95) -> None:
    lacking = columns - set(table.columns)
    if lacking or table.empty:
        raise InputError("the table of scores lacks rows or columns", found=f"{len(table)} rows, without {lacking}")
    if n_resamples < 100 or not 0 < level < 1:
        raise InputError("n_resamples must be at least 100, level inside (0, 1)", found=f"{n_resamples}, {level}")
