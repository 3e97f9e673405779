"""Figures of a few-label comparison: what every arm reached in every draw, and how far it is from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from medssl.reporting.age_site_results import SIGNIFICANCE
from medssl.reporting.drawing import BASELINE_COLOUR, COLOURS, INK, Picture, new_figure, style, svg_bytes
from medssl.reporting.metric import Metric, metric_of
from medssl.reporting.scores import draw_differences
from medssl.reporting.text import clean, finite, number

NAME: Final = 32
OTHER_COLOUR: Final = "#8C8C8C"
MAX_PANELS: Final = 12


def is_shown(row: Mapping[str, Any]) -> bool:
    """Whether a difference is one after Holm's correction."""
    p = finite(row.get("p_holm"))
    return p is not None and p < SIGNIFICANCE


def panels(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every (encoder, n_labelled) that has scores, in the order of the table."""
    return list(dict.fromkeys((str(row["encoder"]), int(row["n_labelled"])) for row in summary.get("table") or []))


def panel_name(summary: Mapping[str, Any], encoder: str, n: int) -> str:
    """`` on resnet18_3d with 2 labelled volumes``, without what is the same everywhere."""
    several = len({one for one, _ in panels(summary)}) > 1
    volumes = f"with {n} labelled volume{'s' * (n != 1)}"
    return f"on {clean(encoder, 40)}, {volumes}" if several else volumes


def draw_means(per_case: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Score of each fine-tuning: cases of a person are averaged first, people count alike, as in the table."""
    keys = ["arm", "encoder", "n_labelled", "draw", "seed"]
    person = "group" if "group" in per_case else "case"
    return per_case.groupby([*keys, person])[metric.column].mean().groupby(keys).mean().dropna().reset_index()


def score_figures(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> list[Picture]:
    """Per encoder and number of labels: a line for each arm with its draws and its mean."""
    metric = metric_of(summary)
    points = None if per_case is None or "encoder" not in per_case else draw_means(per_case, metric)
    pictures = [_scores(summary, encoder, n, points, metric) for encoder, n in panels(summary)[:MAX_PANELS]]
    return [picture for picture in pictures if picture is not None]


def _rows(summary: Mapping[str, Any], part: str, encoder: str, n: int) -> list[Mapping[str, Any]]:
    rows = summary.get(part) or []
    return [row for row in rows if str(row["encoder"]) == encoder and int(row["n_labelled"]) == n]


def _scores(
    summary: Mapping[str, Any], encoder: str, n: int, points: pd.DataFrame | None, metric: Metric
) -> Picture | None:
    rows = [row for row in _rows(summary, "table", encoder, n) if finite(row.get("mean")) is not None]
    if not rows:
        return None
    baseline = str(summary.get("baseline"))
    shown = {str(row["arm"]) for row in _rows(summary, "paired", encoder, n) if is_shown(row)}
    upper = next((row for row in summary.get("upper_bound") or [] if str(row["encoder"]) == encoder), None)
    bound = None if upper is None else finite(upper.get("mean"))
    base = next((finite(row["mean"]) for row in rows if str(row["arm"]) == baseline), None)
    with style():
        figure = new_figure(1.05 + 0.3 * len(rows))
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            arm = str(row["arm"])
            colour = BASELINE_COLOUR if arm == baseline else COLOURS[0] if arm in shown else OTHER_COLOUR
            if points is not None:
                own = points[(points["arm"] == arm) & (points["encoder"] == encoder) & (points["n_labelled"] == n)]
                axes.scatter(own[metric.column], [y] * len(own), s=22, color=colour, alpha=0.55, lw=0)
            axes.plot([row["mean"]], [y], marker="|", ms=13, mew=2.4, color=colour, ls="")
            axes.annotate(
                metric.spread(row["mean"], row.get("sd")), (1.02, y), xycoords=("axes fraction", "data"), va="center",
                color=INK, annotation_clip=False,
            )  # fmt: skip
        if base is not None:
            axes.axvline(base, color=BASELINE_COLOUR, lw=1, ls=(0, (5, 3)))
        if bound is not None:
            axes.axvline(bound, color=INK, lw=1, ls=(0, (1, 1.5)))
        axes.set_yticks(range(len(rows)), [clean(row["arm"], NAME) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.06)
        axes.set_xlabel(f"{metric.axis} ({metric.good} is better)")
        content = svg_bytes(figure)
    lines = [] if base is None else [f"dashed line: the mean of {clean(baseline, NAME)}"]
    if bound is not None and upper is not None:
        lines.append(f"dotted line: training with all {clean(upper.get('n_labelled'))} labels, {metric.text(bound)}")
    caption = (
        "One dot is one draw of labelled volumes (and seed): the mean over test people. The stroke is the mean of the "
        "dots; beside it the mean ± its standard deviation over draws. "
        + ("; ".join(lines).capitalize() + ". " if lines else "")
        + "Blue: differs from the baseline after Holm's correction. The axis does not start at 0; the order is the "
        "plan's and ranks nothing."
    )
    texts = "; ".join(f"{clean(row['arm'], NAME)} {metric.spread(row['mean'], row.get('sd'))}" for row in rows)
    name = panel_name(summary, encoder, n)
    title = f"{metric.title[0].upper()}{metric.title[1:]} of every draw, {name}"
    return Picture(_file("scores", encoder, n), content, "svg", f"{title}. {texts}", caption, title)


def difference_figures(summary: Mapping[str, Any]) -> list[Picture]:
    """Per encoder and number of labels: each arm's paired difference to the baseline with its interval."""
    metric = metric_of(summary)
    pictures = [_differences(summary, encoder, n, metric) for encoder, n in panels(summary)[:MAX_PANELS]]
    return [picture for picture in pictures if picture is not None]


def _differences(summary: Mapping[str, Any], encoder: str, n: int, metric: Metric) -> Picture | None:
    rows = [row for row in _rows(summary, "paired", encoder, n) if finite(row["difference"]) is not None]
    if not rows:
        return None
    colours = [COLOURS[0] if is_shown(row) else OTHER_COLOUR for row in rows]
    names = [clean(row["arm"], NAME) + (f" ({clean(row['split'], 20)})" if row.get("split") else "") for row in rows]
    with style():
        figure = new_figure(1.05 + 0.3 * len(rows))
        axes = figure.add_subplot()
        texts = draw_differences(axes, rows, metric, colours, [is_shown(row) for row in rows])
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.08)
        side = "right" if metric.higher else "left"
        axes.set_xlabel(f"difference in {metric.axis} to {clean(rows[0]['baseline'], NAME)} ({side} of 0: better)")
        content = svg_bytes(figure)
    caption = (
        "One dot is the mean paired difference over the same test people and the same draws; the bar is its 95 % "
        "interval, for who is tested and for how trainings vary, not widened for the number of comparisons. Filled and "
        f"blue: p below {number(SIGNIFICANCE, 2)} after Holm's correction. Hollow: no difference is shown."
    )
    title = f"Difference to {clean(rows[0]['baseline'], NAME)}, {panel_name(summary, encoder, n)}"
    alt = f"{title}. " + "; ".join(f"{name}: {text}" for name, text in zip(names, texts))
    return Picture(_file("differences", encoder, n), content, "svg", alt, caption, title)


def _file(kind: str, encoder: str, n: int) -> str:
    safe: Sequence[str] = [c if c.isalnum() or c in "_-" else "-" for c in encoder]
    return f"{kind}-{''.join(safe)[:60]}-n{n}"
