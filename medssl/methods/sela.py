"""SeLa: a network predicts labels that optimal transport gives all items under equally large clusters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.types import EmbedAll, Ints, ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import cluster_cross_entropy, sela_assignment
from medssl.methods.assignments import Assignments, cluster_logs, set_statistics, whole_set
from medssl.methods.entry import embed_views, evaluated
from medssl.models.heads import HeadNorm
from medssl.models.norm import SyncBatchNorm


class SeLaConfig(StrictModel):
    """Settings of SeLa."""

    name: Literal["sela"] = "sela"
    n_clusters: PositiveInt = 64
    """K, of every head; at most the number of items. The paper: 3000 for the 1.3 million images of ImageNet, 128 for
    the 50 000 of CIFAR-10. Ours leaves a few items to each cluster of a set of hundreds."""
    n_heads: PositiveInt = 10
    """Classifiers that cluster independently and share the encoder (Asano et al. 2020, section 3.4: 1 or 10)."""
    lamb: PositiveFloat = 25.0
    """lambda of the optimal transport: the larger, the harder the assignment (Asano et al. 2020, section 4.1)."""
    n_assignments: PositiveInt = 100
    """M: assignments are made at the shares (i / (M - 1))^2 of training (Asano et al. 2020: 80 to 160; program 100)."""
    tolerance: PositiveFloat = 1e-3
    """Sinkhorn's iteration ends when no item's factor changes by more than this, relatively. Labels are an argmax and
    settle long before. The authors' program: changes summed over all items below 0.1."""
    max_iterations: PositiveInt = 1000
    """Sinkhorn's iteration ends here at the latest (ours)."""
    feature_norm: HeadNorm = "batch"
    """Norm of h before the classifiers, over the batch of all processes. Networks of the paper end in batch norm; one
    with group norm gives all items nearly the same h at first, and its classifiers learn slowly (none)."""

    def needs(self) -> Needs:
        """One view or more of anything, of any sizes; a batch norm has nothing to tell of one item."""
        return Needs(
            views=1,
            more_views=True,
            min_batch=2 if self.feature_norm == "batch" else 1,
            features=("h",),
            multi_crop=True,
        )


class SeLa(Method):
    r"""Asano et al. 2020, "Self-labelling via simultaneous clustering and representation learning" (arXiv:1911.05371).

    A classifier on the encoder predicts a label of every item from augmented views. The labels are made by the network
    itself: at a hundred moments of training all items are divided into equally large clusters, such that the
    predictions of the network fit best. Equal sizes keep it from calling everything the same, and several classifiers
    with clusters of their own share one encoder.

    Formula:
        $$ \mathcal{L} = \frac{1}{NT} \sum_{i=1}^{N} \sum_{t=1}^{T} -\log p_t(y_i^t \mid x_i),
        \qquad y_i^t = \arg\max_k Q^t_{ik} $$
        $$ Q^t = \arg\min_Q \langle Q, -\log P^t \rangle + \frac{1}{\lambda} KL\left(Q \,\Vert\, \frac{1}{NK}\right),
        \qquad Q 1 = \frac{1}{N}, \; Q^\top 1 = \frac{1}{K} $$
        N items, T heads, K clusters; $p_t$ the softmax of head t, $P^t$ its predictions for all items.

    Use it when:
        The set has groups of about equal size worth finding (slice levels, acquisition types, phenotypes), or you want
        labels themselves: they are exported, and another network can be trained on them. Batches may be small, since
        nothing is compared inside a batch.

    Leave it when:
        The set is smaller than about ten items a cluster, or its groups are of very unequal size (a rare pathology in
        a healthy cohort): equal clusters then cut through the large ones. Weak augmentation lets it cluster scanners.

    Items are predicted for the assignment as they are, without augmentation and in evaluation mode (the paper: expected
    over augmentations; the program: one augmented pass in training mode).

    Attributes:
        classifiers: h (N, F) to the logits of all heads, (N, H K).
        assignments: The labels.
    """

    def __init__(self, config: SeLaConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.classifiers = nn.Linear(parts.encoder.out_features, config.n_heads * config.n_clusters)
        self.norm = SyncBatchNorm(parts.encoder.out_features) if config.feature_norm == "batch" else nn.Identity()
        self.assignments = Assignments(config.n_heads, config.n_clusters)
        self.seed = torch.initial_seed()

    def fit_labels(self, table: ItemTable) -> None:
        """Size the labels, and fill them in turn until the first assignment.

        Raises:
            ConfigError: Fewer items than clusters.
        """
        self.assignments.fit(table, seed=self.seed)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Cross-entropy of the labels over the items of every process."""
        _, h = embed_views(self.encoder, nn.Identity(), batch)  # (N, V, F)
        logits = self._logits(self.norm(h.flatten(0, 1)).unflatten(0, h.shape[:2]))
        labels = self.assignments.of(batch.items["row"])
        agrees = (logits.detach().argmax(3) == labels[:, None]).float().flatten(1).mean(1)
        loss, agrees, embedding = gather((cluster_cross_entropy(logits, labels), agrees, h[:, 0].detach()))
        logs = cluster_logs(self.assignments, agrees)
        return LossOutput(loss.mean(), logs, embedding, features={"h": h[:, 0]})

    def refresh_steps(self, total_steps: int) -> Collection[int]:
        """The shares (i / (M - 1))^2 of training, the last one left out: it is where training ends."""
        last = max(1, self.config.n_assignments - 1)
        return {total_steps * i**2 // last**2 for i in range(last)}

    @torch.no_grad()
    def refresh(self, embed_all: EmbedAll) -> None:
        """Assign every item anew, head by head."""
        h = whole_set(embed_all, self.assignments)
        set_statistics(self.norm, h)
        labels = [
            sela_assignment(
                head, lamb=self.config.lamb, tolerance=self.config.tolerance, max_iterations=self.config.max_iterations
            ).argmax(1)
            for head in self._by_head(h)
        ]
        self.assignments.store(torch.stack(labels))

    def clusters(self) -> Ints:
        """The labels (H, n) of the training items."""
        return self.assignments.numpy()

    @torch.no_grad()
    def assign(self, h: Tensor) -> Tensor:
        """The class (H, n) that each classifier gives encoder outputs (n, F)."""
        return torch.stack([logits.argmax(1) for logits in self._by_head(h)])

    def _logits(self, h: Tensor) -> Tensor:
        """Normed (N, V, F) to (N, V, H, K)."""
        return self.classifiers(h).unflatten(2, (self.config.n_heads, self.config.n_clusters))

    def _by_head(self, h: Tensor) -> Iterator[Tensor]:
        """Logits (n, K), one head after the other: those of all at once may not fit."""
        weight, bias = (p.split(self.config.n_clusters) for p in (self.classifiers.weight, self.classifiers.bias))
        h = evaluated(self.norm, h.to(weight[0]))
        return (F.linear(h, w, b) for w, b in zip(weight, bias, strict=True))
