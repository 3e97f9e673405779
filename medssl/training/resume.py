"""What a checkpoint holds of a training, and going on from one."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from medssl.core import distributed
from medssl.core.errors import CheckpointError
from medssl.core.types import Method
from medssl.training.checkpoint import Checkpoints, Loaded, differences
from medssl.training.monitors import CollapseAlarm
from medssl.training.state import load_module, load_optimizer, module_tensors, optimizer_state, under

log = logging.getLogger(__name__)

FORMAT: Final = 2
# Settings of `training` that leave the result as it is; devices and threads are compared as the environment.
FREE: Final = frozenset(
    {
        "accelerator",
        "checkpoint_every",
        "checkpoint_minutes",
        "devices",
        "keep",
        "log_every",
        "nodes",
        "precision",
        "strategy",
        "tensorboard",
        "workers",
    }
)


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        alarm: Signs of collapse until now.
        step: Steps done.
        seconds: Seconds spent, over all resumptions.
        refreshes: Of the method, done until now.
        best_step, best_score: Of the validation.
        best: The method's state at the best step, on the CPU.
    """

    alarm: CollapseAlarm
    step: int = 0
    seconds: float = 0.0
    refreshes: int = 0
    best_step: int | None = None
    best_score: float | None = None
    best: dict[str, Tensor] | None = None


class Training(Protocol):
    """The parts of the loop that a checkpoint is made of."""

    method: Method
    optimizer: Optimizer
    progress: Progress
    fingerprint: dict[str, Any]
    fabric: Fabric
    checkpoints: Checkpoints
    seed: int


def snapshot(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of a training as it stands."""
    progress = training.progress
    tensors = module_tensors(training.method, "method")
    optimizer_tensors, optimizer_info = optimizer_state(training.optimizer)
    tensors |= optimizer_tensors
    tensors |= {f"best/{name}": value.contiguous() for name, value in (progress.best or {}).items()}
    info = {
        "format": FORMAT,
        "step": progress.step,
        "seconds": progress.seconds,
        "refreshes": progress.refreshes,
        "seed": training.seed,
        "best_step": progress.best_step,
        "best_score": progress.best_score,
        "alarm": progress.alarm.state(),
        "optimizer": optimizer_info,
        "fingerprint": training.fingerprint,
        "environment": _environment(training.fabric),
    }
    return tensors, info


def restore(training: Training, *, allow_changed: bool) -> Loaded | None:
    """Put a training where its newest trustworthy checkpoint was, and return that; None where there is none.

    Raises:
        CheckpointError: The run changed (with the differences), or no checkpoint can be trusted.
    """
    found = training.checkpoints.load(_agreed_step(training))
    if found is None:
        log.info("there is no checkpoint yet: training begins")
        return None
    info = found.info
    if info.get("format") != FORMAT:
        raise CheckpointError(f"a checkpoint of format {info.get('format')}, which this version does not read")
    _compare(training, info, allow_changed=allow_changed)
    load_module(training.method, found.tensors, "method")
    load_optimizer(training.optimizer, found.tensors, info["optimizer"])
    progress = training.progress
    progress.step, progress.seconds = found.step, float(info["seconds"])
    progress.refreshes = info["refreshes"]
    progress.best_step, progress.best_score = info["best_step"], info["best_score"]
    progress.best = under(found.tensors, "best") or None
    progress.alarm = CollapseAlarm(progress.alarm.settings, **info["alarm"])
    log.info("going on from step %d", found.step)
    return found


def _agreed_step(training: Training) -> int | None:
    """The step that the first process can trust, for all; None where one process decides alone."""
    if distributed.world_size() == 1:
        return None
    step = -1
    if distributed.rank() == 0:
        found = training.checkpoints.load()
        step = -1 if found is None else found.step
    agreed: int = training.fabric.broadcast(step)
    return None if agreed < 0 else agreed


def _compare(training: Training, info: dict[str, Any], *, allow_changed: bool) -> None:
    before = {**info["fingerprint"], "seed": info["seed"]}
    changed = [
        line
        for line in differences(before, {**training.fingerprint, "seed": training.seed})
        if not _is_free(line.split(":", 1)[0])
    ]
    if changed and not allow_changed:
        raise CheckpointError(
            "the run changed since its checkpoint was written, so going on would not continue it",
            where=str(training.checkpoints.folder),
            found="; ".join(changed),
            fix="restore these settings, or accept the change with --allow-changed",
        )
    if changed:
        log.warning("resuming a changed run: %s", "; ".join(changed))
    moved = differences(info["environment"], _environment(training.fabric))
    if moved:
        log.warning("resuming elsewhere, so results may differ in the last digits: %s", "; ".join(moved))


def _is_free(place: str) -> bool:
    parts = place.split(".")
    section, name = ".".join(parts[-2:-1]), parts[-1]
    return (section == "training" and name in FREE) or (section == "data" and name in ("cache", "jobs"))


def _environment(fabric: Fabric) -> dict[str, Any]:
    device = fabric.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": fabric.world_size,
        "precision": str(fabric._precision.precision),
    }
