"""SwAV: each view predicts to which prototypes the batch assigns the others; full and small views (multi-crop)."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from medssl.core.distributed import gather
from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.types import ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import swav
from medssl.losses.numerics import exact_float32, unit
from medssl.methods.entry import embed_views, evaluated
from medssl.models.heads import HeadNorm, ProjectionHead

log = logging.getLogger(__name__)


class SwAVConfig(StrictModel):
    """Settings of SwAV."""

    name: Literal["swav"] = "swav"
    n_prototypes: PositiveInt = 32
    """K, at most the number of items, and well below batch plus queue. Caron et al. 2020: 3000 for the 1.3 million
    images of ImageNet; tens to hundreds suit sets of hundreds or thousands of volumes."""
    temperature: PositiveFloat = 0.1
    """Of the predictions (Caron et al. 2020: 0.1)."""
    epsilon: PositiveFloat = 0.05
    """Of the codes, in cosines (Caron et al. 2020: 0.05); larger: softer."""
    iterations: PositiveInt = 3
    """Of Sinkhorn-Knopp (Caron et al. 2020: 3)."""
    assign_views: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1)
    """Views whose codes all others predict; the first two, which are of full size (Caron et al. 2020)."""
    freeze_steps: NonNegativeInt | None = None
    """Steps at the start in which the prototypes stay as they are; null: one epoch, about what Caron et al. 2020 take
    (313 steps of 4096 images, 5005 of 256)."""
    queue_size: NonNegativeInt = 0
    """Embeddings of earlier batches, per assigning view, that also take part in the assignment; at most the number of
    items. For batches that are not well above n_prototypes (Caron et al. 2020: 0 for 4096 images, 3840 for 256)."""
    queue_from: Annotated[float, Field(ge=0, lt=1)] = 0.075
    """Share of the training after which the queue begins to fill; it is used once it is full. Caron et al. 2020: epoch
    15 of 200."""
    hidden_dim: PositiveInt | None = None
    """Width between the two layers of the head; null: as many as the encoder gives (Caron et al. 2020: 2048, the width
    of their encoder)."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (Caron et al. 2020)."""
    head_norm: HeadNorm = "batch"
    """After the first layer of the head (Caron et al. 2020: batch)."""

    @field_validator("assign_views")
    @classmethod
    def _distinct(cls, views: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(views)) < len(views):
            raise ValueError(f"assign_views: a view is named twice: {list(views)}")
        return views

    def needs(self) -> Needs:
        """The assigning views, and one more if there is only one."""
        views = max(2, 1 + max(self.assign_views))
        return Needs(views=views, more_views=True, min_batch=2, features=("h", "z"), multi_crop=True)


class SwAV(Method):
    r"""Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
    (arXiv:2006.09882).

    Every view is compared with a set of learnt prototypes instead of with other images. The full views of a batch are
    assigned to them so that all prototypes are used about equally (Sinkhorn-Knopp), and each view learns to predict
    the assignment of the others. Small crops, which only predict, show parts of the image at little cost (multi-crop).

    Formula:
        $$ \mathcal{L} = \frac{1}{|A|} \sum_{a \in A} \frac{1}{V-1} \sum_{v \ne a} \frac{1}{N} \sum_{i}
        -\sum_k q^a_{ik} \log \mathrm{softmax}_k\left(u^v_i \cdot c_k / \tau\right) $$
        $$ Q^a = \arg\max_{Q} \sum_{ik} Q_{ik}\, u^a_i \cdot c_k + \epsilon H(Q), \qquad
        Q \mathbf{1} = \tfrac{1}{N}, \; Q^\top \mathbf{1} = \tfrac{1}{K}, \qquad q^a = N Q^a $$
        N items, V views, A those of full size; u projections and c prototypes of length 1, K of them; $\tau$ the
        temperature, H the entropy, $\epsilon$ its weight; a few iterations come near the maximum.

    Use it when:
        Batches are small: no negatives are needed, and a queue lets even a batch of a dozen volumes be shared out.
        With multi-crop where parts tell about the whole (a slice of the brain, half a heart); the small views cost a
        fraction of the full ones, in 3D even more so.

    Leave it when:
        The set has few items: there must be several for each prototype in batch and queue, or the even use of
        prototypes, on which everything rests, means nothing. Where groups are very unequal in size (a rare disease)
        it splits the large ones. Crops of volumes that were brought to one space tell position before anatomy: crop
        less, or not at all.

    The prototypes are brought back to length 1 after every step. In the first ``freeze_steps`` they do not move at all,
    whatever the optimizer adds (weight decay). The queue holds the gathered batches of all processes, newest first.

    Attributes:
        prototypes: (K, D) of length 1.
        queue: (A, Q, D), rows of length 1, 0 until they are filled.
        queue_filled: How many rows are filled.
    """

    queue: Tensor
    queue_filled: Tensor

    def __init__(self, config: SwAVConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features = parts.encoder.out_features
        hidden = config.hidden_dim or features
        self.head = ProjectionHead(features, hidden, config.projection_dim, norm=config.head_norm)
        self.prototypes = nn.Parameter(unit(torch.randn(config.n_prototypes, config.projection_dim)))
        rows = torch.zeros(len(config.assign_views), config.queue_size, config.projection_dim)
        self.register_buffer("queue", rows)
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_forget_filled)
        self._is_full = False
        self._few_said = False
        self._kept: Tensor | None = None  # prototypes of a frozen step
        self._newest: Tensor | None = None  # (A, N, D), to be enqueued after the step

    def fit_labels(self, table: ItemTable) -> None:
        """Check prototypes and queue against the size of the set.

        Raises:
            ConfigError: More prototypes, or more rows in the queue, than items.
        """
        n = len(table)
        for name, count, why in (
            ("n_prototypes", self.config.n_prototypes, "some prototypes could never be used"),
            ("queue_size", self.config.queue_size, "it would hold the same items several times"),
        ):
            if count > n:
                raise ConfigError(
                    f"method `swav`: {name} is larger than the number of items that are trained on: {why}",
                    where=f"method.{name}",
                    found=f"{count} for {n} items",
                    fix=f"set it to at most {n}, and n_prototypes to a fraction of batch plus queue",
                )

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Swapped prediction over the items of every process."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z = gather(own)  # (N, V, D)
        queue = self.queue if self._queue_is_full() else None
        self._say_if_few(len(z))
        loss = swav(
            z,
            self._prototypes_at(batch.step),
            assign_views=config.assign_views,
            temperature=config.temperature,
            epsilon=config.epsilon,
            iterations=config.iterations,
            queue=queue,
        )
        with torch.no_grad():
            assigning = unit(z[:, list(config.assign_views)])
            if config.queue_size:
                self._newest = assigning.transpose(0, 1).to(self.queue)
            preferred = self._nearest(assigning.flatten(0, 1))
            used = torch.zeros_like(self.prototypes[:, 0]).index_fill_(0, preferred, 1.0).mean()
        logs = {"chance_loss": torch.full_like(loss.detach(), math.log(config.n_prototypes)), "used_prototypes": used}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})

    @torch.no_grad()
    def after_optimizer_step(self, progress: float) -> None:
        """Prototypes back to length 1 (or, while frozen, to what they were); the batch enters the queue."""
        self.prototypes.copy_(unit(self.prototypes) if self._kept is None else self._kept)
        if self._newest is not None and progress >= self.config.queue_from:
            rows = torch.cat([self._newest, self.queue], dim=1)  # the newest of a batch larger than the queue
            self.queue.copy_(rows[:, : self.config.queue_size])
            self.queue_filled.add_(self._newest.shape[1]).clamp_(max=self.config.queue_size)
        self._newest = None

    @torch.no_grad()
    def assign(self, h: Tensor) -> Tensor:
        """The nearest prototype (1, n) of encoder outputs (n, F)."""
        z = evaluated(self.head, h.to(self.prototypes))
        return self._nearest(unit(z))[None]

    def _nearest(self, u: Tensor) -> Tensor:
        with exact_float32(u.device):
            return (u @ unit(self.prototypes).to(u).T).argmax(1)

    def _prototypes_at(self, step: int) -> Tensor:
        """The prototypes; in a frozen step with gradient 0 (none at all would stall the exchange of gradients)."""
        frozen = self.config.freeze_steps
        if step >= (self.steps_per_epoch if frozen is None else frozen):
            self._kept = None
            return self.prototypes
        self._kept = self.prototypes.detach().clone()
        return self._kept + 0 * self.prototypes

    def _queue_is_full(self) -> bool:
        """Asks the device only until it is."""
        if not self._is_full and self.config.queue_size:
            self._is_full = int(self.queue_filled) == self.config.queue_size
        return self._is_full

    def _say_if_few(self, batch: int) -> None:
        rows = batch + self.config.queue_size
        if rows < self.config.n_prototypes and not self._few_said:
            self._few_said = True
            log.warning(
                "swav: %d rows (batch and queue) are shared out over %d prototypes, so that some must stay empty; "
                "take fewer prototypes, a larger batch, or a queue (method.queue_size)",
                rows,
                self.config.n_prototypes,
            )


def _forget_filled(method: SwAV, incompatible: Any) -> None:
    """Another state was loaded: look again how full the queue is."""
    del incompatible
    method._is_full = False  # noqa: SLF001 - a hook of this class, written outside because it outlives copies
