"""Losses that are a mean over anchors of a function of one anchor's similarities to all other rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from medssl.losses.numerics import unit

CHUNK_CPU, CHUNK_ACCELERATOR = 2**18, 2**25
"""Similarities held at once: on a CPU what its cache keeps, elsewhere what keeps the device busy."""

Terms = Callable[[Tensor, Tensor, slice], Tensor]
"""(similarities (V, C, V, N), itself (V, C, V, N) boolean, items) -> loss of each anchor (V, C).

The anchors are all views of the items in the slice; ``itself`` is true where an anchor meets itself."""


def mean_over_anchors(z: Tensor, temperature: float, terms: Terms) -> Tensor:
    """Mean of ``terms`` over all V N rows of z (N, V, D), from cosines divided by the temperature.

    Works through a chunk of anchors at a time, forward and backward together, so that no (V N, V N) matrix is kept:
    what remains for the backward pass is one gradient of the size of z. A second derivative is not available.
    """
    u = unit(z).transpose(0, 1).contiguous()  # (V, N, D)
    mean: Tensor = _MeanOverAnchors.apply(u, temperature, terms)
    return mean


class _MeanOverAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, temperature: float, terms: Terms) -> Tensor:
        views, n, _ = u.shape
        needs_gradient = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        flat, totals = u.flatten(0, 1), []
        gradient = torch.zeros_like(u)
        by_row = gradient.view(views * n, -1)
        across = torch.arange(n, device=u.device)
        same_view = torch.eye(views, dtype=torch.bool, device=u.device)[:, None, :, None]
        step = max(1, (CHUNK_CPU if u.device.type == "cpu" else CHUNK_ACCELERATOR) // (views * views * n))
        for start in range(0, n, step):
            items = slice(start, min(start + step, n))
            anchors = u[:, items].flatten(0, 1)
            itself = same_view & (across[items, None] == across)[None, :, None, :]
            similarity = ((anchors / temperature) @ flat.T).view(views, -1, views, n)
            with torch.set_grad_enabled(needs_gradient):
                total = terms(similarity.requires_grad_(needs_gradient), itself, items).sum()
            totals.append(total.detach())
            if needs_gradient:
                slope = torch.autograd.grad(total, similarity)[0].view(len(anchors), -1)
                gradient[:, items] += (slope @ flat).view(views, -1, u.shape[2])
                by_row.addmm_(slope.T, anchors)
        ctx.save_for_backward(gradient.div_(temperature * views * n))
        return torch.stack(totals).sum() / (views * n)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_output * gradient, None, None
