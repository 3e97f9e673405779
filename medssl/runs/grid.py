"""Many small runs of one kind, resumable: a finished cell is never computed again."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Final, Protocol, TypeVar

import torch

from medssl.core.errors import ConfigError, Interrupted, MedsslError
from medssl.core.files import atomic_write, write_json
from medssl.training.signals import StopFlag

log = logging.getLogger(__name__)

Result = dict[str, Any]
_BEGUN = "begun.txt"
_LOOK_S = 0.5
"""Seconds between looks at the flag that asks to stop."""
_SAY_S = 5.0
"""Seconds between lines about the cells, of which there may be hundreds of a second each."""


NOT_RESULT_TRAINING: Final = frozenset(
    {"workers", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard", "log_every"}
)
"""Settings of `training` that change where and how fast a cell is computed, but not its result."""


class GridCell(Protocol):
    """What a grid asks of its cells: a frozen dataclass of plain values with a name that is safe as a folder."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Folder name of the cell, another for every cell."""


AnyCell = TypeVar("AnyCell", bound=GridCell)


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: an arm, a number of labelled volumes, a draw of them and a seed."""

    arm: str
    n_labelled: int
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Folder name of the cell."""
        return f"{self.arm}-n{self.n_labelled}-draw{self.draw}-seed{self.seed}"


def fingerprint(value: Any) -> str:
    """Short hash of what determines a cell's result (anything JSON can hold)."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_keys(folder: Path, keys: Mapping[AnyCell, str], *, allow_changed: bool = False) -> None:
    """Refuse to go on with a grid of which some cells were computed or begun with other settings.

    Args:
        folder: Parent of the cells' folders.
        keys: Per cell the fingerprint of its settings.
        allow_changed: Let cells pass that were begun, but not finished.

    Raises:
        ConfigError: Before anything is touched.
    """
    for cell, key in keys.items():
        begun = folder / cell.name / _BEGUN
        if finished(folder / cell.name, key) is not None or allow_changed or not begun.is_file():
            continue
        if begun.read_text(encoding="utf-8").strip() != key:
            raise ConfigError(
                "a cell of this grid was begun with other settings or data",
                where=str(folder / cell.name),
                fix="restore them, choose another run name, or accept the change with --allow-changed",
            )


def finished(folder: Path, key: str) -> Result | None:
    """The result of a cell, if it was finished with the same settings.

    Raises:
        ConfigError: The cell was finished with other settings; mixing them in one table would be wrong.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored_key, result = stored["key"], stored["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); the cell is computed again", path, error)
        return None
    if stored_key != key:
        raise ConfigError(
            "a finished cell of this grid was computed with other settings or data",
            where=str(folder),
            fix="choose another run name, or delete the cell's folder to compute it again",
        )
    return dict(result)


def run_grid(
    cells: Sequence[AnyCell],
    run_cell: Callable[[AnyCell, Path], Result],
    folder: Path,
    *,
    keys: Mapping[AnyCell, str],
    jobs: int = 1,
    failures: dict[AnyCell, Exception] | None = None,
) -> dict[AnyCell, Result]:
    """Compute every cell that is not finished yet.

    Args:
        cells: In the order in which they are begun.
        run_cell: Picklable when ``jobs`` is above 1; gets the cell and its folder, returns what ``result.json`` holds.
        folder: Parent of the cells' folders.
        keys: Per cell the fingerprint of its settings.
        jobs: Processes; each computes one cell at a time with one thread.
        failures: Gets the error of each cell that fails, and the others go on; None: the first failure ends the grid.

    Returns:
        The result of every cell that has one, in the order of ``cells``.

    Raises:
        Interrupted: A cell was asked to stop; it and those not begun are computed by a resumed run.
        MedsslError: The first failure, after the cells that were running have ended; never with ``failures``.
    """
    results: dict[AnyCell, Result] = {}
    waiting = []
    for cell in cells:
        done = finished(folder / cell.name, keys[cell])
        if done is None:
            waiting.append(cell)
        else:
            results[cell] = done
    if results:
        log.info("%d of %d cells are finished already", len(results), len(cells))
    with StopFlag() as stop:
        if jobs > 1 and len(waiting) > 1:
            results |= _in_parallel(waiting, run_cell, folder, keys, jobs, stop, failures)
            return {cell: results[cell] for cell in cells if cell in results}
        said = _Said(len(waiting))
        for number, cell in enumerate(waiting):
            check_stop(stop)
            said.line(number, f"begins {cell.name}")
            try:
                results[cell] = _compute(run_cell, cell, folder / cell.name, keys[cell])
            except Exception as error:
                _keep_or_raise(error, cell, failures)
    return {cell: results[cell] for cell in cells if cell in results}


def _keep_or_raise(error: Exception, cell: AnyCell, failures: dict[AnyCell, Exception] | None) -> None:
    """Note the failure of one cell, where the grid goes on without it; being asked to stop is none."""
    if failures is None or isinstance(error, (Interrupted, BrokenExecutor)):
        raise error
    known = isinstance(error, MedsslError)  # anything else is a fault, whose place must not get lost
    log.error("%s failed: %s", cell.name, error, exc_info=None if known else error)
    failures[cell] = error


class _Said:
    """A line now and then: how many cells are done, and when the others will be."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.last = total, monotonic(), float("-inf")

    def line(self, done: int, what: str) -> None:
        now = monotonic()
        if now - self.last < _SAY_S and done < self.total:
            return
        self.last = now
        left = f", {(now - self.begun) / done * (self.total - done):.0f} s left" if 0 < done < self.total else ""
        log.info("%d of %d cells done, %s%s", done, self.total, what, left)


def check_stop(stop: StopFlag) -> None:
    """End the run where it was asked to stop.

    Raises:
        Interrupted: Resumable.
    """
    if stop.raised is not None:
        raise Interrupted(
            f"stopped because of {stop.raised.name}; finished cells and saved states are kept",
            fix="go on with --resume",
        )


def _compute(run_cell: Callable[[AnyCell, Path], Result], cell: AnyCell, folder: Path, key: str) -> Result:
    atomic_write(folder / _BEGUN, key + "\n")
    result = run_cell(cell, folder)
    write_json(folder / "result.json", {"key": key, "cell": asdict(cell), "result": result})
    return result


def _compute_alone(run_cell: Callable[[AnyCell, Path], Result], cell: AnyCell, folder: Path, key: str) -> Result:
    torch.set_num_threads(1)
    return _compute(run_cell, cell, folder, key)


def _in_parallel(
    waiting: Sequence[AnyCell],
    run_cell: Callable[[AnyCell, Path], Result],
    folder: Path,
    keys: Mapping[AnyCell, str],
    jobs: int,
    stop: StopFlag,
    failures: dict[AnyCell, Exception] | None,
) -> dict[AnyCell, Result]:
    results: dict[AnyCell, Result] = {}
    said = _Said(len(waiting))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_compute_alone, run_cell, cell, folder / cell.name, keys[cell]): cell for cell in waiting
        }
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                check_stop(stop)
                for future in done:
                    cell = futures[future]
                    try:
                        results[cell] = future.result()
                    except Exception as error:
                        _keep_or_raise(error, cell, failures)
                    said.line(len(futures) - len(pending), f"finished {cell.name}")
        except BaseException as error:
            for future in futures:
                future.cancel()
            if isinstance(error, (Interrupted, KeyboardInterrupt)):
                # Workers that train save their state at this signal; without it they would go on without a parent.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
            raise
    return results
