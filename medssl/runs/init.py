"""Write a commented configuration that fits a manifest: geometry, grid, partitions and strides from its headers,
or features and method from its tables.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np

from medssl.config import CONFIGS
from medssl.core.errors import ConfigError, DataError
from medssl.core.files import atomic_write, parse_yaml
from medssl.core.schema import validate
from medssl.data.feature_store import FeatureStore, open_features
from medssl.data.features import FeaturesConfig, is_feature_file
from medssl.data.manifest import Manifest, read_manifest
from medssl.data.splits import TEST_SPLITS
from medssl.data.volume import read_header
from medssl.models.encoders import auto_strides
from medssl.runs.cohort import Outcome
from medssl.runs.volumes import in_splits

log = logging.getLogger(__name__)

ANISOTROPIC: Final = 3.0
"""Slices at least this many times as thick as their pixels are wide are taken one by one, in 2D."""
THICKER: Final = 1.5
"""From this ratio on, slabs are cut along the axis of the thicker slices."""
COVERED: Final = 95.0
"""Percentile of the lengths that the prepared grid holds whole."""
WIDTHS: Final = {2: (16, 32, 64, 128, 128, 128), 3: (16, 32, 64, 128)}
PARTITIONS: Final = 4
SLAB: Final = 16
N_LABELLED: Final = (1, 2, 8)
TARGET_LABELLED: Final = (8, 32, 128)
N_VALIDATION: Final = 2
FEATURE_BATCH: Final = 128


@dataclass(frozen=True)
class Grid:
    """What fits the volumes of a manifest; axes are those of the prepared volume (RAS).

    Attributes:
        geometry: "slice" (2D) or "slab" (3D; fine-tuning then takes whole volumes).
        slice_axis: Axis along which volumes are cut.
        spacing: Millimetres, None along the slices of a stack.
        size: Voxels, None along the slices of a stack.
        n_slices: Fewest slices of a volume.
        partitions: Stacks of consecutive slices, 0 where no volume can be divided.
        depth: Slices of a slab, None for slices.
        widths: Channels per level of the encoder.
        strides: Between levels; the same for slabs and whole volumes.
        n_volumes: Volumes whose headers were read.
        n_cropped: Volumes that are larger than ``size`` somewhere.
        median_spacing: Millimetres as found, all three axes.
    """

    geometry: str
    slice_axis: int
    spacing: tuple[float | None, ...]
    size: tuple[int | None, ...]
    n_slices: int
    partitions: int
    depth: int | None
    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    n_volumes: int
    n_cropped: int
    median_spacing: tuple[float, ...]


def write_config(
    kind: str, manifest: Path, out: Path | None, *, mapping: Mapping[str, str] | None = None, force: bool = False
) -> Outcome:
    """Write a configuration that runs unchanged on the volumes of a manifest.

    Args:
        kind: "pretrain" or "finetune".
        manifest: The manifest; only headers of its volumes are read.
        out: File to write; None: ``pretrain.yaml`` or ``finetune.yaml`` here.
        mapping: Columns of other names, written into the configuration.
        force: Replace an existing file.

    Raises:
        ConfigError: Unknown kind, or the file exists.
        DataError: The manifest or every volume cannot be read, or (finetune) there is no split or too few labels.
    """
    if kind not in CONFIGS:
        raise ConfigError(f"there is no configuration for `{kind}`", fix=f"use {' or '.join(CONFIGS)}")
    target = out or Path(f"{kind}.yaml")
    if target.exists() and not force:
        raise ConfigError(
            "the file exists already; it was not touched",
            where=str(target),
            fix="choose another name with --out, or replace it with --force",
        )
    loaded = read_manifest(manifest, mapping=mapping or {})
    common = {
        "stem": _stem(loaded),
        "manifest": json.dumps(str(manifest), ensure_ascii=False),
        "map": json.dumps(dict(mapping or {}), ensure_ascii=False),
    }
    if is_feature_file(loaded.image_paths(int(loaded.table["volume"].iloc[0]))[0]):
        template, values, about = _feature_values(kind, loaded)
        geometry, notes = "features", []
    else:
        grid, notes = fit_grid(loaded)
        column = target_column(loaded) if kind == "finetune" and not loaded.table["label"].notna().any() else None
        if column is not None:
            template, more = "finetune_target", _target_values(loaded, column)
        else:
            template, more = kind, _pretrain_values(loaded, grid) if kind == "pretrain" else _finetune_values(loaded)
        values, geometry = {"grid": grid, **more}, grid.geometry
        about = f"{_shown(grid.median_spacing)} mm (median of {grid.n_volumes} volumes): " + (
            f"2D slices along axis {grid.slice_axis}" if grid.geometry == "slice" else "3D"
        )
    text = _template(template).render({**common, **values})
    validate(CONFIGS[kind], parse_yaml(text, source=str(target)), source=str(target))
    atomic_write(target, text)
    lines = [about, *notes, f"written to {target}; read it, then: medssl {kind} {target}"]
    return Outcome(lines, {"config": str(target), "kind": kind, "geometry": geometry, "notes": notes})


def _feature_values(kind: str, manifest: Manifest) -> tuple[str, dict[str, Any], str]:
    """Template, its values, and a line about the table, for a manifest of feature rows.

    Raises:
        DataError: Rows that cannot be read, or fewer than two to train on; (finetune) no target, no split or too few
            people with a target.
    """
    if kind != "pretrain":
        target = target_column(manifest)
        if target is None:
            raise DataError(
                "the manifest fills neither `age` nor `diagnosis`, so there is nothing to fine-tune on",
                where=str(manifest.path),
                fix="fill one of them, or read another column under its name with --map",
            )
        store = open_features(manifest, FeaturesConfig(impute="mean"))
        values = {**_target_values(manifest, target), **_missing_values(store), "grid": None}
        return "finetune_target", values, f"{len(manifest)} rows of {store.channels} features"
    splits = _split_values(manifest)
    chosen = in_splits(manifest, ("train",)) if manifest.table["split"].notna().any() else manifest
    store = open_features(chosen, FeaturesConfig(impute="mean"))
    if len(chosen) < 2:
        raise DataError("a contrast needs two rows at least", where=str(manifest.path), found=f"{len(chosen)} rows")
    ages = chosen.table["age"]
    why = "the manifest lacks ages to train with" if ages.isna().any() else "all ages are equal"
    by_age = bool(ages.notna().all() and ages.nunique() > 1)
    values = {
        **splits,
        "method": "y_aware" if by_age else "simclr",
        "why_not_age": why,
        **_missing_values(store),
        "n_rows": len(chosen),
        "batch": min(FEATURE_BATCH, len(chosen)),
    }
    return "pretrain_features", values, f"{len(chosen)} rows of {store.channels} features"


def _missing_values(store: FeatureStore) -> dict[str, Any]:
    """How many features there are, and what to do about missing ones."""
    n_missing = int(np.isnan(store.values).any(axis=1).sum())
    return {
        "n_features": store.channels,
        "impute": "mean" if n_missing else "null",
        "impute_note": f"{n_missing} rows lack a feature; null refuses them" if n_missing else "no feature is missing",
    }


def target_column(manifest: Manifest) -> str | None:
    """What a manifest without label maps can be fine-tuned on: the first of diagnosis and age in which people differ.

    Diagnosis comes first because a cohort that has it was collected for it.
    """
    table = manifest.table
    return next((name for name in ("diagnosis", "age") if name in table and table[name].nunique() > 1), None)


def _target_values(manifest: Manifest, target: str) -> dict[str, Any]:
    classes = int(manifest.table[target].nunique()) if target == "diagnosis" else 0
    known = _finetune_values(manifest, target)
    left = known["upper_bound"]
    sizes = sorted({n for n in TARGET_LABELLED if max(2, classes) <= n <= left}) or [left]
    everyone = manifest.table
    missing = everyone[everyone[target].isna() & (everyone["split"] == known["evaluate_on"])]
    return {
        **known,
        "target": target,
        "task": "classification" if classes else "regression",
        "n_labelled": tuple(sizes),
        "exclude": json.dumps([str(case) for case in missing["case"]], ensure_ascii=False),
    }


def _template(kind: str) -> jinja2.Template:
    # The templates write YAML: nothing is rendered as HTML, and values that could hold YAML syntax are quoted as JSON.
    loader = jinja2.PackageLoader("medssl.runs")
    environment = jinja2.Environment(  # noqa: S701
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _inline
    return environment.get_template(f"{kind}.yaml.j2")


def _inline(value: Any) -> str:
    """A number, None, or nested tuples of them as YAML in one line."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{', '.join(_inline(one) for one in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stem(manifest: Manifest) -> str:
    """Start of run names: the cohort's name, else the folder's."""
    name = manifest.meta.name or manifest.path.absolute().parent.name
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60] or "cohort"


def _shown(spacing: tuple[float, ...]) -> str:
    return " x ".join(f"{one:g}" for one in spacing)


def fit_grid(manifest: Manifest) -> tuple[Grid, list[str]]:
    """Geometry, grid and strides for the volumes, and what to know about them.

    Raises:
        DataError: No volume's header can be read.
    """
    shapes, spacings, unreadable = _headers(manifest)
    median = np.median(spacings, axis=0)
    slice_axis = int(median.argmax())
    flat = bool(median.max() / np.sort(median)[1] >= ANISOTROPIC)
    spacing = tuple(_rounded(one) for one in median)
    lengths = np.ceil(shapes * spacings / spacing)
    if flat:
        lengths[:, slice_axis] = shapes[:, slice_axis]  # slices stay as they are
    else:
        slice_axis = _slab_axis(median, np.median(lengths, axis=0))
    covered = np.percentile(lengths, COVERED, axis=0)
    plane = [axis for axis in range(3) if not flat or axis != slice_axis]
    size, depth, widths, strides = _network(covered, plane, None if flat else slice_axis)
    n_slices = int(lengths[:, slice_axis].min()) if flat else int(size[slice_axis] or 0)
    partitions = min(PARTITIONS, n_slices)
    cropped = sum(bool((row[plane] > [size[axis] or 0 for axis in plane]).any()) for row in lengths)
    notes = [f"cannot be read and was passed over: {one}" for one in unreadable[:5]]
    if len(unreadable) > 5:
        notes.append(f"and {len(unreadable) - 5} more; medssl data check {manifest.path} lists them")
    if cropped:
        notes.append(f"{cropped} volumes are larger than the prepared grid and will be cropped about their centre")
    grid = Grid(
        geometry="slice" if flat else "slab",
        slice_axis=slice_axis,
        spacing=tuple(None if axis not in plane else spacing[axis] for axis in range(3)),
        size=size,
        n_slices=n_slices,
        partitions=partitions if partitions > 1 else 0,
        depth=depth,
        widths=widths,
        strides=strides,
        n_volumes=len(shapes),
        n_cropped=cropped,
        median_spacing=tuple(_rounded(one) for one in median),
    )
    return grid, notes


def _headers(manifest: Manifest) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Shapes and spacings (n, 3) along the axes of the prepared volumes, and the volumes that cannot be read."""
    shapes, spacings, unreadable = [], [], []
    for volume in (int(v) for v in manifest.table["volume"]):
        path = manifest.image_paths(volume)[0]
        try:
            header = read_header(path)
        except DataError as error:
            unreadable.append(f"{path}: {error.message}")
            continue
        if len(header.shape) < 3:
            unreadable.append(f"{path}: {len(header.shape)} axes, a volume has 3")
            continue
        # Column k of the affine is the direction of the file's axis k; its largest entry names the RAS axis.
        order = np.argsort(np.abs(header.affine[:3, :3] / np.asarray(header.spacing)).argmax(axis=0))
        shapes.append(np.asarray(header.shape[:3], dtype=float)[order])
        spacings.append(np.asarray(header.spacing, dtype=float)[order])
    if not shapes:
        raise DataError(
            "no volume of the manifest can be read",
            where=str(manifest.path),
            found="; ".join(unreadable[:3]) or "no rows",
            fix="see `medssl data check`; paths are relative to the folder of the manifest",
        )
    return np.stack(shapes), np.stack(spacings), unreadable


def _slab_axis(spacing: np.ndarray, lengths: np.ndarray) -> int:
    """The axis of thicker slices if there is one; else the longest axis, the later of equals."""
    if spacing.max() / np.sort(spacing)[1] >= THICKER:
        return int(spacing.argmax())
    return 2 - int(lengths[::-1].argmax())


def _rounded(value: float) -> float:
    """Three significant digits: finer differences between scanners mean nothing."""
    return float(f"{value:.3g}")


def _network(
    covered: np.ndarray, plane: list[int], slab_axis: int | None
) -> tuple[tuple[int | None, ...], int | None, tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Size of the grid, depth of slabs, widths and strides: sizes are multiples of what the strides divide by."""
    widths = WIDTHS[len(plane)]
    rough = [max(8, math.ceil(covered[axis])) for axis in plane]
    depth = None
    if slab_axis is not None:
        depth = min(SLAB, 2 ** int(math.log2(rough[slab_axis])))
        rough[slab_axis] = depth
    strides = auto_strides(rough, len(widths))
    while all(stride == 1 for stride in strides[-1]):  # a level that halves nothing only costs time
        strides, widths = strides[:-1], widths[:-1]
    size: list[int | None] = [None] * 3
    for place, axis in enumerate(plane):
        multiple = math.prod(stride[place] for stride in strides)
        size[axis] = multiple * math.ceil(max(covered[axis], 1) / multiple)
    return tuple(size), depth, widths, strides


def _split_values(manifest: Manifest) -> dict[str, str]:
    if not manifest.table["split"].notna().any():
        note = "the manifest has no split: all volumes. Run `medssl data split` before anything is tested on them"
        return {"splits": "null", "split_note": note}
    n_chosen = len(in_splits(manifest, ("train",)))
    return {"splits": "[train]", "split_note": f"{n_chosen} of {len(manifest)} volumes"}


def _pretrain_values(manifest: Manifest, grid: Grid) -> dict[str, Any]:
    split = manifest.table["split"].notna().any()
    chosen = in_splits(manifest, ("train",)) if split else manifest
    n_volumes = min(3 if grid.geometry == "slice" else 2, len(chosen))
    return {
        **_split_values(manifest),
        "n_batch": n_volumes,
        "batch": n_volumes * grid.partitions,
        "n_random": min(12, len(chosen) * grid.n_slices),
    }


def _finetune_values(manifest: Manifest, column: str = "label") -> dict[str, Any]:
    """Splits and sizes that fit the volumes with a label map, or with a value of another column."""
    table, what = manifest.table, "a label" if column == "label" else f"a value of `{column}`"
    if not table["split"].notna().any():
        raise DataError(
            "the manifest holds no split, so there is nobody to evaluate on",
            where=str(manifest.path),
            fix="run `medssl data split` first",
        )
    labelled = table[table[column].notna()]
    groups = {name: int(part["group"].nunique()) for name, part in labelled.groupby("split")}
    evaluated = next((name for name in (*TEST_SPLITS, "validation") if groups.get(name)), None)
    if evaluated is None:
        raise DataError(f"no volume of the splits test and validation has {what}", where=str(manifest.path))
    n_groups = groups.get("train", 0)
    if n_groups < 2:
        raise DataError(
            "fine-tuning needs labelled volumes of two groups at least, one of them to choose the best step",
            where=str(manifest.path),
            found=f"{n_groups} labelled groups in the split train",
            fix="label more volumes, or split again (`medssl data split`)",
        )
    n_validation = min(N_VALIDATION if column == "label" else max(N_VALIDATION, n_groups // 10), n_groups - 1)
    left = n_groups - n_validation
    return {
        "evaluate_on": evaluated,
        "n_evaluated": groups[evaluated],
        "n_groups": n_groups,
        "n_labelled": tuple(n for n in N_LABELLED if n <= left),
        "n_validation": n_validation,
        "upper_bound": left,
    }
