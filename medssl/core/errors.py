"""Errors that say what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedsslError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        message: What is wrong, in one line.
        where: The place: file, row, key, subject.
        found: What was found there, when that helps.
        fix: What to do about it.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.where, self.found, self.fix = message, where, found, fix

    def __str__(self) -> str:
        lines = [self.message]
        for name in ("where", "found", "fix"):
            value = getattr(self, name)
            if value:
                lines.append(f"  {name + ':':<7}{value}")
        return "\n".join(lines)


class ConfigError(MedsslError):
    """A configuration, option or argument that cannot be used."""

    exit_code = 2


class DataError(MedsslError):
    """A manifest, volume or split that cannot be used."""

    exit_code = 3


class ShapeError(MedsslError, ValueError):
    """Tensors whose shapes do not fit the function they were given to."""


class InputError(MedsslError, ValueError):
    """A value outside the domain of a function (a NaN label, a batch of one where two are needed)."""


class WeightsError(MedsslError):
    """Weights or a checkpoint that cannot be read or do not fit the model."""


class CheckpointError(WeightsError):
    """No checkpoint of a run can be trusted, or resuming would not continue the same run."""


class TrainingError(MedsslError):
    """Training stopped because going on would be useless (a loss that is not finite, no memory)."""


class DiskError(MedsslError):
    """A file could not be written; what was there before is untouched."""


class Interrupted(MedsslError):  # noqa: N818 - not a fault: the run was asked to stop and can go on
    """A run was asked to stop, saved its state and can be resumed."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``Did you mean `gcl`?`` followed by the known names; the hint is left out when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean `{close[0]}`? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
