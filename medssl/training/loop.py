"""The one loop that trains any method, and goes on exactly where it was stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
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
from medssl.training.device import Batch, LossModule, largest_anywhere, seed_networks
from medssl.training.guards import check_finite_state, check_losses, no_memory, out_of_memory
from medssl.training.lock import RunLock
from medssl.training.logs import MetricsLog, ProgressLine
from medssl.training.monitors import WATCHED_LOGS, CollapseAlarm, collapse_signs
from medssl.training.optimizers import build_optimizer, schedule_factor
from medssl.training.refreshing import Refreshes
from medssl.training.result import TrainResult
from medssl.training.resume import Progress, restore, snapshot
from medssl.training.signals import StopFlag
from medssl.training.source import BatchSource
from medssl.training.validation import Validation

log = logging.getLogger(__name__)

OnEvent = Callable[[str, Mapping[str, Any]], None]
SYNC_EVERY_ON_GPU = 10
LINGER_S = 5.0
"""Fabric's launcher kills the first process as soon as another ends with a code that is not 0; when a run is
interrupted the others therefore leave last, so that the first can say that the run can be resumed."""


class Loop:
    """One training in progress: the objects it works with, and ``progress``, which checkpoints hold."""

    seed: int
    run_dir: Path
    stop: StopFlag
    lock: RunLock
    validation: Validation | None
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
        self.progress = Progress(alarm=CollapseAlarm(settings))
        self.first = fabric.is_global_zero
        self.sync_every = 1 if fabric.device.type == "cpu" else SYNC_EVERY_ON_GPU
        self.losses: list[tuple[int, Tensor]] = []
        self.waited = 0.0
        self.saved_step: int | None = None
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
            collapse=list(self.progress.alarm.alarms.values()),
            recovered=list(self.progress.alarm.recovered),
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
        if self.settings.seconds is None or self.validation is None or self.progress.step == self.first_step:
            return
        if self.validation.last_step != self.progress.step:
            self._log(self.progress.step, {"validation": self._validate(self.validation)})

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
        if watched:
            values |= self._look(done, values, embedding)
        if self.validation is not None and self.validation.due(done):
            values["validation"] = self._validate(self.validation)
        if done % settings.log_every == 0 or done == 1 or last or watched or "validation" in values:
            self._log(done, values)
        if settings.checkpoint_every is not None and done % settings.checkpoint_every == 0:
            self._save()

    def _look(
        self, done: int, values: Mapping[str, float | Tensor], embedding: Tensor | None
    ) -> dict[str, float | Tensor]:
        if embedding is None and not WATCHED_LOGS & values.keys():
            return {}
        self._check_losses()  # singular values of what is not finite would fail first, and name nothing
        items = self.source.sampler.batch_size
        signs, measured = collapse_signs(self.settings, logs=values, embedding=embedding, items=items)
        lines = self.progress.alarm.look(done, signs)
        for line in lines:
            log.warning("%s", line)
            self._say("collapse", step=done, message=line)
        return {**measured, "collapse_alarm": float(bool(lines))}

    def _validate(self, validation: Validation) -> float:
        self._check_losses()
        score = validation.run(self.method, self.progress)
        self._say("validated", step=self.progress.step, score=score)
        return score

    def _log(self, done: int, values: dict[str, float | Tensor]) -> None:
        if self.metrics is None:
            return
        elapsed = {"seconds": round(self._elapsed(), 3), "data_wait_share": round(self._wait_share(), 4)}
        self.metrics.add(done, {**values, **elapsed})

    def _check_losses(self) -> None:
        losses, self.losses = self.losses, []
        check_losses(losses, self.source, self.run_dir, self.largest)

    def _agree(self) -> None:
        """What processes must do together: stop, save, and know the time. Waits for the device."""
        self._check_losses()
        minutes = self.settings.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        flags = [float(self.stop.raised is not None), float(due and self.first), self._elapsed()]
        stopping, due_anywhere, self.progress.seconds = self.largest(flags)
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

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each value over processes."""
        return largest_anywhere(values, self.fabric.device)

    def _save(self) -> Path:
        path = self.checkpoints.folder / f"step-{self.progress.step}"
        if self.saved_step == self.progress.step:
            return path
        self._check_losses()
        check_finite_state(self.method, self.progress.step)
        self.progress.seconds = self.largest([self._elapsed()])[0]
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
