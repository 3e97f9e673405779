"""Figures of what single people were predicted: numbers against the truth, and the confusion of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from medssl.reporting.age_site_maps import name_cells, shares_of
from medssl.reporting.age_site_people import against_truth
from medssl.reporting.drawing import Picture, new_figure, style, svg_bytes
from medssl.reporting.metric import metric_of
from medssl.reporting.scores import NAME, arms_of, leading
from medssl.reporting.text import clean, number

MAX_ARMS: Final = 3
MAX_CLASSES: Final = 30


def _most_labels(summary: Mapping[str, Any], per_case: pd.DataFrame) -> tuple[list[str], int, pd.DataFrame]:
    """At most three arms, the largest number of labels, and their rows."""
    rows = per_case[per_case["n_labelled"] == per_case["n_labelled"].max()]
    arms = [arm for arm in arms_of(summary, per_case)[0] if (rows["arm"] == arm).any()][:MAX_ARMS]
    return arms, int(rows["n_labelled"].iloc[0]), rows[rows["arm"].isin(arms)]


def predicted_values(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> Picture | None:
    """Predicted against true numbers of the first fine-tuning with the most labels, one panel per arm and split."""
    if per_case is None or "abs_error" not in per_case:
        return None
    known = per_case[per_case[["true", "predicted"]].notna().all(axis=1)]
    if known.empty:
        return None
    arms, n, rows = _most_labels(summary, known)
    rows = rows[(rows["draw"] == rows["draw"].min()) & (rows["seed"] == rows["seed"].min())]
    splits = list(dict.fromkeys(rows["split"]))
    metric, target = metric_of(summary), clean(summary.get("target", "value"), 30)
    unit = f" ({metric.unit})" if metric.unit else ""
    values = rows[["true", "predicted"]].to_numpy(dtype=float)
    margin = 0.03 * float(np.ptp(values)) or 1.0
    limits = (float(values.min()) - margin, float(values.max()) + margin)
    columns = len(arms) if len(splits) == 1 else len(splits)
    cells = [(arm, split) for arm in arms for split in splits]
    texts = []
    with style():
        figure = new_figure(0.35 + -(-len(cells) // columns) * {1: 4.6, 2: 2.85}.get(columns, 2.1))
        panels = figure.subplots(-(-len(cells) // columns), columns, squeeze=False, sharex=True, sharey=True)
        for axes, (arm, split) in zip(panels.ravel(), cells):
            own = rows[(rows["arm"] == arm) & (rows["split"] == split)]
            against_truth(axes, own.rename(columns={"true": "age", "predicted": "age_pred"}), limits)
            where = f", {clean(split, 24)}" if len(splits) > 1 else ""
            error = metric.text(float(own["abs_error"].mean())) if len(own) else "nobody"
            texts.append(f"{clean(arm, NAME)}{where}: {metric.title} {error}, n = {len(own)}")
            axes.set_title(texts[-1].replace(": ", ":\n"), loc="left", fontsize=8)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"predicted {target}{unit}")
        for axes in panels[-1]:
            axes.set_xlabel(f"true {target}{unit}")
        content = svg_bytes(figure)
    caption = (
        f"One dot is one volume, predicted by the first fine-tuning with {n} labelled volumes (first draw and seed), "
        "so the error may differ from the table's mean. On the line the prediction is exact."
    )
    return Picture("predicted-values", content, "svg", "; ".join(texts), caption, f"Predicted against true {target}")


def confusion(summary: Mapping[str, Any], per_case: pd.DataFrame | None) -> Picture | None:
    """Where the people of each class are put by the fine-tunings with the most labels; rows add up to 1."""
    per_case = leading(per_case, summary)
    if per_case is None or "balanced" not in per_case or per_case.empty:
        return None
    arms, n, rows = _most_labels(summary, per_case)
    classes = list(dict.fromkeys([*map(str, summary.get("classes") or []), *rows["true"], *rows["predicted"]]))
    if len(classes) > MAX_CLASSES:
        return None
    texts = []
    with style():
        figure = new_figure(3.1 if len(arms) > 1 else 4.6)
        panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
        for axes, arm in zip(panels, arms):
            own = rows[rows["arm"] == arm]
            counts = pd.crosstab(own["true"], own["predicted"]).reindex(index=classes, columns=classes, fill_value=0)
            shares = shares_of(counts.to_numpy(dtype=float))
            image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            name_cells(axes, shares)
            diagonal = np.diag(shares)
            mean = float(np.nanmean(diagonal)) if np.isfinite(diagonal).any() else float("nan")
            texts.append(f"{clean(arm, NAME)}: mean of the diagonal {number(mean, 2)}")
            axes.set_title(texts[-1].replace(": ", ":\n"), loc="left", fontsize=8.5)
            names = [clean(name, 14) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90 if len(classes) > 3 else 0, fontsize=8)
            axes.set_yticks(range(len(classes)), names, fontsize=8)
            axes.grid(visible=False)
            axes.set_xlabel("predicted")
        panels[0].set_ylabel("true")
        figure.colorbar(image, ax=list(panels), label="share of the class", shrink=0.8, aspect=25)
        content = svg_bytes(figure)
    caption = (
        f"All fine-tunings with {n} labelled volumes together; rows add up to 1. The mean of the diagonal is the "
        "balanced accuracy of what is pooled. Numbers are per cent."
    )
    alt = f"Confusion of {len(classes)} classes. " + "; ".join(texts)
    return Picture("class-confusion", content, "svg", alt, caption, "Confusion of classes")
