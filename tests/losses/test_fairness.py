"""fair_kl and end against loops written from their formulas, and their laws."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import cosine, permutation, rand, randn, value_and_grad
from torch import Tensor
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, end, fair_kl, label_kernel
from medssl.losses.fairness import _gap

pytestmark = pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")

BIAS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0])
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1])
each_mode = pytest.mark.parametrize("mode", ["kl", "moments"])


def loop_gap(z: Tensor, bias: Tensor, weights: Tensor, mode: str) -> Tensor:
    moments = []
    for aligned in (True, False):
        pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j and (bias[i] == bias[j]) == aligned]
        w = [weights[i, j] for i, j in pairs]
        if not pairs or sum(w) == 0 or (sum(w) / 2) ** 2 / (sum(v * v for v in w) / 2) < 2 - 1e-9:
            return z.sum() * 0
        s = [cosine(z[i], z[j]) for i, j in pairs]
        mean = sum(v * x for v, x in zip(w, s)) / sum(w)
        moments.append((mean, sum(v * (x - mean) ** 2 for v, x in zip(w, s)) / sum(w)))
    (m_a, v_a), (m_c, v_c) = ((m, torch.clamp(v, min=1e-8)) for m, v in moments)
    if mode == "moments":
        return (m_a - m_c) ** 2 + (v_a.sqrt() - v_c.sqrt()) ** 2
    return ((v_a + (m_a - m_c) ** 2) / v_c - torch.log(v_a / v_c) - 1) / 2


def loop_end(z: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    pairs = list(itertools.combinations(range(len(z)), 2))
    aligned = [(i, j) for i, j in pairs if bias[i] == bias[j]]
    conflicting = [(i, j) for i, j in pairs if bias[i] != bias[j] and labels[i] == labels[j]]
    values = set(bias.tolist())
    sums = [sum(cosine(z[i], z[j]) for i, j in aligned if bias[i] == b) for b in values]
    nothing = z.sum() * 0
    perpendicular = nothing + sum(abs(s) for s in sums) / max(len(aligned), 1)
    mean = sum((1 + cosine(z[i], z[j])) / 2 for i, j in conflicting) / max(len(conflicting), 1)
    return perpendicular, (1 - mean + nothing if conflicting else nothing)


def both(terms) -> Tensor:
    """A scalar whose gradient tells the two terms apart."""
    first, second = vars(terms).values()
    return first + 3 * second


@each_mode
@pytest.mark.parametrize("positives", ["all", "labels", "weights"])
def test_fair_kl_value_and_gradient_equal_the_loop(mode, positives):
    z, n = randn(len(BIAS), 4, seed=1), len(BIAS)
    given_ = {"labels": LABELS} if positives == "labels" else {}
    weights = (LABELS[:, None] == LABELS).double()
    if positives == "weights":
        weights = label_kernel(rand(n, seed=2) * 20, sigma=5.0)
        given_ = {"weights": weights}
    elif positives == "all":
        weights = torch.ones(n, n, dtype=torch.float64)
    got = value_and_grad(lambda x: both(fair_kl(x, BIAS, mode=mode, **given_)), z)
    expected = value_and_grad(lambda x: loop_gap(x, BIAS, weights, mode) + 3 * loop_gap(x, BIAS, 1 - weights, mode), z)
    for one, other in zip(got, expected):
        assert_close(one, other, rtol=1e-9, atol=1e-11)
    if positives == "all":
        assert fair_kl(z, BIAS, mode=mode).negative == 0


def test_end_value_and_gradient_equal_the_loop():
    z = randn(len(BIAS), 4, seed=3)
    got = value_and_grad(lambda x: both(end(x, BIAS, LABELS)), z)
    perpendicular, parallel = loop_end(z, BIAS, LABELS)
    expected = value_and_grad(lambda x: loop_end(x, BIAS, LABELS)[0] + 3 * loop_end(x, BIAS, LABELS)[1], z)
    for one, other in zip(got, expected):
        assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert_close(end(z, BIAS, LABELS).perpendicular, perpendicular)
    assert_close(end(z, BIAS, LABELS).parallel, parallel)


def test_gradcheck():
    z = randn(9, 3, seed=4).requires_grad_()
    for mode in ("kl", "moments"):
        assert torch.autograd.gradcheck(lambda x, m=mode: both(fair_kl(x, BIAS, labels=LABELS, mode=m)), (z,))
    assert torch.autograd.gradcheck(lambda x: both(end(x, BIAS, LABELS)), (z,))


@each_mode
def test_fair_kl_is_zero_when_groups_match(mode):
    similarity = randn(8, 8, seed=5)
    aligned = torch.zeros(8, 8, dtype=torch.bool)
    aligned[:4, :4] = aligned[4:, 4:] = True
    block, off = similarity[:4, :4].clone(), ~torch.eye(4, dtype=torch.bool)
    conflicting = torch.zeros(4, 4, dtype=torch.float64)
    conflicting[off] = block[off]
    # Every value of the aligned pairs once more among the conflicting ones; the diagonals are left out of both sides.
    weights = torch.ones(8, 8, dtype=torch.float64)
    weights[:4, 4:] = weights[4:, :4] = off.double()
    full = torch.cat([torch.cat([block, conflicting], 1), torch.cat([conflicting, block], 1)])
    assert abs(_gap(full, aligned, weights, mode)) < 1e-12
    assert _gap(full + 0.3 * (~aligned), aligned, weights, mode) > 1e-3


@settings(max_examples=25)
@given(scale=st.floats(0.1, 10), negative=st.booleans(), shift=st.floats(-5, 5), seed=st.integers(0, 2**31 - 1))
def test_kl_is_invariant_to_affine_maps_of_the_similarities(scale, negative, shift, seed):
    """So that cosines, 1 - cosines and squared distances give the same number."""
    similarity, aligned = randn(9, 9, seed=seed), BIAS[:, None] == BIAS
    moved = (-scale if negative else scale) * similarity + shift
    value = _gap(similarity, aligned, None, "kl")
    assert_close(_gap(moved, aligned, None, "kl"), value, rtol=1e-7, atol=1e-9)
    assert _gap(2 * similarity, aligned, None, "moments") != _gap(similarity, aligned, None, "moments")


def test_deviations_count_not_means_alone():
    """Equal means with another spread: what EnD cannot see."""
    similarity, aligned = randn(40, 40, seed=6), torch.arange(40)[:, None] % 2 == torch.arange(40) % 2
    similarity = torch.where(aligned, similarity, 3 * similarity)
    assert _gap(similarity, aligned, None, "kl") > 0.3
    assert _gap(similarity, aligned, None, "moments") > 2


@settings(max_examples=25)
@given(
    codes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9),
    seed=st.integers(0, 2**31 - 1),
)
def test_order_scale_and_names_of_codes_do_not_matter(codes, seed):
    (bias, labels), order = torch.tensor(codes).T, permutation(len(codes), seed)
    z = randn(len(codes), 4, seed=seed)
    for loss in (
        lambda x, b, y: both(fair_kl(x, b, labels=y)),
        lambda x, b, y: both(fair_kl(x, b, labels=y, mode="moments")),
        lambda x, b, y: both(end(x, b, y)),
    ):
        value = loss(z, bias, labels)
        assert torch.isfinite(value)
        assert_close(loss(z[order], bias[order], labels[order]), value, rtol=1e-7, atol=1e-9)
        assert_close(loss(5 * z, 4 - bias, labels.double() / 3), value, rtol=1e-7, atol=1e-9)


def test_weights_of_equality_are_labels():
    z, weights = randn(9, 4), label_kernel(LABELS, sigma=None, kind="equal")
    by_weights, by_labels = fair_kl(z, BIAS, weights=weights), fair_kl(z, BIAS, labels=LABELS)
    assert_close(by_weights.positive, by_labels.positive)
    assert_close(by_weights.negative, by_labels.negative)


@each_mode
@pytest.mark.parametrize(
    ("bias", "labels", "zero"),
    [
        ([0, 0, 0, 0], None, ["positive", "negative"]),  # no conflicting pair
        ([0, 1, 2, 3], None, ["positive", "negative"]),  # no aligned pair
        ([0, 0, 1], None, ["positive", "negative"]),  # one aligned pair
        ([0, 0, 1, 1], [0, 0, 0, 1], ["positive", "negative"]),  # one aligned pair among positives, one among negatives
        ([0], None, ["positive", "negative"]),
    ],
)
def test_fewer_than_two_pairs_give_zero_with_zero_gradient_and_say_so(mode, bias, labels, zero):
    labels = None if labels is None else torch.tensor(labels)
    with pytest.warns(EmptyComparisonWarning, match="fewer than two"):
        value, grad = value_and_grad(
            lambda x: both(fair_kl(x, torch.tensor(bias), labels=labels, mode=mode)), randn(len(bias), 3)
        )
    assert value == 0
    assert grad.abs().sum() == 0


@each_mode
@pytest.mark.parametrize(
    ("bias", "labels"), [([0, 0, 1, 1], None), ([0, 0, 1, 1], [0, 0, 0, 0]), ([0, 1], [0, 1]), ([0], None)]
)
def test_each_term_alone_can_be_trained_on(mode, bias, labels):
    labels = None if labels is None else torch.tensor(labels)
    for name in ("positive", "negative"):
        z = randn(len(bias), 3).requires_grad_()
        term = getattr(fair_kl(z, torch.tensor(bias), labels=labels, mode=mode), name)
        term.backward()
        assert torch.isfinite(z.grad).all()
        if term == 0:
            assert z.grad.abs().sum() == 0


def test_two_unordered_pairs_are_enough_whatever_their_weight():
    z, bias = randn(4, 3), torch.tensor([0, 0, 1, 1])
    for weight in (1.0, 0.3, 1e-3):
        assert fair_kl(z, bias, weights=torch.full((4, 4), weight)).positive > 0
    lopsided = torch.full((4, 4), 1e-3)
    lopsided[0, 1] = lopsided[1, 0] = 1.0  # two aligned pairs, one of which is all the weight
    assert fair_kl(z, bias, weights=lopsided).positive == 0


def test_end_without_pairs_is_zero_with_zero_gradient():
    for bias, labels in (([0, 1, 2], [0, 1, 2]), ([0], [0])):
        with pytest.warns(EmptyComparisonWarning):
            value, grad = value_and_grad(
                lambda x, b=bias, y=labels: both(end(x, torch.tensor(b), torch.tensor(y))), randn(len(bias), 3)
            )
        assert value == 0
        assert grad.abs().sum() == 0
    only = end(randn(3, 3), torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0]))
    assert only.perpendicular > 0
    assert only.parallel == 0


def test_end_of_equal_and_of_orthogonal_embeddings():
    equal = end(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert_close(equal.perpendicular, torch.tensor(1.0))
    assert_close(equal.parallel, torch.tensor(0.0))
    apart = end(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert_close(apart.perpendicular, torch.tensor(0.0))
    assert_close(apart.parallel, torch.tensor(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_gives_the_float32_result(dtype):
    z = randn(9, 32).to(dtype)
    for loss in (lambda x: both(fair_kl(x, BIAS, labels=LABELS)), lambda x: both(end(x, BIAS, LABELS))):
        with torch.autocast("cpu", dtype=dtype):
            value, grad = value_and_grad(loss, z)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        assert_close(value.double(), loss(z.double()), rtol=1e-4, atol=1e-5)


@each_mode
def test_zero_equal_and_almost_equal_embeddings_stay_finite(mode):
    zero = randn(9, 4, dtype=torch.float32)
    zero[2] = 0
    for z in (zero, torch.ones(9, 4), 1 + 1e-3 * randn(9, 4, dtype=torch.float32)):
        for loss in (lambda x: both(fair_kl(x, BIAS, labels=LABELS, mode=mode)), lambda x: both(end(x, BIAS, LABELS))):
            value, grad = value_and_grad(loss, z)
            assert torch.isfinite(value)
            assert torch.isfinite(grad).all()
    _, grad = value_and_grad(lambda x: both(fair_kl(x, BIAS, labels=LABELS, mode=mode)), zero)
    assert grad[2].abs().sum() == 0


def test_wrong_inputs_are_refused():
    z = randn(9, 4)
    missing = BIAS.double()
    missing[[3, 5]] = math.nan
    with pytest.raises(ValueError, match=r"bias must be finite(.|\n)*rows 3, 5"):
        fair_kl(z, missing)
    with pytest.raises(ValueError, match=r"labels must be finite(.|\n)*rows 3, 5"):
        fair_kl(z, BIAS, labels=missing)
    with pytest.raises(ValueError, match=r"bias must be finite(.|\n)*rows 3, 5"):
        end(z, missing, LABELS)
    with pytest.raises(InputError, match="both"):
        fair_kl(z, BIAS, labels=LABELS, weights=torch.ones(9, 9))
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(InputError, match=r"weights must be"):
            fair_kl(z, BIAS, weights=torch.full((9, 9), bad))
    with pytest.raises(InputError, match="Did you mean `moments`"):
        fair_kl(z, BIAS, mode="moment")
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        end(z[:, None], BIAS, LABELS)
    with pytest.raises(ShapeError, match="one value per item"):
        end(z, BIAS[:4], LABELS)
