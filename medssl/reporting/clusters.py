"""Clusters of a pretraining: how evenly they are filled and what they agree with, at the end and on the way."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from medssl.reporting.describe import Table, table_of
from medssl.reporting.drawing import WIDTH, Picture, new_figure, style, svg_bytes
from medssl.reporting.text import clean, number, spread

MEASURES: Final = ("nmi", "ami", "ari")
NUMBERS: Final = ("step", "head", *MEASURES, "n", "n_missing", "balance", "empty")
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DRAWN: Final = len(_COLOURS)


def read_clusters(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``logs/clusters.csv`` with numbers as such.

    Raises:
        ValueError: Columns are missing.
    """
    lacking = {*NUMBERS, "column"} - set(frame)
    if lacking:
        raise ValueError(f"columns missing: {', '.join(sorted(lacking))}")
    frame = frame.copy()
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").replace([np.inf, -np.inf], np.nan)
    frame["column"] = frame["column"].where(frame["column"].notna(), "").astype(str)
    return frame[frame["step"].notna() & frame["head"].notna()].sort_values("step", kind="stable")


def cluster_table(frame: pd.DataFrame | None) -> Table | None:
    """The last clusters, one row for each column they were compared with; several heads as mean and deviation."""
    if frame is None or frame.empty:
        return None
    last = frame[frame["step"] == frame["step"].max()]
    rows = []
    for column, part in last.groupby("column", sort=False):
        compared = [f"{part['n'].max():.0f}", f"{part['n_missing'].max():.0f}"] if column else ["", ""]
        measures = [_over_heads(part[name]) for name in MEASURES]
        filled = [_over_heads(part["balance"]), number(part["empty"].mean(), 0 if len(part) == 1 else 1)]
        rows.append([clean(column, 60) if column else "none", *measures, *compared, *filled])
    heads = last["head"].nunique()
    several = f" Mean ± standard deviation of {heads} heads." if heads > 1 else ""
    caption = (
        f"Clusters after {last['step'].max():.0f} steps. AMI and ARI are 0 on average for clusters that have nothing "
        "to do with the column, NMI is not: it grows with the number of clusters. Numbers of more than 20 values are "
        "compared in ten groups. Balance: 1 when all clusters are equally large." + several
    )
    return table_of(
        caption, ["compared with", "NMI", "AMI", "ARI", "items", "without a value", "balance", "empty clusters"], rows
    )


def cluster_curves(frame: pd.DataFrame | None) -> Picture | None:
    """Agreement and balance at each refresh, mean over heads; None with fewer than two refreshes."""
    if frame is None or frame["step"].nunique() < 2:
        return None
    columns = [column for column in frame["column"].unique() if column]
    shown = columns[:_DRAWN]
    with style():
        figure = new_figure(2.6, WIDTH)
        panels = figure.subplots(1, 2 if shown else 1, squeeze=False)[0]
        ends = []
        for column, colour in zip(shown, _COLOURS):
            means = frame[frame["column"] == column].groupby("step")["ami"].mean()
            panels[0].plot(means.index, means, color=colour, lw=2, marker=".", label=clean(column, 30))
            ends.append(f"AMI with {clean(column, 30)} ends at {number(means.iloc[-1])}")
        if shown:
            panels[0].axhline(0, color="0.6", lw=0.8)
            panels[0].set_title("agreement (AMI; 0: chance)", loc="left", fontsize=9)
            panels[0].legend(fontsize=8)
        balance = frame.groupby("step")["balance"].mean()
        panels[-1].plot(balance.index, balance, color="0.3", lw=2, marker=".")
        panels[-1].set_ylim(0, 1.05)
        panels[-1].set_title("balance (1: equally large)", loc="left", fontsize=9)
        for axes in panels:
            axes.set_xlabel("optimiser step")
        ends.append(f"balance ends at {number(balance.iloc[-1])}")
        content = svg_bytes(figure)
    more = f" {len(columns) - len(shown)} more columns are in logs/clusters.csv." if len(columns) > len(shown) else ""
    caption = f"After each refresh, mean over the heads; every value is in logs/clusters.csv.{more}"
    return Picture("clusters", content, "svg", "Clusters: " + "; ".join(ends), caption, "Clusters")


def _over_heads(values: pd.Series) -> str:
    known = values.dropna()
    return spread(known.mean(), known.std() if len(known) > 1 else None) if len(known) else number(None)
