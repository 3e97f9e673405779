"""The records that samplers, views and methods are written against.

Dimension letters: N items, V views, D embedding, C channels, X Y Z voxels in RAS order.
Volumes are ``(N, C, X, Y, Z)``, slices ``(N, C, X, Y)``, rows of a feature table ``(N, C)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medssl.core.errors import ShapeError

Ints = npt.NDArray[np.int64]
IMAGES: Final = frozenset({2, 3})
"""The spatial dimensions of images, for methods that need a grid of voxels."""


@dataclass(frozen=True)
class ItemTable:
    """What a sampler can choose from: one entry per item (a slice, a slab or a whole volume).

    ``row`` numbers the items once for the whole cohort and survives selection and gathering; a sampler returns values
    of ``row``. ``partition`` is -1 where an item belongs to none. ``position`` is the slice index, of a slab the index
    of its centre.
    """

    row: Ints
    subject: Ints
    volume: Ints
    partition: Ints
    position: Ints
    n_partitions: int = 0
    labels: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("row", "subject", "volume", "partition", "position")}
        lengths |= {f"labels[{name!r}]": len(values) for name, values in self.labels.items()}
        if len(set(lengths.values())) > 1:
            raise ShapeError("columns of an ItemTable differ in length", found=str(lengths))

    def __len__(self) -> int:
        return len(self.row)

    def select(self, keep: npt.NDArray[Any]) -> ItemTable:
        """The items where ``keep`` (a boolean mask, or positions) points; row numbers stay what they were."""
        return replace(
            self,
            **{name: getattr(self, name)[keep] for name in ("row", "subject", "volume", "partition", "position")},
            labels={name: values[keep] for name, values in self.labels.items()},
        )


@dataclass(frozen=True)
class ViewBatch:
    """One training batch on the device.

    Attributes:
        views: One tensor ``(N, C, *spatial)`` per view; sizes may differ between views.
        geometry: Per view an affine theta ``(N, d, d + 1)`` that maps the view's normalised coordinates to the
            source's, as ``F.affine_grid(align_corners=False)`` takes it, or None where no voxel was moved.
        items: int64 ``(N,)`` each: row, subject, volume, partition, position; also ``slot``, the place in the global
            batch.
        labels: Tensors ``(N, ...)`` by name; a label map of segmentation is ``label_map``, one channel-free map per
            item, moved with view 0.
        step: The step that this batch belongs to; with ``seed`` it determines every random choice inside a method.
        seed: The run's seed.
    """

    views: tuple[Tensor, ...]
    geometry: tuple[Tensor | None, ...]
    items: Mapping[str, Tensor]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seed: int = 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ViewBatch:
        """The same batch on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            views=tuple(move(view) for view in self.views),
            geometry=tuple(None if theta is None else move(theta) for theta in self.geometry),
            items={name: move(value) for name, value in self.items.items()},
            labels={name: move(value) for name, value in self.labels.items()},
        )


@dataclass(frozen=True)
class LossOutput:
    """What a method returns for a batch.

    Attributes:
        loss: Scalar with gradient.
        logs: Detached scalars, written to ``metrics.csv``.
        embedding: Detached ``(rows, D)`` embedding of the batch, watched for collapse; None where there is none.
        features: With gradient, of this process's own items as view 0 shows them: ``h`` ``(N, F)``, the encoder's
            output, and ``z`` ``(N, D)``, the raw projection. What a regulariser that is added to any method works on;
            a method without such an embedding leaves it empty.
    """

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a method asks of the rest of a run; checked before any data is read.

    Attributes:
        views: Number of views of each item.
        more_views: Views beyond these take part too; otherwise they are made for nothing.
        original: View 0 is the item itself, without augmentation.
        moves: "any": views may move voxels; "none": only intensities may change.
        samplers: Names of the samplers it works with; empty: any.
        partitions: Items must carry partitions.
        labels: Columns of the manifest (or ``label_map``) that each item must have.
        spatial_dims: Where its definition allows it; 0 are rows of a feature table.
        decoder: It needs (and trains) decoder blocks.
        min_batch: Smallest global batch.
        max_batch: Largest global batch; None: any.
        batch_multiple: The global batch is a multiple of it.
        trains: Which weights it leaves behind.
        features: What its ``LossOutput.features`` hold, for regularisers that are added to it.
        multi_crop: It takes views of several sizes.
        unit_range: Intensities must lie in about [0, 1].
    """

    views: int = 2
    more_views: bool = False
    original: bool = False
    moves: Literal["any", "none"] = "any"
    samplers: frozenset[str] = frozenset()
    partitions: bool = False
    labels: tuple[str, ...] = ()
    spatial_dims: frozenset[int] = frozenset({0, 2, 3})
    decoder: bool = False
    min_batch: int = 1
    max_batch: int | None = None
    batch_multiple: int = 1
    trains: tuple[str, ...] = ("encoder",)
    features: tuple[str, ...] = ("h",)
    multi_crop: bool = False
    unit_range: bool = False


@dataclass
class ModelParts:
    """The networks that a method is built from.

    Attributes:
        encoder: Offers ``forward(x) -> (N, F)``, ``feature_maps(x) -> list`` fine to coarse, ``out_features`` and
            ``width``.
        decoder: Turns ``feature_maps`` into one dense map, or None.
        image_shape: ``(C, *spatial)`` of a view as training sees it, the first where sizes differ.
    """

    encoder: nn.Module
    decoder: nn.Module | None
    image_shape: tuple[int, ...]

    @property
    def spatial_dims(self) -> int:
        """2 for slices, 3 for volumes and slabs, 0 for rows of a feature table."""
        return len(self.image_shape) - 1


EmbedAll = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
"""Embeds every item of the training table without augmentation: ``(n, D)`` on the CPU, and the items' columns."""


class Method(nn.Module, ABC):
    """One training objective. Owns its networks; knows no trainer, file or logger.

    The attributes ``encoder``, ``decoder`` and ``head`` (modules; the last two may be None) are what is exported after
    training. ``head`` turns the encoder's output h into the projection z.
    """

    encoder: nn.Module
    decoder: nn.Module | None
    head: nn.Module | None
    steps_per_epoch: int = 1
    """Steps in which about every item is seen once; the loop sets it before it asks for ``refresh_steps``."""

    def __init__(self) -> None:
        super().__init__()
        # A class attribute would hide a module that is assigned later.
        self.register_module("decoder", None)
        self.register_module("head", None)

    def fit_labels(self, table: ItemTable) -> None:  # noqa: B027 - most methods learn nothing from the labels alone
        """Look once at the labels of everything that is trained on, before step 0 (mean age, number of classes).

        What is learnt goes into buffers, so that a resumed run and exported weights have it. Called by a run, not by
        the loop.
        """

    @abstractmethod
    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Loss of one batch. Gathers across processes what its loss compares, so that every process sees it whole."""

    def after_optimizer_step(self, progress: float) -> None:  # noqa: B027 - most methods have nothing to do here
        """Teacher, queue. ``progress`` is the share of training that is done, in [0, 1]."""

    def refresh_steps(self, total_steps: int) -> Collection[int]:
        """Steps before which the loop calls ``refresh``."""
        return ()

    def refresh(self, embed_all: EmbedAll) -> None:  # noqa: B027 - only clustering methods do anything here
        """Recompute what depends on the whole training set (pseudo-labels, prototypes)."""

    def reinitialised(self) -> Collection[nn.Parameter]:
        """Weights that the last ``refresh`` drew anew: the loop forgets what the optimizer knew of them."""
        return ()

    def clusters(self) -> Ints | None:
        """Pseudo-labels ``(heads, n)`` that ``refresh`` gave the training table's items, in its order; -1: none yet.

        None for a method that keeps no labels. A sampler that balances clusters, and the labels that a run exports,
        are made from them.
        """
        return None

    def assign(self, h: Tensor) -> Tensor | None:
        """Cluster ``(heads, n)`` int64 of each encoder output ``h`` ``(n, F)``; None for a method without clusters."""
        del h
        return None
