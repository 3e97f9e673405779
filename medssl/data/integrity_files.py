"""What is wrong with the files of one volume. Nothing here raises: what cannot be read becomes a finding."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import nibabel as nib
import numpy as np

from medssl.core.errors import DataError
from medssl.data.volume import Header, affines_agree, read_header, read_label, read_volume, suffix_of

CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "E-MISSING-FILE": "A file that the manifest names does not exist.",
        "E-NOT-A-FILE": "A path leads to a folder, device, pipe or socket, or may not be reached.",
        "E-EMPTY-FILE": "A file has no content.",
        "E-FORMAT": "The ending of the name is of no format that is read.",
        "E-HEADER": "The header of a file cannot be read or makes no sense.",
        "E-DIMENSIONS": "Not a volume: three axes are needed, or four with frames last.",
        "E-DAMAGED": "The voxels cannot be read: truncated, wrong checksum or otherwise damaged (deep).",
        "E-TOO-LARGE": "The file holds, or says it holds, more than is read.",
        "E-CRASHED": "Reading the file ended the process that read it (deep).",
        "E-FRAME-NEEDED": "A file of several frames (a table of several rows), and the manifest names none.",
        "E-FRAME-RANGE": "The file has no such frame, or the table no such row.",
        "E-CHANNEL-GRID": "The channels of a volume lie on different grids.",
        "E-NOT-FINITE": "NaN or infinite voxels, or infinite features (deep).",
        "E-CONSTANT": "All voxels of a channel have one value (deep).",
        "W-INTENSITY": "A few voxels are far brighter than all others, or values are too large for float32 (deep).",
        "E-FEATURE-COLUMNS": "A table of features has other columns than the first one.",
        "E-FEATURE-MISSING": "Features of a row are missing (deep).",
        "W-FEATURE-CONSTANT": "Features have one value in all rows; standardised, they become 0 (deep).",
        "E-LABEL-SHAPE": "Label map and image have different shapes.",
        "E-LABEL-GEOMETRY": "Label map and image have the same shape, but lie in different places.",
        "E-LABEL-FRACTIONS": "A label map holds values that are not whole numbers (deep).",
        "E-LABEL-RANGE": "A label map holds negative or very large values (deep).",
        "E-LABEL-UNKNOWN": "A label map holds values that manifest.meta.yaml does not name (deep).",
        "W-LABEL-EMPTY": "A label map holds background only (deep).",
        "E-DUPLICATE-ROW": "Two rows name the same image, frame and label map.",
        "E-DUPLICATE-IMAGE": "Two groups hold the same voxels, whatever the file name, compression or orientation.",
        "W-DUPLICATE-IMAGE": "The same voxels appear twice within one group.",
        "W-DUPLICATE-LABEL": "Two different images have voxel-identical label maps in two files (deep).",
        "W-CHANNELS": "Volumes have different numbers of channels.",
        "W-SPACING": "Volumes have different voxel sizes; preprocessing can resample them.",
        "W-ORIENTATION": "Volumes are stored in different orientations; reading brings them into one.",
        "W-HEADER": "A header contradicts itself (such as sform against qform), or part of it had to be assumed.",
    }
)
"""Every code that a check can report. E-: training must not start with it. W-: worth knowing."""

# How the reader's messages map to codes. Anything else that goes wrong with voxels is damage.
_MESSAGES: Final = (
    ("not finite", "E-NOT-FINITE"),
    ("different grids", "E-CHANNEL-GRID"),
    ("not a label map", "E-LABEL-FRACTIONS"),
    ("label values out of range", "E-LABEL-RANGE"),
    ("too large", "E-TOO-LARGE"),
    ("decompresses to more", "E-TOO-LARGE"),
    ("not a volume", "E-DIMENSIONS"),
    ("frames and none was chosen", "E-FRAME-NEEDED"),
    ("has no frame", "E-FRAME-RANGE"),
)
_TOO_BRIGHT: Final = 100.0
_FLOAT32_WHOLE: Final = 2.0**24


@dataclass(frozen=True)
class Finding:
    """One thing to know about a manifest or its files.

    Attributes:
        code: One of ``CODES``; starts with E- (stop) or W- (worth knowing).
        row: Line of the manifest, the header being line 1.
        file: The file concerned.
        message: What is wrong, with what was found.
        fix: What to do about it.
    """

    code: str
    row: int
    file: str
    message: str
    fix: str

    @property
    def is_error(self) -> bool:
        """Whether training must not start with it."""
        return self.code.startswith("E-")

    def __str__(self) -> str:
        return f"{self.code} line {self.row}: {self.message} ({self.file}). Fix: {self.fix}"


@dataclass(frozen=True)
class Task:
    """What is to be checked of one volume; small, so that it travels to another process."""

    volume: int
    row: int
    images: tuple[Path, ...]
    label: Path | None
    frame: int | None
    channels: int | None
    label_values: frozenset[int]
    deep: bool


@dataclass
class Inspection:
    """What one volume turned out to be; the geometry is of the first readable channel, None without one.

    ``what`` its values are (voxels or features) is for messages.
    """

    volume: int
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    n_channels: int = 0
    spacing: tuple[float, ...] | None = None
    orientation: str | None = None
    image_hashes: tuple[str, ...] = ()
    label_hash: str | None = None
    what: str = "voxels"


def inspect(task: Task) -> Inspection:
    """Check the headers of a volume's files and, if ``task.deep``, their voxels. Never raises for a bad file."""
    result = Inspection(task.volume, n_channels=task.channels or len(task.images))
    headers = [_header(path, task, result) for path in task.images]
    if headers[0] is not None:
        result.spacing = tuple(round(length, 3) for length in headers[0].spacing)
        result.orientation = "".join(nib.aff2axcodes(headers[0].affine))
    images_fine = all(headers) and _frames_fine(task, headers, result) and _grids_fine(task, headers, result)
    label = _header(task.label, task, result) if task.label is not None else None
    label_frame = task.frame if label is not None and label.n_frames > 1 else None
    label_fine = label is not None and _label_fits(task, label, headers[0], result)
    if task.deep and images_fine:
        _read_images(task, result)
    if task.deep and label_fine:
        _read_labels(task, label_frame, result)
    return result


def _report(result: Inspection, task: Task, code: str, path: Path, message: str, fix: str) -> None:
    result.findings.append(Finding(code, task.row, str(path), message, fix))


def _header(path: Path, task: Task, result: Inspection) -> Header | None:
    """The header, or None and a finding."""
    try:
        status = path.stat()
    except FileNotFoundError:
        _report(result, task, "E-MISSING-FILE", path, "there is no such file", "check the path and the spelling")
        return None
    except (OSError, ValueError) as error:
        _report(result, task, "E-NOT-A-FILE", path, f"the path cannot be reached: {error}", "check the path")
        return None
    if not stat.S_ISREG(status.st_mode):
        message = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        _report(result, task, "E-NOT-A-FILE", path, f"{message}, not a file", "name the file of one volume")
        return None
    if status.st_size == 0:
        _report(result, task, "E-EMPTY-FILE", path, "the file has no content", "copy or download it again")
        return None
    try:
        suffix_of(path)
    except DataError as error:
        _report(result, task, "E-FORMAT", path, _text(error), error.fix or "convert it to .nii.gz")
        return None
    try:
        header = read_header(path)
    except (DataError, OSError, MemoryError) as error:
        _report(result, task, _code_of(error, "E-HEADER"), path, _text(error), _fix(error))
        return None
    for warning in header.warnings:
        fix = "look at the volume with `medssl data show`; correct the header if the size is wrong"
        result.notes.append(Finding("W-HEADER", task.row, str(path), warning, fix))
    return header


def _frames_fine(task: Task, headers: list[Header], result: Inspection) -> bool:
    fine = True
    for path, header in zip(task.images, headers):
        if task.channels is not None and header.n_frames != task.channels:
            message = f"the fourth axis has {header.n_frames} entries, the manifest names {task.channels} modalities"
            _report(result, task, "E-CHANNEL-GRID", path, message, "correct the column `modality`, or choose a frame")
            fine = False
        elif task.channels is None and task.frame is None and header.n_frames > 1:
            message = f"the file holds {header.n_frames} frames and none was chosen"
            fix = f"fill the column `frame` with a number from 0 to {header.n_frames - 1}"
            _report(result, task, "E-FRAME-NEEDED", path, message, fix)
            fine = False
        elif task.frame is not None and task.frame >= header.n_frames:
            message = f"there is no frame {task.frame}: the file holds {header.n_frames}"
            fix = f"use a number from 0 to {header.n_frames - 1} in the column `frame`"
            _report(result, task, "E-FRAME-RANGE", path, message, fix)
            fine = False
    return fine


def _grids_fine(task: Task, headers: list[Header], result: Inspection) -> bool:
    first = headers[0]
    for path, header in zip(task.images[1:], headers[1:]):
        shape, own = first.shape[:3], header.shape[:3]
        if own != shape or not affines_agree(first.affine, header.affine, shape):
            what = f"shape {own}, {shape}" if own != shape else "same shape, another place or voxel size"
            message = f"lies on another grid than the first channel {task.images[0].name}: {what}"
            _report(result, task, "E-CHANNEL-GRID", path, message, "resample it onto the grid of the first channel")
            return False
    return True


def _label_fits(task: Task, label: Header, image: Header | None, result: Inspection) -> bool:
    """Whether the label map is worth reading; reports a shape or place that differs from the image's."""
    path = task.label or Path()
    if label.n_frames > 1 and (task.frame is None or task.frame >= label.n_frames):
        code = "E-FRAME-NEEDED" if task.frame is None else "E-FRAME-RANGE"
        message = f"the label map holds {label.n_frames} frames; frame {task.frame} is asked for"
        _report(result, task, code, path, message, "give a label map of one frame, or fill the column `frame`")
        return False
    if image is None:
        return True
    shape, own = image.shape[:3], label.shape[:3]
    if own != shape:
        message = f"label map {own}, image {shape} ({task.images[0].name})"
        _report(result, task, "E-LABEL-SHAPE", path, message, "check that both belong together, or extract them again")
    elif not affines_agree(image.affine, label.affine, shape):
        message = f"same shape as {task.images[0].name}, but up to {_distance(image, label):.3g} mm away from it"
        fix = "save the label map with the geometry of its image; if they really differ, resample it (nearest)"
        _report(result, task, "E-LABEL-GEOMETRY", path, message, fix)
    return True


def _distance(image: Header, label: Header) -> float:
    """Largest distance in mm between what both headers make of a corner of the grid."""
    ends = [(0, length - 1) for length in image.shape[:3]]
    corners = np.stack([*(axis.ravel() for axis in np.meshgrid(*ends, indexing="ij")), np.ones(8)])
    return float(np.linalg.norm(((image.affine - label.affine) @ corners)[:3], axis=0).max())


def _read_images(task: Task, result: Inspection) -> None:
    frames = [task.frame] if task.channels is None else list(range(task.channels))
    hashes = []
    for frame in frames:
        try:
            volume = read_volume(list(task.images), frame=frame)
        except (DataError, OSError, MemoryError) as error:
            where = str(getattr(error, "where", ""))
            path = next((p for p in reversed(task.images) if where.endswith(str(p))), task.images[0])
            _report(result, task, _code_of(error, "E-DAMAGED"), path, _text(error), _fix(error))
            return
        for path, data in zip(task.images, volume.data):
            hashes += _judge_voxels(task, path, data, volume.affine, result)
    result.image_hashes = tuple(hashes)


def _judge_voxels(task: Task, path: Path, data: np.ndarray, affine: np.ndarray, result: Inspection) -> list[str]:
    """The hash of one channel (none of a constant one, which would be equal to every other), and findings."""
    low, high = float(data.min()), float(data.max())
    if low == high:
        message = f"every voxel is {low:g}"
        _report(result, task, "E-CONSTANT", path, message, "export the image again, or leave the volume out")
        return []
    strange = _strange_values(data, low, high)
    if strange:
        fix = "look at it with `medssl data show`; normalising by percentiles tames single voxels"
        _report(result, task, "W-INTENSITY", path, strange, fix)
    return [voxel_hash(data, affine)]


def _strange_values(data: np.ndarray, low: float, high: float) -> str | None:
    if max(abs(low), abs(high)) >= _FLOAT32_WHOLE:
        return f"values from {low:g} to {high:g}: whole numbers this large are not exact in float32"
    sample = data.ravel()[:: max(1, data.size // 1_000_000)]
    median, upper = (float(value) for value in np.percentile(sample, (50, 99.9)))
    if high - median > _TOO_BRIGHT * (upper - median):
        return f"the brightest voxel is {high:g}, 99.9 % of the voxels stay below {upper:g}"
    return None


def _read_labels(task: Task, frame: int | None, result: Inspection) -> None:
    path = task.label or Path()
    try:
        label, affine = read_label(path, frame=frame)
    except (DataError, OSError, MemoryError) as error:
        _report(result, task, _code_of(error, "E-DAMAGED"), path, _text(error), _fix(error))
        return
    values = np.unique(label)
    unknown = sorted(set(values.tolist()) - task.label_values - {0}) if task.label_values else []
    if unknown:
        shown = ", ".join(str(value) for value in unknown[:10])
        message = f"values without a name: {shown}{' ...' if len(unknown) > 10 else ''}"
        _report(result, task, "E-LABEL-UNKNOWN", path, message, "name them in manifest.meta.yaml, or correct the label")
    if not values.any():
        _report(result, task, "W-LABEL-EMPTY", path, "only background", "leave it if nothing is to be seen there")
    else:
        result.label_hash = voxel_hash(label, affine)


def voxel_hash(data: np.ndarray, affine: np.ndarray) -> str:
    """Hash of what an (X, Y, Z) array shows: equal for copies under another name, compression, type or axis order."""
    canonical = nib.orientations.apply_orientation(data, nib.io_orientation(affine))  # a view: axes moved and flipped
    digest = hashlib.blake2b(str(canonical.shape).encode(), digest_size=16)
    for plane in canonical:
        digest.update(np.ascontiguousarray(plane, dtype=np.float32) + np.float32(0))  # adding 0 turns -0 into 0
    return digest.hexdigest()


def _code_of(error: BaseException, otherwise: str) -> str:
    if isinstance(error, MemoryError):
        return "E-TOO-LARGE"
    message = getattr(error, "message", "")
    return next((code for part, code in _MESSAGES if part in message), otherwise)


def _text(error: Any) -> str:
    if isinstance(error, MemoryError):
        return "there was not enough memory to read it"
    if not isinstance(error, DataError):
        return str(error)
    return f"{error.message} ({error.found})" if error.found else error.message


def _fix(error: Any) -> str:
    return getattr(error, "fix", None) or "copy or export the file again, or leave the volume out"
