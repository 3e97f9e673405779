"""Normalisation layers, and a batch norm over several processes that also works on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.core.distributed import gather, world_size
from medssl.core.errors import InputError

Norm = Literal["group", "instance", "batch"]


def make_norm(kind: Norm, channels: int, dims: int) -> nn.Module:
    """A normalisation layer with learned scale and shift.

    Args:
        kind: "group": 8 groups, or 4, 2, 1 until each holds two channels or more; "instance": each channel of each
            item by itself; "batch": over the whole batch of all processes.
        channels: Number of channels.
        dims: Spatial axes, 2 or 3.
    """
    if kind == "group":
        # A group of one channel would be instance norm, which wipes out what is the same in the whole image.
        fitting = [n for n in (8, 4, 2) if channels % n == 0 and channels > n]
        return nn.GroupNorm(max(fitting, default=1), channels)
    if kind == "instance":
        # One group a channel is instance norm, and unlike torch's own accepts maps of a single voxel.
        return nn.GroupNorm(channels, channels)
    if kind == "batch":
        return SyncBatchNorm(channels)
    raise InputError(f"norm `{kind}` is not known", found=str(dims) + "D", fix="use group, instance or batch")


class SyncBatchNorm(nn.Module):
    """Batch norm over the items of every process; with one process exactly torch's batch norm.

    Ioffe & Szegedy 2015 (arXiv:1502.03167). ``torch.nn.SyncBatchNorm`` refuses CPU tensors, and a plain batch norm
    makes two processes train differently from one. Every process hands round its mean, its squared deviations and its
    count once a call; they are combined as Chan et al. 1979 do, without the cancellation of E[x^2] - E[x]^2.
    Parameter and buffer names are those of torch's, so weights can be exchanged. Inputs (N, C, *spatial).

    Attributes:
        groups: 0: as above. G above 0 (see `norm_groups`): items are normalised in G groups of consecutive ones, each
            with its own statistics; the running ones move by the mean over the groups of all processes.
    """

    groups: int = 0

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training with the statistics of the batch, which also move the running ones."""
        if self.training:
            self.num_batches_tracked += 1
            if self.groups > 0:
                return self._in_groups(x)
            if world_size() > 1:
                return self._over_processes(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _in_groups(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (self.groups, -1))
            axes = [1, *range(3, wide.ndim)]  # (groups, N / groups, C, *spatial)
            mean, var = wide.mean(axes), wide.var(axes, correction=0)
            with torch.no_grad():
                count = wide.numel() / mean.numel()
                self._move_running(*gather((mean, var * (count / max(count - 1, 1)))))
            shape = (self.groups, 1, -1) + (1,) * (x.ndim - 2)
            scale = self.weight * torch.rsqrt(var + self.eps)
            bias = self.bias.view(1, 1, -1, *shape[3:])
            result = (wide - mean.view(shape)) * scale.view(shape) + bias
        return cast(Tensor, result.flatten(0, 1).to(x.dtype))

    def _move_running(self, means: Tensor, variances: Tensor) -> None:
        """Towards the mean of groups (G, C)."""
        self.running_mean.lerp_(means.mean(0).to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variances.mean(0).to(self.running_var.dtype), self.momentum)

    def _over_processes(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean, var, count = _global_moments(wide)
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                self._move_running(mean[None], unbiased[None])
            scale = self.weight * torch.rsqrt(var + self.eps)
            shape = (1, -1) + (1,) * (x.ndim - 2)
            result = (wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return cast(Tensor, result.to(x.dtype))


@contextmanager
def norm_groups(module: nn.Module, groups: int) -> Iterator[None]:
    """Inside, every batch norm of ``module`` that is in training normalises ``groups`` groups of consecutive items."""
    norms = [part for part in module.modules() if isinstance(part, SyncBatchNorm)]
    for norm in norms:
        norm.groups = groups
    try:
        yield
    finally:
        for norm in norms:
            norm.groups = 0


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () over all processes, with gradient."""
    axes = [0, *range(2, x.ndim)]
    local = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
    centre = x.mean(axes)
    squares = (x - centre.view(1, -1, *(1,) * (x.ndim - 2))).square().sum(axes)
    parts = gather(torch.cat([centre, squares, local])[None])  # (W, 2C + 1)
    centres, deviations, counts = parts.split([x.shape[1], x.shape[1], 1], dim=1)
    count = counts.detach().sum()
    mean = (centres * counts).sum(0) / count
    var = (deviations + counts * (centres - mean).square()).sum(0) / count
    return mean, var, count
