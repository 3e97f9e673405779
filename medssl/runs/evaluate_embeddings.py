"""Evaluate embeddings that exist already: brain age and what remains of the site, or probes of any label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.core.files import atomic_write, write_json
from medssl.data.features import SUBJECT_NAMES, SUFFIXES, about_table, read_features
from medssl.data.manifest_rows import MAX_AGE
from medssl.data.splits import TEST_SPLITS
from medssl.evaluation.age_site import METRICS, People, compare_age_site, predict_age_site, summarise_age_site
from medssl.evaluation.combat import ComBat
from medssl.evaluation.maps import flat_maps
from medssl.evaluation.neighbours import (
    Labelled,
    ProbeScore,
    Task,
    alignment_uniformity,
    folded,
    knn_probe,
    linear_probe,
    mlp_probe,
)
from medssl.evaluation.probes import Floats, SiteProbe, Solver, person_folds, site_probe
from medssl.reporting import build_report
from medssl.reporting.tables import write_csv
from medssl.runs.cohort import Outcome
from medssl.runs.folder import environment

if TYPE_CHECKING:
    from medssl.runs.volumes import Cohort

EXTERNAL: Final = "external_test"
INPUT: Final = "input"
PUBLIC: Final = "These are the public splits of the cohort, not the challenge's hidden test."
PROBES: Final[Mapping[str, Callable[..., ProbeScore]]] = {"knn": knn_probe, "linear": linear_probe, "mlp": mlp_probe}
_SHOWN: Final = 20
_CLASSES: Final = 10
"""A column of numbers with more different values than this is a number to predict, not a class."""


@dataclass(frozen=True)
class Origin:
    """Weights and the people whom they embedded: what the guard against leaks asks for."""

    weights: Path
    cohort: Cohort


@dataclass(frozen=True)
class Layer:
    """Embeddings of one layer, row by row.

    Attributes:
        name: z, h, block0, ..., or ``input`` for a table that is no embedding.
        X: (n, F), of length 1 where they were normalised.
        keys: n rows: ``subject`` (the person), ``site``, ``age``, ``split``, ``pretrained_on``, and other columns.
        method: That pretrained the weights; None where nothing says so.
        path: The table.
        origin: What embedded the rows just now, whose ``keys`` then have a column ``volume``; None for a table.
    """

    name: str
    X: Floats
    keys: pd.DataFrame
    method: str | None
    path: Path
    origin: Origin | None = None

    def people(self, keep: npt.NDArray[Any]) -> People:
        """The rows where ``keep`` points."""
        rows = self.keys.iloc[keep]
        return People(
            self.X[keep], rows["age"].to_numpy(), rows["site"].to_numpy(object), rows["subject"].to_numpy(object)
        )


@dataclass(frozen=True)
class Part:
    """Rows to fit on and rows to evaluate."""

    fold: str
    train: npt.NDArray[Any]
    internal: npt.NDArray[Any]
    external: npt.NDArray[Any]


def evaluate_age_site(
    source: Path,
    out: Path,
    *,
    manifest: Path | None = None,
    layers: Sequence[str] = (),
    normalise: bool | None = None,
    folds: int | None = None,
    seeds: int = 1,
    leave_site_out: bool = False,
    combat: bool = False,
    combat_covariates: Sequence[str] = (),
    solver: Solver = "saga",
    columns: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    force: bool = False,
) -> Outcome:
    """Age and site probes of an embedding, with intervals, the age-only floor and a report.

    Args:
        source: A table of embeddings or of features, or a run folder (or weights) together with ``manifest``.
        out: Folder for ``eval/age_site.json``, ``eval/per_person.csv``, ``eval/embedding_maps.csv``, ``report.html``.
        manifest: Who is embedded, where ``source`` is a run.
        layers: Of a run: z, h, block0, ...; empty: z (where there is a projection) and h.
        normalise: Scale rows to length 1; None: projections (z) only.
        folds: By person and balanced over sites, of all rows; None: fit on split train, evaluate the test splits.
        seeds: Repetitions of the folds and the probes.
        leave_site_out: Also predict the age of every site from all others.
        combat: Also evaluate after ComBat, fitted on the people that the probes are fitted on.
        combat_covariates: Columns that ComBat keeps; age is refused, as it is what will be predicted.
        solver: See `site_probe`.
        columns: Globs that name the features of a table.
        mapping: Columns of other names, such as site=scanner.
        n_bootstrap, n_permutations: For the intervals, at least 100.
        force: Replace an evaluation that is there.

    Raises:
        ConfigError: Options that do not fit, or a folder that holds an evaluation already.
        DataError: Columns are missing, nobody to fit or to evaluate, or evaluated people that were pretrained on.
        InputError: What the probes or ComBat refuse; rows or sites are named.
    """
    begun = time.monotonic()
    _check_options(out, folds, seeds, combat, combat_covariates, force)
    read = _layers(source, out, manifest, layers, normalise, columns, mapping, force)
    notes = [f"Site probe solved by {solver}."] if solver != "saga" else []
    tables, left_out = [], []
    floors: dict[tuple[int, str], SiteProbe] = {}
    for layer in read:
        _require(layer, ("site", "age", *combat_covariates))
        _check_subjects(layer)
        if folds is not None or leave_site_out:  # both use every row
            _check_people(layer, np.ones(len(layer.keys), dtype=bool))
        parts, public, said = _parts(layer, folds, seeds)
        notes += said
        _check_people(layer, np.any([one.train | one.internal | one.external for one in parts[0]], axis=0))
        notes += _refuse_pretrained(layer, parts if not leave_site_out else list(_site_parts(layer)))
        for arm in ("embedding", *(("embedding + ComBat",) if combat else ())):
            kept = tuple(combat_covariates) if arm != "embedding" else None
            for seed in range(seeds):
                for part in parts[seed]:
                    table = _predict(layer, part, seed, solver, kept, floors)
                    tables.append(table.assign(arm=arm, layer=layer.name, seed=seed, fold=part.fold))
        if leave_site_out:
            for part in _site_parts(layer)[0]:
                table = _predict(layer, part, 0, solver, None, {})
                left_out.append(table.assign(arm="embedding", layer=layer.name, seed=0, fold=part.fold))
    people = pd.concat(tables, ignore_index=True)
    if combat:
        notes.append("ComBat is fitted on the people that the probes are fitted on; it cannot harmonise unseen sites.")
    if public:
        notes.append(PUBLIC)
    summary = _summary(read, people, left_out, n_bootstrap, n_permutations, public=public, notes=notes)
    summary["evaluated_on"] = f"{folds} folds" if folds else ", ".join(_test_splits(read[0]))
    summary["seconds"] = round(time.monotonic() - begun, 1)
    options: dict[str, Any] = {
        "kind": "evaluate age-site",
        "source": str(source),
        "folds": folds,
        "seeds": seeds,
        "solver": solver,
    }
    options |= {"combat": list(combat_covariates) if combat else None, "leave_site_out": leave_site_out}
    atomic_write(out / "config.yaml", yaml.safe_dump(options, sort_keys=False))
    write_json(out / "environment.json", environment())
    write_csv(people, out / "eval" / "per_person.csv")
    maps = [_map(layer, people) for layer in read]
    if any(len(one) for one in maps):
        write_csv(pd.concat(maps, ignore_index=True), out / "eval" / "embedding_maps.csv")
    write_json(out / "eval" / "age_site.json", summary)
    report = build_report(out)
    return Outcome([*_lines(summary), f"report: {report}"], {**summary, "report": str(report)})


def evaluate_probe(
    source: Path,
    *,
    target: str,
    kinds: Sequence[str],
    out: Path | None = None,
    task: Task | None = None,
    manifest: Path | None = None,
    layers: Sequence[str] = (),
    normalise: bool | None = None,
    folds: int | None = None,
    second: Path | None = None,
    columns: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    force: bool = False,
) -> Outcome:
    """Probes of one label: k-NN, linear, or a small network; and how evenly the embedding is spread.

    Args:
        source, manifest, layers, normalise, folds, columns, mapping, force: As `evaluate_age_site`.
        target: Column to predict, such as diagnosis, sex, site or age. Rows without it are left out and counted.
        kinds: Of `PROBES`.
        out: Folder for ``eval/probes.json``; needed where ``source`` is a run.
        task: None: classification for text and for at most 10 different numbers.
        second: A table of the same people seen in another view: gives alignment.
        n_bootstrap: Resamples of people.
        seed: Of folds and resamples.

    Raises:
        ConfigError, DataError, InputError: As `evaluate_age_site`.
    """
    unknown = [kind for kind in kinds if kind not in PROBES]
    if unknown:
        raise ConfigError(f"there is no probe `{unknown[0]}`", fix=nearest(unknown[0], PROBES))
    if out is not None and (out / "eval" / "probes.json").exists() and not force:
        raise ConfigError("this folder holds probes already", where=str(out), fix="choose another --out, or --force")
    read = _layers(source, out, manifest, layers, normalise, columns, mapping, force)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for layer in read:
        _require(layer, (target,))
        _check_subjects(layer)
        known = layer.keys[target].notna().to_numpy()
        if not known.all():
            notes.append(f"{int((~known).sum())} of {len(known)} rows without {target} are left out.")
        layer = replace(layer, X=layer.X[known], keys=layer.keys[known].reset_index(drop=True))
        labels = layer.keys[target]
        numeric = pd.api.types.is_numeric_dtype(labels) and labels.nunique() > _CLASSES
        chosen: Task = task or ("regression" if numeric else "classification")
        found, said = _probe_rows(layer, labels.to_numpy(object), chosen, kinds, folds, n_bootstrap, seed)
        rows, notes = [*rows, *found], [*notes, *said]
        if set(_test_splits(layer)) & {"internal_test", EXTERNAL} and folds is None:
            notes.append(PUBLIC)
    # Of measures in their own units, directions mean nothing.
    spread = [{"layer": one.name, **_spread(one, second, mapping)} for one in read if one.name != INPUT]
    if second is not None and not spread:
        raise ConfigError("alignment is of embeddings, and this is a table of measures", where=str(source))
    notes = list(dict.fromkeys(notes))
    fields = {"kind": "probes", "target": target, "rows": rows, "spread": spread, "notes": notes}
    lines = [f"{'layer':<8}{'probe':<8}{'metrics'}"]
    for row in rows:
        shown = "  ".join(f"{name} {_measure(row, name)}" for name in row["metrics"])
        chance = "" if row["chance"] is None else f"  (chance {row['chance']:.3f})"
        lines.append(f"{row['layer']:<8}{row['probe']:<8}{shown}{chance}")
    for one in spread:
        near = "" if one["alignment"] is None else f", alignment {one['alignment']:.3f}"
        lines.append(f"{one['layer']:<8}uniformity {one['uniformity']:.3f}{near}")
    lines += [f"note: {note}" for note in notes]
    if out is not None:
        write_json(out / "eval" / "probes.json", fields)
        lines.append(f"written to {out}")
    return Outcome(lines, fields)


def _check_options(
    out: Path, folds: int | None, seeds: int, combat: bool, covariates: Sequence[str], force: bool
) -> None:
    if (out / "eval" / "age_site.json").exists() and not force:
        raise ConfigError(
            "this folder holds an evaluation already", where=str(out), fix="choose another --out, or --force"
        )
    if covariates and not combat:
        raise ConfigError("covariates are ComBat's", fix="add --combat, or leave --combat-covariates out")
    if "age" in covariates or "site" in covariates:
        raise ConfigError(
            "age and site are what will be predicted: ComBat may not keep them at test time",
            found=", ".join(covariates),
            fix="leave them out of --combat-covariates",
        )
    if seeds > 1 and folds is None:
        raise ConfigError(
            "several seeds repeat the folds, and there are none", fix="add --folds 5, or leave --seeds out"
        )


def _layers(
    source: Path,
    out: Path | None,
    manifest: Path | None,
    layers: Sequence[str],
    normalise: bool | None,
    columns: Sequence[str] | None,
    mapping: Mapping[str, str] | None,
    force: bool,
) -> list[Layer]:
    """One layer of a table, or the layers of a run, embedded into ``out``."""
    if source.suffix.lower() in SUFFIXES and not source.is_dir():
        if manifest is not None or layers:
            raise ConfigError("a table is one layer of known people", fix="leave --manifest and --layer out")
        return [_layer(source, normalise, columns, mapping)]
    if manifest is None or out is None:
        raise ConfigError("a run is embedded first: that needs a manifest and a folder", fix="add --manifest and --out")
    from medssl.models.weights import head_from_weights
    from medssl.runs.embed import embed, open_for_weights

    found = layers or (("z", "h") if head_from_weights(source) is not None else ("h",))
    read = []
    for layer in found:
        path = out / "embeddings" / f"{layer}.parquet"
        embed(source, manifest, path, layer=layer, mapping=mapping, force=force)
        read.append(_layer(path, normalise, None, None))
    _, people, _ = open_for_weights(source, manifest, mapping=mapping)
    volumes = people.chosen.table["volume"].to_numpy()  # in the order in which they were embedded
    return [replace(one, keys=one.keys.assign(volume=volumes), origin=Origin(source, people)) for one in read]


def _layer(
    path: Path, normalise: bool | None, columns: Sequence[str] | None, mapping: Mapping[str, str] | None
) -> Layer:
    table = read_features(path, columns)
    keys = table.keys.rename(columns={column: name for name, column in (mapping or {}).items()})
    lower = {str(name).lower(): str(name) for name in keys}
    keys = keys.rename(columns={lower[name]: name for name in ("age", "sex", "site", "split") if name in lower})
    person = next((lower[name] for name in ("group", *SUBJECT_NAMES) if name in lower), None)
    if person is None:
        raise DataError(
            "nothing says whose the rows are",
            where=str(path),
            fix="add a column subject or participant_id; of a .npy array, write <stem>.ids.csv beside it",
        )
    keys = keys.assign(subject=keys[person])
    about = about_table(path)
    name, X = str(about.get("layer", INPUT)), table.values.astype(np.float64)
    if normalise or (normalise is None and name == "z"):
        length = np.linalg.norm(X, axis=1, keepdims=True)
        X = X / np.where(length > 0, length, 1.0)
    method = about.get("method")  # its configuration, or its name
    method = method.get("name") if isinstance(method, dict) else method
    return Layer(name, X, keys.reset_index(drop=True), None if method is None else str(method), path)


def _require(layer: Layer, columns: Sequence[str]) -> None:
    lacking = [name for name in columns if name not in layer.keys]
    if lacking:
        raise DataError(
            f"the table has no column `{lacking[0]}`",
            where=str(layer.path),
            found=", ".join(map(str, layer.keys.columns)),
            fix=f"name the column that holds it with --map {lacking[0]}=COLUMN",
        )


def _check_subjects(layer: Layer) -> None:
    """Refuse rows that are nobody's: folds and resamples are of people."""
    nobody = layer.keys["subject"].isna().to_numpy(dtype=bool)
    _refuse_rows(layer, nobody, "the person is missing", "fill the cells, or leave the rows out")


def _check_people(layer: Layer, used: npt.NDArray[np.bool_]) -> None:
    """Refuse rows whose site or age the probes could not use, and ages that say nothing.

    A manifest is checked when it is read; a table comes here from anywhere.
    """
    for name in ("site", "age"):
        _refuse_rows(
            layer,
            used & layer.keys[name].isna().to_numpy(dtype=bool),
            f"`{name}` is missing",
            "fill the cells, or leave the rows out",
        )
    age = pd.to_numeric(layer.keys["age"], errors="coerce").to_numpy(dtype=np.float64)
    years = (age >= 0) & (age <= MAX_AGE)
    fix = "write years (months are divided by 12), or leave the rows out"
    _refuse_rows(layer, used & ~years, f"`age` is no age of 0 to {MAX_AGE:g} years", fix)
    if len(np.unique(age[used])) < 2:
        raise DataError(
            "all ages are equal, so there is nothing to predict",
            where=str(layer.path),
            found=f"{age[used][:1]} for {int(used.sum())} rows",
            fix="evaluate people of several ages, or the site alone: medssl evaluate probe --target site",
        )


def _refuse_rows(layer: Layer, wrong: npt.NDArray[np.bool_], message: str, fix: str) -> None:
    if not wrong.any():
        return
    rows = np.flatnonzero(wrong)
    shown = [f"{row} ({layer.keys['subject'].iloc[row]})" for row in rows[:_SHOWN]]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    raise DataError(
        f"{message} in {len(rows)} of {len(wrong)} rows",
        where=f"{layer.path}, rows (from 0) {', '.join(shown)}{more}",
        fix=fix,
    )


def _test_splits(layer: Layer) -> list[str]:
    held = set(layer.keys["split"].dropna()) if "split" in layer.keys else set()
    return [name for name in TEST_SPLITS if name in held]


def _parts(layer: Layer, folds: int | None, seeds: int) -> tuple[list[list[Part]], bool, list[str]]:
    """The parts of every seed, whether they are public splits, and what is to be said about them."""
    keys, nobody = layer.keys, np.zeros(len(layer.keys), dtype=bool)
    if folds is not None:
        site, subject = keys["site"].astype(str).to_numpy(), keys["subject"].to_numpy()
        rounds = [person_folds(subject, site, n_folds=folds, seed=seed) for seed in range(seeds)]
        parts = [[Part(str(k), one != k, one == k, nobody) for k in range(one.max() + 1)] for one in rounds]
        return parts, False, [f"{folds} folds hold all rows of a person together and are balanced over sites."]
    tests = _test_splits(layer)
    split = keys["split"].to_numpy(object) if "split" in keys else np.full(len(keys), None)
    train = split == "train"
    if not tests or not train.any():
        raise DataError(
            "probes are fitted on split train and evaluated on a test split: one of them holds nobody",
            where=str(layer.path),
            found=f"splits: {', '.join(sorted({str(one) for one in split if one is not None})) or 'none'}",
            fix=f"give the table splits (train and one of {', '.join(TEST_SPLITS)}), or evaluate by folds: --folds 5",
        )
    seen = keys["site"].isin(set(keys.loc[train, "site"])).to_numpy()
    # The plain test split may hold both kinds of sites; the challenge's splits say which they are.
    external = (split == EXTERNAL) | ((split == "test") & ~seen)
    internal = (split == "internal_test") | ((split == "test") & seen)
    notes = []
    unused = int((~(train | external | internal)).sum())
    if unused:
        notes.append(f"{unused} rows of other splits are neither fitted on nor evaluated.")
    return [[Part("0", train, internal, external)]], bool(set(tests) & {"internal_test", EXTERNAL}), notes


def _site_parts(layer: Layer) -> list[list[Part]]:
    """One part a site: fitted on all other sites."""
    site, nobody = layer.keys["site"].to_numpy(object), np.zeros(len(layer.keys), dtype=bool)
    person = layer.keys["subject"]
    parts = []
    for one in sorted(set(layer.keys["site"].dropna())):
        # A person who was scanned at several sites is on neither side twice.
        others = (site != one) & ~person.isin(set(person[site == one])).to_numpy()
        parts.append(Part(str(one), others, nobody, site == one))
    return [parts]


def _refuse_pretrained(layer: Layer, parts: list[list[Part]]) -> list[str]:
    """Nobody who is evaluated may have been pretrained on: the weights know their age and their site.

    Returns what the guard of a run's weights could not look for.
    """
    evaluated = np.any([one.internal | one.external for several in parts for one in several], axis=0)
    fix = "evaluate people of test splits that the pretraining left out, or pretrain in every fold (`medssl compare`)"
    if "pretrained_on" in layer.keys:
        # Of a column with missing cells, CSV gives back texts. Another scan of somebody who was seen counts as seen.
        rows = layer.keys["pretrained_on"].astype(str).str.lower().isin(("true", "1", "1.0")).to_numpy()
        seen = layer.keys["subject"].isin(set(layer.keys["subject"][rows])).to_numpy() & evaluated
        if seen.any():
            people = layer.keys.loc[seen, "subject"].astype(str).unique()
            raise DataError(
                f"{len(people)} evaluated people were pretrained on by these weights",
                where=str(layer.path),
                found=", ".join(people[:_SHOWN]),
                fix=fix,
            )
    if layer.origin is None:
        return []
    from medssl.runs.leaks import check_weights

    # The scan that was pretrained on need not be among those that are evaluated.
    cohort = layer.origin.cohort
    rows = cohort.chosen.table["volume"].isin(layer.keys.loc[evaluated, "volume"]).to_numpy(dtype=bool)
    arms = {layer.method or "these weights": layer.origin.weights}
    try:
        found = check_weights(arms, cohort, cohort.chosen.select(rows), role="evaluation", transductive=False)
    except DataError as error:
        message = f"evaluated people were pretrained on by these weights: {error.message}"
        raise DataError(message, where=error.where, found=error.found, fix=fix) from error
    return list(found.notes)


def _predict(
    layer: Layer,
    part: Part,
    seed: int,
    solver: Solver,
    kept: tuple[str, ...] | None,
    floors: dict[tuple[int, str], SiteProbe],
) -> pd.DataFrame:
    """Predictions of one part; ``kept`` are the covariates of ComBat, None for no ComBat.

    ``floors`` holds the age-only probe of each seed and part, which is the same for every layer and arm.
    """
    external = part.external
    if kept is not None:
        rows = np.flatnonzero(part.train | part.internal)
        keys = layer.keys
        covariates = {name: keys[name].to_numpy() for name in kept}
        combat = ComBat().fit(
            layer.X[part.train],
            sites=keys.loc[part.train, "site"].to_numpy(object),
            covariates={name: values[part.train] for name, values in covariates.items()},
        )
        X = layer.X.copy()
        X[rows] = combat.transform(
            layer.X[rows],
            sites=keys["site"].to_numpy(object)[rows],
            covariates={name: values[rows] for name, values in covariates.items()},
            target=keys["age"].to_numpy()[rows],
        )
        layer, external = replace(layer, X=X), np.zeros_like(external)
    train = layer.people(part.train)
    inside = layer.people(part.internal) if part.internal.any() else None
    outside = layer.people(external) if external.any() else None
    key = (seed, part.fold)
    if inside is not None and key not in floors:
        floors[key] = site_probe(train.age[:, None], train.site, train.subject, seed=seed, solver=solver)
    return predict_age_site(train, inside, outside, seed=seed, solver=solver, age_only=floors.get(key))


def _summary(
    read: Sequence[Layer],
    people: pd.DataFrame,
    left_out: list[pd.DataFrame],
    n_bootstrap: int,
    n_permutations: int,
    *,
    public: bool,
    notes: list[str],
) -> dict[str, Any]:
    methods = {layer.name: layer.method for layer in read}
    rows = []
    for (arm, layer), part in people.groupby(["arm", "layer"], sort=False):
        found = summarise_age_site(part, n_bootstrap=n_bootstrap, n_permutations=n_permutations)
        combat = str(layer) if arm != "embedding" else None
        row = {"arm": arm, "method": methods[str(layer)], "family": "embedding", "debias": None, "combat": combat}
        rows.append({**row, "layer": layer, **found.to_json()})
    internal = people[people["set"] == "internal"]
    n_sites = int(internal["site"].nunique())
    several = people["arm"].nunique() > 1
    return {
        "kind": "age_site",
        "evaluated_on": "",
        "public_splits": public,
        "n_people": int(people["subject"].nunique()),
        "n_sites": n_sites,
        "chance": 1 / n_sites if n_sites else None,
        "age_only": rows[0]["bacc_age_only"],
        "baseline": "embedding" if several else None,
        "seconds": 0.0,
        "notes": list(dict.fromkeys(notes)),
        "rows": rows,
        "paired": _paired(internal, n_bootstrap) if several else [],
        "leave_site_out": {"rows": _left_out_rows(pd.concat(left_out), n_bootstrap)} if left_out else None,
    }


def _map(layer: Layer, people: pd.DataFrame) -> pd.DataFrame:
    """PCA and t-SNE of the evaluated rows of a layer, as they were embedded."""
    first = people[(people["arm"] == "embedding") & (people["layer"] == layer.name) & (people["seed"] == 0)]
    kind_of = first.drop_duplicates("subject").set_index("subject")["set"]
    evaluated = layer.keys["subject"].isin(kind_of.index).to_numpy()
    keys = layer.keys.loc[evaluated, ["subject", "site", "age"]].reset_index(drop=True)
    tables = [
        keys.assign(arm="embedding", layer=layer.name, kind=kind, x=xy[:, 0], y=xy[:, 1])
        for kind, xy in flat_maps(layer.X[evaluated]).items()
    ]
    columns = ["arm", "layer", "kind", "subject", "x", "y", "age", "site"]
    table = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    return table.assign(set=table["subject"].map(kind_of))


def _paired(internal: pd.DataFrame, n_bootstrap: int) -> list[dict[str, Any]]:
    """ComBat against the embedding as it is; on seen sites, as it has no others."""
    rows: list[dict[str, Any]] = []
    for metric in (name for name in METRICS if name in ("mae_internal", "bacc")):
        for row in compare_age_site(internal, "embedding", metric, n_bootstrap=10 * n_bootstrap).to_dict("records"):
            kept = {name: row[name] for name in ("arm", "baseline", "layer", "metric", "difference", "p", "p_holm")}
            rows.append({**kept, "ci": [row["low"], row["high"]]})
    return rows


def _left_out_rows(table: pd.DataFrame, n_bootstrap: int) -> list[dict[str, Any]]:
    """Per layer: all left-out sites together, then each."""
    rows = []
    for layer, part in table.groupby("layer", sort=False):
        groups: Iterator[tuple[Any, pd.DataFrame]] = iter([("all", part), *part.groupby("site")])
        for site, people in groups:
            found = summarise_age_site(people, n_bootstrap=n_bootstrap)
            rows.append(
                {
                    "arm": "embedding",
                    "layer": layer,
                    "site": str(site),
                    "n_people": found.n_people,
                    "mae_external": found.mae_external,
                    "mae_external_ci": list(found.mae_external_ci or ()),
                    "r_external": found.r_external,
                }
            )
    return rows


def _probe_rows(
    layer: Layer,
    labels: npt.NDArray[Any],
    task: Task,
    kinds: Sequence[str],
    folds: int | None,
    n_bootstrap: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each kind of probe, and what the guard against leaks had to say."""
    subject = layer.keys["subject"].to_numpy(object)
    nobody = np.zeros(len(labels), dtype=bool)
    if folds is not None:
        notes = _refuse_pretrained(layer, [[Part("0", nobody, ~nobody, nobody)]])
        everyone = Labelled(layer.X, labels, subject)
        scores = [
            folded(PROBES[kind], everyone, task=task, n_folds=folds, n_bootstrap=n_bootstrap, seed=seed)
            for kind in kinds
        ]
    else:
        with_site = layer if "site" in layer.keys else replace(layer, keys=layer.keys.assign(site=""))
        part = _parts(with_site, None, 1)[0][0][0]
        notes = _refuse_pretrained(layer, [[part]])
        held = part.internal | part.external
        train, test = (Labelled(layer.X[rows], labels[rows], subject[rows]) for rows in (part.train, held))
        scores = [PROBES[kind](train, test, task=task, n_bootstrap=n_bootstrap, seed=seed) for kind in kinds]
    return [{"layer": layer.name, "method": layer.method, **score.to_json()} for score in scores], notes


def _spread(layer: Layer, second: Path | None, mapping: Mapping[str, str] | None) -> dict[str, Any]:
    """Alignment (with a second view) and uniformity."""
    views = layer.X[:, None]
    if second is not None:
        other = _layer(second, False, None, mapping)
        name = "case" if "case" in layer.keys and "case" in other.keys else "subject"
        ids, others = (pd.Index(one.keys[name].astype(str)) for one in (layer, other))
        if not (ids.is_unique and others.is_unique and set(ids) == set(others) and views.shape[2] == other.X.shape[1]):
            raise DataError(
                "the second view is not of the same rows and layer",
                where=str(second),
                found=f"{len(others)} rows of {other.X.shape[1]} numbers, not {len(ids)} of {views.shape[2]}",
                fix="embed the same manifest with the same layer",
            )
        views = np.stack([layer.X, other.X[others.get_indexer(ids)]], axis=1)
    near, spread = alignment_uniformity(views)
    return {"alignment": near, "uniformity": spread}


def _measure(row: Mapping[str, Any], name: str) -> str:
    value, interval = row["metrics"][name], row["intervals"][name]
    if value is None or interval is None:
        return "-"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _lines(summary: Mapping[str, Any]) -> list[str]:
    def shown(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
        if value is None:
            return "-"
        bounds = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
        return f"{value:.{digits}f}{bounds}"

    title = f"{'arm':<20}{'layer':<8}{'age MAE, seen sites':<22}{'unseen sites':<22}{'site BAcc':<24}{'score':<20}"
    lines = [title.rstrip()]
    for row in summary["rows"]:
        cells = (("mae_internal", 22, 2), ("mae_external", 22, 2), ("bacc", 24, 3), ("score", 20, 3))
        values = "".join(f"{shown(row[name], row[f'{name}_ci'], digits):<{width}}" for name, width, digits in cells)
        lines.append(f"{row['arm']:<20}{row['layer']:<8}{values}".rstrip())
        if row["below_chance"]:
            lines.append("  site below chance: an artefact of how people were divided, not a merit")
    if summary["age_only"] is not None:
        floor = f"{summary['age_only']:.3f} from true age alone (the floor), {summary['chance']:.3f} by chance"
        lines.append(f"site of {summary['n_sites']} sites: {floor}")
    for row in (summary["leave_site_out"] or {"rows": []})["rows"]:
        error = shown(row["mae_external"], row["mae_external_ci"], 2)
        lines.append(f"site left out {row['site']:<16}{row['layer']:<8}MAE {error} ({row['n_people']} people)")
    lines += [f"note: {note}" for note in summary["notes"]]
    return lines
