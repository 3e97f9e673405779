"""alignment, uniformity and decoupled_uniformity against loops written from their formulas, and their laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import permutation, rand, randn, value_and_grad
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import alignment, decoupled_uniformity, label_kernel, uniformity


def loop_uniformity(rows: Tensor, t: float) -> Tensor:
    n = len(rows)
    terms = [torch.exp(-t * (rows[i] - rows[j]).square().sum()) for i in range(n) for j in range(n) if i != j]
    return torch.log(sum(terms) / len(terms))


def loop_decoupled(z: Tensor, t: float, kernel: Tensor | None = None, regularization: float = 0.01) -> Tensor:
    centroids = torch.stack([sum(view / view.norm() for view in item) / len(item) for item in z])
    if kernel is not None:
        weights = torch.linalg.inv(kernel + regularization * torch.eye(len(z), dtype=kernel.dtype)) @ kernel
        centroids = torch.stack([sum(w * c for w, c in zip(row, centroids)) for row in weights])
    return loop_uniformity(centroids, t)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_value_and_gradient_equal_the_loop(alpha):
    x, y = randn(5, 4, seed=1), randn(5, 4, seed=2)
    got = value_and_grad(lambda a: alignment(a, y, alpha=alpha), x)
    expected = value_and_grad(lambda a: sum((p - q).norm() ** alpha for p, q in zip(a, y)) / 5, x)
    for one, other in zip(got, expected):
        assert_close(one, other)
    value, grad = value_and_grad(lambda a: alignment(a, x, alpha=alpha), x)
    assert value == 0
    assert grad.abs().sum() == 0


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_value_and_gradient_equal_the_loop(t):
    x = normalize(randn(6, 4), dim=1)
    got = value_and_grad(lambda a: uniformity(a, t=t), x)
    for one, other in zip(got, value_and_grad(lambda a: loop_uniformity(a, t), x)):
        assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("kind", [None, "rbf", "rank one"])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_decoupled_uniformity_value_and_gradient_equal_the_loop(views, kind, t):
    z = randn(6, views, 4, seed=3)
    kernel = {None: None, "rbf": label_kernel(rand(6) * 20, sigma=5.0), "rank one": torch.ones(6, 6).double()}[kind]
    for regularization in (0.01, 1.0):
        got = value_and_grad(
            lambda x, r=regularization: decoupled_uniformity(x, t=t, prior_kernel=kernel, regularization=r), z
        )
        expected = value_and_grad(lambda x, r=regularization: loop_decoupled(x, t, kernel, r), z)
        for one, other in zip(got, expected):
            assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradient_identity_of_decoupled_uniformity():
    """dL / d mu_k = 4 t (sum_j w_kj mu_j - w_k mu_k), w the normalised potentials over ordered pairs."""
    t, u = 1.5, normalize(randn(7, 1, 5), dim=2)
    _, grad = value_and_grad(lambda x: decoupled_uniformity(x, t=t), u)
    mu = u[:, 0]
    w = torch.exp(-t * torch.cdist(mu, mu).square()).fill_diagonal_(0)
    w = w / w.sum()
    of_mu = 4 * t * (w @ mu - w.sum(1, keepdim=True) * mu)
    through_normalising = of_mu - (of_mu * mu).sum(1, keepdim=True) * mu
    assert_close(grad[:, 0], through_normalising, rtol=1e-9, atol=1e-12)
    _, grad = value_and_grad(lambda x: uniformity(x, t=t), mu)
    assert_close(grad, of_mu, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    z, kernel = randn(5, 2, 3).requires_grad_(), label_kernel(rand(5) * 20, sigma=5.0)
    assert torch.autograd.gradcheck(lambda x: decoupled_uniformity(x, prior_kernel=kernel), (z,))


@settings(max_examples=25)
@given(n=st.integers(2, 9), seed=st.integers(0, 2**31 - 1))
def test_order_of_items_and_views_and_scale_do_not_matter(n, seed):
    z, prior, order = randn(n, 2, 4, seed=seed), rand(n, seed=seed) * 30, permutation(n, seed)
    kernel = label_kernel(prior, sigma=5.0)
    value = decoupled_uniformity(z, prior_kernel=kernel)
    assert value <= 1e-12
    for other in (
        decoupled_uniformity(z[order], prior_kernel=kernel[order][:, order]),
        decoupled_uniformity(7 * z.flip(1), prior_kernel=kernel),
    ):
        assert_close(other, value, rtol=1e-8, atol=1e-8)


def test_an_identity_kernel_shrinks_the_centroids_and_a_vanishing_regularization_leaves_them():
    z, identity = randn(6, 2, 5), torch.eye(6).double()
    shrunk = decoupled_uniformity(z, t=2.0, prior_kernel=identity, regularization=1.0)
    assert_close(shrunk, decoupled_uniformity(z, t=0.5))  # centroids / 2
    near = decoupled_uniformity(z, prior_kernel=identity, regularization=1e-9)
    assert_close(near, decoupled_uniformity(z), rtol=1e-7, atol=1e-7)


def test_opposite_views_leave_equal_centroids_with_gradient_zero():
    z = torch.stack([normalize(randn(5, 4), dim=1), -normalize(randn(5, 4), dim=1)], 1)
    value, grad = value_and_grad(decoupled_uniformity, z)
    assert abs(value) < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_gives_the_float32_result(dtype):
    z, kernel = randn(8, 2, 16).to(dtype), label_kernel(rand(8) * 20, sigma=5.0)
    losses = {
        lambda x, k: decoupled_uniformity(x, prior_kernel=k),
        lambda x, k: decoupled_uniformity(x),
        lambda x, k: uniformity(x[:, 0]),
        lambda x, k: alignment(x[:, 0], x[:, 1], alpha=1.0),
    }
    for loss in losses:
        with torch.autocast("cpu", dtype=dtype):
            value, grad = value_and_grad(lambda x, f=loss: f(x, kernel.float()), z)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        assert torch.isfinite(grad).all()
        assert_close(value.double(), loss(z.double(), kernel), rtol=1e-4, atol=1e-5)


def test_embeddings_without_direction_have_gradient_zero():
    z, kernel = randn(6, 2, 4, dtype=torch.float32), label_kernel(rand(6) * 20, sigma=5.0)
    z[2, 1] = 0
    for given_ in (None, kernel):
        value, grad = value_and_grad(lambda x, k=given_: decoupled_uniformity(x, prior_kernel=k), z)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert grad[2, 1].abs().sum() == 0
        assert grad[3, 1].abs().sum() > 0


def test_wrong_inputs_are_refused():
    z, kernel = randn(4, 2, 3), torch.eye(4)
    with pytest.raises(InputError, match="at least two"):
        decoupled_uniformity(z[:1])
    with pytest.raises(InputError, match="at least two"):
        uniformity(z[:1, 0])
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="t must be"):
            uniformity(z[:, 0], t=value)
        with pytest.raises(InputError, match="t must be"):
            decoupled_uniformity(z, t=value)
        with pytest.raises(InputError, match="alpha must be"):
            alignment(z[:, 0], z[:, 1], alpha=value)
        with pytest.raises(InputError, match="regularization must be"):
            decoupled_uniformity(z, prior_kernel=kernel, regularization=value)
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        decoupled_uniformity(z, prior_kernel=torch.eye(8))
    with pytest.raises(ShapeError, match="one shape"):
        alignment(z[:, 0], z[:3, 0])
    lopsided = kernel.clone()
    lopsided[0, 1] = 0.5
    with pytest.raises(InputError, match="symmetric"):
        decoupled_uniformity(z, prior_kernel=lopsided)
    broken = kernel.clone()
    broken[2, 2] = math.nan
    with pytest.raises(InputError, match=r"finite(.|\n)*rows 2"):
        decoupled_uniformity(z, prior_kernel=broken)


def test_a_matrix_that_is_no_kernel_is_refused_with_its_likely_cause():
    missing = torch.tensor([0.0, math.nan, 100.0])
    with pytest.raises(InputError, match=r"positive semidefinite(.|\n)*missing labels"):
        decoupled_uniformity(randn(3, 2, 3), prior_kernel=label_kernel(missing, sigma=5.0, missing="ignore"))
