"""Figure of all results of an age-site evaluation: age error and site accuracy of every arm and layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from matplotlib.axes import Axes

from medssl.reporting.age_site_results import Result, results_of, short
from medssl.reporting.drawing import BASELINE_COLOUR, COLOURS, INK, Picture, new_figure, style, svg_bytes
from medssl.reporting.text import finite, number

MAX_RESULTS: Final = 40


def all_results(summary: Mapping[str, Any]) -> Picture | None:
    """Age error and site accuracy of every arm and layer with their intervals, sorted by age error."""
    results = [r for r in results_of(summary) if r.value("mae_internal") is not None]
    if len(results) < 2:
        return None
    results.sort(key=lambda r: r.value("mae_internal") or 0.0)
    shown = [r for i, r in enumerate(results) if i < MAX_RESULTS or r.arm == str(summary.get("baseline"))]
    outside = any(r.value("mae_external") is not None for r in shown)
    with style():
        figure = new_figure(1.1 + 0.19 * len(shown))
        left, right = figure.subplots(1, 2, sharey=True)
        for y, result in enumerate(shown):
            colour = BASELINE_COLOUR if result.arm == str(summary.get("baseline")) else COLOURS[0]
            _dot(left, y - 0.14 * outside, result, "mae_internal", colour, "o", True)
            _dot(left, y + 0.2, result, "mae_external", COLOURS[1], "s", False)
            _dot(right, y, result, "bacc", colour, "o", True)
        lines = floors(right, summary, "v")
        left.set_yticks(range(len(shown)), [short(r) for r in shown], fontsize=8)
        left.set_ylim(len(shown) - 0.4, -0.6)
        left.set_xlabel("age error, MAE (years)")
        right.set_xlabel("site accuracy (balanced)")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
        handles = [left.plot([], [], "o", color=COLOURS[0], label="seen sites")[0]]
        handles += [left.plot([], [], "s", mfc="white", color=COLOURS[1], label="unseen sites")[0]] * outside
        figure.legend(handles=[*handles, *lines], loc="outside upper center", ncols=2, fontsize=8.5)
        content = svg_bytes(figure)
    hidden = (
        f" {len(results) - len(shown)} results with a larger error are not drawn." if len(results) > len(shown) else ""
    )
    grey = " Grey: the baseline." if any(r.arm == str(summary.get("baseline")) for r in shown) else ""
    caption = f"Sorted by age error at seen sites. Bars are 95 % intervals over people; left is better.{grey}{hidden}"
    alt = "Age error in years and site accuracy: " + "; ".join(
        f"{short(r)} {number(r.value('mae_internal'), 2)} and {number(r.value('bacc'))}" for r in shown
    )
    return Picture("all-results", content, "svg", alt, caption, "Age error and site accuracy of every result")


def _dot(axes: Axes, y: float, result: Result, name: str, colour: str, marker: str, filled: bool) -> None:
    x, ends = result.value(name), result.interval(f"{name}_ci")
    if x is None:
        return
    if ends:
        axes.plot(ends, [y, y], color=colour, lw=1.4, solid_capstyle="butt")
    axes.plot(x, y, marker, ms=5, color=colour, mfc=colour if filled else "white", mew=1.2)


def floors(axes: Axes, summary: Mapping[str, Any], direction: str) -> list[Any]:
    """Lines (``h`` or ``v``) at chance and at what true age alone gives; returns them for a legend."""
    draw = axes.axhline if direction == "h" else axes.axvline
    known = (("chance", "chance", (0, (1, 1.5))), ("age_only", "site from true age alone", (0, (5, 3))))
    return [
        draw(value, color=INK, lw=1.1, ls=dash, label=f"{label} ({number(value)})")
        for name, label, dash in known
        if (value := finite(summary.get(name))) is not None
    ]
