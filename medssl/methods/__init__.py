"""Pretraining methods and tasks by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from medssl.methods.entry import MethodEntry
from medssl.methods.gcl import GCL, GCLConfig
from medssl.methods.lcl import LCL, LCLConfig
from medssl.methods.segmentation import Segmentation, SegmentationConfig
from medssl.methods.simclr import SimCLR, SimCLRConfig

METHODS: Final[Mapping[str, MethodEntry]] = MappingProxyType(
    {
        "simclr": MethodEntry(
            SimCLRConfig, SimCLR, "two views attract, other images repel", "Chen et al. 2020 (arXiv:2002.05709)"
        ),
        "gcl": MethodEntry(
            GCLConfig,
            GCL,
            "global contrast of volumes cut into partitions; pretrains the encoder",
            "Chaitanya et al. 2020 (arXiv:2006.10511)",
        ),
        "lcl": MethodEntry(
            LCLConfig,
            LCL,
            "local contrast of regions; pretrains decoder blocks on a frozen encoder",
            "Chaitanya et al. 2020 (arXiv:2006.10511)",
        ),
    }
)
"""Pretraining methods."""

TASKS: Final[Mapping[str, MethodEntry]] = MappingProxyType(
    {
        "segmentation": MethodEntry(
            SegmentationConfig,
            Segmentation,
            "voxel classes by Dice and cross-entropy, with optional Mixup",
            "Chaitanya et al. 2020 (arXiv:2006.10511)",
        ),
    }
)
"""Fine-tuning tasks."""

__all__ = ["METHODS", "TASKS", "MethodEntry"]
