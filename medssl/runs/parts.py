"""Parts of a comparison: what one of several array jobs computes in a run folder that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from medssl.core.errors import ConfigError

Stage = Literal["pretraining", "cells"]
AnyCell = TypeVar("AnyCell")


@dataclass(frozen=True)
class Part:
    """Which of a plan's cells are computed here: all of a stage, or every ``of``-th of them from ``index`` on."""

    stage: Stage
    index: int = 1
    of: int = 1

    def of_cells(self, cells: Sequence[AnyCell]) -> list[AnyCell]:
        """The cells of this part."""
        return list(cells[self.index - 1 :: self.of])


@dataclass(frozen=True)
class PartDone:
    """What one part of a plan computed; ``failed``: the error of each cell that failed, by its name."""

    part: Part
    folder: Path
    n_cells: int
    failed: Mapping[str, str]

    def text(self) -> str:
        """For people."""
        part = self.part
        lines = [f"{part.stage}, part {part.index} of {part.of}: {self.n_cells} cells are finished in {self.folder}"]
        lines += [f"FAILED {name}: {error}" for name, error in self.failed.items()]
        return "\n".join([*lines, "When every part is done, --resume without --part aggregates and reports."])

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        part = self.part
        return {
            "stage": part.stage,
            "part": f"{part.index}/{part.of}",
            "cells": self.n_cells,
            "failed": dict(self.failed),
            "folder": str(self.folder),
        }


def read_part(stage: str | None, part: str | None) -> Part | None:
    """The part that `--stage` and `--part` name; None: everything, aggregated and reported.

    Raises:
        ConfigError: Not of the form I/N with 1 <= I <= N, or a part without its stage.
    """
    if stage is None and part is None:
        return None
    if stage is None:
        raise ConfigError("--part divides a stage", fix="add --stage pretraining or --stage cells")
    if stage not in ("pretraining", "cells"):
        raise ConfigError(f"there is no stage `{stage}`", fix="use --stage pretraining or --stage cells")
    index, _, of = (part or "1/1").partition("/")
    if not (index.isdecimal() and of.isdecimal()) or not 1 <= int(index) <= int(of):
        raise ConfigError(f"--part takes I/N with I from 1 to N, not `{part}`", fix="for example --part 3/18")
    return Part("pretraining" if stage == "pretraining" else "cells", int(index), int(of))
