"""The score that a fine-tuning is judged by: its name, unit and direction, as the run's summary states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from medssl.reporting.text import clean, finite, number, signed, spread


@dataclass(frozen=True)
class Metric:
    """A score of people.

    Attributes:
        name: Of ``summary["metric"]``.
        title: In words.
        column: Of ``per_case.csv`` whose mean over people it is.
        higher: Whether a higher value is better.
        unit: "" for a share.
        digits: Decimals that are shown.
    """

    name: str
    title: str
    column: str
    higher: bool = True
    unit: str = ""
    digits: int = 3

    @property
    def axis(self) -> str:
        """Title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: Any) -> str:
        """A value without its unit."""
        return number(value, self.digits)

    def spread(self, mean: Any, sd: Any) -> str:
        """A mean and its standard deviation."""
        return spread(mean, sd, self.digits)

    def difference(self, value: Any) -> str:
        """A difference with its sign, without its unit."""
        return signed(value, self.digits)

    @property
    def measure(self) -> str:
        """What stands after a number: ``Dice``, ``years MAE``."""
        return f"{self.unit} {self.title}".strip()

    @property
    def good(self) -> str:
        """The word for a better value."""
        return "higher" if self.higher else "lower"

    @property
    def bad(self) -> str:
        """The word for a worse value."""
        return "lower" if self.higher else "higher"

    def better(self, difference: float) -> bool:
        """Whether a difference to a baseline is in the right direction."""
        return (difference > 0) == self.higher and difference != 0


METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        one.name: one
        for one in (
            Metric("dice", "Dice", "dice"),
            Metric("mae", "MAE", "abs_error", higher=False, digits=2),
            Metric("balanced_accuracy", "balanced accuracy", "balanced"),
        )
    }
)


def metric_of(summary: Mapping[str, Any]) -> Metric:
    """The metric of a run, Dice where the summary names none that is known."""
    known = METRICS.get(str(summary.get("metric")), METRICS["dice"])
    unit = summary.get("unit")
    return replace(known, unit=clean(unit, 20)) if isinstance(unit, str) and unit else known


def reference_of(summary: Mapping[str, Any]) -> tuple[float, str] | None:
    """What needs no network: its score and what it is."""
    found = summary.get("reference")
    value = finite(found.get("value")) if isinstance(found, Mapping) else None
    return None if value is None else (value, clean(found.get("what", "reference"), 60))
