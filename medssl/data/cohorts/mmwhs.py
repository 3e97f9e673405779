"""MMWHS: whole-heart MR and CT with seven structures, labelled by the values 205 to 850.

Layout: `mr_train_1001_image.nii.gz` with `mr_train_1001_label.nii.gz` (likewise `ct_`, and `_test_` without labels),
in `mr_train/` and similar folders or side by side.

The label values are not consecutive: preparation maps the sorted keys of `label_names` to 0, 1, 2, ... Some releases
hold a few voxels of the value 421, which is no structure of the challenge; they are left atrium (420), and the column
`label_alias` says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, Literal

from medssl.data.cohorts.base import (
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    junk_reason,
    leftovers,
    list_files,
)
from medssl.data.manifest import ManifestMeta

LABEL_NAMES: Final = {
    0: "background",
    205: "myocardium of the left ventricle",
    420: "left atrium",
    500: "left ventricle",
    550: "right atrium",
    600: "right ventricle",
    820: "ascending aorta",
    850: "pulmonary artery",
}
LABEL_ALIAS: Final = "421=420"
META: Final = ManifestMeta(
    name="MMWHS",
    cohort="mmwhs",
    label_names=LABEL_NAMES,
    modality="MR, CT",
    licence="terms of the challenge: registration, research use; no open licence, do not redistribute",
    citation=(
        "Zhuang and Shen, Multi-scale patch and multi-modality atlases for whole heart segmentation of MRI, Medical "
        "Image Analysis 31:77-87 (2016); Zhuang et al., Evaluation of algorithms for Multi-Modality Whole Heart "
        "Segmentation: An open-access grand challenge, Medical Image Analysis 58:101537 (2019)"
    ),
    source="Multi-Modality Whole Heart Segmentation challenge 2017",
)
_NAME: Final = re.compile(
    r"^(?P<subject>(?P<modality>mr|ct)_(?P<split>train|test)_\d+)_(?P<what>image|label)\.nii(\.gz)?$"
)


def recognise(root: Path) -> Recognition:
    """MMWHS if a file `mr_train_NNNN_image.nii.gz` (or ct, or test) lies in the root or one folder below."""
    for pattern in ("*_image.nii*", "*/*_image.nii*"):
        for path in sorted(root.glob(pattern)):
            if _NAME.match(path.name):
                return Recognition(1.0, f"found {path.relative_to(root).as_posix()}")
    return Recognition(0.0, "no mr_train_NNNN_image.nii.gz or ct_train_NNNN_image.nii.gz")


def discover(root: str | Path, *, modality: Literal["both", "MR", "CT"] = "both") -> Discovery:
    """List MMWHS: one row per image, `modality` MR or CT, the challenge's own training and test sets as `split`.

    Args:
        root: The folder that holds the files, at any depth.
        modality: List only MR or only CT.

    Raises:
        DataError: If no volume is found.
    """
    folder = existing_folder(root)
    images: dict[str, tuple[str, dict[str, str]]] = {}
    labels: dict[str, str] = {}
    skipped: list[Skipped] = []
    files = list_files(folder, skipped)
    used: set[str] = set()
    for path in files:
        match = _NAME.match(Path(path).name)
        if match is None or junk_reason(path):
            continue
        used.add(path)
        subject = match["subject"]
        known = labels if match["what"] == "label" else images
        if subject in known:
            skipped.append(Skipped(path, f"a second {match['what']} of {subject}; the first is used"))
        elif modality not in ("both", match["modality"].upper()):
            skipped.append(Skipped(path, f"modality is {match['modality'].upper()}, asked for {modality}"))
        elif match["what"] == "label":
            labels[subject] = path
        else:
            images[subject] = (path, match.groupdict())
    rows: list[dict[str, Any]] = []
    for subject, (path, parts) in sorted(images.items()):
        label = labels.pop(subject, None)
        if label is None and parts["split"] == "train":
            skipped.append(Skipped(path, "label map is missing; the volume is listed without one"))
        row = {"subject": subject, "image": path, "label": label, "modality": parts["modality"].upper()}
        rows.append({**row, "split": parts["split"], "label_alias": LABEL_ALIAS if label else None})
    skipped += [Skipped(path, "label map without its image") for path in labels.values()]
    skipped += leftovers(files, used, "MMWHS")
    return Discovery(build_table(rows, root=folder, layout="MMWHS"), META, skipped, "mmwhs")
