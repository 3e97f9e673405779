"""How methods and tasks are listed, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medssl.core.schema import StrictModel
from medssl.core.types import Method, ModelParts, ViewBatch
from medssl.models.initialise import HEADS, seeded_init


@dataclass(frozen=True)
class MethodEntry:
    """A method or task that a configuration can name.

    Attributes:
        config: Validates its section of the YAML; ``config.needs()`` says what it asks of the rest of a run.
        method: The class, made as ``method(config, parts)``.
        summary: One line for lists.
        source: Publication.
    """

    config: type[StrictModel]
    method: Callable[[Any, ModelParts], Method]
    summary: str
    source: str

    @property
    def keeps_clusters(self) -> bool:
        """Whether the method stores a pseudo-label of every item, which a sampler can balance."""
        return getattr(self.method, "clusters", Method.clusters) is not Method.clusters

    @property
    def has_clusters(self) -> bool:
        """Whether it can say which cluster an item belongs to, stored or computed."""
        return self.keeps_clusters or getattr(self.method, "assign", Method.assign) is not Method.assign

    def build(self, config: Any, parts: ModelParts, *, seed: int = 0) -> Method:
        """The method on ``parts``; weights that it adds (heads) are determined by ``seed``.

        Raises:
            ConfigError: The parts or settings do not fit the method.
        """
        with seeded_init(seed, HEADS):
            return self.method(config, parts)


def stacked_views(batch: ViewBatch, n: int) -> Tensor:
    """The first ``n`` views under each other, (n N, C, *spatial): one pass through a network, one batch for its norms.

    Views are of one size here; `embed_views` takes several (multi-crop).
    """
    return torch.cat(batch.views[:n])


def split_views(rows: Tensor, n: int) -> Tensor:
    """Rows (n N, D) of ``stacked_views`` as (N, n, D), ready to be gathered by item."""
    return rows.unflatten(0, (n, -1)).transpose(0, 1)


def embed_views(encoder: nn.Module, head: nn.Module, batch: ViewBatch, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Features of view 0 and projections of the first ``n`` views (None: all), of this process's items.

    The encoder passes once over the views of each size (multi-crop), the head once over everything.

    Returns:
        h (N, F) and z (N, n, D), both raw and with gradient.
    """
    views = batch.views[:n]
    of_size: dict[tuple[int, ...], list[int]] = {}
    for number, view in enumerate(views):
        of_size.setdefault(tuple(view.shape[1:]), []).append(number)
    features = [encoder(torch.cat([views[number] for number in numbers])) for numbers in of_size.values()]
    z = split_views(head(torch.cat(features)), len(views))
    order = [number for numbers in of_size.values() for number in numbers]
    if order != sorted(order):
        z = z[:, [order.index(number) for number in range(len(views))]]
    return features[0][: len(views[0])], z


def loss_of_equals(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """What ``loss`` makes of embeddings (N, V, D) that are all the same: the ``chance_loss`` of a contrast."""
    with torch.no_grad():
        return loss(torch.ones_like(z[..., :1]))  # one dimension is enough for that


def evaluated(head: nn.Module, h: Tensor) -> Tensor:
    """Projections of ``h`` as in evaluation (norms with running statistics), whatever mode ``head`` is in."""
    training = head.training
    head.eval()
    try:
        z: Tensor = head(h)
        return z
    finally:
        head.train(training)
