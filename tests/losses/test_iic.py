"""Invariant information clustering against loops written from the formulas in float64."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import permutation, rand, randn, value_and_grad
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, iic, iic_segmentation
from medssl.losses.iic import joint_loss, segmentation_joints

EPS = 2.220446049250313e-16


def loop_information(joint: Tensor, lamb: float) -> Tensor:
    k = len(joint)
    joint = (joint + joint.T) / 2
    joint = joint / joint.sum()
    rows = [sum(joint[c, d] for d in range(k)) for c in range(k)]
    loss = 0.0
    for c, d in product(range(k), repeat=2):
        p = torch.clamp(joint[c, d], min=EPS)
        loss = loss - p * (torch.log(p) - lamb * torch.log(rows[c]) - lamb * torch.log(rows[d]))
    return loss


def loop_iic(a: Tensor, b: Tensor, lamb: float) -> Tensor:
    p, q = a.softmax(1), b.softmax(1)
    return loop_information(sum(torch.outer(p[i], q[i]) for i in range(len(a))), lamb)


def loop_segmentation(a, b, theta, mask, reach: int, lamb: float, collapsed: bool) -> Tensor:
    p, q = a.softmax(1), b.softmax(1)
    if theta is not None:
        q = grid_sample(q, affine_grid(theta, list(p.shape), align_corners=False), align_corners=False)
    spatial = p.shape[2:]
    joints = []
    for t in product(range(-reach, reach + 1), repeat=len(spatial)):
        joint = torch.zeros(p.shape[1], p.shape[1], dtype=p.dtype)
        for n in range(len(p)):
            for u in product(*map(range, spatial)):
                v = tuple(x + dx for x, dx in zip(u, t, strict=True))
                if all(0 <= x < size for x, size in zip(v, spatial, strict=True)):
                    weight = 1.0 if mask is None else mask[(n, *u)] * mask[(n, *v)]
                    joint = joint + weight * torch.outer(p[(n, slice(None), *v)], q[(n, slice(None), *u)])
        joints.append(joint)
    if collapsed:
        return loop_information(sum(joints), lamb)
    return sum(loop_information(joint, lamb) for joint in joints) / len(joints)


@given(n=st.integers(1, 8), k=st.integers(2, 6), lamb=st.sampled_from([1.0, 1.5]), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_iic_is_its_formula_whatever_the_order_of_items_and_views(n, k, lamb, seed):
    a, b = randn(n, k, seed=seed), randn(n, k, seed=seed + 1)
    value, gradient = value_and_grad(lambda x: iic(x, b, lamb=lamb), a)
    expected, expected_gradient = value_and_grad(lambda x: loop_iic(x, b, lamb), a)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)
    order = permutation(n, seed)
    assert_close(iic(b[order], a[order], lamb=lamb), value)
    names = permutation(k, seed)
    assert_close(iic(a[:, names], b[:, names], lamb=lamb), value)


def test_iic_at_its_limits():
    k = 4
    sure = 1e4 * torch.eye(k, dtype=torch.float64).repeat(3, 1)
    assert_close(iic(sure, sure), torch.tensor(-math.log(k), dtype=torch.float64))
    assert_close(iic(sure, sure, lamb=1.5), torch.tensor(-2 * math.log(k), dtype=torch.float64))
    one = sure[:1].repeat(12, 1)
    assert_close(iic(one, one), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    unsure = torch.zeros(12, k, dtype=torch.float64)
    assert_close(iic(unsure, unsure, lamb=1.5), torch.tensor(-math.log(k), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 3, 4, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("collapsed", [False, True])
def test_segmentation_is_its_formula_with_displacements_geometry_and_mask(shape, reach, collapsed):
    a, b, mask = randn(*shape), randn(*shape, seed=1), (rand(shape[0], *shape[2:], seed=2) > 0.3).double()
    dims = len(shape) - 2
    theta = torch.eye(dims, dims + 1, dtype=torch.float64) + 0.2 * randn(shape[0], dims, dims + 1, seed=3)

    def ours(x):
        return iic_segmentation(
            x, b, affine2_to_1=theta, mask=mask, max_displacement=reach, lamb=1.5, collapsed=collapsed
        )

    value, gradient = value_and_grad(ours, a)
    expected, slope = value_and_grad(lambda x: loop_segmentation(x, b, theta, mask, reach, 1.5, collapsed), a)
    assert_close(value, expected)
    assert_close(gradient, slope)
    plain = loop_segmentation(a, b, None, None, reach, 1.0, collapsed)
    assert_close(iic_segmentation(a, b, max_displacement=reach, collapsed=collapsed), plain)


def test_without_displacement_every_place_is_an_item():
    a, b = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    rows = [x.movedim(1, -1).reshape(-1, 4) for x in (a, b)]
    assert_close(iic_segmentation(a, b), iic(*rows))


def test_a_map_of_another_size_is_brought_onto_the_grid_of_the_first():
    a, b = randn(2, 3, 4, 4), randn(2, 3, 8, 8, seed=1)
    theta = torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3)
    assert_close(iic_segmentation(a, b, affine2_to_1=theta), loop_segmentation(a, b, theta, None, 0, 1.0, False))


@pytest.mark.parametrize("reach", [1, 3])  # one matrix product for each displacement, and a transform
def test_flips_are_undone_exactly(reach):
    a = randn(2, 3, 8, 8)
    theta = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]] * 2, dtype=torch.float64)  # the last axis comes first
    straight = iic_segmentation(a, a, max_displacement=reach)
    assert_close(iic_segmentation(a, a.flip(3), affine2_to_1=theta, max_displacement=reach), straight)


def test_joints_of_parts_of_the_batch_add_up():
    a, b = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    parts = [segmentation_joints(a[s], b[s], max_displacement=1) for s in (slice(0, 1), slice(1, 4))]
    assert_close(joint_loss(sum(parts)), iic_segmentation(a, b, max_displacement=1))


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_an_all_masked_batch_gives_0_and_a_place_alone_counts_its_own_displacement(reach):
    a, b = randn(2, 3, 6, 6, dtype=torch.float32), randn(2, 3, 6, 6, seed=1, dtype=torch.float32)
    nothing = torch.zeros(2, 6, 6, dtype=torch.bool)
    with pytest.warns(EmptyComparisonWarning):
        value, gradient = value_and_grad(lambda x: iic_segmentation(x, b, mask=nothing, max_displacement=reach), a)
    assert value == 0
    assert bool((gradient == 0).all())
    one = nothing.clone()
    one[0, 2, 3] = True
    alone = iic_segmentation(a[:1, :, 2:3, 3:4], b[:1, :, 2:3, 3:4])
    n = (2 * reach + 1) ** 2
    assert_close(iic_segmentation(a, b, mask=one, max_displacement=reach), alone / n)


def test_bfloat16_is_computed_wide_and_extreme_logits_stay_finite():
    a, b = (randn(2, 3, 6, 6, seed=s).bfloat16() for s in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = iic_segmentation(a, b, max_displacement=1)
    assert value.dtype == torch.float32
    assert_close(value, iic_segmentation(a.float(), b.float(), max_displacement=1))
    far = 1e6 * randn(2, 3, 6, 6, dtype=torch.float32)
    for reach in (1, 3):
        value, gradient = value_and_grad(lambda x, t=reach: iic_segmentation(x, far, max_displacement=t, lamb=1.5), far)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("reach", [0, 3])
def test_a_nan_is_not_taken_for_an_empty_mask(reach):
    a = randn(1, 3, 6, 6)
    a[0, 0, 0, 0] = torch.nan
    assert bool(iic_segmentation(a, a, max_displacement=reach).isnan())


def test_wrong_arguments_are_refused():
    a = randn(2, 3, 4, 4)
    cases = [
        (ShapeError, {"logits1": a[0]}),
        (ShapeError, {"logits2": a[:, :2]}),
        (ShapeError, {"logits2": a[..., :3]}),
        (ShapeError, {"mask": torch.ones(2, 3, 3)}),
        (ShapeError, {"affine2_to_1": torch.zeros(2, 3, 4)}),
        (InputError, {"max_displacement": 4}),
        (InputError, {"max_displacement": -1}),
        (InputError, {"lamb": 0.0}),
        (InputError, {"lamb": math.nan}),
        (InputError, {"logits1": a.long(), "logits2": a.long()}),
    ]
    for error, given_ in cases:
        with pytest.raises(error):
            iic_segmentation(**{"logits1": a, "logits2": a, **given_})
    with pytest.raises(ShapeError):
        iic(a, a)
    with pytest.raises(InputError):
        iic(randn(3, 2), randn(3, 2), lamb=-1.0)
