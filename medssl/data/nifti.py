"""NIfTI files read with suspicion: to the end of the compressed stream, within a size limit, with a sane header.

nibabel alone stops decompressing at the last voxel, before the checksum of the gzip stream, and so loads most files
with a flipped bit without a word; it also turns a voxel size of zero into one. Here the stream is read to its end, the
header is parsed by nibabel and its two geometries are reconciled as MONAI does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.spatialimages import HeaderDataError

from medssl.core.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 544
CHUNK = 256 * 1024
MAX_TRAILING = 4096
"""Bytes after the last voxel that are taken for padding; more means that the header describes something else."""

BROKEN = "copy or download the file again; its content is damaged"


@dataclass(frozen=True)
class NiftiHeader:
    """What the header of a NIfTI file says, checked.

    Attributes:
        shape: (X, Y, Z) or (X, Y, Z, T).
        affine: (4, 4) float64, voxel to millimetres (RAS), sform and qform reconciled.
        dtype: Type of the stored voxels.
        slope, intercept: Scaling of the stored values, or None.
        offset: Byte of the first voxel.
        warnings: What was repaired.
    """

    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]
    dtype: np.dtype[Any]
    slope: float | None
    intercept: float | None
    offset: int
    warnings: tuple[str, ...]

    @property
    def end(self) -> int:
        """Byte after the last voxel."""
        count = 1
        for length in self.shape:  # Python integers: dimensions of a hostile header overflow numpy's
            count *= length
        return self.offset + count * self.dtype.itemsize


def gunzip(raw: bytes, limit: int, *, where: str) -> bytearray:
    """Decompress a gzip file (of one or several members) to its end, its checksums and lengths verified.

    Args:
        raw: The whole compressed file.
        limit: Most bytes to accept; memory never grows much beyond it.
        where: Name for messages.

    Raises:
        DataError: Damaged, truncated, followed by something else, or longer than ``limit``.
    """
    result, view, position = bytearray(), memoryview(raw), 0
    while position < len(raw):
        if raw[position : position + 2] != GZIP_MAGIC:
            if any(view[position:]):
                raise DataError("data after the end of the gzip stream", where=where, fix=BROKEN)
            break  # zero padding, which gzip itself ignores
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            chunk = view[position : position + CHUNK]
            if not chunk:
                raise DataError("the gzip stream ends early: the file is truncated", where=where, fix=BROKEN)
            try:
                # One byte more than allowed shows whether there is more; if not, the trailer gets checked.
                result += member.decompress(chunk, limit + 1 - len(result))
            except zlib.error as error:
                raise DataError(
                    "damaged gzip stream (its checksum or structure is wrong)",
                    where=where,
                    found=str(error),
                    fix=BROKEN,
                ) from error
            if len(result) > limit:
                raise DataError(
                    "the file decompresses to more than its header declares or the limit allows",
                    where=where,
                    found=f"more than {limit} bytes",
                    fix="check where the file comes from; convert it again from its source",
                )
            position += len(chunk) - len(member.unused_data) - len(member.unconsumed_tail)
    return result


def gunzip_start(raw: bytes, *, where: str) -> bytes:
    """The first bytes of a gzip file, enough for any NIfTI header."""
    try:
        return zlib.decompressobj(wbits=31).decompress(raw, HEADER_BYTES)
    except zlib.error as error:
        raise DataError("damaged gzip stream", where=where, found=str(error), fix=BROKEN) from error


def parse_header(start: bytes, *, where: str) -> NiftiHeader:
    """Parse and check the header at the start of a decompressed single-file NIfTI-1 or NIfTI-2.

    Raises:
        DataError: Not NIfTI, or a header that no image can have (sizes, voxel sizes, type, matrix).
    """
    header = _parse(start, where)
    shape = _checked_shape(header, where)
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise DataError("unknown voxel type in the header", where=where, found=str(error), fix=BROKEN) from error
    if dtype.kind not in "iuf":
        raise DataError(
            "voxels are not plain numbers (complex, RGB or bit-packed)",
            where=where,
            found=str(header["datatype"]),
            fix="convert the file to integers or floating-point numbers, one value per voxel",
        )
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError("scaling in the header is not finite", where=where, found=str(error), fix=BROKEN) from error
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset < header.single_vox_offset or offset > 2**31:
        raise DataError("start of the voxels in the header is impossible", where=where, found=str(offset), fix=BROKEN)
    affine, warnings = _reconciled_affine(header, shape[:3], where)
    return NiftiHeader(shape, affine, dtype, slope, intercept, int(offset), warnings)


def _parse(start: bytes, where: str) -> nib.Nifti1Header:
    size = {start[:4][::step] for step in (1, -1)}
    classes = ((nib.Nifti1Header, 348, (b"n+1\0",)), (nib.Nifti2Header, 540, (b"n+2\0",)))
    for header_class, length, magics in classes:
        if length.to_bytes(4, "little") not in size:
            continue
        if len(start) < length:
            raise DataError("the file ends inside its header", where=where, found=f"{len(start)} bytes", fix=BROKEN)
        header = header_class(start[:length], check=False)
        if header["magic"].item().ljust(4, b"\0") not in magics:
            raise DataError(
                "not a single-file NIfTI image",
                where=where,
                found=f"magic {header['magic'].item()!r}",
                fix="convert it to .nii.gz (pairs of .hdr and .img are not read)",
            )
        return header
    raise DataError(
        "not a NIfTI file",
        where=where,
        found=f"it begins with {bytes(start[:16])!r}",
        fix="check the download: a web page or another format may have been saved under this name",
    )


def _checked_shape(header: nib.Nifti1Header, where: str) -> tuple[int, ...]:
    dim = [int(value) for value in header["dim"]]
    n_axes = dim[0]
    if not 1 <= n_axes <= 7 or any(length < 1 for length in dim[1 : n_axes + 1]):
        raise DataError("impossible dimensions in the header", where=where, found=str(dim), fix=BROKEN)
    shape = dim[1 : n_axes + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if not 3 <= len(shape) <= 4:
        raise DataError(
            "not a volume: three axes are needed, or four with frames last",
            where=where,
            found=f"shape {tuple(dim[1 : n_axes + 1])}",
            fix="convert the file to one volume",
        )
    return tuple(shape)


def _reconciled_affine(
    header: nib.Nifti1Header, shape: tuple[int, ...], where: str
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise DataError(
            "voxel size in the header is not positive",
            where=where,
            found=f"pixdim {pixdim.tolist()}",
            fix="write the true voxel size into the header (pixdim), or convert again from the source",
        )
    header = header.copy()
    # MONAI's rule compares all axes of the header with the affine; the fourth (time) would always differ.
    header.set_data_shape(shape)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    try:
        before = header.get_best_affine()
        if not np.isfinite(before).all():
            raise ValueError(f"matrix {before.tolist()}")
        image = image_class(np.broadcast_to(np.uint8(0), shape), before, header)
        image = correct_nifti_header_if_necessary(image)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise DataError("geometry in the header cannot be read", where=where, found=str(error), fix=BROKEN) from error
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError("geometry in the header is not a grid", where=where, found=str(affine.tolist()), fix=BROKEN)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    old = np.linalg.norm(before[:3, :3], axis=0)
    if not np.allclose(old, pixdim, rtol=1e-3):
        taken = "voxel size" if not np.allclose(old, spacing, rtol=1e-3) else "matrix"
        return affine, (
            f"the header contradicts itself: its matrix gives voxels of {_mm(old)} mm, its voxel size is {_mm(pixdim)};"
            f" the {taken} was believed: {_mm(spacing)} mm",
        )
    return affine, ()


def _mm(values: npt.NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def read_nifti_start(path: Path) -> NiftiHeader:
    """The checked header of a .nii or .nii.gz file, without reading its voxels."""
    with path.open("rb") as file:
        raw = file.read(64 * 1024)
    return parse_header(_plain_start(raw, path), where=str(path))


def _plain_start(raw: bytes, path: Path) -> bytes:
    if path.name.lower().endswith(".gz"):
        if raw[:2] != GZIP_MAGIC:
            raise DataError(
                "named .gz, but not gzip-compressed",
                where=str(path),
                found=f"it begins with {raw[:16]!r}",
                fix="check the download: a web page may have been saved under this name; else remove .gz from the name",
            )
        return gunzip_start(raw, where=str(path))
    if raw[:2] == GZIP_MAGIC:
        raise DataError("gzip-compressed, but not named .gz", where=str(path), fix="add .gz to the name of the file")
    return raw[:HEADER_BYTES]


def read_nifti(path: Path, *, max_bytes: int) -> tuple[npt.NDArray[Any], NiftiHeader]:
    """Stored voxels (unscaled, a Fortran-ordered read-only view) and header of a .nii or .nii.gz file.

    Raises:
        DataError: Damaged, truncated, not NIfTI, or ``max_bytes`` or more when decompressed.
    """
    raw = path.read_bytes()
    where = str(path)
    header = parse_header(_plain_start(raw, path), where=where)
    if header.end >= max_bytes:
        raise DataError(
            "too large to be read",
            where=where,
            found=f"shape {header.shape} of {header.dtype}: {header.end / 1e9:.1f} of {max_bytes / 1e9:.1f} GB",
            fix="crop or convert the volume if it is really that large",
        )
    content = gunzip(raw, header.end + MAX_TRAILING, where=where) if path.name.lower().endswith(".gz") else raw
    if len(content) < header.end:
        raise DataError(
            "the file is truncated",
            where=where,
            found=f"{len(content)} of {header.end} bytes",
            fix=BROKEN,
        )
    if len(content) > header.end + MAX_TRAILING:
        raise DataError(
            "the file is longer than its header declares",
            where=where,
            found=f"{len(content)} bytes instead of {header.end}",
            fix=BROKEN,
        )
    count = (header.end - header.offset) // header.dtype.itemsize
    voxels = np.frombuffer(content, header.dtype, count, header.offset)
    return voxels.reshape(header.shape, order="F"), header
