"""Items: the slices, slabs, volumes or feature rows that samplers choose from, and reading the chosen ones.

A volume of n slices is divided into S partitions of floor(n / S) consecutive slices, as in Chaitanya et al. 2020
(arXiv:2006.10511, section 3.1); slices left over at the end belong to no partition and are never sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from medssl.core.errors import ConfigError, DataError, InputError, MedsslError
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.data.manifest import Manifest

NOT_LABELS: Final = frozenset({"subject", "image", "label", "session", "frame", "split", "group", "volume", "case"})
UNLABELLED: Final = -1


class Store(Protocol):
    """What this module asks of the store of prepared volumes (`medssl.data.cache.VolumeStore`)."""

    @property
    def volumes(self) -> list[int]:
        """Volumes that were prepared."""

    @property
    def channels(self) -> int:
        """Channels of every volume."""

    @property
    def slice_axis(self) -> int:
        """Axis along which volumes are cut, 0 to 2."""

    def case(self, volume: int) -> str:
        """Unique name of a volume."""

    def geometry(self, volume: int) -> Any:
        """Object whose ``shape`` is the prepared (X, Y, Z)."""

    def n_slices(self, volume: int) -> int:
        """Slices along the slice axis."""

    def has_label(self, volume: int) -> bool:
        """Whether the volume has a label map."""

    def image(self, volume: int) -> npt.NDArray[Any]:
        """(C, X, Y, Z)."""

    def label(self, volume: int) -> npt.NDArray[Any] | None:
        """(X, Y, Z)."""

    def image_slice(self, volume: int, position: int) -> npt.NDArray[Any]:
        """(C, A, B)."""

    def label_slice(self, volume: int, position: int) -> npt.NDArray[Any] | None:
        """(A, B)."""

    def image_slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[Any]:
        """(C, X, Y, Z) with ``depth`` along the slice axis, edges repeated beyond the ends."""

    def label_slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[Any] | None:
        """(X, Y, Z) likewise."""


class ItemsConfig(StrictModel):
    """What one item is."""

    geometry: Literal["slice", "slab", "volume", "features"]
    """slice: 2D; slab: 3D, `depth` slices around a centre; volume: 3D, the whole prepared volume; features: one row of
    a table of measures (the manifest's `image` is the table, `frame` the row)."""
    partitions: PositiveInt | None = None
    """S: stacks of consecutive slices that a volume is divided into; null: none, every slice may be drawn."""
    depth: PositiveInt | None = None
    """Slices of a slab; a slab may reach into the neighbouring partitions."""
    slice_axis: Literal[0, 1, 2] = 2
    """Axis of the prepared (RAS) volume along which it is cut."""

    @model_validator(mode="after")
    def _fits_geometry(self) -> ItemsConfig:
        if (self.geometry == "slab") != (self.depth is not None):
            raise ValueError("depth is the number of slices of a slab: set it for `geometry: slab`, and only there")
        if self.geometry in ("volume", "features") and self.partitions is not None:
            raise ValueError(
                "a volume or row of features lies in no partition: remove partitions, or use geometry slice or slab"
            )
        return self


def build_items(manifest: Manifest, store: Store, config: ItemsConfig) -> ItemTable:
    """Every item of the volumes of ``manifest``.

    Args:
        manifest: The rows to use; each must be in ``store``.
        store: Prepared volumes.
        config: What one item is.

    Returns:
        Rows numbered from 0 in the order of (volume, position). ``subject`` is the code of the manifest's ``group``.
        ``labels`` holds each filled column: numbers as float64 (NaN: missing), text as int64 codes of the sorted
        values (-1: missing).

    Raises:
        DataError: A volume with fewer slices than partitions, volumes of different shapes, a volume not in the store.
        ConfigError: The store was cut along another axis.
    """
    if store.slice_axis != config.slice_axis and config.geometry != "features":
        raise ConfigError(f"volumes were prepared for slices along axis {store.slice_axis}, not {config.slice_axis}")
    volumes = [int(volume) for volume in manifest.table["volume"]]
    if not volumes:
        raise DataError("there are no volumes to take items from", where=str(manifest.path))
    prepared = set(store.volumes)
    missing = [str(manifest.row(volume)["case"]) for volume in volumes if volume not in prepared]
    if missing:
        raise DataError("volumes were not prepared", where=", ".join(missing[:10]))
    _check_shapes(store, volumes, config)
    cuts = [_cut(store, volume, config) for volume in volumes]
    counts = [len(position) for position, _ in cuts]
    return ItemTable(
        row=np.arange(sum(counts), dtype=np.int64),
        subject=np.repeat(codes(manifest.table["group"]), counts),
        volume=np.repeat(np.asarray(volumes, dtype=np.int64), counts),
        partition=np.concatenate([partition for _, partition in cuts]),
        position=np.concatenate([position for position, _ in cuts]),
        n_partitions=config.partitions or 0,
        labels={name: np.repeat(values, counts) for name, values in label_columns(manifest.table).items()},
    )


def _cut(store: Store, volume: int, config: ItemsConfig) -> tuple[Ints, Ints]:
    """Positions of the items of one volume, and the partition of each."""
    if config.geometry in ("volume", "features"):
        return np.zeros(1, np.int64), np.full(1, -1, np.int64)
    n = store.n_slices(volume)
    if config.partitions is None:
        return np.arange(n, dtype=np.int64), np.full(n, -1, np.int64)
    size = n // config.partitions
    if size == 0:
        raise DataError(
            f"a volume has fewer slices than there are partitions ({n} < {config.partitions})",
            where=store.case(volume),
            fix=f"set items.partitions to at most {n}, change items.slice_axis, or exclude the volume",
        )
    position = np.arange(size * config.partitions, dtype=np.int64)
    return position, position // size


def _check_shapes(store: Store, volumes: list[int], config: ItemsConfig) -> None:
    """Items of a batch are stacked, so they must share a shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for volume in volumes:
        groups.setdefault(item_shape(store, volume, config)[1:], []).append(volume)
    if len(groups) == 1:
        return
    shown = []
    for shape, members in sorted(groups.items(), key=lambda entry: -len(entry[1])):
        names = ", ".join(store.case(volume) for volume in members[:4])
        more = f" and {len(members) - 4} more" if len(members) > 4 else ""
        shown.append(f"{'x'.join(map(str, shape))}: {names}{more}")
    raise DataError(
        f"prepared volumes give {config.geometry} items of different shapes, which cannot form one batch",
        found="; ".join(shown),
        fix="set data.prepare.size, so that every volume is cropped or padded to one size",
    )


def item_shape(store: Store, volume: int, config: ItemsConfig) -> tuple[int, ...]:
    """``(C, *spatial)`` of the items of ``volume``; ``(F,)`` for features."""
    if config.geometry == "features":
        return (int(store.channels),)
    shape = [int(n) for n in store.geometry(volume).shape]
    if config.geometry == "slice":
        del shape[config.slice_axis]
    elif config.geometry == "slab":
        assert config.depth is not None
        shape[config.slice_axis] = config.depth
    return (int(store.channels), *shape)


def codes(column: pd.Series) -> Ints:
    """int64 codes of the sorted values of a column of text; -1 where a cell is missing."""
    values = column.astype("object").where(column.notna(), None)
    return pd.factorize(values.map(lambda cell: None if cell is None else str(cell)), sort=True)[0].astype(np.int64)


def label_columns(table: pd.DataFrame) -> dict[str, npt.NDArray[Any]]:
    """What the manifest knows of each volume, as numbers; columns without any value are left out."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in table.columns:
        if name in NOT_LABELS or not table[name].notna().any():
            continue
        if pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name]):
            columns[str(name)] = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            columns[str(name)] = codes(table[name])
    return columns


class ItemReader:
    """Reads items of a table from the store.

    Args:
        store: Prepared volumes.
        table: Items that may be read.
        config: What one item is.
        with_labels: Read label maps where the store has any; pretraining without labels saves the bytes.
    """

    def __init__(self, store: Store, table: ItemTable, config: ItemsConfig, *, with_labels: bool = True) -> None:
        if len(table) == 0:
            raise DataError("there are no items to train on")
        self.store, self.table, self.config = store, table, config
        self.labelled = with_labels and any(store.has_label(int(volume)) for volume in np.unique(table.volume))
        self._order = np.argsort(table.row, kind="stable")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(C, *spatial)`` of one item."""
        return item_shape(self.store, int(self.table.volume[0]), self.config)

    def find(self, rows: npt.ArrayLike) -> Ints:
        """Positions in the table of row numbers. Raises InputError for a row that the table does not hold."""
        wanted = np.asarray(rows, dtype=np.int64)
        place = np.searchsorted(self.table.row, wanted, sorter=self._order)
        found = self._order[np.minimum(place, len(self._order) - 1)]
        if not np.array_equal(self.table.row[found], wanted):
            raise InputError("rows are not in the table of items", found=str(sorted(set(wanted) - set(self.table.row))))
        return np.asarray(found, dtype=np.int64)

    def describe(self, rows: npt.ArrayLike) -> list[str]:
        """``row 12: patient007_frame01, slice 4`` for each row, for messages."""
        return [self._name(index) for index in self.find(rows)]

    def _name(self, index: int) -> str:
        case = self.store.case(int(self.table.volume[index]))
        place = (
            ""
            if self.config.geometry in ("volume", "features")
            else f", {self.config.geometry} {self.table.position[index]}"
        )
        return f"row {self.table.row[index]}: {case}{place}"

    def columns(self, rows: npt.ArrayLike) -> Mapping[str, npt.NDArray[Any]]:
        """The items' integer columns and, as ``label.<name>``, their labels."""
        found = self.find(rows)
        names = ("row", "subject", "volume", "partition", "position")
        columns = {name: getattr(self.table, name)[found] for name in names}
        return columns | {f"label.{name}": values[found] for name, values in self.table.labels.items()}

    def read(self, rows: npt.ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Read items.

        Args:
            rows: (n,) row numbers.

        Returns:
            Images float32 ``(n, C, *spatial)``; label maps int64 ``(n, *spatial)``, all -1 for an item of a volume
            without one, or None where no volume of the table has any.

        Raises:
            DataError: An item cannot be read; it names the case.
        """
        found = self.find(rows)
        shape = self.image_shape
        images = torch.empty((len(found), *shape), dtype=torch.float32)
        maps = torch.full((len(found), *shape[1:]), UNLABELLED, dtype=torch.int64) if self.labelled else None
        for i, index in enumerate(found):
            try:
                image, label = self._read(int(self.table.volume[index]), int(self.table.position[index]))
                images[i] = torch.from_numpy(np.array(image, dtype=np.float32))
                if maps is not None and label is not None:
                    maps[i] = torch.from_numpy(np.array(label, dtype=np.int64))
            except MedsslError:
                raise
            except Exception as error:
                raise DataError(
                    "an item could not be read from the cache of prepared volumes",
                    where=self._name(index),
                    found=f"{type(error).__name__}: {error}",
                    fix="delete the entry of this volume in the cache and prepare it again",
                ) from error
        return images, maps

    def _read(self, volume: int, position: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        store, wants = self.store, self.labelled and self.store.has_label(volume)
        if self.config.geometry == "slice":
            return store.image_slice(volume, position), store.label_slice(volume, position) if wants else None
        if self.config.geometry == "slab":
            depth = self.config.depth
            assert depth is not None
            label = store.label_slab(volume, position, depth) if wants else None
            return store.image_slab(volume, position, depth), label
        return store.image(volume), store.label(volume) if wants else None
