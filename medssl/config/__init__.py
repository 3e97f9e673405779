"""One validated configuration of a whole run."""

from medssl.config.load import dump_config, load_any, load_config
from medssl.config.models import (
    CONFIGS,
    ArmConfig,
    DataConfig,
    FinetuneConfig,
    GridConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
)

__all__ = [
    "CONFIGS",
    "ArmConfig",
    "DataConfig",
    "FinetuneConfig",
    "GridConfig",
    "ModelConfig",
    "PretrainConfig",
    "RunConfig",
    "dump_config",
    "load_any",
    "load_config",
]
