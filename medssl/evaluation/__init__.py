"""Metrics and statistics: arrays and tables in, dataclasses out."""

from medssl.evaluation.age_site import (
    AgeSiteSummary,
    People,
    compare_age_site,
    openbhb_score,
    predict_age_site,
    summarise_age_site,
)
from medssl.evaluation.clusters import ClusterQuality, cluster_balance, cluster_quality, reference_groups
from medssl.evaluation.combat import ComBat
from medssl.evaluation.neighbours import (
    Labelled,
    ProbeScore,
    alignment_uniformity,
    folded,
    knn_probe,
    linear_probe,
    mlp_probe,
)
from medssl.evaluation.probes import age_probe, person_folds, site_probe
from medssl.evaluation.segmentation import ClassSummary, Summary, case_metrics, dice, hd95_mm, summarise
from medssl.evaluation.statistics import (
    BlockDifference,
    PairedDifference,
    compare_arms,
    compare_in_blocks,
    holm,
    over_draws,
    paired_bootstrap,
)
from medssl.evaluation.unsupervised import (
    BlankCheck,
    ClusterScores,
    Invariance,
    blank_check,
    cluster_counts,
    invariance,
    match_clusters,
    score_clusters,
)

__all__ = [
    "AgeSiteSummary",
    "BlankCheck",
    "BlockDifference",
    "ClassSummary",
    "ClusterQuality",
    "ClusterScores",
    "ComBat",
    "Invariance",
    "Labelled",
    "PairedDifference",
    "People",
    "ProbeScore",
    "Summary",
    "age_probe",
    "alignment_uniformity",
    "case_metrics",
    "blank_check",
    "cluster_balance",
    "cluster_counts",
    "cluster_quality",
    "compare_age_site",
    "compare_arms",
    "compare_in_blocks",
    "dice",
    "hd95_mm",
    "folded",
    "holm",
    "invariance",
    "knn_probe",
    "linear_probe",
    "match_clusters",
    "mlp_probe",
    "openbhb_score",
    "over_draws",
    "paired_bootstrap",
    "person_folds",
    "reference_groups",
    "predict_age_site",
    "score_clusters",
    "site_probe",
    "summarise",
    "summarise_age_site",
]
