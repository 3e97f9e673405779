"""Pseudo-labels by optimal transport and k-means, and the loss of predicting them, against loops and known optima."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import permutation, randn, value_and_grad
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import cluster_cross_entropy, k_means, sela_assignment


def loop_sela(logits, lamb, iterations=3000):
    """The paper's updates as printed, with 1/K and 1/N, on plain numbers."""
    n, k = logits.shape
    p = torch.softmax(logits, 1) ** lamb
    beta = [1 / n] * n
    for _ in range(iterations):
        alpha = [1 / k / sum(p[i, y] * beta[i] for i in range(n)) for y in range(k)]
        beta = [1 / n / sum(alpha[y] * p[i, y] for y in range(k)) for i in range(n)]
    return torch.tensor([[alpha[y] * p[i, y] * beta[i] for y in range(k)] for i in range(n)])


def test_sela_equals_the_printed_iteration():
    logits = randn(7, 3, seed=1) / 4
    assert_close(sela_assignment(logits, lamb=5.0, tolerance=1e-12), loop_sela(logits, 5.0, 200), rtol=1e-9, atol=0)


def test_sela_meets_both_margins_and_the_condition_of_the_optimum():
    logits = randn(20, 6, seed=2)
    q = sela_assignment(logits, lamb=10.0, tolerance=1e-12)
    assert_close(q.sum(1), torch.full((20,), 1 / 20, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(q.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-8, atol=0)
    # Stationary: log Q - lambda log P is a term of the item plus a term of the cluster.
    rest = q.log() - 10.0 * logits.log_softmax(1)
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-9


def test_sela_tends_to_the_best_balanced_labelling():
    logits = randn(12, 4, seed=3)
    labels = sela_assignment(logits, lamb=200.0, tolerance=1e-6, max_iterations=3000).argmax(1)
    items, places = linear_sum_assignment(-logits.log_softmax(1).repeat_interleave(3, 1).numpy())  # 3 places each
    assert labels[items].tolist() == (places // 3).tolist()


@settings(max_examples=25)
@given(n=st.integers(2, 20), seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.01, 1.0, 1e4]))
def test_sela_is_finite_and_follows_the_order_of_items_and_clusters(n, seed, scale):
    k = 1 + seed % n
    logits, rows, columns = scale * randn(n, k, seed=seed), permutation(n, seed), permutation(k, seed + 1)
    q = sela_assignment(logits, max_iterations=50)
    assert bool(q.isfinite().all())
    assert_close(q.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
    moved = sela_assignment((logits + 5.0)[rows][:, columns], max_iterations=50)
    assert_close(moved, q[rows][:, columns], rtol=1e-6, atol=1e-12)


def test_sela_works_where_powers_underflow_and_in_half_precision():
    logits = torch.tensor([[0.0, -80.0, -90.0], [0.0, -70.0, -90.0], [0.0, -80.0, -60.0]])
    assert sela_assignment(logits, max_iterations=300).argmax(1).tolist() == [
        0,
        1,
        2,
    ]  # P^25 is 0 in float64 for all but the first column
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = sela_assignment(logits.bfloat16(), max_iterations=300)
    assert q.dtype == torch.float64
    assert q.argmax(1).tolist() == [0, 1, 2]


def test_sela_says_when_it_stopped_early(caplog):
    with caplog.at_level(logging.INFO):
        sela_assignment(5 * randn(30, 8), max_iterations=3)
    assert "stopped after 3 iterations" in caplog.text


@pytest.mark.parametrize(
    ("logits", "settings", "message"),
    [
        (torch.zeros(3, 4), {}, "fewer items than clusters.*\n.*3 items, 4 clusters"),
        (torch.zeros(3), {}, r"\(N, K\)"),
        (torch.full((4, 2), math.nan), {}, "finite"),
        (torch.zeros(4, 2), {"lamb": 0.0}, "lamb"),
        (torch.zeros(4, 2), {"tolerance": 0.0}, "tolerance"),
        (torch.zeros(4, 2), {"max_iterations": 0}, "max_iterations"),
    ],
)
def test_sela_refuses(logits, settings, message):
    with pytest.raises((InputError, ShapeError), match=message):
        sela_assignment(logits, **settings)


def test_k_means_equals_scikit_learn_from_the_same_start():
    rows = randn(200, 5, seed=4)
    labels, centroids = k_means(rows, 7, iterations=100, seed=1)
    start = rows[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:7]].numpy()
    other = KMeans(7, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(rows.numpy())
    assert labels.tolist() == other.labels_.tolist()
    assert_close(centroids, torch.from_numpy(other.cluster_centers_))


def test_spherical_k_means_ends_where_every_row_has_its_nearest_centroid():
    rows = randn(60, 4, seed=5)
    labels, centroids = k_means(rows, 5, iterations=200, spherical=True)
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert labels.tolist() == [int(np.argmax([float(row @ c) for c in centroids])) for row in unit]
    for cluster, centroid in enumerate(centroids):
        mean = unit[labels == cluster].mean(0)
        assert_close(centroid, mean / mean.norm())
    shorter, _ = k_means(rows * torch.arange(1, 61)[:, None], 5, iterations=200, spherical=True)
    assert torch.equal(labels, shorter)  # lengths have no say


@settings(max_examples=25)
@given(
    n=st.integers(1, 25),
    distinct=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
    spherical=st.booleans(),
    iterations=st.integers(1, 10),
)
def test_k_means_leaves_no_cluster_empty_and_repeats_to_the_bit(n, distinct, seed, spherical, iterations):
    k = 1 + seed % n
    rows = randn(distinct, 3, seed=seed)[torch.arange(n) % distinct]  # fewer places than clusters
    labels, centroids = k_means(rows, k, seed=seed, spherical=spherical, iterations=iterations)
    assert labels.unique().tolist() == list(range(k))
    assert bool(centroids.isfinite().all())
    again = k_means(rows, k, seed=seed, spherical=spherical, iterations=iterations)
    assert torch.equal(again[0], labels)
    assert torch.equal(again[1], centroids)


def test_an_empty_cluster_takes_the_outermost_item_of_the_largest():
    near = torch.tensor([[0.0], [0.1], [0.2], [3.0], [100.0], [100.0]])
    start = [int(i) for i in torch.randperm(6, generator=torch.Generator().manual_seed(0))[:3]]
    rows = torch.empty_like(near)
    rows[start] = near[[4, 5, 0]]  # two centroids on one place: the second gets nobody
    rows[[i for i in range(6) if i not in start]] = near[[1, 2, 3]]
    labels, _ = k_means(rows, 3, iterations=1, seed=0)
    outermost = rows.flatten().tolist().index(3.0)
    assert int((labels == labels[outermost]).sum()) == 1
    assert int(labels[outermost]) == 1


@pytest.mark.parametrize(
    ("rows", "k", "settings", "message"),
    [
        (torch.zeros(3, 2), 4, {}, "3 items, 4 clusters"),
        (torch.full((3, 2), math.inf), 2, {}, "finite"),
        (torch.zeros(3, 2), 2, {"iterations": 0}, "iteration"),
    ],
)
def test_k_means_refuses(rows, k, settings, message):
    with pytest.raises(InputError, match=message):
        k_means(rows, k, **settings)


def test_cluster_cross_entropy_value_and_gradient_equal_the_loop():
    logits, labels = randn(4, 2, 3, 5, seed=6), torch.tensor([[0, 4, 2], [1, 1, 3], [2, 0, 0], [4, 3, 1]])

    def loop(x):
        terms = []
        for i in range(4):
            for v in range(2):
                for h in range(3):
                    odds = torch.exp(x[i, v, h] / 0.5)
                    terms.append(-torch.log(odds[labels[i, h]] / odds.sum()))
        return sum(terms) / len(terms)

    got = value_and_grad(lambda x: cluster_cross_entropy(x, labels, temperature=0.5).mean(), logits)
    for one, other in zip(got, value_and_grad(loop, logits)):
        assert_close(one, other)


def test_cluster_cross_entropy_of_equal_logits_is_log_k_and_of_an_unknown_item_nan():
    value = cluster_cross_entropy(
        torch.zeros(3, 1, 2, 8, dtype=torch.bfloat16), torch.tensor([[0, 7], [3, -1], [1, 1]])
    )
    assert value.dtype == torch.float32
    assert value.isnan().tolist() == [False, True, False]
    assert_close(value[0], torch.tensor(math.log(8)))
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        cluster_cross_entropy(torch.zeros(3, 1, 2, 8), torch.zeros(2, 3, dtype=torch.int64))
