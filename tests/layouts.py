"""Small cohorts on disk, laid out exactly as the real ones, for tests of any package.

Every writer returns the root that a user would name. Volumes are a few voxels large; labels hold every
value of the cohort.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

ACDC_SPACING = (1.316, 1.316, 10.0)
MMWHS_VALUES = (0, 205, 420, 500, 550, 600, 820, 850)


def save(
    path: Path, array: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), affine: np.ndarray | None = None
) -> Path:
    """Write a NIfTI file; `affine` is the sform where it shall differ from the qform, which holds the spacing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    true = np.diag([*spacing[:3], 1.0])
    image = nibabel.Nifti1Image(array, true)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(true, code=1)
    image.set_sform(true if affine is None else affine, code=1)
    if affine is not None:
        # set_sform may move pixdim; in the real files pixdim agrees with the qform.
        image.header["pixdim"][1:4] = spacing[:3]
    nibabel.save(image, path)
    return path


def voxels(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Blobs with noise, int16; other voxels for other seeds."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:3]), indexing="ij"))
    blob = np.exp(-3 * (grid**2).sum(0))
    if len(shape) == 4:
        blob = blob[..., None] * np.linspace(1, 0.7, shape[3])
    return np.rint(400 * blob + 40 * rng.random(shape) + 20 * (seed % 5)).astype(np.int16)


def label_map(shape: Sequence[int], values: Sequence[int]) -> np.ndarray:
    """Bands along the first axis, one per value, on a margin of background."""
    label = np.full(shape, values[0], np.int16)
    inner = shape[0] // len(values)
    for index, value in enumerate(values):
        label[index * inner : (index + 1) * inner, 1:-1] = value
    return label


def write_acdc(
    root: Path, n_training: int = 2, n_testing: int = 1, *, size: int = 16, n_slices: int = 8, n_frames: int = 4
) -> Path:
    """ACDC: training/ and testing/, ED frame 1, ES frame 3; the sform says 1 mm where the qform says 1.316."""
    people = [("training", n + 1) for n in range(n_training)] + [("testing", 101 + n) for n in range(n_testing)]
    groups = ("DCM", "HCM", "MINF", "NOR", "RV")
    for index, (part, number) in enumerate(people):
        name = f"patient{number:03d}"
        folder = root / part / name
        cine = voxels(number, (size, size, n_slices, n_frames))
        save(folder / f"{name}_4d.nii.gz", cine, ACDC_SPACING, np.eye(4))
        for frame in (1, 3):
            save(folder / f"{name}_frame{frame:02d}.nii.gz", cine[..., frame - 1], ACDC_SPACING, np.eye(4))
            gt = label_map((size, size, n_slices), (0, 1, 2, 3)).astype(np.uint8)
            save(folder / f"{name}_frame{frame:02d}_gt.nii.gz", gt, ACDC_SPACING, np.eye(4))
        lines = (
            "ED: 1",
            "ES: 3",
            f"Group: {groups[index % 5]}",
            "Height: 184.0",
            f"NbFrame: {n_frames}",
            "Weight: 95.0",
        )
        (folder / "Info.cfg").write_text("\n".join(lines) + "\n")
    (root / "MANDATORY_CITATION.md").write_text("Please cite.\n")
    return root


def write_msd(
    root: Path, name: str, modality: Sequence[str], labels: Sequence[str], train: Sequence[str], test: Sequence[str]
) -> Path:
    """A Decathlon task with 4D files where there are several modalities, and macOS leftovers."""
    shape = (12, 14, 10)
    stacked = shape if len(modality) == 1 else (*shape, len(modality))
    for seed, case in enumerate([*train, *test]):
        folder = "imagesTr" if case in train else "imagesTs"
        save(root / folder / f"{case}.nii.gz", voxels(seed, stacked), (0.625, 0.625, 3.6))
        if case in train:
            label = label_map(shape, range(len(labels))).astype(np.uint8)
            save(root / "labelsTr" / f"{case}.nii.gz", label, (0.625, 0.625, 3.6))
    (root / "imagesTr" / f"._{train[0]}.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    listed = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in train]
    listed.append({"image": f"./imagesTr/._{train[0]}.nii.gz", "label": f"./labelsTr/._{train[0]}.nii.gz"})
    content = {
        "name": name.upper(),
        "description": name,
        "reference": "a test",
        "licence": "CC-BY-SA 4.0",
        "release": "1.0",
        "tensorImageSize": "4D" if len(modality) > 1 else "3D",
        "modality": {str(index): text for index, text in enumerate(modality)},
        "labels": {str(index): text for index, text in enumerate(labels)},
        "numTraining": len(train),
        "numTest": len(test),
        "training": listed,
        "test": [f"./imagesTs/{c}.nii.gz" for c in test],
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=1))
    return root


def write_msd_prostate(root: Path) -> Path:
    """Task 5: T2 and ADC in one 4D file, two digits in the names."""
    labels = ("background", "PZ", "TZ")
    return write_msd(
        root, "Prostate", ("T2", "ADC"), labels, ("prostate_00", "prostate_01", "prostate_10"), ("prostate_03",)
    )


def write_msd_hippocampus(root: Path) -> Path:
    """Task 4: volumes 3 and 4 are one person."""
    labels = ("background", "Anterior", "Posterior")
    train = ("hippocampus_001", "hippocampus_003", "hippocampus_004")
    return write_msd(root, "Hippocampus", ("MRI",), labels, train, ("hippocampus_002",))


def write_mmwhs(root: Path, n: int = 2) -> Path:
    """MR and CT training images with labels, one test image each; the first MR label holds the stray value 421."""
    shape = (16, 12, 10)
    for code, modality in enumerate(("mr", "ct")):
        for number in range(1001, 1001 + n):
            stem = root / f"{modality}_train" / f"{modality}_train_{number}"
            label = label_map(shape, MMWHS_VALUES)
            if modality == "mr" and number == 1001:
                label[0, 0, 0] = 421
            save(stem.with_name(f"{stem.name}_image.nii.gz"), voxels(10 * code + number, shape))
            save(stem.with_name(f"{stem.name}_label.nii.gz"), label)
        save(root / f"{modality}_test" / f"{modality}_test_2001_image.nii.gz", voxels(code, shape))
    return root


def write_openbhb(root: Path, n: int = 2) -> Path:
    """People of each split with a grey matter map (true shape, zeros but for a few voxels); two sites train."""
    lines = ["participant_id\tsex\tage\tsiteXacq\tsplit"]
    for index in range(3 * n):
        split = ("train", "internal_test", "external_test")[index // n]
        subject = str(100_000_000_001 + index)
        folder = root / ("train" if split == "train" else "val") / "derivatives" / f"sub-{subject}" / "ses-1"
        folder.mkdir(parents=True)
        brain = np.zeros((1, 121, 145, 121), np.float32)
        brain[:, 40:80, 50:90, 40:80] = np.random.default_rng(index).random((40, 40, 40))
        np.save(folder / f"sub-{subject}_preproc-cat12vbm_desc-gm_T1w.npy", brain)
        site = index % 2 if split != "external_test" else 2
        lines.append(f"{subject}\t{('male', 'female')[index % 2]}\t{20 + 5 * index}\t{site}\t{split}")
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


def write_bids(root: Path) -> Path:
    """Three people; the first has two sessions and a lesion map in derivatives; one age is not a number."""
    shape = (10, 12, 8)
    names = [
        ("sub-01", "ses-1", ("T1w", "FLAIR")),
        ("sub-01", "ses-2", ("T1w",)),
        ("sub-02", "", ("T1w", "FLAIR")),
        ("sub-03", "", ("acq-mprage_run-1_T1w",)),
    ]
    for seed, (subject, session, suffixes) in enumerate(names):
        prefix = "_".join(filter(None, (subject, session)))
        for number, suffix in enumerate(suffixes):
            folder = root / subject / session / "anat"
            save(folder / f"{prefix}_{suffix}.nii.gz", voxels(10 * seed + number, shape))
            (folder / f"{prefix}_{suffix}.json").write_text("{}")
    save(root / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz", voxels(99, (*shape, 3)))
    lesions = root / "derivatives" / "lesions" / "sub-01" / "ses-1" / "anat"
    save(lesions / "sub-01_ses-1_label-lesion_dseg.nii.gz", label_map(shape, (0, 1)))
    rows = [
        ("participant_id", "Age", "SEX", "site_id", "dx"),
        ("sub-01", "34.5", "F", "leuven", "MS"),
        ("sub-02", "n/a", "M", "gent", "n/a"),
        ("sub-03", "89+", "F", "gent", "control"),
    ]
    (root / "participants.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    description = {"Name": "Tiny", "BIDSVersion": "1.8.0", "License": "CC0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root


def write_nnunet(root: Path) -> Path:
    """Two training cases of two channels, one of which a third case lacks, and one test case."""
    shape = (12, 10, 8)
    for seed, case in enumerate(("case_001", "case_002", "case_003", "case_101")):
        folder = "imagesTs" if case == "case_101" else "imagesTr"
        for channel in range(1 if case == "case_003" else 2):
            save(root / folder / f"{case}_{channel:04d}.nii.gz", voxels(2 * seed + channel, shape))
        if folder == "imagesTr":
            save(root / "labelsTr" / f"{case}.nii.gz", label_map(shape, (0, 1, 2)))
    content = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "whole": [1, 2], "PZ": 1, "TZ": 2, "ignore": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def write_folder(root: Path) -> Path:
    """`images/<subject>_<session>_T1.nii.gz` with some label maps in `labels/`, and one other name."""
    shape = (10, 10, 8)
    for seed, (subject, session) in enumerate((("a", "s1"), ("a", "s2"), ("b", "s1"))):
        save(root / "images" / f"{subject}_{session}_T1.nii.gz", voxels(seed, shape))
        if session == "s1":
            save(root / "labels" / f"{subject}_{session}_seg.nii.gz", label_map(shape, (0, 1)))
    save(root / "images" / "scout.nii.gz", voxels(50, shape))
    (root / "notes.txt").write_text("notes\n")
    return root
