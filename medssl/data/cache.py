"""The cache: every volume prepared once, stored uncompressed and slice axis first, then read through memory maps.

``<cache>/volumes/<key>/`` holds image.npy (slices, C, A, B) float32, label.npy (slices, A, B) uint8 where there is one,
and geometry.json. The key is a hash of the contents of the files and of the settings, so a changed file or setting
leads to a new entry and an old one is never wrong. An entry appears by one rename: a kill or a second process cannot
leave half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
import pandas as pd

from medssl.core.errors import DataError
from medssl.core.files import explain_disk_errors, require_space
from medssl.data.hashes import HashMemory
from medssl.data.masks import mask_for, read_mask
from medssl.data.store import CaseGeometry, VolumeStore
from medssl.data.volume import affines_agree, read_header, read_label, read_volume, suffix_of
from medssl.transforms.preprocess import PrepareConfig, prepared_shape, preprocess

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the same settings would store something else."""

STALE_SECONDS = 24 * 3600
Progress = Callable[[int, int], None]
Built = tuple[str, str | None, tuple[str, ...]]


class VolumeTable(Protocol):
    """What is needed of a manifest."""

    table: pd.DataFrame

    def image_paths(self, volume: int) -> list[Path]:
        """Files of the channels."""

    def label_path(self, volume: int) -> Path | None:
        """File of the label map."""

    def channels(self, volume: int) -> int | None:
        """Channels along the fourth axis of the one file, or None."""


def prepare(
    manifest: VolumeTable,
    config: PrepareConfig,
    cache: Path,
    *,
    slice_axis: int = 2,
    jobs: int = 1,
    progress: Progress | None = None,
) -> VolumeStore:
    """Prepare every volume of a manifest, unless the cache has it, and open the cache.

    Stopped at any moment it goes on where it was; several processes may prepare the same volumes.

    Args:
        manifest: Table with ``volume``, ``case`` and ``frame``, and the paths of each volume.
        config: What is done to each volume.
        cache: Folder; created when missing.
        slice_axis: 0, 1 or 2: the prepared axis (X, Y, Z) along which slices are cut.
        jobs: Processes; -1 for all cores.
        progress: Called as ``progress(done, total)`` with the number of volumes.

    Raises:
        DataError: A mask that cannot be read; every volume that could not be prepared, named with its cause, after all
            others were prepared.
        DiskError: No space; entries that are complete stay.
    """
    if slice_axis not in (0, 1, 2):
        raise DataError("slice_axis must be 0, 1 or 2", found=str(slice_axis))
    folder = cache.resolve() / "volumes"
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_litter(folder)
    sources, problems = _sources(manifest, config, cache, slice_axis)
    missing = {s["key"]: s for s in sources.values() if not (folder / s["key"] / "geometry.json").is_file()}
    require_space(folder, _bytes_needed(missing.values(), config), what=f"preparing {len(missing)} volumes")
    done, total = len(sources) - len(missing), len(sources)
    if progress is not None:
        progress(done, total)
    failed: dict[str, str] = {}
    said: Counter[str] = Counter()
    for key, problem, warnings in _build_all(list(missing.values()), config, folder, slice_axis, jobs):
        done += 1
        for warning in warnings:
            if not said[warning]:
                logger.warning("%s: %s", missing[key]["case"], warning)
            said[warning] += 1
        if problem is not None:
            failed[key] = problem
        if progress is not None:
            progress(done, total)
    for warning, count in said.items():
        if count > 1:
            logger.warning("the same of %d more volumes: %s", count - 1, warning)
    problems |= {volume: failed[s["key"]] for volume, s in sources.items() if s["key"] in failed}
    if problems:
        _raise_all(problems, manifest, total=len(manifest.table))
    return VolumeStore({v: folder / s["key"] for v, s in sources.items()}, {v: s["case"] for v, s in sources.items()})


def _sources(
    manifest: VolumeTable, config: PrepareConfig, cache: Path, slice_axis: int
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Per volume the files and the key of its entry; and what is wrong with the others."""
    memory = HashMemory(cache.resolve() / "hashes.json")
    settings = {"format": FORMAT, "slice_axis": slice_axis, "prepare": _what_is_done(config, memory)}
    sources, problems = {}, {}
    for row in manifest.table[["volume", "case", "frame"]].itertuples(index=False):
        volume, frame = int(row.volume), None if pd.isna(row.frame) else int(row.frame)
        try:
            images, label = manifest.image_paths(volume), manifest.label_path(volume)
            files = [*images, *([] if label is None else [label])]
            content = [[memory.hash(file), suffix_of(file)] for file in files]
        except DataError as error:
            problems[volume] = str(error)
            continue
        channels = manifest.channels(volume)
        identity = {**settings, "files": content, "label": label is not None, "frame": frame, "channels": channels}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
        sources[volume] = {
            "key": key,
            "case": str(row.case),
            "images": images,
            "label": label,
            "frame": frame,
            "channels": channels,
        }
    memory.save()
    return sources, problems


def _what_is_done(config: PrepareConfig, memory: HashMemory) -> dict[str, Any]:
    """The settings with the content of the mask instead of its path; without the keys of a mask where there is none."""
    if config.mask is None:
        return config.model_dump(mode="json", exclude={"mask", "mask_above"})
    read_mask(config.mask, config.mask_above)  # say what is wrong with it once, not for every volume
    return {**config.model_dump(mode="json"), "mask": memory.hash(config.mask)}


def _bytes_needed(sources: Sequence[dict[str, Any]] | Any, config: PrepareConfig) -> int:
    needed = 0
    for source in sources:
        try:
            header = read_header(source["images"][0])
        except DataError:
            continue  # reported when it is prepared, with the others
        shape = prepared_shape(header.shape[:3], header.affine, config)
        n_channels = source["channels"] or len(source["images"])
        needed += int(np.prod(shape)) * (4 * n_channels + (source["label"] is not None))
    return needed


def _build_all(sources: list[dict[str, Any]], config: PrepareConfig, folder: Path, slice_axis: int, jobs: int) -> Any:
    """Build entries, here or in ``jobs`` processes, and give what ``_build`` returns as they are done."""
    if jobs == 1 or len(sources) < 2:
        return (_build(source, config, folder, slice_axis) for source in sources)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        pool = joblib.Parallel(n_jobs=min(jobs, len(sources)), return_as="generator_unordered")
        return pool(joblib.delayed(_build)(source, config, folder, slice_axis) for source in sources)


def _build(source: dict[str, Any], config: PrepareConfig, folder: Path, slice_axis: int) -> Built:
    """Prepare one volume and put its entry into place; returns its key, what is wrong with it or None, and warnings.

    Only problems of the data are returned: a full disk stops everything, since every other volume would meet it too.
    """
    try:
        arrays, info, warnings = _prepare_arrays(source, config, slice_axis)
    except DataError as error:
        return source["key"], str(error), ()
    except (RuntimeError, ValueError, MemoryError) as error:  # from the libraries: name the volume, keep the others
        logger.debug("preparing %s failed", source["images"], exc_info=True)
        return source["key"], f"{type(error).__name__}: {error}\n  where: {source['images'][0]}", ()
    _write_entry(folder, source["key"], arrays, info)
    return source["key"], None, warnings


def _prepare_arrays(
    source: dict[str, Any], config: PrepareConfig, slice_axis: int
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    volume = read_volume(source["images"], frame=source["frame"], channels=source["channels"])
    label = None
    if source["label"] is not None:
        label = _matching_label(source, volume.data.shape[1:], volume.affine)
    where = f"{source['case']} ({volume.path})"
    mask = mask_for(volume, config, where=where)
    prepared = preprocess(volume.data, volume.affine, config, label, mask=mask, where=where)
    arrays = {"image": np.ascontiguousarray(np.moveaxis(prepared.image, slice_axis + 1, 0))}
    if prepared.label is not None:
        arrays["label"] = np.ascontiguousarray(np.moveaxis(prepared.label, slice_axis, 0))
    geometry = CaseGeometry(volume.affine, volume.data.shape[1:], prepared.affine, prepared.image.shape[1:], slice_axis)
    return arrays, {**geometry.to_json(), "voxels": voxel_hash(volume.data)}, volume.warnings


def voxel_hash(data: np.ndarray) -> str:
    """SHA-256 of voxels and their shape: equal for copies of an image under other names or compressions."""
    return hashlib.sha256(str(data.shape).encode() + np.ascontiguousarray(data).tobytes()).hexdigest()


def _matching_label(source: dict[str, Any], shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The label map of a volume, refused when it does not lie on the image's voxels."""
    path = source["label"]
    n_frames = read_header(path).n_frames
    label, own = read_label(path, frame=source["frame"] if n_frames > 1 else None)
    if label.shape != shape:
        raise DataError(
            "label map and image have different shapes",
            where=f"{source['case']} ({path})",
            found=f"label map {label.shape}, image {shape}",
            fix="extract the files again, or leave the volume out",
        )
    if not affines_agree(affine, own, shape):
        raise DataError(
            "label map and image lie at different places",
            where=f"{source['case']} ({path})",
            found=f"affine of the label map {np.round(own, 4).tolist()}, of the image {np.round(affine, 4).tolist()}",
            fix="resample the label map onto the image (nearest neighbour), or copy its header if only that is wrong",
        )
    return label


def _write_entry(folder: Path, key: str, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    entry = folder / key
    with explain_disk_errors(entry):
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{socket.gethostname()}.{os.getpid()}.", suffix=".tmp"))
        try:
            sizes = {}
            for name, array in arrays.items():
                with (temporary / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                    sizes[name] = file.tell()
            with (temporary / "geometry.json").open("w", encoding="utf-8") as file:
                json.dump({**info, "bytes": sizes}, file)
                file.flush()
                os.fsync(file.fileno())
            _put_into_place(temporary, entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_into_place(temporary: Path, entry: Path) -> None:
    try:
        os.rename(temporary, entry)  # noqa: PTH104 - unlike replace, says that it never overwrites a filled folder
    except OSError:
        if not entry.exists():
            raise
        # Another process was faster, or a folder without geometry.json (deleted by hand) is in the way.
        if (entry / "geometry.json").is_file():
            return
        shutil.rmtree(entry)
        os.rename(temporary, entry)  # noqa: PTH104
    descriptor = os.open(entry.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_litter(folder: Path) -> None:
    """Delete temporary folders of processes that are gone (this host) or that are a day old (any host)."""
    for path in folder.glob(".*.tmp"):
        host, _, pid = path.name[1:].removesuffix(".tmp").rpartition(".")[0].rpartition(".")
        try:
            old = time.time() - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue  # its process finished meanwhile
        if old or (host == socket.gethostname() and pid.isdigit() and not _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _raise_all(problems: dict[int, str], manifest: VolumeTable, *, total: int) -> None:
    cases = dict(zip(manifest.table["volume"].astype(int), manifest.table["case"].astype(str), strict=True))
    listed = [f"- {cases[volume]}: " + text.replace("\n", "\n  ") for volume, text in sorted(problems.items())]
    raise DataError(
        f"{len(problems)} of {total} volumes could not be prepared\n" + "\n".join(listed),
        fix="mend or remove these files and run again; the other volumes are in the cache already",
    )
