"""Tiny runs for any listed method: parts and batches derived from what its configuration says it needs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from medssl.core.types import ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.methods import METHODS, TASKS, DebiasConfig, with_debias
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import MLPConfig, UNet2dConfig, UNet3dConfig

SIZE = {0: (16,), 2: (16, 16), 3: (8, 8, 8)}
"""Of the features of a row, or of an image without its one channel."""
N_VOLUMES, N_PARTITIONS = 4, 3
N_CLASSES = 3

HEAD = {"hidden_dim": 16, "projection_dim": 8}
HEIGHTS = torch.tensor([[0.0, 0.3, 0.6, 1.0], [0.3, 0.0, 0.6, 1.0], [0.6, 0.6, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]]).view(
    -1
)
"""Of a tree of four regions: the first two join at 0.3, these and the third at 0.6, all at 1."""
BY_AGE = {"attributes": {"age": {"sigma": 5.0}}}

# Settings worth covering beside the defaults; a method that is not named here is covered with its defaults. `views`,
# `crops` and `debias` are no settings of the method: how many views it gets, how many more of half the size, and a
# regulariser that it carries. What is defined for rows of a table is covered there with its later settings, which costs
# next to nothing.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "simclr": [{}, {"head_norm": "batch", "debias": {"name": "end", "on": "z", "target": {"column": "diagnosis"}}}],
    "dcl": [{}, {"weight_sigma": 0.5, "temperature": 0.07, **HEAD}],
    "align_uniform": [{}, {"alpha": 1.0, "t": 3.0, "uniform_weight": 2.0, "head_norm": "batch", **HEAD}],
    "barlow_twins": [HEAD, {"hidden_dim": 8, "projection_dim": 4, "redundancy_weight": 0.1}],
    "vicreg": [HEAD, {"projection_dim": 4, "hidden_dim": 8, "variance_weight": 10.0, "covariance_weight": 2.0}],
    "moco": [
        {"queue_size": 8, "ema_decay": 0.9, **HEAD},
        {"queue_size": 7, "head_norm": "batch", "ema_decay": 0.9, **HEAD},
        {"version": "v1", "queue_size": 12, "exclude_same_subject": False, "projection_dim": 8, "ema_decay": 0.9},
    ],
    "byol": [HEAD, {"ema_decay": 0.9, "projection_dim": 8, "hidden_dim": 32}],
    "gcl": [{"strategy": "gd"}, {"strategy": "gd-"}, {"strategy": "gr", "pool": "avg"}],
    "lcl": [
        {"strategy": "lr"},
        {"strategy": "ld", "regions": "random", "n_negatives": 4},
        {"strategy": "ld", "regions": "outer", "region_features": None, "n_negatives": None},
        {"strategy": "lr", "freeze_encoder": False, "region_size": 1},
    ],
    "supcon": [
        {"label": "age", "bins": 2.0, "views": 2, "epsilon": 0.5, **HEAD},
        {
            "views": 2,
            "debias": {"name": "fair_kl", "on": "h", "mode": "moments", "target": {"column": "diagnosis"}},
            **HEAD,
        },
    ],
    "sup_info_nce": [
        {"views": 2, **HEAD},
        {"form": "in", "epsilon": 0.0, "label": "age", "bins": [28.0, 40.0, 52.0], **HEAD},
    ],
    "y_aware": [
        {"views": 2, **HEAD},
        {
            "views": 3,
            "kernel": {"attributes": {"age": {"kind": "cauchy", "sigma": 0.1}, "sex": {"kind": "equal"}}},
            "debias": {"name": "fair_kl", "on": "z", "weight": 0.1, "target": {"column": "age", "sigma": 5.0}},
            **HEAD,
        },
    ],
    "l_thr": [{"views": 2, **HEAD}, {"normalizer": "compared", "kernel": BY_AGE, "head_norm": "batch", **HEAD}],
    "l_exp": [
        {"views": 2, **HEAD},
        {
            "views": 2,
            "similarity": "neg_sqdist",
            "positive_in_denominator": True,
            "kernel": {"attributes": {"age": {"kind": "gaussian", "sigma": 1.0}}},
            "debias": {"name": "end", "on": "h", "target": {"column": "age", "bin_width": 10.0}},
            **HEAD,
        },
    ],
    "decoupled_uniformity": [
        {"views": 2, "prior": {"attributes": BY_AGE}, **HEAD},
        {"views": 2, "prior": {"table": "prior.csv"}, **HEAD},
        {"prior": {"table": "prior.csv", "kernel": "cosine"}, **HEAD},
    ],
    "swav": [
        {"n_prototypes": 5, "crops": 2, **HEAD},
        {"n_prototypes": 4, "queue_size": 9, "queue_from": 0.0, "freeze_steps": 2, "assign_views": [1], **HEAD},
        {"n_prototypes": 6, "freeze_steps": 0, "head_norm": "none", "views": 3, **HEAD},
    ],
    "supervised": [
        {},
        {"loss": "cross_entropy", "target": "diagnosis", "n_classes": 3, **HEAD},
        {"loss": "mse", "debias": {"name": "fair_kl", "on": "z", "weight": 0.1}, **HEAD},
    ],
    "models_genesis": [
        {"shuffle_windows": 50},
        {"shuffle_probability": 1.0, "shuffle_windows": 20, "inpaint_share": 1.0},
    ],
    "sela": [
        {"n_clusters": 3, "n_heads": 2},
        {"n_clusters": 4, "n_heads": 1, "n_assignments": 10, "feature_norm": "none", "views": 2},
    ],
    "deepcluster": [
        {"n_clusters": 3, "refresh_epochs": 50.0},
        {"n_clusters": 3, "refresh_epochs": 1.0, "form": "v2", "n_heads": 2, "views": 2, "crops": 1, **HEAD},
    ],
    "hierarchical_grouping": [
        {"hidden_dim": 8, "projection_dim": 6, "map_stride": 2, "n_positives": 4},
        {"hidden_dim": 8, "projection_dim": 6, "map_stride": 2, "n_anchors": 2, "levels": (0, -1), "norm": "group"},
    ],
    "vae": [
        {"latent_dim": 6, "decoder_channels": 8},
        {"latent_dim": 4, "beta": 4.0, "debias": {"name": "end", "on": "z", "target": {"column": "diagnosis"}}},
    ],
    "iic_segmentation": [
        {"k_over": 5, "max_displacement": 0},
        {"on": "encoder", "alternate_steps": None, "k_main": 2, "k_over": 4},
        {"on": "encoder", "alternate_steps": 2, "collapsed": True, "lamb_main": 1.0},
    ],
    "segmentation": [
        {"n_classes": N_CLASSES},
        {"n_classes": N_CLASSES, "mixup": {}, "dice_over": "item", "include_background": False},
    ],
    "regression": [{}, {"loss": "mse", "train": "head"}],
    "classification": [{"n_classes": 3}, {"n_classes": 3, "class_weights": "none", "train": "head"}],
}


@dataclass(frozen=True)
class Example:
    """One method, its settings, and the geometry of the items."""

    entry: Any
    config: Any
    dims: int
    norm: str = "group"
    first: bool = True
    views: int | None = None
    debias: Any = None
    crops: int = 0

    @property
    def needs(self) -> Needs:
        needs = self.config.needs()
        added = () if self.debias is None else tuple(use.column for use in self.debias.label_uses())
        return replace(needs, views=self.views or needs.views, labels=tuple({*needs.labels, *added}))

    @property
    def image_shape(self) -> tuple[int, ...]:
        return SIZE[0] if self.dims == 0 else (1, *SIZE[self.dims])

    @property
    def costly(self) -> bool:
        """Whether another example runs the same code of the method for less."""
        if self.crops:
            return self.dims != 2  # rows of a table have none
        everywhere = self.needs.spatial_dims
        return self.dims != 0 if 0 in everywhere else self.dims == 3 and not self.first

    def __str__(self) -> str:
        given = [str(v) for k, v in self.config.model_dump(exclude_unset=True).items() if k not in ("name", *HEAD)]
        debias = [] if self.debias is None else [f"{self.debias.name} on {self.debias.on}"]
        text = "-".join([self.config.name, *given, *debias, f"{self.dims}d", self.norm])
        return text.replace("{}-", "")

    def encoder(self) -> Any:
        if self.dims == 0:
            return MLPConfig(widths=(16, 8), norm="batch" if self.norm == "batch" else "layer")
        return (UNet2dConfig if self.dims == 2 else UNet3dConfig)(widths=(4, 8, 8), norm=self.norm)

    def build(self, seed: int = 0) -> Method:
        encoder = build_encoder(self.encoder(), self.image_shape, seed=seed)
        decoder = build_decoder(encoder, seed=seed) if self.needs.decoder else None
        method = self.entry.build(self.config, ModelParts(encoder, decoder, self.image_shape), seed=seed)
        method = with_debias(method, self.debias)
        method.fit_labels(table())
        return method.train()


def examples(norm: str = "group") -> Iterator[Example]:
    for entries in (METHODS, TASKS):
        for name, entry in entries.items():
            for number, settings in enumerate(VARIANTS.get(name, [{}])):
                own = {key: value for key, value in settings.items() if key not in ("views", "crops", "debias")}
                config = entry.config(name=name, **own)
                given = settings.get("debias")
                debias = None if given is None else TypeAdapter(DebiasConfig).validate_python(given)
                everywhere = config.needs().spatial_dims
                for dims in sorted(everywhere if number == 0 or 0 not in everywhere else {0}):
                    crops = settings.get("crops", 0) if dims else 0
                    yield Example(entry, config, dims, norm, number == 0, settings.get("views"), debias, crops)


def table() -> ItemTable:
    """Every item, with the labels that a run would know."""
    row = torch.arange(N_VOLUMES * N_PARTITIONS)
    volume, partition = np.divmod(row.numpy(), N_PARTITIONS)
    labels = {name: values.numpy() for name, values in labels_of(row).items()}
    labels["region_heights"] = HEIGHTS.expand(len(row), -1).numpy()
    return ItemTable(row.numpy(), volume, volume, partition, partition, N_PARTITIONS, labels)


def make_batch(example: Example, step: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Two of the four volumes, every partition: smooth patterns, seen under noise and changes of brightness."""
    needs, dims = example.needs, example.dims
    rng = torch.Generator().manual_seed(1000 * seed + step)
    volume = torch.randperm(N_VOLUMES, generator=rng)[:2].repeat_interleave(N_PARTITIONS)
    partition = torch.arange(N_PARTITIONS).repeat(2)
    row = volume * N_PARTITIONS + partition
    clean = patterns(dims)[row].to(dtype)
    views = tuple(clean if needs.original and v == 0 else _seen(clean, rng) for v in range(needs.views))
    corner = (..., *(slice(0, length // 2) for length in SIZE[dims]))
    views += tuple(_seen(clean[corner], rng) for _ in range(example.crops))
    items = {"row": row, "subject": volume, "volume": volume, "partition": partition, "position": partition}
    items["slot"] = torch.arange(len(row))
    return ViewBatch(views, (None,) * len(views), items, _labels(needs, row, clean), step=step, seed=seed)


@functools.cache
def patterns(dims: int) -> Tensor:
    """One image per (volume, partition), (12, 1, *spatial): a partition's place of a blob, a volume's stripes.

    Rows of a table (12, 16) are the two-dimensional ones averaged over blocks.
    """
    if dims == 0:
        return torch.nn.functional.avg_pool2d(patterns(2), 4).flatten(1)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in SIZE[dims]], indexing="ij")
    images = []
    for volume in range(N_VOLUMES):
        for partition in range(N_PARTITIONS):
            centre = 0.6 * (partition - 1)
            blob = torch.exp(-4 * sum((axis - centre) ** 2 for axis in axes))
            images.append(blob + 0.3 * torch.sin((volume + 1) * 2 * axes[0]) * torch.cos(volume * axes[1]))
    return torch.stack(images)[:, None]


def _seen(clean: Tensor, rng: torch.Generator) -> Tensor:
    shape = (len(clean), *(1,) * (clean.ndim - 1))
    scale = 1 + 0.2 * torch.randn(shape, generator=rng)
    return clean * scale.to(clean) + 0.1 * torch.randn(clean.shape, generator=rng).to(clean)


def _labels(needs: Needs, row: Tensor, clean: Tensor) -> dict[str, Tensor]:
    known = labels_of(row)
    if "label_map" in needs.labels:
        known["label_map"] = (clean[:, 0] > 0.2).long() + (clean[:, 0] > 0.6)
        known["label_map"][:, 0] = -1  # a line without labels
    if "region_map" in needs.labels:  # bands of brightness; beside them the heights at which these join
        bands = torch.bucketize(clean[:, 0].contiguous(), torch.tensor([0.1, 0.3, 0.6]).to(clean)) + 1
        bands[:, 0] = 0  # a line outside
        return {"label_map": bands, "region_heights": HEIGHTS.expand(len(row), -1)}
    return {name: known[name] for name in needs.labels}


def labels_of(row: Tensor) -> dict[str, Tensor]:
    """Weak labels as a run hands them out; they differ between the items of a volume, so that any batch has pairs of
    every kind.
    """
    subject, partition = row // N_PARTITIONS, row % N_PARTITIONS
    return {
        "age": 20.0 + 12.0 * subject + 5.0 * partition.double(),
        "site": (subject + partition) % 2,
        "diagnosis": (subject + partition) % 3,
        "sex": partition % 2,
        "prior": torch.stack([subject, partition, subject * partition], dim=1).double(),
    }


def part_of(batch: ViewBatch, rows: slice) -> ViewBatch:
    """What one process sees of a batch."""
    return ViewBatch(
        tuple(view[rows] for view in batch.views),
        batch.geometry,
        {name: value[rows] for name, value in batch.items.items()},
        {name: value[rows] for name, value in batch.labels.items()},
        step=batch.step,
        seed=batch.seed,
    )


def train(example: Example, method: Method, steps: int, *, learning_rate: float = 2e-3) -> list[LossOutput]:
    """A training loop in ten lines."""
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=learning_rate)
    refresh, outputs = set(method.refresh_steps(steps)), []
    for step in range(steps):
        if step in refresh:
            method.refresh(lambda: embed_all(example, method))
        output = method.training_loss(make_batch(example, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step((step + 1) / steps)
        outputs.append(LossOutput(output.loss.detach(), output.logs, output.embedding))
    return outputs


def embed_all(example: Example, method: Method) -> tuple[Tensor, dict[str, Tensor]]:
    images = patterns(example.dims)
    row = torch.arange(len(images))
    with torch.no_grad():
        return method.encoder(images), {"row": row, "subject": row // N_PARTITIONS, "volume": row // N_PARTITIONS}


def spread(embedding: Tensor) -> float:
    """0 when all rows point the same way, 1 when they are spread evenly over the sphere."""
    unit = torch.nn.functional.normalize(embedding.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5)
