"""Batches as pure functions of the step: the same for any number of workers, and after any interruption."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.core.errors import ConfigError, DataError, MedsslError
from medssl.core.types import ItemTable, ViewBatch
from medssl.transforms.views import ViewsConfig, make_views

log = logging.getLogger(__name__)

COLUMNS: Final = ("row", "subject", "volume", "partition", "position")


class Sampler(Protocol):
    """Which items form a step."""

    @property
    def batch_size(self) -> int:
        """Items of the global batch."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """Row numbers of this process's part of the batch."""


class Reader(Protocol):
    """Reads items (`medssl.data.items.ItemReader`)."""

    @property
    def table(self) -> ItemTable:
        """The items."""

    def find(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Positions of rows in the table."""

    def read(self, rows: npt.ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Images and label maps."""

    def describe(self, rows: npt.ArrayLike) -> list[str]:
        """A name for each row."""


@dataclass(frozen=True)
class _Raw:
    """Items of a batch as read, on the CPU (pinned when they go to an accelerator)."""

    images: Tensor
    label_maps: Tensor | None
    items: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]

    def pinned(self, device: torch.device) -> _Raw:
        if device.index is not None:
            torch.cuda.set_device(device)  # of this thread; pinning would otherwise open a context on the first GPU
        maps = None if self.label_maps is None else self.label_maps.pin_memory()
        return _Raw(self.images.pin_memory(), maps, self.items, self.labels)


class BatchSource:
    """Makes the batch of any step from the sampler, the reader and the views.

    Views are made with one thread each, so that nothing depends on how many there are. On a CPU a worker makes the
    whole batch; for an accelerator it reads into pinned memory, and views are made on the device by the loop's own
    thread and stream, which leaves nothing to synchronise.

    Args:
        sampler: Which items form a step.
        reader: Reads items.
        views: How views are made.
        seed: The run's seed.
        device: Where batches are needed.
        rank, world_size: This process and how many there are; the batch must divide.
        workers: Threads that work ahead; 0: none.
        prefetch: Batches ahead of the one asked for; None: two per worker.
        timeout_s: Longest wait for one batch.

    Raises:
        ConfigError: The global batch does not divide by the number of processes.
    """

    def __init__(
        self,
        sampler: Sampler,
        reader: Reader,
        views: ViewsConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.sampler, self.reader, self.views, self.seed = sampler, reader, views, seed
        self.workers, self.timeout_s = workers, timeout_s
        self.prefetch = 2 * workers if prefetch is None else prefetch
        self._futures: dict[int, Future[Any]] = {}
        self._threads: _Threads | None = None
        self.place(device, rank, world_size)

    def place(self, device: torch.device | str, rank: int, world_size: int) -> None:
        """Make batches for this device and process from now on."""
        if self.sampler.batch_size % world_size:
            raise ConfigError(
                f"a batch of {self.sampler.batch_size} items cannot be shared by {world_size} processes",
                fix="choose a batch size that the number of devices divides",
            )
        self.device, self.rank, self.world_size = torch.device(device), rank, world_size
        self.reset()

    def replace_sampler(self, sampler: Sampler) -> None:
        """Sample differently from now on; what was prepared ahead is dropped."""
        self.sampler = sampler
        self.reset()

    def reset(self) -> None:
        """Drop what was prepared ahead."""
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        """Let the worker threads end."""
        self.reset()
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Row numbers of this process's part of the batch of ``step``."""
        return self.sampler.batch(step, self.rank, self.world_size)

    def batch(self, step: int, *, until: int | None = None) -> ViewBatch:
        """The batch of ``step``, on the device.

        Args:
            step: Any step, in any order.
            until: Steps from here on are not prepared ahead (the next refresh, or the end); None: only this one.

        Raises:
            DataError: An item cannot be read, or a worker took longer than ``timeout_s``; it names the cases.
        """
        if self.workers == 0:
            return self._finish(step, self._prepare(step))
        if self._threads is None:
            self._threads = _Threads(self.workers)
        last = step + 1 if until is None else min(until, step + 1 + self.prefetch)
        for stale in [known for known in self._futures if not step <= known < max(last, step + 1)]:
            self._futures.pop(stale).cancel()
        for ahead in range(step, max(last, step + 1)):
            if ahead not in self._futures:
                self._futures[ahead] = self._threads.submit(partial(self._prepare, ahead))
        future = self._futures.pop(step)
        try:
            return self._finish(step, future.result(timeout=self.timeout_s))
        except FutureTimeout as error:
            raise DataError(
                f"a batch was not ready after {self.timeout_s:g} s",
                where=self._name(step),
                fix="check the disk that holds the cache of prepared volumes",
            ) from error

    def plain(self, rows: npt.ArrayLike) -> Tensor:
        """Images of these rows without augmentation, ``(n, C, *spatial)`` on the device."""
        return self.reader.read(rows)[0].to(self.device)

    def _name(self, step: int) -> str:
        names = self.reader.describe(self.rows(step))
        return f"step {step}: " + "; ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def _prepare(self, step: int) -> ViewBatch | _Raw:
        threads = torch.get_num_threads()
        if threads != 1:
            torch.set_num_threads(1)  # of this thread; more would fight for cores with the training step
        try:
            raw = self._read(step)
            return self._views(step, raw) if self.device.type == "cpu" else raw.pinned(self.device)
        except MedsslError:
            raise
        except Exception as error:
            raise DataError(
                "a batch could not be made", where=self._name(step), found=f"{type(error).__name__}: {error}"
            ) from error
        finally:
            if threads != 1:
                torch.set_num_threads(threads)

    def _read(self, step: int) -> _Raw:
        rows = self.rows(step)
        images, label_maps = self.reader.read(rows)
        table, found = self.reader.table, self.reader.find(rows)
        items = {name: torch.from_numpy(np.array(getattr(table, name)[found], dtype=np.int64)) for name in COLUMNS}
        items["slot"] = torch.arange(len(rows)) + self.rank * len(rows)
        labels = {name: torch.from_numpy(np.array(values[found])) for name, values in table.labels.items()}
        return _Raw(images, label_maps, items, labels)

    def _finish(self, step: int, prepared: ViewBatch | _Raw) -> ViewBatch:
        if isinstance(prepared, ViewBatch):
            return prepared
        images = prepared.images.to(self.device, non_blocking=True)
        maps = None if prepared.label_maps is None else prepared.label_maps.to(self.device, non_blocking=True)
        return self._views(step, _Raw(images, maps, prepared.items, prepared.labels)).to(self.device, non_blocking=True)

    def _views(self, step: int, raw: _Raw) -> ViewBatch:
        views = make_views(
            raw.images, self.views, seed=self.seed, step=step, slots=raw.items["slot"], label_maps=raw.label_maps
        )
        labels = dict(raw.labels)
        if views.label_map is not None:
            labels["label_map"] = views.label_map
        return ViewBatch(views.views, views.geometry, raw.items, labels, step, self.seed)


class _Threads:
    """A few daemon threads that fulfil futures.

    Not ``ThreadPoolExecutor``: the interpreter waits for its threads at exit, and so would a run whose disk hangs.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count
        for index in range(count):
            threading.Thread(target=self._work, name=f"medssl-batch-{index}", daemon=True).start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the batch
                future.set_exception(error)
