"""A picture of many volumes: one slice each, with the outlines of its label map."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medssl.core.errors import DataError
from medssl.core.files import atomic_write

# Okabe and Ito's palette, which colour-blind readers can tell apart; without black, which vanishes on an image.
COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@dataclass(frozen=True)
class Picture:
    """One volume of a montage.

    Attributes:
        image: (X, Y, Z) intensities, as stored.
        label: (X, Y, Z) whole numbers, 0 is background; None: no outlines.
        affine: (4, 4), voxel to millimetres (RAS).
        title: Written above it.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    title: str


@dataclass(frozen=True)
class Cut:
    """The slice that is shown: rows go up, columns right (of a RAS volume: right, anterior or superior)."""

    image: np.ndarray
    label: np.ndarray | None
    aspect: float


def cut_of(picture: Picture) -> Cut:
    """Choose the slice to show: across the axis of the thickest voxels, where most voxels are labelled, or the middle.

    Raises:
        DataError: Image and label map differ in shape, or are no volumes.
    """
    if picture.image.ndim != 3 or (picture.label is not None and picture.label.shape != picture.image.shape):
        raise DataError(
            "a picture takes an image (X, Y, Z) and a label map of the same shape",
            where=picture.title,
            found=f"image {picture.image.shape}, label map {getattr(picture.label, 'shape', None)}",
            fix="run `medssl data check` on the manifest",
        )
    orientation = nib.io_orientation(picture.affine)
    image = nib.orientations.apply_orientation(picture.image, orientation)
    label = None if picture.label is None else nib.orientations.apply_orientation(picture.label, orientation)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = np.linalg.norm(picture.affine[:3, :3], axis=0)
    axis = 2 if spacing.max() < 1.2 * spacing.min() else int(np.argmax(spacing))
    position = image.shape[axis] // 2
    if label is not None and label.any():
        position = int(np.count_nonzero(np.moveaxis(label, axis, 0), axis=(1, 2)).argmax())
    across, up = (spacing[i] for i in range(3) if i != axis)
    return Cut(
        image=np.take(image, position, axis).T,
        label=None if label is None else np.take(label, position, axis).T,
        aspect=float(up / across),
    )


def write_montage(
    pictures: Sequence[Picture], path: Path, *, label_names: Mapping[int, str] | None = None, columns: int | None = None
) -> Path:
    """Write a PNG with one slice of every picture, grey values between their 1st and 99th percentile.

    Args:
        pictures: At least one; they are laid out row by row.
        path: Replaced in one step.
        label_names: Structure by label value, for the legend; values without a name are called by their number.
        columns: Pictures in a row; None: as square as possible.

    Returns:
        ``path``.

    Raises:
        DataError: No picture, or one that cannot be drawn.
        DiskError: The file cannot be written.
    """
    if not pictures:
        raise DataError("there is no volume to draw", fix="choose at least one")
    cuts = [cut_of(picture) for picture in pictures]
    present = [np.unique(picture.label) for picture in pictures if picture.label is not None]
    values = [int(value) for value in np.unique(np.concatenate([*present, [0]])) if value != 0]
    colour = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(values)}
    n_columns = columns or math.ceil(math.sqrt(len(cuts)))
    n_rows = math.ceil(len(cuts) / n_columns)
    legend_height = 0.35 * math.ceil(len(values) / 4) if values else 0.0
    height = 2.2 * n_rows + legend_height
    figure = Figure(figsize=(max(2.0 * n_columns, 3.0), height), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    figure.subplots_adjust(0.01, legend_height / height + 0.01, 0.99, 1 - 0.25 / height, wspace=0.03, hspace=0.12)
    for axes in panels:
        axes.set_axis_off()
    for axes, cut, picture in zip(panels, cuts, pictures):
        _draw(axes, cut, picture.title, colour)
    if values:
        names = label_names or {}
        handles = [Line2D([], [], color=colour[value], label=names.get(value, str(value))) for value in values]
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=min(len(values), 4), frameon=False, fontsize=8
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may hold a dollar sign
    content = io.BytesIO()
    canvas.print_png(content)
    return atomic_write(Path(path), content.getvalue())


def _draw(axes: Axes, cut: Cut, title: str, colour: Mapping[int, str]) -> None:
    low, high = np.percentile(cut.image, (1, 99))
    axes.imshow(
        cut.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=cut.aspect,
        interpolation="nearest",
    )  # fmt: skip
    short = title if len(title) <= 28 else f"{title[:13]}…{title[-13:]}"
    axes.set_title(short, fontsize=7, pad=2, parse_math=False)
    if cut.label is None:
        return
    for value in np.unique(cut.label):
        if value:
            # Padded, so that an outline closes where a structure touches the edge of the image.
            inside = np.pad((cut.label == value).astype(np.float32), 1)
            x, y = np.arange(inside.shape[1]) - 1, np.arange(inside.shape[0]) - 1
            axes.contour(x, y, inside, levels=[0.5], colors=[colour[int(value)]], linewidths=1.0)
