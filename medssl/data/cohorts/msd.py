"""Medical Segmentation Decathlon: one folder per task, described by its `dataset.json`.

Layout: `dataset.json` (modality, labels, training, test), `imagesTr`, `labelsTr`, `imagesTs`. Tasks with several
modalities store them as the fourth axis of one file (Prostate: T2 and ADC).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.data.cohorts.base import (
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    field,
    inside,
    integer_labels,
    junk_reason,
    leftovers,
    list_files,
    make_meta,
    natural_key,
    read_json,
    stem,
)

LICENCE: Final = "CC BY-SA 4.0"
CITATION: Final = (
    "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13:4128 (2022); Simpson et al., "
    "A large annotated medical image dataset for the development and evaluation of segmentation algorithms, "
    "arXiv:1902.09063 (2019)"
)


def recognise(root: Path) -> Recognition:
    """MSD if `dataset.json` has a training list and `modality`, and none of nnU-Net's own keys."""
    path = root / "dataset.json"
    if not path.is_file():
        return Recognition(0.0, "no dataset.json")
    try:
        content = read_json(path)
    except DataError:
        # Still this layout if the folders say so: the scan then reports what is wrong with the file.
        images = (root / "imagesTr").is_dir()
        return Recognition(0.4 if images else 0.0, "found an unreadable dataset.json beside imagesTr")
    if "channel_names" in content or "file_ending" in content:
        return Recognition(0.0, "dataset.json has nnU-Net's keys")
    if isinstance(content.get("training"), list) and "modality" in content:
        return Recognition(1.0, "dataset.json has `training` and `modality`")
    return Recognition(0.0, "dataset.json without `training` and `modality`")


def discover(root: str | Path, *, channels: str = "all") -> Discovery:
    """List a Decathlon task.

    Args:
        root: The folder of one task (with its dataset.json).
        channels: "all" (or "both") or the name of one modality, such as "T2". One modality of a 4D file becomes its
            `frame`; with all, `frame` stays empty and `modality` names the entries of the fourth axis ("T2;ADC"),
            which are the channels.

    Volumes 2k-1 and 2k of the Hippocampus task look like the two sides of one person (their intensities are far closer
    than those of other pairs), so `group` holds a person inferred from the number; the source does not state it.

    Raises:
        DataError: If dataset.json is damaged or lists no existing image.
        ConfigError: If `channels` names no modality of the task.
    """
    folder = existing_folder(root)
    path = folder / "dataset.json"
    content = read_json(path)
    names = list(integer_labels(field(content, "modality", dict, path), path).values())
    frame, modality = _choose(names, channels)
    labels = integer_labels(field(content, "labels", dict, path), path)
    skipped: list[Skipped] = []
    used = {"dataset.json"}
    paired = str(content.get("name", "")).lower() == "hippocampus"
    rows: list[dict[str, Any]] = []
    for image, label, split in _entries(content, path, skipped):
        if not (folder / image).is_file():
            skipped.append(Skipped(image, "dataset.json lists it, but the file is missing"))
            continue
        if label is not None and not (folder / label).is_file():
            skipped.append(Skipped(label, "label map is missing; the volume is listed without one"))
            label = None
        used.update([image, label or image])
        subject = stem(image)
        group = _person(subject) if paired else None
        row = {"subject": subject, "image": image, "label": label, "modality": modality, "split": split}
        rows.append({**row, "frame": frame, "group": group})
    rows.sort(key=lambda row: natural_key(row["subject"]))
    skipped += leftovers(list_files(folder, skipped), used, "Decathlon")
    meta = make_meta(
        path,
        name=str(content.get("name") or folder.name),
        cohort="msd",
        label_names=labels,
        modality=modality,
        licence=str(content.get("licence") or content.get("license") or LICENCE),
        citation=CITATION,
        source=str(content.get("reference") or "medicaldecathlon.com"),
    )
    return Discovery(build_table(rows, root=folder, layout="Decathlon"), meta, skipped, "msd")


def _choose(names: list[str], channels: str) -> tuple[int | None, str]:
    """The frame (None for all channels) and the modality column."""
    if channels in ("all", "both") or len(names) == 1 and channels == names[0]:
        return None, ";".join(names)
    if channels not in names:
        raise ConfigError(
            f"channels: the task has no modality `{channels}`", found=channels, fix=nearest(channels, [*names, "all"])
        )
    return names.index(channels), channels


def _entries(content: dict[str, Any], path: Path, skipped: list[Skipped]) -> list[tuple[str, str | None, str]]:
    """(image, label, split) of every listed volume, paths normalised."""
    entries: list[tuple[str, str | None, str]] = []
    for position, item in enumerate(field(content, "training", list, path)):
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise DataError(f"training[{position}] has no image", where=str(path), found=f"{item!r:.80}")
        label = item.get("label")
        if label is not None and not isinstance(label, str):
            raise DataError(f"training[{position}].label is no path", where=str(path), found=f"{label!r:.80}")
        entries.append((item["image"], label, "train"))
    for position, item in enumerate(field(content, "test", list, path) if "test" in content else []):
        image = item.get("image") if isinstance(item, dict) else item
        if not isinstance(image, str):
            raise DataError(f"test[{position}] is no path", where=str(path), found=f"{item!r:.80}")
        entries.append((image, None, "test"))
    kept: list[tuple[str, str | None, str]] = []
    for image, label, split in entries:
        normal = inside(image)
        normal_label = None if label is None else inside(label)
        if normal is None or (label is not None and normal_label is None):
            skipped.append(Skipped(image, "dataset.json points outside its folder"))
        elif junk_reason(normal):
            skipped.append(Skipped(normal, f"dataset.json lists it, but it is a {junk_reason(normal)}"))
        else:
            kept.append((normal, normal_label, split))
    return kept


def _person(subject: str) -> str | None:
    number = re.search(r"(\d+)$", subject)
    return f"person_{math.ceil(int(number[1]) / 2):03d}" if number else None
