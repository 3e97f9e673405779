"""Pretraining methods and tasks by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from medssl.methods.align_uniform import AlignUniform, AlignUniformConfig
from medssl.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from medssl.methods.byol import BYOL, BYOLConfig
from medssl.methods.dcl import DCL, DCLConfig
from medssl.methods.debias import DebiasConfig, Debiased, EnDConfig, FairKLConfig, TargetConfig, with_debias
from medssl.methods.decoupled_uniformity import DecoupledUniformity, DecoupledUniformityConfig
from medssl.methods.deepcluster import DeepCluster, DeepClusterConfig
from medssl.methods.entry import MethodEntry
from medssl.methods.gcl import GCL, GCLConfig
from medssl.methods.hierarchical_grouping import HierarchicalGrouping, HierarchicalGroupingConfig
from medssl.methods.iic_segmentation import IICSegmentation, IICSegmentationConfig
from medssl.methods.l_exp import LExp, LExpConfig
from medssl.methods.l_thr import LThr, LThrConfig
from medssl.methods.lcl import LCL, LCLConfig
from medssl.methods.moco import MoCo, MoCoConfig
from medssl.methods.models_genesis import ModelsGenesis, ModelsGenesisConfig
from medssl.methods.segmentation import Segmentation, SegmentationConfig
from medssl.methods.sela import SeLa, SeLaConfig
from medssl.methods.simclr import SimCLR, SimCLRConfig
from medssl.methods.sup_info_nce import SupInfoNCE, SupInfoNCEConfig
from medssl.methods.supcon import SupCon, SupConConfig
from medssl.methods.supervised import Supervised, SupervisedConfig
from medssl.methods.swav import SwAV, SwAVConfig
from medssl.methods.targets import ClassificationConfig, RegressionConfig, TargetTask
from medssl.methods.vae import VAE, VAEConfig
from medssl.methods.vicreg import VICReg, VICRegConfig
from medssl.methods.y_aware import YAware, YAwareConfig

METHODS: Final[Mapping[str, MethodEntry]] = MappingProxyType(
    {
        "simclr": MethodEntry(
            SimCLRConfig, SimCLR, "two views attract, other images repel", "Chen et al. 2020 (arXiv:2002.05709)"
        ),
        "dcl": MethodEntry(
            DCLConfig,
            DCL,
            "SimCLR without the positive in the denominator, for small batches",
            "Yeh et al. 2022 (arXiv:2110.06848)",
        ),
        "align_uniform": MethodEntry(
            AlignUniformConfig,
            AlignUniform,
            "views attract, items spread evenly over the sphere",
            "Wang & Isola 2020 (arXiv:2005.10242)",
        ),
        "barlow_twins": MethodEntry(
            BarlowTwinsConfig,
            BarlowTwins,
            "each dimension agrees between views and with no other dimension",
            "Zbontar et al. 2021 (arXiv:2103.03230)",
        ),
        "vicreg": MethodEntry(
            VICRegConfig,
            VICReg,
            "views agree, dimensions keep their variance and do not covary",
            "Bardes et al. 2022 (arXiv:2105.04906)",
        ),
        "moco": MethodEntry(
            MoCoConfig,
            MoCo,
            "contrast with a queue of a slow teacher's keys; other items of a subject do not repel",
            "He et al. 2020 (arXiv:1911.05722)",
        ),
        "byol": MethodEntry(
            BYOLConfig,
            BYOL,
            "a view predicts what a slow teacher makes of the other; nothing repels",
            "Grill et al. 2020 (arXiv:2006.07733)",
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
        "supcon": MethodEntry(
            SupConConfig, SupCon, "items of one class attract", "Khosla et al. 2020 (arXiv:2004.11362)"
        ),
        "sup_info_nce": MethodEntry(
            SupInfoNCEConfig,
            SupInfoNCE,
            "items of one class attract by a margin, compared with negatives alone",
            "Barbano et al. 2023 (arXiv:2211.05568)",
        ),
        "y_aware": MethodEntry(
            YAwareConfig,
            YAware,
            "items attract by how alike their age and other weak labels are",
            "Dufumier et al. 2021 (arXiv:2106.08808)",
        ),
        "l_thr": MethodEntry(
            LThrConfig,
            LThr,
            "an item attracts others more than those less alike in age",
            "Barbano et al. 2023 (arXiv:2211.08326)",
        ),
        "l_exp": MethodEntry(
            LExpConfig,
            LExp,
            "items repel by how unlike they are in age",
            "Barbano et al. 2023 (arXiv:2211.08326)",
        ),
        "decoupled_uniformity": MethodEntry(
            DecoupledUniformityConfig,
            DecoupledUniformity,
            "centroids of views spread out, guided by weak labels or any embedding table",
            "Dufumier et al. 2023 (arXiv:2206.01646)",
        ),
        "swav": MethodEntry(
            SwAVConfig,
            SwAV,
            "views predict to which prototypes the batch assigns each other; small crops, queue",
            "Caron et al. 2020 (arXiv:2006.09882)",
        ),
        "hierarchical_grouping": MethodEntry(
            HierarchicalGroupingConfig,
            HierarchicalGrouping,
            "pixels attract by how early their regions join in a tree of boundaries",
            "Zhang & Maire 2020 (arXiv:2012.03044)",
        ),
        "supervised": MethodEntry(
            SupervisedConfig,
            Supervised,
            "age or another label by L1, squared error or cross-entropy: the baseline",
            "Barbano et al. 2023 (arXiv:2211.08326), Table 1",
        ),
        "iic_segmentation": MethodEntry(
            IICSegmentationConfig,
            IICSegmentation,
            "clusters places so that they stay the same in another view; pretrains encoder and decoder",
            "Ji et al. 2019 (arXiv:1807.06653)",
        ),
        "models_genesis": MethodEntry(
            ModelsGenesisConfig,
            ModelsGenesis,
            "restores shuffled, recoloured and painted-over items; pretrains encoder and decoder",
            "Zhou et al. 2021 (arXiv:2004.07882)",
        ),
        "sela": MethodEntry(
            SeLaConfig,
            SeLa,
            "predicts labels that optimal transport gives all items under equally large clusters",
            "Asano et al. 2020 (arXiv:1911.05371)",
        ),
        "deepcluster": MethodEntry(
            DeepClusterConfig,
            DeepCluster,
            "predicts the k-means clusters of its own features",
            "Caron et al. 2018 (arXiv:1807.05520); v2: Caron et al. 2020 (arXiv:2006.09882)",
        ),
        "vae": MethodEntry(
            VAEConfig,
            VAE,
            "variational autoencoder; its code can serve as the prior of decoupled_uniformity",
            "Kingma & Welling 2014 (arXiv:1312.6114)",
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
        "regression": MethodEntry(
            RegressionConfig,
            TargetTask,
            "a number such as age from an encoder that is trained whole, in its last blocks, or not at all",
            "Barbano et al. 2023 (arXiv:2211.08326), Table 1",
        ),
        "classification": MethodEntry(
            ClassificationConfig,
            TargetTask,
            "a class such as a diagnosis, with classes of unequal size weighted",
            "King & Zeng 2001 (doi:10.1093/oxfordjournals.pan.a004868)",
        ),
    }
)
"""Fine-tuning tasks."""

__all__ = [
    "METHODS",
    "TASKS",
    "DebiasConfig",
    "Debiased",
    "EnDConfig",
    "FairKLConfig",
    "MethodEntry",
    "TargetConfig",
    "with_debias",
]
