"""The guard between pretrained weights and the people who are evaluated: pretraining counts as training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medssl.core.errors import DataError
from medssl.data.manifest import Manifest
from medssl.data.splits import Leak, refuse_leak
from medssl.models import read_model
from medssl.runs.volumes import FINGERPRINT_DIGITS, Cohort, pretraining_manifests, with_absolute_paths

_SHOWN = 20


@dataclass(frozen=True)
class LeakCheck:
    """What the guard against leaks let pass or could not see.

    Attributes:
        n_groups: Evaluated groups that were pretrained on (allowed by ``transductive`` only).
        notes: One line each; also what could not be checked.
    """

    n_groups: int
    notes: tuple[str, ...]


def check_weights(
    weights: Mapping[str, Path], cohort: Cohort, evaluated: Manifest, *, role: str, transductive: bool
) -> LeakCheck:
    """Refuse weights that were pretrained on evaluated people or images, however many pretrainings ago.

    Args:
        weights: Run folder or weights folder by the name of the arm that begins from it.
        cohort: Holds the evaluated volumes.
        evaluated: Who is evaluated.
        role: What the evaluated people are called in messages, such as ``test``.
        transductive: Let leaks pass and count them.

    Raises:
        DataError: A leak, and not ``transductive``.
    """
    notes: list[str] = []
    groups: set[str] = set()
    for arm, path in weights.items():
        pretrained = pretraining_manifests(path)
        notes += _shared_images(arm, path, cohort, evaluated, transductive=transductive)
        if not pretrained:
            notes.append(f"`{arm}`: no manifest beside the weights; only identical images could be looked for")
        found: dict[str, Leak] = {}
        for number, one in enumerate(pretrained):
            name = f"the pretraining of `{arm}`" + (f", {number} before its last" if number else "")
            sets = {name: one, role: with_absolute_paths(evaluated)}
            for leak in refuse_leak(sets, transductive=transductive):
                found.setdefault(f"{leak.kind} {leak.what}", leak)
        groups |= {leak.what for leak in found.values() if leak.kind == "group"}
        notes += [str(leak) for leak in found.values()]
    return LeakCheck(len(groups), tuple(notes))


def _shared_images(arm: str, weights: Path, cohort: Cohort, evaluated: Manifest, *, transductive: bool) -> list[str]:
    """Evaluated images whose voxels (or rows of features) the weights say they were pretrained on."""
    seen = set(read_model(weights)["info"].get("pretrained_on", ()))
    shared = [
        cohort.store.case(int(volume))
        for volume in evaluated.table["volume"]
        if cohort.store.voxels(int(volume))[:FINGERPRINT_DIGITS] in seen
    ]
    if shared and not transductive:
        raise DataError(
            f"the weights of `{arm}` were pretrained on images that are evaluated",
            where=str(weights),
            found=", ".join(shared[:_SHOWN]) + (f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""),
            fix="pretrain without them, or set data.transductive: true if that is what you study",
        )
    return [f"image of {case} was in the pretraining of `{arm}`" for case in shared]
