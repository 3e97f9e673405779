"""What every sampler is: a pure function of (seed, step) over a table of items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final

import numpy as np

from medssl.core import seeding
from medssl.core.errors import ConfigError, InputError
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable

# What a sampler draws random numbers for.
EPOCH: Final = 0
STEP: Final = 1


class Sampler(ABC):
    """Chooses the items of step t from the seed, t and the table alone.

    Nothing is remembered between calls, so a run resumes from its step number, and any number of workers or processes
    sees the same batches. A batch is always full: where an epoch does not divide evenly, the few items left over are
    others in every epoch.

    Args:
        table: The items to choose from.
        seed: The run's seed, at least 0.
    """

    config: ClassVar[type[StrictModel]]
    """The class that validates this sampler's section of the configuration."""

    batch_size: int
    """Items in a global batch, over all processes."""

    def __init__(self, table: ItemTable, *, seed: int) -> None:
        if len(table) == 0:
            raise InputError("there is no item to sample", fix="check the split and the filters of the manifest")
        if seed < 0:
            raise ConfigError("seed must not be negative", found=str(seed))
        self.table, self.seed = table, seed

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Ints:
        """Row numbers (values of ``table.row``) of this process's share of the batch of ``step``.

        Process ``rank`` gets the ``rank``-th contiguous part of the global batch.

        Args:
            step: At least 0.
            rank: Below ``world_size``.
            world_size: Number of processes; divides the batch size.

        Returns:
            int64 (batch_size / world_size,).

        Raises:
            ConfigError: The batch cannot be divided evenly.
            InputError: A step or rank that does not exist.
        """
        if step < 0 or not 0 <= rank < world_size:
            raise InputError("no such batch", found=f"step {step}, rank {rank} of {world_size}")
        if self.batch_size % world_size:
            raise ConfigError(
                "the batch cannot be divided evenly over the processes",
                found=f"{self.batch_size} items, {world_size} processes",
                fix="choose a batch size that is a multiple of the number of processes",
            )
        share = self.batch_size // world_size
        return self._global_batch(step)[rank * share : (rank + 1) * share]

    @abstractmethod
    def _global_batch(self, step: int) -> Ints:
        """Row numbers of the whole batch, (batch_size,)."""

    def _rng(self, *keys: int) -> np.random.Generator:
        return seeding.numpy_rng(self.seed, seeding.SAMPLER, *keys)

    def _chunk(self, n: int, size: int, step: int) -> Ints:
        """``size`` of ``range(n)`` for this step: each at most once in an epoch of n // size steps."""
        epoch, place = divmod(step, n // size)
        order = seeding.permutation(n, self.seed, seeding.SAMPLER, EPOCH, epoch)
        return order[place * size : (place + 1) * size]


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a setting below ``least``."""
    if value < least:
        raise ConfigError(f"{name} must be at least {least}", found=str(value))
