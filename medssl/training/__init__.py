"""The training loop, its optimisers, checkpoints and logs."""

from medssl.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from medssl.training.device import build_fabric
from medssl.training.entry import train
from medssl.training.result import TrainResult
from medssl.training.source import BatchSource

__all__ = [
    "BatchSource",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainResult",
    "TrainingConfig",
    "build_fabric",
    "train",
]
