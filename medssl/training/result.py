"""What comes out of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training; the method itself holds the weights (the best ones where there was a validation).

    Attributes:
        steps: Steps done, over all resumptions.
        seconds: Seconds of training, over all resumptions.
        data_wait_share: Share of this process's time spent waiting for batches.
        best_step, best_score: Of the validation; None without one.
        collapse: One line for each sign of collapse that was there at the end.
        recovered: One line for each that went away again.
        last: Values of the last logged row.
        skipped: Checkpoints that could not be trusted when resuming.
    """

    steps: int
    seconds: float
    data_wait_share: float
    best_step: int | None = None
    best_score: float | None = None
    collapse: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    last: Mapping[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
