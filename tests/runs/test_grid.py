import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from medssl.core.errors import ConfigError, Interrupted, TrainingError
from medssl.runs.grid import Cell, check_keys, run_grid

CELLS = [Cell("scratch", n, draw, 0) for draw in (1, 2) for n in (1, 2)]
KEYS = {cell: f"key of {cell.name}" for cell in CELLS}


@dataclass(frozen=True)
class Record:
    """Leaves a line for each cell that it computes; fails on request."""

    log: Path
    fails: str = ""

    def __call__(self, cell: Cell, folder: Path) -> dict[str, int]:
        with self.log.open("a") as file:
            file.write(cell.name + "\n")
        if cell.name == self.fails:
            raise TrainingError("the loss is not finite")
        return {"value": 10 * cell.n_labelled + cell.draw}


def computed(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.is_file() else []


def test_every_cell_is_computed_once_over_several_calls(tmp_path):
    record = Record(tmp_path / "log")
    first = run_grid(CELLS[:2], record, tmp_path / "cells", keys=KEYS)
    everything = run_grid(CELLS, record, tmp_path / "cells", keys=KEYS)
    assert computed(record.log) == [cell.name for cell in CELLS]
    assert everything == {cell: {"value": 10 * cell.n_labelled + cell.draw} for cell in CELLS}
    assert first == {cell: everything[cell] for cell in CELLS[:2]}


def test_failure_keeps_what_was_finished(tmp_path):
    record = Record(tmp_path / "log", fails=CELLS[2].name)
    with pytest.raises(TrainingError, match="not finite"):
        run_grid(CELLS, record, tmp_path / "cells", keys=KEYS)
    mended = Record(tmp_path / "second")
    assert len(run_grid(CELLS, mended, tmp_path / "cells", keys=KEYS)) == 4
    assert computed(mended.log) == [cell.name for cell in CELLS[2:]]


def test_cell_of_other_settings_is_refused_not_mixed(tmp_path):
    record = Record(tmp_path / "log")
    run_grid(CELLS[:1], record, tmp_path / "cells", keys=KEYS)
    changed = {**KEYS, CELLS[0]: "other settings"}
    for call in (check_keys, lambda folder, keys: run_grid(CELLS, record, folder, keys=keys)):
        with pytest.raises(ConfigError, match="other settings") as caught:
            call(tmp_path / "cells", changed)
        assert CELLS[0].name in caught.value.where
        assert caught.value.fix
    assert computed(record.log) == [CELLS[0].name]


def test_begun_cell_of_other_settings_is_refused_until_allowed(tmp_path):
    with pytest.raises(TrainingError):
        run_grid(CELLS, Record(tmp_path / "log", fails=CELLS[0].name), tmp_path / "cells", keys=KEYS)
    check_keys(tmp_path / "cells", KEYS)
    changed = {**KEYS, CELLS[0]: "other settings"}
    with pytest.raises(ConfigError, match="begun with other settings"):
        check_keys(tmp_path / "cells", changed)
    check_keys(tmp_path / "cells", changed, allow_changed=True)


@pytest.mark.parametrize("content", ["", '{"key": "ke', '["a list"]', "null"])
def test_damaged_result_is_computed_again(tmp_path, content):
    record = Record(tmp_path / "log")
    run_grid(CELLS[:1], record, tmp_path / "cells", keys=KEYS)
    path = tmp_path / "cells" / CELLS[0].name / "result.json"
    whole = path.read_text()
    path.write_text(content)
    run_grid(CELLS[:1], record, tmp_path / "cells", keys=KEYS)
    assert len(computed(record.log)) == 2
    assert json.loads(path.read_text()) == json.loads(whole)


@dataclass(frozen=True)
class Stops:
    """Asks its own run to stop in the middle of its first cell, as a scheduler would, and lasts for minutes after."""

    log: Path
    parent: int

    def __call__(self, cell: Cell, folder: Path) -> dict[str, int]:
        with self.log.open("a") as file:
            file.write(cell.name + "\n")
        os.kill(self.parent, signal.SIGTERM)
        time.sleep(0 if self.parent == os.getpid() else 200)
        return {"value": 0}


@pytest.mark.parametrize("jobs", [1, 2])
def test_asked_to_stop_no_further_cell_is_begun(tmp_path, jobs):
    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        run_grid(CELLS, Stops(tmp_path / "log", os.getpid()), tmp_path / "cells", keys=KEYS, jobs=jobs)
    assert "--resume" in caught.value.fix
    assert len(computed(tmp_path / "log")) <= jobs
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
