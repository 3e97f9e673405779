"""What an age-site evaluation found: its rows by arm and layer, and which of them are looked at one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from medssl.reporting.text import clean, excludes_zero, finite

NAME: Final = 26
SIGNIFICANCE: Final = 0.05
SITE_DIGITS: Final = 3  # with 60 sites chance is 0.017
METRICS: Final[Mapping[str, str]] = {
    "mae_internal": "age error at seen sites (MAE, years)",
    "mae_external": "age error at unseen sites (MAE, years)",
    "bacc": "site accuracy (balanced)",
    "score": "score",
}


@dataclass(frozen=True, eq=False)
class Result:
    """One row of ``eval/age_site.json``: an arm, the layer that was probed, and its figures."""

    arm: str
    layer: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``arm (layer)`` as it may be shown."""
        return f"{clean(self.arm, 40)} ({clean(self.layer, 16)})"

    @property
    def family(self) -> str:
        """The arm without its site term."""
        return str(self.values.get("family") or self.arm)

    @property
    def raw(self) -> bool:
        """True for the input features themselves, probed without an encoder."""
        return not self.values.get("method")

    @property
    def debias(self) -> Mapping[str, Any]:
        """Name, weight and layer of the site term; empty without one."""
        found = self.values.get("debias")
        return found if isinstance(found, Mapping) else {}

    @property
    def plain(self) -> bool:
        """True when nothing was done about the site."""
        return not self.debias and not self.values.get("combat")

    def value(self, name: str) -> float | None:
        """A figure; None when it is not known."""
        return finite(self.values.get(name))

    def interval(self, name: str) -> tuple[float, float] | None:
        """The two ends of an interval such as ``bacc_ci``; None when one is not known."""
        found = self.values.get(name)
        ends = [finite(end) for end in found] if isinstance(found, (list, tuple)) and len(found) == 2 else [None, None]
        return (ends[0], ends[1]) if ends[0] is not None and ends[1] is not None else None


def short(result: Result) -> str:
    """Arm and layer where there is little room; a long name loses its middle, as its end often holds a weight."""
    arm = clean(result.arm)
    arm = arm if len(arm) <= NAME else f"{arm[: NAME // 2]}…{arm[1 - NAME // 2 :]}"
    return f"{arm} ({clean(result.layer, 8)})"


def results_of(summary: Mapping[str, Any]) -> list[Result]:
    """Every arm and layer, in the order of the run."""
    return [Result(str(row["arm"]), str(row["layer"]), row) for row in summary.get("rows") or []]


def people_of(people: pd.DataFrame, result: Result) -> pd.DataFrame:
    """The rows of one arm and layer."""
    return people[(people["arm"] == result.arm) & (people["layer"] == result.layer)]


def lowest(results: Sequence[Result], measure: Callable[[Result], float | None]) -> Result | None:
    """The result with the smallest ``measure``; None when it is known of none."""
    known = [(value, i) for i, result in enumerate(results) if (value := measure(result)) is not None]
    return results[min(known)[1]] if known else None


def balance(result: Result) -> float | None:
    """Age error and site accuracy in one number: the score, or the same formula with the error at seen sites."""
    score, mae, bacc = (result.value(name) for name in ("score", "mae_internal", "bacc"))
    if score is not None or mae is None or bacc is None:
        return score
    return mae * float(max(bacc, 0.0) ** 0.3)


def chosen(summary: Mapping[str, Any]) -> list[Result]:
    """The results that are drawn one by one: the baseline, the lowest age error, the best balance with the site."""
    results = results_of(summary)
    best = lowest(results, lambda r: r.value("mae_internal"))
    base = [r for r in results if r.arm == str(summary.get("baseline"))]
    layer = best.layer if best else ""
    base.sort(key=lambda r: r.layer != layer)
    picked = [*base[:1], best, lowest(results, balance), *results[:1]]
    return list(dict.fromkeys(r for r in picked if r is not None))[:3] if results else []


def before_after(results: Sequence[Result]) -> list[Result]:
    """An arm without and with something done about the site: the best balanced one and what it started from."""
    treated = [r for r in results if not r.plain]
    after = lowest(treated, balance) or (treated[0] if treated else None)
    if after is None:
        best = lowest(results, balance)
        return [best] if best else list(results[:1])
    before = [r for r in results if r.plain and r.layer == after.layer]
    before = [r for r in before if r.family == after.family] or [r for r in before if r.raw] or before
    return [*before[:1], after]


def paired_reading(row: Mapping[str, Any]) -> str:
    """``lower``, ``higher`` or ``no difference shown``: by the p value after Holm, else by the interval."""
    corrected = finite(row.get("p_holm"))
    shown = excludes_zero(with_ends(row)) if corrected is None else corrected < SIGNIFICANCE
    difference = finite(row.get("difference"))
    if not shown or not difference:
        return "no difference shown"
    return "higher" if difference > 0 else "lower"


def with_ends(row: Mapping[str, Any]) -> dict[str, Any]:
    """A paired row whose interval ``ci`` is also in ``low`` and ``high``."""
    ci = row.get("ci")
    low, high = ci if isinstance(ci, (list, tuple)) and len(ci) == 2 else (row.get("low"), row.get("high"))
    return {**row, "low": low, "high": high}
