"""Pseudo-labels of every item that is trained on, as state of a method."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from medssl.core import distributed
from medssl.core.errors import ConfigError, ShapeError, TrainingError
from medssl.core.seeding import CLUSTERS, numpy_rng
from medssl.core.types import EmbedAll, Ints, ItemTable
from medssl.models.norm import SyncBatchNorm


class Assignments(nn.Module):
    """Labels of H heads for the n items of a training table, found by row number.

    Everything is a buffer, so that checkpoints hold it. ``fit`` gives the buffers their size and must come before a
    state is loaded.

    Args:
        n_heads: H.
        n_clusters: K, the same for every head.

    Attributes:
        labels: (H, n) int64, in the table's order.
        used: Share in [0, 1] of the H K clusters that hold any item.
    """

    rows: Tensor
    order: Tensor
    labels: Tensor
    used: Tensor

    def __init__(self, n_heads: int, n_clusters: int) -> None:
        super().__init__()
        self.n_heads, self.n_clusters = n_heads, n_clusters
        self.register_buffer("rows", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("order", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("labels", torch.zeros(n_heads, 0, dtype=torch.int64))
        self.register_buffer("used", torch.zeros(()))

    def fit(self, table: ItemTable, *, seed: int) -> None:
        """Take the table's rows, and label them in turn in an order of each head's own (Asano et al. 2020, program).

        Raises:
            ConfigError: Fewer items than clusters.
        """
        n = len(table)
        if n < self.n_clusters:
            raise ConfigError(
                "there are fewer items to train on than clusters",
                where="method.n_clusters",
                found=f"n_clusters {self.n_clusters}, {n} items",
                fix=f"set it to at most {n}; with fewer than about ten items a cluster, clusters mean little",
            )
        order = np.argsort(table.row, kind="stable")
        self.order = torch.from_numpy(order)
        self.rows = torch.from_numpy(table.row[order].copy())
        self.labels = torch.zeros(self.n_heads, n, dtype=torch.int64)
        in_turn = np.arange(n) % self.n_clusters
        shuffled = [numpy_rng(seed, CLUSTERS, head).permutation(in_turn) for head in range(self.n_heads)]
        self.store(torch.from_numpy(np.stack(shuffled)))

    def store(self, labels: Tensor) -> None:
        """Keep labels (H, n), in the table's order: on every process those of the first."""
        self.labels.copy_(distributed.from_first(labels.to(self.labels.device)))
        sizes = torch.stack([head.bincount(minlength=self.n_clusters) for head in self.labels])
        self.used.copy_((sizes > 0).double().mean())

    def of(self, row: Tensor) -> Tensor:
        """Labels (N, H) of row numbers (N,); -1 for a row that was not in the table."""
        place = torch.searchsorted(self.rows, row.contiguous()).clamp(max=len(self.rows) - 1)
        known = self.rows[place] == row
        return torch.where(known[:, None], self.labels[:, self.order[place]].T, -1)

    def numpy(self) -> Ints:
        """The labels (H, n) as an array of their own."""
        return self.labels.cpu().numpy().copy()


def cluster_logs(assignments: Assignments, agrees: Tensor) -> dict[str, Tensor]:
    """What methods of stored labels log.

    ``chance_loss`` is the loss of a uniform guess, ``used_prototypes`` the share of clusters that hold any item of the
    whole training set, ``agreement`` the share of predictions that are the label.
    """
    return {
        "chance_loss": torch.full_like(assignments.used, math.log(assignments.n_clusters)),
        "used_prototypes": assignments.used.detach().clone(),
        "agreement": agrees.mean(),
    }


def whole_set(embed_all: EmbedAll, assignments: Assignments) -> Tensor:
    """Encoder output (n, F) of every item, where the labels are kept.

    Raises:
        TrainingError: It is not finite.
        ShapeError: Other items than the labels are kept for.
    """
    h, _ = embed_all()
    if len(h) != assignments.labels.shape[1]:
        raise ShapeError(
            "another number of items was embedded than labels are kept for",
            found=f"{len(h)} embedded, {assignments.labels.shape[1]} in the training table",
            fix="call fit_labels with the table that is trained on",
        )
    if not bool(h.isfinite().all()):
        broken = (~h.isfinite().all(1)).nonzero().flatten().tolist()
        raise TrainingError(
            f"the encoder's output is not finite for {len(broken)} of {len(h)} items, so they cannot be clustered",
            where=f"items {', '.join(map(str, broken[:10]))} of the training table",
            fix="lower optimizer.learning_rate or set optimizer.clip_norm; check these items with `medssl data check`",
        )
    return h.to(assignments.labels.device)


@torch.no_grad()
def set_statistics(norm: nn.Module, rows: Tensor) -> None:
    """Running statistics of a batch norm from the whole set (n, F); of anything else nothing.

    They would otherwise lag behind, and know nothing at all before the first step.
    """
    if isinstance(norm, SyncBatchNorm) and len(rows) > 1:
        norm.running_mean.copy_(distributed.from_first(rows.mean(0).to(norm.running_mean)))
        norm.running_var.copy_(distributed.from_first(rows.var(0).to(norm.running_var)))
