"""The folder of one run: created once, never overwritten, always telling what state the run is in."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import medssl
from medssl.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from medssl.core.files import atomic_write, write_json
from medssl.data.manifest import Manifest, write_manifest

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_PACKAGES = ("torch", "monai", "lightning-fabric", "nibabel", "SimpleITK", "numpy", "scipy", "pandas", "scikit-learn")


def open_run(root: Path, name: str, *, kind: str, config_text: str, manifest: Manifest, resume: bool) -> Path:
    """Create the folder of a run, or take up an existing one, of which nothing is changed yet.

    Args:
        root: Folder of all runs.
        name: Name of this run: letters, digits, ``.``, ``_`` and ``-``.
        kind: The verb ("pretrain", "finetune").
        config_text: The resolved configuration as YAML.
        manifest: The rows that the run uses; a copy is kept.
        resume: Go on in an existing folder; a missing one is begun, and so is one whose run was refused before it
            began.

    Raises:
        ConfigError: A name that is no name, a folder that exists already, or one that belongs to another kind of run.
    """
    folder = run_folder(root, name)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("there is a file where the run folder would be", where=str(folder), fix="choose another name")
    status = read_status(folder)
    refused = _refused_before_training(folder, status)
    if folder.exists() and any(folder.iterdir()) and not refused:
        if not resume:
            raise ConfigError(
                "the run folder exists already; nothing in it was touched",
                where=str(folder),
                fix="go on with --resume, or choose another name (--set name=...)",
            )
        if status.get("kind", kind) != kind:
            raise ConfigError(f"this folder holds a {status['kind']} run", where=str(folder), fix="choose another name")
    if refused:
        (folder / "status.json").unlink()  # the time of the refusal is not this run's
    if refused or not (folder / "config.yaml").is_file():
        record_run(folder, config_text=config_text, manifest=manifest)
    return folder


def _refused_before_training(folder: Path, status: Mapping[str, Any]) -> bool:
    """Whether an earlier run of this name was refused and left nothing but its record: it may begin anew, mended."""
    record = {"config.yaml", "environment.json", "manifest.csv", "manifest.meta.yaml", "status.json"}
    return status.get("state") == "failed" and {path.name for path in folder.iterdir()} <= record


def record_run(folder: Path, *, config_text: str, manifest: Manifest) -> None:
    """Write what a run is made of; of a resumed one only once it is known that it really goes on."""
    atomic_write(folder / "config.yaml", config_text)
    write_json(folder / "environment.json", environment())
    # Paths that hold from the run folder, whatever folder the command was run in.
    table = manifest.relocated(folder / "manifest.csv")
    write_manifest(table, manifest.meta, folder / "manifest.csv")


def run_folder(root: Path, name: str) -> Path:
    """``root / name``, with names that could leave ``root`` refused."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"`{name}` cannot be the name of a run", fix="use letters, digits, `.`, `_` and `-`, at most 128"
        )
    return root / name


def read_status(folder: Path) -> dict[str, Any]:
    """The content of ``status.json``; empty when there is none."""
    path = folder / "status.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("status.json of the run cannot be read", where=str(path), found=str(error)) from error
    return content if isinstance(content, dict) else {}


@contextmanager
def tracked(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Keep ``status.json`` true while a run goes on: running, then done, interrupted or failed (with the cause).

    A resumption that is refused leaves the status as it was.

    Yields:
        A dictionary; what is put into it is written with the final state.
    """
    before = read_status(folder)
    begun = time.monotonic()
    seconds_before = float(before.get("seconds", 0.0))
    info: dict[str, Any] = {}
    base = {"kind": kind, "started": before.get("started", _now()), "pid": os.getpid()}
    write_json(folder / "status.json", {**base, "state": "running", "seconds": seconds_before})

    def finish(state: str, **extra: Any) -> None:
        seconds = round(seconds_before + time.monotonic() - begun, 2)
        write_json(
            folder / "status.json", {**base, "state": state, "finished": _now(), "seconds": seconds, **info, **extra}
        )

    try:
        yield info
    except (Interrupted, KeyboardInterrupt):
        finish("interrupted")
        raise
    except (ConfigError, DataError, CheckpointError) as error:
        if before:
            write_json(folder / "status.json", before)
        else:
            _finish_failed(finish, error)
        raise
    except BaseException as error:
        _finish_failed(finish, error)
        raise
    finish("done")


def _finish_failed(finish: Any, error: BaseException) -> None:
    """Record the failure; when even that cannot be written (a full disk) the first error must still reach the user."""
    try:
        finish("failed", error=str(error).splitlines()[0] if str(error) else type(error).__name__)
    except Exception as second:  # noqa: BLE001
        log.warning("status.json could not be updated: %s", second)


def environment() -> dict[str, Any]:
    """Versions, device and threads that a result depends on; no names of hosts or people."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "medssl": medssl.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
