"""nnU-Net raw data: `DatasetNNN_Name` with imagesTr, labelsTr, imagesTs, one file per channel (`case_0000.nii.gz`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from medssl.core.errors import DataError
from medssl.data.cohorts.base import (
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    field,
    integer_labels,
    junk_reason,
    leftovers,
    list_files,
    make_meta,
    natural_key,
    read_json,
)

_ENDINGS: Final = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")


def recognise(root: Path) -> Recognition:
    """nnU-Net if `dataset.json` has `channel_names` and `file_ending`, beside imagesTr."""
    path = root / "dataset.json"
    if not path.is_file() or not (root / "imagesTr").is_dir():
        return Recognition(0.0, "no dataset.json beside imagesTr")
    try:
        content = read_json(path)
    except DataError:
        channels = any((root / "imagesTr").glob("*_0000.*"))
        return Recognition(0.45 if channels else 0.0, "found an unreadable dataset.json beside imagesTr/*_0000")
    if "channel_names" in content and "file_ending" in content:
        return Recognition(1.0, "dataset.json has `channel_names` and `file_ending`")
    return Recognition(0.0, "dataset.json without `channel_names` and `file_ending`")


def discover(root: str | Path) -> Discovery:
    """List one nnU-Net raw dataset: the channels of a case joined by `;` in the order of `channel_names`.

    Labels that are unions of other values (regions), and the value to ignore, have no value of their own as a
    structure; they are listed as skipped.

    Raises:
        DataError: If dataset.json is damaged, its file ending is not one that can be read, or no case is complete.
    """
    folder = existing_folder(root)
    path = folder / "dataset.json"
    content = read_json(path)
    names = list(integer_labels(field(content, "channel_names", dict, path), path).values())
    ending = field(content, "file_ending", str, path)
    if ending not in _ENDINGS:
        raise DataError(
            "file_ending cannot be read", where=str(path), found=ending, fix=f"use one of {', '.join(_ENDINGS)}"
        )
    skipped: list[Skipped] = []
    labels = _label_names(field(content, "labels", dict, path), path, skipped)
    files = list_files(folder, skipped)
    used = {"dataset.json"}
    rows: list[dict[str, Any]] = []
    for images, label_folder, split in (("imagesTr", "labelsTr", "train"), ("imagesTs", "labelsTs", "test")):
        for case, channels in sorted(_cases(files, images, ending).items(), key=lambda item: natural_key(item[0])):
            used.update(channels.values())
            absent = [f"_{index:04d}" for index in range(len(names)) if index not in channels]
            if absent or len(channels) > len(names):
                found = ", ".join(f"_{index:04d}" for index in sorted(channels))
                why = f"dataset.json names {len(names)} channels, found {found}"
                skipped += [Skipped(channel, why) for channel in channels.values()]
                continue
            label = f"{label_folder}/{case}{ending}"
            has_label = (folder / label).is_file()
            if not has_label and split == "train":
                skipped.append(Skipped(label, "label map is missing; the volume is listed without one"))
            used.add(label)
            row = {"subject": case, "image": ";".join(channels[index] for index in sorted(channels))}
            rows.append({**row, "label": label if has_label else None, "modality": ";".join(names), "split": split})
    skipped += leftovers(files, used, "nnU-Net")
    meta = make_meta(
        path,
        name=str(content.get("name") or folder.name),
        cohort="nnunet",
        label_names=labels,
        modality=";".join(names),
        licence=str(content.get("licence") or content.get("license") or ""),
        citation=str(content.get("citation") or ""),
        source=str(content.get("reference") or ""),
    )
    return Discovery(build_table(rows, root=folder, layout="nnU-Net"), meta, skipped, "nnunet")


def _cases(files: list[str], folder: str, ending: str) -> dict[str, dict[int, str]]:
    """Channel files of every case, by channel number."""
    pattern = re.compile(rf"^{folder}/(?P<case>[^/]+)_(?P<channel>\d{{4}}){re.escape(ending)}$")
    cases: dict[str, dict[int, str]] = {}
    for path in files:
        match = pattern.match(path)
        if match and not junk_reason(path):
            cases.setdefault(match["case"], {})[int(match["channel"])] = path
    return cases


def _label_names(labels: dict[str, Any], path: Path, skipped: list[Skipped]) -> dict[int, str]:
    """Structure names by value; in nnU-Net's file the names are the keys."""
    named: dict[int, str] = {}
    for name, value in labels.items():
        if isinstance(value, list):
            skipped.append(Skipped("dataset.json", f"label `{name}` is the union of {value}, not a value of its own"))
        elif name == "ignore":
            skipped.append(Skipped("dataset.json", f"label `ignore` ({value}) is no structure"))
        elif isinstance(value, bool) or not str(value).isdigit():
            raise DataError(f"label `{name}` needs a whole number", where=str(path), found=f"{value!r:.80}")
        else:
            named[int(value)] = name
    return dict(sorted(named.items()))
