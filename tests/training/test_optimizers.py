import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from medssl.training.config import OptimizerConfig, ScheduleConfig
from medssl.training.optimizers import LARS, build_optimizer, schedule_factor


def test_lars_step_is_the_one_written_out_by_hand():
    """w = (3, 4), |w| = 5; g = (0, 1), decay 0.1: g' = (0.3, 1.4); rate = 0.01 * 5 / |g'|."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([weight], lr=2.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.01)
    weight.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    optimizer.step()
    norm = math.hypot(0.3, 1.4)
    step = [0.05 * 0.3 / norm, 0.05 * 1.4 / norm]
    expected = [3 - 2 * step[0], 4 - 2 * step[1]]
    torch.testing.assert_close(weight.detach()[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    # Second step: velocity = 0.5 * first + new local step.
    w, g = torch.tensor(expected, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    weight.grad = g[None].clone()
    optimizer.step()
    g = g + 0.1 * w
    velocity = 0.5 * torch.tensor(step, dtype=torch.float64) + 0.01 * w.norm() / g.norm() * g
    torch.testing.assert_close(weight.detach()[0], w - 2 * velocity, rtol=1e-14, atol=0)


def test_lars_leaves_biases_and_norms_without_adaptation_and_decay():
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    reference = nn.Parameter(bias.detach().clone())
    lars = LARS([bias], lr=0.1, momentum=0.9, weight_decay=10.0, trust_coefficient=0.5)
    sgd = torch.optim.SGD([reference], lr=0.1, momentum=0.9)
    for _ in range(3):
        bias.grad, reference.grad = torch.tensor([0.5, -2.0]), torch.tensor([0.5, -2.0])
        lars.step()
        sgd.step()
    torch.testing.assert_close(bias, reference)


def test_lars_moves_a_weight_of_zero_and_stands_still_without_gradient():
    weight, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight, still], lr=0.1, momentum=0.0)
    weight.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))
    torch.testing.assert_close(still.detach(), torch.ones(2, 2))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_lars_step_does_not_depend_on_the_scale_of_the_gradient(scale, seed):
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradient = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    ends = []
    for factor in (1.0, scale):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient * factor
        LARS([weight], lr=0.1).step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "cls"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "LARS")])
def test_optimisers_take_only_trainable_weights_and_their_settings(name, cls):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=0.3, weight_decay=0.2, momentum=0.7))
    assert type(optimizer).__name__ == cls
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.2, 2)
    if name in ("sgd", "lars"):
        assert group["momentum"] == 0.7


def test_schedule_golden_values():
    cosine = ScheduleConfig(name="cosine", warmup_steps=4, final_fraction=0.1)
    values = [schedule_factor(cosine, step, 12) for step in (0, 1, 3, 4, 8, 12)]
    assert values == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1], abs=1e-15)
    constant = ScheduleConfig(warmup_steps=2)
    assert [schedule_factor(constant, step, 9) for step in (0, 1, 2, 8)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule_factor(ScheduleConfig(name="cosine"), 5, float("inf")) == 1.0


def test_the_step_schedule_falls_by_gamma_after_every_so_many_steps():
    config = ScheduleConfig(name="step", gamma=0.9, every_steps=3, warmup_steps=2)
    values = [schedule_factor(config, step, float("inf")) for step in range(9)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.81], abs=1e-15)
    for wrong in ({"name": "step"}, {"name": "cosine", "every_steps": 3}):
        with pytest.raises(ValidationError, match="every_steps"):
            ScheduleConfig(**wrong)


@given(total=st.integers(1, 500), warmup=st.integers(0, 600), final=st.floats(0, 1))
def test_schedule_stays_in_range_and_never_rises_after_warm_up(total, warmup, final):
    config = ScheduleConfig(name="cosine", warmup_steps=warmup, final_fraction=final)
    values = [schedule_factor(config, step, total) for step in range(total)]
    assert all(0 < value <= 1 + 1e-12 for value in values)
    after = values[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(after, after[1:], strict=False))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_fused_kernel_follows_the_same_formula(name):
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    weights = []
    for fused in (False, True):
        layer = nn.Linear(3, 5, bias=False)
        with torch.no_grad():
            layer.weight.copy_(start)
        optimizer = build_optimizer(layer, OptimizerConfig(name=name, weight_decay=0.1), fused=fused)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)
