"""The fine-tunings of a few-label comparison: every arm, encoder, draw of labels and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medssl.config import FinetuneConfig
from medssl.config.compare import UPPER_BOUND, CompareConfig
from medssl.data.splits import LabelDraw
from medssl.runs.few_label_pretraining import PretrainCell
from medssl.runs.finetune import CellRunner
from medssl.runs.grid import Cell, Result
from medssl.runs.leaks import LeakCheck
from medssl.runs.volumes import Cohort


@dataclass(frozen=True)
class FewLabelCell:
    """One fine-tuning: an arm on an encoder, a number of labelled volumes, a draw of them and a seed."""

    arm: str
    encoder: str
    n_labelled: int
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Folder name of the cell."""
        return f"{self.arm}@{self.encoder}-n{self.n_labelled}-draw{self.draw}-seed{self.seed}"

    @property
    def pretraining(self) -> PretrainCell:
        """What it begins from."""
        return PretrainCell(self.arm, self.encoder, self.seed)


@dataclass(frozen=True)
class FewLabelRunner:
    """Computes one fine-tuning of a comparison, as a fine-tuning grid does; picklable.

    Attributes:
        config: The plan.
        cohort: The volumes of fine-tuning.
        draws: By (n_labelled, draw).
        weights: Run folder of each pretraining that is done.
        folder: The plan's run folder.
        allow_changed: Go on with one that was begun with other settings.
    """

    config: CompareConfig
    cohort: Cohort
    draws: dict[tuple[int, int], LabelDraw]
    weights: Mapping[PretrainCell, Path]
    folder: Path
    allow_changed: bool = False

    def __call__(self, cell: FewLabelCell, folder: Path) -> Result:
        """Fine-tune, score and keep the network."""
        runner, inner = self.alone(cell)
        return runner(inner, folder)

    def key(self, cell: FewLabelCell) -> str:
        """Fingerprint of everything that determines the cell's result."""
        runner, inner = self.alone(cell)
        return runner.key(inner)

    def alone(self, cell: FewLabelCell) -> tuple[CellRunner, Cell]:
        """The cell as one of a fine-tuning grid with its arm alone."""
        scratch = cell.arm == UPPER_BOUND or not self.config.arm(cell.arm).pretrainings
        name = self.config.baseline if cell.arm == UPPER_BOUND else cell.arm
        weights = None if scratch else self.weights[cell.pretraining]
        config = self.config.finetuning(cell.encoder, (cell.seed,), {name: weights})
        runner = CellRunner(config, self.cohort, self.draws, self.folder, self.allow_changed)
        return runner, Cell(cell.arm, cell.n_labelled, cell.draw, cell.seed)

    def ready(self, cell: FewLabelCell) -> bool:
        """Whether there is what it begins from."""
        needed = cell.arm != UPPER_BOUND and self.config.arm(cell.arm).pretrainings
        return not needed or cell.pretraining in self.weights


@dataclass
class FewLabelPlan:
    """An opened plan: whom it trains and scores on, and everything that is to be computed."""

    config: CompareConfig
    tuning: FinetuneConfig
    cohort: Cohort
    draws: dict[tuple[int, int], LabelDraw]
    pretrainings: list[PretrainCell]
    cells: list[FewLabelCell]
    people: str
    leaks: LeakCheck
    notes: list[str] = field(default_factory=list)


def plan_cells(config: CompareConfig, draws: Iterable[tuple[int, int]]) -> list[FewLabelCell]:
    """All fine-tunings; arms side by side, so that a stopped run can already be compared."""
    protocol = config.protocol
    cells = [
        FewLabelCell(arm.name, encoder, n, draw, seed)
        for seed in protocol.seeds
        for draw in sorted({draw for _, draw in draws if draw > 0})
        for encoder in config.encoders
        for n in sorted(protocol.n_labelled)
        for arm in config.arms
    ]
    everything = [n for n, draw in draws if draw == 0]
    return cells + [
        FewLabelCell(UPPER_BOUND, encoder, n, 0, protocol.seeds[0]) for encoder in config.encoders for n in everything
    ]
