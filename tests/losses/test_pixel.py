"""Contrast of pixels by a tree of regions: loops in float64, closed forms, and laws of the tree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.core.merging import components, merge_order, pairwise_heights
from medssl.losses import EmptyComparisonWarning, pixel_contrast, ultrametric_tree


def looped(z, anchors, positives, negatives, temperature):
    """The definition, one pair after the other."""
    z, total, count = z.tolist(), 0.0, 0

    def s(i, j):
        dot = sum(a * b for a, b in zip(z[i], z[j]))
        return dot / math.hypot(*z[i]) / math.hypot(*z[j]) / temperature

    for i, pos, neg in zip(anchors.tolist(), positives.tolist(), negatives.tolist()):
        if i < 0:
            continue
        count += 1
        pos, neg = [j for j in pos if j >= 0], [k for k in neg if k >= 0]
        if pos and neg:
            against = sum(math.exp(s(i, k)) for k in neg)
            total += sum(-math.log(math.exp(s(i, j)) / (math.exp(s(i, j)) + against)) for j in pos) / len(pos)
    return total / max(count, 1)


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_pixel_contrast_is_its_definition_whatever_is_missing(n, n_anchors, p, k, seed):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    anchors, positives, negatives = (
        torch.randint(-1, n, shape, generator=rng) for shape in ((n_anchors,), (n_anchors, p), (n_anchors, k))
    )
    expected = looped(z, anchors, positives, negatives, 0.3)
    found = pixel_contrast(z, anchors, positives, negatives, temperature=0.3)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-10)
    order = torch.randperm(n_anchors, generator=rng)
    assert_close(
        pixel_contrast(5 * z, anchors[order], positives[order].flip(1), negatives[order], temperature=0.3), found
    )


def test_equal_embeddings_give_the_logarithm_of_the_choices():
    rows = torch.zeros(4, 10, dtype=torch.int64)
    loss = pixel_contrast(torch.ones(3, 8), torch.arange(3).repeat(2)[:4], rows, rows[:, :5] + 1)
    assert_close(loss, torch.tensor(math.log(6)))


def test_pixels_without_partners_give_no_gradient_and_none_that_is_nan():
    z = torch.randn(4, 3).requires_grad_()
    none = torch.full((2, 2), -1)
    pixel_contrast(z, torch.tensor([0, -1]), torch.tensor([[1, -1], [2, 3]]), none).backward()
    assert torch.equal(z.grad, torch.zeros(4, 3))
    with pytest.warns(EmptyComparisonWarning, match="no anchor"):
        assert pixel_contrast(z, torch.tensor([-1, -1]), none, none) == 0
    with pytest.warns(EmptyComparisonWarning, match="no anchor"):
        assert pixel_contrast(z, torch.tensor([], dtype=torch.int64), none[:0], none[:0]) == 0


def test_pixel_contrast_ignores_autocast():
    z, rows = torch.randn(6, 4), torch.randint(0, 6, (6, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_contrast(z, torch.arange(6), rows, rows.flip(0))
    assert torch.equal(loss, pixel_contrast(z, torch.arange(6), rows, rows.flip(0)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"z": torch.ones(4)}, ShapeError, "z must be"),
        ({"anchors": torch.zeros(2, 1, dtype=torch.int64)}, ShapeError, "anchors must be"),
        ({"positives": torch.zeros(3, 2, dtype=torch.int64)}, ShapeError, "positives"),
        ({"negatives": torch.full((2, 2), 4)}, InputError, "negatives must be rows of z, 0 to 3"),
        ({"anchors": torch.zeros(2)}, InputError, "anchors must hold integer"),
        ({"temperature": 0.0}, InputError, "temperature"),
    ],
)
def test_pixel_contrast_refuses(change, error, says):
    rows = torch.zeros(2, 2, dtype=torch.int64)
    good = {"z": torch.ones(4, 2), "anchors": rows[:, 0], "positives": rows, "negatives": rows}
    with pytest.raises(error, match=says):
        pixel_contrast(**{**good, **change})


def slow_tree(edges, n):
    """Greedy merging as it is said in words: sets of regions, boundaries summed anew before every merge."""
    groups, height, merges = [{i} for i in range(n)], torch.full((n, n), math.inf, dtype=torch.float64), []
    height.fill_diagonal_(0)
    while True:
        best = None
        for one in groups:
            for other in groups:
                rows = [e for e in edges if (e[0] in one and e[1] in other) or (e[0] in other and e[1] in one)]
                if one is not other and rows:
                    mean = sum(e[2] for e in rows) / sum(e[3] for e in rows)
                    if best is None or mean < best[0]:
                        best = (mean, one, other)
        if best is None:
            return height, merges
        mean, one, other = best
        for i in one:
            for j in other:
                height[i, j] = height[j, i] = mean
        merges.append(mean)
        groups = [g for g in groups if g is not one and g is not other] + [one | other]


def drawn_edges(n, extra, seed):
    """A path through all regions and further neighbours, rows of one pair among them."""
    rng = np.random.default_rng(seed)
    pairs = [(i, i + 1) for i in range(n - 1)]
    pairs += [tuple(rng.choice(n, 2, replace=False)) for _ in range(extra if n > 1 else 0)]
    return [(int(a), int(b), float(rng.uniform(0, 3)), float(rng.integers(1, 9))) for a, b in pairs]


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_tree_is_greedy_merging_and_an_ultrametric(n, extra, seed):
    edges = drawn_edges(n, extra, seed)
    heights, merges = ultrametric_tree(torch.tensor(edges, dtype=torch.float64).reshape(-1, 4), n)
    expected, order = slow_tree(edges, n)
    assert_close(heights, expected)
    assert_close(merges[:, 2], torch.tensor(order, dtype=torch.float64).reshape(-1))
    assert merges.shape == (n - 1, 3)
    assert bool((merges[1:, 2] >= merges[:-1, 2]).all())
    assert bool((heights[:, None, :] <= torch.maximum(heights[:, :, None], heights[None])).all())  # d_ik <= max
    stopped = merge_order(edges, n, down_to=min(3, n))  # the same tree, not finished
    assert np.array_equal(stopped, merges.numpy()[: len(stopped)])
    assert components(stopped, n).max() + 1 == min(3, n)


def test_joint_boundaries_add_strengths_and_lengths():
    # 0-1 merge at 0.1. Their borders on 2, of strengths 8 over 10 and 0.3 over 1, become one of 8.3 / 11; the mean of
    # the two means would be 0.55 and the smaller 0.3.
    heights, merges = ultrametric_tree([[0, 1, 0.2, 2], [0, 2, 8, 10], [2, 1, 0.3, 1]], 3)
    assert_close(heights[2, :2], torch.full((2,), 8.3 / 11, dtype=torch.float64))
    assert merges.tolist()[0] == [0, 1, 0.1]
    assert merges.tolist()[1][:2] == [2, 3]


def test_regions_that_nothing_joins_stay_apart():
    heights, merges = ultrametric_tree([[0, 1, 1, 1]], 3)
    assert heights[2].tolist() == [math.inf, math.inf, 0]
    assert len(merges) == 1
    assert components(merges.numpy(), 3).tolist() == [0, 0, 1]
    alone, none = ultrametric_tree(torch.zeros(0, 4), 1)
    assert alone.tolist() == [[0.0]]
    assert len(none) == 0
    assert np.array_equal(pairwise_heights(none.numpy(), 1), alone.numpy())


@pytest.mark.parametrize(
    ("edges", "n", "error", "says"),
    [
        ([[0, 1, 1.0]], 2, ShapeError, "edges must be"),
        ([[0, 2, 1, 1]], 2, InputError, "two different regions of 0 to 1"),
        ([[1, 1, 1, 1]], 2, InputError, "two different regions"),
        ([[0, 0.5, 1, 1]], 2, InputError, "two different regions"),
        ([[0, 1, -1, 1]], 2, InputError, "strength sum"),
        ([[0, 1, 1, 0]], 2, InputError, "length above 0"),
        ([[0, 1, math.nan, 1]], 2, InputError, "finite"),
        ([], 0, InputError, "at least one region"),
    ],
)
def test_tree_refuses(edges, n, error, says):
    with pytest.raises(error, match=says):
        ultrametric_tree(edges, n)
