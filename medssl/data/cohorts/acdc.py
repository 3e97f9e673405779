"""ACDC: cine cardiac MRI of 150 people, segmented at end diastole and end systole.

Layout: `patientNNN/Info.cfg`, `patientNNN_frameFF.nii.gz`, `patientNNN_frameFF_gt.nii.gz` and `patientNNN_4d.nii.gz`,
below `training/` and `testing/`, below `database/`, or directly below the root.

Header trap: in many files the two ways in which a NIfTI header gives the geometry disagree (the sform holds unit
spacing or other axes, the qform and pixdim hold the truth), so readers that prefer different ones load different
spacings. The volume reader's rule decides for all of them; nothing is corrected here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, Literal

from medssl.core.errors import DataError
from medssl.data.cohorts.base import (
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    leftovers,
    list_files,
)
from medssl.data.manifest import ManifestMeta
from medssl.data.volume import read_header

LABEL_NAMES: Final = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
META: Final = ManifestMeta(
    name="ACDC",
    cohort="acdc",
    label_names=LABEL_NAMES,
    modality="cine MRI",
    licence="CC BY-NC-SA 4.0",
    citation=(
        "Bernard et al., Deep Learning Techniques for Automatic MRI Cardiac Multi-structures Segmentation and "
        "Diagnosis: Is the Problem Solved?, IEEE Transactions on Medical Imaging 37(11):2514-2525 (2018)"
    ),
    source="Automated Cardiac Diagnosis Challenge, University Hospital of Dijon",
)
_PATIENT: Final = re.compile(r"^patient\d+$")
_SPLITS: Final = (("training", "train"), ("testing", "test"))


def recognise(root: Path) -> Recognition:
    """ACDC if a `patientNNN/Info.cfg` lies where the layout puts it."""
    for folder, _ in _patients(root):
        if (folder / "Info.cfg").is_file():
            return Recognition(1.0, f"found {(folder / 'Info.cfg').relative_to(root).as_posix()}")
    return Recognition(0.0, "no patientNNN/Info.cfg")


def discover(root: str | Path, *, frames: Literal["labelled", "cine"] = "labelled") -> Discovery:
    """List an ACDC folder: one row for end diastole (session ED) and one for end systole (ES) of each person.

    Args:
        root: The folder that holds `training` and `testing`, one of these two, or a `database` folder.
        frames: "cine" also lists the other frames of the 4D file, without labels, for pretraining.

    Raises:
        DataError: If an Info.cfg is damaged, or no volume is found.
    """
    folder = existing_folder(root)
    rows: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    used: set[str] = set()
    for patient, split in _patients(folder):
        config = patient / "Info.cfg"
        if not config.is_file():
            skipped.append(Skipped(patient.relative_to(folder).as_posix(), "no Info.cfg: ED and ES are not known"))
            continue
        info = read_info(config)
        used.add(config.relative_to(folder).as_posix())
        person = _Person(folder, patient, split, info)
        rows += person.labelled(used, skipped)
        cine = person.path("_4d.nii.gz")
        if (folder / cine).is_file():
            used.add(cine)
            if frames == "cine":
                rows += person.cine(cine, skipped)
    skipped += leftovers(list_files(folder, skipped), used, "ACDC")
    return Discovery(build_table(rows, root=folder, layout="ACDC"), META, skipped, "acdc")


def read_info(path: Path) -> dict[str, str]:
    """The `key: value` lines of an Info.cfg; ED and ES are whole numbers from 1, NbFrame too where it is given.

    Raises:
        DataError: If the file is unreadable, a line has no colon, or one of these values is missing or impossible.
    """
    fix = "extract the archive again, or correct the file (ED: 1, ES: 12, Group: DCM, one entry a line)"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read Info.cfg", where=str(path), found=str(error), fix=fix) from error
    info: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        key, colon, value = line.partition(":")
        if not colon:
            raise DataError(
                "Info.cfg has a line without a colon", where=f"{path}, line {number}", found=line[:80], fix=fix
            )
        info[key.strip()] = value.strip()
    for key in ("ED", "ES", "NbFrame"):
        if key == "NbFrame" and key not in info:
            continue
        if not info.get(key, "").isdigit() or int(info[key]) < 1:
            found = info.get(key, "no such line")
            raise DataError(f"Info.cfg: {key} must be a whole number from 1", where=str(path), found=found, fix=fix)
    return info


class _Person:
    """The files of one patient folder."""

    def __init__(self, root: Path, folder: Path, split: str | None, info: dict[str, str]) -> None:
        self.root, self.folder, self.split, self.info = root, folder, split, info

    def path(self, ending: str) -> str:
        """The relative path of `patientNNN` + ending; the uncompressed file where only that exists."""
        name = self.folder / f"{self.folder.name}{ending}"
        plain = name.with_suffix("")
        chosen = plain if plain.is_file() and not name.is_file() else name
        return chosen.relative_to(self.root).as_posix()

    def row(self, image: str, session: str | None, **more: Any) -> dict[str, Any]:
        """One row with what Info.cfg says about the person."""
        return {
            "subject": self.folder.name,
            "image": image,
            "session": session,
            "modality": "cine MRI",
            "diagnosis": self.info.get("Group") or None,
            "split": self.split,
            "height_cm": _number(self.info.get("Height")),
            "weight_kg": _number(self.info.get("Weight")),
            **more,
        }

    def labelled(self, used: set[str], skipped: list[Skipped]) -> list[dict[str, Any]]:
        """The rows of ED and ES."""
        rows = []
        for session in ("ED", "ES"):
            frame = int(self.info[session])
            image, label = self.path(f"_frame{frame:02d}.nii.gz"), self.path(f"_frame{frame:02d}_gt.nii.gz")
            has_label = (self.root / label).is_file()
            if not (self.root / image).is_file():
                skipped.append(Skipped(image, f"Info.cfg names frame {frame} as {session}, but the file is missing"))
                continue
            if not has_label:
                skipped.append(Skipped(label, "label map is missing; the volume is listed without one"))
            used.update([image, label])
            rows.append(self.row(image, session, label=label if has_label else None))
        return rows

    def cine(self, image: str, skipped: list[Skipped]) -> list[dict[str, Any]]:
        """The frames of the 4D file that are neither ED nor ES (those two are listed from their own files)."""
        shape = read_header(self.root / image).shape
        if len(shape) != 4:
            skipped.append(Skipped(image, f"expected a 4D file, found shape {shape}"))
            return []
        stated = self.info.get("NbFrame")
        if stated is not None and int(stated) != shape[3]:
            skipped.append(Skipped(image, f"holds {shape[3]} frames, Info.cfg says {stated}; the file decides"))
        known = {int(self.info["ED"]) - 1, int(self.info["ES"]) - 1}
        return [self.row(image, None, frame=frame) for frame in range(shape[3]) if frame not in known]


def _patients(root: Path) -> list[tuple[Path, str | None]]:
    """Patient folders with the split that their parent folder states, or None."""
    for base in (root, root / "database"):
        parts = [(base / name, split) for name, split in _SPLITS if (base / name).is_dir()]
        if parts:
            return [(folder, split) for part, split in parts for folder in _sorted_patients(part)]
    split = dict(_SPLITS).get(root.resolve().name)
    return [(folder, split) for folder in _sorted_patients(root)]


def _sorted_patients(parent: Path) -> list[Path]:
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and _PATIENT.match(folder.name))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
