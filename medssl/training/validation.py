"""Choosing the best step of a training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from medssl.core.types import Method
from medssl.training.config import TrainingConfig
from medssl.training.guards import Largest
from medssl.training.resume import Progress

Validate = Callable[[Method, int], float]


class Validation:
    """When a training is validated, and what is kept of the best step.

    Args:
        validate: ``validate(method, step) -> score``, larger is better; every process calls it.
        settings: Budget and ``validate_every``.
        largest: Largest value over processes.
    """

    def __init__(self, validate: Validate, settings: TrainingConfig, largest: Largest) -> None:
        self._validate, self._largest, self._steps = validate, largest, settings.steps
        self.last_step: int | None = None
        if settings.validate_every is not None:
            self._every = settings.validate_every
        else:
            self._every = 100 if settings.steps is None else max(1, settings.steps // 20)

    def due(self, done: int) -> bool:
        """Whether to validate after ``done`` steps. With a budget in seconds the last step is not known here."""
        return done == self._steps or done % self._every == 0

    def run(self, method: Method, progress: Progress) -> float:
        """Score the method in evaluation mode; ``progress`` gets its weights if it is the best until now."""
        method.eval()
        with torch.no_grad():
            score = float(self._validate(method, progress.step))
        method.train()
        score = self._largest([score])[0]
        self.last_step = progress.step
        best = progress.best_score
        if score == score and (best is None or score > best):  # NaN is never the best
            progress.best_step, progress.best_score = progress.step, score
            progress.best = {name: v.detach().to("cpu", copy=True) for name, v in method.state_dict().items()}
        return score
