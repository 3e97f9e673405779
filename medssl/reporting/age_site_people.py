"""Figures of single people: predicted against true age, and the age error by decade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medssl.reporting.age_site_results import chosen, people_of, short
from medssl.reporting.drawing import COLOURS, INK, Picture, arm_looks, new_figure, style, svg_bytes
from medssl.reporting.text import number

SETS: Final[Mapping[str, str]] = {"internal": "seen sites", "external": "unseen sites"}


def predicted_ages(summary: Mapping[str, Any], people: pd.DataFrame | None) -> Picture | None:
    """Predicted against true age of the people of seen and of unseen sites, for a few chosen results."""
    if people is None:
        return None
    drawn = [(r, frame) for r in chosen(summary) if len(frame := _first_seed(people_of(people, r)))]
    sets = [name for name in SETS if any((frame["set"] == name).any() for _, frame in drawn)]
    if not drawn or not sets:
        return None
    ages = pd.concat([frame[["age", "age_pred"]] for _, frame in drawn]).to_numpy()
    low, high = np.nanpercentile(ages, [0, 100]) + (-2, 2)
    texts = []
    columns = len(sets) if len(sets) > 1 else len(drawn)  # one row per result, or all in one row
    cells = [(result, frame, name) for result, frame in drawn for name in sets]
    with style():
        figure = new_figure(0.35 + len(cells) // columns * {1: 4.6, 2: 2.85, 3: 2.1}[columns])
        panels = figure.subplots(len(cells) // columns, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (result, frame, name) in zip(panels.ravel(), cells):
            own = frame[frame["set"] == name]
            against_truth(axes, own, (float(low), float(high)))
            fit = f"{SETS[name]}: {_fit(own)}"
            texts.append(f"{short(result)}, {fit}")
            axes.set_title(
                f"{short(result)}\n{fit}".replace(": ", ":\n" if columns > 2 else ": "), loc="left", fontsize=8
            )
        for axes in panels[:, 0]:
            axes.set_ylabel("predicted age (years)")
        for axes in panels[-1]:
            axes.set_xlabel("true age (years)")
        content = svg_bytes(figure)
    several = "Drawn are the baseline, the lowest age error and the best balance of age error and site accuracy."
    caption = (
        "One dot is one person, predicted by the models of the first seed only (so the error may differ from the "
        f"table's mean over seeds). On the line the prediction is exact. {several if len(drawn) > 1 else ''}"
    )
    return Picture("predicted-age", content, "svg", "; ".join(texts), caption, "Predicted against true age")


def _first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    known = frame[frame["age"].notna() & frame["age_pred"].notna()]
    return known[known["seed"] == known["seed"].min()]


def _fit(frame: pd.DataFrame) -> str:
    error = (frame["age_pred"] - frame["age"]).abs().mean()
    return f"MAE {number(float(error), 2)} years, n = {len(frame)}" if len(frame) else "nobody"


def against_truth(axes: Axes, frame: pd.DataFrame, limits: tuple[float, float]) -> None:
    """Dots of ``age_pred`` over ``age`` beside the line of exact predictions."""
    axes.plot(limits, limits, color=INK, lw=1)
    if len(frame):
        size = 14 if len(frame) < 200 else 6
        figure = axes.figure
        assert isinstance(figure, Figure)
        figure.set_dpi(200)  # of the dots, which are pixels inside the SVG when there are many
        axes.scatter(
            frame["age"], frame["age_pred"], s=size, color=COLOURS[0], alpha=0.45, lw=0, rasterized=len(frame) > 800
        )
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.grid(axis="both", visible=True)


def error_by_decade(summary: Mapping[str, Any], people: pd.DataFrame | None) -> Picture | None:
    """Mean absolute error of the people of each decade of age, for the chosen results."""
    if people is None:
        return None
    drawn = [(r, frame) for r in chosen(summary) if len(frame := _errors(people_of(people, r)))]
    sets = [name for name in SETS if any((frame["set"] == name).any() for _, frame in drawn)]
    if not drawn or not sets:
        return None
    decades = sorted({int(d) for _, frame in drawn for d in frame["decade"]})
    looks = arm_looks(
        [short(r) for r, _ in drawn], [short(r) for r, _ in drawn if r.arm == str(summary.get("baseline"))]
    )
    texts = []
    with style():
        figure = new_figure(0.6 + 2.3 * len(sets))
        panels = figure.subplots(len(sets), 1, squeeze=False, sharey=True)[:, 0]
        for axes, name in zip(panels, sets):
            for i, (result, frame) in enumerate(drawn):
                table = _by_decade(frame[frame["set"] == name])
                x = np.array([decades.index(int(d)) for d in table.index]) + 0.22 * (i - (len(drawn) - 1) / 2)
                colour, marker = looks[short(result)]
                axes.errorbar(
                    x, table["mean"], yerr=table["half"], fmt=marker, ms=5, color=colour, lw=1.2, label=short(result)
                )
                rows = ", ".join(f"{int(d)}s {number(float(v), 1)}" for d, v in table["mean"].items())
                texts.append(f"{short(result)}, {SETS[name]}: {rows}")
            counts = _by_decade(pd.concat([f[f["set"] == name] for _, f in drawn]).drop_duplicates(["site", "subject"]))
            marks = [f"{d}\u2013{d + 9}\nn = {int(counts['count'].get(d, 0))}" for d in decades]
            axes.set_xticks(range(len(decades)), marks, fontsize=8)
            axes.set_title(SETS[name], loc="left")
            axes.set_ylabel("MAE (years)")
            axes.set_xlim(-0.6, len(decades) - 0.4)
        panels[0].set_ylim(bottom=0)  # last, as it ends the scaling of what follows
        panels[-1].set_xlabel("true age (years), number of people")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), fontsize=8.5)
        content = svg_bytes(figure)
    caption = (
        "Mean absolute error of the people of a decade, averaged over seeds; bars are 95 % intervals of that mean over "
        "people (normal approximation, none for one person)."
    )
    alt = "Age error by decade of age in years. " + "; ".join(texts)
    return Picture("error-by-decade", content, "svg", alt, caption, "Age error by decade")


def _errors(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per person: mean absolute error over seeds and decade of age."""
    known = frame[frame["age"].notna() & frame["age_pred"].notna()]
    known = known.assign(error=(known["age_pred"] - known["age"]).abs(), decade=known["age"] // 10 * 10)
    keys = ["set", "site", "subject", "decade"]
    return known.groupby(keys, sort=True)["error"].mean().reset_index()


def _by_decade(frame: pd.DataFrame) -> pd.DataFrame:
    table = frame.groupby("decade")["error"].agg(["mean", "std", "count"])
    return table.assign(half=(1.96 * table["std"] / table["count"] ** 0.5).fillna(0.0))
