"""BIDS: `sub-<id>/[ses-<id>/]<datatype>/sub-<id>[_ses-<id>][_key-value...]_<suffix>.nii.gz` with `participants.tsv`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from medssl.core.errors import DataError
from medssl.data.cohorts.base import (
    MISSING,
    NIFTI_SUFFIXES,
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    is_nifti,
    leftovers,
    list_files,
    make_meta,
    natural_key,
    read_json,
    read_tsv,
    stem,
    years,
)
from medssl.data.manifest import ManifestMeta

_ENTITY: Final = re.compile(r"^([A-Za-z]+)-([A-Za-z0-9]+)$")
# Names under which participants.tsv files give our columns, compared without case.
_PARTICIPANT_COLUMNS: Final = {
    "age": ("age", "age_at_scan", "age_years"),
    "sex": ("sex", "gender"),
    "site": ("site", "site_id", "center", "centre", "institution", "scanner_site"),
    "diagnosis": ("diagnosis", "dx", "dx_group", "group", "participant_group"),
}


@dataclass(frozen=True)
class Name:
    """A BIDS file name taken apart."""

    path: str
    entities: dict[str, str]
    suffix: str

    def session(self) -> str | None:
        """The session id, or None."""
        return self.entities.get("ses")


def recognise(root: Path) -> Recognition:
    """BIDS if `sub-*` folders lie beside dataset_description.json or participants.tsv, or hold BIDS-named images."""
    folders = [path for path in sorted(root.glob("sub-*")) if path.is_dir()]
    if not folders:
        return Recognition(0.0, "no sub-* folder")
    for name in ("dataset_description.json", "participants.tsv"):
        if (root / name).is_file():
            return Recognition(1.0, f"found {name} beside {folders[0].name}")
    named = next(folders[0].glob(f"**/{folders[0].name}_*.nii*"), None)
    if named is None:
        return Recognition(0.0, f"{folders[0].name} holds no BIDS-named image")
    return Recognition(0.9, f"found {named.relative_to(root).as_posix()}")


def discover(
    root: str | Path, *, suffix: str = "T1w", datatype: str = "anat", labels: str = "", derivatives: bool = False
) -> Discovery:
    """List the images of a BIDS folder, one row per image.

    Args:
        root: The folder that holds the `sub-*` folders.
        suffix: What is listed: "T1w"; several rows each with "T1w,FLAIR"; channels of one row with "T1w;FLAIR" (the
            same session and run; incomplete sets are listed as skipped).
        datatype: Folder of the images; "" takes any.
        labels: Suffix of label maps in `derivatives/` (such as "dseg"), matched by sub, ses, run and acq; "" for none.
        derivatives: Also list the images in `derivatives/`, instead of leaving them out.

    Raises:
        DataError: If participants.tsv or dataset_description.json is damaged, or no image is found.
    """
    folder = existing_folder(root)
    skipped: list[Skipped] = []
    files = list_files(folder, skipped)
    used = {
        "participants.tsv",
        "dataset_description.json",
        "README",
        "README.md",
        "CHANGES",
        "LICENSE",
        "participants.json",
    }
    people = _participants(folder, skipped)
    maps = _label_maps(files, labels) if labels else []
    images = _images(files, {name.path for name in maps}, suffix, datatype, derivatives, used, skipped)
    rows = [row for group in suffix.split(",") for row in _rows(images, group.split(";"), maps, people, skipped)]
    rows.sort(key=lambda row: natural_key(f"{row['subject']} {row['session'] or ''} {row['image']}"))
    taken = {path for row in rows for path in (row["label"],) if path}
    skipped += [Skipped(name.path, "label map without a listed image") for name in maps if name.path not in taken]
    used |= {name.path for name in maps} | {_sidecar(path) for path in used}
    skipped += leftovers(files, used, "BIDS")
    return Discovery(build_table(rows, root=folder, layout="BIDS"), _meta(folder, suffix), skipped, "bids")


def _images(
    files: list[str],
    maps: set[str],
    suffix: str,
    datatype: str,
    derivatives: bool,
    used: set[str],
    skipped: list[Skipped],
) -> list[Name]:
    """The images that were asked for; the reasons of the others go to `skipped`."""
    wanted = {part for group in suffix.split(",") for part in group.split(";")}
    images: list[Name] = []
    for path in files:
        if not is_nifti(path) or path in maps:
            continue
        in_derivatives = path.startswith(("derivatives/", "sourcedata/"))
        name = parse_name(path)
        why = None
        if in_derivatives and not derivatives:
            why = "below derivatives or sourcedata"
        elif name is None:
            why = "no BIDS file name (sub-<id>[_key-value]_<suffix>)"
        elif name.suffix not in wanted:
            why = f"suffix is {name.suffix}, asked for {suffix}"
        elif datatype and PurePosixPath(path).parent.name != datatype:
            why = f"not in a {datatype} folder"
        used.add(path)
        if why:
            skipped.append(Skipped(path, why))
        elif name is not None:
            images.append(name)
    return images


def parse_name(path: str) -> Name | None:
    """The entities and suffix of a BIDS file name; None when it is no such name or contradicts its folder."""
    *parts, suffix = stem(path).split("_")
    entities: dict[str, str] = {}
    for part in parts:
        match = _ENTITY.match(part)
        if match is None or match[1] in entities:
            return None
        entities[match[1]] = match[2]
    folders = [folder for folder in PurePosixPath(path).parts[:-1] if folder.startswith("sub-")]
    if "sub" not in entities or not suffix.isalnum() or (folders and folders[-1] != f"sub-{entities['sub']}"):
        return None
    return Name(path, entities, suffix)


def _rows(
    images: list[Name], group: list[str], maps: list[Name], people: dict[str, dict[str, Any]], skipped: list[Skipped]
) -> list[dict[str, Any]]:
    """Rows of one suffix, or of several suffixes joined as channels."""
    sets: dict[tuple[tuple[str, str], ...], dict[str, Name]] = {}
    for name in images:
        if name.suffix not in group:
            continue
        keys = (
            name.entities if len(group) == 1 else {k: v for k, v in name.entities.items() if k in ("sub", "ses", "run")}
        )
        known = sets.setdefault(tuple(sorted(keys.items())) + (() if len(group) > 1 else (("_", name.path),)), {})
        if name.suffix in known:
            skipped.append(
                Skipped(name.path, f"a second {name.suffix} of this session and run; {known[name.suffix].path} is used")
            )
        else:
            known[name.suffix] = name
    rows = []
    for found in sets.values():
        absent = [suffix for suffix in group if suffix not in found]
        if absent:
            skipped += [
                Skipped(name.path, f"no {', '.join(absent)} of this session and run") for name in found.values()
            ]
            continue
        first = found[group[0]]
        subject = f"sub-{first.entities['sub']}"
        row: dict[str, Any] = {"subject": subject, "image": ";".join(found[suffix].path for suffix in group)}
        extra = {key: value for key, value in first.entities.items() if key in ("run", "acq")}
        row["session"], row["label"], row["modality"] = first.session(), _label_of(first, maps), ";".join(group)
        rows.append({**row, **people.get(subject, {}), **extra})
    return rows


def _label_maps(files: list[str], suffix: str) -> list[Name]:
    names = [parse_name(path) for path in files if is_nifti(path) and path.startswith("derivatives/")]
    return [name for name in names if name is not None and name.suffix == suffix]


def _label_of(image: Name, maps: list[Name]) -> str | None:
    """The map of the same sub and ses; run and acq must agree where the map states them."""
    for name in maps:
        same = all(name.entities.get(key) == image.entities.get(key) for key in ("sub", "ses"))
        if same and all(
            name.entities.get(key, image.entities.get(key)) == image.entities.get(key) for key in ("run", "acq")
        ):
            return name.path
    return None


def _participants(root: Path, skipped: list[Skipped]) -> dict[str, dict[str, Any]]:
    """age, sex, site and diagnosis by subject, from participants.tsv where there is one."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    header, records = read_tsv(path)
    if "participant_id" not in header:
        raise DataError(
            "no column participant_id", where=str(path), found=", ".join(header)[:200], fix="correct the header"
        )
    chosen = {ours: next((n for n in names if n in header), None) for ours, names in _PARTICIPANT_COLUMNS.items()}
    people: dict[str, dict[str, Any]] = {}
    for _, record in records:
        subject = record["participant_id"]
        subject = subject if subject.startswith("sub-") else f"sub-{subject}"
        values: dict[str, Any] = {}
        for ours, theirs in chosen.items():
            value = record[theirs] if theirs else ""
            values[ours] = None if value.lower() in MISSING else value
        age, values["age"] = values["age"], years(values["age"])
        if age is not None and values["age"] is None:
            why = f"{subject}: age {age!r} is no number of years; left missing"
            skipped.append(Skipped("participants.tsv", why))
        for ours, value in people.get(subject, {}).items():
            if value != values[ours]:
                values[ours] = None
                skipped.append(Skipped("participants.tsv", f"{subject}: two lines differ in {ours}; left missing"))
        people[subject] = values
    return people


def _meta(root: Path, suffix: str) -> ManifestMeta:
    path = root / "dataset_description.json"
    content = read_json(path) if path.is_file() else {}
    return make_meta(
        path,
        name=str(content.get("Name") or root.resolve().name),
        cohort="bids",
        modality=suffix if "," not in suffix else "",
        licence=str(content.get("License") or ""),
        citation=str(content.get("HowToAcknowledge") or ""),
        source=str(content.get("DatasetDOI") or ""),
    )


def _sidecar(path: str) -> str:
    for ending in NIFTI_SUFFIXES:
        if path.endswith(ending):
            return path.removesuffix(ending) + ".json"
    return path
