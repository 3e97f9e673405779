"""The leak guard: sets of one run must not share people or images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import pandas as pd

from medssl.core.errors import DataError
from medssl.data.manifest import Manifest


@dataclass(frozen=True)
class Leak:
    """One thing that two sets share. ``kind`` is group, subject, file or voxels; ``what`` names it."""

    kind: Literal["group", "subject", "file", "voxels"]
    what: str
    sets: tuple[str, str]

    def __str__(self) -> str:
        noun = "identical image" if self.kind == "voxels" else self.kind
        return f"{noun} {self.what} is in {self.sets[0]} and in {self.sets[1]}"


def refuse_leak(
    sets: Mapping[str, Manifest],
    *,
    transductive: bool = False,
    hashes: Mapping[Path, str] | None = None,
    voxels: Mapping[int, str] | None = None,
) -> list[Leak]:
    """Refuse sets of one run that share a group, a subject or an image.

    Equal ids count as one person unless the meta files name two different cohorts.

    Args:
        sets: Manifests by the name of their role, each to be disjoint from every other.
        transductive: Let leaks pass and return them, for the report. Meant for images of a pretraining that are tested
            on later: check the sets of a fine-tuning against each other in a call without it.
        hashes: Content hash by image path (as ``Manifest.image_paths`` gives it), for finding copies under other
            names. Paths without one are compared by path alone.
        voxels: Hash of the voxels by volume number, for sets that are rows of one manifest: tells frames of one file
            apart, and finds a frame that was saved as a file of its own.

    Returns:
        The leaks that were let pass; empty when there are none.

    Raises:
        DataError: A set is empty (whatever ``transductive`` says), or sets leak: every leak is named.
    """
    for name, manifest in sets.items():
        if len(manifest) == 0:
            raise DataError(
                f"the {name} set is empty",
                where=str(manifest.path),
                fix="check the split column, the fractions and the selection",
            )
    keys = {name: _identities(manifest, hashes or {}, voxels or {}) for name, manifest in sets.items()}
    leaks = []
    for one, other in combinations(sets, 2):
        cohorts = {sets[one].meta.cohort, sets[other].meta.cohort}
        same_people = "" in cohorts or len(cohorts) == 1
        for kind in ("group", "subject", "file", "voxels"):
            if kind in ("group", "subject") and not same_people:
                continue
            shared = sorted(set(keys[one][kind]) & set(keys[other][kind]))
            leaks += [Leak(kind, keys[one][kind][key], (one, other)) for key in shared]
    if leaks and not transductive:
        lines = [str(leak) for leak in leaks[:50]]
        lines += [f"... and {len(leaks) - 50} more"] if len(leaks) > 50 else []
        raise DataError(
            "the sets of this run leak into each other",
            where=", ".join(dict.fromkeys(str(manifest.path) for manifest in sets.values())),
            found="\n         ".join(lines),
            fix="split by group (medssl data split); for pretraining alone, data.transductive: true lets it pass",
        )
    return leaks


def _identities(manifest: Manifest, hashes: Mapping[Path, str], voxels: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """What identifies the content of a set, by kind: key to compare -> name to show."""
    table = manifest.table
    found: dict[str, dict[str, str]] = {
        "group": {str(group): str(group) for group in table["group"].unique()},
        "subject": {},
        "file": {},
        "voxels": {},
    }
    whole = found["group"]
    found["subject"] = {subject: subject for subject in table["subject"].unique() if subject not in whole}
    for volume, case, frame in zip(table["volume"], table["case"], table["frame"]):
        at = "" if pd.isna(frame) else f", frame {frame}"
        if int(volume) in voxels:
            found["voxels"][voxels[int(volume)]] = f"{case} ({manifest.image_paths(volume)[0]}{at})"
        for path in manifest.image_paths(volume):
            found["file"][f"{path.absolute()}{at}"] = f"{path}{at}"
            if path in hashes:
                found["voxels"][f"{hashes[path]}{at}"] = f"{case} ({path}{at})"
    return found
