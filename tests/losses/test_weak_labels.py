"""label_kernel, y_aware, l_thr and l_exp against loops written from their formulas, and their laws."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_l_exp, loop_l_thr, loop_y_aware, permutation, rand, randn, value_and_grad
from torch.testing import assert_close

import medssl.losses.pairwise
from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, l_exp, l_thr, label_kernel, nt_xent, y_aware

pytestmark = pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")

TAU = 0.2
AGES = torch.tensor([20.0, 20.0, 31.0, 55.0, 54.0, 20.0], dtype=torch.float64)
EXP = [
    {"similarity": similarity, "positive_in_denominator": kept}
    for similarity in ("cosine", "neg_sqdist")
    for kept in (False, True)
]
LOSSES = {
    "y_aware": (y_aware, loop_y_aware),
    "l_thr all": (functools.partial(l_thr, normalizer="all"), functools.partial(loop_l_thr, normalizer="all")),
    "l_thr compared": (
        functools.partial(l_thr, normalizer="compared"),
        functools.partial(loop_l_thr, normalizer="compared"),
    ),
    **{
        "l_exp " + " ".join(map(str, chosen.values())): (
            functools.partial(l_exp, **chosen),
            functools.partial(loop_l_exp, **chosen),
        )
        for chosen in EXP
    },
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def asymmetric(n: int) -> torch.Tensor:
    """Weights that no kernel gives: not symmetric, a diagonal like any other, tied, one anchor without any."""
    weights = (rand(n, n, seed=8) * 6).round() / 4 + 0.25
    weights[1] = 0
    return weights


@each_loss
@pytest.mark.parametrize("shape", [(5, 2, 4), (4, 3, 3), (6, 1, 4)])
@pytest.mark.parametrize("kernel", ["rbf", "cauchy", "asymmetric"])
def test_value_and_gradient_equal_the_loop(name, shape, kernel):
    z, (ours, loop) = randn(*shape, seed=1), LOSSES[name]
    n = shape[0]
    weights = asymmetric(n) if kernel == "asymmetric" else label_kernel(AGES[:n], sigma=11.0, kind=kernel)
    got = value_and_grad(lambda x: ours(x, weights, temperature=TAU), z)
    expected = value_and_grad(lambda x: loop(x, weights, tau=TAU), z)
    for one, other in zip(got, expected):
        assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_loss
def test_chunks_of_anchors_add_up(name, monkeypatch):
    z, weights = randn(7, 2, 5), label_kernel(rand(7) * 40, sigma=5.0)
    whole = value_and_grad(lambda x: LOSSES[name][0](x, weights), z)
    monkeypatch.setattr(medssl.losses.pairwise, "CHUNK_CPU", 2 * 2 * 7 * 3)  # items 3 + 3 + 1
    for one, other in zip(value_and_grad(lambda x: LOSSES[name][0](x, weights), z), whole):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


@each_loss
def test_gradcheck(name):
    weights = label_kernel(AGES[:4], sigma=11.0)
    z = randn(4, 2, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, weights, temperature=0.5), (z,))


@settings(max_examples=25)
@given(
    ages=st.lists(st.integers(20, 26), min_size=2, max_size=9),
    name=st.sampled_from(list(LOSSES)),
    seed=st.integers(0, 2**31 - 1),
)
def test_order_of_items_and_views_and_scale_of_embeddings_do_not_matter(ages, name, seed):
    labels, order = torch.tensor(ages, dtype=torch.float64), permutation(len(ages), seed)
    z, loss = randn(len(ages), 2, 4, seed=seed), LOSSES[name][0]
    value = loss(z, label_kernel(labels, sigma=5.0))
    assert_close(loss(z[order], label_kernel(labels[order], sigma=5.0)), value, rtol=1e-9, atol=1e-9)
    assert_close(loss(3 * z.flip(1), label_kernel(labels, sigma=5.0)), value, rtol=1e-9, atol=1e-9)


def test_y_aware_with_a_vanishing_sigma_is_nt_xent_and_with_a_huge_one_uniform():
    z, ages = randn(6, 2, 5), torch.arange(6).double()
    weights = label_kernel(ages, sigma=1e-200)
    assert_close(weights, torch.eye(6, dtype=torch.float64))
    got = value_and_grad(lambda x: y_aware(x, weights), z)
    for one, other in zip(got, value_and_grad(lambda x: nt_xent(x[:, 0], x[:, 1]), z)):
        assert_close(one, other)
    assert_close(y_aware(z, label_kernel(ages, sigma=1e9)), y_aware(z, torch.ones(6, 6)))


def test_scaling_the_kernel_cancels_except_in_l_exp():
    z, weights = randn(6, 2, 5), label_kernel(AGES, sigma=5.0)
    for name in ("y_aware", "l_thr all", "l_thr compared"):
        assert_close(LOSSES[name][0](z, 0.25 * weights), LOSSES[name][0](z, weights))
    assert abs(l_exp(z, 0.25 * weights) - l_exp(z, weights)) > 0.1


def test_equal_embeddings_give_the_closed_forms():
    z, weights = torch.ones(5, 2, 3, dtype=torch.float64), label_kernel(torch.arange(5).double(), sigma=2.0)
    assert_close(y_aware(z, weights), torch.tensor(math.log(9), dtype=torch.float64))
    # Distances all 0: what is left of L^exp is the number of rows compared.
    assert_close(l_exp(z, weights, similarity="neg_sqdist"), torch.tensor(math.log(8), dtype=torch.float64))
    run = l_exp(z, weights, similarity="neg_sqdist", positive_in_denominator=True)
    assert_close(run, torch.tensor(math.log(9), dtype=torch.float64))


def test_the_two_similarities_of_l_exp_are_different_losses():
    z, weights = randn(6, 2, 5), label_kernel(AGES, sigma=5.0, kind="gaussian")
    assert abs(l_exp(z, weights) - l_exp(z, weights, similarity="neg_sqdist")) > 0.1


def test_ties_are_never_compared_in_l_thr():
    z = randn(3, 2, 4, seed=3)
    # Items 0 and 1 are equally old: for anchor 0 they tie, and only item 2 is below. The views of one item always tie.
    weights = label_kernel(torch.tensor([30.0, 30.0, 60.0], dtype=torch.float64), sigma=20.0)
    changed = z.clone()
    changed[1] = randn(2, 4, seed=9)  # a tie that was compared would now show in the gradient of anchor 0's terms

    def first_anchors_denominators(x):
        only = weights.clone()
        only[1:] = 0  # anchors 1 and 2 contribute 0
        only[0, 1] = weights[0, 1]
        return l_thr(x, only)

    got, other = (
        value_and_grad(first_anchors_denominators, z)[1],
        value_and_grad(first_anchors_denominators, changed)[1],
    )
    assert_close(got[2], other[2])
    assert got[2].abs().sum() > 0


@pytest.mark.parametrize("normalizer", ["all", "compared"])
def test_all_labels_equal_or_a_batch_of_one_leave_l_thr_nothing_to_compare(normalizer):
    for z, weights in ((randn(5, 2, 3), torch.ones(5, 5)), (randn(1, 2, 3), torch.ones(1, 1))):
        with pytest.warns(EmptyComparisonWarning, match="nothing to compare"):
            value, grad = value_and_grad(lambda x, w=weights: l_thr(x, w, normalizer=normalizer), z)
        assert value == 0
        assert grad.abs().sum() == 0


@each_loss
def test_a_batch_of_one_is_zero_where_nothing_is_compared(name):
    for views in (1, 2):
        with pytest.warns(EmptyComparisonWarning):
            value, grad = value_and_grad(lambda x: LOSSES[name][0](x, torch.ones(1, 1)), randn(1, views, 4))
        if name.endswith("True") and views == 2:
            assert value != 0  # the positive alone in its denominator, to the power 1 - w = 0: minus its similarity
        else:
            assert value == 0
            assert grad.abs().sum() == 0


@each_loss
def test_no_weights_at_all_give_zero_with_zero_gradient(name):
    value, grad = value_and_grad(lambda x: LOSSES[name][0](x, torch.zeros(4, 4)), randn(4, 2, 3))
    assert value == 0
    assert grad.abs().sum() == 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_gives_the_float32_result(name, dtype):
    z, weights = randn(8, 2, 32).to(dtype), label_kernel(rand(8).float() * 20, sigma=5.0)
    with torch.autocast("cpu", dtype=dtype):
        value, grad = value_and_grad(lambda x: LOSSES[name][0](x, weights), z)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    wide, wide_grad = value_and_grad(lambda x: LOSSES[name][0](x, weights.double()), z.double())
    assert_close(value.double(), wide, rtol=1e-4, atol=1e-5)
    assert (grad.double() - wide_grad).abs().max() < 2**-7 * wide_grad.abs().max()


@each_loss
@pytest.mark.parametrize("tau", [1e-3, 1e3])
def test_far_temperatures_and_collapsed_or_separated_batches_stay_exact(name, tau):
    weights = label_kernel(AGES, sigma=5.0)
    for z in (1 + 1e-4 * randn(6, 2, 8), torch.eye(6).double()[:, None].repeat(1, 2, 1), randn(6, 2, 8)):
        value, grad = value_and_grad(lambda x: LOSSES[name][0](x, weights, temperature=tau), z.float())
        wide, wide_grad = value_and_grad(lambda x: LOSSES[name][0](x, weights, temperature=tau), z)
        assert_close(value.double(), wide, rtol=1e-4, atol=2e-6 / tau)
        assert torch.isfinite(grad).all()
        # The printed divisor multiplies rounding by up to 1e8 here.
        if tau > 1 and name != "l_thr compared":
            assert (grad.double() - wide_grad).abs().max() <= 1e-4 * wide_grad.abs().max() + 1e-8


def test_l_exp_stays_exact_when_one_row_is_nearly_the_whole_denominator():
    """Taking e^s[k] out of a sum that it dominates would leave nothing of the rest in float32."""
    z = torch.zeros(4, 2, 8)
    z[:, :, 0] = 1
    z[2:, :, 0] = -1  # the anchor's own group is e^40 times more alike than the others
    z += 0.01 * randn(4, 2, 8, dtype=torch.float32)
    weights = torch.full((4, 4), 0.1) + 0.1 * torch.eye(4)
    loss = functools.partial(l_exp, temperature=0.05)
    value, grad = value_and_grad(lambda x: loss(x, weights), z[:, :1].contiguous())
    wide = value_and_grad(lambda x: loop_l_exp(x, weights.double(), 0.05, "cosine", False), z[:, :1].double())
    assert_close(value.double(), wide[0], rtol=1e-4, atol=1e-4)
    assert_close(grad.double(), wide[1], rtol=1e-3, atol=1e-4)


@each_loss
def test_embeddings_without_direction_have_gradient_zero(name):
    z, weights = randn(6, 2, 4), label_kernel(AGES, sigma=15.0)
    z[2, 1] = 0
    value, grad = value_and_grad(lambda x: LOSSES[name][0](x, weights), z)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert grad[2, 1].abs().sum() == 0
    assert grad[3, 1].abs().sum() > 0


@each_loss
def test_wrong_weights_are_refused_naming_their_rows(name):
    z, loss = randn(4, 2, 3), LOSSES[name][0]
    for bad, message in ((math.nan, "finite"), (math.inf, "finite"), (-0.5, "at least 0")):
        weights = torch.ones(4, 4)
        weights[2, 3] = bad
        with pytest.raises(InputError, match=rf"weights must be {message}(.|\n)*rows 2"):
            loss(z, weights)
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        loss(z, torch.ones(8, 8))
    with pytest.raises(ShapeError, match=r"\(N, V, D\)"):
        loss(z[:, 0], torch.ones(4, 4))
    with pytest.raises(InputError, match="temperature"):
        loss(z, torch.ones(4, 4), temperature=0.0)


def test_unknown_words_are_refused():
    z, weights = randn(4, 2, 3), torch.ones(4, 4)
    with pytest.raises(InputError, match="Did you mean `compared`"):
        l_thr(z, weights, normalizer="compare")
    with pytest.raises(InputError, match="Did you mean `neg_sqdist`"):
        l_exp(z, weights, similarity="sqdist")
    with pytest.raises(InputError, match="Did you mean `gaussian`"):
        label_kernel(AGES, sigma=1.0, kind="gausian")
    with pytest.raises(InputError, match="missing"):
        label_kernel(AGES, sigma=1.0, missing="skip")


def test_kernels_have_their_closed_forms():
    labels = torch.tensor([0.0, 3.0], dtype=torch.float64)
    expected = {"rbf": (1.0, math.exp(-9 / 8)), "cauchy": (1.0, 1 / 19), "equal": (1.0, 0.0)}
    expected["gaussian"] = (1 / (math.sqrt(2 * math.pi) * 2), math.exp(-9 / 8) / (math.sqrt(2 * math.pi) * 2))
    for kind, (same, apart) in expected.items():
        kernel = label_kernel(labels, sigma=2.0, kind=kind)
        assert_close(kernel, torch.tensor([[same, apart], [apart, same]], dtype=torch.float64))
    assert label_kernel(labels, sigma=1.0, kind="gaussian").max() == pytest.approx(0.3989, abs=1e-4)


def test_attributes_multiply_each_with_its_own_kind_and_sigma():
    labels = torch.stack([AGES, torch.tensor([0, 1, 0, 1, 0, 1]).double()], 1)
    kernel = label_kernel(labels, sigma=[5.0, None], kind=["rbf", "equal"])
    assert_close(kernel, label_kernel(AGES, sigma=5.0) * label_kernel(labels[:, 1], sigma=None, kind="equal"))
    assert_close(label_kernel(labels, sigma=5.0), label_kernel(AGES, sigma=5.0) * label_kernel(labels[:, 1], sigma=5.0))
    with pytest.raises(ShapeError, match="one per attribute"):
        label_kernel(labels, sigma=[1.0, 2.0, 3.0])


def test_missing_labels_raise_or_give_their_attribute_factor_one():
    labels = torch.tensor([[30.0, 0.0], [math.nan, 0.0], [50.0, math.nan]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"missing(.|\n)*rows 1, 2"):
        label_kernel(labels, sigma=5.0)
    kernel = label_kernel(labels, sigma=[5.0, 1.0], kind=["gaussian", "equal"], missing="ignore")
    top = 1 / (math.sqrt(2 * math.pi) * 5)
    expected = [[top, 1.0, top * math.exp(-8)], [1.0, 1.0, 1.0], [top * math.exp(-8), 1.0, top]]
    assert_close(kernel, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(InputError, match=r"infinite(.|\n)*rows 0"):
        label_kernel(torch.tensor([math.inf, 1.0]), sigma=5.0, missing="ignore")


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, None])
@pytest.mark.parametrize("kind", ["rbf", "gaussian", "cauchy"])
def test_a_sigma_that_is_not_positive_is_refused(sigma, kind):
    with pytest.raises(InputError, match="sigma of kind"):
        label_kernel(AGES, sigma=sigma, kind=kind)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_kernels_are_in_the_labels_dtype_or_float32(dtype, expected):
    labels = torch.tensor([1, 0, 1]).to(dtype)
    kernel = label_kernel(labels, sigma=1.0)
    assert kernel.dtype == expected
    assert_close(kernel.double(), label_kernel(torch.tensor([1.0, 0.0, 1.0]).double(), sigma=1.0))


def test_codes_above_2_to_the_24_stay_apart():
    codes = torch.tensor([2**24, 2**24 + 1])
    assert label_kernel(codes, sigma=None, kind="equal")[0, 1] == 0


@pytest.mark.parametrize("kind_of_number", [int, np.float32, np.int64, torch.tensor, lambda x: torch.tensor([x])])
def test_sigma_may_be_any_number(kind_of_number):
    labels = torch.tensor([20.0, 24.0, 31.0])
    assert_close(label_kernel(labels, sigma=kind_of_number(5)), label_kernel(labels, sigma=5.0), rtol=0, atol=0)
    both = torch.stack([labels, labels.flip(0)], dim=1)
    assert_close(
        label_kernel(both, sigma=torch.tensor([5.0, 2.0])), label_kernel(both, sigma=(5.0, 2.0)), rtol=0, atol=0
    )
