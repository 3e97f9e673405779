"""local_contrastive and its region tables against loops written from the formula, and their laws."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, all_others, local_contrastive, nearest_negatives, region_corners

TAU = 0.1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_grad(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def patch(feat: Tensor, corner: list[int], size: int) -> Tensor:
    window = feat[(slice(None), *(slice(c, c + size) for c in corner))].flatten()
    return window / window.norm()


def region_term(anchor: Tensor, partner: Tensor, corner: list[int], others: list[list[int]], size: int) -> Tensor:
    here = patch(anchor, corner, size)

    def e(feat: Tensor, at: list[int]) -> Tensor:
        return torch.exp(torch.dot(here, patch(feat, at, size)) / TAU)

    positive = e(partner, corner)
    return -torch.log(positive / (positive + sum(e(anchor, q) + e(partner, q) for q in others)))


def loop_local(a, b, corners, size, negatives=None, strategy="lr", partition=None, volume=None) -> Tensor:
    places = corners.tolist()
    terms = []
    for i, j in itertools.product(range(len(a)), repeat=2):
        if i == j:
            pairs = [(a[i], b[i]), (b[i], a[i])] if strategy == "lr" else [(a[i], b[i])]
        elif strategy == "ld" and partition[i] == partition[j] and volume[i] != volume[j]:
            pairs = [(a[i], a[j])]
        else:
            continue
        for (anchor, partner), r in itertools.product(pairs, range(len(places))):
            others = [q for k, q in enumerate(places) if k != r] if negatives is None else negatives[r].tolist()
            terms.append(region_term(anchor, partner, places[r], others, size))
    return sum(terms) / len(terms)


CASES = {
    "2d 3x3 all others": ((9, 8), 3, 2, None),
    "2d 1x1 all others": ((6, 5), 1, 4, None),
    "2d 3x3 nearest 5": ((12, 12), 3, 2, 5),
    "2d 2x2 nearest 1": ((7, 9), 2, 1, 1),
    "3d 1x1x1 all others": ((5, 4, 3), 1, 3, None),
    "3d 3x3x3 nearest 4": ((8, 7, 5), 3, 1, 4),
}
PARTITION = [0, 1, 0, 1, 0, 2]
VOLUME = [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["lr", "ld"])
def test_value_and_gradient_equal_the_loop(name, strategy):
    spatial, size, channels, n_negatives = CASES[name]
    corners = region_corners(spatial, size)[:8]
    negatives = None if n_negatives is None else nearest_negatives(corners, n_negatives)
    a, b = randn(6, channels, *spatial, seed=1), randn(6, channels, *spatial, seed=2)
    codes = {"partition": torch.tensor(PARTITION), "volume": torch.tensor(VOLUME)}
    ours = value_and_grad(
        lambda x, y: local_contrastive(
            x, y, corners, region_size=size, negatives=negatives, strategy=strategy, temperature=TAU, **codes
        ),
        a,
        b,
    )
    loop = value_and_grad(lambda x, y: loop_local(x, y, corners, size, negatives, strategy, PARTITION, VOLUME), a, b)
    for got, expected in zip(ours, loop):
        assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_negatives_may_lie_off_the_corner_grid_and_repeat():
    a, b = randn(2, 2, 8, 8, seed=1), randn(2, 2, 8, 8, seed=2)
    corners = torch.tensor([[0, 0], [4, 5]])
    negatives = torch.tensor([[[2, 1], [2, 1], [4, 5]], [[0, 3], [5, 0], [1, 1]]])
    got = local_contrastive(a, b, corners, negatives=negatives)
    assert_close(got, loop_local(a, b, corners, 3, negatives))


def test_ld_of_lone_items_contributes_their_own_pairs():
    a, b, corners = randn(3, 2, 6, 6, seed=1), randn(3, 2, 6, 6, seed=2), region_corners((6, 6), 3)
    lone = local_contrastive(a, b, corners, strategy="ld", partition=torch.arange(3), volume=torch.arange(3))
    assert_close(lone, loop_local(a, b, corners, 3, None, "ld", [0, 1, 2], [0, 1, 2]))
    same_volume = torch.zeros(3, dtype=torch.int64)  # repeats of a volume at a partition are not partners
    assert_close(local_contrastive(a, b, corners, strategy="ld", partition=same_volume, volume=same_volume), lone)


def test_equal_regions_give_the_closed_form():
    ones, corners = torch.ones(2, 3, 8, 8, dtype=torch.float64), region_corners((8, 8), 1)
    expected = torch.tensor(math.log(1 + 2 * 12), dtype=torch.float64)
    assert_close(local_contrastive(ones, ones, corners, region_size=1), expected)
    four = nearest_negatives(corners, 4)
    codes = {"partition": torch.zeros(2, dtype=torch.int64), "volume": torch.arange(2)}
    value = local_contrastive(ones, ones, corners, region_size=1, negatives=four, strategy="ld", **codes)
    assert_close(value, torch.tensor(math.log(9), dtype=torch.float64))


def test_gradcheck():
    a, b = randn(3, 1, 5, 5, seed=1).requires_grad_(), randn(3, 1, 5, 5, seed=2).requires_grad_()
    corners = torch.tensor([[0, 0], [0, 2], [2, 1]])
    codes = {"partition": torch.tensor([0, 0, 1]), "volume": torch.arange(3)}
    for strategy in ("lr", "ld"):
        assert torch.autograd.gradcheck(
            lambda x, y, s=strategy: local_contrastive(x, y, corners, strategy=s, temperature=0.5, **codes), (a, b)
        )


@given(
    n=st.integers(1, 5),
    size=st.integers(1, 3),
    strategy=st.sampled_from(["lr", "ld"]),
    explicit=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_order_of_items_and_regions_and_scale_do_not_matter(n, size, strategy, explicit, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = randn(n, 2, 7, 6, seed=seed), randn(n, 2, 7, 6, seed=seed + 1)
    codes = torch.randint(0, 3, (2, n), generator=rng)
    corners = region_corners((7, 6), size)
    negatives = nearest_negatives(corners, 3) if explicit else None

    def loss(x, y, corners, negatives, codes):
        return local_contrastive(
            x, y, corners, region_size=size, negatives=negatives, strategy=strategy, partition=codes[0], volume=codes[1]
        )

    value = loss(a, b, corners, negatives, codes)
    items, regions = torch.randperm(n, generator=rng), torch.randperm(len(corners), generator=rng)
    shuffled = negatives[regions].flip(1) if explicit else None
    changed = loss(5 * a[items], 0.2 * b[items], corners[regions], shuffled, codes[:, items])
    assert_close(changed, value, rtol=1e-9, atol=1e-9)
    written_out = loss(a, b, corners, all_others(corners), codes)
    assert_close(written_out, loss(a, b, corners, None, codes), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["lr", "ld"])
def test_result_under_autocast_is_the_float32_result(dtype, strategy):
    a, b = randn(4, 4, 9, 9, seed=1).to(dtype), randn(4, 4, 9, 9, seed=2).to(dtype)
    corners = region_corners((9, 9), 3)
    codes = {"strategy": strategy, "partition": torch.arange(4) % 2, "volume": torch.arange(4) // 2}
    with torch.autocast("cpu", dtype=dtype):
        value = local_contrastive(a, b, corners, **codes)
    assert value.dtype == torch.float32
    assert_close(value.double(), local_contrastive(a.double(), b.double(), corners, **codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["lr", "ld"])
def test_without_negatives_the_loss_is_zero_with_zero_gradient_and_says_so(strategy):
    codes = {"strategy": strategy, "partition": torch.zeros(2, dtype=torch.int64), "volume": torch.arange(2)}
    a, b, corner = randn(2, 2, 5, 5), randn(2, 2, 5, 5, seed=1), torch.tensor([[1, 1]])
    for negatives in (None, torch.zeros(1, 0, 2, dtype=torch.int64)):
        with pytest.warns(EmptyComparisonWarning, match="no region has negatives"):
            value, ga, gb = value_and_grad(
                lambda x, y, q=negatives: local_contrastive(x, y, corner, negatives=q, **codes), a, b
            )
        assert value == 0
        assert ga.abs().sum() == gb.abs().sum() == 0


@pytest.mark.parametrize("strategy", ["lr", "ld"])
def test_constant_zero_maps_are_finite_with_gradient_zero(strategy):
    codes = {"strategy": strategy, "partition": torch.tensor([0, 0, 1]), "volume": torch.arange(3)}
    a, b = randn(3, 2, 6, 6), randn(3, 2, 6, 6, seed=1)
    a[1] = 0
    value, ga, gb = value_and_grad(lambda x, y: local_contrastive(x, y, region_corners((6, 6), 3), **codes), a, b)
    assert torch.isfinite(value)
    assert torch.isfinite(ga).all()
    assert torch.isfinite(gb).all()
    assert ga[1].abs().sum() == 0
    assert ga[0].abs().sum() > 0


def test_region_corners_are_the_papers_13_and_35_in_3d():
    m, h, q, t = 44, 22, 11, 33
    grid = [[0, 0], [0, h], [0, m], [h, 0], [h, h], [h, m], [m, 0], [m, h], [m, m]]
    assert region_corners((48, 48), 3).tolist() == [*grid, [q, q], [q, t], [t, q], [t, t]]
    assert region_corners((48, 48), 1).amax() == 47
    assert len(region_corners((48, 40, 12), 3)) == 35
    assert len(region_corners((12, 12, 3), 3)) == 9 + 4  # nothing to choose along the last axis


@given(spatial=st.lists(st.integers(3, 20), min_size=2, max_size=3), size=st.integers(1, 3))
def test_region_corners_are_distinct_and_inside(spatial, size):
    corners = region_corners(spatial, size)
    assert len({*map(tuple, corners.tolist())}) == len(corners)
    assert (corners >= 0).all()
    assert (corners + size <= torch.tensor(spatial)).all()


def test_nearest_negatives_are_the_nearest_other_corners():
    corners = torch.tensor([[0, 0], [0, 3], [4, 0], [9, 9]])
    assert nearest_negatives(corners, 2).tolist() == [
        [[0, 3], [4, 0]],
        [[0, 0], [4, 0]],
        [[0, 0], [0, 3]],
        [[4, 0], [0, 3]],
    ]
    with pytest.raises(InputError, match="choose n from 1 to 3"):
        nearest_negatives(corners, 4)


def test_wrong_inputs_are_refused_with_a_remedy():
    a, corners = randn(2, 2, 6, 6), region_corners((6, 6), 3)
    with pytest.raises(ShapeError, match="one shape"):
        local_contrastive(a, a[:1], corners)
    with pytest.raises(ShapeError, match="corners must be"):
        local_contrastive(a, a, torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="negatives must be"):
        local_contrastive(a, a, corners, negatives=corners)
    with pytest.raises(InputError, match="outside the feature map"):
        local_contrastive(a, a, corners + 4)
    with pytest.raises(InputError, match="integer voxel"):
        local_contrastive(a, a, corners.float())
    with pytest.raises(ShapeError, match="needs `partition`"):
        local_contrastive(a, a, corners, strategy="ld")
    with pytest.raises(InputError, match="not known"):
        local_contrastive(a, a, corners, strategy="lx")
    with pytest.raises(ShapeError, match=r"\(N, C, X, Y\)"):
        local_contrastive(a[0], a[0], corners)
    with pytest.raises(ShapeError, match="as long as a region"):
        region_corners((8, 2), 3)
