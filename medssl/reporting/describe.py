"""Tables of a report: scores, comparisons, data, settings and versions, as plain text cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pandas as pd
import yaml

from medssl.reporting.metric import Metric, metric_of, reference_of
from medssl.reporting.source import RunFiles
from medssl.reporting.text import (
    MISSING,
    clean,
    clean_tree,
    duration,
    excludes_zero,
    finite,
    missing,
    number,
    spread,
)
from medssl.reporting.verdict import on_split

MAX_ROWS: Final = 200


@dataclass(frozen=True)
class Table:
    """A table for the page: every cell is text; columns named in ``numeric`` are aligned to the right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[str] = field(default_factory=frozenset)


def table_of(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table | None:
    """A table whose first ``words`` columns are text; None when it would be empty, cut when it would be endless."""
    rows = list(rows)
    if len(rows) > MAX_ROWS:
        caption += f" The first {MAX_ROWS} of {len(rows)} rows."
    return Table(caption, columns, rows[:MAX_ROWS], frozenset(columns[words:])) if rows else None


def _whole(value: Any) -> str:
    known = finite(value)
    if known is None:
        return clean(value)
    return f"{known:.0f}" if known == round(known) else number(known, 1)


def score_table(summary: Mapping[str, Any]) -> Table | None:
    """One row per arm and number of labels, as the run summarised them."""
    metric = metric_of(summary)
    splits = [str(split) for split in summary.get("splits") or []]
    details = _structure_columns() if metric.name == "dice" else _split_columns(metric, splits)
    columns = [
        "arm",
        "labels: train + validation",
        f"{metric.axis}, mean ± sd",
        "min to max",
        *details,
        "draws × seeds",
    ]
    rows = [
        [
            clean(row["arm"], 60),
            f"{_whole(row['n_labelled'])} + {_whole(row.get('n_validation'))}",
            metric.spread(row.get("mean"), row.get("sd")),
            f"{metric.text(row.get('min'))} to {metric.text(row.get('max'))}",
            *(form(row) for form in details.values()),
            f"{_whole(row.get('n_draws'))} × {_whole(row.get('n_seeds'))}",
        ]
        for row in sorted(summary.get("table") or [], key=lambda row: row["n_labelled"])
    ]
    return table_of(_score_caption(metric, summary, splits), columns, rows)


def _score_caption(metric: Metric, summary: Mapping[str, Any], splits: Sequence[str]) -> str:
    if metric.name == "dice":
        return (
            "Dice on the test people: 0 when exactly one of label and prediction is empty, left out when both are. ± "
            "is the standard deviation over draws and seeds. HD95 counts a missed structure with the diagonal of the "
            "image; missed is the number of structures that are in the label and not found."
        )
    where = f" on {clean(splits[0], 40)}" if splits else ""
    known = reference_of(summary)
    nothing = "" if known is None else f" For comparison, {known[1]}: {metric.text(known[0])}."
    return (
        f"{metric.axis[0].upper()}{metric.axis[1:]}{where}; {metric.good} is better. People count alike. ± is the "
        f"standard deviation over draws.{nothing}"
    )


def _structure_columns() -> dict[str, Callable[[Mapping[str, Any]], str]]:
    return {"HD95 (mm)": lambda row: number(row.get("hd95_mm"), 1), "missed": lambda row: _whole(row.get("missed"))}


_MEASURES: Final = {"mae": "MAE", "r": "r", "r2": "R²", "balanced_accuracy": "balanced accuracy", "auc": "AUC"}


def _split_columns(metric: Metric, splits: Sequence[str]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Every measure on every split that is not in the first columns already."""

    def cell(split: str, name: str) -> Callable[[Mapping[str, Any]], str]:
        def form(row: Mapping[str, Any]) -> str:
            found: Any = row.get("splits")
            for key in (split, name):
                found = found.get(key) if isinstance(found, Mapping) else None
            digits = metric.digits if name == metric.name else 3
            return spread(found.get("mean"), found.get("sd"), digits) if isinstance(found, Mapping) else MISSING

        return form

    names = ("mae", "r", "r2") if metric.name == "mae" else ("balanced_accuracy", "auc")
    wanted = [(split, name) for split in splits for name in names if (split, name) != (splits[0], metric.name)]
    return {
        _MEASURES[name] + (f", {clean(split, 40)}" if len(splits) > 1 else ""): cell(split, name)
        for split, name in wanted
    }


def paired_table(summary: Mapping[str, Any]) -> Table | None:
    """The paired differences with their intervals and how each is to be read."""
    metric = metric_of(summary)
    columns = ["comparison", "reading", "training labels", "difference", "95 % interval", "people", "draws"]
    rows = []
    for row in sorted(summary.get("paired") or [], key=lambda row: (str(row["arm"]), on_split(row), row["n_labelled"])):
        known = finite(row.get("low")) is not None and finite(row.get("high")) is not None
        better = metric.better(row["difference"])
        word = metric.good if better else metric.bad
        if not metric.higher:
            word += ": better" if better else ": worse"
        interval = f"{metric.difference(row['low'])} to {metric.difference(row['high'])}" if known else "none"
        rows.append(
            [
                f"{clean(row['arm'], 60)} against {clean(row['baseline'], 60)}{on_split(row)}",
                word if excludes_zero(row) else "no difference shown",
                _whole(row["n_labelled"]),
                metric.difference(row["difference"]),
                interval,
                _whole(row.get("n_people")),
                _whole(row.get("n_draws")),
            ]
        )
    caption = (
        f"Differences in {metric.axis} over the same test people and draws; interval from a bootstrap over people and "
        "over draws."
    )
    return table_of(caption, columns, rows, words=2)


def gap_table(summary: Mapping[str, Any]) -> Table | None:
    """How much of the distance to full supervision each arm closed."""
    rows = [
        [clean(row.get("arm"), 60), _whole(row.get("n_labelled")), _percent(row.get("share"))]
        for row in summary.get("gap_closed") or []
    ]
    caption = (
        "Share of the distance between the baseline and training with all labels; below 0 is worse than the baseline."
    )
    return table_of(caption, ["arm", "training labels", "gap closed"], rows)


def _percent(value: Any) -> str:
    known = finite(value)
    return MISSING if known is None else f"{100 * known:.0f} %".replace("-", "\u2212")


def cell_table(cells: pd.DataFrame | None, caption: str = "Every fine-tuning of this run.") -> Table | None:
    """Every training of a run of many: what it was, when its best checkpoint was, how long it took, how it ended."""
    if cells is None or cells.empty:
        return None
    names = [name for name in _CELL if name in cells]
    rows = [[_CELL[name][1](_plain(row[name])) for name in names] for _, row in cells.iterrows()]
    return table_of(caption, [_CELL[n][0] for n in names], rows, sum(_CELL[name][1] is clean for name in names))


def _plain(value: Any) -> Any:
    """A Python value for a numpy one."""
    return value.item() if hasattr(value, "item") else value


# Columns of eval/cells.csv in the order in which they are shown: title and form. Texts come first.
_CELL: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "arm": ("arm", clean),
    "fold": ("fold", clean),
    "status": ("status", clean),
    "collapse": ("collapse", clean),
    "n_labelled": ("train labels", _whole),
    "n_validation": ("validation labels", _whole),
    "draw": ("draw", _whole),
    "seed": ("seed", _whole),
    "best_step": ("best step", _whole),
    "best_score": ("best validation score", number),
    "final_loss": ("final loss", number),
    "steps": ("steps", _whole),
    "seconds": ("time", duration),
}


def data_table(run: RunFiles) -> Table | None:
    """Volumes, people, labels, sites, sex and age per split."""
    if run.manifest is None or run.manifest.empty or "subject" not in run.manifest:
        return None
    frame = run.manifest
    label = str(run.summary.get("target") or "label")
    person = "group" if "group" in frame and frame["group"].notna().any() else "subject"
    split = frame["split"] if "split" in frame else pd.Series(None, index=frame.index, dtype=object)
    split = split.astype(object).where(split.notna(), "no split named")
    columns = ["split", "volumes", "with a label", "people"]
    extras = [name for name in ("site", "sex", "age") if name in frame and frame[name].notna().any()]
    columns += [{"site": "sites", "sex": "sex", "age": "age (years), mean ± sd, range"}[name] for name in extras]
    parts = [(clean(name, 40), frame[split == name]) for name in dict.fromkeys(split)]
    rows = []
    for name, part in [*parts, ("all", frame)] if len(parts) > 1 else parts:
        labelled = int(part[label].notna().sum()) if label in part else 0
        row = [name, str(len(part)), str(labelled), str(part[person].fillna(part["subject"]).nunique())]
        rows.append(row + [_EXTRA[extra](part[extra]) for extra in extras])
    caption = f"The volumes of this run. People are counted by the column \u201c{person}\u201d."
    return Table(caption, columns, rows[:MAX_ROWS], frozenset(columns[1:4]))


def _sexes(column: pd.Series) -> str:
    counts = column.dropna().astype(str).value_counts().sort_index()
    parts = [f"{count} {clean(name, 20)}" for name, count in counts.items()][:6]
    return ", ".join(parts + _unknown(column))


def _ages(column: pd.Series) -> str:
    ages = pd.to_numeric(column, errors="coerce").dropna()
    if ages.empty:
        return MISSING
    spread = f" ± {ages.std():.1f}" if len(ages) > 1 else ""
    return ", ".join([f"{ages.mean():.1f}{spread}, {ages.min():.0f} to {ages.max():.0f}", *_unknown(column)])


def _sites(column: pd.Series) -> str:
    return ", ".join([str(column.nunique()), *_unknown(column)])


def _unknown(column: pd.Series) -> list[str]:
    return [f"{int(column.isna().sum())} unknown"] if column.isna().any() else []


_EXTRA: Final = {"site": _sites, "sex": _sexes, "age": _ages}


def pairs_table(caption: str, values: Mapping[str, Any], heads: tuple[str, str] = ("what", "value")) -> Table | None:
    """Names and values, nested mappings joined by dots."""
    return table_of(caption, heads, [[clean(key), clean(value, 400)] for key, value in _flat(values)], words=2)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(clean(item) for item in value) or "none"
        else:
            yield name.replace("_", " "), value


def licence_table(run: RunFiles) -> Table | None:
    """What the manifest says about where the data come from and how they may be used."""
    names = ("name", "cohort", "modality", "licence", "citation", "source")
    known = {name: run.meta[name] for name in names if not missing(run.meta.get(name)) and run.meta.get(name) != ""}
    return pairs_table("About the data, from the manifest.", known)


def settings_text(run: RunFiles) -> str:
    """The resolved settings as YAML; folders of paths are left out."""
    if run.config is None:
        return ""
    return yaml.safe_dump(clean_tree(run.config), sort_keys=False, allow_unicode=True, width=100)
