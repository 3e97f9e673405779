"""Watching embeddings for collapse."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from medssl.training.config import TrainingConfig


def embedding_spread(embedding: Tensor) -> float:
    """Mean over dimensions of the standard deviation of unit rows, times sqrt(D).

    1 for directions spread evenly over the sphere, 0 when all rows point the same way (Chen and He 2021,
    arXiv:2011.10566, Fig. 2). ``embedding`` is (rows, D); 0 for fewer than two rows.
    """
    if len(embedding) < 2:
        return 0.0
    unit = torch.nn.functional.normalize(embedding.detach().double().flatten(1), dim=1)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred (rows, D) embedding.

    Roy and Vetterli 2007, "The effective rank". Between 1 and min(rows - 1, D); 0 when all rows are equal.
    """
    centred = embedding.detach().double().flatten(1)
    centred = centred - centred.mean(dim=0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    if total <= 1e-12:
        return 0.0
    share = values / total
    return float(torch.exp(-(share * torch.log(share.clamp_min(1e-300))).sum()))


@dataclass
class CollapseAlarm:
    """Raises its voice once the spread stays below a threshold for several looks in a row.

    Attributes:
        threshold, checks: From the settings.
        below: Looks in a row below the threshold until now (kept in checkpoints).
        alarms: One line per alarm; a new one only after the spread had recovered.
    """

    threshold: float
    checks: int
    below: int = 0
    alarms: list[str] = field(default_factory=list)

    @classmethod
    def from_settings(cls, settings: TrainingConfig) -> CollapseAlarm:
        """The alarm that the settings describe."""
        return cls(settings.collapse_spread, settings.collapse_checks)

    def look(self, step: int, spread: float) -> str | None:
        """Take note of a spread; the alarm's line when it goes off."""
        self.below = self.below + 1 if spread < self.threshold else 0
        if self.below != self.checks:
            return None
        line = (
            f"embedding collapsed: spread {spread:.4f} < {self.threshold:g} at {self.checks} looks in a row, "
            f"up to step {step}"
        )
        self.alarms.append(line)
        return line
