"""Tables of a report: scores, comparisons, data, settings and versions, as plain text cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pandas as pd
import yaml

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
    signed,
    spread,
)

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
    columns = [
        "arm",
        "labels: train + validation",
        "Dice, mean ± sd",
        "min to max",
        "HD95 (mm)",
        "missed",
        "draws × seeds",
    ]
    rows = [
        [
            clean(row["arm"], 60),
            f"{_whole(row['n_labelled'])} + {_whole(row.get('n_validation'))}",
            spread(row.get("mean"), row.get("sd")),
            f"{number(row.get('min'))} to {number(row.get('max'))}",
            number(row.get("hd95_mm"), 1),
            _whole(row.get("missed")),
            f"{_whole(row.get('n_draws'))} × {_whole(row.get('n_seeds'))}",
        ]
        for row in sorted(summary.get("table") or [], key=lambda row: row["n_labelled"])
    ]
    caption = (
        "Dice on the test people: 0 when exactly one of label and prediction is empty, left out when both are. ± is "
        "the standard deviation over draws and seeds. HD95 counts a missed structure with the diagonal of the image; "
        "missed is the number of structures that are in the label and not found."
    )
    return table_of(caption, columns, rows)


def paired_table(summary: Mapping[str, Any]) -> Table | None:
    """The paired differences with their intervals and how each is to be read."""
    columns = ["comparison", "reading", "training labels", "difference", "95 % interval", "people", "draws"]
    rows = []
    for row in sorted(summary.get("paired") or [], key=lambda row: (str(row["arm"]), row["n_labelled"])):
        known = finite(row.get("low")) is not None and finite(row.get("high")) is not None
        word = ("higher" if row["difference"] > 0 else "lower") if excludes_zero(row) else "no difference shown"
        interval = f"{signed(row['low'])} to {signed(row['high'])}" if known else "none"
        rows.append(
            [
                f"{clean(row['arm'], 60)} against {clean(row['baseline'], 60)}",
                word,
                _whole(row["n_labelled"]),
                signed(row["difference"]),
                interval,
                _whole(row.get("n_people")),
                _whole(row.get("n_draws")),
            ]
        )
    caption = (
        "Differences in Dice over the same test people and draws; interval from a bootstrap over people and over draws."
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
    person = "group" if "group" in frame and frame["group"].notna().any() else "subject"
    split = frame["split"] if "split" in frame else pd.Series(None, index=frame.index, dtype=object)
    split = split.astype(object).where(split.notna(), "no split named")
    columns = ["split", "volumes", "with a label", "people"]
    extras = [name for name in ("site", "sex", "age") if name in frame and frame[name].notna().any()]
    columns += [{"site": "sites", "sex": "sex", "age": "age (years), mean ± sd, range"}[name] for name in extras]
    parts = [(clean(name, 40), frame[split == name]) for name in dict.fromkeys(split)]
    rows = []
    for name, part in [*parts, ("all", frame)] if len(parts) > 1 else parts:
        labelled = int(part["label"].notna().sum()) if "label" in part else 0
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
