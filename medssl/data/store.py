"""Reading prepared volumes: slices, slabs and whole volumes through memory maps, only the bytes that are asked for."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.core.errors import DataError

OPEN_FILES = 64
"""Memory maps kept open; each costs a file descriptor."""

Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CaseGeometry:
    """Where a prepared volume lies: all that is needed to bring a result back to the file it came from.

    Attributes:
        native_affine: (4, 4) of the file, header repaired.
        native_shape: (X, Y, Z) of the file.
        affine: (4, 4) of the prepared grid.
        shape: (X, Y, Z) of the prepared grid, RAS axes.
        slice_axis: Axis of the prepared grid along which slices are cut.
    """

    native_affine: Affine
    native_shape: tuple[int, ...]
    affine: Affine
    shape: tuple[int, ...]
    slice_axis: int = 2

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats keep every digit."""
        return {
            "native_affine": np.asarray(self.native_affine).tolist(),
            "native_shape": list(self.native_shape),
            "affine": np.asarray(self.affine).tolist(),
            "shape": list(self.shape),
            "slice_axis": self.slice_axis,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CaseGeometry:
        """The inverse of ``to_json``; other keys are ignored."""
        return cls(
            np.array(values["native_affine"], dtype=np.float64),
            tuple(values["native_shape"]),
            np.array(values["affine"], dtype=np.float64),
            tuple(values["shape"]),
            int(values["slice_axis"]),
        )


class VolumeStore:
    """Prepared volumes by number. Safe to use from several threads, and picklable.

    Args:
        entries: Folder of each volume in the cache.
        cases: Case name of each volume.

    Raises:
        DataError: An entry is damaged, or the volumes differ in channels or slice axis.
    """

    def __init__(self, entries: Mapping[int, Path], cases: Mapping[int, str]) -> None:
        self._entries = dict(entries)
        self._cases = dict(cases)
        self._open: OrderedDict[tuple[int, str], np.memmap] = OrderedDict()
        self._lock = threading.Lock()
        self._info = {volume: self._read_info(volume) for volume in self._entries}
        self._geometry = {volume: CaseGeometry.from_json(info) for volume, info in self._info.items()}
        self.channels = self._common("channels", {v: int(self._stored(v, "image").shape[1]) for v in self._entries}, 1)
        self.slice_axis = self._common("slice axis", {v: g.slice_axis for v, g in self._geometry.items()}, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _common(self, name: str, values: Mapping[int, int], default: int) -> int:
        if len(set(values.values())) > 1:
            first = next(iter(values))
            other = next(volume for volume in values if values[volume] != values[first])
            raise DataError(
                f"volumes differ in their {name}",
                where=f"{self.case(first)} and {self.case(other)}",
                found=f"{values[first]} and {values[other]}",
                fix="give every volume the same files (channels) in the manifest",
            )
        return next(iter(values.values()), default)

    def _read_info(self, volume: int) -> dict[str, Any]:
        entry = self._entries[volume]
        try:
            info = json.loads((entry / "geometry.json").read_text(encoding="utf-8"))
            for name, size in info["bytes"].items():
                if (entry / f"{name}.npy").stat().st_size != size:
                    raise ValueError(f"{name}.npy does not have {size} bytes")
            CaseGeometry.from_json(info)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(entry, error) from error
        return info

    @staticmethod
    def _damaged(entry: Path, error: Exception) -> DataError:
        return DataError(
            "damaged entry in the cache",
            where=str(entry),
            found=str(error),
            fix="delete this folder and prepare the data again",
        )

    def _stored(self, volume: int, name: str) -> np.memmap:
        key = (volume, name)
        with self._lock:
            array = self._open.get(key)
            if array is not None:
                self._open.move_to_end(key)
                return array
        try:
            array = np.load(self._entries[volume] / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(self._entries[volume], error) from error
        with self._lock:
            self._open[key] = array
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # views that are still in use keep their map alive
        return array

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def volumes(self) -> list[int]:
        """Numbers of the volumes, as in the manifest."""
        return list(self._entries)

    def case(self, volume: int) -> str:
        """Name of a volume, safe as a file name."""
        return self._cases[volume]

    def geometry(self, volume: int) -> CaseGeometry:
        """Native and prepared grid of a volume."""
        return self._geometry[volume]

    def key(self, volume: int) -> str:
        """Name of the entry in the cache: a hash of what its image and label files hold and of how it was prepared."""
        return self._entries[volume].name

    def voxels(self, volume: int) -> str:
        """Hash of the voxels of the file before preparation: one image under two names has one."""
        return str(self._info[volume]["voxels"])

    def has_label(self, volume: int) -> bool:
        """Whether a label map was prepared with the volume."""
        return "label" in self._info[volume]["bytes"]

    def n_slices(self, volume: int) -> int:
        """Number of slices along the slice axis."""
        return int(self._geometry[volume].shape[self.slice_axis])

    def image(self, volume: int) -> npt.NDArray[np.float32]:
        """(C, X, Y, Z): a read-only view of the file, nothing is read before it is used."""
        return np.moveaxis(self._stored(volume, "image"), 0, self.slice_axis + 1)

    def label(self, volume: int) -> npt.NDArray[np.uint8] | None:
        """(X, Y, Z): a read-only view of the file, or None where there is no label map."""
        if not self.has_label(volume):
            return None
        return np.moveaxis(self._stored(volume, "label"), 0, self.slice_axis)

    def image_slice(self, volume: int, position: int) -> npt.NDArray[np.float32]:
        """One slice (C, A, B); A and B are the two remaining axes in order. A copy."""
        return np.array(self._stored(volume, "image")[self._inside(volume, position)])

    def label_slice(self, volume: int, position: int) -> npt.NDArray[np.uint8] | None:
        """The label map of one slice (A, B), or None. A copy."""
        if not self.has_label(volume):
            return None
        return np.array(self._stored(volume, "label")[self._inside(volume, position)])

    def image_slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[np.float32]:
        """``depth`` slices about ``centre``: (C, X, Y, Z) with ``depth`` along the slice axis, end slices repeated.

        The slab begins at ``centre - depth // 2``. A contiguous copy.
        """
        stored = self._stored(volume, "image")[self._slab(volume, centre, depth)]
        return np.ascontiguousarray(np.moveaxis(stored, 0, self.slice_axis + 1))

    def label_slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[np.uint8] | None:
        """The label map (X, Y, Z) of a slab, or None."""
        if not self.has_label(volume):
            return None
        stored = self._stored(volume, "label")[self._slab(volume, centre, depth)]
        return np.ascontiguousarray(np.moveaxis(stored, 0, self.slice_axis))

    def _inside(self, volume: int, position: int) -> int:
        if not 0 <= position < self.n_slices(volume):
            raise DataError(
                f"no slice {position}", where=self.case(volume), found=f"{self.n_slices(volume)} slices", fix="check it"
            )
        return int(position)

    def _slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[np.int64]:
        start = self._inside(volume, centre) - depth // 2
        return np.clip(np.arange(start, start + depth), 0, self.n_slices(volume) - 1)
