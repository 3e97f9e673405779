"""From the cells of a comparison to the tables that are reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from medssl.config.age_site import INPUT
from medssl.config.compare import CompareArm, CompareConfig
from medssl.core.files import write_json
from medssl.evaluation.age_site import METRICS, compare_age_site, summarise_age_site
from medssl.evaluation.maps import flat_maps
from medssl.reporting.age_site_results import Result as Shown
from medssl.reporting.age_site_results import before_after
from medssl.reporting.tables import write_csv
from medssl.runs.compare_cells import EMBEDDINGS, PER_PERSON, CompareCell
from medssl.runs.compare_folds import Fold
from medssl.runs.grid import Result
from medssl.runs.leaks import LeakCheck
from medssl.runs.volumes import Cohort

log = logging.getLogger(__name__)

Cells = Mapping[CompareCell, Result]

COLUMNS: Final = (
    "arm", "layer", "seed", "fold", "set", "subject", "site", "age", "age_pred", "site_pred", "site_pred_age_only",
)  # fmt: skip
_TEXT: Final = ("subject", "site", "site_pred", "site_pred_age_only", "set", "layer")


@dataclass
class Compared:
    """What a comparison found."""

    summary: dict[str, Any]
    folder: Path
    report: Path | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    """None here: a cell that fails ends this comparison."""

    def text(self) -> str:
        """A table for people."""
        rows = self.summary["rows"]
        outside = any(row["mae_external"] is not None for row in rows)
        width = max(len("arm"), *(len(row["arm"]) for row in rows)) + 2
        title = f"{'arm':<{width}}{'layer':<8}{'age MAE':>16}{'r':>8}{'site BAcc':>18}"
        lines = [title + (f"{'unseen MAE':>14}{'score':>9}" if outside else "")]
        for row in rows:
            line = f"{row['arm']:<{width}}{row['layer']:<8}{_spread(row, 'mae_internal', 2):>16}"
            line += f"{_shown(row['r_internal'], 3):>8}{_spread(row, 'bacc', 3):>18}"
            more = f"{_shown(row['mae_external'], 2):>14}{_shown(row['score'], 3):>9}" if outside else ""
            lines.append(line + more)
        summary = self.summary
        floor = f"{_shown(summary['age_only'], 3)} from true age alone, {_shown(summary['chance'], 3)} by chance"
        lines.append(f"\n{summary['n_people']} people of {summary['n_sites']} sites; the site's accuracy is {floor}.")
        lines.append("+-: standard deviation over seeds; intervals over people are in the report.")
        lines += [f"note: {note}" for note in summary["notes"]]
        return "\n".join([*lines, f"report: {self.report}"])

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        return {**self.summary, "report": str(self.report)}


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(row: Mapping[str, Any], name: str, digits: int) -> str:
    sd = row[f"{name}_sd"]
    return _shown(row[name], digits) + ("" if sd is None else f" +- {sd:.{digits}f}")


def summarise_comparison(
    config: CompareConfig, cohort: Cohort, folds: Mapping[str, Fold], results: Cells, folder: Path, checked: LeakCheck
) -> Compared:
    """Write the tables of every finished cell, and what they amount to.

    Args:
        config: The plan.
        cohort: Its people.
        folds: By name.
        results: Of every cell.
        folder: The run's folder.
        checked: What the guard against leaks had to say, and other notes.
    """
    table = pd.concat([_per_person(folder, cell) for cell in results], ignore_index=True)
    left = table["fold"].map(lambda name: folds[name].site is not None).to_numpy(dtype=bool)
    main, left_out = table[~left], table[left]
    write_csv(main, folder / "eval" / PER_PERSON)
    if len(left_out):
        write_csv(left_out, folder / "eval" / "leave_site_out.csv")
    write_csv(_cell_table(results), folder / "eval" / "cells.csv")
    rows = [row for arm in config.arms for row in _arm_rows(config, arm, main)]
    internal = main[main["set"] == "internal"]
    n_sites = int(internal["site"].nunique())
    summary = {
        "kind": "age_site",
        "evaluated_on": config.protocol.evaluate_on,
        "public_splits": _public(config, cohort),
        "transductive": config.data.transductive,
        "n_people": int(main["subject"].nunique()),
        "n_sites": n_sites,
        "chance": 1 / n_sites if n_sites else None,
        "age_only": rows[0]["bacc_age_only"],
        "baseline": config.baseline if len(config.arms) > 1 else None,
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "notes": [*_notes(config, cohort, folds, results), *checked.notes],
        "rows": rows,
        "paired": _paired(config, main),
        "leave_site_out": {"rows": _left_out_rows(config, folds, left_out)} if len(left_out) else None,
    }
    write_json(folder / "eval" / "age_site.json", json.loads(json.dumps(summary, default=_plain)))
    maps = _maps(config, rows, folds, folder)
    if maps is not None:
        write_csv(maps, folder / "eval" / "embedding_maps.csv")
    return Compared(summary, folder)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _per_person(folder: Path, cell: CompareCell) -> pd.DataFrame:
    """Only empty cells are missing: a person or a site may be called NA."""
    rows = pd.read_csv(
        folder / "cells" / cell.name / PER_PERSON,
        dtype=dict.fromkeys(_TEXT, str),
        keep_default_na=False,
        na_values=[""],
    )
    return rows.assign(arm=cell.arm, seed=cell.seed, fold=cell.fold)[list(COLUMNS)]


def _cell_table(results: Cells) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "arm": cell.arm,
                "fold": cell.fold,
                "seed": cell.seed,
                "steps": result.get("steps"),
                "seconds": result["seconds"],
                "train_seconds": result.get("train_seconds"),
                "final_loss": result.get("loss"),
                "collapse": "; ".join(result.get("collapse", [])),
            }
            for cell, result in results.items()
        ]
    )


def _arm_rows(config: CompareConfig, arm: CompareArm, table: pd.DataFrame) -> list[dict[str, Any]]:
    protocol, rows = config.protocol, []
    debias = None if arm.debias is None else {key: getattr(arm.debias, key) for key in ("name", "weight", "on")}
    for layer in config.layers(arm):
        part = table[(table["arm"] == arm.name) & (table["layer"] == layer)]
        found = summarise_age_site(
            part, n_bootstrap=protocol.n_bootstrap, n_permutations=protocol.n_permutations, seed=config.seed
        )
        rows.append(
            {
                "arm": arm.name,
                "method": None if arm.method is None else arm.method.name,
                "family": _family(config, arm),
                "debias": debias,
                "combat": None if arm.combat is None else arm.combat.on,
                "layer": layer,
                **found.to_json(),
            }
        )
    return rows


def _family(config: CompareConfig, arm: CompareArm) -> str:
    """The arm that does nothing about the site and is otherwise the same, or the first of those that are."""

    def same(other: CompareArm) -> bool:
        return all(getattr(other, name) == getattr(arm, name) for name in ("method", "weights", "steps"))

    alike = [other for other in config.arms if same(other)]
    return next((one.name for one in alike if one.debias is None and one.combat is None), alike[0].name)


def _paired(config: CompareConfig, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every arm against the baseline on every layer; the input of an arm without a method stands for each layer."""
    if len(config.arms) < 2:
        return []
    layers = list(dict.fromkeys(layer for arm in config.arms for layer in config.layers(arm) if layer != INPUT))
    given = table[table["layer"] == INPUT]
    stands = [given.assign(layer=layer) for layer in layers] if layers else [given]
    everywhere = pd.concat([table[table["layer"] != INPUT], *stands], ignore_index=True)
    rows = []
    for metric in METRICS:
        part = everywhere
        if metric in ("mae_internal", "bacc"):
            part = part[part["set"] == "internal"]
        else:  # arms without external people (ComBat) cannot be compared on them
            there = set(part["arm"][part["set"] == "external"])
            part = part[part["arm"].isin(there)]
        shared = part.groupby("layer")["arm"].nunique()
        part = part[part["layer"].isin(shared[shared > 1].index)]
        part = part[part["layer"].isin(set(part["layer"][part["arm"] == config.baseline]))]
        if not len(part):
            continue
        found = compare_age_site(
            part, config.baseline, metric, n_bootstrap=10 * config.protocol.n_bootstrap, seed=config.seed
        )
        rows += [
            {
                **{name: row[name] for name in ("arm", "baseline", "layer", "metric", "difference", "p", "p_holm")},
                "ci": [row["low"], row["high"]],
            }
            for row in found.to_dict(orient="records")
        ]
    return rows


def _left_out_rows(config: CompareConfig, folds: Mapping[str, Fold], table: pd.DataFrame) -> list[dict[str, Any]]:
    """Per arm and layer: all left-out sites together, then each."""
    rows = []
    outside = table[table["set"] == "external"].assign(site_out=table["fold"].map(lambda name: folds[name].site))
    for arm in config.arms:
        for layer in config.layers(arm):
            part = outside[(outside["arm"] == arm.name) & (outside["layer"] == layer)]
            if not len(part):
                continue
            found = summarise_age_site(part, n_bootstrap=config.protocol.n_bootstrap, seed=config.seed)
            name = {"arm": arm.name, "layer": layer}
            rows.append(
                {
                    **name,
                    "site": "all",
                    "n_people": found.n_people,
                    "mae_external": found.mae_external,
                    "mae_external_ci": list(found.mae_external_ci or ()),
                    "r_external": found.r_external,
                }
            )
            for site, people in part.groupby("site_out"):
                error = (people["age_pred"] - people["age"]).abs().mean()
                n_people = int(people["subject"].nunique())
                rows.append({**name, "site": str(site), "n_people": n_people, "mae_external": float(error)})
    return rows


def _public(config: CompareConfig, cohort: Cohort) -> bool:
    """Whether the evaluated people are those of published splits with seen and unseen sites."""
    used = set(cohort.chosen.table["split"].dropna())
    return config.protocol.folds is None and bool(used & {"internal_test", "external_test"})


def _notes(config: CompareConfig, cohort: Cohort, folds: Mapping[str, Fold], results: Cells) -> list[str]:
    protocol, notes = config.protocol, []
    if protocol.folds is not None:
        notes.append(f"{protocol.folds} folds hold all rows of a person together and are balanced over sites.")
    z = "each projection scaled to length 1" if protocol.normalise_z else "projections as they are"
    notes.append(f"Probed layers: {', '.join(protocol.layers)} ({z}); site probe solved by {protocol.solver}.")
    for arm in config.arms:
        missing = [layer for layer in protocol.layers if layer not in config.layers(arm)]
        if arm.method is not None and missing and arm.combat is None:
            notes.append(f"`{arm.name}` has no layer {', '.join(missing)}.")
        said = [note for cell, result in results.items() if cell.arm == arm.name for note in result["notes"]]
        notes += [f"`{arm.name}`: {note}" for note in dict.fromkeys(said)]
        fallen = sum(bool(result.get("collapse")) for cell, result in results.items() if cell.arm == arm.name)
        if fallen:
            notes.append(f"`{arm.name}`: the embedding collapsed in {fallen} of its trainings (eval/cells.csv).")
    if any(fold.site is not None for fold in folds.values()):
        notes.append(f"Sites were left out with seed {protocol.seeds[0]} alone.")
    if cohort.left_out:
        notes.append(f"Left out by the configuration: {len(cohort.left_out)} rows.")
    if config.status:
        notes.append(f"Status: {config.status}")
    return notes


def _maps(
    config: CompareConfig, rows: Sequence[Mapping[str, Any]], folds: Mapping[str, Fold], folder: Path
) -> pd.DataFrame | None:
    """PCA and t-SNE of one fold's evaluated people, before and after something was done about the site."""
    pair = before_after([Shown(str(row["arm"]), str(row["layer"]), row) for row in rows])
    tables = []
    for shown in pair:
        cell = CompareCell(shown.arm, next(iter(folds)), config.protocol.seeds[0])
        people = _per_person(folder, cell)
        people = people[people["layer"] == shown.layer].reset_index(drop=True)
        with np.load(folder / "cells" / cell.name / EMBEDDINGS, allow_pickle=False) as arrays:
            places = flat_maps(arrays[shown.layer], seed=config.seed)
        if not places:
            log.info("no maps of embeddings: only %d people were evaluated in one cell", len(people))
            return None
        known = people[["arm", "layer", "subject", "age", "site", "set"]]
        tables += [known.assign(kind=kind, x=xy[:, 0], y=xy[:, 1]) for kind, xy in places.items()]
    columns = ["arm", "layer", "kind", "subject", "x", "y", "age", "site", "set"]
    return pd.concat(tables, ignore_index=True)[columns]
