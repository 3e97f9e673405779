"""Rows of feature tables as a run's items: opened by manifest, standardised, read in batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from medssl.core.errors import DataError
from medssl.core.types import ItemTable
from medssl.data.features import SUFFIXES, FeaturesConfig, FeatureStatistics, FeatureTable, Floats, read_features
from medssl.data.items import ItemReader, ItemsConfig
from medssl.data.manifest import Manifest

log = logging.getLogger(__name__)

_SHOWN = 10


class FeatureStore:
    """Raw features by volume number; what `medssl.data.store.VolumeStore` is for voxels.

    Args:
        names: Of the F features.
        values: (n, F) float32 raw features, NaN where missing.
        volumes: The n volume numbers.
        cases: Case name of each volume.
    """

    slice_axis = 2

    def __init__(self, names: Sequence[str], values: Floats, volumes: Sequence[int], cases: Mapping[int, str]) -> None:
        if values.shape != (len(volumes), len(names)):
            raise DataError("features, names and volumes differ in number", found=f"values {values.shape}")
        self.names, self.values = tuple(names), values
        self._row = {int(volume): row for row, volume in enumerate(volumes)}
        self._cases = dict(cases)
        self._order = np.argsort(np.asarray(self.names, dtype=object), kind="stable")

    def __len__(self) -> int:
        return len(self._row)

    @property
    def volumes(self) -> list[int]:
        """Numbers of the volumes, as in the manifest."""
        return list(self._row)

    @property
    def channels(self) -> int:
        """F, the number of features."""
        return len(self.names)

    def case(self, volume: int) -> str:
        """Name of a volume, safe as a file name."""
        return self._cases[volume]

    def has_label(self, volume: int) -> bool:
        """False: a row has no label map."""
        del volume
        return False

    def label(self, volume: int) -> None:
        """None: a row has no label map."""
        del volume

    def rows(self, volumes: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """(n, F) raw features of these volumes, a copy."""
        return self.values[[self._row[int(volume)] for volume in volumes]]

    def replaced(self, values: Floats) -> FeatureStore:
        """The same volumes with other values of the same shape, such as harmonised ones."""
        return FeatureStore(self.names, np.asarray(values, dtype=np.float32), self.volumes, self._cases)

    def voxels(self, volume: int) -> str:
        """Hash of the raw row: the same for one row in two files, whatever the order of their columns."""
        row = self.values[self._row[volume]][self._order] + np.float32(0)  # adding 0 turns -0 into 0
        return hashlib.sha256(np.where(np.isnan(row), np.float32(np.nan), row).tobytes()).hexdigest()

    def key(self, volume: int) -> str:
        """Hash of the row and of the names of its features, for telling whether a resumed run sees the same."""
        return hashlib.sha256(f"{self.voxels(volume)} {' '.join(self.names)}".encode()).hexdigest()


def open_features(
    manifest: Manifest, config: FeaturesConfig, *, names: Sequence[str] | None = None, check: bool = True
) -> FeatureStore:
    """Read the rows that a manifest names.

    A manifest row names a table as ``image`` and, in ``frame``, the row in it counted from 0; a table of one row needs
    no frame, and a .npy array without one is one row whatever its axes.

    Args:
        manifest: Its rows.
        config: Which columns, and whether a feature may be missing.
        names: Features in the order of weights that were trained on them; None: as in the first table.
        check: Refuse values that are missing (unless imputed) or infinite.

    Raises:
        DataError: Naming files and rows: not a table, no such row, other columns, missing or infinite values.
    """
    columns = config.columns if config.columns is not None else manifest.meta.features or None
    files = _by_file(manifest)
    tables = {file: read_features(file[0], columns, one_row=file[1]) for file in files}
    first, table = next(iter(tables.items()))
    reference = f"{first[0].name} has" if names is None else "the weights were trained on"
    wanted = tuple(table.names if names is None else names)
    volumes = [int(volume) for volume in manifest.table["volume"]]
    place = {volume: row for row, volume in enumerate(volumes)}
    values = np.empty((len(volumes), len(wanted)), dtype=np.float32)
    for (path, whole), members in files.items():
        table = tables[path, whole]
        aligned = aligned_values(table, wanted, path, reference=reference, same=names is None)
        values[[place[volume] for volume, _ in members]] = aligned[_rows(manifest, table, path, members)]
    cases = {int(volume): str(case) for volume, case in zip(manifest.table["volume"], manifest.table["case"])}
    store = FeatureStore(wanted, values, volumes, cases)
    if check:
        _refuse_values(store, manifest, np.isinf(values), "infinite features", "correct the table")
        if config.impute is None:
            fix = "fill them in, exclude these rows, or set data.features.impute: mean"
            _refuse_values(store, manifest, np.isnan(values), "missing features", fix)
    return store


def _by_file(manifest: Manifest) -> dict[tuple[Path, bool], list[tuple[int, int | None]]]:
    """(volume, row in the file) by file; the flag says that the whole array of the file is one row."""
    files: dict[tuple[Path, bool], list[tuple[int, int | None]]] = {}
    for volume, frame in zip(manifest.table["volume"], manifest.table["frame"]):
        paths = manifest.image_paths(volume)
        where = f"{manifest.path}, line {manifest.line(volume)}"
        if len(paths) > 1:
            raise DataError("a row of features comes from one table", where=where, found=f"{len(paths)} files")
        if paths[0].suffix.lower() not in SUFFIXES:
            raise DataError(
                "not a table of features",
                where=where,
                found=paths[0].name,
                fix="set items.geometry to slice, slab or volume for images",
            )
        row = None if pd.isna(frame) else int(frame)
        whole = row is None and paths[0].suffix.lower() == ".npy"
        files.setdefault((paths[0], whole), []).append((int(volume), row))
    return files


def _rows(manifest: Manifest, table: FeatureTable, path: Path, members: list[tuple[int, int | None]]) -> list[int]:
    beyond = [volume for volume, row in members if row is not None and row >= len(table)]
    unnamed = [volume for volume, row in members if row is None and len(table) > 1]
    for wrong, message in (
        (beyond, "the table has no such row"),
        (unnamed, "a table of several rows, and `frame` does not say which one is meant"),
    ):
        if wrong:
            lines = ", ".join(str(manifest.line(volume)) for volume in wrong[:_SHOWN])
            raise DataError(
                message,
                where=f"{manifest.path}, line {lines}{' ...' if len(wrong) > _SHOWN else ''}",
                found=f"{len(table)} rows in {path.name}",
                fix=f"`frame` counts rows from 0 to {len(table) - 1}; scan the table again with `medssl data scan`",
            )
    return [row or 0 for _, row in members]


def aligned_values(
    table: FeatureTable, names: Sequence[str], path: Path, *, reference: str, same: bool = False
) -> Floats:
    """Values of the features ``names`` in that order, whatever the order in the table.

    Args:
        table: The table.
        names: The features that are wanted.
        path: For the message.
        reference: Who wants them: "the weights were trained on".
        same: Refuse further columns too, which are otherwise left out. Those of a .npy array always are refused: its
            columns are known by their place alone.

    Raises:
        DataError: Naming what is missing and what is there instead.
    """
    if table.names == tuple(names):
        return table.values
    missing = [name for name in names if name not in set(table.names)]
    extra = [name for name in table.names if name not in set(names)]
    if missing or (extra and (same or table.positional)):
        parts = [f"{reference} {len(names)} features, this table has {len(table.names)}"]
        parts += [f"missing: {_listed(missing)}"] if missing else []
        parts += [f"not known: {_listed(extra)}"] if extra else []
        raise DataError(
            "the columns of a feature table are not those that are needed",
            where=str(path),
            found="; ".join(parts),
            fix="use the same table layout, or choose the common columns with data.features.columns",
        )
    if extra:
        log.info("%s: %d further columns are left out: %s", path.name, len(extra), _listed(extra))
    place = {name: column for column, name in enumerate(table.names)}
    return table.values[:, [place[name] for name in names]]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _refuse_values(store: FeatureStore, manifest: Manifest, bad: npt.NDArray[np.bool_], message: str, fix: str) -> None:
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows) == 0:
        return
    shown = []
    for row in rows[:_SHOWN]:
        volume = store.volumes[row]
        names = [store.names[column] for column in np.flatnonzero(bad[row])]
        shown.append(f"{store.case(volume)} (line {manifest.line(volume)}): {_listed(names)}")
    more = f"; and {len(rows) - _SHOWN} more rows" if len(rows) > _SHOWN else ""
    raise DataError(f"{message} in {len(rows)} rows", where=str(manifest.path), found="; ".join(shown) + more, fix=fix)


class FeatureReader(ItemReader):
    """Reads standardised rows.

    Args:
        store: Raw features.
        table: Items that may be read.
        statistics: How they are standardised.
    """

    def __init__(self, store: FeatureStore, table: ItemTable, statistics: FeatureStatistics) -> None:
        super().__init__(store, table, ItemsConfig(geometry="features"), with_labels=False)  # type: ignore[arg-type]
        if statistics.names != store.names:
            raise DataError(
                "the statistics are of other features than the store's",
                found=f"{len(statistics.names)} and {len(store.names)} features",
            )
        self.statistics = statistics
        self._values = statistics.apply(store.rows(table.volume))  # in the order of the table
        if not np.isfinite(self._values).all():
            row = int(np.flatnonzero(~np.isfinite(self._values).all(axis=1))[0])
            raise DataError(
                "a standardised feature is not finite",
                where=self._name(row),
                fix="see `medssl data check --deep`; data.features.impute: mean fills in missing features",
            )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(F,)``."""
        return (self._values.shape[1],)

    def read(self, rows: npt.ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Standardised features float32 ``(n, F)``, and None: there are no label maps."""
        return torch.from_numpy(self._values[self.find(rows)]), None


def fit_statistics(store: FeatureStore, volumes: Sequence[int], config: FeaturesConfig) -> FeatureStatistics:
    """Mean and deviation of the rows that are trained on; says which features are constant there.

    Raises:
        DataError: As ``FeatureStatistics.fit``.
    """
    statistics = FeatureStatistics.fit(store.names, store.rows(volumes), config)
    if statistics.constant and config.standardise:
        log.warning(
            "%d features are constant in the %d rows that are trained on and become 0: %s",
            len(statistics.constant), len(volumes), _listed(statistics.constant),
        )  # fmt: skip
    return statistics
