"""Cluster maps of volumes, from the weights of a pretraining: counted against labels, other views and blank images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssl.config.models import RunConfig
from medssl.core.errors import DataError, WeightsError
from medssl.data.items import ItemReader
from medssl.evaluation.unsupervised import BlankCheck, Ints, blank_check, cluster_counts
from medssl.inference.predict import predict_volume
from medssl.methods.iic_segmentation import dense_map, dense_map_size, seen_in_both
from medssl.models import ClusterHeads, build_decoder, encoder_from_weights, load_weights
from medssl.models.weights import read_model
from medssl.runs.progress import progress_bar
from medssl.runs.volumes import Cohort
from medssl.transforms.geometry import warp
from medssl.transforms.views import make_views

_BATCH: Final = 8


class ClusterNetwork(nn.Module):
    """Images to cluster logits, rebuilt from weights.

    Attributes:
        heads: The cluster heads.
        steps: Voxels of an image per place of the map, per axis: what lengths of images must be multiples of.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module | None, heads: ClusterHeads, image_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.heads = encoder, decoder, heads
        strides = getattr(encoder, "strides", None) or getattr(encoder, "pool_strides", None)
        if strides is None:
            size = dense_map_size(encoder, decoder, image_shape)
            self.steps = tuple(2 ** round(math.log2(n / m)) for n, m in zip(image_shape[1:], size, strict=True))
        else:
            self.steps = tuple(math.prod(steps) for steps in zip(*strides, strict=True))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (N, k, *spatial of the map) of each head."""
        logits: dict[str, Tensor] = self.heads(dense_map(self.encoder, self.decoder, images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits of both heads, one after the other, enlarged linearly to the grid of the images."""
        logits = torch.cat(list(self.logits(images).values()), dim=1)
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        return interpolate(logits, size=images.shape[2:], mode=mode, align_corners=False)


@dataclass
class Found:
    """What the volumes of some people gave, head by head.

    Attributes:
        rows: Per labelled volume: case, subject, group.
        counts: Per labelled volume (k, n_classes) voxels of each cluster with each label.
        others: (k, k) voxels at the same place in an image and in the image of the person before.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, list[Ints]] = field(default_factory=dict)
    others: dict[str, Ints] = field(default_factory=dict)

    def by_person(self, head: str) -> Ints:
        """(people, k, n_classes)."""
        groups = [row["group"] for row in self.rows]
        return np.stack(
            [
                np.sum([one for one, group in zip(self.counts[head], groups, strict=True) if group == person], axis=0)
                for person in dict.fromkeys(groups)
            ]
        )


def load_cluster_network(weights: Path, heads: ClusterHeads, image_shape: tuple[int, ...]) -> ClusterNetwork:
    """Encoder, decoder where the clusters lie on one, and heads, from a run folder or weights folder.

    Raises:
        WeightsError: Unreadable, or parts that do not fit each other.
    """
    encoder, about = encoder_from_weights(weights), read_model(weights)["decoder"]
    decoder = None
    if about is not None:
        decoder = build_decoder(encoder, blocks=about["blocks"], norm=about["norm"])
        load_weights(decoder, weights, part="decoder", minimum=1.0)
    channels = encoder.width[-1] if decoder is None else decoder.out_channels  # type: ignore[index]
    if heads.channels != channels:
        raise WeightsError(
            "the cluster heads do not fit the map they lie on",
            where=str(weights),
            found=f"heads of {heads.channels} channels, a map of {channels}",
            fix="copy the whole weights folder of the run",
        )
    return ClusterNetwork(encoder, decoder, heads, image_shape)


def count_clusters(
    network: ClusterNetwork, cohort: Cohort, run: RunConfig, splits: tuple[str, ...], device: torch.device
) -> Found:
    """Clusters of whole volumes on their prepared grid, counted and forgotten."""
    rows, ks = cohort.rows(splits), network.heads.n_clusters
    found = Found(counts={head: [] for head in ks}, others={head: np.zeros((k, k), np.int64) for head, k in ks.items()})
    n_classes = 1 + max(one.number for one in cohort.classes)
    before: tuple[str, dict[str, npt.NDArray[Any]]] | None = None
    with progress_bar(f"clusters of {len(rows)} volumes of {', '.join(splits)}") as report:
        for done, volume in enumerate((int(v) for v in rows.table["volume"]), start=1):
            row, label = rows.row(volume), cohort.store.label(volume)
            maps = _clusters(network, cohort.store.image(volume), run, device)
            if label is not None:
                found.rows.append({name: row[name] for name in ("case", "subject", "group")})
                for head, clusters in maps.items():
                    found.counts[head].append(cluster_counts(clusters, np.asarray(label), ks[head], n_classes))
            if before is not None and before[0] != row["group"] and before[1]["main"].shape == maps["main"].shape:
                for head, clusters in maps.items():
                    found.others[head] += cluster_counts(clusters, before[1][head], ks[head], ks[head])
            before = (row["group"], maps)
            report(done, len(rows))
    if not found.rows:
        raise DataError(
            f"no volume of {' or '.join(splits)} has a label to compare clusters with",
            where=str(rows.path),
            fix="name splits with labels (--fit-split, --split)",
        )
    return found


def _clusters(
    network: ClusterNetwork, image: npt.NDArray[np.float32], run: RunConfig, device: torch.device
) -> dict[str, npt.NDArray[np.int64]]:
    logits = predict_volume(
        network,
        image,
        spatial_dims=run.spatial_dims,
        slice_axis=run.items.slice_axis,
        device=device,
        multiple=network.steps,
        softmax=False,
    )
    parts = logits.split(list(network.heads.n_clusters.values()))
    return {head: part.argmax(0).numpy() for head, part in zip(network.heads.n_clusters, parts, strict=True)}


def compare_views(
    network: ClusterNetwork,
    run: RunConfig,
    reader: ItemReader,
    cohort: Cohort,
    splits: tuple[str, ...],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Ints], float]:
    """Per head the clusters (k, k) of a place in two views, and the mean intensity of the images."""
    pairs = {head: np.zeros((k, k), np.int64) for head, k in network.heads.n_clusters.items()}
    total, n = 0.0, 0
    for slots, rows in _batches(reader, cohort, splits):
        images, _ = reader.read(rows)
        total, n = total + float(images.mean()) * len(images), n + len(images)
        views = make_views(images, run.views, seed=seed, step=0, slots=slots)
        first, second = (network.logits(view.to(device)) for view in views.views[:2])
        size = tuple(first["main"].shape[2:])
        between, mask = seen_in_both(views.geometry[0], views.geometry[1], size)
        for head, k in network.heads.n_clusters.items():
            here, there = first[head].float().cpu(), second[head].float().softmax(1).cpu()
            there = there if between is None else warp(there, between, size)
            other = there.argmax(1)
            other = other if mask is None else other.masked_fill(~mask, -1)
            pairs[head] += cluster_counts(here.argmax(1).numpy(), other.numpy(), k, k)
    return pairs, total / n


def _batches(reader: ItemReader, cohort: Cohort, splits: tuple[str, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Places in the order, and row numbers, of the items of some splits."""
    volumes = set(cohort.rows(splits).table["volume"].astype(int))
    table = reader.table
    rows = [int(row) for row, volume in zip(table.row, table.volume, strict=True) if int(volume) in volumes]
    for start in range(0, len(rows), _BATCH):
        chosen = rows[start : start + _BATCH]
        yield list(range(start, start + len(chosen))), chosen


def blank_images(
    network: ClusterNetwork, image_shape: tuple[int, ...], values: Mapping[str, float], device: torch.device
) -> dict[str, dict[str, BlankCheck]]:
    """Per head, how images of one intensity are split."""
    checks: dict[str, dict[str, BlankCheck]] = {head: {} for head in network.heads.n_clusters}
    for name, value in values.items():
        for head, logits in network.logits(torch.full((1, *image_shape), value, device=device)).items():
            checks[head][name] = blank_check(logits[0].argmax(0).cpu().numpy())
    return checks
