"""Run folders of age-site evaluations, written as the runs layer writes them, from generated predictions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from report_fixture import common

from medssl.evaluation.age_site import compare_age_site, summarise_age_site

# arm: method, family, debias, combat, age error (factor), share of people whose site is found
ARMS = {
    "raw features": (None, "raw features", None, None, 1.5, 0.95),
    "raw + ComBat": (None, "raw features", None, "input", 1.7, 0.30),
    "supervised": ("supervised", "supervised", None, None, 1.15, 0.70),
    "y_aware": ("y_aware", "y_aware", None, None, 1.0, 0.60),
    "y_aware + fair_kl 1": ("y_aware", "y_aware", {"name": "fair_kl", "weight": 1, "on": "z"}, None, 1.0, 0.35),
    "y_aware + fair_kl 10": ("y_aware", "y_aware", {"name": "fair_kl", "weight": 10, "on": "z"}, None, 1.06, 0.15),
    "y_aware + end 1": ("y_aware", "y_aware", {"name": "end", "weight": 1, "on": "h"}, None, 1.05, 0.45),
    "l_exp": ("l_exp", "l_exp", None, None, 1.03, 0.62),
    "l_exp + fair_kl 1": ("l_exp", "l_exp", {"name": "fair_kl", "weight": 1, "on": "z"}, None, 1.05, 0.3),
    "l_exp + fair_kl 10": ("l_exp", "l_exp", {"name": "fair_kl", "weight": 10, "on": "z"}, None, 1.15, 0.05),
}


def age_site_run(
    folder: Path,
    *,
    sites=3,
    people=120,
    external=0,
    seeds=3,
    arms=tuple(ARMS),
    layers=("z", "h"),
    error=5.0,
):
    """Arms that find the site in a known share of the people, and else guess by age; returns the summary."""
    rng = np.random.default_rng(11)
    internal = _people(rng, people, [str(i + 1) for i in range(sites)], "internal")
    unseen = _people(rng, external, [f"new{i + 1}" for i in range(5)], "external")
    table = pd.concat([internal, unseen] if external else [internal], ignore_index=True)
    rows, frames, maps = [], [], []
    for arm in arms:
        method, family, debias, combat, factor, found = ARMS[arm]
        for layer in layers if method else ("input",):
            worse = layer == "h"
            share = found + (1 - found) * 0.4 * worse
            wrong = error * factor * (1 + 0.2 * worse)
            parts = [_predict(rng, table, seed, wrong, share, sites) for seed in range(seeds)]
            frame = pd.concat(parts, ignore_index=True).assign(arm=arm, layer=layer)
            frames.append(frame)
            maps += [_map(rng, table, kind, found, sites).assign(arm=arm, layer=layer) for kind in ("pca", "tsne")]
            rows.append(
                {"arm": arm, "method": method, "family": family, "debias": debias, "combat": combat, "layer": layer}
                | summarise_age_site(frame, n_bootstrap=100, n_permutations=100).to_json()
            )
    everyone = pd.concat(frames)
    left_out = {"rows": _left_out(rng, arms, sites, layers)}
    baseline = "supervised" if "supervised" in arms else arms[0]
    summary = {
        "kind": "age_site", "evaluated_on": "test", "public_splits": bool(external), "n_people": len(table),
        "n_sites": sites, "chance": 1 / sites, "age_only": rows[0]["bacc_age_only"], "baseline": baseline,
        "seconds": 512.0, "notes": ["Folds hold all volumes of a person together."], "rows": rows,
        "paired": _paired(everyone, baseline, ("mae_internal", "bacc")), "leave_site_out": left_out,
    }  # fmt: skip
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "eval/age_site.json").write_text(json.dumps(summary))
    columns = [
        "arm",
        "layer",
        "seed",
        "fold",
        "set",
        "subject",
        "site",
        "age",
        "age_pred",
        "site_pred",
        "site_pred_age_only",
    ]
    everyone[columns].to_csv(folder / "eval/per_person.csv", index=False)
    columns = ["arm", "layer", "kind", "subject", "x", "y", "age", "site", "set"]
    pd.concat(maps)[columns].to_csv(folder / "eval/embedding_maps.csv", index=False)
    cells = [
        {"arm": a, "fold": f"fold{f}", "seed": 0, "steps": 300, "seconds": 4.2, "final_loss": 1.25, "collapse": ""}
        for a in arms for f in range(2)
    ]  # fmt: skip
    pd.DataFrame(cells).to_csv(folder / "eval/cells.csv", index=False)
    common(folder, "compare")
    return summary


def _people(rng, n, names, which):
    """Sites of unequal size whose mean ages differ: age and site are confounded."""
    weights = 1 / np.arange(1, len(names) + 1) ** 0.5
    site = rng.choice(len(names), n, p=weights / weights.sum())
    age = np.clip(rng.normal(25 + 40 * site / max(len(names) - 1, 1), 9), 6, 90)
    subjects = [f"{which}{i:04d}" for i in range(n)]
    return pd.DataFrame({"set": which, "subject": subjects, "site": np.array(names)[site], "age": age.round(2)})


def _predict(rng, table, seed, error, found, sites):
    n = len(table)
    by_age = (
        np.clip(np.rint((table["age"] - 25 + rng.normal(0, 8, n)) / 40 * (sites - 1)), 0, sites - 1).astype(int) + 1
    )
    guess = by_age.astype(str).to_numpy()
    site = np.where(rng.random(n) < found, table["site"], guess)
    seen = (table["set"] == "internal").to_numpy()
    person = np.random.default_rng(5).normal(0, 1, n)  # the same people are hard for every arm
    pull = 0.85 * (table["age"] - 40) + 40
    predicted = pull + error * (0.8 * person + 0.6 * rng.normal(0, 1, n)) * np.where(seen, 1, 1.3)
    return table.assign(
        seed=seed, fold=rng.choice(["fold0", "fold1"], n), age_pred=predicted.round(3),
        site_pred=np.where(seen, site, None), site_pred_age_only=np.where(seen, guess, None),
    )  # fmt: skip


def _paired(table, baseline, metrics):
    if len(set(table["arm"])) == 1:
        return []
    parts = [compare_age_site(table, baseline, metric, n_bootstrap=1000) for metric in metrics]
    rows = pd.concat(parts).to_dict("records")
    return [row | {"ci": [row.pop("low"), row.pop("high")]} for row in rows]


def _left_out(rng, arms, sites, layers):
    rows = []
    for arm in arms[:2]:
        name, mae = {"arm": arm, "layer": layers[0]}, 5 + rng.random()
        all_sites = {"site": "all", "mae_external": mae, "mae_external_ci": [mae - 0.5, mae + 0.5], "r_external": 0.8}
        rows.append(name | all_sites | {"n_people": 90})
        rows += [name | {"site": str(i + 1), "n_people": 30, "mae_external": mae + rng.normal()} for i in range(sites)]
    return rows


def _map(rng, table, kind, found, sites):
    """Age runs along x; the more of the site an arm keeps, the more the sites lie apart in y."""
    place = table["site"].str.extract(r"(\d+)")[0].astype(int)
    x = table["age"] / 10 + rng.normal(0, 0.7, len(table))
    y = found * 8 * (place / sites) + rng.normal(0, 0.6, len(table))
    columns = {"kind": kind, "x": x if kind == "pca" else np.sin(x) * 9, "y": y}
    return table.assign(**columns)
