"""Clusters of a pretraining: followed while it trains, and exported as labels that another run can be trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from medssl.config import PretrainConfig
from medssl.core.errors import ConfigError, nearest
from medssl.core.types import Ints, ItemTable, Method
from medssl.data.items import label_columns
from medssl.data.manifest import Manifest
from medssl.evaluation import cluster_balance, cluster_quality
from medssl.methods import METHODS
from medssl.reporting.tables import write_csv
from medssl.training import BatchSource
from medssl.training.embedding import embed_table

LABELS: Final = "clusters.csv"
"""In ``weights``: the cluster of every item that was trained on."""
LOG: Final = Path("logs") / "clusters.csv"
ITEM_COLUMNS: Final = ("partition", "volume", "subject")
"""What an item is part of, beside the columns of the manifest."""
DIGITS: Final = 6
_MEASURES: Final = ("nmi", "ami", "ari", "n", "n_missing")


def check_cluster_columns(config: PretrainConfig, rows: Manifest, joined: Collection[str] = ()) -> None:
    """Refuse columns that clusters cannot be compared with.

    Args:
        config: The run.
        rows: Those that are trained on.
        joined: Columns that come from elsewhere (`data.item_labels`).

    Raises:
        ConfigError: A column that the manifest lacks or leaves empty, partitions of items that have none.
    """
    known = [*label_columns(rows.table), *joined, *ITEM_COLUMNS]
    for name in config.cluster_columns:
        if name not in known:
            raise ConfigError(
                f"the column `{name}` is not in the manifest, or empty",
                where="cluster_columns",
                fix=nearest(name, known),
            )
    if "partition" in config.cluster_columns and config.items.partitions is None:
        raise ConfigError("the items lie in no partition", where="cluster_columns", fix="set items.partitions")


class ClusterLog:
    """``logs/clusters.csv``: balance of each head's clusters, and their agreement with each column, one row each.

    Args:
        config: The run; its method has clusters.
        method: What is trained.
        table: The items that are trained on.
        folder: Of the run.
    """

    def __init__(self, config: PretrainConfig, method: Method, table: ItemTable, folder: Path) -> None:
        self._method = method
        known = {name: getattr(table, name) for name in ITEM_COLUMNS}
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: known[name] if name in known else table.labels[name] for name in config.cluster_columns
        }
        self._k, self._path = n_clusters(config), folder / LOG
        self._rows: list[dict[str, Any]] = []

    @classmethod
    def of_run(cls, config: PretrainConfig, method: Method, table: ItemTable, folder: Path) -> ClusterLog | None:
        """The log of a run; None where its method has no clusters."""
        return cls(config, method, table, folder) if METHODS[config.method.name].has_clusters else None

    def on_event(self, name: str, values: Mapping[str, Any]) -> None:
        """Follow a training: rows after the step from which it goes on are cut, each refresh adds some."""
        if name == "started" and self._path.is_file():
            rows = pd.read_csv(self._path, keep_default_na=False, na_values=[""])
            self._rows = [dict(row) for row in rows[rows["step"] < values["step"]].to_dict("records")]
        labels = self._method.clusters() if name == "refresh" else None
        if labels is not None:
            self.add(values["step"], labels)

    def add(self, step: int, labels: Ints) -> list[dict[str, Any]]:
        """Write the rows of the labels (heads, n) after ``step`` steps; returns them."""
        rows = [row for head, own in enumerate(labels) for row in self._of_head(step, head, own)]
        self._rows = [row for row in self._rows if row["step"] != step] + rows
        write_csv(self._rows, self._path)
        return rows

    def _of_head(self, step: int, head: int, labels: Ints) -> list[dict[str, Any]]:
        balance, empty = cluster_balance(labels, self._k)
        both = {"balance": round(balance, DIGITS), "empty": empty}
        if not self._columns:
            return [{"step": step, "head": head, "column": None, **dict.fromkeys(_MEASURES), **both}]
        found = {name: asdict(cluster_quality(labels, values)) for name, values in self._columns.items()}
        return [
            {
                "step": step,
                "head": head,
                "column": name,
                **{key: round(value, DIGITS) for key, value in quality.items()},
                **both,
            }
            for name, quality in found.items()
        ]


def n_clusters(config: PretrainConfig) -> int:
    """K of each head of the configured method."""
    settings = config.method
    count: int = settings.n_clusters if hasattr(settings, "n_clusters") else settings.n_prototypes
    return count


@torch.no_grad()
def final_clusters(config: PretrainConfig, method: Method, source: BatchSource) -> Ints | None:
    """The cluster (heads, n) of every item that was trained on; None for a method without clusters.

    The labels that the method keeps, or else what it says of each item without augmentation.
    """
    if not METHODS[config.method.name].has_clusters:
        return None
    kept = method.clusters()
    if kept is not None:
        return kept
    h, _ = embed_table(method, source)
    found = method.assign(h.to(source.device))
    return None if found is None else found.cpu().numpy().astype(np.int64)


def save_clusters(labels: Ints, table: ItemTable, rows: Manifest, config: PretrainConfig, weights: Path) -> Path:
    """Write ``clusters.csv`` beside the weights: whose each item is, and its cluster by each head.

    A run reads it as `data.item_labels`. An item without a cluster has an empty cell.
    """
    known = rows.table.set_index("volume").loc[table.volume]
    frame = pd.DataFrame({"case": known["case"].astype(str), "subject": known["subject"].astype(str)})
    frame = frame.reset_index(drop=True).assign(volume=table.volume)
    if config.items.geometry in ("slice", "slab"):
        frame["position"] = table.position
    for head, own in enumerate(labels):
        frame[f"cluster{head}"] = pd.array(own, dtype="Int64")
        frame.loc[own < 0, f"cluster{head}"] = pd.NA
    return write_csv(frame, weights / LABELS)


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN."""
    return [
        {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}
        for row in rows
    ]
