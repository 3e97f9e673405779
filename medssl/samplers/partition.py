"""Batches of several volumes with one item of every partition: what the partition-aware contrastive losses compare."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from medssl.core.errors import ConfigError, InputError
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.samplers.base import EPOCH, STEP, Sampler, check_count


class PartitionConfig(StrictModel):
    """Settings of `PartitionSampler`."""

    name: Literal["partition"] = "partition"
    n_volumes: PositiveInt = 3
    """Volumes in a global batch; times the number of partitions gives its size (3 x 4 in Chaitanya et al. 2020)."""


class PartitionPairsConfig(StrictModel):
    """Settings of `PartitionPairsSampler`."""

    name: Literal["partition_pairs"] = "partition_pairs"
    n_volumes: Annotated[int, Field(ge=2)] = 3
    """Volumes in a global batch, each the others' partner (3 in Chaitanya et al. 2020)."""


class PartitionSampler(Sampler):
    """m volumes x S partitions, one item each, its position drawn uniformly inside the partition.

    Volumes come in random order, each at most once an epoch. The volumes of a batch are of distinct subjects whenever
    there are m subjects: a subject with more volumes than an epoch has batches is cut short, at random. Rows are
    volume by volume. Items outside all partitions are never drawn.

    Args:
        table: The items to choose from; every volume holds every partition.
        seed: The run's seed.
        n_volumes: m.

    Raises:
        ConfigError: The table has no partitions, or fewer volumes than m.
        InputError: A volume lacks a partition.
    """

    config: ClassVar[type[StrictModel]] = PartitionConfig

    def __init__(self, table: ItemTable, *, seed: int, n_volumes: int) -> None:
        super().__init__(table, seed=seed)
        check_count("n_volumes", n_volumes, 1)
        if table.n_partitions < 1 or not (table.partition >= 0).any():
            raise ConfigError(
                "this sampler needs items with partitions", fix="set the number of partitions of the items"
            )
        self._rows, self._first, self._count, self._subject = _by_partition(table)
        if n_volumes > len(self._subject):
            raise ConfigError(
                "a batch needs more volumes than there are",
                found=f"n_volumes {n_volumes}, {len(self._subject)} volumes",
                fix=f"set n_volumes to at most {len(self._subject)}",
            )
        self.n_volumes, self.batch_size = n_volumes, n_volumes * table.n_partitions
        self._n_batches = _batches_per_epoch(self._subject, n_volumes)

    def _global_batch(self, step: int) -> Ints:
        return self._draw(step).reshape(-1)

    def _draw(self, step: int) -> Ints:
        """Row numbers (m, S)."""
        epoch, place = divmod(step, self._n_batches)
        volumes = self._deal(epoch)[place]
        within = self._rng(STEP, step).integers(0, self._count[volumes])
        return self._rows[self._first[volumes] + within]

    def _deal(self, epoch: int) -> Ints:
        """The volumes of an epoch's batches, (batches, m).

        Volumes are laid out subject by subject and dealt to the batches in turn, like cards: neighbours, and so the
        volumes of a subject, land in different batches.
        """
        rng = self._rng(EPOCH, epoch)
        n = len(self._subject)
        place_of_subject = rng.permutation(self._subject.max() + 1)[self._subject]
        shuffled = rng.permutation(n)
        order = shuffled[np.argsort(place_of_subject[shuffled], kind="stable")]
        if _enough_subjects(self._subject, self.n_volumes):
            order = order[_rank_within_runs(self._subject[order]) < self._n_batches]
        dealt = order[: self.n_volumes * self._n_batches].reshape(self.n_volumes, self._n_batches).T
        return dealt[rng.permutation(self._n_batches)]


class PartitionPairsSampler(PartitionSampler):
    """As `PartitionSampler`, for the LD loss: every partition at all m >= 2 volumes, so that each item has partners.

    Rows are partition by partition, the volumes in the same order in each: the items that are partners lie together,
    and on one process where the number of processes divides S. Positions are drawn independently, as published.
    """

    config: ClassVar[type[StrictModel]] = PartitionPairsConfig

    def __init__(self, table: ItemTable, *, seed: int, n_volumes: int) -> None:
        check_count("n_volumes", n_volumes, 2)
        super().__init__(table, seed=seed, n_volumes=n_volumes)

    def _global_batch(self, step: int) -> Ints:
        return self._draw(step).T.reshape(-1)


def _by_partition(table: ItemTable) -> tuple[Ints, Ints, Ints, Ints]:
    """Row numbers sorted by volume and partition; first and number of each (V, S); subject code of each volume (V,)."""
    volumes, code = np.unique(table.volume, return_inverse=True)
    inside = np.flatnonzero(table.partition >= 0)
    cell = code[inside] * table.n_partitions + table.partition[inside]
    order = np.argsort(cell, kind="stable")
    count = np.bincount(cell, minlength=len(volumes) * table.n_partitions).astype(np.int64)
    if (count == 0).any():
        v, s = np.argwhere(count.reshape(len(volumes), -1) == 0)[0]
        raise InputError(
            "a volume lacks items of a partition",
            where=f"volume {volumes[v]} (row of the manifest), partition {s}",
            fix="use fewer partitions, or leave the volume out",
        )
    first_item = np.unique(code, return_index=True)[1]
    subject = np.unique(table.subject[first_item], return_inverse=True)[1].astype(np.int64)
    shape = (len(volumes), table.n_partitions)
    return table.row[inside[order]], (count.cumsum() - count).reshape(shape), count.reshape(shape), subject


def _enough_subjects(subject: Ints, n_volumes: int) -> bool:
    return int(subject.max()) + 1 >= n_volumes


def _batches_per_epoch(subject: Ints, n_volumes: int) -> int:
    """Most batches of ``n_volumes`` volumes that an epoch can hold, of distinct subjects where there are enough."""
    most = len(subject) // n_volumes
    if not _enough_subjects(subject, n_volumes):
        return most
    held = np.bincount(subject)
    # With b batches a subject can be in b of them at most; one batch is always possible.
    return max(b for b in range(1, most + 1) if np.minimum(held, b).sum() >= b * n_volumes)


def _rank_within_runs(values: Ints) -> Ints:
    """Number of equal values directly before each entry."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    lengths = np.diff(np.r_[starts, len(values)])
    return np.arange(len(values)) - np.repeat(starts, lengths)
