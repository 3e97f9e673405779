"""Figures of training: fine-tuning curves by arm, and the loss and collapse monitors of pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from medssl.reporting.drawing import WIDTH, Picture, arm_looks, new_figure, style, svg_bytes
from medssl.reporting.metric import Metric, metric_of
from medssl.reporting.scores import NAME, arms_of
from medssl.reporting.source import Curve
from medssl.reporting.text import clean, number

BINS: Final = 60
MAX_PANELS: Final = 12
MONITORS: Final = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "spread": "spread of the embedding\n(0: all images look the same)",
    "effective_rank": "effective rank\n(1: one direction is left)",
    "used_prototypes": "share of prototypes in use",
}
CHANCE: Final = "chance_loss"
_TIMES: Final = ("step", "seconds", "data_wait", "data_wait_share", "data_seconds", "images_per_second")


def binned(steps: np.ndarray, values: np.ndarray, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Means in at most 60 equal spans of steps up to ``last``; a span without a value is NaN."""
    edges = np.linspace(0, max(last, 1.0), BINS + 1)
    place = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, BINS - 1)
    known = np.isfinite(values)
    totals = np.bincount(place[known], weights=values[known], minlength=BINS)
    counts = np.bincount(place[known], minlength=BINS)
    with np.errstate(invalid="ignore"):
        return (edges[:-1] + edges[1:]) / 2, totals / np.where(counts > 0, counts, np.nan)


def _quantities(curves: Sequence[Curve], metric: Metric) -> list[tuple[str, str, int]]:
    """Columns to draw, their axis labels and their sign: the loss, and the validation score when there is one."""
    columns = dict.fromkeys(c for curve in curves for c in curve.metrics.columns if curve.metrics[c].notna().any())
    scores = [c for c in columns if c.startswith("val")][:1]
    # Steps are chosen by what is highest: an error is logged with a minus sign, a class by its log-probability.
    label = f"validation {metric.axis}" if metric.name != "balanced_accuracy" else "validation\nlog-probability"
    loss = [("loss", "training loss", 1)] * ("loss" in columns)
    return loss + [(c, label, 1 if metric.higher else -1) for c in scores]


def training_curves(curves: Sequence[Curve], summary: Mapping[str, Any]) -> Picture | None:
    """Loss and validation score of the fine-tunings: thin lines are single ones, the bold line is the arm's median."""
    quantities = _quantities(curves, metric_of(summary))
    if not quantities:
        return None
    known, baselines = arms_of(summary, None)
    arms = list(dict.fromkeys([*known, *sorted({curve.arm for curve in curves})]))
    arms = [arm for arm in arms if any(curve.arm == arm for curve in curves)]
    looks = arm_looks(arms, baselines)
    counts = sorted({curve.n_labelled for curve in curves})
    shown = counts if len(counts) <= 4 else [counts[0], counts[len(counts) // 2], counts[-1]]
    with style():
        figure = new_figure(0.6 + 1.75 * len(shown))
        panels = figure.subplots(len(shown), len(quantities), squeeze=False, sharex="row", sharey="col")
        for row, n in enumerate(shown):
            for column, (name, label, sign) in enumerate(quantities):
                axes = panels[row, column]
                for arm in arms:
                    frames = [c.metrics for c in curves if c.arm == arm and c.n_labelled == n and name in c.metrics]
                    _arm_curves(axes, frames, name, looks[arm][0], sign)
                axes.set_title(f"{n} labelled volume{'s' * (n != 1)}", loc="left")
                axes.set_ylabel(label)
                axes.margins(x=0.01)
        for axes in panels[-1]:
            axes.set_xlabel("optimiser step")
        handles = [panels[0, 0].plot([], [], lw=2.4, color=looks[a][0], label=clean(a, NAME))[0] for a in arms]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(arms)))
        content = svg_bytes(figure)
    fewer = "" if shown == counts else f" Drawn for {len(shown)} of {len(counts)} numbers of labels."
    caption = (
        "One thin line is one fine-tuning (mean of the logged values in 60 spans of steps); a bold line is the median "
        "of an arm." + fewer
    )
    alt = (
        f"Training curves of {len(curves)} fine-tunings: {', '.join(label for _, label, _ in quantities)} against step"
    )
    return Picture("training-curves", content, "svg", alt, caption, "Training curves")


def _arm_curves(axes: Axes, frames: Sequence[pd.DataFrame], name: str, colour: str, sign: int) -> None:
    last = max((frame["step"].max() for frame in frames if len(frame)), default=0)
    lines = []
    for frame in frames:
        x, y = binned(frame["step"].to_numpy(float), sign * frame[name].to_numpy(float), last)
        if np.isfinite(y).any():
            axes.plot(x[np.isfinite(y)], y[np.isfinite(y)], color=colour, lw=0.7, alpha=0.4)
            lines.append(y)
    if lines:
        stack = np.array(lines)
        some = np.isfinite(stack).any(axis=0)
        axes.plot(x[some], np.nanmedian(stack[:, some], axis=0), color=colour, lw=2.2)


def pretraining_curves(metrics: pd.DataFrame | None, *, monitors_only: bool = False) -> Picture | None:
    """What pretraining logged, one panel each: loss, learning rate, collapse monitors, the method's own scalars."""
    if metrics is None:
        return None
    hidden = {*_TIMES, CHANCE, "collapse_alarm"}
    logged = [c for c in metrics.columns if c not in hidden and metrics[c].notna().any()]
    first = [c for c in MONITORS if c in logged]
    names = (
        [c for c in first if c not in ("loss", "learning_rate")]
        if monitors_only
        else first + [c for c in logged if c not in first]
    )
    shown = names[:MAX_PANELS]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    steps = metrics["step"].to_numpy(float)
    ends = []
    with style():
        figure = new_figure(0.3 + 1.75 * rows, WIDTH)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, name in zip(panels, shown):
            values = metrics[name].to_numpy(float)
            known = np.isfinite(values)
            axes.plot(steps[known], values[known], color="#0072B2", lw=0.6, alpha=0.35)
            x, y = binned(steps, values, steps.max())
            axes.plot(x[np.isfinite(y)], y[np.isfinite(y)], color="#0072B2", lw=2)
            axes.set_title(MONITORS.get(name, clean(name, 34).replace("_", " ")), loc="left", fontsize=9)
            if name == "loss" and CHANCE in metrics:
                axes.plot(steps, metrics[CHANCE].ffill(), color="#555555", lw=1, ls="--", label="uniform guess")
                axes.legend(fontsize=8)
            if name in ("spread", "effective_rank", "used_prototypes"):
                axes.set_ylim(bottom=0)
            axes.set_xlabel("optimiser step")
            ends.append(f"{clean(name, 34)} ends at {number(values[known][-1])}")
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        content = svg_bytes(figure)
    more = f" {len(names) - len(shown)} further quantities are in logs/metrics.csv." if len(names) > len(shown) else ""
    caption = "Thin: every logged value; bold: its mean in 60 spans of steps. Scales differ between panels." + more
    name = "collapse-monitors" if monitors_only else "pretraining-curves"
    title = "Collapse monitors of pretraining" if monitors_only else "Pretraining"
    return Picture(name, content, "svg", f"{title}: " + "; ".join(ends), caption, title)
