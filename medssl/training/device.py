"""Device, precision and processes, decided before anything is read."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from medssl.core import distributed
from medssl.core.errors import ConfigError
from medssl.core.types import Method, ViewBatch
from medssl.training.config import TrainingConfig


def has_bf16() -> bool:
    """Whether the GPU computes bfloat16 itself (compute capability 8.0 and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def resolve_accelerator(settings: TrainingConfig) -> str:
    """ "cuda" or "cpu". Raises ConfigError when a GPU is asked for and there is none, or too few."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.accelerator == "gpu" and found == 0:
        raise ConfigError(
            "a GPU is asked for, but PyTorch finds none",
            where="training.accelerator: gpu",
            fix="check nvidia-smi and that PyTorch was installed with CUDA, or set training.accelerator: auto",
        )
    kind = "cuda" if found and settings.accelerator != "cpu" else "cpu"
    if kind == "cuda" and settings.devices > found:
        raise ConfigError(f"{settings.devices} GPUs are asked for, but PyTorch finds {found}", where="training.devices")
    return kind


def resolve_precision(settings: TrainingConfig, accelerator: str) -> str:
    """Fabric's name of the precision. Raises ConfigError for bf16 where it would be emulated.

    bfloat16 on a CPU ran 8 times slower than float32; nobody wants that by accident.
    """
    able = accelerator == "cuda" and has_bf16()
    if settings.precision == "bf16" and not able:
        raise ConfigError(
            f"bf16 is not computed natively by this {'GPU' if accelerator == 'cuda' else 'CPU'}",
            where="training.precision: bf16",
            fix="set training.precision: auto, which takes bf16 where it helps and 32 elsewhere",
        )
    return "bf16-mixed" if able and settings.precision != "32" else "32-true"


def build_fabric(settings: TrainingConfig) -> Fabric:
    """Fabric with processes launched. Call it first thing: with several devices each process starts from here.

    Buffers are not broadcast: every process computes the same ones (synchronised norms, gathered queues).

    Raises:
        ConfigError: A device or precision that this machine does not have.
    """
    accelerator = resolve_accelerator(settings)
    precision = resolve_precision(settings, accelerator)
    several = settings.devices * settings.nodes > 1 or settings.strategy == "ddp"
    strategy: Any = "auto"
    if several:  # a process that hangs ends the job after ten minutes instead of holding its allocation
        strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=True, timeout=timedelta(minutes=10))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(GPU available but not used|does not have many workers).*")
        fabric = Fabric(
            accelerator=accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            precision=precision,  # type: ignore[arg-type]  # one of Fabric's literals
            strategy=strategy,
        )
        fabric.launch()
    return fabric


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed the generators that networks draw from themselves (dropout), as ``torch.manual_seed`` does.

    That one also notes a call for every accelerator that was not started yet, with a traceback, and keeps all of them:
    0.3 ms and some memory a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def largest_anywhere(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over processes; ``device`` is what they talk with."""
    if distributed.world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


class Batch:
    """Carries a batch through wrappers that walk into dataclasses and refuse frozen ones."""

    def __init__(self, value: ViewBatch) -> None:
        self.value = value


class LossModule(nn.Module):
    """A method whose loss is its ``forward``.

    Marking ``training_loss`` as a forward method would do with several processes; with one, Fabric then calls the
    method itself and its precision (autocast) is skipped without a word.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Loss, logs and embedding of the batch, as plain containers."""
        output = self.method.training_loss(batch.value)
        return output.loss, dict(output.logs), output.embedding
