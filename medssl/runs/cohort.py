"""Everything before training: find a cohort, check it, split it, look at it, prepare it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.core.errors import ConfigError, DataError
from medssl.core.seeding import permutation
from medssl.data.cohorts import Skipped, discover_any
from medssl.data.features import is_feature_file
from medssl.data.integrity import Summary, check_manifest
from medssl.data.manifest import Manifest, ManifestMeta, meta_path, read_manifest, write_manifest
from medssl.data.splits import split_table
from medssl.data.volume import read_volume
from medssl.reporting.montage import Picture, write_montage
from medssl.reporting.tables import write_csv
from medssl.runs.scoring import native_label

log = logging.getLogger(__name__)

_SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """What a command has to say: lines for people, fields for machines."""

    lines: list[str]
    fields: dict[str, Any]
    n_errors: int = 0

    def text(self) -> str:
        """The lines."""
        return "\n".join(self.lines)

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return self.fields


def scan(root: Path, out: Path, *, kind: str, options: Mapping[str, Any], force: bool) -> Outcome:
    """Write the manifest of a folder of MRI.

    Raises:
        DataError: Nothing was recognised or found.
        ConfigError: The manifest exists already, or an option does not belong to the cohort.
    """
    _refuse_existing(out, force)
    if out.resolve() == root.resolve():
        raise ConfigError("the manifest would overwrite the table", where=str(out), fix="choose another --out")
    found = discover_any(root, kind=kind, **options)
    base = root.parent if root.is_file() else root
    source = Manifest(_with_positions(found.table), found.meta, base / "manifest.csv")
    write_manifest(source.relocated(out), found.meta, out)
    manifest = read_manifest(out)
    table = manifest.table
    lines = [
        f"{found.cohort}: {found.why}" if found.why else found.cohort,
        f"{len(table)} volumes of {table['group'].nunique()} groups, {int(table['label'].notna().sum())} with labels "
        f"-> {out}",
    ]
    if found.meta.label_names:
        lines.append("labels: " + ", ".join(f"{value} {name}" for value, name in found.meta.label_names.items()))
    lines += _skipped(found.skipped)
    lines.append(f"next: medssl data check {out} --deep")
    return Outcome(
        lines,
        {
            "cohort": found.cohort,
            "why": found.why,
            "manifest": str(out),
            "n_volumes": len(table),
            "n_groups": int(table["group"].nunique()),
            "n_labelled": int(table["label"].notna().sum()),
            "skipped": [{"path": one.path, "why": one.why} for one in found.skipped],
        },
    )


def _with_positions(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that Manifest promises, for a table that was never a file."""
    full = table.assign(volume=np.arange(len(table)))
    for name in ("image", "label"):
        if name not in full:
            full[name] = None
    return full


def _skipped(skipped: Sequence[Skipped]) -> list[str]:
    if not skipped:
        return ["nothing was skipped"]
    reasons: dict[str, list[str]] = {}
    for one in skipped:
        reasons.setdefault(one.why, []).append(one.path)
    lines = [f"skipped {len(skipped)}:"]
    for why, paths in list(reasons.items())[:_SHOWN]:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        lines.append(f"  {', '.join(paths[:3])}{more}: {why}")
    if len(reasons) > _SHOWN:
        lines.append(f"  and {len(reasons) - _SHOWN} other reasons (all of them with --json)")
    return lines


def check(manifest: Path, *, deep: bool, jobs: int, mapping: Mapping[str, str], out: Path | None) -> Outcome:
    """List every problem of a manifest and its files.

    Raises:
        ConfigError: ``out`` is the manifest itself.
    """
    loaded = read_manifest(manifest, mapping=mapping)
    if out is not None and out.resolve() in (loaded.path.resolve(), meta_path(loaded.path).resolve()):
        raise ConfigError("the findings would overwrite the manifest", where=str(out), fix="choose another --out")
    summary: Summary = check_manifest(loaded, deep=deep, jobs=jobs)
    if out is not None:
        write_csv(summary.table(), out)
    return Outcome(summary.lines(), summary.to_json(), summary.n_errors)


def split(
    manifest: Path,
    *,
    test: float,
    validation: float,
    seed: int,
    stratify: tuple[str, ...],
    mapping: Mapping[str, str],
    out: Path | None,
    force: bool,
) -> Outcome:
    """Write the column ``split`` of a manifest.

    Raises:
        ConfigError: There is a split already (without ``force``), or impossible shares.
        DataError: A part would be empty.
    """
    loaded = read_manifest(manifest, mapping=mapping)
    target = out or loaded.path
    if out is not None:
        _refuse_existing(out, force)
    if loaded.table["split"].notna().any() and not force:
        raise ConfigError(
            "the manifest holds a split already; it was not touched",
            where=str(loaded.path),
            fix="write to another file with --out, or replace it with --force",
        )
    table = split_table(loaded, test=_share(test), validation=_share(validation), seed=seed, stratify=stratify)
    divided = Manifest(table, loaded.meta, loaded.path)
    write_manifest(divided.relocated(target), loaded.meta, target)
    counts = table.groupby("split", sort=False).agg(volumes=("case", "size"), groups=("group", "nunique"))
    order = [name for name in ("train", "validation", "test") if name in counts.index]
    lines = [f"{name:<11}{counts.volumes[name]:>6} volumes of {counts.groups[name]} groups" for name in order]
    return Outcome(
        [*lines, f"written to {target}"],
        {
            "manifest": str(target),
            "seed": seed,
            "parts": {
                name: {"volumes": int(counts.volumes[name]), "groups": int(counts.groups[name])} for name in order
            },
        },
    )


def _share(value: float) -> float | int:
    """1 and above is a number of groups, below 1 a share of them."""
    if value < 1:
        return float(value)
    if value != int(value):
        raise ConfigError(f"{value} is neither a share (below 1) nor a whole number of groups")
    return int(value)


def show(
    manifest: Path, out: Path, *, n: int, cases: tuple[str, ...], seed: int, mapping: Mapping[str, str]
) -> Outcome:
    """Write a PNG with the middle slices of some volumes and the outlines of their labels."""
    if out.suffix.lower() != ".png":
        raise ConfigError("the montage is written as PNG", found=str(out), fix="name a file that ends in .png")
    loaded = read_manifest(manifest, mapping=mapping)
    table = loaded.table
    if is_feature_file(loaded.image_paths(int(table["volume"].iloc[0]))[0]):
        raise DataError(
            "the manifest names rows of feature tables, which are no pictures",
            where=str(manifest),
            fix="`medssl data check --deep` says what the features hold",
        )
    if cases:
        chosen = table[table["case"].isin(cases) | table["subject"].isin(cases)]
        missing = set(cases) - set(table["case"]) - set(table["subject"])
        if missing:
            raise DataError(f"not in the manifest: {', '.join(sorted(missing))}", where=str(manifest))
    else:
        chosen = table.iloc[sorted(permutation(len(table), seed, 0)[:n])]
    pictures = [_picture(loaded, int(volume)) for volume in chosen["volume"]]
    write_montage(pictures, out, label_names=loaded.meta.label_names)
    return Outcome(
        [f"{len(pictures)} volumes -> {out}"],
        {"montage": str(out), "cases": [str(case) for case in chosen["case"]]},
    )


def _picture(manifest: Manifest, volume: int) -> Picture:
    row = manifest.row(volume)
    frame = None if pd.isna(row["frame"]) else int(row["frame"])
    image = read_volume(manifest.image_paths(volume), frame=frame, channels=manifest.channels(volume))
    label = None if manifest.label_path(volume) is None else native_label(manifest, volume)
    return Picture(image=image.data[0], label=label, affine=image.affine, title=str(row["case"]))


def _refuse_existing(path: Path, force: bool) -> None:
    for file in (path, meta_path(path)):
        if file.exists() and not force:
            raise ConfigError(
                "the file exists already; it was not touched",
                where=str(file),
                fix="choose another name with --out, or replace it with --force",
            )


def prepare_for(config: Path, overrides: Sequence[str]) -> Outcome:
    """Fill the cache with the volumes that a run's configuration names."""
    from medssl.config import load_any
    from medssl.runs.volumes import open_cohort

    loaded = load_any(config, overrides)
    if loaded.spatial_dims == 0:
        line = "rows of feature tables need no preparation: nothing to do"
        return Outcome([line], {"n_volumes": 0, "cache": str(loaded.data.cache)})
    cohort = open_cohort(loaded.data, slice_axis=loaded.items.slice_axis, every_split=True)
    n = len(cohort.store.volumes)
    return Outcome(
        [f"{n} volumes are prepared in {loaded.data.cache}"], {"n_volumes": n, "cache": str(loaded.data.cache)}
    )


__all__ = ["ManifestMeta", "Outcome", "check", "prepare_for", "scan", "show", "split"]
