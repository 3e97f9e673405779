"""What a run leaves behind while it goes: ``metrics.csv``, TensorBoard, and a line for whoever watches."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor

from medssl.core.files import atomic_write, explain_disk_errors

log = logging.getLogger(__name__)


class MetricsLog:
    """``metrics.csv``: one row a logged step, empty where a step has no such value.

    Values may be tensors on the device; they are fetched together on ``flush``, so that logging waits for nothing.

    Args:
        path: The file.
        after: Rows of later steps are cut (those after the checkpoint that a run resumes from).
        tensorboard: Also write TensorBoard events into this folder.
    """

    def __init__(self, path: Path, *, after: int = 0, tensorboard: Path | None = None) -> None:
        self.path = path
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._columns: list[str] = []
        self._writer: Any = None
        self._cut(after)
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(tensorboard), purge_step=after + 1)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and whole rows; a row that a kill cut short is left out."""
        if not self.path.is_file():
            return [], []
        text = self.path.read_text(encoding="utf-8")
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        if not rows:
            return [], []
        return rows[0], [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit()]

    def _cut(self, after: int) -> None:
        self._columns, rows = self._rows()
        if self._columns:
            self._replace([row for row in rows if int(row[0]) <= after])

    def _replace(self, rows: list[list[str]]) -> None:
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([self._columns, *rows])
        atomic_write(self.path, content.getvalue())

    def add(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Note the values of a step; ``flush`` writes them."""
        kept = {
            name: value.detach().reshape(()) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        self._pending.append((step, kept))

    def flush(self) -> dict[str, float]:
        """Write what was noted; returns the last row's values."""
        if not self._pending:
            return {}
        rows = _fetch(self._pending)
        self._pending = []
        names = list(dict.fromkeys(name for _, values in rows for name in values))
        new = [name for name in names if name not in self._columns]
        if new:
            known = self._columns or ["step"]
            _, old = self._rows()
            self._columns = [*known, *(name for name in new if name != "step")]
            self._replace([row + [""] * (len(self._columns) - len(row)) for row in old])
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        for step, values in rows:
            writer.writerow([step, *(_cell(values.get(name)) for name in self._columns[1:])])
        with explain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(content.getvalue())
        if self._writer is not None:
            for step, values in rows:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        return rows[-1][1]

    def sync(self) -> None:
        """Flush to the disk itself; before a checkpoint, so that no row of an earlier step can be lost."""
        self.flush()
        if self._writer is not None:
            self._writer.flush()
        if self.path.is_file():
            with explain_disk_errors(self.path), self.path.open("a") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        if self._writer is not None:
            self._writer.close()


def _fetch(pending: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, float]]]:
    """Values as floats, with one copy from the device for all of them."""
    tensors = [value for _, values in pending for value in values.values() if isinstance(value, Tensor)]
    fetched = iter(torch.stack([t.double().to(tensors[0].device) for t in tensors]).tolist() if tensors else [])
    return [
        (step, {name: next(fetched) if isinstance(value, Tensor) else value for name, value in values.items()})
        for step, values in pending
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else repr(float(value)) if not isinstance(value, int) else str(value)


class ProgressLine:
    """One live line on a terminal; off it, a plain line every half minute.

    Args:
        total_steps: Budget; None when it is in seconds.
        total_seconds: Budget in seconds, or None.
        show: Whether this process shows anything (the first one).
        every_s: Seconds between plain lines.
    """

    def __init__(
        self, total_steps: int | None, total_seconds: float | None, *, show: bool = True, every_s: float = 30.0
    ) -> None:
        self.total_steps, self.total_seconds, self.show, self.every_s = total_steps, total_seconds, show, every_s
        self._begun = self._said = time.monotonic()
        self._first = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, step: int, seconds: float) -> None:
        """Begin at ``step`` with ``seconds`` of training already done."""
        self._first, self._seconds_before = step, seconds
        self._begun = self._said = time.monotonic()
        if self.show and sys.stderr.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self._task = self._bar.add_task("training", total=self.total_steps, completed=step, text="")
            self._bar.start()

    def update(self, step: int, loss: float, wait_share: float) -> None:
        """Show where training is."""
        if not self.show:
            return
        now = time.monotonic()
        if self._bar is None and now - self._said < self.every_s:
            return
        text = self._text(step, loss, wait_share, now - self._begun)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            log.info("step %d%s, %s", step, f" of {self.total_steps}" if self.total_steps else "", text)
            self._said = now

    def _text(self, step: int, loss: float, wait_share: float, elapsed: float) -> str:
        rate = (step - self._first) / max(elapsed, 1e-9)
        left = math.inf
        if self.total_steps is not None and rate > 0:
            left = (self.total_steps - step) / rate
        elif self.total_seconds is not None:
            left = max(0.0, self.total_seconds - self._seconds_before - elapsed)
        shown = "" if math.isinf(left) else f", {timedelta(seconds=int(left))} left"
        return f"loss {loss:.4f}, {rate:.1f} steps/s, {100 * wait_share:.0f} % waiting for data{shown}"

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
