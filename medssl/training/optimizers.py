"""Optimisers, LARS among them, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from medssl.core.errors import ConfigError
from medssl.training.config import OptimizerConfig, ScheduleConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> Optimizer:
    """The optimiser over the trainable weights of ``module``.

    Args:
        module: What is trained.
        config: How.
        fused: Take PyTorch's fused kernel of adam and adamw: the same formula, rounded elsewhere. On a CPU a step of a
            small network costs a quarter (56 instead of 206 us for an MLP of 8 tensors).

    Raises:
        ConfigError: Nothing is trainable.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError("there is nothing to train: every weight is frozen", fix="unfreeze the encoder or a decoder")
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "adam":
        return Adam(weights, lr=rate, weight_decay=decay, fused=fused or None)
    if config.name == "adamw":
        return AdamW(weights, lr=rate, weight_decay=decay, fused=fused or None)
    if config.name == "sgd":
        return SGD(weights, lr=rate, momentum=config.momentum, weight_decay=decay)
    return LARS(
        weights, lr=rate, momentum=config.momentum, weight_decay=decay, trust_coefficient=config.trust_coefficient
    )


def schedule_factor(config: ScheduleConfig, step: int, total_steps: float) -> float:
    """Factor of the learning rate at ``step`` (0-based) of ``total_steps``, in (0, 1].

    Warm-up: (step + 1) / warmup_steps. Cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. (5)) over the steps
    after it, from 1 down to ``final_fraction``, which the step after the last would reach. Step: times ``gamma`` after
    every ``every_steps`` steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    if config.name == "step" and config.every_steps is not None:
        return float(config.gamma ** ((step - config.warmup_steps) // config.every_steps))
    share = (step - config.warmup_steps) / max(1.0, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.final_fraction + (1 - config.final_fraction) * cosine


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling: SGD whose step is in proportion to the norm of each layer's weight.

    You et al. 2017, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888), Algorithm 1. For a weight w
    with gradient g: g' = g + weight_decay w; local rate = trust_coefficient |w| / |g'|; v = momentum v + local rate g';
    w = w - lr v. As in SimCLR (Chen et al. 2020, appendix B.6, and SwAV and BYOL after it), biases and weights of norms
    (1-D tensors) get neither the local rate nor weight decay. The denominator is |g + weight_decay w|, not the
    |g| + weight_decay |w| of the algorithm's text: both are in use, this one is what later implementations share.
    Where |w| or |g'| is 0, the local rate is 1.

    Args:
        params: Weights.
        lr: Global learning rate.
        momentum: Of the accumulated step.
        weight_decay: L2 term, for tensors of two or more dimensions.
        trust_coefficient: eta.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient. Without ``.item()``: nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        if weight.ndim > 1:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
            weight_norm, gradient_norm = weight.norm(), gradient.norm()
            rate = group["trust_coefficient"] * weight_norm / gradient_norm
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), rate, 1.0)
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        state["velocity"].mul_(group["momentum"]).add_(gradient)
        weight.sub_(state["velocity"], alpha=group["lr"])
