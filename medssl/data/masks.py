"""Template masks: one image, on the grid of the files, that says which voxels of every volume are kept."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medssl.core.errors import DataError
from medssl.data.volume import Affine, Volume, affines_agree, read_volume
from medssl.transforms.preprocess import PrepareConfig


def mask_for(volume: Volume, config: PrepareConfig, *, where: str) -> npt.NDArray[np.bool_] | None:
    """The mask (X, Y, Z) for a volume as its file stores it; None where the settings name none.

    A mask or volume without geometry (.npy) is matched by its shape alone.

    Raises:
        DataError: The mask cannot be read, is empty or full, or does not lie on the grid of the volume.
    """
    if config.mask is None:
        return None
    inside, affine = read_mask(config.mask, config.mask_above)
    fix = "give a mask on the grid of the files; resample one or the other"
    if inside.shape != volume.data.shape[1:]:
        found = f"mask {inside.shape}, volume {volume.data.shape[1:]}"
        raise DataError(f"the mask {config.mask} has another shape", where=where, found=found, fix=fix)
    placed = not np.array_equal(volume.affine, np.eye(4))
    if affine is not None and placed and not affines_agree(volume.affine, affine, inside.shape):
        raise DataError(f"the mask {config.mask} lies at another place", where=where, found="affines differ", fix=fix)
    return inside


def read_mask(path: Path, above: float) -> tuple[npt.NDArray[np.bool_], Affine | None]:
    """Voxels (X, Y, Z) of an image that are above a value, and its affine; None where the file has no geometry.

    Raises:
        DataError: The file cannot be read, or no voxel or every voxel is above the value.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0  # reading says what is wrong
    return _read(path, above, changed)


@lru_cache(maxsize=2)
def _read(path: Path, above: float, changed: int) -> tuple[npt.NDArray[np.bool_], Affine | None]:
    del changed  # an edited file is another one
    image = read_volume(path)
    inside = image.data[0] > above
    if not inside.any() or inside.all():
        raise DataError(
            f"a mask that keeps {'no' if not inside.any() else 'every'} voxel",
            where=str(path),
            found=f"values {image.data.min():g} to {image.data.max():g}, inside is above {above:g}",
            fix="check the file and prepare.mask_above",
        )
    inside.setflags(write=False)
    return inside, None if path.suffix == ".npy" else image.affine
