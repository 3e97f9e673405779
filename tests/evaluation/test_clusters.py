"""Cluster quality against definitions written out as loops, and against what must hold of any grouping."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.core.errors import InputError, ShapeError
from medssl.evaluation import cluster_balance, cluster_quality, reference_groups

groupings = st.integers(2, 14).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)])
)


def entropy(values) -> float:
    return -sum(
        share * math.log(share) for share in (values.count(value) / len(values) for value in sorted(set(values)))
    )


def loop_nmi(a, b) -> float:
    joint = entropy(list(zip(a, b, strict=True)))
    mean = (entropy(a) + entropy(b)) / 2
    return 1.0 if mean == 0 else (entropy(a) + entropy(b) - joint) / mean


def loop_ari(a, b) -> float:
    pairs = list(combinations(range(len(a)), 2))
    in_a = [a[i] == a[j] for i, j in pairs]
    in_b = [b[i] == b[j] for i, j in pairs]
    both = sum(x and y for x, y in zip(in_a, in_b, strict=True))
    expected = sum(in_a) * sum(in_b) / len(pairs)
    most = (sum(in_a) + sum(in_b)) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


@settings(max_examples=30, deadline=None)
@given(pair=groupings)
def test_nmi_and_ari_are_their_definitions_and_names_of_clusters_do_not_matter(pair):
    a, b = pair
    found = cluster_quality(np.array(a), np.array(b))
    assert found.nmi == pytest.approx(loop_nmi(a, b), abs=1e-9)
    assert found.ari == pytest.approx(loop_ari(a, b), abs=1e-9)
    renamed = cluster_quality(7 - np.array(a), np.array(b))
    assert (renamed.nmi, renamed.ami, renamed.ari) == pytest.approx((found.nmi, found.ami, found.ari), abs=1e-9)
    assert (found.n, found.n_missing) == (len(a), 0)


def test_chance_is_zero_where_it_is_adjusted_for_and_equal_groupings_are_one():
    rng = np.random.default_rng(0)
    labels, site = rng.integers(0, 50, 400), rng.integers(0, 4, 400)
    found = cluster_quality(labels, site)
    assert abs(found.ami) < 0.03
    assert abs(found.ari) < 0.03
    assert found.nmi > 0.05  # which is why all three are written
    same = cluster_quality(site, np.array(["a", "b", "c", "d"])[site])
    assert (same.nmi, same.ami, same.ari) == pytest.approx((1.0, 1.0, 1.0))


def test_items_without_a_value_are_left_out_and_counted():
    labels = np.array([0, 0, 1, 1, -1, 0])
    number = np.array([3.0, 3.0, 5.0, 5.0, 3.0, np.nan])
    found = cluster_quality(labels, number)
    assert (found.nmi, found.ari, found.n, found.n_missing) == (1.0, 1.0, 4, 2)
    assert cluster_quality(labels, np.array([7, 7, 2, 2, 7, -1])) == found
    assert cluster_quality(labels, np.array(["x", "x", "y", "y", "x", None], dtype=object)) == found
    nothing = cluster_quality(labels, np.full(6, np.nan))
    assert math.isnan(nothing.nmi)
    assert (nothing.n, nothing.n_missing) == (0, 6)


def test_many_numbers_are_compared_in_ten_groups_of_equal_size():
    ages = np.random.default_rng(1).permutation(np.linspace(20.0, 80.0, 200))
    groups = reference_groups(ages)
    assert np.bincount(groups).tolist() == [20] * 10
    assert (np.diff(groups[np.argsort(ages)]) >= 0).all()
    assert reference_groups(np.array([4.0, 2.0, np.nan, 4.0])).tolist() == [1, 0, -1, 1]
    old = (ages > np.median(ages)).astype(int)
    assert cluster_quality(old, ages).ami > 0.4


def test_balance_is_the_normalised_entropy_of_the_clusters():
    assert cluster_balance([0, 1, 2, 3] * 5, 4) == (pytest.approx(1.0), 0)
    assert cluster_balance([2] * 9, 4) == (0.0, 3)
    balance, empty = cluster_balance([0, 0, 0, 3, -1], 4)
    assert balance == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert empty == 2
    assert cluster_balance([0, 0], 1) == (1.0, 0)
    assert math.isnan(cluster_balance(np.array([-1, -1]), 3)[0])


def test_what_is_no_grouping_is_refused():
    with pytest.raises(InputError, match="does not exist"):
        cluster_balance([0, 4], 4)
    with pytest.raises(InputError, match="integers"):
        cluster_quality(np.array([0.0, 1.0]), np.array([0, 1]))
    with pytest.raises(ShapeError, match="differ in number"):
        cluster_quality(np.array([0, 1]), np.array([0, 1, 1]))
    with pytest.raises(ShapeError):
        cluster_quality(np.array([[0, 1]]), np.array([0, 1]))
    with pytest.raises(ShapeError):
        reference_groups(np.zeros((2, 2)))
