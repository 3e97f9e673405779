"""Checkpoints that a kill, a full disk or a flipped bit cannot take away.

A checkpoint is a folder ``step-N`` with ``state.safetensors``, ``trainer.json`` and ``SHA256SUMS``. It is written as
``step-N.tmp``, flushed to the disk and renamed; ``last`` names the newest. Older ones are deleted only after the new
one was read back and its sums verified. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
from torch import Tensor

from medssl.core.errors import CheckpointError
from medssl.core.files import atomic_write, explain_disk_errors, require_space

log = logging.getLogger(__name__)

STATE: Final = "state.safetensors"
INFO: Final = "trainer.json"
SUMS: Final = "SHA256SUMS"
_STEP: Final = re.compile(r"step-(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint.

    Attributes:
        step: Steps that were done.
        tensors: By name, on the CPU.
        info: What ``trainer.json`` holds.
        skipped: One line for each newer checkpoint that could not be trusted.
    """

    step: int
    tensors: dict[str, Tensor]
    info: dict[str, Any]
    skipped: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints`` in the run folder; made when missing.
        keep: Newest ones that are kept. The best weights need none of their own: every checkpoint carries them.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, verified or not, newest first."""
        if not self.folder.is_dir():
            return []
        names = [_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted((int(match.group(1)) for match in names if match), reverse=True)

    def clean(self) -> None:
        """Remove what a killed process left half written. Only while holding the run's lock."""
        if self.folder.is_dir():
            for path in self.folder.glob("*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
        """Write one checkpoint; the earlier ones stay until it has been verified.

        Raises:
            DiskError: No space, or no permission; every earlier checkpoint is untouched.
            CheckpointError: What was read back is not what was written.
        """
        contents = {
            STATE: safetensors.torch.save(dict(tensors)),
            INFO: json.dumps(dict(info), indent=1, allow_nan=False).encode(),
        }
        contents[SUMS] = _sums(contents)
        target = self.folder / f"step-{step}"
        temporary = self.folder / f"step-{step}.tmp"
        require_space(self.folder, 2 * sum(map(len, contents.values())), what="a checkpoint (twice its size)")
        try:
            with explain_disk_errors(target):
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove(temporary)
                temporary.mkdir()
                for name, content in contents.items():
                    _write(temporary / name, content)
                _sync_folder(temporary)
                if target.exists():  # resumed from before it, because it could not be trusted
                    target.replace(_unused(self.folder / f"step-{step}.old.tmp"))
                temporary.replace(target)
                _sync_folder(self.folder)
        except BaseException:
            _remove(temporary)
            raise
        self._verify(step)
        atomic_write(self.folder / "last", f"step-{step}\n")
        _sync_folder(self.folder)
        self._prune(step)
        return target

    def _verify(self, step: int) -> None:
        try:
            _read(self.folder / f"step-{step}")
        except CheckpointError as error:
            raise CheckpointError(
                "a checkpoint was written, but reads back differently; earlier ones were kept",
                where=str(self.folder / f"step-{step}"),
                found=error.message,
                fix="check the disk",
            ) from error

    def _prune(self, newest: int) -> None:
        """Keep the newest; steps beyond ``newest`` are leftovers that could not be trusted when the run resumed."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][: self.keep]
        for step in steps:
            if step not in kept:
                # Renamed first, so that a kill in the middle of deleting leaves no half checkpoint under a good name.
                doomed = _unused(self.folder / f"step-{step}.old.tmp")
                (self.folder / f"step-{step}").replace(doomed)
                shutil.rmtree(doomed)
        for path in self.folder.glob("*.old.tmp"):
            _remove(path)

    def load(self, step: int | None = None) -> Loaded | None:
        """The newest checkpoint whose sums verify (or that of ``step``); None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, but none can be trusted.
        """
        skipped: list[str] = []
        steps = self.steps() if step is None else [step]
        for candidate in steps:
            path = self.folder / f"step-{candidate}"
            try:
                contents = _read(path)
                tensors, info = _parse(path, contents)
            except CheckpointError as error:
                line = f"checkpoint {path.name} skipped: {error.message}"
                log.warning("%s", line)
                skipped.append(line)
                continue
            return Loaded(candidate, tensors, info, skipped)
        if not steps:
            return None
        raise CheckpointError(
            "no checkpoint of this run can be trusted",
            where=str(self.folder),
            found="; ".join(skipped),
            fix="begin again in a new run folder",
        )


def _sums(contents: Mapping[str, bytes]) -> bytes:
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in (STATE, INFO)]
    return "".join(lines).encode()


def _read(path: Path) -> dict[str, bytes]:
    """Every member of a checkpoint, with sums verified."""
    contents = {}
    for name in (STATE, INFO, SUMS):
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})", where=str(path)) from error
    if contents[SUMS] != _sums(contents):
        raise CheckpointError("its checksums do not match", where=str(path))
    return contents


def _parse(path: Path, contents: Mapping[str, bytes]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        info = json.loads(contents[INFO])
        tensors = safetensors.torch.load(contents[STATE])
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"its content is not valid ({error})", where=str(path)) from error
    if not isinstance(info, dict):
        raise CheckpointError(f"{INFO} holds no mapping", where=str(path))
    return tensors, info


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    _remove(path)
    return path


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Lines ``place: before -> now`` for each leaf in which two JSON values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        lines = []
        for key in [*before, *(key for key in now if key not in before)]:
            lines += differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        return lines
    return [] if before == now else [f"{place}: {before!r} -> {now!r}"]
