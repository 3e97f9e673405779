"""Paired intervals cover, never take cases or seeds for people, and say what they cannot know."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medssl.core.errors import InputError
from medssl.evaluation import compare_arms, compare_in_blocks, holm, over_draws, paired_bootstrap

SHIFT = 0.03


def simulate(seed: int, draws: int = 5, people: int = 12, seeds: int = 2, spread=(0.02, 0.04, 0.03)) -> pd.DataFrame:
    """Arm "ours" is better by SHIFT on average; the gain varies with the draw and with the person."""
    rng = np.random.default_rng(seed)
    level = 0.6 + 0.1 * rng.standard_normal((draws, 1, 1)) + 0.1 * rng.standard_normal((1, people, 1))
    gain = SHIFT + spread[0] * rng.standard_normal((draws, 1, 1)) + spread[1] * rng.standard_normal((1, people, 1))
    noise = spread[2] * rng.standard_normal((2, draws, people, seeds))
    scores = np.stack([level + noise[0], level + gain + noise[1]])
    index = pd.MultiIndex.from_product(
        [["none", "ours"], range(draws), [f"p{i}" for i in range(people)], range(seeds)],
        names=["arm", "draw", "group", "seed"],
    )
    return pd.DataFrame({"dice": scores.ravel()}, index=index).reset_index().assign(n_labelled=2)


def test_intervals_cover_the_known_difference():
    covered, widths = 0, []
    for seed in range(100):
        result = paired_bootstrap(simulate(seed), "ours", "none", n_resamples=400, seed=seed)
        covered += result.low <= SHIFT <= result.high
        widths.append(result.high - result.low)
    assert covered >= 85  # 95 nominal; five draws are few
    # The mean's true standard deviation is about 0.0158: the interval must not hide in width either.
    assert 0.8 < np.mean(widths) / (2 * 1.96 * 0.0158) < 1.3


def test_mean_difference_and_direction():
    table = simulate(1)
    result = paired_bootstrap(table, "ours", "none")
    means = table.groupby("arm")["dice"].mean()
    assert result.difference == pytest.approx(means["ours"] - means["none"])
    assert result.low < result.difference < result.high
    reverse = paired_bootstrap(table, "none", "ours")
    assert reverse.difference == pytest.approx(-result.difference)
    assert (result.n_draws, result.n_people, result.resampled) == (5, 12, ("draws", "people"))


def test_more_cases_of_the_same_people_do_not_narrow_the_interval():
    table = simulate(2)
    once, many = (paired_bootstrap(pd.concat([table] * k), "ours", "none", seed=4) for k in (1, 20))
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    naive = table.pivot(index=["draw", "group", "seed"], columns="arm", values="dice").eval("ours - none")
    assert once.high - once.low > 2 * 1.96 * naive.std() / math.sqrt(len(naive))


def test_a_difference_between_draws_alone_is_seen():
    """All people agree inside a draw: people say nothing about the uncertainty, draws everything."""
    table = simulate(3, draws=3, spread=(0.05, 0.0, 0.0))
    gains = table.pivot(index=["draw", "group", "seed"], columns="arm", values="dice").eval("ours - none")
    per_draw = gains.groupby("draw").mean()
    result = paired_bootstrap(table, "ours", "none")
    assert result.low <= per_draw.min() + 1e-9
    assert result.high >= per_draw.max() - 1e-9


def test_p_value_is_the_level_at_which_the_interval_touches_zero():
    checked = 0
    for seed in range(20):
        table = simulate(seed, people=4)
        p = paired_bootstrap(table, "ours", "none", n_resamples=2000).p_value
        if 0.02 < p < 0.8:
            wide = paired_bootstrap(table, "ours", "none", n_resamples=2000, level=1 - 0.9 * p)
            narrow = paired_bootstrap(table, "ours", "none", n_resamples=2000, level=1 - 1.1 * p)
            assert wide.low <= 0 <= wide.high
            assert narrow.low > 0 or narrow.high < 0
            checked += 1
    assert checked >= 5


def test_same_seed_same_interval_row_order_ignored():
    table = simulate(4)
    a = paired_bootstrap(table, "ours", "none", seed=1)
    b = paired_bootstrap(table.sample(frac=1, random_state=0), "ours", "none", seed=1)
    assert (a.low, a.high, a.p_value) == pytest.approx((b.low, b.high, b.p_value))
    assert paired_bootstrap(table, "ours", "none", seed=2).low != a.low


def test_one_draw_resamples_people_only_and_says_so():
    table = simulate(5, draws=1, people=30, seeds=1)
    result = paired_bootstrap(table, "ours", "none")
    assert result.resampled == ("people",)
    gains = table.pivot(index="group", columns="arm", values="dice").eval("ours - none")
    half = (result.high - result.low) / 2
    assert half == pytest.approx(1.96 * gains.std() / math.sqrt(30), rel=0.1)


def test_one_person_resamples_draws_only():
    assert paired_bootstrap(simulate(6, people=1), "ours", "none").resampled == ("draws",)


def test_one_draw_and_one_person_have_a_difference_but_no_interval():
    result = paired_bootstrap(simulate(7, draws=1, people=1), "ours", "none")
    assert math.isfinite(result.difference)
    assert result.resampled == ()
    assert all(math.isnan(x) for x in (result.low, result.high, result.p_value))


def test_left_out_scores_are_counted():
    table = simulate(8)
    table.loc[(table["arm"] == "ours") & (table["draw"] == 2) & (table["group"] == "p3"), "dice"] = np.nan
    result = paired_bootstrap(table, "ours", "none")
    assert result.left_out == 1
    kept = table[~((table["draw"] == 2) & (table["group"] == "p3"))].groupby("arm")["dice"].mean()
    assert result.difference == pytest.approx(kept["ours"] - kept["none"])


def test_arms_that_do_not_pair_are_refused():
    table = simulate(9)
    with pytest.raises(InputError, match="same draws and people"):
        paired_bootstrap(table[~((table["arm"] == "ours") & (table["draw"] == 0))], "ours", "none")
    with pytest.raises(InputError, match="no arm `other`"):
        paired_bootstrap(table, "other", "none")
    with pytest.raises(InputError, match="several n_labelled"):
        paired_bootstrap(pd.concat([table, table.assign(n_labelled=8)]), "ours", "none")
    with pytest.raises(InputError, match="lacks"):
        paired_bootstrap(table.drop(columns="group"), "ours", "none")
    with pytest.raises(InputError, match="no person has a score"):
        paired_bootstrap(table.assign(dice=np.nan), "ours", "none")
    with pytest.raises(InputError, match="n_resamples"):
        paired_bootstrap(table, "ours", "none", n_resamples=10)


def test_compare_arms_corrects_over_all_comparisons():
    first = simulate(10)
    third = first[first["arm"] == "none"].assign(arm="same")
    table = pd.concat([first, third, pd.concat([first, third]).assign(n_labelled=8)])
    result = compare_arms(table, "none", n_resamples=1000)
    assert list(zip(result["n_labelled"], result["arm"])) == [(2, "ours"), (2, "same"), (8, "ours"), (8, "same")]
    assert (result.loc[result["arm"] == "same", ["difference", "low", "high"]] == 0).all(axis=None)
    assert (result.loc[result["arm"] == "same", "p_holm"] == 1).all()
    assert (result["p_holm"] >= result["p_value"]).all()
    with pytest.raises(InputError, match="no arm to compare"):
        compare_arms(third, "same")


def test_over_draws_gives_mean_and_sd_of_draws():
    table = pd.DataFrame(
        [
            {"arm": "a", "n_labelled": 1, "draw": draw, "seed": 0, "group": person, "dice": score}
            for draw, person, score in [(0, "p", 0.2), (0, "p", 0.4), (0, "q", 0.5), (1, "p", 0.7), (1, "q", 0.9)]
        ]
    )
    row = over_draws(table).iloc[0]
    assert row["mean"] == pytest.approx((0.4 + 0.8) / 2)
    assert row["sd"] == pytest.approx(0.4 / math.sqrt(2))
    assert (row["n_draws"], row["n_people"]) == (2, 2)
    assert math.isnan(over_draws(table[table["draw"] == 0]).iloc[0]["sd"])


def test_holm_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_nan = holm([0.04, math.nan, 0.01])
    assert with_nan[[0, 2]].tolist() == pytest.approx([0.04, 0.02])
    assert math.isnan(with_nan[1])
    assert len(holm([])) == 0
    with pytest.raises(InputError, match="0, 1"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    rejected = []
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - k) > alpha:
            break
        rejected.append(i)
    assert np.flatnonzero(holm(p) <= alpha).tolist() == sorted(rejected)


def blocks(effects, n_draws, rng, noise=0.02, people=12):
    """Scores of arms that differ by ``effects``; each training has noise of its own, each draw and person an effect."""
    person, draw = rng.normal(0, 0.05, people), rng.normal(0, 0.05, n_draws)
    return pd.DataFrame(
        [
            {"arm": arm, "draw": d, "seed": 0, "group": f"g{g}", "dice": 0.7 + effect + draw[d] + trained + person[g]}
            for arm, effect in effects.items()
            for d in range(n_draws)
            for trained in [rng.normal(0, noise)]
            for g in range(people)
        ]
    )


def test_two_arms_in_blocks_are_a_paired_t_test():
    table = blocks({"base": 0.0, "x": 0.03}, 5, np.random.default_rng(0))
    found = compare_in_blocks(table, "base")["x"]
    means = table.groupby(["arm", "draw"])["dice"].mean().unstack("draw")
    known = stats.ttest_rel(means.loc["x"], means.loc["base"])
    assert found.p_value == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert found.degrees == 4


def test_blocks_keep_their_level_where_three_draws_of_a_bootstrap_do_not():
    rng = np.random.default_rng(1)
    arms = {"base": 0.0, **{f"arm{i}": 0.0 for i in range(5)}}
    block, plain, n = 0, 0, 60
    for _ in range(n):
        table = blocks(arms, 3, rng)
        block += compare_in_blocks(table, "base")["arm0"].p_value < 0.05
        plain += paired_bootstrap(table, "arm0", "base", n_resamples=200).p_value < 0.05
    assert block / n < 0.12
    assert plain / n > 0.12
    shifted = blocks({**arms, "arm0": 0.15}, 3, rng)
    assert compare_in_blocks(shifted, "base")["arm0"].p_value < 0.001


def test_one_draw_says_nothing_about_how_trainings_vary():
    found = compare_in_blocks(blocks({"base": 0.0, "x": 0.3}, 1, np.random.default_rng(2)), "base")["x"]
    assert found.difference == pytest.approx(0.3, abs=0.1)
    assert np.isnan([found.low, found.high, found.p_value]).all()
    missing = blocks({"base": 0.0, "x": 0.3}, 2, np.random.default_rng(2)).iloc[:-12]
    with pytest.raises(InputError, match="same draws"):
        compare_in_blocks(missing, "base")
