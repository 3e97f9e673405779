"""sup_con and sup_info_nce against loops written from their formulas, and their laws."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_supervised, permutation, randn, value_and_grad
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, label_kernel, nt_xent, sup_con, sup_info_nce, y_aware

pytestmark = pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")

LOSSES = {
    "con": sup_con,
    "out": functools.partial(sup_info_nce, form="out"),
    "in": functools.partial(sup_info_nce, form="in"),
}
each_loss = pytest.mark.parametrize("kind", LOSSES)
BATCHES = {
    "classes": [0, 0, 1, 2, 1, 3],
    "all equal": [4, 4, 4, 4],
    "all apart": [0, 1, 2, 3],
    "floats": [0.5, 2.5, 0.5, 0.25],
}


@each_loss
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("epsilon", [0.0, 0.25, -0.5])
def test_value_and_gradient_equal_the_loop(kind, views, batch, epsilon):
    labels = BATCHES[batch]
    z = randn(len(labels), views, 4, seed=2)
    got = value_and_grad(lambda x: LOSSES[kind](x, torch.tensor(labels), temperature=0.2, epsilon=epsilon), z)
    for one, other in zip(got, value_and_grad(lambda x: loop_supervised(x, labels, 0.2, epsilon, kind), z)):
        assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_loss
def test_gradcheck(kind):
    z = randn(5, 2, 3, seed=5).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: LOSSES[kind](x, labels, temperature=0.5, epsilon=0.3), (z,))


def test_a_label_for_every_item_gives_nt_xent():
    z, labels = randn(6, 2, 5), torch.arange(6)
    expected = value_and_grad(lambda x: nt_xent(x[:, 0], x[:, 1]), z)
    for loss in LOSSES.values():
        for one, other in zip(value_and_grad(lambda x, f=loss: f(x, labels), z), expected):
            assert_close(one, other)


def test_epsilon_zero_is_y_aware_with_the_kernel_of_equality():
    z, labels = randn(6, 2, 5), torch.tensor([0, 0, 1, 2, 1, 3])
    assert_close(sup_con(z, labels), y_aware(z, label_kernel(labels, sigma=None, kind="equal")))


def test_a_large_epsilon_takes_the_positives_out_of_the_denominator():
    z, labels = randn(6, 2, 5), torch.tensor([0, 0, 1, 1, 2, 2])
    far, farther = (sup_info_nce(z, labels, epsilon=epsilon) for epsilon in (60.0, 80.0))
    assert_close(far, farther)
    assert_close(sup_con(z, labels, epsilon=60.0), far)  # then both have negatives alone there


def test_epsilon_acts_on_logits_not_on_cosines():
    """e^-epsilon multiplies the positive, whatever the temperature."""
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    for tau in (0.1, 1.0):
        value = sup_info_nce(z, torch.tensor([0, 0, 1]), temperature=tau, epsilon=0.5)
        expected = 2 / 3 * -math.log(math.exp(1 / tau) / (math.exp(1 / tau - 0.5) + 1))
        assert value.item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    kind=st.sampled_from(list(LOSSES)),
    seed=st.integers(0, 2**31 - 1),
)
def test_order_scale_and_names_of_labels_do_not_matter(labels, kind, seed):
    codes, z, order = torch.tensor(labels), randn(len(labels), 2, 4, seed=seed), permutation(len(labels), seed)
    value = LOSSES[kind](z, codes, epsilon=0.25)
    for other in (
        LOSSES[kind](z[order], codes[order], epsilon=0.25),
        LOSSES[kind](2 * z.flip(1), 5 - 7 * codes, epsilon=0.25),
        LOSSES[kind](z, codes.double() / 3, epsilon=0.25),
    ):
        assert_close(other, value, rtol=1e-9, atol=1e-9)


@each_loss
def test_without_a_positive_in_the_batch_the_loss_is_zero_and_says_so(kind):
    with pytest.warns(EmptyComparisonWarning, match="no anchor has a positive"):
        value, grad = value_and_grad(lambda x: LOSSES[kind](x, torch.arange(4), epsilon=0.5), randn(4, 1, 3))
    assert value == 0
    assert grad.abs().sum() == 0


@each_loss
def test_a_batch_of_one_item(kind):
    for views in (1, 2):
        value, grad = value_and_grad(lambda x: LOSSES[kind](x, torch.tensor([3])), randn(1, views, 4))
        assert value == 0
        assert grad.abs().sum() == 0


def test_without_negatives_the_constants_of_the_formulas_are_left():
    z, labels = randn(4, 2, 3), torch.ones(4)
    with pytest.warns(EmptyComparisonWarning, match="no negatives"):
        value, grad = value_and_grad(lambda x: sup_info_nce(x, labels, temperature=0.07, epsilon=0.25), z)
    assert value.item() == pytest.approx(-0.25)
    assert grad.abs().max() < 1e-12
    value, grad = value_and_grad(lambda x: sup_info_nce(x, labels, epsilon=0.25, form="in"), z)
    assert value.item() == pytest.approx(-0.25 - math.log(7))
    assert grad.abs().max() < 1e-12


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_gives_the_float32_result(kind, dtype):
    z, labels = randn(8, 2, 32).to(dtype), torch.arange(8) % 3
    with torch.autocast("cpu", dtype=dtype):
        value, grad = value_and_grad(lambda x: LOSSES[kind](x, labels, temperature=0.07, epsilon=0.25), z)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    wide, wide_grad = value_and_grad(lambda x: LOSSES[kind](x, labels, temperature=0.07, epsilon=0.25), z.double())
    assert_close(value.double(), wide, rtol=1e-4, atol=1e-5)
    assert (grad.double() - wide_grad).abs().max() < 2**-7 * wide_grad.abs().max()


@each_loss
def test_embeddings_without_direction_have_gradient_zero(kind):
    z, labels = randn(6, 2, 4), torch.arange(6) % 3
    z[2, 1] = 0
    value, grad = value_and_grad(lambda x: LOSSES[kind](x, labels), z)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert grad[2, 1].abs().sum() == 0
    assert grad[3, 1].abs().sum() > 0


@each_loss
def test_wrong_inputs_are_refused(kind):
    z, labels, loss = randn(4, 2, 3), torch.arange(4), LOSSES[kind]
    with pytest.raises(ValueError, match=r"labels must be finite(.|\n)*rows 1, 3"):
        loss(z, torch.tensor([0.0, math.nan, 0.0, math.nan]))
    with pytest.raises(ShapeError, match=r"one value per item, \(4,\)"):
        loss(z, labels[:3])
    with pytest.raises(ShapeError, match=r"\(N, V, D\)"):
        loss(z[:, 0], labels)
    with pytest.raises(InputError, match="temperature"):
        loss(z, labels, temperature=-1.0)
    with pytest.raises(InputError, match="epsilon"):
        loss(z, labels, epsilon=math.nan)
    with pytest.raises(InputError, match="floating"):
        loss(torch.ones(4, 2, 3, dtype=torch.int64), labels)
    with pytest.raises(InputError, match="form `mean` is not known"):
        sup_info_nce(z, labels, form="mean")
