"""What both halves of the demo share: notes, the folder's marker, stages, and how a half ends."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from medssl.core.errors import ConfigError, DataError
from medssl.core.files import write_json
from medssl.runs import cohort as cohorts

log = logging.getLogger(__name__)

MARKER: Final = "demo.json"
SYNTHETIC: Final = "These are synthetic data: drawn by a program, not patients. Nothing here says anything about MRI."
SMOKE: Final = "SMOKE TEST: a handful of steps, to see that everything runs. Its numbers mean nothing."

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Half:
    """How one half of the demo ended.

    Attributes:
        name: cardiac or brain.
        verdict: The sentence to begin with.
        lines: What else belongs to it.
        table: Lines of a table for a terminal.
        report: Its page.
        seconds: Of this start; what an earlier one had finished is not in it.
        summary: For machines.
        commands: How each step is run by hand, from the folder in which the demo was started.
    """

    name: str
    verdict: str
    lines: tuple[str, ...]
    table: tuple[str, ...]
    report: Path
    seconds: float
    summary: Mapping[str, Any]
    commands: tuple[str, ...]


def status(smoke: bool) -> str:
    """What every report says about its numbers."""
    return f"{SMOKE} {SYNTHETIC}" if smoke else SYNTHETIC


def claim(out: Path, settings: Any) -> None:
    """Take a new or empty folder, or one that the demo began with the same settings (a dataclass).

    Raises:
        ConfigError: The folder holds something else, or a demo with other settings; nothing in it was touched.
    """
    marker = out / MARKER
    mine = json.loads(json.dumps(asdict(settings)))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        write_json(marker, mine)
        return
    fix = "name a new or empty folder with --out"
    if not marker.is_file():
        raise ConfigError("the folder holds something else; nothing in it was touched", where=str(out), fix=fix)
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the record of the demo cannot be read", where=str(marker), found=str(error), fix=fix
        ) from error
    if found != mine:
        raise ConfigError(
            "the folder holds a demo with other settings (such as --smoke, or of another version); "
            "nothing in it was touched",
            where=str(out),
            fix=fix,
        )
    log.info("going on with the demo in %s: what is finished is not repeated", out)


def checked(manifest: Path) -> None:
    """Read every generated volume, so that damage is found before anything is trained.

    Raises:
        DataError: A volume has been changed or damaged.
    """
    found = cohorts.check(manifest, deep=True, jobs=1, mapping={}, out=None)
    if found.n_errors:
        raise DataError(
            "the generated volumes have been changed or damaged",
            where=str(manifest),
            found=found.text(),
            fix="name a new or empty folder with --out",
        )


def yaml_path(path: Path) -> str:
    """A path as a YAML string, whatever characters it holds."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def shell(path: Path) -> str:
    """A path as a word of a shell."""
    return shlex.quote(str(path))


@contextmanager
def one_thread() -> Iterator[None]:
    """These networks are so small that a second thread costs more than it brings; cells run side by side instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stages(name: str, total: int) -> Iterator[Stage]:
    """Yields a function that announces a stage, with the time since the beginning."""
    begun, number = time.monotonic(), 0

    def stage(title: str) -> None:
        nonlocal number
        number += 1
        log.info("[%4.0f s] %s %d/%d: %s", time.monotonic() - begun, name, number, total, title)

    yield stage
