"""Score predictions that exist already, from this package or any other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from medssl.core.errors import DataError
from medssl.core.files import write_json
from medssl.data.manifest import Manifest, read_manifest
from medssl.data.volume import SUFFIXES, affines_agree, read_header, read_label, stem_of
from medssl.evaluation.segmentation import summarise
from medssl.reporting.tables import write_csv
from medssl.runs.cohort import Outcome
from medssl.runs.scoring import case_rows, native_label
from medssl.runs.volumes import in_splits

log = logging.getLogger(__name__)


def evaluate_segmentation(
    predictions: Path, manifest: Path, *, out: Path | None, split: str | None, mapping: Mapping[str, str]
) -> Outcome:
    """Dice and HD95 of a folder of label maps against the labels of a manifest.

    A prediction belongs to a row when its name without ending is the row's case, its subject or the name of its image
    (the last two where no other row has them). Rows without a prediction are an error: leaving out hard cases flatters.

    Raises:
        DataError: Missing predictions, several of one name, one on another grid than its label or without a value that
            the manifest names (every one is listed); or a split that the manifest does not hold.
    """
    loaded = read_manifest(manifest, mapping=mapping)
    if split is not None and not loaded.table["split"].notna().any():
        raise DataError(
            f"the manifest holds no split, so nothing is `{split}`",
            where=str(manifest),
            fix="run `medssl data split` first, or leave --split out",
        )
    rows = in_splits(loaded, None if split is None else (split,))
    rows = rows.select(rows.table["label"].notna().to_numpy(dtype=bool))
    if len(rows) == 0:
        raise DataError("no row with a label to score against", where=str(manifest))
    files = _match(predictions, rows, loaded)
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
        foreign = sorted(set(np.unique(predicted).tolist()) - set(names) - {0}) if names else []
        if foreign and not np.isin(predicted, list(names)).any():
            problems.append(f"{file}: holds {foreign[:10]}, none of the label values {sorted(names)}")
            continue
        if foreign:
            log.warning("%s: values %s have no name in the manifest and are not scored", file, foreign[:10])
        known = names or {int(v): f"label {v}" for v in np.union1d(np.unique(label), np.unique(predicted)) if v}
        place = {"case": row["case"], "subject": row["subject"], "group": row["group"]}
        scored += [{**place, **one} for one in case_rows(predicted, label, known, header.affine)]
    if problems:
        raise DataError(
            f"{len(problems)} predictions cannot be scored",
            found="\n         ".join(problems[:20]),
            fix="write predictions as integer label maps on the grid of the input image, with the values of the labels",
        )
    return _outcome(pd.DataFrame(scored), out)


def _match(folder: Path, manifest: Manifest, whole: Manifest) -> dict[int, Path]:
    if not folder.is_dir():
        raise DataError("no such folder of predictions", where=str(folder), fix="check the path")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(SUFFIXES):
            if stem_of(path) in found:
                raise DataError(
                    "two predictions have one name",
                    where=f"{found[stem_of(path)]} and {path}",
                    fix="leave one of them in the folder",
                )
            found[stem_of(path)] = path
    table = manifest.table
    usable, missing, files = _names(whole), [], {}
    for volume, case in zip(table["volume"], table["case"]):
        name = next((one for one in usable[int(volume)] if one in found), None)
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


def _names(manifest: Manifest) -> dict[int, list[str]]:
    """Per volume the names that a prediction of it, and of no other volume, may have.

    A name that several rows share (one image name in every folder, one 4D file of two frames) tells nobody's.
    """
    table = manifest.table
    names = {
        int(volume): [str(case), str(subject), stem_of(manifest.image_paths(int(volume))[0])]
        for volume, case, subject in zip(table["volume"], table["case"], table["subject"])
    }
    owner = {own[0]: volume for volume, own in names.items()}
    claims = Counter(name for own in names.values() for name in set(own))
    return {
        volume: [name for name in own if owner.get(name, volume) == volume and (name in owner or claims[name] == 1)]
        for volume, own in names.items()
    }


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
