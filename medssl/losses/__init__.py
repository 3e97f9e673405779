"""Pure functions of embeddings: each file holds one family.

Inputs are raw embeddings; every function normalises where its definition does, computes in float32 or wider whatever
autocast says, and never communicates between processes (gather first, see `medssl.core.distributed`).
"""

from medssl.losses.assignment import cluster_cross_entropy, k_means, sela_assignment
from medssl.losses.contrastive import decoupled_contrastive, global_contrastive, nt_xent
from medssl.losses.fairness import EnD, FairKL, end, fair_kl
from medssl.losses.iic import iic, iic_segmentation
from medssl.losses.labels import label_kernel
from medssl.losses.local import local_contrastive
from medssl.losses.momentum import byol, queue_info_nce
from medssl.losses.numerics import EmptyComparisonWarning
from medssl.losses.pixel import pixel_contrast, ultrametric_tree
from medssl.losses.redundancy import barlow_twins, vicreg
from medssl.losses.regions import all_others, nearest_negatives, region_corners
from medssl.losses.sinkhorn import sinkhorn_knopp
from medssl.losses.supcon import sup_con, sup_info_nce
from medssl.losses.swav import swav
from medssl.losses.uniformity import alignment, decoupled_uniformity, uniformity
from medssl.losses.weak import l_exp, l_thr, y_aware

__all__ = [
    "EmptyComparisonWarning",
    "EnD",
    "FairKL",
    "alignment",
    "all_others",
    "barlow_twins",
    "byol",
    "cluster_cross_entropy",
    "decoupled_contrastive",
    "decoupled_uniformity",
    "end",
    "fair_kl",
    "global_contrastive",
    "iic",
    "iic_segmentation",
    "k_means",
    "l_exp",
    "l_thr",
    "label_kernel",
    "local_contrastive",
    "nearest_negatives",
    "nt_xent",
    "pixel_contrast",
    "queue_info_nce",
    "region_corners",
    "sela_assignment",
    "sinkhorn_knopp",
    "sup_con",
    "sup_info_nce",
    "ultrametric_tree",
    "swav",
    "uniformity",
    "vicreg",
    "y_aware",
]
