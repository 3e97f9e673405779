"""MoCo: contrast with a queue of keys that a slow teacher made of earlier batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from medssl.core.distributed import gather, rank, world_size
from medssl.core.errors import CheckpointError, ConfigError, InputError
from medssl.core.schema import StrictModel
from medssl.core.seeding import SHUFFLE, permutation
from medssl.core.types import ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import queue_info_nce
from medssl.losses.numerics import unit
from medssl.methods.teacher import Teacher
from medssl.models.heads import HeadNorm, LinearHead, ProjectionHead
from medssl.models.norm import SyncBatchNorm, norm_groups


class MoCoConfig(StrictModel):
    """Settings of momentum contrast."""

    name: Literal["moco"] = "moco"
    version: Literal["v1", "v2"] = "v2"
    """Head: v1 (He et al. 2020) a linear map, v2 (Chen et al. 2020, arXiv:2003.04297) one hidden layer with ReLU."""
    queue_size: PositiveInt = 1024
    """Keys that are kept, at most as many as there are items to train on: more would hold an item twice. He et al.
    2020: 65536, of 1.3 million images. A multiple of the batch is not needed."""
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.999
    """How much of its weights the teacher keeps at each step (He et al. 2020, the momentum m: 0.999). A queue that is
    filled in few steps, or a training of some hundred steps, wants less."""
    temperature: PositiveFloat | None = None
    """null: 0.07 for v1, 0.2 for v2 (He et al. 2020; Chen et al. 2020)."""
    exclude_same_subject: bool = True
    """Whether keys of the anchor's own subject are no negatives: another visit, slice or slab of one person is not
    another thing. false is the paper, whose images know no subjects."""
    shuffle_groups: PositiveInt = 1
    """The paper shuffles keys between devices, so that a batch norm's statistics do not give a pair away. Norms here
    see the batch of all processes, for which shuffling would do nothing. A number G above 1 normalises queries in G
    groups of the batch and keys in G groups of another order, the same on any number of processes that divides G."""
    hidden_dim: PositiveInt | None = None
    """Width of the hidden layer of v2; null: as many as the encoder gives (Chen et al. 2020)."""
    head_norm: HeadNorm = "none"
    """Norm after the hidden layer of v2: none (Chen et al. 2020), or batch (as MoCo v3, arXiv:2104.02057). Small
    encoders without batch norms begin with nearly equal embeddings and may stay there without it."""
    projection_dim: PositiveInt = 128
    """Length of the compared vectors (He et al. 2020)."""

    @model_validator(mode="after")
    def _hidden_layer(self) -> MoCoConfig:
        if self.version == "v1" and (self.hidden_dim is not None or self.head_norm != "none"):
            raise ValueError(
                "hidden_dim and head_norm belong to the hidden layer of the head, which version v1 has not"
            )
        return self

    def needs(self) -> Needs:
        """Two views of anything, and a queue that holds at least one batch; batch norms want two items to a group."""
        return Needs(
            views=2,
            min_batch=2 * self.shuffle_groups if self.shuffle_groups > 1 or self.head_norm == "batch" else 1,
            max_batch=self.queue_size,
            batch_multiple=self.shuffle_groups,
            features=("h", "z"),
        )


class MoCo(Method):
    r"""He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722); v2: Chen
    et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297).

    A query from one view is to find its key, which a slowly moving teacher makes of the other view, among a queue of
    keys of earlier batches. The queue decouples the number of negatives from the batch, and the teacher keeps the keys
    in it comparable. Queue, pointer and teacher are saved with the run; keys of the anchor's own subject are no
    negatives unless asked.

    Formula:
        $$ L = \frac1N\sum_i -\log\frac{e^{q_i\cdot k_i/T}}{e^{q_i\cdot k_i/T}+\sum_{m\in\mathcal N_i}
        e^{q_i\cdot Q_m/T}}, \qquad \xi \leftarrow m\,\xi+(1-m)\,\theta $$
        q: unit queries; k: the teacher's unit keys; Q: queue, of which the rows N_i are of other subjects than i;
        T: temperature; N: items of the batch; theta, xi: weights of network and teacher; m: ema_decay.

    Use it when:
        Volumes are large and a batch holds few (2 to 16): negatives come from the queue, and only one view is passed
        with gradient, so that a step needs less memory than simclr's. The cohort should hold several times more items
        than the batch.

    Leave it when:
        The cohort is small (below some hundred items): the queue is then most of the cohort, again and again. Encoders
        with batch norm can tell pairs by their statistics: use group norm, or shuffle_groups.
    """

    queue: Tensor
    queue_subject: Tensor
    queue_pointer: Tensor
    trained_rows: Tensor

    def __init__(self, config: MoCoConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features, width = parts.encoder.out_features, config.projection_dim
        if config.shuffle_groups > 1 and not any(isinstance(part, SyncBatchNorm) for part in self.encoder.modules()):
            raise ConfigError(
                "shuffle_groups keeps batch norms from telling pairs, and the encoder has none",
                where="method.shuffle_groups",
                found=str(config.shuffle_groups),
                fix="leave it out, or set model.encoder.norm: batch",
            )
        if config.version == "v1":
            self.head: nn.Module = LinearHead(features, width)
        else:
            self.head = ProjectionHead(features, config.hidden_dim or features, width, config.head_norm)
        self.temperature = config.temperature or {"v1": 0.07, "v2": 0.2}[config.version]
        self.teacher = Teacher(self.encoder, self.head)
        self.register_buffer("queue", unit(torch.randn(config.queue_size, width)))
        self.register_buffer("queue_subject", torch.full((config.queue_size,), -1))  # of nobody, at the start
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("trained_rows", torch.zeros(16, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_refuse_other_rows)
        self._new: tuple[Tensor, Tensor] | None = None

    def fit_labels(self, table: ItemTable) -> None:
        """Note whose keys the queue will hold.

        Raises:
            ConfigError: The queue is longer than the table, or all items are of one subject and would not be compared.
        """
        config = self.config
        if config.queue_size > len(table):
            raise ConfigError(
                "the queue is longer than there are items to train on: it would hold the same items several times",
                where="method.queue_size",
                found=f"{config.queue_size}, for {len(table)} items",
                fix=f"set it to {len(table)} or less; half of that leaves room",
            )
        if config.exclude_same_subject and len(np.unique(table.subject)) < 2:
            raise ConfigError(
                "all items are of one subject, so that no key may be a negative",
                where="method.exclude_same_subject",
                fix="give the manifest its subjects, or set it to false",
            )
        digest = hashlib.sha256(np.stack([table.row, table.subject]).tobytes()).digest()[:16]
        self.trained_rows.copy_(torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Queries of view 0 against keys of view 1 and the queue, over the items of every process.

        Raises:
            InputError: A batch that is longer than the queue, or that shuffle_groups does not divide.
        """
        if self.config.shuffle_groups > 1:
            h, z, key = self._in_groups(batch)
        else:
            key = gather(self.teacher(batch.views[1]))
            h = self.encoder(batch.views[0])
            z = self.head(h)
        query, subject = gather((z, batch.items["subject"]))
        if len(query) > len(self.queue):
            raise InputError(
                "the queue is shorter than the batch",
                where="method.queue_size",
                found=f"{len(self.queue)}, for a batch of {len(query)}",
            )
        mask = self.queue_subject != subject[:, None] if self.config.exclude_same_subject else None
        loss = queue_info_nce(query, key, self.queue, temperature=self.temperature, negative_mask=mask)
        self._new = unit(key).detach(), subject
        n_negatives = torch.full_like(loss.detach(), len(self.queue)) if mask is None else mask.sum(1).to(loss.dtype)
        return LossOutput(
            loss,
            logs={"chance_loss": n_negatives.log1p().mean()},
            embedding=query.detach(),
            features={"h": h, "z": z},
        )

    def _in_groups(self, batch: ViewBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Features and queries of this process, and keys of every process, normalised in groups of different items."""
        groups, processes, n = self.config.shuffle_groups, world_size(), len(batch.views[0])
        if groups % processes or n * processes % groups or n * processes < 2 * groups:
            raise InputError(
                "shuffle_groups must be a multiple of the number of processes, and divide the batch into groups of two "
                "or more",
                where="method.shuffle_groups",
                found=f"{groups}, for a batch of {n * processes} on {processes} processes",
            )
        images = gather(batch.views[1])
        order = torch.from_numpy(permutation(len(images), batch.seed, SHUFFLE, batch.step)).to(images.device)
        with norm_groups(self.teacher, groups // processes):
            shuffled = gather(self.teacher(images[order[rank() * n : (rank() + 1) * n]]))
        with norm_groups(self.encoder, groups // processes), norm_groups(self.head, groups // processes):
            h = self.encoder(batch.views[0])
            z = self.head(h)
        return h, z, shuffled[order.argsort()]

    @torch.no_grad()
    def after_optimizer_step(self, progress: float) -> None:
        """The teacher follows, and the batch's keys take the place of the oldest in the queue."""
        del progress
        self.teacher.update(self.encoder, self.head, decay=self.config.ema_decay)
        if self._new is not None:
            keys, subject = self._new
            place = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[place] = keys.to(self.queue.dtype)
            self.queue_subject[place] = subject
            self.queue_pointer.copy_((place[-1] + 1) % len(self.queue))
            self._new = None


def _refuse_other_rows(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: subjects in a queue are numbers, which mean nobody in another table."""
    own, given = module.trained_rows, state.get(f"{prefix}trained_rows")
    assert isinstance(own, Tensor)
    if given is not None and bool(own.any()) and bool(given.any()) and not torch.equal(own.cpu(), given.cpu()):
        raise CheckpointError(
            "this queue holds keys of other items than are trained on now: its subjects are numbered otherwise",
            where="method.moco: queue",
            fix="resume with the manifest and splits of the run, or begin a new one from its weights",
        )
