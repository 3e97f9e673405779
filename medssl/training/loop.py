"""The one loop that trains any method, and goes on exactly where it was stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from medssl.core import distributed
from medssl.core.errors import CheckpointError, Interrupted
from medssl.core.seeding import MODEL, derive_seed
from medssl.core.types import Method
from medssl.training.checkpoint import Checkpoints
from medssl.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from medssl.training.device import Batch, LossModule, build_fabric, seed_networks
from medssl.training.guards import check_finite_state, check_losses, no_memory, out_of_memory
from medssl.training.lock import RunLock
from medssl.training.logs import MetricsLog, ProgressLine
from medssl.training.monitors import CollapseAlarm, effective_rank, embedding_spread
from medssl.training.optimizers import build_optimizer, schedule_factor
from medssl.training.refreshing import Refreshes
from medssl.training.resume import Progress, restore, snapshot
from medssl.training.signals import StopFlag
from medssl.training.source import BatchSource

log = logging.getLogger(__name__)

Validate = Callable[[Method, int], float]
OnEvent = Callable[[str, Mapping[str, Any]], None]
SYNC_EVERY_ON_GPU = 10
LINGER_S = 5.0
"""Fabric's launcher kills the first process as soon as another ends with a code that is not 0; when a run is
interrupted the others therefore leave last, so that the first can say that the run can be resumed."""


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training; the method itself holds the weights (the best ones where there was a validation).

    Attributes:
        steps: Steps done, over all resumptions.
        seconds: Seconds of training, over all resumptions.
        data_wait_share: Share of this process's time spent waiting for batches.
        best_step, best_score: Of the validation; None without one.
        collapse: One line per collapse alarm.
        last: Values of the last logged row.
        skipped: Checkpoints that could not be trusted when resuming.
    """

    steps: int
    seconds: float
    data_wait_share: float
    best_step: int | None = None
    best_score: float | None = None
    collapse: list[str] = field(default_factory=list)
    last: Mapping[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


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
        loop = _Loop(method, source, settings, optimizer or OptimizerConfig(), schedule or ScheduleConfig(), fabric)
        loop.seed, loop.run_dir, loop.stop, loop.lock = seed, run_dir, stop, lock
        loop.keeps_state = checkpoints
        loop.validate, loop.on_event, loop.fingerprint = validate, on_event, dict(fingerprint or {})
        stack.callback(loop.close)
        loop.open(resume=resume, allow_changed=allow_changed)
        return loop.run()


class _Loop:
    """One training in progress: the objects it works with, and ``progress``, which checkpoints hold."""

    seed: int
    run_dir: Path
    stop: StopFlag
    lock: RunLock
    validate: Validate | None
    on_event: OnEvent | None
    fingerprint: dict[str, Any]
    keeps_state: bool

    def __init__(
        self,
        method: Method,
        source: BatchSource,
        settings: TrainingConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        fabric: Fabric,
    ) -> None:
        self.method, self.source, self.settings, self.fabric = method, source, settings, fabric
        self.optimizer_config, self.schedule = optimizer, schedule
        self.model: Any = LossModule(method)
        self.optimizer = build_optimizer(self.model, optimizer, fused=fabric.device.type == "cpu")
        self.model, self.fabric_optimizer = fabric.setup(self.model, self.optimizer)
        source.place(fabric.device, fabric.global_rank, fabric.world_size)
        self.progress = Progress(alarm=CollapseAlarm.from_settings(settings))
        self.first = fabric.is_global_zero
        self.sync_every = 1 if fabric.device.type == "cpu" else SYNC_EVERY_ON_GPU
        self.losses: list[tuple[int, Tensor]] = []
        self.waited = 0.0
        self.saved_step: int | None = None
        self.validated_step: int | None = None
        self.metrics: MetricsLog | None = None
        self.last: dict[str, float] = {}
        self.skipped: list[str] = []
        self.shown = ProgressLine(settings.steps, settings.seconds, show=self.first)

    # -- beginning and end ----------------------------------------------------------------------------------------

    def open(self, *, resume: bool, allow_changed: bool) -> None:
        """Find where to go on, and open the logs there."""
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", keep=self.settings.keep)
        if self.first:
            self.checkpoints.clean()
        distributed.barrier()
        if not resume and self.checkpoints.steps():
            raise CheckpointError(
                "the run folder holds checkpoints of an earlier training",
                where=str(self.checkpoints.folder),
                fix="go on with --resume, or choose another name",
            )
        if resume:
            found = restore(self, allow_changed=allow_changed)
            if found is not None:
                self.saved_step, self.skipped = found.step, found.skipped
        self.total = float("inf") if self.settings.steps is None else float(self.settings.steps)
        self.refreshes = Refreshes(self.method, self.source, self.optimizer, self.settings.steps)
        self.refreshes.follow()
        self.begun = self.saved_at = time.monotonic()
        self.seconds_before = self.progress.seconds
        if self.first:
            folder = self.run_dir / "tensorboard" if self.settings.tensorboard else None
            self.metrics = MetricsLog(
                self.run_dir / "logs" / "metrics.csv", after=self.progress.step, tensorboard=folder
            )
        self._say("started", step=self.progress.step)

    def close(self) -> None:
        """Let go of threads and files, whatever happened."""
        self.shown.stop()
        self.source.close()
        if self.metrics is not None:
            self.metrics.close()

    def run(self) -> TrainResult:
        """Step until the budget is spent."""
        self.method.train()
        self.first_step = self.progress.step
        self.shown.start(self.progress.step, self.progress.seconds)
        self._agree()
        while not self._done():
            self._step(self.progress.step)
            if self.progress.step % self.sync_every == 0 or self._asked_alone():
                self._agree()
        self._check_losses()
        self._validate_end()
        self._save()
        if self.progress.best is not None:
            self.method.load_state_dict(self.progress.best)
        result = TrainResult(
            steps=self.progress.step,
            seconds=self.progress.seconds,
            data_wait_share=self._wait_share(),
            best_step=self.progress.best_step,
            best_score=self.progress.best_score,
            collapse=list(self.progress.alarm.alarms),
            last=self.last,
            skipped=self.skipped,
        )
        self._say("finished", step=result.steps, seconds=result.seconds)
        return result

    def _asked_alone(self) -> bool:
        """Whether to stop now: a single process has nobody to agree with, however rarely it waits for its device."""
        return self.stop.raised is not None and distributed.world_size() == 1

    def _validate_end(self) -> None:
        """With a budget in seconds nobody knows which step is the last before it is done."""
        if self.settings.seconds is None or self.validate is None or self.progress.step == self.first_step:
            return
        if self.validated_step != self.progress.step:
            self._log(self.progress.step, {"validation": self._validate(self.progress.step)})

    def _done(self) -> bool:
        if self.settings.seconds is not None:
            return self.progress.seconds >= self.settings.seconds
        return self.progress.step >= self.total

    # -- one step -------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        due = self.refreshes.due(step, self._share())
        if due > self.progress.refreshes:
            self._check_losses()  # names the items of a bad step by the sampler that drew them
            self.refreshes.run()
            self.progress.refreshes = due
            self._say("refresh", step=step)
        waiting = time.perf_counter()
        rate = self._set_rate(step)
        try:
            batch = self.source.batch(step, until=self._horizon(step))
            self.waited += time.perf_counter() - waiting
            seed_networks(derive_seed(self.seed, MODEL, step + 1, self.fabric.global_rank), self.fabric.device)
            loss, logs, embedding = self.model(Batch(batch))
            self.losses.append((step, loss.detach()))
            if self.sync_every == 1:
                self._check_losses()  # before the weights see it
            self.fabric_optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
        except (RuntimeError, MemoryError) as error:
            if step == self.first_step and out_of_memory(error):
                raise no_memory(error, self.fabric.device, self.source.sampler.batch_size) from error
            raise
        values: dict[str, float | Tensor] = {"learning_rate": rate, "loss": loss, **logs}
        if self.optimizer_config.clip_norm is not None:
            weights = [weight for weight in self.method.parameters() if weight.grad is not None]
            values["gradient_norm"] = torch.nn.utils.clip_grad_norm_(weights, self.optimizer_config.clip_norm)
        self.fabric_optimizer.step()
        self.progress.step = step + 1
        self.method.after_optimizer_step(self._share())
        self._after(step + 1, values, embedding)

    def _horizon(self, step: int) -> int | None:
        """The first later step that must not be prepared ahead: a refresh may change what it is."""
        if self.settings.steps is None:
            return step + 1 + self.source.prefetch  # a refresh drops what was prepared
        refresh = self.refreshes.next(step)
        return self.settings.steps if refresh is None else min(refresh, self.settings.steps)

    def _set_rate(self, step: int) -> float:
        total = self.total
        if self.settings.seconds is not None:
            total = step / self._share() if step and self._share() > 0 else float("inf")
        rate = self.optimizer_config.learning_rate * schedule_factor(self.schedule, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _share(self) -> float:
        """Share of the budget that is spent."""
        if self.settings.seconds is not None:
            return min(1.0, self.progress.seconds / self.settings.seconds)
        return self.progress.step / self.total

    # -- what happens between steps -------------------------------------------------------------------------------

    def _after(self, done: int, values: dict[str, float | Tensor], embedding: Tensor | None) -> None:
        settings = self.settings
        last = settings.steps is not None and done == settings.steps
        watched = done % settings.monitor_every == 0
        if watched and embedding is not None:
            self._check_losses()  # singular values of what is not finite would fail first, and name nothing
            values |= self._look(done, embedding)
        if self.validate is not None and (last or done % self._validate_every() == 0):
            values["validation"] = self._validate(done)
        if done % settings.log_every == 0 or done == 1 or last or watched or "validation" in values:
            self._log(done, values)
        if settings.checkpoint_every is not None and done % settings.checkpoint_every == 0:
            self._save()

    def _validate_every(self) -> int:
        if self.settings.validate_every is not None:
            return self.settings.validate_every
        return max(1, self.settings.steps // 20) if self.settings.steps is not None else 100

    def _look(self, done: int, embedding: Tensor) -> dict[str, float | Tensor]:
        spread = embedding_spread(embedding)
        line = self.progress.alarm.look(done, spread)
        if line is not None:
            log.warning("%s", line)
            self._say("collapse", step=done, message=line)
        return {
            "spread": spread,
            "effective_rank": effective_rank(embedding),
            "collapse_alarm": float(line is not None),
        }

    def _validate(self, done: int) -> float:
        assert self.validate is not None
        self._check_losses()
        self.method.eval()
        with torch.no_grad():
            score = float(self.validate(self.method, done))
        self.method.train()
        score = self._largest([score])[0]
        self.validated_step = done
        best = self.progress.best_score
        if score == score and (best is None or score > best):  # NaN is never the best
            self.progress.best_step, self.progress.best_score = done, score
            self.progress.best = {name: v.detach().to("cpu", copy=True) for name, v in self.method.state_dict().items()}
        self._say("validated", step=done, score=score)
        return score

    def _log(self, done: int, values: dict[str, float | Tensor]) -> None:
        if self.metrics is None:
            return
        elapsed = {"seconds": round(self._elapsed(), 3), "data_wait_share": round(self._wait_share(), 4)}
        self.metrics.add(done, {**values, **elapsed})

    def _check_losses(self) -> None:
        losses, self.losses = self.losses, []
        check_losses(losses, self.source, self.run_dir, self._largest)

    def _agree(self) -> None:
        """What processes must do together: stop, save, and know the time. Waits for the device."""
        self._check_losses()
        minutes = self.settings.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        flags = [float(self.stop.raised is not None), float(due and self.first), self._elapsed()]
        stopping, due_anywhere, self.progress.seconds = self._largest(flags)
        if self.metrics is not None:
            self.last = self.metrics.flush() or self.last
            self.lock.beat()
            self.shown.update(self.progress.step, self.last.get("loss", float("nan")), self._wait_share())
        if stopping and not self._done():
            path = self._save()
            if not self.first:
                time.sleep(LINGER_S)
            cause = self.stop.raised.name if self.stop.raised else "a signal to another process"
            kept = "the state was saved" if self.keeps_state else "this training begins again when the run is resumed"
            raise Interrupted(
                f"stopped at step {self.progress.step} because of {cause}; {kept}",
                where=str(path if self.keeps_state else self.run_dir),
                fix="go on with --resume",
            )
        if due_anywhere:
            self._save()

    def _largest(self, values: list[float]) -> list[float]:
        """The largest of each value over processes."""
        if distributed.world_size() == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.fabric.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        found: list[float] = tensor.tolist()
        return found

    def _save(self) -> Path:
        path = self.checkpoints.folder / f"step-{self.progress.step}"
        if self.saved_step == self.progress.step:
            return path
        self._check_losses()
        check_finite_state(self.method, self.progress.step)
        self.progress.seconds = self._largest([self._elapsed()])[0]
        if self.metrics is not None:
            self.last = self.metrics.flush() or self.last
        if not self.keeps_state:
            return path
        if self.metrics is not None:
            self.metrics.sync()
        if self.first:
            tensors, info = snapshot(self)
            self.checkpoints.save(self.progress.step, tensors, info)
        distributed.barrier()
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        self._say("checkpoint", step=self.progress.step, path=str(path))
        return path

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.begun

    def _wait_share(self) -> float:
        return self.waited / max(time.monotonic() - self.begun, 1e-9)

    def _say(self, name: str, **values: Any) -> None:
        if self.on_event is not None and self.first:
            self.on_event(name, values)
