"""Figures of the scores of a fine-tuning: score by labels, structures, paired differences, examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from medssl.reporting.drawing import INK, Picture, arm_looks, end_labels, new_figure, png_bytes, style, svg_bytes
from medssl.reporting.metric import METRICS, Metric, metric_of, reference_of
from medssl.reporting.source import UPPER_BOUND, Overlay
from medssl.reporting.text import clean, excludes_zero, finite, joined, number
from medssl.reporting.verdict import on_split

MAX_CLASSES: Final = 12
LABEL_COLOUR: Final = "#00C8FF"
PREDICTION_COLOUR: Final = "#FF9A00"
NAME: Final = 24


def arms_of(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> tuple[list[str], list[str]]:
    """All arms in their order of appearance, and those that others are compared with."""
    table, paired = summary.get("table") or [], summary.get("paired") or []
    arms = [str(row["arm"]) for row in table]
    arms += [str(row[key]) for row in paired for key in ("arm", "baseline")]
    arms += [] if per_case is None else list(per_case["arm"])
    baselines = list(dict.fromkeys(str(row["baseline"]) for row in paired))
    return [arm for arm in dict.fromkeys(arms) if arm != UPPER_BOUND], baselines


def leading(per_case: pd.DataFrame | None, summary: Mapping[str, Any]) -> pd.DataFrame | None:
    """The rows of the split that leads, where several were scored."""
    splits = summary.get("splits")
    if per_case is None or "split" not in per_case or not isinstance(splits, list) or not splits:
        return per_case
    return per_case[per_case["split"] == str(splits[0])]


def draw_scores(per_case: pd.DataFrame, metric: Metric = METRICS["dice"]) -> pd.DataFrame:
    """Score of each fine-tuning: mean over the rows of a case, then over cases (missing scores are left out).

    The rows of a case are its structures; people with several cases count as often.
    """
    keys = ["arm", "n_labelled", "draw", "seed"]
    return per_case.groupby([*keys, "case"])[metric.column].mean().groupby(keys).mean().dropna().reset_index()


def score_by_labels(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> Picture | None:
    """Score against the number of labelled volumes: each fine-tuning a dot, a line through the means."""
    metric, per_case = metric_of(summary), leading(per_case, summary)
    points = None if per_case is None else draw_scores(per_case, metric)
    means = _means(summary, points, metric)
    if not means:
        return None
    arms, baselines = arms_of(summary, per_case)
    looks = arm_looks(arms, baselines)
    counts = sorted({n for line in means.values() for n, _ in line})
    bound = summary.get("upper_bound") or {}
    upper = finite(bound.get("mean"))
    values = [mean for line in means.values() for _, mean in line]
    values += [] if points is None else list(points[metric.column])
    values += [] if upper is None else [upper]
    known = reference_of(summary)
    values += [] if known is None else [known[0]]
    low, high = _dice_range(values) if metric.name == "dice" else _range(values)
    with style():
        figure = new_figure(3.7)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for position, arm in enumerate(arms):
            shift = 1.035 ** (position - (len(arms) - 1) / 2)
            colour, marker = looks[arm]
            if points is not None:
                own = points[points["arm"] == arm]
                axes.scatter(
                    own["n_labelled"] * shift, own[metric.column], s=20, color=colour, marker=marker, alpha=0.55, lw=0
                )
            line = means.get(arm, [])
            axes.plot([n * shift for n, _ in line], [m for _, m in line], color=colour, lw=2, marker="_", ms=13, mew=2)
        ends = [
            (line[-1][1], clean(arm, NAME), looks[arm][0]) for arm, line in means.items() if line[-1][0] == counts[-1]
        ]
        end_labels(axes, counts[-1] * 1.035 ** (len(arms) / 2), ends, 0.062 * (high - low))
        for arm, line in means.items():  # a line that stops early is named where it stops
            if line[-1][0] != counts[-1]:
                axes.annotate(
                    clean(arm, NAME),
                    line[-1],
                    xytext=(0, 8),
                    textcoords="offset points",
                    color=looks[arm][0],
                    ha="center",
                )
        if upper is not None:
            _level(axes, upper, f"all {clean(bound.get('n_labelled'))} labels: {metric.text(upper)}", (0, (5, 3)))
        if known is not None:
            _level(axes, known[0], f"{known[1]}: {metric.text(known[0])}", (0, (1, 1.5)))
        _label_axis(axes, counts, summary)
        axes.set_ylim(low, high)
        better = "higher is better" if metric.higher else "lower is better"
        axes.set_ylabel("Dice, mean over structures (0 to 1)" if metric.name == "dice" else f"{metric.axis}; {better}")
        content = svg_bytes(figure)
    dots = "One dot is one fine-tuning (one draw of labelled volumes with one seed): "
    dots += f"the mean {metric.title} of all test cases. "
    dots = "Single draws are not available. " if points is None else dots
    bar = "The line joins the means. "
    start = "The vertical axis does not start at 0." if low > 0 else ""
    upper_text = "" if upper is None else "The dashed line is training with all labels. "
    upper_text += "" if known is None else f"The dotted line needs no network: {known[1]}. "
    best = "; ".join(
        f"{clean(arm, NAME)}: {', '.join(f'{metric.text(m)} with {n}' for n, m in line)}" for arm, line in means.items()
    )
    alt = f"Mean {metric.axis} by number of labelled volumes. {best}"
    caption = dots + bar + upper_text + start
    name = f"{metric.name.replace('_', '-')}-by-labels"
    title = f"{metric.title[0].upper()}{metric.title[1:]} against the number of labels"
    return Picture(name, content, "svg", alt, caption, title)


def _level(axes: Axes, value: float, text: str, dash: tuple[float, tuple[float, float]]) -> None:
    """A horizontal line with its name at the left."""
    axes.axhline(value, color=INK, lw=1, ls=dash)
    axes.annotate(
        text, (0, value), xycoords=("axes fraction", "data"), xytext=(4, 4), textcoords="offset points", color=INK
    )


def _means(
    summary: Mapping[str, Any], points: pd.DataFrame | None, metric: Metric
) -> dict[str, list[tuple[int, float]]]:
    """Mean score by arm and number of labels: the summary's, or else the mean of the dots."""
    rows = [(str(r["arm"]), int(r["n_labelled"]), finite(r.get("mean"))) for r in summary.get("table") or []]
    if not rows and points is not None:
        grouped = points.groupby(["arm", "n_labelled"])[metric.column].mean()
        rows = [(str(arm), int(n), float(mean)) for (arm, n), mean in grouped.items()]
    lines: dict[str, list[tuple[int, float]]] = {}
    for arm, n, mean in sorted(rows, key=lambda row: row[1]):
        if mean is not None and arm != UPPER_BOUND:
            lines.setdefault(arm, []).append((n, mean))
    return lines


def _dice_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    bottom = max(0.0, math.floor((low - 0.03) * 10) / 10)
    return (0.0 if bottom <= 0.2 else bottom), min(1.02, max(high + 0.06, bottom + 0.2))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of any unit; from 0 where the lowest value is near it."""
    low, high = min(values), max(values)
    bottom = 0.0 if low < 0.35 * high else low - 0.15 * (high - low) - 0.02 * abs(high)
    return bottom, high + 0.12 * max(high - bottom, 1e-6)


def _label_axis(axes: Axes, counts: Sequence[int], summary: Mapping[str, Any]) -> None:
    """Ticks at the counts that were run, with the validation labels that came on top."""
    extra = {int(row["n_labelled"]): row.get("n_validation") for row in summary.get("table") or []}
    axes.xaxis.set_major_locator(FixedLocator([float(n) for n in counts]))
    axes.xaxis.set_minor_locator(NullLocator())
    marks = {n: f"{n}\n+ {int(extra[n])}" if finite(extra.get(n)) is not None else str(n) for n in counts}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: marks.get(round(x), "")))
    if len(counts) == 1:
        axes.set_xlim(counts[0] * 0.7, counts[0] * 1.4)
    else:
        axes.set_xlim(counts[0] * 0.85, counts[-1] * 1.15)
    known = any(finite(value) is not None for value in extra.values())
    axes.set_xlabel("labelled volumes: train" + ("\n+ validation" if known else "") + " (log scale)")


def class_boxes(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> Picture | None:
    """Dice of each structure over the test cases, one box per arm and number of labels."""
    if per_case is None or per_case["dice"].notna().sum() == 0:
        return None
    arms, baselines = arms_of(summary, per_case)
    looks = arm_looks(arms, baselines)
    cases = per_case.groupby(["class", "n_labelled", "arm", "case"])["dice"].mean().dropna().reset_index()
    classes = list(dict.fromkeys(per_case["class"]))
    shown = [name for name in classes if name in set(cases["class"])][:MAX_CLASSES]
    counts = sorted(cases["n_labelled"].unique())
    rng = np.random.default_rng(0)  # only spreads the dots sideways, the same way each time
    step = 0.8 / len(arms)
    medians = []
    with style():
        figure = new_figure(0.55 + 1.75 * len(shown))
        panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, name in zip(panels, shown):
            for i, n in enumerate(counts):
                for j, arm in enumerate(arms):
                    chosen = (cases["class"] == name) & (cases["n_labelled"] == n) & (cases["arm"] == arm)
                    dice = cases.loc[chosen, "dice"].to_numpy()
                    if len(dice):
                        _box(axes, i + (j - (len(arms) - 1) / 2) * step, step, dice, looks[arm][0], rng)
                        if n == counts[-1]:
                            medians.append(f"{clean(name, NAME)} {clean(arm, NAME)} {number(np.median(dice), 2)}")
            axes.set_title(clean(name, 40), loc="left")
            axes.set_ylabel("Dice")
        low, high = _dice_range(cases.loc[cases["class"].isin(shown), "dice"])
        panels[0].set_ylim(low - 0.02, high)
        panels[-1].set_xticks(range(len(counts)), [str(int(n)) for n in counts])
        panels[-1].set_xlabel("labelled training volumes")
        handles = [panels[0].plot([], [], "s", ms=7, color=looks[a][0], label=clean(a, NAME))[0] for a in arms]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(arms)), handletextpad=0.2)
        content = svg_bytes(figure)
    hidden = f" {len(classes) - len(shown)} further classes are not drawn." if len(classes) > len(shown) else ""
    caption = (
        "One dot is one test case: the Dice of this structure, averaged over draws and seeds. The box holds the middle "
        "half, its line is the median, whiskers reach the furthest case within 1.5 box heights."
        + (" The vertical axis does not start at 0." if low > 0 else "")
        + hidden
    )
    alt = f"Dice by structure and number of labels. Medians with {int(counts[-1])} labels: {'; '.join(medians)}"
    return Picture("dice-by-class", content, "svg", alt, caption, "Dice of each structure")


def _box(axes: Axes, x: float, step: float, dice: np.ndarray, colour: str, rng: np.random.Generator) -> None:
    line = {"color": colour, "linewidth": 1.2}
    axes.boxplot(
        dice, positions=[x], widths=0.8 * step, manage_ticks=False, showfliers=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops={"color": colour, "linewidth": 2.4},
    )  # fmt: skip
    axes.scatter(x + rng.uniform(-0.22, 0.22, len(dice)) * step, dice, s=7, color=colour, alpha=0.5, lw=0)


def paired_differences(summary: Mapping[str, Any]) -> Picture | None:
    """Forest plot: each paired difference with its 95 % interval beside the line of no difference."""
    metric = metric_of(summary)
    arms, baselines = arms_of(summary, None)
    rows = [row for row in summary.get("paired") or [] if finite(row["difference"]) is not None]
    rows.sort(key=lambda r: (arms.index(str(r["arm"])), str(r["baseline"]), on_split(r), r["n_labelled"]))
    if not rows:
        return None
    looks = arm_looks(arms, baselines)
    with style():
        figure = new_figure(0.95 + 0.34 * len(rows))
        axes = figure.add_subplot()
        colours = [looks[str(row["arm"])][0] for row in rows]
        texts = draw_differences(axes, rows, metric, colours, [excludes_zero(row) for row in rows])
        names = [_comparison(row, len(baselines) == 1) for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.08)
        side = f"{'right' if metric.higher else 'left'} of 0"
        one = f"difference in {metric.axis} to {clean(rows[0]['baseline'], NAME)} ({side}: better)"
        several = f"difference in {metric.axis} ({side}: the first one is better)"
        axes.set_xlabel(one if len(baselines) == 1 else several)
        content = svg_bytes(figure)
    caption = (
        "One dot is the mean paired difference over the same test people and the same draws; the bar is its 95 % "
        "interval (bootstrap over people and draws). Hollow: no interval, or it includes 0, so no difference is shown. "
        "n counts labelled training volumes."
    )
    alt = f"Paired differences in {metric.axis}. " + "; ".join(f"{name}: {text}" for name, text in zip(names, texts))
    return Picture("paired-differences", content, "svg", alt, caption, "Paired differences")


def draw_differences(
    axes: Axes, rows: Sequence[Mapping[str, Any]], metric: Metric, colours: Sequence[str], filled: Sequence[bool]
) -> list[str]:
    """Draw one difference with its interval on each line, and write the numbers beside it; returns their texts."""
    texts = []
    for y, (row, colour, full) in enumerate(zip(rows, colours, filled)):
        low, high = finite(row.get("low")), finite(row.get("high"))
        known = low is not None and high is not None
        if known:
            axes.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="butt")
        axes.plot(row["difference"], y, "o", ms=7, mfc=colour if full else "white", mec=colour, mew=1.6, ls="")
        interval = f"[{metric.difference(low)}, {metric.difference(high)}]" if known else "(no interval)"
        texts.append(f"{metric.difference(row['difference'])} {interval}")
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "color": INK, "annotation_clip": False}
        axes.annotate(texts[-1], (1.02, y), **beside)
    axes.axvline(0, color=INK, lw=1)
    return texts


def _comparison(row: Mapping[str, Any], one_baseline: bool) -> str:
    """Name of a row of the forest plot; a baseline that all share is named once, on the axis."""
    arm = clean(row["arm"], NAME if one_baseline else NAME // 2)
    against = "" if one_baseline else f" \u2212 {clean(row['baseline'], NAME // 2)}"
    return f"{arm}{against}, n = {row['n_labelled']}{on_split(row)}"


def overlay_picture(overlay: Overlay) -> Picture:
    """An image with the outlines of the label (solid) and of the prediction (dashed)."""
    image = np.nan_to_num(overlay.image).T
    low, high = np.percentile(image, [1, 99]) if image.size else (0.0, 1.0)
    with style():
        figure = new_figure(2.4 * max(0.4, min(2.5, image.shape[0] / image.shape[1])), 2.4)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower")
        _outline(axes, overlay.label.T, LABEL_COLOUR, "solid")
        _outline(axes, overlay.prediction.T, PREDICTION_COLOUR, "dashed")
        axes.set_axis_off()
        content = png_bytes(figure, 160)
    title = clean(overlay.title, 90)
    structures = joined(sorted({int(v) for v in np.unique(overlay.label)} - {0}) or ["none"])
    alt = f"{title}: outlines of label and prediction on the image; label values in the picture: {structures}"
    return Picture(f"overlay-{clean(overlay.name, 60)}", content, "png", alt, title, title)


def _outline(axes: Axes, values: np.ndarray, colour: str, line: str) -> None:
    for value in sorted({int(v) for v in np.unique(values)} - {0}):
        mask = np.pad((values == value).astype(float), 1)  # padded, so that a border structure is closed
        grid = np.arange(-1, values.shape[1] + 1), np.arange(-1, values.shape[0] + 1)
        axes.contour(*grid, mask, levels=[0.5], colors=colour, linewidths=1.5, linestyles=line)
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(-0.5, values.shape[0] - 0.5))
