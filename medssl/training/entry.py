"""Training any method, from outside."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from medssl.core.types import Method
from medssl.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from medssl.training.device import build_fabric
from medssl.training.lock import RunLock
from medssl.training.loop import Loop, OnEvent
from medssl.training.result import TrainResult
from medssl.training.signals import StopFlag
from medssl.training.source import BatchSource
from medssl.training.validation import Validate, Validation


def train(
    method: Method,
    source: BatchSource,
    settings: TrainingConfig,
    *,
    seed: int,
    run_dir: Path,
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig | None = None,
    fabric: Fabric | None = None,
    resume: bool = False,
    allow_changed: bool = False,
    checkpoints: bool = True,
    fingerprint: Mapping[str, Any] | None = None,
    validate: Validate | None = None,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Train ``method`` and leave its weights in it.

    Random numbers that a network draws itself (dropout) come from torch's global generator, which is seeded from
    (seed, step, rank) before each step; everything else is a pure function of (seed, step) already. A resumed run
    therefore equals an undisturbed one bit for bit on the same machine, versions and thread count.

    Args:
        method: What to train; moved to the device.
        source: Makes the batch of any step; placed on the device and rank found here.
        settings: Budget, device, checkpoints, logs, monitors.
        seed: The run's seed.
        run_dir: Gets ``checkpoints/``, ``logs/metrics.csv``, ``run.lock`` and, if asked for, ``tensorboard/``.
        optimizer, schedule: How weights are updated; None: the defaults.
        fabric: A launched Fabric; None: built from ``settings``.
        resume: Go on from the newest checkpoint that can be trusted; begin where there is none.
        allow_changed: Resume although ``fingerprint`` changed.
        checkpoints: False: nothing is saved, and an interruption loses this training. For one of seconds among
            hundreds, which is done again as a whole.
        fingerprint: JSON that must not change over a resumption (configuration, hash of the manifest); settings of
            the training section that do not touch the result are left out of the comparison.
        validate: ``validate(method, step) -> score``, larger is better; the best step's weights are kept and put
            back at the end. Every process calls it.
        on_event: Called as ``on_event(name, values)`` on the first process: started, checkpoint, validated,
            collapse, refresh, finished.

    Raises:
        ConfigError: A device or precision that is not there; nothing trainable.
        CheckpointError: Another process writes this run, the run changed, or no checkpoint can be trusted.
        TrainingError: A loss that is not finite, or no memory at the first step.
        DiskError: A checkpoint or log could not be written; earlier checkpoints are untouched.
        Interrupted: SIGTERM, SIGINT or SIGUSR2; the state was saved, if ``checkpoints``.
    """
    with StopFlag() as stop, ExitStack() as stack:
        fabric = build_fabric(settings) if fabric is None else fabric
        lock = RunLock(run_dir)
        if fabric.is_global_zero:
            stack.enter_context(lock)
        loop = Loop(method, source, settings, optimizer or OptimizerConfig(), schedule or ScheduleConfig(), fabric)
        loop.seed, loop.run_dir, loop.stop, loop.lock = seed, run_dir, stop, lock
        loop.keeps_state = checkpoints
        loop.on_event, loop.fingerprint = on_event, dict(fingerprint or {})
        loop.validation = None if validate is None else Validation(validate, settings, loop.largest)
        stack.callback(loop.close)
        loop.open(resume=resume, allow_changed=allow_changed)
        return loop.run()
