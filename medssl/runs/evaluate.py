"""Score predictions that exist already, from this package or any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from medssl.core.errors import DataError
from medssl.core.files import write_json
from medssl.data.manifest import Manifest, read_manifest
from medssl.data.volume import SUFFIXES, affines_agree, read_header, read_label
from medssl.evaluation.segmentation import summarise
from medssl.reporting.tables import write_csv
from medssl.runs.cohort import Outcome
from medssl.runs.scoring import case_rows, native_label
from medssl.runs.volumes import in_splits


def evaluate_segmentation(
    predictions: Path, manifest: Path, *, out: Path | None, split: str | None, mapping: Mapping[str, str]
) -> Outcome:
    """Dice and HD95 of a folder of label maps against the labels of a manifest.

    A prediction belongs to a row when its name without ending is the row's case, its subject (where that has one row)
    or the name of its image. Rows without a prediction are an error: leaving out hard cases flatters.

    Raises:
        DataError: Missing predictions, or one on another grid than its label; every one is named.
    """
    loaded = read_manifest(manifest, mapping=mapping)
    rows = in_splits(loaded, None if split is None else (split,))
    rows = rows.select(rows.table["label"].notna().to_numpy(dtype=bool))
    if len(rows) == 0:
        raise DataError("no row with a label to score against", where=str(manifest))
    files = _match(predictions, rows)
    names = {value: name for value, name in rows.meta.label_names.items() if value != 0}
    scored, problems = [], []
    for volume, file in files.items():
        row, label_file = rows.row(volume), rows.label_path(volume)
        assert label_file is not None
        label, header = native_label(rows, volume), read_header(label_file)
        try:
            predicted, affine = read_label(file)
        except DataError as error:
            problems.append(str(error))
            continue
        if predicted.shape != label.shape or not affines_agree(affine, header.affine, label.shape):
            problems.append(f"{file}: shape {predicted.shape} or affine differs from the label {label_file}")
            continue
        known = names or {int(v): f"label {v}" for v in np.union1d(np.unique(label), np.unique(predicted)) if v}
        place = {"case": row["case"], "subject": row["subject"], "group": row["group"]}
        scored += [{**place, **one} for one in case_rows(predicted, label, known, header.affine)]
    if problems:
        raise DataError(
            f"{len(problems)} predictions cannot be scored",
            found="\n         ".join(problems[:20]),
            fix="write predictions as integer label maps on the grid of the input image",
        )
    return _outcome(pd.DataFrame(scored), out)


def _match(folder: Path, manifest: Manifest) -> dict[int, Path]:
    if not folder.is_dir():
        raise DataError("no such folder of predictions", where=str(folder), fix="check the path")
    found = {_stem(path): path for path in sorted(folder.iterdir()) if path.name.lower().endswith(SUFFIXES)}
    table = manifest.table
    once = ~table["subject"].duplicated(keep=False)
    files, missing = {}, []
    for volume, case, subject, single in zip(table["volume"], table["case"], table["subject"], once):
        names = [case, *([subject] if single else []), _stem(manifest.image_paths(int(volume))[0])]
        name = next((one for one in names if one in found), None)
        if name is None:
            missing.append(str(case))
        else:
            files[int(volume)] = found[name]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(table)} cases have no prediction",
            where=str(folder),
            found=", ".join(missing[:20]) + (" ..." if len(missing) > 20 else ""),
            fix="name predictions by case, such as CASE.nii.gz, or choose rows with --split",
        )
    return files


def _stem(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def _outcome(per_case: pd.DataFrame, out: Path | None) -> Outcome:
    summary = summarise(per_case)
    lines = [f"{'class':<28}{'Dice':>7}{'HD95 mm':>9}{'detected':>10}{'missed':>8}{'cases':>7}"]
    for name, one in summary.classes.items():
        lines.append(
            f"{name:<28}{one.dice:>7.3f}{one.hd95_mm:>9.2f}{one.hd95_mm_detected:>10.2f}{one.missed:>8}{one.n:>7}"
        )
    lines.append(f"{'mean over classes':<28}{summary.dice:>7.3f}{summary.hd95_mm:>9.2f}")
    lines.append(f"left out, structure in neither label nor prediction: {summary.left_out}")
    if out is not None:
        write_csv(per_case, out / "per_case.csv")
        write_json(out / "summary.json", summary.as_dict())
        lines.append(f"written to {out}")
    return Outcome(lines, summary.as_dict())
