"""A teacher: a frozen copy of networks whose weights follow them slowly."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Teacher(nn.Module):
    """Copy of networks, one after another, without gradient (MoCo, arXiv:1911.05722; BYOL, arXiv:2006.07733).

    Weights are averaged over the student's, buffers are not: as in both papers the teacher normalises with the
    statistics of its own batches, and is in training mode whatever it is asked.

    Args:
        parts: What is copied, in the order in which it is applied; it starts with the same weights.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*copy.deepcopy(parts)).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode, for either ``mode``."""
        del mode
        return super().train(True)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the copies make of ``x``, without gradient."""
        embedded: Tensor = self.network(x)
        return embedded

    def update(self, *parts: nn.Module, decay: float) -> None:
        """Move each weight to ``decay`` times itself plus 1 - ``decay`` times the weight of ``parts``, the students."""
        student = [weight.detach() for weight in nn.Sequential(*parts).parameters()]
        get_ema_multi_avg_fn(decay)(list(self.network.parameters()), student, None)
