"""Pictures of what an embedding holds of the site: maps coloured by age and by site, and the confusion of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from medssl.reporting.age_site_results import Result, before_after, people_of, results_of, short
from medssl.reporting.drawing import INK, Picture, arm_looks, new_figure, style, svg_bytes
from medssl.reporting.text import clean, number

MAX_SITES: Final = 12  # that many pairs of colour and marker stay apart
LARGEST: Final = 6
MAX_CELLS_NAMED: Final = 12
REST: Final = "#c8c8c8"
KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "pca": ("PCA", "The two directions of largest spread (principal components)."),
    "tsne": ("t-SNE", "t-SNE keeps neighbours together; distances between groups and sizes of groups mean nothing."),
}


def embedding_maps(summary: Mapping[str, Any], maps: pd.DataFrame | None) -> list[Picture]:
    """One picture per kind of map: rows are before and after debiasing, columns are coloured by age and by site."""
    if maps is None:
        return []
    maps = maps[maps["x"].notna() & maps["y"].notna()]
    there = set(zip(maps["arm"], maps["layer"]))
    picked = before_after([r for r in results_of(summary) if (r.arm, r.layer) in there])
    picked = picked or [Result(arm, layer, {}) for arm, layer in sorted(there)[:1]]
    pictures = (_map(kind, picked, maps[maps["kind"] == kind]) for kind in KINDS)
    return [picture for picture in pictures if picture is not None]


def _map(kind: str, picked: Sequence[Result], maps: pd.DataFrame) -> Picture | None:
    drawn = [(r, frame) for r in picked if len(frame := people_of(maps, r))]
    if not drawn:
        return None
    everyone = pd.concat([frame for _, frame in drawn])
    looks, named = _site_looks(everyone.drop_duplicates(["site", "subject"])["site"])
    ages = everyone["age"].dropna()
    scale = Normalize(*(np.percentile(ages, [0, 100]) if len(ages) else (0, 1)))
    title, reading = KINDS[kind]
    with style():
        figure = new_figure(0.65 + 0.18 * (1 + len(named) // 4) + 2.75 * len(drawn))
        figure.set_dpi(200)  # of the dots, which are pixels inside the SVG when there are many
        panels = figure.subplots(len(drawn), 2, squeeze=False)
        for row, (result, frame) in enumerate(drawn):
            options: dict[str, Any] = {"s": _size(len(frame)), "lw": 0, "rasterized": len(frame) > 800}
            by_age, by_site = panels[row]
            by_age.scatter(frame["x"], frame["y"], c=frame["age"], cmap="cividis", norm=scale, **options)
            for site in looks:  # grey ones first, so that they cover nothing
                own = frame[frame["site"] == site]
                colour, marker = looks[site]
                by_site.scatter(own["x"], own["y"], color=colour, marker=marker, alpha=0.8, **options)
            for axes, what in ((by_age, "age"), (by_site, "site")):
                axes.set_title(f"{short(result)}\ncoloured by {what}", loc="left", fontsize=8.5)
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(f"{title} 1 (no unit)", fontsize=8)
            by_age.set_ylabel(f"{title} 2 (no unit)", fontsize=8)
        colours = mpl.cm.ScalarMappable(scale, "cividis")
        figure.colorbar(colours, ax=panels[:, 0], location="bottom", shrink=0.8, aspect=30, label="age (years)")
        _site_legend(panels[0, 1], looks, named, panels[-1, 1])
        content = svg_bytes(figure)
    order = "Above: before, below: after something was done about the site. " if len(drawn) > 1 else ""
    few = "" if len(named) == len(looks) else f" {len(looks) - len(named)} smaller sites are grey."
    n_people = everyone[["site", "subject"]].drop_duplicates().shape[0]
    caption = f"One dot is one of {n_people} people. {order}{reading}{few}"
    names = ", ".join(short(r) for r, _ in drawn)
    alt = f"{title} of the embeddings of {names}: {n_people} people of {len(looks)} sites, by age and by site"
    return Picture(f"map-{kind}", content, "svg", alt, caption, f"Map of the embedding: {title}")


def _size(n: int) -> float:
    return 16 if n < 150 else 8 if n < 800 else 4


def _site_looks(sites: pd.Series) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Colour and marker of each site, grey ones first, and the sites that a legend names: the largest ones."""
    counts = sites.value_counts()
    ordered = sorted((str(site) for site in counts.index), key=lambda site: (-counts[site], site))
    named = ordered if len(ordered) <= MAX_SITES else ordered[:LARGEST]
    rest: dict[str, tuple[str, str]] = {site: (REST, "o") for site in ordered if site not in named}
    return rest | arm_looks(named, []), named


def _site_legend(axes: Axes, looks: Mapping[str, tuple[str, str]], named: Sequence[str], below: Axes) -> None:
    """The named sites under the lowest panel."""
    handles = [axes.plot([], [], looks[s][1], color=looks[s][0], ms=5, label=clean(s, 11), ls="")[0] for s in named]
    if len(looks) > len(named):
        handles += axes.plot([], [], "o", color=REST, ms=5, label="other sites", ls="")
    below.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=7.5, columnspacing=0.8
    )


def site_confusion(summary: Mapping[str, Any]) -> Picture | None:
    """Where the site probe puts the people of each site, before and after debiasing; rows add up to 1."""
    tables = {r: table for r in results_of(summary) if (table := _counts(r)) is not None}
    drawn = [(r, tables[r]) for r in before_after(list(tables))]
    if not drawn:
        return None
    people = pd.concat([table.sum(axis=1) for _, table in drawn]).groupby(level=0).max()
    sites = sorted(people.index, key=lambda site: (-people[site], site))
    step = 1 if len(sites) <= 30 else 3
    texts = []
    with style():
        figure = new_figure(3.1 if len(drawn) > 1 else 4.6)
        panels = figure.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
        for axes, (result, table) in zip(panels, drawn):
            shares = shares_of(table.reindex(index=sites, columns=sites, fill_value=0).to_numpy())
            image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            name_cells(axes, shares)
            mean = float(np.nanmean(np.diag(shares))) if np.isfinite(np.diag(shares)).any() else float("nan")
            texts.append(f"{short(result)}: mean of the diagonal {number(mean, 2)}")
            axes.set_title(f"{short(result)}\nmean of the diagonal {number(mean, 2)}", loc="left", fontsize=8.5)
            size = max(4.5, min(8.0, 130 / len(sites)))
            names = [clean(site, 10) for site in sites[::step]]
            axes.set_xticks(range(0, len(sites), step), names, rotation=90, fontsize=size)
            axes.set_yticks(range(0, len(sites), step), names, fontsize=size)
            axes.grid(visible=False)
            axes.set_xlabel("predicted site")
        panels[0].set_ylabel("true site")
        figure.colorbar(image, ax=list(panels), label="share of the site's people", shrink=0.8, aspect=25)
        content = svg_bytes(figure)
    named = "" if step == 1 else " Every third site is named."
    caption = (
        f"Rows add up to 1: where the probe puts the people of a site, all seeds together. Sites are ordered by number "
        f"of people, the largest first.{named} The mean of the diagonal is the balanced accuracy of the pooled seeds."
        + (" Numbers are per cent." if len(sites) <= MAX_CELLS_NAMED else "")
    )
    alt = f"Confusion of {len(sites)} sites. " + "; ".join(texts)
    return Picture("site-confusion", content, "svg", alt, caption, "Confusion of sites")


def _counts(result: Result) -> pd.DataFrame | None:
    """People by true (row) and predicted site (column); None when the run wrote no such table."""
    found = result.values.get("confusion")
    if not isinstance(found, Mapping) or not isinstance(found.get("sites"), list):
        return None
    sites = [str(site) for site in found["sites"]]
    try:
        counts = np.asarray(found.get("counts"), dtype=float)
    except (TypeError, ValueError):
        return None
    if not sites or counts.shape != (len(sites), len(sites)) or len(set(sites)) < len(sites) or not (counts >= 0).all():
        return None
    return pd.DataFrame(counts, index=sites, columns=sites)


def shares_of(counts: np.ndarray) -> np.ndarray:
    """Counts (K, K) as shares of each row; NaN for a site without people."""
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def name_cells(axes: Axes, shares: np.ndarray) -> None:
    """Shares in per cent in the cells of a small confusion."""
    if len(shares) > MAX_CELLS_NAMED:
        return
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.55 else INK
            size = 9 if len(shares) <= 5 else 6
            axes.annotate(f"{100 * share:.0f}", (column, row), ha="center", va="center", color=colour, fontsize=size)
