"""Watching a training for collapse, and naming which one it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from medssl.training.config import TrainingConfig

CONSTANT: Final = "constant embedding"
RANK: Final = "dimensional collapse"
CHANCE: Final = "loss at chance"
DEAD: Final = "dead prototypes"
ADVICE: Final[Mapping[str, str]] = {
    CONSTANT: "try a lower learning rate, batch norm in the heads, or a slower teacher where there is one",
    RANK: "try a larger batch, stronger views or a wider projection",
    CHANCE: "try a longer training, a higher learning rate, another temperature or weaker views",
    DEAD: "try fewer prototypes, a larger batch or queue, or a lower learning rate of the prototypes",
}
_CHANCE, _USED, _NUMBER = "chance_loss", "used_prototypes", "n_prototypes"
WATCHED_LOGS: Final = frozenset({_CHANCE, _USED})
"""What a method logs for these looks, beside its embedding."""


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


def collapse_signs(
    settings: TrainingConfig, *, logs: Mapping[str, float | Tensor], embedding: Tensor | None, items: int
) -> tuple[dict[str, str], dict[str, float]]:
    """The signs of collapse that a batch shows.

    - Constant embedding: the spread is below ``collapse_spread``.
    - Dimensional collapse (Jing et al. 2022, arXiv:2110.09348): the effective rank is below ``collapse_rank``, or below
      half of what the rows and columns of the embedding allow where that is less.
    - Loss at chance: it is within ``collapse_chance`` of ``chance_loss``, the loss of a uniform guess. Below 1 nat the
      share is one of 1 nat.
    - Dead prototypes: the items prefer fewer than ``collapse_prototypes`` of the prototypes that as many independent
      uniform choices would be expected to hit, K (1 - (1 - 1/K)^items) of K, or a single one. K is ``n_prototypes``
      where the method logs it, else exp(chance_loss).

    Args:
        settings: The limits; a limit of 0 turns its sign off.
        logs: Of the step: ``loss`` (of a method under a regulariser also ``main_loss``), ``chance_loss``,
            ``used_prototypes`` (share of K in [0, 1]) and ``n_prototypes`` (K) where the method has them.
        embedding: (rows, D), or None.
        items: Of the global batch.

    Returns:
        The evidence of each sign, and what was measured on the way.
    """
    signs: dict[str, str] = {}
    measured: dict[str, float] = {}
    if embedding is not None and len(embedding) > 1:
        spread, rank = embedding_spread(embedding), effective_rank(embedding)
        measured = {"spread": spread, "effective_rank": rank}
        possible = min(len(embedding) - 1, embedding[0].numel())
        limit = min(settings.collapse_rank, possible / 2)
        if spread < settings.collapse_spread:
            signs[CONSTANT] = f"spread {spread:.4f} < {settings.collapse_spread:g}"
        elif rank < limit:
            signs[RANK] = f"effective rank {rank:.2f} < {limit:g}, where {possible} is possible"
    numbers = {name: _number(logs[name]) for name in ("loss", "main_loss", _CHANCE, _USED, _NUMBER) if name in logs}
    chance, used = numbers.get(_CHANCE), numbers.get(_USED)
    if chance is not None:
        loss = numbers.get("main_loss", numbers["loss"])
        if abs(loss - chance) < settings.collapse_chance * max(1.0, chance):
            signs[CHANCE] = f"loss {loss:.4f}, a uniform guess has {chance:.4f}"
    if used is not None and settings.collapse_prototypes > 0:
        guess = math.exp(chance) if chance is not None else 0.0
        expected, single = _even_use(round(numbers.get(_NUMBER, guess)), items)
        if used < settings.collapse_prototypes * expected or used <= single:
            signs[DEAD] = f"items prefer {100 * used:.2g} % of the prototypes; evenly, {100 * expected:.2g} % would be"
    return signs, measured


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _even_use(k: int, items: int) -> tuple[float, float]:
    """Share of K prototypes that an even choice hits, and that of a single one; 1 and 0 where K is not known."""
    if k < 2:
        return 1.0, 0.0
    if items < 2:
        return 0.0, 0.0
    return 1 - (1 - 1 / k) ** items, 1.5 / k


@dataclass
class CollapseAlarm:
    """Raises its voice once a sign of collapse shows at several looks in a row.

    Attributes:
        settings: The limits.
        seen: Looks in a row that showed each sign until now (kept in checkpoints, as all below).
        alarms: The line of each sign that has gone off and is still there.
        recovered: Lines of signs that went away again.
    """

    settings: TrainingConfig
    seen: dict[str, int] = field(default_factory=dict)
    alarms: dict[str, str] = field(default_factory=dict)
    recovered: list[str] = field(default_factory=list)

    def look(self, step: int, signs: Mapping[str, str]) -> list[str]:
        """Take note of the signs after ``step`` steps; the lines of those that go off now."""
        for sign in [sign for sign in self.alarms if sign not in signs]:
            self.recovered.append(f"{self.alarms.pop(sign)}; gone at step {step}")
        self.seen = {sign: self.seen.get(sign, 0) + 1 for sign in signs}
        checks = self.settings.collapse_checks
        lines = {
            sign: f"{sign}: {evidence}, at {checks} looks in a row up to step {step}; {ADVICE[sign]}"
            for sign, evidence in signs.items()
            if self.seen[sign] == checks
        }
        self.alarms |= lines
        return list(lines.values())

    def state(self) -> dict[str, object]:
        """As JSON."""
        return {"seen": dict(self.seen), "alarms": dict(self.alarms), "recovered": list(self.recovered)}
