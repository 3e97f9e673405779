"""Pure functions of embeddings: each file holds one family.

Inputs are raw embeddings; every function normalises where its definition does, computes in float32 or wider whatever
autocast says, and never communicates between processes (gather first, see `medssl.core.distributed`).
"""

from medssl.losses.contrastive import global_contrastive, nt_xent
from medssl.losses.local import local_contrastive
from medssl.losses.numerics import EmptyComparisonWarning
from medssl.losses.regions import all_others, nearest_negatives, region_corners

__all__ = [
    "EmptyComparisonWarning",
    "all_others",
    "global_contrastive",
    "local_contrastive",
    "nearest_negatives",
    "nt_xent",
    "region_corners",
]
