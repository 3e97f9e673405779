"""The weak labels and priors of a run: checked before anything is prepared or trained, joined to the items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.config import PretrainConfig
from medssl.core.errors import DataError
from medssl.core.types import ItemTable
from medssl.data.feature_store import open_features
from medssl.data.features import FeatureStatistics, FeatureTable, about_table, read_features
from medssl.data.items import ItemReader
from medssl.data.manifest import Manifest
from medssl.data.region_store import prepare_regions
from medssl.data.regions import HEIGHTS, REGION_MAP
from medssl.data.splits import refuse_leak
from medssl.data.weak_labels import LabelUse, check_weak_labels, shortened
from medssl.methods.decoupled_uniformity import PRIOR, DecoupledUniformityConfig
from medssl.models import read_model
from medssl.runs.clusters import check_cluster_columns
from medssl.runs.item_labels import ItemLabels, read_item_labels
from medssl.runs.progress import progress_bar
from medssl.runs.volumes import (
    FINGERPRINT_DIGITS,
    Cohort,
    image_hashes,
    lies_with_weights,
    open_items,
    pretraining_manifests,
    with_absolute_paths,
)

SEEN: Final = "pretrained_on"
"""Column of an embedding table: whether the network was trained on the row."""
STAND_IN: Final = (
    "regions: the magnitude of the image's gradient stands in for boundaries learnt from annotations, which the "
    "published method has; method.regions.boundaries takes such maps"
)
_PLURAL: Final = {"case": "visits", "subject": "people"}


def label_uses(config: PretrainConfig) -> tuple[LabelUse, ...]:
    """What the method and its regulariser ask of which column of the manifest."""
    sections = [section for section in (config.method, config.debias) if hasattr(section, "label_uses")]
    return tuple(use for section in sections for use in section.label_uses())


def check_labels(
    config: PretrainConfig, rows: Manifest, tested: Manifest, *, voxels: Mapping[int, str] | None = None
) -> list[str]:
    """Refuse weak labels and priors that cannot be learnt from, before anything is prepared.

    Args:
        config: The run.
        rows: Those that are trained on.
        tested: Rows of the test splits, which the network behind a prior must not have seen either.
        voxels: Hash of the voxels of each image of ``tested``; None: they are read if they are needed.

    Returns:
        What is worth knowing, one line each.

    Raises:
        DataError: See `check_weak_labels`, `prior_of` and `read_item_labels`; a prior or item labels from a network
            that was trained on test people.
        ConfigError: See `check_cluster_columns`.
    """
    joined = item_labels(config, rows)
    check_cluster_columns(config, rows, joined.columns if joined else ())
    own = [use for use in label_uses(config) if joined is None or use.column not in joined.columns]
    notes = check_weak_labels(rows, own)
    if joined is not None and not config.data.transductive and len(tested):
        _refuse_labelled(joined.path, tested)
    path = prior_table(config)
    if path is not None:
        prior_of(rows, path)
        if not config.data.transductive and len(tested):
            notes += _refuse_seen(config, tested, path, voxels)
    if REGION_MAP in config.needs.labels and config.method.regions.boundaries is None:
        notes.append(STAND_IN)
    return notes


def training_items(
    config: PretrainConfig,
    cohort: Cohort,
    rows: Manifest,
    *,
    statistics: FeatureStatistics | None = None,
    with_labels: bool = False,
) -> tuple[ItemTable, ItemReader]:
    """`open_items` of the rows that are trained on, with what their method asks for beside.

    The prior of each item is in ``labels["prior"]`` where there is one, labels of `data.item_labels` are under their
    own names. For a method that works on regions, label maps are the maps of regions, and ``labels["region_heights"]``
    says how far apart these are.

    Raises:
        DataError: See `open_items`, `prior_of`, `ItemLabels.join` and `prepare_regions`.
    """
    table, reader = open_items(config, cohort, rows, statistics=statistics, with_labels=with_labels)
    path = prior_table(config)
    if path is not None:
        place = {int(volume): position for position, volume in enumerate(rows.table["volume"])}
        values = prior_of(rows, path)[[place[int(volume)] for volume in table.volume]]
        table = reader.table = replace(table, labels={**table.labels, PRIOR: values})
    joined = item_labels(config, rows)
    if joined is not None:
        table = reader.table = joined.join(table, rows)
    if REGION_MAP in config.needs.labels:
        return with_regions(config, cohort, rows, table)
    return table, reader


def with_regions(
    config: PretrainConfig, cohort: Cohort, rows: Manifest, table: ItemTable
) -> tuple[ItemTable, ItemReader]:
    """The items with the heights of their regions, and a reader that gives maps of regions in place of label maps.

    Raises:
        DataError: See `prepare_regions`.
    """
    volumes = [int(volume) for volume in rows.table["volume"]]
    with progress_bar(f"regions of {len(volumes)} volumes") as report:
        store = prepare_regions(
            cohort.store,
            volumes,
            config.items,
            config.method.regions,
            prepare=config.data.prepare,
            cache=config.data.cache,
            boundaries=boundary_files(config, rows),
            jobs=config.data.jobs,
            progress=report,
        )
    heights = {volume: store.heights(volume) for volume in volumes}
    values = np.stack([heights[int(v)][p] for v, p in zip(table.volume, table.position, strict=True)])
    table = replace(table, labels={**table.labels, HEIGHTS: values})
    return table, ItemReader(store, table, config.items)


def boundary_files(config: PretrainConfig, rows: Manifest) -> dict[int, Path] | None:
    """The file of supplied boundary strengths of each volume; None where the gradient stands in."""
    if REGION_MAP not in config.needs.labels or config.method.regions.boundaries is None:
        return None
    cells = rows.table[["volume", config.method.regions.boundaries]].itertuples(index=False)
    return {int(volume): rows.path.parent / str(cell).strip() for volume, cell in cells}


def item_labels(config: PretrainConfig, rows: Manifest) -> ItemLabels | None:
    """The table of labels of single items that a run joins, read and checked; None where it has none."""
    path = config.data.item_labels
    return None if path is None else read_item_labels(path, rows, geometry=config.items.geometry)


def prior_table(config: PretrainConfig) -> Path | None:
    """The table of embeddings that a run takes its prior from."""
    method = config.method
    if not isinstance(method, DecoupledUniformityConfig) or method.prior is None:
        return None
    return method.prior.table


def prior_fingerprint(config: PretrainConfig) -> str | None:
    """SHA-256 of the prior table and of the table of item labels: a run must not go on with others."""
    paths = [path for path in (prior_table(config), config.data.item_labels) if path is not None]
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths) or None


def prior_seen(config: PretrainConfig) -> set[str]:
    """Fingerprints of what the networks behind the prior table and the item labels were trained on, as far as known."""
    path, labels = prior_table(config), config.data.item_labels
    seen = set() if path is None else set(about_table(path).get(SEEN, ()))
    if labels is not None and lies_with_weights(labels):
        seen |= set(read_model(labels.parent)["info"].get("pretrained_on", ()))
    return seen


def prior_of(rows: Manifest, path: Path) -> npt.NDArray[np.float32]:
    """The row of an embedding table for each row of a manifest.

    Joined by the table's column ``case`` if it has one, else by ``subject``: one row for each visit, or one for each
    person. People of the table who are not in ``rows`` do not matter.

    Args:
        rows: Those that are trained on.
        path: .csv, .tsv, .parquet, or .npy with ids beside it.

    Returns:
        (n, P) in the order of ``rows``.

    Raises:
        DataError: No ids, two rows of one id, people or visits without a row, values that are not finite.
    """
    table = read_features(path)
    by, ids = _ids(table, path)
    repeated = sorted(ids[ids.duplicated()].unique())
    if repeated:
        raise DataError(
            f"the prior table has several rows of one {by}",
            where=str(path),
            found=shortened(repeated),
            fix="keep one row for each person, or add a column `case` that names the visits as the manifest does",
        )
    wanted = rows.table[by].astype(str)
    place = pd.Series(np.arange(len(ids)), index=ids)
    found = place.reindex(wanted)
    missing = found.isna().to_numpy(dtype=bool)
    if missing.any():
        names = list(wanted[missing])
        raise DataError(
            f"the prior table has no row for {len(set(names))} of the {wanted.nunique()} {_PLURAL[by]} that are "
            "trained on",
            where=str(path),
            found=shortened(names),
            fix="embed them too (medssl embed WEIGHTS MANIFEST -o TABLE), or leave them out with data.exclude",
        )
    values = table.values[found.to_numpy(dtype=np.int64)]
    _refuse_gaps(values, list(wanted), path)
    return values


def _ids(table: FeatureTable, path: Path) -> tuple[str, pd.Series]:
    for by, names in (("case", ("case",)), ("subject", ("subject", "participant_id"))):
        for name in names:
            if name in table.keys and table.keys[name].notna().all():
                return by, table.keys[name].astype(str)
    raise DataError(
        "the prior table does not say whose its rows are",
        where=str(path),
        found=f"columns without features: {shortened(list(table.keys.columns)) or 'none'}",
        fix="add a column `case` or `subject`, filled in every row, as `medssl embed` writes it",
    )


def _refuse_seen(config: PretrainConfig, tested: Manifest, path: Path, voxels: Mapping[int, str] | None) -> list[str]:
    """Refuse a table whose network was trained on test people; returns what could not be looked for.

    `medssl embed` leaves three traces: the column ``pretrained_on`` of the rows that were embedded, and beside the
    table the folder of the weights (its manifest names people) and the fingerprints of all that they were trained on.
    """
    table = read_features(path)
    if SEEN in table.keys:
        by, ids = _ids(table, path)
        rows = set(ids[table.keys[SEEN].astype(str).str.lower().isin(("true", "1", "1.0"))])
        _refuse_both([name for name in tested.table[by].astype(str) if name in rows], _PLURAL[by], path)
    about = about_table(path)
    if SEEN not in about:
        return [
            f"prior table {path.name}: nothing beside it says whom its network was trained on, so test people could "
            "not be looked for among them"
        ]
    for earlier in pretraining_manifests(Path(about["folder"])) if "folder" in about else []:
        sets = {f"the pretraining of the network behind the prior table {path.name}": earlier}
        refuse_leak({**sets, "test": with_absolute_paths(tested)})
    hashes, notes = _comparable(config, tested, about, path, voxels)
    seen = set(about[SEEN])
    shared = [
        str(case)
        for volume, case in zip(tested.table["volume"], tested.table["case"], strict=True)
        if hashes.get(int(volume), "")[:FINGERPRINT_DIGITS] in seen
    ]
    _refuse_both(shared, "visits", path)
    return notes


def _comparable(
    config: PretrainConfig, tested: Manifest, about: Mapping[str, Any], path: Path, voxels: Mapping[int, str] | None
) -> tuple[Mapping[int, str], list[str]]:
    """Hashes of the test rows of the kind that the network behind the prior was trained on, or why there are none."""
    names = about.get("features")
    unlike = [f"prior table {path.name}: its network was trained on other measures, so only people were looked for"]
    if (names is not None) != (config.spatial_dims == 0):
        return {}, unlike
    if names is None:
        return image_hashes(tested) if voxels is None else voxels, []
    try:
        store = open_features(tested, config.data.features, names=names, check=False)
    except DataError as error:
        return {}, [f"{unlike[0]} ({error.message})"]
    return {volume: store.voxels(volume) for volume in store.volumes}, []


def _refuse_labelled(path: Path, tested: Manifest) -> None:
    """Refuse item labels from a network that was trained on test people; a table elsewhere says nothing of that."""
    for earlier in pretraining_manifests(path) if lies_with_weights(path) else []:
        sets = {f"the pretraining of the network behind the item labels {path.name}": earlier}
        refuse_leak({**sets, "test": with_absolute_paths(tested)})


def _refuse_both(names: Sequence[str], what: str, path: Path) -> None:
    if names:
        raise DataError(
            f"the network behind the prior table was trained on {len(set(names))} of the test {what}",
            where=str(path),
            found=shortened(names),
            fix="train that network without them, or set data.transductive: true, which every result then says",
        )


def _refuse_gaps(values: npt.NDArray[np.float32], names: Sequence[str], path: Path) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            "the prior table has missing or infinite values",
            where=str(path),
            found=shortened([name for name, wrong in zip(names, bad, strict=True) if wrong]),
            fix="embed these people again, or leave them out with data.exclude",
        )
