"""Tiny runs for any listed method: parts and batches derived from what its configuration says it needs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.methods import METHODS, TASKS
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import UNet2dConfig, UNet3dConfig

SIZE = {2: (16, 16), 3: (8, 8, 8)}
N_VOLUMES, N_PARTITIONS = 4, 3
N_CLASSES = 3

# Settings worth covering beside the defaults; a method that is not named here is covered with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gcl": [{"strategy": "gd"}, {"strategy": "gd-"}, {"strategy": "gr", "pool": "avg"}],
    "lcl": [
        {"strategy": "lr"},
        {"strategy": "ld", "regions": "random", "n_negatives": 4},
        {"strategy": "ld", "regions": "outer", "region_features": None, "n_negatives": None},
        {"strategy": "lr", "freeze_encoder": False, "region_size": 1},
    ],
    "segmentation": [
        {"n_classes": N_CLASSES},
        {"n_classes": N_CLASSES, "mixup": {}, "dice_over": "item", "include_background": False},
    ],
}


@dataclass(frozen=True)
class Example:
    """One method, its settings, and the geometry of the items."""

    entry: Any
    config: Any
    dims: int
    norm: str = "group"
    first: bool = True

    @property
    def needs(self) -> Needs:
        return self.config.needs()

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (1, *SIZE[self.dims])

    def __str__(self) -> str:
        given = [str(v) for k, v in self.config.model_dump(exclude_unset=True).items() if k != "name" and v != {}]
        return "-".join([self.config.name, *given, f"{self.dims}d", self.norm])

    def build(self, seed: int = 0) -> Method:
        kind = UNet2dConfig if self.dims == 2 else UNet3dConfig
        encoder = build_encoder(kind(widths=(4, 8, 8), norm=self.norm), self.image_shape, seed=seed)
        decoder = build_decoder(encoder, seed=seed) if self.needs.decoder else None
        method = self.entry.build(self.config, ModelParts(encoder, decoder, self.image_shape), seed=seed)
        return method.train()


def examples(norm: str = "group") -> Iterator[Example]:
    for entries in (METHODS, TASKS):
        for name, entry in entries.items():
            for number, settings in enumerate(VARIANTS.get(name, [{}])):
                config = entry.config(name=name, **settings)
                for dims in sorted(config.needs().spatial_dims - {0}):
                    yield Example(entry, config, dims, norm, first=number == 0)


def make_batch(example: Example, step: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Two of the four volumes, every partition: smooth patterns, seen under noise and changes of brightness."""
    needs, dims = example.needs, example.dims
    rng = torch.Generator().manual_seed(1000 * seed + step)
    volume = torch.randperm(N_VOLUMES, generator=rng)[:2].repeat_interleave(N_PARTITIONS)
    partition = torch.arange(N_PARTITIONS).repeat(2)
    row = volume * N_PARTITIONS + partition
    clean = patterns(dims)[row].to(dtype)
    views = tuple(clean if needs.original and v == 0 else _seen(clean, rng) for v in range(needs.views))
    items = {"row": row, "subject": volume, "volume": volume, "partition": partition, "position": partition}
    items["slot"] = torch.arange(len(row))
    return ViewBatch(views, (None,) * len(views), items, _labels(needs, row, clean), step=step, seed=seed)


@functools.cache
def patterns(dims: int) -> Tensor:
    """One image per (volume, partition), (12, 1, *spatial): a partition's place of a blob, a volume's stripes."""
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
    subject = row // N_PARTITIONS
    label_map = (clean[:, 0] > 0.2).long() + (clean[:, 0] > 0.6)
    label_map[:, 0] = -1  # a line without labels
    known = {"label_map": label_map, "age": 20.0 + 7.0 * subject, "site": subject % 2}
    return {name: known.get(name, subject % 2) for name in needs.labels}


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
