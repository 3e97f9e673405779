"""Which items form the batch of step t: pure functions of (seed, step), split by rank."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from medssl.samplers.base import Sampler
from medssl.samplers.cluster_balanced import ClusterBalancedConfig, ClusterBalancedSampler
from medssl.samplers.few_label import FewLabelConfig, FewLabelSampler
from medssl.samplers.partition import (
    PartitionConfig,
    PartitionPairsConfig,
    PartitionPairsSampler,
    PartitionSampler,
)
from medssl.samplers.random import RandomConfig, RandomSampler
from medssl.samplers.site_balanced import (
    AgeSiteBalancedConfig,
    AgeSiteBalancedSampler,
    SiteBalancedConfig,
    SiteBalancedSampler,
)

SAMPLERS: Final[Mapping[str, type[Sampler]]] = MappingProxyType(
    {
        "random": RandomSampler,
        "partition": PartitionSampler,
        "partition_pairs": PartitionPairsSampler,
        "few_label": FewLabelSampler,
        "site_balanced": SiteBalancedSampler,
        "age_site_balanced": AgeSiteBalancedSampler,
        "cluster_balanced": ClusterBalancedSampler,
    }
)

__all__ = [
    "SAMPLERS",
    "AgeSiteBalancedConfig",
    "AgeSiteBalancedSampler",
    "ClusterBalancedConfig",
    "ClusterBalancedSampler",
    "FewLabelConfig",
    "FewLabelSampler",
    "PartitionConfig",
    "PartitionPairsConfig",
    "PartitionPairsSampler",
    "PartitionSampler",
    "RandomConfig",
    "RandomSampler",
    "Sampler",
    "SiteBalancedConfig",
    "SiteBalancedSampler",
]
