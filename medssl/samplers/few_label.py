"""Full batches from very few volumes, each volume equally often."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.samplers.base import STEP, Sampler, check_count


class FewLabelConfig(StrictModel):
    """Settings of `FewLabelSampler`."""

    name: Literal["few_label"] = "few_label"
    batch_size: PositiveInt = 20
    """Items in a global batch (20 slices in Chaitanya et al. 2020)."""


class FewLabelSampler(Sampler):
    """Fine-tuning with so few volumes that a batch may exceed them.

    Each batch takes equally many items of every volume; what does not divide evenly goes to volumes in turn. Inside a
    batch an item of a volume repeats only when all its items were taken; batches are drawn independently.

    Args:
        table: The items to choose from.
        seed: The run's seed.
        batch_size: Items in a global batch.
    """

    config: ClassVar[type[StrictModel]] = FewLabelConfig

    def __init__(self, table: ItemTable, *, seed: int, batch_size: int) -> None:
        super().__init__(table, seed=seed)
        check_count("batch_size", batch_size, 1)
        self.batch_size = batch_size
        volumes, code = np.unique(table.volume, return_inverse=True)
        self._rows = [table.row[code == v] for v in range(len(volumes))]

    def _global_batch(self, step: int) -> Ints:
        each, extra = divmod(self.batch_size, len(self._rows))
        wanted = np.full(len(self._rows), each)
        if extra:
            wanted[self._chunk(len(self._rows), extra, step)] += 1
        rng = self._rng(STEP, step)
        drawn = [_draw(self._rows[v], wanted[v], rng) for v in np.flatnonzero(wanted)]
        return rng.permutation(np.concatenate(drawn))


def _draw(rows: Ints, n: int, rng: np.random.Generator) -> Ints:
    """``n`` of ``rows``: whole passes through them, then some without repetition."""
    passes, rest = divmod(n, len(rows))
    return np.concatenate([np.tile(rows, passes), rng.permutation(rows)[:rest]])
