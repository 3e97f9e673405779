"""Batches in which every cluster of pseudo-labels is equally likely, however many items it holds."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.samplers.base import STEP, Sampler
from medssl.samplers.random import RandomSampler


class ClusterBalancedConfig(StrictModel):
    """Settings of `ClusterBalancedSampler`."""

    name: Literal["cluster_balanced"] = "cluster_balanced"
    batch_size: PositiveInt = 32
    """Items in a global batch (256 in Caron et al. 2018)."""
    head: NonNegativeInt = 0
    """Whose clusters are balanced, where a method keeps several."""


class ClusterBalancedSampler(Sampler):
    """A cluster drawn uniformly from those that are not empty, then an item drawn uniformly from it.

    As Caron et al. 2018 (arXiv:1807.05520), section 3.3: without it, large clusters rule the loss and everything may
    end in one. Items may repeat inside a batch. Items without a cluster (-1) are drawn only while no item has one:
    batches are then those of `RandomSampler`. The labels are an argument and not remembered, so a batch is a function
    of (seed, step, labels).

    Args:
        table: The items to choose from.
        seed: The run's seed.
        batch_size: Items in a global batch.
        head: Row of the labels that is balanced.

    Raises:
        ConfigError: The table holds fewer items than a batch.
    """

    config: ClassVar[type[StrictModel]] = ClusterBalancedConfig

    def __init__(self, table: ItemTable, *, seed: int, batch_size: int, head: int = 0) -> None:
        super().__init__(table, seed=seed)
        self._random = RandomSampler(table, seed=seed, batch_size=batch_size)
        self.batch_size, self.head = batch_size, head
        self._rows, self._first, self._count = table.row, np.empty(0, np.int64), np.empty(0, np.int64)

    def with_clusters(self, labels: Ints) -> ClusterBalancedSampler:
        """The same sampler on these pseudo-labels.

        Args:
            labels: (heads, n) in the order of the table; -1: none.

        Raises:
            ConfigError: There is no such head.
            ShapeError: The labels are not those of the table.
        """
        labels = np.asarray(labels, dtype=np.int64)
        if labels.ndim != 2 or labels.shape[1] != len(self.table):
            raise ShapeError("labels must be (heads, n) for n items", found=f"{labels.shape}, {len(self.table)} items")
        if self.head >= len(labels):
            raise ConfigError(
                "the method has no such head of clusters",
                where="sampler.head",
                found=f"{self.head}, heads 0 to {len(labels) - 1}",
            )
        own = labels[self.head]
        order = np.argsort(own, kind="stable")[int((own < 0).sum()) :]
        _, first, count = np.unique(own[order], return_index=True, return_counts=True)
        sampler = ClusterBalancedSampler(self.table, seed=self.seed, batch_size=self.batch_size, head=self.head)
        sampler._rows, sampler._first, sampler._count = self.table.row[order], first, count
        return sampler

    def _global_batch(self, step: int) -> Ints:
        if len(self._count) == 0:
            return self._random.batch(step)
        rng = self._rng(STEP, step)
        cluster = rng.integers(len(self._count), size=self.batch_size)
        return self._rows[self._first[cluster] + rng.integers(0, self._count[cluster])]
