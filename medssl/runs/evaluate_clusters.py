"""Clusters of voxels that a pretraining found: against labels, another view, other people and a blank image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from medssl.config.models import RunConfig
from medssl.core.errors import ConfigError, DataError
from medssl.core.files import write_json
from medssl.core.schema import validate
from medssl.data.items import ItemReader
from medssl.evaluation.unsupervised import (
    BlankCheck,
    Ints,
    Matching,
    invariance,
    match_clusters,
    miou_interval,
    score_clusters,
)
from medssl.inference.predict import evaluating
from medssl.models import ClusterHeads, clusters_from_weights
from medssl.models.weights import read_model
from medssl.reporting.tables import write_csv
from medssl.runs.cluster_maps import Found, blank_images, compare_views, count_clusters, load_cluster_network
from medssl.runs.cohort import Outcome
from medssl.runs.embed import open_for_weights, person_columns, run_config
from medssl.runs.volumes import Cohort, open_items, open_run_cohort
from medssl.training import TrainingConfig
from medssl.training.device import resolve_accelerator

MATCHINGS: Final[Mapping[str, Matching]] = {"main": "hungarian", "over": "many_to_one"}
BLANK_LIMIT: Final = 0.05
"""Share of a blank image outside its largest cluster above which a caution is given."""


def evaluate_clusters(
    weights: Path,
    *,
    manifest: Path | None = None,
    out: Path | None = None,
    fit_splits: Sequence[str] = (),
    splits: Sequence[str] = ("test",),
    config: Path | None = None,
    mapping: Mapping[str, str] | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    force: bool = False,
) -> Outcome:
    """What the clusters of an `iic_segmentation` run are worth.

    Clusters are matched to classes on the labels of one split and scored on another, on the prepared grid: the main
    head one to one (Hungarian), the over-clustering head many to one. Three more checks need no label: whether a place
    keeps its cluster in another view (as the run makes them), whether it has the same cluster in another person's
    image, and whether an image of one intensity is split, which only the border can be the reason for.

    Args:
        weights: Run folder, or its weights folder.
        manifest: Whose images; None: the run's own manifest.
        out: Folder for ``clusters.json`` and ``clusters_per_case.csv``; None: ``eval`` in the run folder.
        fit_splits: Where clusters are matched; empty: the run's ``data.splits``, or ``train``.
        splits: What is scored.
        config: The configuration that weights outside a run folder were trained with.
        mapping: Columns of other names, of ``manifest``.
        seed: Of the views and of the intervals.
        accelerator: auto, cpu or gpu.
        force: Replace results that exist.

    Raises:
        ConfigError: The run has no clusters of places, one split on both sides, or results that exist.
        DataError: No split, or no labels in one of the splits.
        WeightsError: Weights that cannot be read.
    """
    folder = out if out is not None else _run_folder(weights) / "eval"
    if (folder / "clusters.json").exists() and not force:
        raise ConfigError(
            "clusters were evaluated here already", where=str(folder), fix="choose another --out or --force"
        )
    about = read_model(weights)
    heads = clusters_from_weights(weights)
    if heads is None:
        raise ConfigError(
            "these weights hold no clusters of places",
            where=str(weights),
            found=f"method {(about['info'].get('method') or {}).get('name', 'unknown')}",
            fix="name a run of method iic_segmentation; clusters of whole items are in a run's logs/clusters.csv",
        )
    fit = tuple(fit_splits) or run_config(weights, config).data.splits or ("train",)
    shared = sorted(set(fit) & set(splits))
    if shared:
        raise ConfigError(
            f"split {shared[0]} would be matched on and scored: that flatters",
            fix="choose other --fit-split or --split",
        )
    device = torch.device(
        resolve_accelerator(validate(TrainingConfig, {"steps": 1, "accelerator": accelerator}, source="--accelerator"))
    )
    run, cohort, reader = _open(weights, manifest, config, mapping, (*fit, *splits))
    if not cohort.classes:
        raise DataError("no volume has a label to compare clusters with", where=str(run.data.manifest))
    network = load_cluster_network(weights, heads, reader.image_shape).to(device)
    with evaluating(network):
        known, scored = (count_clusters(network, cohort, run, part, device) for part in (fit, tuple(splits)))
        pairs, mean = compare_views(network, run, reader, cohort, tuple(splits), seed, device)
        blanks = blank_images(network, reader.image_shape, {"zero": 0.0, "mean": mean}, device)
    result = _result(heads, cohort, known, scored, pairs, blanks, seed)
    keys = person_columns(cohort, [int(v) for v in cohort.rows(tuple(splits)).table["volume"]], about)
    result |= {
        "run": run.name,
        "method": about["info"].get("method"),
        "steps": about["info"].get("steps"),
        "fit_splits": list(fit),
        "splits": list(splits),
        "n_pretrained_on": int(keys["pretrained_on"].sum()),
        "seed": seed,
    }
    write_csv(_per_case(result, scored), folder / "clusters_per_case.csv")
    write_json(folder / "clusters.json", result)
    return Outcome([*_lines(result), f"written to {folder}"], result)


def _run_folder(weights: Path) -> Path:
    at = weights.parent if weights.is_file() else weights
    return at.parent if at.name == "weights" else at


def _open(
    weights: Path,
    manifest: Path | None,
    config: Path | None,
    mapping: Mapping[str, str] | None,
    splits: tuple[str, ...],
) -> tuple[RunConfig, Cohort, ItemReader]:
    if manifest is not None:
        return open_for_weights(weights, manifest, config=config, mapping=mapping, splits=splits)
    if mapping:
        raise ConfigError("--map names columns of a manifest: give it with --manifest")
    run = run_config(weights, config)
    run = run.model_copy(update={"items": run.items.model_copy(update={"partitions": None})})
    cohort = open_run_cohort(run, splits=splits)
    if not cohort.chosen.table["split"].notna().any():
        raise DataError(
            "the manifest holds no split, so nobody is left to match clusters on",
            where=str(run.data.manifest),
            fix="run `medssl data split`, or name another --manifest",
        )
    return run, cohort, open_items(run, cohort, cohort.chosen)[1]


def _result(
    heads: ClusterHeads,
    cohort: Cohort,
    known: Found,
    scored: Found,
    pairs: Mapping[str, Ints],
    blanks: Mapping[str, Mapping[str, BlankCheck]],
    seed: int,
) -> dict[str, Any]:
    names = ["background", *(f"class {n}" for n in range(1, 1 + max(one.number for one in cohort.classes)))]
    for one in cohort.classes:
        names[one.number] = one.name
    result: dict[str, Any] = {"classes": names, "heads": {}}
    for head, k in heads.n_clusters.items():
        fitted, persons = np.sum(known.counts[head], axis=0), scored.by_person(head)
        matching = match_clusters(fitted, MATCHINGS[head])
        scores = asdict(score_clusters(persons.sum(axis=0), matching))
        result["heads"][head] = {
            "k": k,
            "used": int((persons.sum(axis=(0, 2)) > 0).sum()),
            "matching": MATCHINGS[head],
            "class_of_cluster": [None if c < 0 else names[c] for c in matching],
            **scores,
            "iou": dict(zip(names, scores["iou"], strict=True)),
            "recall": dict(zip(names, scores["recall"], strict=True)),
            "miou_interval": miou_interval(persons, matching, seed=seed),
            "invariance": asdict(invariance(pairs[head])),
            "other_people": asdict(invariance(scored.others[head])),
            "blank": {name: asdict(check) for name, check in blanks[head].items()},
        }
    commonest = int(np.sum(known.counts["main"], axis=(0, 1)).argmax())
    alone = scored.by_person("main").sum(axis=(0, 1))[None]
    one_class = score_clusters(alone, np.array([commonest]))
    result["one_class"] = {"class": names[commonest], "miou": one_class.miou, "accuracy": one_class.accuracy}
    for name, part in (("fitted_on", known), ("scored_on", scored)):
        result[name] = {"n_volumes": len(part.rows), "n_people": len({row["group"] for row in part.rows})}
    return result


def _per_case(result: Mapping[str, Any], scored: Found) -> list[dict[str, Any]]:
    """One row per volume, head and class."""
    number = {name: n for n, name in enumerate(result["classes"])}
    rows = []
    for head, about in result["heads"].items():
        matching = np.array([-1 if name is None else number[name] for name in about["class_of_cluster"]], np.int64)
        for row, counts in zip(scored.rows, scored.counts[head], strict=True):
            scores = score_clusters(counts, matching)
            for name, iou, recall in zip(result["classes"], scores.iou, scores.recall, strict=True):
                rows.append({**row, "head": head, "class": name, "iou": iou, "recall": recall})
    return rows


def _lines(result: Mapping[str, Any]) -> list[str]:
    fitted, scored = result["fitted_on"], result["scored_on"]
    lines = [
        f"clusters matched on {fitted['n_volumes']} volumes ({fitted['n_people']} people) of "
        f"{', '.join(result['fit_splits'])}, scored on {scored['n_volumes']} ({scored['n_people']} people) of "
        f"{', '.join(result['splits'])}",
        f"{'head':<6}{'k':>4}{'used':>6}  {'matched':<13}{'mIoU':>6}  {'95 % people':<16}{'class acc.':>10}"
        f"{'accuracy':>10}{'view kappa':>12}{'person kappa':>14}{'blank split':>13}",
    ]
    for head, one in result["heads"].items():
        interval = one["miou_interval"]
        shown = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        blank = max(check["minority_share"] for check in one["blank"].values())
        lines.append(
            f"{head:<6}{one['k']:>4}{one['used']:>6}  {one['matching']:<13}{one['miou']:>6.3f}  {shown:<16}"
            f"{one['class_accuracy']:>10.3f}{one['accuracy']:>10.3f}{one['invariance']['kappa']:>12.3f}"
            f"{one['other_people']['kappa']:>14.3f}{100 * blank:>11.1f} %"
        )
    for head, one in result["heads"].items():
        lines.append(f"IoU, {head}: " + ", ".join(f"{name} {value:.3f}" for name, value in one["iou"].items()))
    alone = result["one_class"]
    lines.append(f"everything {alone['class']}: mIoU {alone['miou']:.3f}, accuracy {alone['accuracy']:.3f}")
    return lines + _cautions(result)


def _cautions(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for head, one in result["heads"].items():
        worst = max(one["blank"].values(), key=lambda check: float(check["minority_share"]))
        if worst["minority_share"] > BLANK_LIMIT:
            lines.append(
                f"CAUTION: head {head} splits an image of one intensity into {worst['n_clusters']} clusters, up to "
                f"{worst['reach']} of {worst['depth']} places from the border: part of its map does not come from the "
                "image (try encoder vgg_2d or vgg_3d with padding: replicate)"
            )
        view, person = one["invariance"]["kappa"], one["other_people"]["kappa"]
        if person >= view > 0:
            lines.append(
                f"CAUTION: head {head}: a place of another person's image has the same cluster as often as the place "
                f"in another view (kappa {person:.3f}, {view:.3f}): clusters follow position, or what everybody shares"
            )
        if one["used"] == 1:
            lines.append(f"CAUTION: head {head} uses one of its {one['k']} clusters")
        if one["miou"] <= result["one_class"]["miou"]:
            lines.append(f"CAUTION: head {head} is no better than calling everything {result['one_class']['class']}")
    if result["n_pretrained_on"]:
        lines.append(f"{result['n_pretrained_on']} of the scored images were pretrained on by these weights")
    return lines
