"""Tables of an age-site evaluation: all arms and layers, paired differences, sites left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from medssl.reporting.age_site_results import (
    METRICS,
    SIGNIFICANCE,
    SITE_DIGITS,
    Result,
    paired_reading,
    results_of,
    with_ends,
)
from medssl.reporting.describe import Table, table_of
from medssl.reporting.text import MISSING, clean, finite, number, signed, spread

MAX_COLUMNS: Final = 12
ALL_SITES: Final = "all"  # how the run calls the row of all left-out sites together
_NAMES: Final = {"n_people": "people", "r_external": "r"}


def comparison_table(summary: Mapping[str, Any]) -> Table | None:
    """One row per arm and layer; what is known of none is left out."""
    results = results_of(summary)
    columns: dict[str, list[str]] = {
        "arm": [clean(r.arm, 60) for r in results],
        "layer": [clean(r.layer, 16) for r in results],
        "MAE, seen sites (years)": [_measure(r, "mae_internal", 2) for r in results],
        "MAE, unseen sites (years)": [_measure(r, "mae_external", 2) for r in results],
        "site accuracy": [_measure(r, "bacc", SITE_DIGITS) for r in results],
        "score": [_measure(r, "score", 2) for r in results],
        "age alone": [number(r.value("bacc_age_only"), SITE_DIGITS) for r in results],
        "shuffled sites": [_ends(r.interval("bacc_permutation"), SITE_DIGITS) for r in results],
        "chance": [number(r.value("bacc_chance"), SITE_DIGITS) for r in results],
        "r": [number(r.value("r_internal"), 2) for r in results],
        "r, unseen": [number(r.value("r_external"), 2) for r in results],
        "R²": [number(r.value("r2_internal"), 2) for r in results],
        "R², unseen": [number(r.value("r2_external"), 2) for r in results],
        "people": [_count(r.values.get("n_people")) for r in results],
        "seeds": [_count(r.values.get("n_seeds")) for r in results],
    }
    known = {name: cells for name, cells in columns.items() if any(cell != MISSING for cell in cells)}
    same = [name for name in ("chance", "people", "seeds") if name in known and len(set(known[name])) == 1]
    shared = ", ".join(f"{name} {known.pop(name)[0]}" for name in same)
    for i, result in enumerate(results):
        if result.values.get("below_chance") and "site accuracy" in known:
            known["site accuracy"][i] += " below chance: artefact"
    score = (
        "score = MAE at unseen sites x site accuracy to the power 0.3, lower is better. " if "score" in known else ""
    )
    caption = (
        "Each figure with ± its standard deviation over seeds (where there are several) and, in brackets, its 95 % "
        "interval over people. Site accuracy is balanced accuracy of a linear probe at seen sites: beside it what the "
        f"probe reaches on shuffled sites, by chance, and from true age alone. {score}"
        "Layer z is the projection, h the output of the encoder."
        + (f" The same in every row: {shared}." if shared else "")
    )
    return table_of(caption, list(known), zip(*known.values()), words=2)


def _measure(result: Result, name: str, digits: int) -> str:
    text = spread(result.values.get(name), result.values.get(f"{name}_sd"), digits)
    ends = result.interval(f"{name}_ci")
    return f"{text} [{_ends(ends, digits)}]" if ends and text != MISSING else text


def _ends(ends: tuple[float, float] | None, digits: int) -> str:
    return f"{number(ends[0], digits)} to {number(ends[1], digits)}" if ends else MISSING


def _count(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(count, 12)} {clean(name, 20)}" for name, count in value.items()) or MISSING
    return number(value, 0)


def difference_table(summary: Mapping[str, Any]) -> Table | None:
    """The paired differences to the baseline and their reading: one row per arm and layer, one column per measure."""
    paired = summary.get("paired") or []
    metrics = list(dict.fromkeys(str(row["metric"]) for row in paired))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in paired:
        key = (str(row["arm"]), str(row["baseline"]), str(row["layer"]))
        rows.setdefault(key, {})[str(row["metric"])] = _difference(row)
    cells = [
        [f"{clean(arm, 60)} against {clean(baseline, 60)}", clean(layer, 16), *(found.get(m, MISSING) for m in metrics)]
        for (arm, baseline, layer), found in rows.items()
    ]
    caption = (
        f"{len(paired)} differences over the same people, with their 95 % interval; below 0 is better in every measure "
        "but r and R². p is corrected for the number of comparisons (Holm), the intervals are not. A difference is "
        f"called lower or higher where p is below {SIGNIFICANCE}, or, without p, where the interval leaves out 0."
    )
    columns = ["comparison", "layer", *(METRICS.get(m, clean(m, 40)) for m in metrics)]
    return table_of(caption, columns, cells, words=len(columns))


def _difference(row: Mapping[str, Any]) -> str:
    ends = with_ends(row)
    known = finite(ends["low"]) is not None and finite(ends["high"]) is not None
    interval = f" [{signed(ends['low'])} to {signed(ends['high'])}]" if known else ""
    p = finite(row.get("p_holm"))
    chance = "" if p is None else ", p < 0.001" if p < 0.001 else f", p = {number(p)}"
    return f"{signed(row['difference'])}{interval}{chance}: {paired_reading(row)}"


def left_out_tables(summary: Mapping[str, Any]) -> tuple[Table | None, Table | None]:
    """People predicted by models that never saw their site: all sites together, and each site."""
    rows = (summary.get("leave_site_out") or {}).get("rows") or []
    caption = "Leave-site-out: the people of each site are predicted by a model and a probe that saw no one of it."
    together = _left_out_table(f"{caption} Brackets: 95 % interval.", [r for r in rows if r.get("site") == ALL_SITES])
    return together, _left_out_table(f"{caption} One row per site.", [r for r in rows if r.get("site") != ALL_SITES])


def _left_out_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """The columns that the run wrote and that say something."""
    first = [name for name in ("arm", "layer", "site") if any(name in row for row in rows)]
    columns = [*first, *dict.fromkeys(key for row in rows for key in row if key not in first)]
    shown = [c for c in columns if any(_left_out_cell(row, c) != MISSING for row in rows)][:MAX_COLUMNS]
    cells = [[_left_out_cell(row, column) for column in shown] for row in rows]
    titles = [METRICS.get(c) or _NAMES.get(c) or clean(c, 30).replace("_", " ") for c in shown]
    return table_of(caption, titles, cells, words=len(first))


def _left_out_cell(row: Mapping[str, Any], column: str) -> str:
    """A plain value with its interval when the row brings one; nested parts belong elsewhere."""
    value = row.get(column)
    if isinstance(value, (Mapping, list, tuple)) or value is None:
        return MISSING
    ends = Result("", "", row).interval(f"{column}_ci")
    whole = isinstance(value, int) and not isinstance(value, bool)
    text = clean(value, 60) if isinstance(value, (str, bool)) else number(value, 0 if whole else 3)
    return f"{text} [{_ends(ends, 2)}]" if ends else text
