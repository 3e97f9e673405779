"""One validated configuration of a whole run."""

from medssl.config.age_site import AgeSiteProtocol, ArmCombat
from medssl.config.compare import CompareArm, CompareConfig
from medssl.config.load import CONFIGS, dump_config, load_any, load_config
from medssl.config.models import (
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
    "AgeSiteProtocol",
    "ArmCombat",
    "ArmConfig",
    "CompareArm",
    "CompareConfig",
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
