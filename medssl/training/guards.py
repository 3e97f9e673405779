"""Stopping where going on is useless: losses that are not finite, memory that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.core.errors import TrainingError
from medssl.core.files import write_json
from medssl.training.source import BatchSource
from medssl.training.state import all_finite

SHOWN_ITEMS = 16
Largest = Callable[[list[float]], list[float]]


def check_losses(losses: list[tuple[int, Tensor]], source: BatchSource, run_dir: Path, largest: Largest) -> None:
    """Stop at the first loss that is not finite, on every process together.

    Args:
        losses: (step, scalar) since the last look; fetched from the device at once.
        source: Names the items of the step.
        run_dir: ``logs/nonfinite_step-N.json`` gets all of them.
        largest: Largest value over processes.

    Raises:
        TrainingError: Names the step and its items.
    """
    if not losses:
        return
    values = torch.stack([loss.double().reshape(()) for _, loss in losses]).tolist()
    bad = [(step, value) for (step, _), value in zip(losses, values, strict=True) if not math.isfinite(value)]
    first = -largest([-float(bad[0][0]) if bad else -math.inf])[0]
    if math.isinf(first):
        return
    step = int(first)
    names = source.reader.describe(source.rows(step))
    found = next((value for at, value in bad if at == step), math.nan)
    if source.rank == 0:
        write_json(run_dir / "logs" / f"nonfinite_step-{step}.json", {"step": step, "loss": str(found), "items": names})
    more = f" and {len(names) - SHOWN_ITEMS} more" if len(names) > SHOWN_ITEMS else ""
    raise TrainingError(
        f"the loss is {found} at step {step}; the last checkpoint was kept",
        where="; ".join(names[:SHOWN_ITEMS]) + more,
        fix="look at these items (medssl data check --deep), lower optimizer.learning_rate, or set optimizer.clip_norm",
    )


def check_finite_state(module: nn.Module, step: int) -> None:
    """Refuse to save a state that is not finite over one that is. Raises TrainingError."""
    if not all_finite(module):
        raise TrainingError(
            f"weights are not finite after step {step}; this state was not saved, the last checkpoint was kept",
            fix="lower optimizer.learning_rate, or set optimizer.clip_norm",
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def no_memory(error: BaseException, device: torch.device, batch_size: int) -> TrainingError:
    """The error for memory that ran out at the first step: what was used, what to change."""
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        found = f"{peak:.1f} GiB in use at the peak, the GPU has {total:.1f} GiB"
    smaller = f"halve the batch (it has {batch_size} items)" if batch_size > 1 else "the batch has one item already"
    return TrainingError(
        "there is not enough memory for the first step",
        found=found,
        fix=f"{smaller}, make items smaller (data.prepare.size, items.depth), narrow the network (model.encoder), "
        "or use training.precision: bf16 on a GPU that has it",
    )
