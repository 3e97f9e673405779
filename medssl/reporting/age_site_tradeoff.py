"""The trade-off of an age-site evaluation: age error against site accuracy over the weight of the site term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes

from medssl.reporting.age_site_figures import floors
from medssl.reporting.age_site_results import NAME, Result, results_of, short
from medssl.reporting.drawing import COLOURS, INK, Picture, arm_looks, new_figure, style, svg_bytes
from medssl.reporting.text import clean, finite, number

MAX_TOGETHER: Final = 14  # results in one panel; with more, each family has its own
MAX_LAYERS: Final = 2
MAX_NAMED: Final = 40
REST: Final = "#cccccc"
_LAYERS: Final[Mapping[str, str]] = {"z": "projection z", "h": "encoder output h", "input": "input features"}
_DASHES: Final = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS: Final = ("s", "^", "D", "v", "P")


@dataclass(frozen=True)
class _Plan:
    """What is drawn where: one panel per entry of ``groups`` (families) and layer, with its colours."""

    groups: list[list[str]]
    layers: list[str]
    terms: list[str]
    colours: dict[str, str]  # of families, or of terms where each family has its own panel

    @property
    def apart(self) -> bool:
        """True when each family has its own row of panels."""
        return len(self.groups) > 1

    def colour(self, family: str, term: str) -> str:
        """Of a line and its points."""
        return self.colours.get(term, INK) if self.apart else self.colours[family]

    def look(self, term: str) -> tuple[str, Any]:
        """Marker and dashes of a site term."""
        i = self.terms.index(term)
        return _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)]


def trade_off(summary: Mapping[str, Any]) -> Picture | None:
    """Site accuracy against age error: lines join the results of a family over the weight of its site term.

    One panel per layer, and where they would hold too much, one per layer and family.
    """
    results = [r for r in results_of(summary) if r.value("mae_internal") is not None and r.value("bacc") is not None]
    if not results:
        return None
    raw, encoded = [r for r in results if r.raw], [r for r in results if not r.raw]
    plan = _plan(encoded, raw)
    across = plan.apart and len(plan.layers) > 1
    shape = (len(plan.groups), len(plan.layers)) if plan.apart else (len(plan.layers), 1)
    with style():
        legend_rows = 1 + (len(plan.colours) + len(plan.terms) * (not plan.apart)) // 3
        figure = new_figure(0.7 + 0.2 * legend_rows + (2.1 if across else 3.1) * shape[0])
        panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
        places = [(families, layer) for families in plan.groups for layer in plan.layers]
        for axes, (families, layer) in zip(panels.ravel(), places):
            lines = floors(axes, summary, "h")
            own = [r for r in encoded if r.layer == layer]
            for result in (r for r in own if r.family not in families):
                axes.plot(*_place(result), "o", ms=3, color=REST, mew=0)
            for family in families:
                _family(axes, [r for r in own if r.family == family], family, plan)
            for result in raw:
                _point(axes, result, INK, "X" if result.values.get("combat") else "*", 10)
            title = (
                f"{clean(families[0], NAME)} ({clean(layer, 8)})"
                if plan.apart
                else _LAYERS.get(layer, clean(layer, 30))
            )
            axes.set_title(title, loc="left", fontsize=9)
            axes.grid(axis="both", visible=True)
            axes.margins(0.08)
        figure.supxlabel("age error at seen sites, MAE (years)", fontsize=9.5)
        figure.supylabel("site accuracy (balanced)", fontsize=9.5)
        handles = [*_legend(panels[0, 0], plan, raw), *lines]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
        content = svg_bytes(figure)
    alt = "Site accuracy against age error in years. " + "; ".join(
        f"{short(r)}: {number(r.value('bacc'))} at {number(r.value('mae_internal'), 2)}" for r in results[:MAX_NAMED]
    )
    return Picture("trade-off", content, "svg", alt, _caption(plan, encoded), "Age error against site accuracy")


def _plan(encoded: Sequence[Result], raw: Sequence[Result]) -> _Plan:
    layers = list(dict.fromkeys(r.layer for r in encoded or raw))[:MAX_LAYERS]
    families = list(dict.fromkeys(r.family for r in encoded))
    terms = list(dict.fromkeys(_term(r) for r in encoded if not r.plain))
    treated = [family for family in families if any(r.family == family and not r.plain for r in encoded)]
    crowd = max((sum(r.layer == layer for r in encoded) for layer in layers), default=0)
    if crowd > MAX_TOGETHER and len(treated) > 1:
        colours = {term: COLOURS[i % len(COLOURS)] for i, term in enumerate(terms)}
        return _Plan([[family] for family in treated], layers, terms, colours)
    return _Plan([families], layers, terms, {family: look[0] for family, look in arm_looks(families, []).items()})


def _caption(plan: _Plan, encoded: Sequence[Result]) -> str:
    weighted = any(finite(r.debias.get("weight")) is not None for r in encoded)
    joins = (
        " A line joins the results of one family in the order of the weight of its site term, starting without one "
        "(circle)."
    )
    return (
        f"Down and to the left is better.{joins if plan.terms else ''}"
        f"{' Small numbers are its weights.' if weighted else ''}"
        f"{' Grey dots are the results of the other families.' if plan.apart else ''} Bars are 95 % intervals over "
        "people. What keeps age cannot be expected below the dashed line."
    )


def _term(result: Result) -> str:
    """What was done about the site, without its weight."""
    if result.debias:
        return f"{clean(result.debias.get('name'), 20)} on {clean(result.debias.get('on', 'h'), 8)}"
    return f"ComBat on {clean(result.values.get('combat'), 12)}" if result.values.get("combat") else ""


def _place(result: Result) -> tuple[float, float]:
    return result.value("mae_internal") or 0.0, result.value("bacc") or 0.0


def _family(axes: Axes, own: Sequence[Result], family: str, plan: _Plan) -> None:
    """The plain result of a family and one line per site term, over its weights."""
    plain = [r for r in own if r.plain]
    for term in plan.terms:
        treated = sorted((r for r in own if _term(r) == term), key=lambda r: finite(r.debias.get("weight")) or 0.0)
        if not treated:
            continue
        marker, dash = plan.look(term)
        colour = plan.colour(family, term)
        path = [_place(r) for r in (*plain[:1], *treated)]
        axes.plot([x for x, _ in path], [y for _, y in path], color=colour, lw=1.3, ls=dash, alpha=0.8)
        for result in treated:
            _point(axes, result, colour, marker, 5.5)
            weight = finite(result.debias.get("weight"))
            if weight is not None:
                axes.annotate(
                    f"{weight:g}", _place(result), xytext=(5, 4), textcoords="offset points", color=colour, fontsize=7
                )
    for result in plain:
        _point(axes, result, plan.colour(family, ""), "o", 7)


def _point(axes: Axes, result: Result, colour: str, marker: str, size: float) -> None:
    x, y = _place(result)
    if ends := result.interval("mae_internal_ci"):
        axes.plot(ends, [y, y], color=colour, lw=0.8, alpha=0.45)
    if ends := result.interval("bacc_ci"):
        axes.plot([x, x], ends, color=colour, lw=0.8, alpha=0.45)
    axes.plot(x, y, marker, ms=size, color=colour, mec="white", mew=0.6)


def _legend(axes: Axes, plan: _Plan, raw: Sequence[Result]) -> list[Any]:
    handles = []
    if plan.apart:
        handles += axes.plot([], [], "o", color=INK, label="without a site term")
    else:
        handles += [axes.plot([], [], "o", color=c, label=clean(f, NAME))[0] for f, c in plan.colours.items()]
    for term in plan.terms:
        marker, dash = plan.look(term)
        colour = plan.colours[term] if plan.apart else "#777777"
        handles += axes.plot([], [], marker=marker, ls=dash, lw=1.3, color=colour, label=term)
    if any(not r.values.get("combat") for r in raw):
        handles += axes.plot([], [], "*", ms=10, color=INK, label="input features")
    if any(r.values.get("combat") for r in raw):
        handles += axes.plot([], [], "X", ms=8, color=INK, label="input after ComBat")
    return handles
