"""Figures of the results of an age-site evaluation: all arms and layers, and the trade-off of age against site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes

from medssl.reporting.age_site_results import NAME, Result, results_of, short
from medssl.reporting.drawing import BASELINE_COLOUR, COLOURS, INK, Picture, arm_looks, new_figure, style, svg_bytes
from medssl.reporting.text import clean, finite, number

MAX_RESULTS: Final = 40
MAX_LAYERS: Final = 3
MAX_WEIGHTS_NAMED: Final = 14  # more of them would cover each other
_LAYERS: Final[Mapping[str, str]] = {"z": "projection z", "h": "encoder output h", "input": "input features"}
_DASHES: Final = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def layer_title(layer: str) -> str:
    """A layer in words."""
    return _LAYERS.get(layer, clean(layer, 30))


def all_results(summary: Mapping[str, Any]) -> Picture | None:
    """Age error and site accuracy of every arm and layer with their intervals, sorted by age error."""
    results = [r for r in results_of(summary) if r.value("mae_internal") is not None]
    if len(results) < 2:
        return None
    results.sort(key=lambda r: r.value("mae_internal") or 0.0)
    shown = results[:MAX_RESULTS]
    outside = any(r.value("mae_external") is not None for r in shown)
    with style():
        figure = new_figure(1.1 + 0.19 * len(shown))
        left, right = figure.subplots(1, 2, sharey=True)
        for y, result in enumerate(shown):
            colour = BASELINE_COLOUR if result.arm == str(summary.get("baseline")) else COLOURS[0]
            _dot(left, y - 0.14 * outside, result, "mae_internal", colour, "o", True)
            _dot(left, y + 0.2, result, "mae_external", COLOURS[1], "s", False)
            _dot(right, y, result, "bacc", colour, "o", True)
        _floors(right, summary, "v")
        left.set_yticks(range(len(shown)), [short(r) for r in shown], fontsize=8)
        left.set_ylim(len(shown) - 0.4, -0.6)
        left.set_xlabel("age error, MAE (years)")
        right.set_xlabel("site accuracy (balanced)")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
        handles = [left.plot([], [], "o", color=COLOURS[0], label="seen sites")[0]]
        handles += [left.plot([], [], "s", mfc="white", color=COLOURS[1], label="unseen sites")[0]] * outside
        handles += right.get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=8.5)
        content = svg_bytes(figure)
    hidden = f" {len(results) - len(shown)} results with a larger error are not drawn." if len(results) > 40 else ""
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


def _floors(axes: Axes, summary: Mapping[str, Any], direction: str) -> None:
    """Lines at chance and at what true age alone gives; they widen the axis where it would end before them."""
    draw = axes.axhline if direction == "h" else axes.axvline
    for name, label, dash in (
        ("chance", "chance", (0, (1, 1.5))),
        ("age_only", "site from true age alone", (0, (5, 3))),
    ):
        value = finite(summary.get(name))
        if value is not None:
            draw(value, color=INK, lw=1.1, ls=dash, label=f"{label} ({number(value)})")


def trade_off(summary: Mapping[str, Any]) -> Picture | None:
    """Site accuracy against age error over the weight of the site term, one panel per layer, one line per family."""
    results = [r for r in results_of(summary) if r.value("mae_internal") is not None and r.value("bacc") is not None]
    raw = [r for r in results if r.raw]
    encoded = [r for r in results if not r.raw]
    if not results:
        return None
    layers = list(dict.fromkeys(r.layer for r in encoded or raw))[:MAX_LAYERS]
    families = list(dict.fromkeys(r.family for r in encoded))
    colours = {family: look[0] for family, look in arm_looks(families, []).items()}
    terms = list(dict.fromkeys(_term(r) for r in encoded if not r.plain))
    with style():
        figure = new_figure(0.7 + 0.2 * (1 + (len(families) + len(terms)) // 3) + 3.1 * len(layers))
        panels = figure.subplots(len(layers), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        for axes, layer in zip(panels, layers):
            own = [r for r in encoded if r.layer == layer]
            _floors(axes, summary, "h")
            for family in families:
                _family(axes, [r for r in own if r.family == family], colours[family], terms, len(own))
            for result in raw:
                _point(axes, result, INK, "X" if result.values.get("combat") else "*", 11)
            axes.set_title(layer_title(layer), loc="left")
            axes.set_ylabel("site accuracy (balanced)")
            axes.grid(axis="both", visible=True)
            axes.margins(0.08)
        panels[-1].set_xlabel("age error at seen sites, MAE (years)")
        figure.legend(handles=_legend(panels[0], colours, terms, raw), loc="outside upper center", ncols=3, fontsize=8)
        content = svg_bytes(figure)
    weighted = any(finite(r.debias.get("weight")) is not None for r in encoded)
    named = " Small numbers are its weights." if weighted and len(encoded) <= MAX_WEIGHTS_NAMED * len(layers) else ""
    joins = (
        " A line joins the results of one family in the order of the weight of its site term, starting without one "
        f"(circle).{named}"
    )
    caption = (
        f"Down and to the left is better.{joins if terms else ''} Bars are 95 % intervals over people. What keeps age "
        "cannot be expected below the dashed line."
    )
    alt = "Site accuracy against age error in years. " + "; ".join(
        f"{short(r)}: {number(r.value('bacc'))} at {number(r.value('mae_internal'), 2)}" for r in results[:MAX_RESULTS]
    )
    return Picture("trade-off", content, "svg", alt, caption, "Age error against site accuracy")


def _term(result: Result) -> str:
    """What was done about the site, without its weight."""
    if result.debias:
        return f"{clean(result.debias.get('name'), 20)} on {clean(result.debias.get('on', 'h'), 8)}"
    return f"ComBat on {clean(result.values.get('combat'), 12)}" if result.values.get("combat") else ""


def _look(term: str, terms: Sequence[str]) -> tuple[str, Any]:
    i = terms.index(term)
    return ("s", "^", "D", "v", "P", "X")[i % 6], _DASHES[i % len(_DASHES)]


def _family(axes: Axes, own: Sequence[Result], colour: str, terms: Sequence[str], crowd: int) -> None:
    """The plain result of a family and one line per site term, over its weights."""
    plain = [r for r in own if r.plain]
    for term in terms:
        treated = sorted((r for r in own if _term(r) == term), key=lambda r: finite(r.debias.get("weight")) or 0.0)
        marker, dash = _look(term, terms)
        path = [*plain[:1], *treated] if treated else []
        x = [r.value("mae_internal") for r in path]
        axes.plot(x, [r.value("bacc") for r in path], color=colour, lw=1.3, ls=dash, alpha=0.8)  # type: ignore[arg-type]
        for result in treated:
            _point(axes, result, colour, marker, 5.5)
            weight = finite(result.debias.get("weight"))
            if weight is not None and crowd <= MAX_WEIGHTS_NAMED:
                place = result.value("mae_internal"), result.value("bacc")
                axes.annotate(
                    f"{weight:g}", place, xytext=(5, 4), textcoords="offset points", color=colour, fontsize=7.5
                )  # type: ignore[arg-type]
    for result in plain:
        _point(axes, result, colour, "o", 7)


def _point(axes: Axes, result: Result, colour: str, marker: str, size: float) -> None:
    x, y = result.value("mae_internal"), result.value("bacc")
    for ends, flat in ((result.interval("mae_internal_ci"), True), (result.interval("bacc_ci"), False)):
        if ends:
            axes.plot(ends if flat else [x, x], [y, y] if flat else ends, color=colour, lw=0.8, alpha=0.45)  # type: ignore[list-item]
    axes.plot(x, y, marker, ms=size, color=colour, mec="white", mew=0.6)  # type: ignore[arg-type]


def _legend(axes: Axes, colours: Mapping[str, str], terms: Sequence[str], raw: Sequence[Result]) -> list[Any]:
    handles = [axes.plot([], [], "o", color=c, label=clean(f, NAME))[0] for f, c in colours.items()]
    for term in terms:
        marker, dash = _look(term, terms)
        handles += axes.plot([], [], marker=marker, ls=dash, lw=1.3, color="#777777", label=term)
    if any(not r.values.get("combat") for r in raw):
        handles += axes.plot([], [], "*", ms=10, color=INK, label="input features")
    if any(r.values.get("combat") for r in raw):
        handles += axes.plot([], [], "X", ms=8, color=INK, label="input after ComBat")
    return handles + [h for h in axes.get_legend_handles_labels()[0] if "(" in str(h.get_label()) and h not in handles]
