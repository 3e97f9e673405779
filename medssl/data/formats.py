"""The other formats that volumes come in: NumPy arrays (OpenBHB) and MetaImage or NRRD (through SimpleITK)."""

from __future__ import annotations

import re
import tokenize
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - the name its users know

from medssl.core.errors import DataError
from medssl.data.nifti import BROKEN, gunzip

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def open_npy(path: Path) -> npt.NDArray[Any]:
    """A memory-mapped .npy array as (X, Y, Z) or, with several volumes on its first axis, (X, Y, Z, T).

    Leading axes of length 1 are dropped (OpenBHB stores 1 x 121 x 145 x 121). Nothing is ever unpickled.

    Raises:
        DataError: Not a plain .npy file, truncated, or not three- or four-dimensional numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise DataError("not a readable .npy array", where=str(path), found=str(error), fix=BROKEN) from error
    if not isinstance(array, np.ndarray):
        raise DataError("an archive of arrays, not one array", where=str(path), fix="save one array with numpy.save")
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.dtype.kind not in "iufb" or not 3 <= array.ndim <= 4 or 0 in array.shape:
        raise DataError(
            "not a volume: an array of numbers with three axes is needed",
            where=str(path),
            found=f"shape {array.shape} of {array.dtype}",
            fix="save (X, Y, Z), (1, X, Y, Z) or (T, X, Y, Z)",
        )
    return np.moveaxis(array, 0, -1) if array.ndim == 4 else array


def _text_header(start: bytes, path: Path) -> tuple[dict[bytes, bytes], int]:
    """Fields of the text header (names in lower case without spaces) and the byte after it."""
    if path.suffix.lower() == ".nrrd":
        match = re.search(rb"\r?\n\r?\n", start)
        end, separator = match.end() if match else len(start), b":"
    else:
        match = re.search(rb"ElementDataFile[^\n]*\n", start)
        end, separator = match.end() if match else len(start), b"="
    fields = [line.split(separator, 1) for line in start[:end].splitlines()]
    return {f[0].strip().lower().replace(b" ", b""): f[1].strip() for f in fields if len(f) == 2}, end


def _verify_stream(path: Path, limit: int) -> None:
    """Raise DataError for compressed voxels whose checksum is wrong; SimpleITK hands out such voxels without a word."""
    raw = path.read_bytes()
    fields, start = _text_header(raw[: 64 * 1024], path)
    if path.suffix.lower() == ".nrrd":
        if fields.get(b"encoding", b"").lower() in (b"gzip", b"gz"):
            gunzip(raw[start:], limit, where=str(path))
        return
    if fields.get(b"compresseddata", b"").lower() != b"true":
        return
    stream = zlib.decompressobj()
    try:
        stream.decompress(raw[start:], limit)
    except zlib.error as error:
        raise DataError("damaged voxels", where=str(path), found=str(error), fix=BROKEN) from error
    if not stream.eof:
        raise DataError("the compressed voxels are truncated or too many", where=str(path), fix=BROKEN)


def _itk_reader(path: Path) -> sitk.ImageFileReader:
    """Reader with the header read, for files that hold their own voxels."""
    with path.open("rb") as file:
        named, _ = _text_header(file.read(64 * 1024), path)
    nrrd = path.suffix.lower() == ".nrrd"
    detached = b"datafile" in named if nrrd else named.get(b"elementdatafile") != b"LOCAL"
    if detached:
        raise DataError(
            "the voxels are not inside this file, or it is not of the format that its name says",
            where=str(path),
            fix="convert it to .nii.gz, or save it with its voxels inside",
        )
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError("cannot be read", where=str(path), found=_last_line(error), fix=BROKEN) from error
    if reader.GetNumberOfComponents() != 1 or "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise DataError("voxels are not plain numbers (vector or complex)", where=str(path), fix="convert the file")
    if reader.GetDimension() not in (3, 4):
        raise DataError("not a volume: three or four axes are needed", where=str(path), fix="convert the file")
    return reader


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def read_itk_start(path: Path) -> tuple[tuple[int, ...], npt.NDArray[np.float64], str]:
    """Shape, RAS affine and type of a .mha or .nrrd file, without its voxels."""
    reader = _itk_reader(path)
    n = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
    affine[:3, 3] = np.array(reader.GetOrigin())[:3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise DataError("geometry in the header is not a grid", where=str(path), found=str(affine.tolist()), fix=BROKEN)
    shape = tuple(int(length) for length in reader.GetSize())
    if 0 in shape:
        raise DataError("impossible dimensions in the header", where=str(path), found=str(shape), fix=BROKEN)
    return shape, LPS_TO_RAS @ affine, sitk.GetPixelIDValueAsString(reader.GetPixelID())


def read_itk(path: Path, *, max_bytes: int) -> npt.NDArray[Any]:
    """Voxels of a .mha or .nrrd file as (X, Y, Z) or (X, Y, Z, T).

    Raises:
        DataError: Damaged, truncated, or ``max_bytes`` or more.
    """
    shape, _, kind = read_itk_start(path)
    size = int(np.prod([float(length) for length in shape])) * (8 if "64" in kind else 4)
    if size >= max_bytes:
        raise DataError(
            "too large to be read", where=str(path), found=f"shape {shape} of {kind}", fix="crop the volume"
        )
    _verify_stream(path, max_bytes)
    try:
        image = _itk_reader(path).Execute()
    except RuntimeError as error:
        raise DataError("cannot be read", where=str(path), found=_last_line(error), fix=BROKEN) from error
    return sitk.GetArrayFromImage(image).T
