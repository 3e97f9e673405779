"""From a configuration's data section to prepared volumes: which rows, which classes, what was left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.config import DataConfig
from medssl.config.models import RunConfig
from medssl.core.errors import ConfigError, DataError, nearest
from medssl.core.files import read_yaml
from medssl.core.types import ItemTable
from medssl.data.cache import VolumeStore, prepare, voxel_hash
from medssl.data.feature_store import FeatureReader, FeatureStore, fit_statistics, open_features
from medssl.data.features import TEXT_SUFFIXES, FeatureStatistics, about_table
from medssl.data.items import ItemReader, build_items
from medssl.data.manifest import Manifest, read_manifest
from medssl.data.splits import with_published_splits
from medssl.data.volume import read_volume
from medssl.runs.progress import progress_bar
from medssl.transforms.preprocess import PrepareConfig

log = logging.getLogger(__name__)

STATISTICS = "features.json"
"""Beside weights that were trained on feature tables: how the features were standardised."""
FINGERPRINT_DIGITS = 16
"""Of the voxel hashes that weights carry: enough to recognise an image, useless for anything else."""


@dataclass(frozen=True)
class LabelClass:
    """One structure: its number in prepared labels and predictions, its value in label files, its name."""

    number: int
    value: int
    name: str


@dataclass(frozen=True)
class Cohort:
    """The volumes of a run.

    Attributes:
        manifest: Every row of the file that was not excluded.
        chosen: The rows that were prepared.
        store: Their prepared voxels, or their rows of features.
        classes: Structures without background; empty when no volume has a label.
        left_out: Cases that the configuration excludes.
    """

    manifest: Manifest
    chosen: Manifest
    store: Any  # VolumeStore or FeatureStore; the geometry of the run's items says which
    classes: tuple[LabelClass, ...]
    left_out: tuple[str, ...]

    def rows(self, splits: tuple[str, ...] | None) -> Manifest:
        """The chosen rows of some splits."""
        return in_splits(self.chosen, splits)


def in_splits(manifest: Manifest, splits: tuple[str, ...] | None) -> Manifest:
    """The rows whose ``split`` is one of ``splits``; all rows for None, or where the manifest has no split at all.

    Raises:
        DataError: No row is left.
    """
    column = manifest.table["split"]
    if splits is None or not column.notna().any():
        return manifest
    selected = manifest.select(column.isin(splits).to_numpy(dtype=bool))
    if len(selected) == 0:
        present = sorted(str(value) for value in column.dropna().unique())
        raise DataError(
            f"no volume has the split {' or '.join(splits)}",
            where=str(manifest.path),
            found=f"splits in the manifest: {', '.join(present)}",
            fix="run `medssl data split`, or name another split",
        )
    return selected


def load_manifest(config: DataConfig) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest without the excluded rows, and the cases that were left out.

    Raises:
        ConfigError: ``exclude`` names nothing that is there.
    """
    manifest = read_manifest(config.manifest, mapping=config.map)
    if config.published_splits is not None:
        manifest = with_published_splits(manifest, config.published_splits)
    table = manifest.table
    known = set(table["subject"]) | set(table["case"])
    for name in config.exclude:
        if name not in known:
            raise ConfigError(
                f"data.exclude: `{name}` is neither a subject nor a case. {nearest(name, list(known)[:50])}",
                where=str(manifest.path),
            )
    excluded = table["subject"].isin(config.exclude) | table["case"].isin(config.exclude)
    kept = manifest.select(~excluded.to_numpy(dtype=bool)) if excluded.any() else manifest
    return kept, tuple(str(case) for case in table["case"][excluded])


def open_cohort(
    config: DataConfig,
    *,
    slice_axis: int,
    splits: tuple[str, ...] | None = None,
    every_split: bool = False,
    features: bool = False,
    names: Sequence[str] | None = None,
) -> Cohort:
    """Read the manifest and prepare the volumes of some splits (those in the cache already cost nothing).

    Args:
        config: The data section.
        slice_axis: Axis along which volumes will be cut.
        splits: Default: ``config.splits``.
        every_split: Prepare all rows.
        features: The manifest names rows of feature tables (`items.geometry: features`): nothing is prepared.
        names: The features that weights were trained on, in their order.

    Raises:
        DataError: Also where the manifest names tables and volumes are wanted, or the other way round.
    """
    manifest, left_out = load_manifest(config)
    chosen = manifest if every_split else in_splits(manifest, splits or config.splits)
    if features:
        return Cohort(manifest, chosen, open_features(chosen, config.features, names=names), (), left_out)
    if is_table(chosen):
        raise DataError(
            "the manifest names rows of feature tables, not images",
            where=str(manifest.path),
            fix="set items.geometry: features and model.encoder: {name: mlp}",
        )
    classes = named_classes(manifest) or listed_classes(config.prepare)
    settings = with_label_values(config.prepare, classes, manifest)
    with progress_bar(f"preparing {len(chosen)} volumes") as report:
        store = prepare(chosen, settings, config.cache, slice_axis=slice_axis, jobs=config.jobs, progress=report)
    if not classes:
        classes = found_classes(store)
    return Cohort(manifest, chosen, store, classes, left_out)


def open_run_cohort(
    config: RunConfig,
    *,
    splits: tuple[str, ...] | None = None,
    every_split: bool = False,
    statistics: FeatureStatistics | None = None,
) -> Cohort:
    """The cohort of a run, whatever its items are; see ``open_cohort``.

    Args:
        config: The run.
        splits: Default: those of the configuration.
        every_split: Open all rows.
        statistics: Of weights that were trained on features: rows are opened with those features in their order.
    """
    return open_cohort(
        config.data,
        slice_axis=config.items.slice_axis,
        splits=splits,
        every_split=every_split,
        features=config.spatial_dims == 0,
        names=None if statistics is None else statistics.names,
    )


def weights_statistics(weights: Path | None) -> FeatureStatistics | None:
    """How the features were standardised that some weights were trained on; None for weights of images, or no weights.

    Args:
        weights: Run folder, its ``weights`` folder or a file in that.
    """
    if weights is None:
        return None
    near = (weights.parent,) if weights.is_file() else (weights / "weights", weights)
    found = next((folder / STATISTICS for folder in near if (folder / STATISTICS).is_file()), None)
    return None if found is None else FeatureStatistics.load(found)


def is_table(manifest: Manifest) -> bool:
    """Whether the first row names a table of features by its ending (a .npy array may be either)."""
    return manifest.image_paths(int(manifest.table["volume"].iloc[0]))[0].suffix.lower() in (*TEXT_SUFFIXES, ".parquet")


def open_items(
    config: RunConfig,
    cohort: Cohort,
    rows: Manifest,
    *,
    statistics: FeatureStatistics | None = None,
    with_labels: bool = False,
) -> tuple[ItemTable, ItemReader]:
    """The items of some rows of an opened cohort, and what reads them.

    Args:
        config: Says what an item is.
        cohort: Opened by ``open_cohort``.
        rows: Which of its rows.
        statistics: How features are standardised; None: as learnt from ``rows``, which must then be those that are
            trained on. Left alone for images.
        with_labels: Read label maps too.

    Raises:
        DataError: See ``build_items`` and ``FeatureReader``.
    """
    table = build_items(rows, cohort.store, config.items)
    if not isinstance(cohort.store, FeatureStore):
        return table, ItemReader(cohort.store, table, config.items, with_labels=with_labels)
    if statistics is None:
        statistics = fit_statistics(cohort.store, [int(volume) for volume in table.volume], config.data.features)
    return table, FeatureReader(cohort.store, table, statistics)


def with_label_values(settings: PrepareConfig, classes: tuple[LabelClass, ...], manifest: Manifest) -> PrepareConfig:
    """The same preparation, told which class each value of the label files is; any other value is then refused.

    A column ``label_alias`` (``421=420``) says that a value occurs that means another one.

    Raises:
        ConfigError: ``label_values`` numbers the classes otherwise than the names of the meta file do: what is learnt
            as one structure would be scored as another.
        DataError: An alias for a value that has no name.
    """
    if not classes:
        return settings
    values = {one.value: one.number for one in classes}
    for alias, value in manifest.label_aliases.items():
        if value not in values:
            raise DataError(
                f"label_alias: {alias} stands for {value}, which label_names does not name",
                where=str(manifest.path),
                fix="correct the column label_alias, or name the value in the meta file",
            )
        values[alias] = values[value]
    if settings.label_values:
        given = {value: number for value, number in settings.label_values.items() if value != 0 or number != 0}
        if given != values:
            raise ConfigError(
                "data.prepare.label_values numbers the classes otherwise than the names in the manifest's meta file",
                where=str(manifest.path),
                found=f"{given}, by the names it is {values}",
                fix="remove label_values: the classes are numbered in the order of the named values",
            )
        return settings
    return settings.model_copy(update={"label_values": values})


def named_classes(manifest: Manifest) -> tuple[LabelClass, ...]:
    """Structures that the meta file names, numbered 1, 2, ... in the order of their values."""
    names = {value: name for value, name in sorted(manifest.meta.label_names.items()) if value != 0}
    return tuple(LabelClass(i, value, name) for i, (value, name) in enumerate(names.items(), start=1))


def listed_classes(settings: PrepareConfig) -> tuple[LabelClass, ...]:
    """Structures as ``label_values`` lists them, for a manifest that names none.

    Raises:
        ConfigError: Two values with one number, which a prediction could not be written back as.
    """
    values = {number: value for value, number in sorted(settings.label_values.items()) if number != 0}
    if len(values) < sum(number != 0 for number in settings.label_values.values()):
        raise ConfigError(
            "data.prepare.label_values gives one class number to several values",
            found=str(settings.label_values),
            fix="say which value a stray one stands for in a column label_alias of the manifest (421=420)",
        )
    return tuple(LabelClass(number, value, f"label {value}") for number, value in sorted(values.items()))


def found_classes(store: VolumeStore) -> tuple[LabelClass, ...]:
    """Structures that the prepared labels hold, for a manifest that names none."""
    values: set[int] = set()
    for volume in store.volumes:
        label = store.label(volume)
        if label is not None:
            values |= {int(value) for value in np.unique(label)}
    highest = max(values, default=0)
    return tuple(LabelClass(value, value, f"label {value}") for value in range(1, highest + 1))


def voxel_hashes(cohort: Cohort) -> Mapping[int, str]:
    """Hash of the voxels of every prepared volume (of a 4D file: of its frame), for finding copies of an image."""
    return {volume: cohort.store.voxels(volume) for volume in cohort.store.volumes}


def row_hashes(config: RunConfig, manifest: Manifest, weights: Path | None = None) -> Mapping[int, str]:
    """Hash of the features of every row; empty for images, which would have to be read whole.

    ``weights`` that the run begins from say which features they are, so that their fingerprints can be compared.
    """
    if config.spatial_dims != 0:
        return {}
    statistics = weights_statistics(weights)
    names = None if statistics is None else statistics.names
    store = open_features(manifest, config.data.features, names=names, check=False)
    return {volume: store.voxels(volume) for volume in store.volumes}


def image_hashes(manifest: Manifest) -> Mapping[int, str]:
    """Hash of the voxels of every volume, as its entry in the cache holds it; reads the images but prepares none."""
    hashes = {}
    with progress_bar(f"reading {len(manifest)} images") as report:
        table = manifest.table[["volume", "frame"]]
        for done, (volume, frame) in enumerate(table.itertuples(index=False), start=1):
            images, channels = manifest.image_paths(int(volume)), manifest.channels(int(volume))
            read = read_volume(images, frame=None if pd.isna(frame) else int(frame), channels=channels)
            hashes[int(volume)] = voxel_hash(read.data)
            report(done, len(manifest))
    return hashes


def pretraining_manifests(weights: Path) -> list[Manifest]:
    """The volumes that some weights were pretrained on, and those of the weights that they were begun from, and so on.

    The network behind a table that served as a prior (`method.prior.table`), or behind labels of items
    (`data.item_labels`), counts like weights that were begun from.

    Args:
        weights: Run folder, its ``weights`` folder or a file in that. Where a run's manifest is not there, the list
            ends.
    """
    found: list[Manifest] = []
    seen: set[Path] = set()
    waiting = [weights]
    while waiting:
        at = waiting.pop(0)
        if at.resolve() in seen:
            continue
        seen.add(at.resolve())
        near = (at.parent, at.parent.parent) if at.is_file() else (at, at.parent)
        folder = next((one for one in near if (one / "manifest.csv").is_file()), None)
        if folder is None:
            continue
        found.append(with_absolute_paths(read_manifest(folder / "manifest.csv")))
        values = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
        waiting += _learnt_from(values) if isinstance(values, dict) else []
    return found


def lies_with_weights(path: Path) -> bool:
    """Whether a file is one of those that a run exported, in its folder of weights."""
    return (path.parent / "model.json").is_file()


def _learnt_from(config: Mapping[str, Any]) -> list[Path]:
    """Weights that a pretraining began from, those that embedded its prior, and those that labelled its items."""
    method = config.get("method")
    prior = method.get("prior") if isinstance(method, dict) else None
    table = prior.get("table") if isinstance(prior, dict) else None
    embedded = about_table(Path(table)).get("folder") if isinstance(table, str) else None
    data = config.get("data")
    labels = data.get("item_labels") if isinstance(data, dict) else None
    labelled = labels if isinstance(labels, str) and lies_with_weights(Path(labels)) else None
    return [Path(one) for one in (config.get("weights"), embedded, labelled) if isinstance(one, str)]


def with_absolute_paths(manifest: Manifest) -> Manifest:
    """The same rows with absolute paths, so that they can be compared with another manifest's."""
    table = manifest.table.copy()
    volumes = [int(volume) for volume in table["volume"]]
    table["image"] = [";".join(str(path.resolve()) for path in manifest.image_paths(volume)) for volume in volumes]
    labels = [manifest.label_path(volume) for volume in volumes]
    table["label"] = [None if path is None else str(path.resolve()) for path in labels]
    return replace(manifest, table=table)
