"""Items in random order, each once an epoch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.samplers.base import Sampler, check_count


class RandomConfig(StrictModel):
    """Settings of `RandomSampler`."""

    name: Literal["random"] = "random"
    batch_size: PositiveInt = 32
    """Items in a global batch."""


class RandomSampler(Sampler):
    """Without replacement inside an epoch, another order in every epoch.

    Args:
        table: The items to choose from.
        seed: The run's seed.
        batch_size: Items in a global batch.

    Raises:
        ConfigError: The table holds fewer items than a batch.
    """

    config: ClassVar[type[StrictModel]] = RandomConfig

    def __init__(self, table: ItemTable, *, seed: int, batch_size: int) -> None:
        super().__init__(table, seed=seed)
        check_count("batch_size", batch_size, 1)
        if batch_size > len(table):
            raise ConfigError(
                "a batch needs more items than there are",
                found=f"batch_size {batch_size}, {len(table)} items",
                fix=f"use a batch_size of at most {len(table)}, or the sampler few_label, which repeats items",
            )
        self.batch_size = batch_size

    def _global_batch(self, step: int) -> Ints:
        return self.table.row[self._chunk(len(self.table), self.batch_size, step)]
