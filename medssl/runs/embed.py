"""Embed people with a pretrained encoder: one row of numbers for each volume or row of features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from medssl.config import load_any
from medssl.config.models import RunConfig
from medssl.core.errors import ConfigError, DataError, InputError, WeightsError
from medssl.core.schema import validate
from medssl.data.feature_store import FeatureReader, FeatureStore
from medssl.data.features import ABOUT_SUFFIX, IDS_SUFFIX, FeatureTable, numbered, write_features
from medssl.data.items import ItemReader
from medssl.data.manifest import Manifest
from medssl.inference import embed_volumes
from medssl.inference.predict import evaluating
from medssl.models import encoder_from_weights, read_model
from medssl.models.weights import head_from_weights
from medssl.runs.progress import progress_bar
from medssl.runs.volumes import (
    FINGERPRINT_DIGITS,
    Cohort,
    in_splits,
    open_items,
    open_run_cohort,
    weights_statistics,
)
from medssl.training import TrainingConfig
from medssl.training.device import resolve_accelerator

log = logging.getLogger(__name__)

SUFFIXES: Final = (".parquet", ".csv", ".npy")
COLUMNS: Final = ("subject", "case", "group", "session", "split", "site", "age", "sex", "diagnosis")
"""What is kept of a person beside the embedding; session and diagnosis only where the manifest fills them."""
OPTIONAL: Final = ("session", "diagnosis")


@dataclass(frozen=True)
class Embedded:
    """A table of embeddings that was written."""

    path: Path
    n_rows: int
    n_columns: int
    layer: str
    n_pretrained_on: int

    def text(self) -> str:
        """For people."""
        lines = [f"{self.n_rows} rows of {self.n_columns} numbers (layer {self.layer}) -> {self.path}"]
        if self.n_pretrained_on:
            lines.append(
                f"{self.n_pretrained_on} of them were pretrained on by these weights (column pretrained_on): "
                "they cannot stand for new people"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "embeddings": str(self.path),
            "n_rows": self.n_rows,
            "n_columns": self.n_columns,
            "layer": self.layer,
            "n_pretrained_on": self.n_pretrained_on,
        }


class LayerNetwork(nn.Module):
    """One layer of an encoder and its projection head as (N, D): ``z``, ``h`` or ``block<k>`` pooled over space."""

    def __init__(self, encoder: nn.Module, head: nn.Module | None, layer: str) -> None:
        super().__init__()
        names = layers(encoder, head)
        if layer not in names:
            without = " (these weights hold no projection head, so there is no z)" if layer == "z" else ""
            raise ConfigError(f"there is no layer `{layer}`{without}", fix=f"choose one of {', '.join(names)}")
        self.encoder, self.head, self.layer = encoder, head if layer == "z" else None, layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) or (N, F) to (N, D)."""
        if self.layer.startswith("block"):
            level: Tensor = self.encoder.feature_maps(x)[int(self.layer.removeprefix("block"))]  # type: ignore[operator]
            return level.flatten(2).mean(dim=2) if level.ndim > 2 else level
        h: Tensor = self.encoder(x)
        return h if self.head is None else self.head(h)


def layers(encoder: nn.Module, head: nn.Module | None) -> tuple[str, ...]:
    """Layers that can be embedded: z (with a head), h, and block0 (finest) to the coarsest."""
    blocks = tuple(f"block{number}" for number in range(len(encoder.width)))  # type: ignore[arg-type]
    return (*(("z",) if head is not None else ()), "h", *blocks)


def embed_rows(
    encoder: nn.Module,
    head: nn.Module | None,
    reader: ItemReader,
    volumes: Sequence[int] | npt.NDArray[np.int64] | None = None,
    *,
    layer: str = "z",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """One embedding for each volume, without augmentation.

    Args:
        encoder, head: On ``device``; put into evaluation mode for the call.
        reader: Reads the run's items. Of a volume that is cut into slices or slabs, the embeddings of all slices (of
            slabs that cover it) are averaged.
        volumes: Which, in this order; None: those of the reader's table.
        layer: z (raw projection, not normalised), h, block0, block1, ...
        batch_size: Rows or slices in one pass.
        device: Where the networks are.
        progress: Called with the number of volumes done and the number of all.

    Returns:
        (n, D) float32.

    Raises:
        ConfigError: No such layer.
        InputError: An embedding that is not finite, naming the volume.
    """
    network = LayerNetwork(encoder, head, layer)
    known = dict(zip(reader.table.volume.tolist(), reader.table.row.tolist(), strict=True))
    wanted = [int(volume) for volume in (known if volumes is None else volumes)]
    if not isinstance(reader, FeatureReader):
        items = reader.config
        return embed_volumes(
            network,
            reader.store,  # type: ignore[arg-type]
            wanted,
            spatial_dims=2 if items.geometry == "slice" else 3,
            depth=items.depth if items.geometry == "slab" else None,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    parts = []
    with evaluating(network):
        for start in range(0, len(wanted), batch_size):
            rows, _ = reader.read([known[volume] for volume in wanted[start : start + batch_size]])
            parts.append(network(rows.to(device)).float().cpu().numpy())
            if progress is not None:
                progress(start + len(rows), len(wanted))
    result = np.concatenate(parts)
    finite = np.isfinite(result).all(axis=1)
    if not finite.all():
        case = reader.store.case(wanted[int(np.flatnonzero(~finite)[0])])
        raise InputError("an embedding is not finite", where=case, fix="check the weights and the row")
    return result


def embed(
    weights: Path,
    manifest: Path,
    out: Path,
    *,
    layer: str | None = None,
    splits: tuple[str, ...] | None = None,
    config: Path | None = None,
    mapping: Mapping[str, str] | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
    force: bool = False,
) -> Embedded:
    """Write a table of embeddings of the rows of a manifest, prepared as for the pretraining.

    Args:
        weights: Run folder, its ``weights`` folder, or the encoder file in that.
        manifest: Who is embedded.
        out: .parquet or .csv (columns ``COLUMNS``, ``pretrained_on``, then f0000, f0001, ...) or .npy (the numbers, the
            columns in ``<stem>.ids.csv``). ``<name>.json`` beside it says which weights and layer they are of, and what
            those were pretrained on.
        layer: See ``embed_rows``; None: z where the weights hold a projection head, else h.
        splits: Only rows of these splits; None: all rows.
        config: The configuration that the weights were trained with, where there is no run folder beside them.
        mapping: Columns of other names.
        batch_size: Rows or slices in one pass.
        accelerator: auto, cpu or gpu.
        force: Replace files that exist.

    Raises:
        ConfigError: Nothing is known of the preparation, no such layer, or files that exist.
        DataError: Rows that cannot be prepared, or whose channels or features are not those of the weights.
        WeightsError: Weights that cannot be read.
    """
    _check_target(out, manifest, force)
    device = resolve_accelerator(
        validate(TrainingConfig, {"steps": 1, "accelerator": accelerator}, source="--accelerator")
    )
    about = read_model(weights)
    encoder, head = encoder_from_weights(weights), head_from_weights(weights)
    chosen_layer = layer or layers(encoder, head)[0]
    LayerNetwork(encoder, head, chosen_layer)  # refuses a layer that is not there before anything is prepared
    run, cohort, reader = open_for_weights(weights, manifest, config=config, mapping=mapping, splits=splits)
    volumes = [int(volume) for volume in cohort.chosen.table["volume"]]
    encoder.to(device)
    if head is not None:
        head.to(device)
    with progress_bar(f"embedding {len(volumes)} rows") as report:
        values = embed_rows(
            encoder, head, reader, volumes, layer=chosen_layer, batch_size=batch_size, device=device, progress=report
        )
    keys = person_columns(cohort, volumes, about)
    info = about["info"]
    write_features(
        FeatureTable(numbered(values.shape[1]), values, keys),
        out,
        about={
            "layer": chosen_layer,
            "n_rows": len(values),
            "n_columns": values.shape[1],
            "weights": about["sha256"],
            "run": run.name,
            "method": info.get("method"),
            "transductive": info.get("transductive"),
            "manifest": cohort.chosen.hash(),
            "splits": None if splits is None else list(splits),
            # Whoever learns from this table learns from these images, whether their rows are in it or not.
            "folder": str(weights.resolve()),
            "features": list(cohort.store.names) if isinstance(cohort.store, FeatureStore) else None,
            "pretrained_on": list(info.get("pretrained_on", ())),
        },
    )
    return Embedded(out, len(values), values.shape[1], chosen_layer, int(keys["pretrained_on"].sum()))


def _check_target(out: Path, manifest: Path, force: bool) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError("embeddings are written as .parquet, .csv or .npy", found=str(out), fix="name such a file")
    files = [out, out.with_name(out.name + ABOUT_SUFFIX)]
    if out.suffix.lower() == ".npy":
        files.append(out.with_name(out.stem + IDS_SUFFIX))
    if manifest.resolve() in [file.resolve() for file in files]:
        raise ConfigError("the embeddings would overwrite the manifest", where=str(out), fix="choose another --out")
    existing = [str(file) for file in files if file.exists()]
    if existing and not force:
        raise ConfigError(
            "the file exists already; it was not touched",
            where=", ".join(existing),
            fix="choose another name with --out, or replace it with --force",
        )


def run_config(weights: Path, config: Path | None = None) -> RunConfig:
    """The configuration that some weights were trained with: it says how volumes were prepared and cut.

    Raises:
        ConfigError: There is none beside the weights and none is given.
    """
    if config is None:
        at = weights.parent if weights.is_file() else weights
        near = [folder / "config.yaml" for folder in (at, at.parent)]
        config = next((file for file in near if file.is_file()), None)
    if config is None:
        raise ConfigError(
            "these weights lie in no run folder, so nothing says how volumes were prepared for them",
            where=str(weights),
            fix="name the run folder, or the configuration that they were trained with (--config)",
        )
    loaded: RunConfig = load_any(config)
    return loaded


def open_for_weights(
    weights: Path,
    manifest: Path,
    *,
    config: Path | None = None,
    mapping: Mapping[str, str] | None = None,
    splits: tuple[str, ...] | None = None,
) -> tuple[RunConfig, Cohort, ItemReader]:
    """Prepare rows of a manifest as some weights' pretraining did.

    Returns:
        The configuration with the manifest set, the cohort, and a reader of its chosen rows.

    Raises:
        ConfigError: See ``run_config``.
        DataError: Channels or features that are not those of the weights, or rows that cannot be prepared.
        WeightsError: Weights of feature tables without their statistics.
    """
    run = run_config(weights, config)
    data = {
        "manifest": manifest,
        "map": dict(mapping or {}),
        "splits": splits,
        "published_splits": None,
        "exclude": (),
    }
    items = run.items.model_copy(update={"partitions": None})  # slices that no partition holds count too
    run = run.model_copy(update={"data": run.data.model_copy(update=data), "items": items})
    statistics = weights_statistics(weights)
    if run.spatial_dims == 0 and statistics is None:
        raise WeightsError(
            "features.json is not beside the weights, so features cannot be standardised as for the pretraining",
            where=str(weights),
            fix="copy the whole weights folder of the run",
        )
    cohort = open_run_cohort(run, every_split=splits is None, statistics=statistics)
    if splits is not None:
        _require_split(cohort.chosen, splits)
    channels = int(read_model(weights)["encoder"]["in_channels"])
    if cohort.store.channels != channels:
        what = "features" if run.spatial_dims == 0 else "channels"
        raise DataError(
            f"the encoder takes {channels} {what}",
            where=str(manifest),
            found=f"{cohort.store.channels} {what}",
            fix="name the same images or columns that the weights were trained on",
        )
    _, reader = open_items(run, cohort, cohort.chosen, statistics=statistics)
    return run, cohort, reader


def _require_split(chosen: Manifest, splits: tuple[str, ...]) -> None:
    """A manifest without any split counts as all splits elsewhere; who names one here wants no others."""
    if not chosen.table["split"].notna().any():
        raise DataError(
            f"the manifest holds no split, so there are no rows of {' or '.join(splits)}",
            where=str(chosen.path),
            fix="run `medssl data split`, or leave --split out",
        )
    in_splits(chosen, splits)


def person_columns(cohort: Cohort, volumes: Sequence[int], about: Mapping[str, Any]) -> pd.DataFrame:
    """What is known of the person of each volume, and whether the weights saw the image or row (``pretrained_on``).

    Args:
        cohort: Holds the volumes.
        volumes: Which, in this order.
        about: The weights' description (``read_model``).
    """
    table = cohort.chosen.table.set_index("volume").loc[list(volumes)]
    kept = [name for name in COLUMNS if name not in OPTIONAL or table[name].notna().any()]
    seen = set(about["info"].get("pretrained_on", ()))
    keys = table[kept].reset_index(drop=True)
    return keys.assign(pretrained_on=[cohort.store.voxels(volume)[:FINGERPRINT_DIGITS] in seen for volume in volumes])
