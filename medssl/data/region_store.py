"""Regions of every item of a cohort, found once and kept in the cache.

``<cache>/regions/<key>.maps.npy`` holds the maps of a volume's items (items, *spatial) uint8, ``<key>.heights.npy``
(items, max_regions^2) float32 how far apart their regions are. The key is a hash of the prepared volume, the settings
and the supplied boundaries; a kill leaves no half of an entry.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import joblib
import numpy as np
import numpy.typing as npt

from medssl.core.errors import DataError
from medssl.core.files import atomic_write, require_space
from medssl.data.hashes import file_hash
from medssl.data.items import ItemsConfig, item_shape
from medssl.data.regions import RegionsConfig, find_regions, gradient_strength
from medssl.data.store import VolumeStore
from medssl.data.volume import affines_agree, read_volume, spacing_of
from medssl.transforms.preprocess import PrepareConfig, to_grid

FORMAT: Final = 1
"""Raised when the same settings would find other regions."""


class RegionStore:
    """Prepared volumes whose label maps are the maps of their regions (what `medssl.data.items.Store` asks for).

    Args:
        store: Prepared volumes.
        entries: Of each volume the file of its items' maps, as `prepare_regions` writes it.
    """

    def __init__(self, store: VolumeStore, entries: Mapping[int, Path]) -> None:
        self._store, self._entries = store, dict(entries)
        self.volumes, self.channels, self.slice_axis = store.volumes, store.channels, store.slice_axis
        self.case, self.geometry, self.n_slices = store.case, store.geometry, store.n_slices
        self.image, self.image_slice, self.image_slab = store.image, store.image_slice, store.image_slab

    def key(self, volume: int) -> str:
        """Name of the entry in the cache: a hash of the prepared volume, the settings and supplied boundaries."""
        return self._entries[volume].name.partition(".")[0]

    def has_label(self, volume: int) -> bool:
        """Whether regions were found for the volume."""
        return volume in self._entries

    def label(self, volume: int) -> npt.NDArray[np.uint8]:
        """Regions (X, Y, Z) of the whole volume."""
        return self._item(volume, 0)

    def label_slice(self, volume: int, position: int) -> npt.NDArray[np.uint8]:
        """Regions (A, B) of a slice by itself."""
        return self._item(volume, position)

    def label_slab(self, volume: int, centre: int, depth: int) -> npt.NDArray[np.uint8]:
        """Regions (X, Y, Z) of a slab by itself, of the depth that they were found for."""
        del depth
        return self._item(volume, centre)

    def heights(self, volume: int) -> npt.NDArray[np.float32]:
        """(items, max_regions^2): see `medssl.data.regions.HEIGHTS`; infinite where there is no such region."""
        return _load(_heights_file(self._entries[volume]))

    def _item(self, volume: int, position: int) -> npt.NDArray[np.uint8]:
        maps: npt.NDArray[np.uint8] = np.array(_load(self._entries[volume], mmap_mode="r")[position])
        return maps


def prepare_regions(
    store: VolumeStore,
    volumes: Sequence[int],
    items: ItemsConfig,
    config: RegionsConfig,
    *,
    prepare: PrepareConfig,
    cache: Path,
    boundaries: Mapping[int, Path] | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RegionStore:
    """Find the regions of every item of some volumes, unless the cache has them.

    Stopped at any moment it goes on where it was. The same volumes and settings give the same regions.

    Args:
        store: Prepared volumes.
        volumes: Which of them.
        items: What one item is; slices and slabs have regions of their own.
        config: How regions are found.
        prepare: How the volumes were prepared: supplied boundaries are brought to their grid in the same way.
        cache: Folder of the cache.
        boundaries: File of the boundary strengths of each volume, where ``config.boundaries`` names a column.
        jobs: Processes; -1 for all cores.
        progress: Called as ``progress(done, total)`` with the number of volumes.

    Raises:
        DataError: Boundaries that cannot be read, do not lie on the image's grid, or are not between 0 and 1; every
            volume with its problem.
        DiskError: No space.
    """
    folder, entries = cache.resolve() / "regions", dict[int, Path]()
    problems: dict[int, str] = {}
    for volume in volumes:
        try:
            entries[volume] = folder / f"{_key(store, volume, items, config, boundaries)}.maps.npy"
        except DataError as error:
            problems[volume] = str(error)
    missing = [volume for volume, path in entries.items() if not path.is_file()]
    need = sum(_n_items(store, volume, items) * _bytes_of_item(store, volume, items, config) for volume in missing)
    require_space(folder, need, what=f"the regions of {len(missing)} volumes")
    work = (
        (store, volume, items, config, prepare, (boundaries or {}).get(volume), entries[volume]) for volume in missing
    )
    done = len(entries) - len(missing)
    for volume, problem in _each(work, jobs if len(missing) > 1 else 1):
        done += 1
        if problem is not None:
            problems[volume] = problem
        if progress is not None:
            progress(done, len(entries))
    if problems:
        listed = [f"- {store.case(v)}: " + text.replace("\n", "\n  ") for v, text in sorted(problems.items())]
        raise DataError(
            f"the regions of {len(problems)} of {len(volumes)} volumes could not be found\n" + "\n".join(listed),
            fix="correct these boundary maps, or remove method.regions.boundaries (the gradient then stands in)",
        )
    return RegionStore(store, entries)


def _key(
    store: VolumeStore, volume: int, items: ItemsConfig, config: RegionsConfig, boundaries: Mapping[int, Path] | None
) -> str:
    identity = {
        "format": FORMAT,
        "volume": store.key(volume),
        "items": [items.geometry, items.depth],
        "max_regions": config.max_regions,
        "heights": config.heights,
        "strength": config.smoothing if boundaries is None else file_hash(boundaries[volume]),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]


def _n_items(store: VolumeStore, volume: int, items: ItemsConfig) -> int:
    return 1 if items.geometry == "volume" else store.n_slices(volume)


def _bytes_of_item(store: VolumeStore, volume: int, items: ItemsConfig, config: RegionsConfig) -> int:
    return int(np.prod(item_shape(store, volume, items)[1:])) + 4 * config.max_regions**2


def _each(work: Any, jobs: int) -> Any:
    """What ``_build`` gives for each volume, as it is done."""
    if jobs == 1:
        return (_build(*arguments) for arguments in work)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        return pool(joblib.delayed(_build)(*arguments) for arguments in work)


def _build(
    store: VolumeStore,
    volume: int,
    items: ItemsConfig,
    config: RegionsConfig,
    prepare: PrepareConfig,
    boundaries: Path | None,
    path: Path,
) -> tuple[int, str | None]:
    """Write the regions of one volume's items; its number and what is wrong with it, or None."""
    supplied = None
    if boundaries is not None:
        try:
            supplied = read_boundaries(store, volume, boundaries, prepare)
        except DataError as error:
            return volume, str(error)
    spacing = list(spacing_of(store.geometry(volume).affine))
    if items.geometry == "slice":
        del spacing[store.slice_axis]
    maps, heights = [], []
    for position in range(_n_items(store, volume, items)):
        if supplied is None:
            strength = gradient_strength(_image(store, volume, position, items), spacing, smoothing=config.smoothing)
        else:
            strength = _part(supplied, position, items, store.slice_axis)
        found = find_regions(strength, spacing, max_regions=config.max_regions)
        square = np.full((config.max_regions,) * 2, np.inf, dtype=np.float32)
        square[: found.n_regions, : found.n_regions] = found.heights(config.heights)
        maps.append(found.map)
        heights.append(square.ravel())
    # The file of the maps says that both are there, so it comes last.
    atomic_write(_heights_file(path), _npy(np.stack(heights)))
    atomic_write(path, _npy(np.stack(maps)))
    return volume, None


def read_boundaries(store: VolumeStore, volume: int, path: Path, prepare: PrepareConfig) -> npt.NDArray[np.float32]:
    """Boundary strengths (X, Y, Z) on the grid of a prepared volume, from a file on the grid of its image.

    Raises:
        DataError: The file cannot be read, lies on another grid, or holds values outside 0 to 1.
    """
    geometry, given = store.geometry(volume), read_volume(path)
    placed = path.suffix != ".npy" and not np.array_equal(geometry.native_affine, np.eye(4))
    if given.data.shape != (1, *geometry.native_shape) or (
        placed and not affines_agree(geometry.native_affine, given.affine, geometry.native_shape)
    ):
        raise DataError(
            "boundary strengths and image lie on different grids",
            where=str(path),
            found=f"boundaries {given.data.shape[1:]}, image {geometry.native_shape}"
            + (", at different places" if given.data.shape[1:] == geometry.native_shape else ""),
            fix="resample the boundaries onto the image",
        )
    low, high = float(given.data.min()), float(given.data.max())
    if low < 0 or high > 1:
        raise DataError(
            "boundary strengths must be between 0 and 1",
            where=str(path),
            found=f"{low:g} to {high:g}",
            fix="divide them by their highest possible value (255 for 8-bit images)",
        )
    moved, _ = to_grid(given.data, geometry.native_affine, prepare, nearest=False)
    if moved.shape[1:] != tuple(geometry.shape):
        raise AssertionError("boundaries and image left the same grid with different shapes")
    return moved[0]


def _image(store: VolumeStore, volume: int, position: int, items: ItemsConfig) -> npt.NDArray[Any]:
    """(C, *spatial) of an item."""
    if items.geometry == "slice":
        return store.image_slice(volume, position)
    if items.depth is not None:
        return store.image_slab(volume, position, items.depth)
    return store.image(volume)


def _part(whole: npt.NDArray[Any], position: int, items: ItemsConfig, axis: int) -> npt.NDArray[Any]:
    """The same item of a volume (X, Y, Z) that is not in the store."""
    if items.geometry == "slice":
        return whole.take(position, axis)
    if items.depth is not None:
        start = position - items.depth // 2
        return whole.take(np.clip(np.arange(start, start + items.depth), 0, whole.shape[axis] - 1), axis)
    return whole


def _heights_file(maps: Path) -> Path:
    return maps.with_name(maps.name.replace(".maps.npy", ".heights.npy"))


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> Any:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            "damaged regions in the cache", where=str(path), found=str(error), fix="delete this file and run again"
        ) from error
