"""Decoupled contrast, contrast with a queue, BYOL, Barlow Twins and VICReg against loops, closed forms and laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import cosine, permutation, randn
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import (
    EmptyComparisonWarning,
    barlow_twins,
    byol,
    decoupled_contrastive,
    nt_xent,
    queue_info_nce,
    vicreg,
)

PAIRED = {
    "dcl": decoupled_contrastive,
    "dclw": lambda a, b: decoupled_contrastive(a, b, weight_sigma=0.5),
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "byol": lambda a, b: byol(a, b, b + 1, a - 1),
}
every_loss = pytest.mark.parametrize("name", PAIRED)


def loop_dcl(z1, z2, tau, sigma):
    n, directions = len(z1), []
    total = sum(torch.exp(cosine(z1[i], z2[i]) / sigma) for i in range(n)) if sigma else None
    for a, b in ((z1, z2), (z2, z1)):
        terms = []
        for i in range(n):
            weight = 2 - n * torch.exp(cosine(a[i], b[i]) / sigma) / total if sigma else 1
            others = [torch.exp(cosine(a[i], other[j]) / tau) for j in range(n) if j != i for other in (a, b)]
            terms.append(-weight * cosine(a[i], b[i]) / tau + torch.log(sum(others)))
        directions.append(sum(terms) / n)
    return sum(directions) / 2


def loop_queue(query, key, queue, tau, mask):
    terms = []
    for i in range(len(query)):
        positive = torch.exp(cosine(query[i], key[i].detach()) / tau)
        negatives = [torch.exp(cosine(query[i], row) / tau) for row, may in zip(queue, mask[i]) if may]
        terms.append(-torch.log(positive / (positive + sum(negatives))))
    return sum(terms) / len(terms)


def loop_byol(p1, p2, t1, t2):
    terms = [4 - 2 * cosine(p1[i], t2[i].detach()) - 2 * cosine(p2[i], t1[i].detach()) for i in range(len(p1))]
    return sum(terms) / len(p1)


def loop_barlow(z1, z2, lamb):
    n, d = z1.shape

    def standard(z, j):
        mean = sum(z[:, j]) / n
        return (z[:, j] - mean) / torch.sqrt(sum((z[:, j] - mean) ** 2) / n + 1e-5)

    loss = 0
    for i in range(d):
        for j in range(d):
            c = sum(standard(z1, i) * standard(z2, j)) / n
            loss = loss + ((c - 1) ** 2 if i == j else lamb * c**2)
    return loss


def loop_vicreg(z1, z2, weights):
    n, d = z1.shape
    loss = weights[0] * sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    for z in (z1, z2):
        centred = z - sum(z) / n
        for i in range(d):
            for j in range(d):
                cov = sum(centred[:, i] * centred[:, j]) / (n - 1)
                if i == j:
                    loss = loss + weights[1] / 2 * torch.relu(1 - torch.sqrt(cov + 1e-4)) / d
                else:
                    loss = loss + weights[2] * cov**2 / d
    return loss


def same_value_and_grad(ours, loop, *inputs):
    results = []
    for loss in (ours, loop):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results):
        assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize(("n", "d", "tau"), [(2, 3, 0.5), (6, 4, 0.07)])
def test_decoupled_contrastive_equals_the_loop_and_its_weight_has_a_gradient(n, d, tau, sigma):
    z1, z2 = randn(n, d, seed=1), randn(n, d, seed=2)
    same_value_and_grad(
        lambda a, b: decoupled_contrastive(a, b, temperature=tau, weight_sigma=sigma),
        lambda a, b: loop_dcl(a, b, tau, sigma),
        z1,
        z2,
    )


def test_queue_info_nce_equals_the_loop_and_leaves_keys_and_queue_alone():
    query, key = randn(4, 5, seed=1), randn(4, 5, seed=2).requires_grad_()
    queue = torch.nn.functional.normalize(randn(7, 5, seed=3), dim=1).requires_grad_()
    mask = randn(4, 7, seed=4) > 0
    mask[2] = True
    same_value_and_grad(
        lambda q: queue_info_nce(q, key, queue, negative_mask=mask),
        lambda q: loop_queue(q, key, queue.detach(), 0.2, mask),
        query,
    )
    whole = torch.ones_like(mask)
    assert_close(queue_info_nce(query, key, queue), queue_info_nce(query, key, queue, negative_mask=whole))
    assert not queue_info_nce(query, key, queue).requires_grad


@pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")
def test_an_item_without_negatives_in_the_queue_counts_as_zero():
    query, key, queue = randn(3, 4, seed=1).requires_grad_(), randn(3, 4, seed=2), randn(5, 4, seed=3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    loss = queue_info_nce(query, key, queue, negative_mask=mask)
    kept = queue_info_nce(query[[0, 2]], key[[0, 2]], queue)
    assert_close(loss, kept * 2 / 3)
    loss.backward()
    assert bool(query.grad.isfinite().all())
    assert not bool(query.grad[1].any())
    assert float(queue_info_nce(query.detach(), key, queue, negative_mask=mask & False)) == 0
    with pytest.warns(EmptyComparisonWarning):
        queue_info_nce(query, key, queue, negative_mask=mask & False)


def test_byol_equals_the_loop_and_the_targets_get_no_gradient():
    p1, p2, t1, t2 = (randn(5, 3, seed=s) for s in range(4))
    same_value_and_grad(lambda a, b: byol(a, b, t1, t2), lambda a, b: loop_byol(a, b, t1, t2), p1, p2)
    t1.requires_grad_()
    byol(p1.requires_grad_(), p2, t1, t2).backward()
    assert t1.grad is None
    assert_close(byol(p1, p1, -p1, -p1), torch.tensor(8.0, dtype=torch.float64))
    assert float(byol(p1, p2, 3 * p2, p1)) < 1e-12  # crossed: p1 is compared with the target of view 2


@pytest.mark.parametrize(("n", "d"), [(3, 5), (7, 4), (4, 4)])  # through (N, N) and through (D, D)
def test_barlow_twins_and_vicreg_equal_the_loops(n, d):
    z1, z2 = randn(n, d, seed=1), 0.3 * randn(n, d, seed=2)
    same_value_and_grad(
        lambda a, b: barlow_twins(a, b, redundancy_weight=0.1), lambda a, b: loop_barlow(a, b, 0.1), z1, z2
    )
    weights = (2.0, 3.0, 0.5)
    same_value_and_grad(
        lambda a, b: vicreg(a, b, invariance_weight=2.0, variance_weight=3.0, covariance_weight=0.5),
        lambda a, b: loop_vicreg(a, b, weights),
        z1,
        z2,
    )


def test_equal_embeddings_give_the_closed_forms():
    z = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    assert float(decoupled_contrastive(z, z)) == pytest.approx(math.log(10))  # 2 (N - 1) negatives, and -1 / 0.1 + 10
    assert float(decoupled_contrastive(z, z, weight_sigma=0.5)) == pytest.approx(math.log(10))  # every weight is 1
    queue = torch.nn.functional.normalize(torch.ones(9, 4, dtype=torch.float64), dim=1)
    assert float(queue_info_nce(z, z, queue)) == pytest.approx(math.log(10))
    assert float(byol(z, z, z, z)) == pytest.approx(0, abs=1e-12)
    assert float(barlow_twins(z, z)) == pytest.approx(4)  # a constant dimension costs 1 ...
    assert float(vicreg(z, z)) == pytest.approx(25 * 0.99)
    barlow_twins(z, z).backward()
    assert not bool(z.grad.any())  # ... without gradient


def test_decorrelated_views_cost_barlow_twins_and_vicreg_nothing():
    sign = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert float(barlow_twins(100 * sign, 100 * sign)) == pytest.approx(0, abs=1e-12)
    assert float(vicreg(sign, sign)) == pytest.approx(0, abs=1e-12)


def test_dcl_is_nt_xent_without_the_positive_in_the_denominator():
    """NT-Xent of an anchor is softplus of what DCL gives it: with a positive that is far away, both agree."""
    z1 = randn(5, 8, seed=1)
    far = decoupled_contrastive(z1, -z1, temperature=0.05)
    assert_close(far, nt_xent(z1, -z1, temperature=0.05), rtol=1e-8, atol=0)
    near = z1 + 1e-3
    assert float(decoupled_contrastive(z1, near, temperature=0.05)) < 0 < float(nt_xent(z1, near, temperature=0.05))


@every_loss
@settings(max_examples=20)
@given(n=st.integers(2, 10), d=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_order_of_items_does_not_matter(name, n, d, seed):
    z1, z2 = randn(2, n, d, seed=seed)
    order = permutation(n, seed)
    assert_close(PAIRED[name](z1[order], z2[order]), PAIRED[name](z1, z2), rtol=1e-8, atol=1e-8)
    if name != "byol":
        assert_close(PAIRED[name](z2, z1), PAIRED[name](z1, z2), rtol=1e-8, atol=1e-8)


@every_loss
def test_gradcheck(name):
    z1, z2 = randn(4, 3, seed=4).requires_grad_(), randn(4, 3, seed=5).requires_grad_()
    if name == "byol":  # its targets get no gradient
        t1, t2 = randn(4, 3, seed=6), randn(4, 3, seed=7)
        assert torch.autograd.gradcheck(lambda a, b: byol(a, b, t1, t2), (z1, z2))
    else:
        assert torch.autograd.gradcheck(PAIRED[name], (z1, z2))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_zero_rows_stay_finite_in_float32(name, dtype):
    z1, z2 = randn(6, 8, seed=1).to(dtype), randn(6, 8, seed=2).to(dtype)
    z1[0], z2[1] = 0, 0
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = PAIRED[name](z1, z2)
    assert loss.dtype == torch.float32
    wide = PAIRED[name](z1.detach().float(), z2.detach().float())
    assert_close(loss.detach(), wide, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert bool(z1.grad.isfinite().all())
    assert bool(z2.grad.isfinite().all())


@pytest.mark.parametrize("name", ["dcl", "dclw", "barlow_twins", "vicreg"])
def test_a_batch_of_one_is_refused(name):
    with pytest.raises(InputError, match="batch of one"):
        PAIRED[name](randn(1, 4), randn(1, 4, seed=1))


def test_wrong_arguments_say_what_is_wrong():
    z = randn(3, 4)
    with pytest.raises(ShapeError, match="one shape"):
        barlow_twins(z, randn(3, 5))
    with pytest.raises(ShapeError, match="target2 must have one shape"):
        byol(z, z, z, randn(4, 4))
    with pytest.raises(ShapeError, match="equally long"):
        queue_info_nce(z, z, randn(8, 5))
    with pytest.raises(ShapeError, match=r"\(3, 8\)"):
        queue_info_nce(z, z, randn(8, 4), negative_mask=torch.ones(8, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="boolean"):
        queue_info_nce(z, z, randn(8, 4), negative_mask=torch.ones(3, 8))
    with pytest.raises(InputError, match="weight_sigma"):
        decoupled_contrastive(z, z, weight_sigma=0.0)
    with pytest.raises(InputError, match="temperature"):
        queue_info_nce(z, z, randn(8, 4), temperature=-1)
    with pytest.raises(InputError, match="covariance_weight"):
        vicreg(z, z, covariance_weight=-1.0)
