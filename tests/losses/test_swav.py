"""Sinkhorn-Knopp and swapped prediction against their definitions as loops, and against what must hold of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import permutation, randn, value_and_grad
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import sinkhorn_knopp, swav


def sinkhorn_loop(scores, epsilon, iterations):
    """As printed: exponentials, total 1, columns to 1 / K, rows to 1 / B, times B."""
    b, k = scores.shape
    q = [[math.exp(float(s) / epsilon) for s in row] for row in scores]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        for j in range(k):
            mass = sum(q[i][j] for i in range(b))
            for i in range(b):
                q[i][j] /= mass * k
        for i in range(b):
            mass = sum(q[i])
            for j in range(k):
                q[i][j] /= mass * b
    return torch.tensor([[x * b for x in row] for row in q], dtype=torch.float64)


def swav_loop(z, prototypes, assign, temperature, epsilon, iterations, queue=None):
    n, views, _ = z.shape
    centres = prototypes / prototypes.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=z.dtype)
    for number, a in enumerate(assign):
        rows = [z[i, a] for i in range(n)] + ([] if queue is None else list(queue[number]))
        scores = torch.stack([centres @ (row / row.norm()) for row in rows]).detach()
        codes = sinkhorn_loop(scores, epsilon, iterations)
        for v in range(views):
            if v == a:
                continue
            for i in range(n):
                logits = centres @ (z[i, v] / z[i, v].norm()) / temperature
                for k in range(len(centres)):
                    total = total - codes[i, k] * (logits[k] - torch.logsumexp(logits, 0))
    return total / (len(assign) * (views - 1) * n)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.3, 1), (0.05, 7)])
def test_codes_are_those_of_the_printed_algorithm(epsilon, iterations):
    scores = torch.tanh(randn(7, 5))
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    assert_close(codes, sinkhorn_loop(scores, epsilon, iterations), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("queue", [None, 5])
def test_swav_is_the_mean_of_swapped_cross_entropies(queue):
    z, prototypes = randn(4, 3, 6), randn(5, 6, seed=1)
    queue = None if queue is None else randn(2, queue, 6, seed=2)
    settings = {"temperature": 0.2, "epsilon": 0.1, "iterations": 3}
    for both in (z, prototypes):  # gradients to each, the codes constant

        def ours(x, moving=both is z):
            first, second = (x, prototypes) if moving else (z, x)
            return swav(first, second, assign_views=(0, 2), queue=queue, **settings)

        def loop(x, moving=both is z):
            first, second = (x, prototypes) if moving else (z, x)
            return swav_loop(first, second, (0, 2), *settings.values(), queue)

        value, gradient = value_and_grad(ours, both)
        expected, expected_gradient = value_and_grad(loop, both)
        assert_close(value, expected)
        assert_close(gradient, expected_gradient)


@settings(max_examples=30)
@given(b=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 2**31), epsilon=st.floats(1e-3, 10.0))
def test_rows_sum_to_one_and_order_does_not_matter(b, k, seed, epsilon):
    scores = 2 * torch.rand(b, k, generator=torch.Generator().manual_seed(seed)) - 1  # float32, e^(1 / epsilon) = inf
    codes = sinkhorn_knopp(scores, epsilon=epsilon)
    assert_close(codes.sum(1), torch.ones(b))
    assert bool((codes >= 0).all())
    rows, columns = permutation(b, seed), permutation(k, seed + 1)
    assert_close(sinkhorn_knopp(scores[rows][:, columns], epsilon=epsilon), codes[rows][:, columns])
    assert_close(sinkhorn_knopp(scores + 3.0, epsilon=epsilon), codes, rtol=5e-3, atol=5e-3 if epsilon < 0.01 else 1e-4)


def test_many_iterations_share_the_prototypes_out_evenly():
    scores = torch.tanh(randn(12, 4))
    assert_close(sinkhorn_knopp(scores, epsilon=0.1, iterations=500).sum(0), torch.full((4,), 3.0).double())


def test_extreme_scores_stay_finite():
    # All rows prefer one prototype by more than float32 can say, and one prototype is far from everything.
    scores = torch.full((6, 3), -1.0)
    scores[:, 0] = 1.0
    scores[:, 2] = -50.0
    codes = sinkhorn_knopp(scores, epsilon=0.005)
    assert_close(codes, torch.full((6, 3), 1 / 3))


def test_no_preference_costs_log_k():
    z = torch.ones(4, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = swav(z, torch.ones(10, 8, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor(math.log(10)))
    zero, gradient = value_and_grad(lambda x: swav(x, randn(5, 6)), torch.zeros(3, 2, 6, dtype=torch.float64))
    assert_close(zero, torch.tensor(math.log(5), dtype=torch.float64))
    assert not gradient.any()


@given(scale=st.floats(0.1, 100.0), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_swav_ignores_lengths_and_the_order_of_items_and_prototypes(scale, seed):
    z, prototypes = randn(6, 3, 4, seed=seed), randn(5, 4, seed=seed + 1)
    expected = swav(z, prototypes)
    assert_close(swav(scale * z, prototypes / scale), expected)
    assert_close(swav(z[permutation(6, seed)], prototypes[permutation(5, seed)]), expected)


def test_shapes_and_settings_are_checked():
    z, prototypes = randn(3, 2, 4), randn(5, 4)
    with pytest.raises(ShapeError, match="at least 2 views"):
        swav(z[:, :1], prototypes, assign_views=(0,))
    with pytest.raises(ShapeError, match="as long as the projections"):
        swav(z, randn(5, 3))
    with pytest.raises(InputError, match="different views from 0 to 1"):
        swav(z, prototypes, assign_views=(0, 2))
    with pytest.raises(ShapeError, match="every assigning view"):
        swav(z, prototypes, queue=randn(1, 5, 4))
    with pytest.raises(InputError, match="epsilon must be a positive"):
        sinkhorn_knopp(prototypes, epsilon=0.0)
    with pytest.raises(InputError, match="at least one iteration"):
        swav(z, prototypes, iterations=0)
    with pytest.raises(InputError, match="temperature"):
        swav(z, prototypes, temperature=0.0)
