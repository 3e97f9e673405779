"""Check a manifest against its files: every problem in one pass, whatever the files are like.

The header pass opens each file for a few hundred bytes; the deep pass reads and decompresses every voxel, which alone
finds damage inside a file. ``CODES`` lists what can be reported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Final

import pandas as pd
from joblib import Parallel, delayed

from medssl.data.features import is_feature_file
from medssl.data.integrity_features import inspect_features
from medssl.data.integrity_files import CODES, Finding, Inspection, Task, inspect
from medssl.data.manifest import Manifest

__all__ = ["CODES", "Finding", "Summary", "check_manifest"]

_log = logging.getLogger(__name__)

SHOWN_PER_CODE: Final = 20
MANY_NOTES: Final = 5


@dataclass(frozen=True)
class Summary(Sequence[Finding]):
    """Result of a check; also a sequence of its findings, errors first, then in the order of lines.

    Attributes:
        findings: Everything that was found.
        n_volumes, n_groups, n_labelled: What the manifest holds.
        deep: Whether voxels were read.
    """

    findings: tuple[Finding, ...]
    n_volumes: int
    n_groups: int
    n_labelled: int
    deep: bool
    by_code: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(finding.code for finding in self.findings)
        object.__setattr__(self, "by_code", {code: counts[code] for code in CODES if counts[code]})

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def n_errors(self) -> int:
        """Findings that training must not start with."""
        return sum(finding.is_error for finding in self.findings)

    @property
    def n_warnings(self) -> int:
        """Findings that are worth knowing."""
        return len(self.findings) - self.n_errors

    def table(self) -> pd.DataFrame:
        """One row per finding: code, row (line of the manifest), file, message, fix."""
        columns = ["code", "row", "file", "message", "fix"]
        return pd.DataFrame([[getattr(one, name) for name in columns] for one in self.findings], columns=columns)

    def lines(self) -> list[str]:
        """The check in words, at most 20 findings of a code."""
        text = [f"{self.n_volumes} volumes of {self.n_groups} groups, {self.n_labelled} with labels"]
        for code, count in self.by_code.items():
            text.append(f"{code} ({count}): {CODES[code]}")
            shown = [finding for finding in self.findings if finding.code == code][:SHOWN_PER_CODE]
            text += [f"  line {one.row}: {one.message} ({one.file})" for one in shown]
            text += [f"  ... and {count - SHOWN_PER_CODE} more"] if count > SHOWN_PER_CODE else []
            text.append(f"  fix: {shown[0].fix}")
        passed = "headers and voxels" if self.deep else "headers only; --deep reads the voxels too"
        text.append(f"{self.n_errors} errors, {self.n_warnings} warnings ({passed})")
        return text

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "n_volumes": self.n_volumes,
            "n_groups": self.n_groups,
            "n_labelled": self.n_labelled,
            "deep": self.deep,
            "n_errors": self.n_errors,
            "n_warnings": self.n_warnings,
            "by_code": self.by_code,
            "findings": self.table().to_dict(orient="records"),
        }


def check_manifest(
    manifest: Manifest,
    *,
    deep: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Check every file that a manifest names. A bad file never stops the check.

    Args:
        manifest: As read (its own problems are reported by reading it).
        deep: Read all voxels as well: finds damage, NaN, duplicates under other names and unknown label values. Of
            feature tables, which are read whole anyway, look at the values too.
        jobs: Volumes read at the same time, each in a process of its own if more than 1. A process that a file brings
            down becomes the finding E-CRASHED, for which that file is read once more alone.
        progress: Called with the number of volumes done and the number of all.

    Returns:
        The findings, errors first. Memory use is that of ``jobs`` volumes, of at most 1 GiB of voxels a file.
    """
    tasks = _tasks(manifest, deep)
    in_tables = [task for task in tasks if len(task.images) == 1 and is_feature_file(task.images[0])]
    rows = {task.volume for task in in_tables}
    inspections = inspect_features(in_tables, manifest.meta.features or None)
    for inspection in _inspect_all([task for task in tasks if task.volume not in rows], jobs if deep else 1):
        inspections.append(inspection)
        if progress is not None:
            progress(len(inspections), len(tasks))
    inspections.sort(key=lambda one: one.volume)
    findings = [finding for one in inspections for finding in one.findings]
    findings += _gathered_notes([note for one in inspections for note in one.notes])
    findings += _repeated_rows(manifest, tasks)
    findings += _repeated_voxels(manifest, tasks, inspections)
    findings += _mixed(manifest, tasks, inspections)
    findings.sort(key=lambda one: (not one.is_error, one.row))
    table = manifest.table
    n_labelled = int(table["label"].notna().sum())
    return Summary(tuple(findings), len(table), int(table["group"].nunique()), n_labelled, deep)


def _tasks(manifest: Manifest, deep: bool) -> list[Task]:
    known = frozenset(manifest.meta.label_names)
    if known:
        known |= frozenset(manifest.label_aliases)
    frames = manifest.table["frame"]
    return [
        Task(
            volume=volume,
            row=manifest.line(volume),
            images=tuple(manifest.image_paths(volume)),
            label=manifest.label_path(volume),
            frame=None if pd.isna(frame) else int(frame),
            channels=manifest.channels(volume),
            label_values=known,
            deep=deep,
        )
        for volume, frame in zip(manifest.table["volume"].tolist(), frames)
    ]


def _inspect_all(tasks: Sequence[Task], jobs: int) -> Iterator[Inspection]:
    """Inspections in any order; one for every task, even if a file brings its process down."""
    if jobs == 1:
        yield from map(inspect, tasks)
        return
    left = {task.volume: task for task in tasks}
    try:
        # Handed over one by one as they finish: what has been read is gone before the next volume comes.
        for one in Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(inspect)(task) for task in tasks):
            del left[one.volume]
            yield one
    except BrokenProcessPool:  # joblib's own error is one
        _log.warning("a process that read volumes was ended; the remaining %d are read one at a time", len(left))
        for task in left.values():
            yield _inspect_alone(task)


def _inspect_alone(task: Task) -> Inspection:
    try:
        return Parallel(n_jobs=2)([delayed(inspect)(task)])[0]  # with n_jobs=1 it would run in this process
    except BrokenProcessPool:
        message = "the process that read this volume was ended, perhaps for lack of memory"
        fix = "check the size of the file; leave the volume out, or check on a machine with more memory"
        return Inspection(task.volume, [Finding("E-CRASHED", task.row, str(task.images[0]), message, fix)])


def _gathered_notes(notes: Sequence[Finding]) -> list[Finding]:
    """Notes as they are, but one for all files where many say the same."""
    counts = Counter(note.message for note in notes)
    result: list[Finding] = []
    done: set[str] = set()
    for note in notes:
        count = counts[note.message]
        if count <= MANY_NOTES:
            result.append(note)
        elif note.message not in done:
            done.add(note.message)
            message = f"{note.message}; the same in {count - 1} more files"
            result.append(Finding(note.code, note.row, note.file, message, note.fix))
    return result


def _repeated_rows(manifest: Manifest, tasks: Sequence[Task]) -> list[Finding]:
    """Rows that name the same image again: found without opening a file."""
    group_of = dict(zip(manifest.table["volume"], manifest.table["group"]))
    first: dict[tuple[Any, ...], Task] = {}
    findings = []
    for task in tasks:
        other = first.setdefault((tuple(path.absolute() for path in task.images), task.frame), task)
        if other is task:
            continue
        message = f"the image of line {other.row} again"
        if group_of[task.volume] != group_of[other.volume]:
            code, message = "E-DUPLICATE-IMAGE", f"{message}, in another group ({group_of[other.volume]})"
        else:
            code = "E-DUPLICATE-ROW" if task.label == other.label else "W-DUPLICATE-IMAGE"
        findings.append(Finding(code, task.row, str(task.images[0]), message, "remove one of the two rows"))
    return findings


def _repeated_voxels(manifest: Manifest, tasks: Sequence[Task], inspections: Sequence[Inspection]) -> list[Finding]:
    """Voxel-identical images and label maps in different files."""
    group_of = dict(zip(manifest.table["volume"], manifest.table["group"]))
    task_of = {task.volume: task for task in tasks}
    images: dict[str, Task] = {}
    labels: dict[str, Task] = {}
    findings = []
    for one in inspections:
        task = task_of[one.volume]
        for number, image_hash in enumerate(one.image_hashes):
            path = task.images[min(number, len(task.images) - 1)]
            other = images.setdefault(image_hash, task)
            if other is task or (path in other.images and task.frame == other.frame):
                continue  # the same file again is reported by its path
            apart = group_of[task.volume] != group_of[other.volume]
            where = f"line {other.row}, {other.images[0].name}, group {group_of[other.volume]}"
            findings.append(
                Finding(
                    "E-DUPLICATE-IMAGE" if apart else "W-DUPLICATE-IMAGE",
                    task.row,
                    str(path),
                    f"the same {one.what} as {where}",
                    "find out whose image it is and remove the other row, or give both the same group",
                )
            )
        if one.label_hash is None:
            continue
        other = labels.setdefault(one.label_hash, task)
        if other.label != task.label:
            message = f"the same label map as line {other.row} in another file ({other.label})"
            fix = "check that the label map belongs to this image"
            findings.append(Finding("W-DUPLICATE-LABEL", task.row, str(task.label), message, fix))
    return findings


def _mixed(manifest: Manifest, tasks: Sequence[Task], inspections: Sequence[Inspection]) -> list[Finding]:
    """Properties in which the volumes differ, one finding each, at the first volume that is unlike the most."""
    task_of = {task.volume: task for task in tasks}
    kinds = (
        ("W-CHANNELS", "channels", "n_channels", "choose the same channels for every volume"),
        ("W-SPACING", "voxel sizes in mm", "spacing", "set prepare.spacing in the configuration"),
        ("W-ORIENTATION", "orientations", "orientation", "nothing to do: reading brings all into one orientation"),
    )
    findings = []
    for code, what, name, fix in kinds:
        values = [(one.volume, getattr(one, name)) for one in inspections if getattr(one, name)]
        counts = Counter(value for _, value in values)
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        odd = task_of[next(volume for volume, value in values if value != usual)]
        shown = ", ".join(f"{_shown(value)} ({count})" for value, count in counts.most_common(5))
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        findings.append(Finding(code, odd.row, str(odd.images[0]), f"{len(counts)} {what}: {shown}{more}", fix))
    return findings


def _shown(value: Any) -> str:
    return " x ".join(f"{length:g}" for length in value) if isinstance(value, tuple) else str(value)
