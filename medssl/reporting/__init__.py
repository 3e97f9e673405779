"""Reports of runs: figures, tables and one self-contained HTML file, built from the files of a run folder."""

from medssl.reporting.report import build_report, pretrain_report, segmentation_report
from medssl.reporting.tables import write_csv

__all__ = ["build_report", "pretrain_report", "segmentation_report", "write_csv"]
