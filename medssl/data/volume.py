"""Volumes on disk: reading with every check that a silent error would need, writing that never leaves half a file.

Arrays stay in the orientation they are stored in; the affine maps voxel indices to millimetres, RAS.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medssl.core.errors import DataError
from medssl.core.files import atomic_write
from medssl.data.formats import open_npy, read_itk, read_itk_start
from medssl.data.nifti import read_nifti, read_nifti_start

MAX_BYTES = 2**30
"""Volumes of 1 GiB or more, decompressed, are refused: beyond any MRI, and what a decompression bomb looks like."""

SUFFIXES = (".nii.gz", ".nii", ".npy", ".mha", ".nrrd")
LABEL_TOLERANCE = 1e-3
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Header:
    """Geometry of a file, read without its voxels.

    Attributes:
        shape: (X, Y, Z), or (X, Y, Z, T) for a file of T > 1 frames.
        affine: (4, 4), voxel to millimetres (RAS).
        spacing: Voxel size in millimetres, one per axis of the array.
        dtype: Type of the stored voxels, for people.
        warnings: What was repaired or assumed.
    """

    shape: tuple[int, ...]
    affine: Affine
    spacing: tuple[float, float, float]
    dtype: str
    warnings: list[str]

    @property
    def n_frames(self) -> int:
        """1 for a plain volume."""
        return self.shape[3] if len(self.shape) == 4 else 1


@dataclass(frozen=True)
class Volume:
    """An image in its native orientation: ``data`` (C, X, Y, Z) float32, ``affine`` (4, 4) voxel to mm (RAS)."""

    data: npt.NDArray[np.float32]
    affine: Affine
    path: str
    warnings: tuple[str, ...] = ()


def spacing_of(affine: npt.ArrayLike) -> tuple[float, float, float]:
    """Voxel size in millimetres along each array axis."""
    x, y, z = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(x), float(y), float(z)


def affines_agree(a: npt.ArrayLike, b: npt.ArrayLike, shape: Sequence[int], tolerance_mm: float = 1e-3) -> bool:
    """Whether two affines put every voxel of a grid at the same place.

    The corners of the grid may differ by ``tolerance_mm`` plus the rounding of a float32 header.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    corners = np.array(
        [[*corner, 1] for corner in product(*((0, length - 1) for length in shape[:3]))], dtype=np.float64
    )
    in_a, in_b = corners @ a[:3].T, corners @ b[:3].T
    rounding = 1e-6 * max(float(np.abs(in_a).max()), float(np.abs(in_b).max()))
    return bool(np.linalg.norm(in_a - in_b, axis=1).max() <= tolerance_mm + rounding)


def suffix_of(path: Path) -> str:
    """The known ending of a file name.

    Raises:
        DataError: A format that is not read.
    """
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise DataError(
        "not a format that is read",
        where=str(path),
        found=path.suffix or "no ending",
        fix=f"convert it to .nii.gz (read: {', '.join(SUFFIXES)})",
    )


def stem_of(path: Path) -> str:
    """The file name without its known ending (``a`` for ``a.nii.gz``), or without its last one."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def check_file(path: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Raise DataError unless ``path`` is an ordinary file that is worth opening (a FIFO would hang, a device too)."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), fix="check the path in the manifest") from error
    except (OSError, ValueError) as error:
        raise DataError("the file cannot be reached", where=str(path)[:300], found=str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise DataError(f"{kind}, not a file", where=str(path), fix="name the file of one volume")
    if status.st_size == 0:
        raise DataError("the file is empty", where=str(path), fix="copy or download it again")
    if status.st_size >= max_bytes:
        raise DataError("too large to be read", where=str(path), found=f"{status.st_size / 1e9:.1f} GB")


def read_header(path: Path | str) -> Header:
    """Shape, geometry and type of a volume, without reading its voxels.

    Raises:
        DataError: The file or its header cannot be used. Damage inside the voxels is found by reading them only.
    """
    path = Path(path)
    suffix = suffix_of(path)
    check_file(path)
    with _access_explained(path):
        if suffix == ".npy":
            array = open_npy(path)
            return Header(array.shape, np.eye(4), (1.0, 1.0, 1.0), str(array.dtype), [_NO_GEOMETRY])
        if suffix in (".mha", ".nrrd"):
            shape, affine, kind = read_itk_start(path)
            return Header(shape, affine, spacing_of(affine), kind, [])
        header = read_nifti_start(path)
        return Header(header.shape, header.affine, spacing_of(header.affine), str(header.dtype), list(header.warnings))


_NO_GEOMETRY = "a .npy file carries no geometry: voxels are taken as 1 x 1 x 1 mm in RAS order"


class _access_explained:  # noqa: N801 - used as a statement
    """Turns the operating system's refusal to read into a DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise DataError(
                "the file cannot be read",
                where=str(self.path),
                found=error.strerror or str(error),
                fix="check the permissions of the file and its folder",
            ) from error


def _read_frame(
    path: Path, frame: int | None, max_bytes: int
) -> tuple[npt.NDArray[Any], Affine, tuple[float, float], tuple[str, ...]]:
    """Stored voxels (X, Y, Z), affine, (slope, intercept) and warnings."""
    suffix = suffix_of(path)
    check_file(path, max_bytes=max_bytes)
    scaling: tuple[float, float] = (1.0, 0.0)
    with _access_explained(path):
        if suffix == ".npy":
            voxels, affine, warnings = open_npy(path), np.eye(4), (_NO_GEOMETRY,)
        elif suffix in (".mha", ".nrrd"):
            voxels, affine, warnings = read_itk(path, max_bytes=max_bytes), read_itk_start(path)[1], ()
        else:
            voxels, header = read_nifti(path, max_bytes=max_bytes)
            affine, warnings = header.affine, header.warnings
            if header.slope is not None:
                scaling = (header.slope, header.intercept or 0.0)
    return _select_frame(voxels, frame, path), affine, scaling, warnings


def _select_frame(voxels: npt.NDArray[Any], frame: int | None, path: Path) -> npt.NDArray[Any]:
    n_frames = voxels.shape[3] if voxels.ndim == 4 else 1
    if frame is None and voxels.ndim == 4:
        raise DataError(
            f"the file holds {n_frames} frames and none was chosen",
            where=str(path),
            fix=f"add a column `frame` to the manifest with a number from 0 to {n_frames - 1}",
        )
    if frame is not None and not 0 <= frame < n_frames:
        raise DataError(
            f"the file has no frame {frame}",
            where=str(path),
            found=f"{n_frames} frame{'s' if n_frames > 1 else ''}",
            fix=f"use a number from 0 to {n_frames - 1}",
        )
    return voxels[..., frame] if voxels.ndim == 4 else voxels


def _read_channel(
    path: Path, frame: int | None, max_bytes: int
) -> tuple[npt.NDArray[np.float32], Affine, tuple[str, ...]]:
    voxels, affine, (slope, intercept), warnings = _read_frame(path, frame, max_bytes)
    if (slope, intercept) != (1.0, 0.0):
        # float32 holds the products of 8- and 16-bit integers as well as the result can; wider ones need float64.
        narrow = voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2
        voxels = np.array(voxels, dtype=np.float32 if narrow else np.float64, order="C")
        voxels *= slope
        voxels += intercept
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(voxels, dtype=np.float32)
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise DataError(
            "voxels that are not finite numbers (NaN or infinite)",
            where=str(path),
            found=f"{bad} of {data.size} voxels",
            fix="set them to the background value, or leave the volume out",
        )
    return data, affine, warnings


def read_volume(
    paths: Path | str | Sequence[Path],
    *,
    frame: int | None = None,
    channels: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read an image; several files, or the entries of one file's fourth axis, are the channels of one grid.

    Args:
        paths: One file, or one per channel. Read: .nii, .nii.gz, .npy, .mha, .nrrd.
        frame: Index into the fourth axis; required when a file has one that is time.
        channels: The one file's fourth axis holds this many channels (T2 and ADC, say); None: it is time, or absent.
        max_bytes: Files that hold this many bytes or more, decompressed, are refused.

    Raises:
        DataError: Missing, damaged (the checksum of .gz is verified), not a volume, not finite, several frames and none
            chosen, or channels on different grids (naming both files).
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not files:
        raise DataError("no file was named for a volume", fix="fill in the column `image` of the manifest")
    if channels is not None:
        _check_channels(files, frame, channels)
        places = [(files[0], entry) for entry in range(channels)]
    else:
        places = [(file, frame) for file in files]
    parts, affine, warnings = [], np.eye(4), []
    for file, entry in places:
        data, own, found = _read_channel(file, entry, max_bytes)
        warnings.extend(found)
        if not parts:
            affine = own
        elif data.shape != parts[0].shape or not affines_agree(affine, own, data.shape):
            same_shape = data.shape == parts[0].shape
            raise DataError(
                "channels of one volume lie on different grids",
                where=f"{files[0]} and {file}",
                found="their affines differ" if same_shape else f"shapes {parts[0].shape} and {data.shape}",
                fix="resample the second file onto the grid of the first",
            )
        parts.append(data)
    data = parts[0][None] if len(parts) == 1 else np.stack(parts)
    return Volume(data, affine, ";".join(str(file) for file in files), tuple(dict.fromkeys(warnings)))


def _check_channels(files: Sequence[Path], frame: int | None, channels: int) -> None:
    if len(files) != 1 or frame is not None:
        raise DataError("channels along the fourth axis need one file and no frame", where=str(files[0]))
    found = read_header(files[0]).n_frames
    if found != channels:
        raise DataError(
            f"the manifest names {channels} modalities for one file",
            where=str(files[0]),
            found=f"{found} along its fourth axis",
            fix="correct the column `modality`, or give `frame` to take one entry of the axis",
        )


def read_label(
    path: Path | str, *, frame: int | None = None, max_bytes: int = MAX_BYTES
) -> tuple[npt.NDArray[np.int16], Affine]:
    """Read a label map: int16 (X, Y, Z) and its affine.

    Floating-point files are accepted when every voxel is within 1e-3 of a whole number (resampling tools write 0.9999).

    Raises:
        DataError: As ``read_volume``; also fractions (a probability map) and values outside 0..32767.
    """
    path = Path(path)
    voxels, affine, (slope, intercept), _ = _read_frame(path, frame, max_bytes)
    if voxels.dtype.kind == "f" or (slope, intercept) != (1.0, 0.0):
        values = np.asarray(voxels, dtype=np.float64) * slope + intercept
        whole = np.rint(values)
        off = int((~(np.abs(values - whole) <= LABEL_TOLERANCE)).sum())
        if off:
            raise DataError(
                "not a label map: values are not whole numbers",
                where=str(path),
                found=f"{off} of {values.size} voxels, such as "
                f"{values[~(np.abs(values - whole) <= LABEL_TOLERANCE)].flat[0]:.4g}",
                fix="give the label map, not a probability map or image; resample labels with nearest neighbour",
            )
        voxels = whole
    low, high = voxels.min(), voxels.max()
    if low < 0 or high > np.iinfo(np.int16).max:
        raise DataError(
            "label values out of range",
            where=str(path),
            found=f"{low:g} to {high:g}",
            fix="label values are whole numbers from 0 (background) to 32767; check that this is not the image",
        )
    return np.ascontiguousarray(voxels, dtype=np.int16), affine


def write_nifti(path: Path | str, array: npt.ArrayLike, affine: npt.ArrayLike, *, dtype: npt.DTypeLike) -> Path:
    """Write (X, Y, Z) as .nii or .nii.gz; readers see the old file or the whole new one. Returns ``path``.

    The bytes depend on the content only (no time stamp), so equal predictions are equal files.

    Raises:
        DataError: Not three axes, or a name that is not NIfTI's.
        DiskError: No space or no permission; the old file is untouched.
    """
    path, data = Path(path), np.asarray(array)
    if data.ndim != 3 or not path.name.endswith((".nii", ".nii.gz")):
        raise DataError("only (X, Y, Z) arrays are written, as .nii or .nii.gz", where=str(path), found=str(data.shape))
    matrix = np.asarray(affine, dtype=np.float64)
    image = nib.Nifti1Image(data.astype(dtype), matrix)
    image.set_sform(matrix, code=1)
    unit = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    # A quaternion cannot hold shear; readers that prefer it must then find none.
    rigid = np.allclose(unit.T @ unit, np.eye(3), atol=1e-5)
    image.set_qform(matrix, code=1 if rigid else 0)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    return atomic_write(path, gzip.compress(content, 6, mtime=0) if path.name.endswith(".gz") else content)
