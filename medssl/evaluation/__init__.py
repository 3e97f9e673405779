"""Metrics and statistics: arrays and tables in, dataclasses out."""

from medssl.evaluation.segmentation import ClassSummary, Summary, case_metrics, dice, hd95_mm, summarise
from medssl.evaluation.statistics import PairedDifference, compare_arms, holm, over_draws, paired_bootstrap

__all__ = [
    "ClassSummary",
    "PairedDifference",
    "Summary",
    "case_metrics",
    "compare_arms",
    "dice",
    "hd95_mm",
    "holm",
    "over_draws",
    "paired_bootstrap",
    "summarise",
]
