"""DeepCluster: a network predicts the k-means clusters of its own features (and the later form with prototypes)."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from sklearn.decomposition import PCA
from torch import Tensor, nn

from medssl.core import distributed
from medssl.core.distributed import gather
from medssl.core.schema import StrictModel
from medssl.core.seeding import CLUSTERS, derive_seed
from medssl.core.types import EmbedAll, Ints, ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses import cluster_cross_entropy, k_means
from medssl.losses.numerics import unit
from medssl.methods.assignments import Assignments, cluster_logs, set_statistics, whole_set
from medssl.methods.entry import embed_views, evaluated
from medssl.models.heads import HeadNorm, ProjectionHead
from medssl.models.norm import SyncBatchNorm

log = logging.getLogger(__name__)

OF_FORM: Final = {
    "v1": ("n_components", "feature_norm"),
    "v2": ("n_heads", "temperature", "hidden_dim", "projection_dim", "head_norm"),
}
"""Settings that only one form has."""
NEGLIGIBLE: Final = 1e-6
"""Directions with less of the largest variance than this are rounding, which whitening would blow up."""
ITEMS_PER_DIRECTION: Final = 4
"""At least. Whitened in n - 1 directions, n items are all equally far apart, and rounding decides their clusters."""


class DeepClusterConfig(StrictModel):
    """Settings of DeepCluster."""

    name: Literal["deepcluster"] = "deepcluster"
    form: Literal["v1", "v2"] = "v1"
    """v1: a classifier drawn anew at every clustering (Caron et al. 2018). v2: frozen centroids as prototypes, several
    clusterings at once (Caron et al. 2020, appendix D)."""
    n_clusters: PositiveInt = 64
    """K, at most the number of items. The papers: 10 000 (v1) and 3000 (v2) for the 1.3 million images of ImageNet,
    ten times what one would count as classes. Ours leaves a few items to each cluster of a set of hundreds."""
    refresh_epochs: PositiveFloat = 1.0
    """Epochs between two clusterings (both papers: 1). A tiny set has epochs of a few steps: take more there, or v1
    hardly trains a classifier before it is drawn anew."""
    iterations: PositiveInt | None = None
    """Updates of k-means; null: 20 for v1 (Caron et al. 2018), 10 for v2 (Caron et al. 2020)."""
    n_components: PositiveInt = 256
    """Of v1: dimensions left by the whitened PCA (Caron et al. 2018, section 3.3); as many as the features have, and at
    most a quarter of the items. Whitening makes all of them count alike, the noise of the last ones too, until all
    items are equally far apart: on small sets a few are enough."""
    feature_norm: HeadNorm = "batch"
    """Of v1: norm of h before the classifier, over the batch of all processes. Networks of the paper end in batch norm;
    under one with group norm a classifier that begins near 0 learns nothing before it is drawn anew (none)."""
    n_heads: PositiveInt = 3
    """Of v2: k-means clusterings from different starts (Caron et al. 2020, appendix D)."""
    temperature: PositiveFloat = 0.1
    """Of v2: divides the cosines of projections and prototypes (Caron et al. 2020)."""
    hidden_dim: PositiveInt | None = None
    """Of v2: width between the two layers of the projection; null: as many as the encoder gives (the paper: 2048)."""
    projection_dim: PositiveInt = 128
    """Of v2: length of the clustered vectors (Caron et al. 2020)."""
    head_norm: HeadNorm = "batch"
    """Of v2: norm between the two layers of the projection (the paper: batch). Without it an untrained network gives
    all items nearly one direction, and the loss stays long at its chance level."""

    @model_validator(mode="after")
    def _of_one_form(self) -> DeepClusterConfig:
        other = "v2" if self.form == "v1" else "v1"
        foreign = [name for name in OF_FORM[other] if name in self.model_fields_set]
        changed = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"{changed[0]}: belongs to form {other}, this is {self.form}; remove it, or change form")
        return self

    def needs(self) -> Needs:
        """One view or more of anything, of any sizes; a batch norm has nothing to tell of one item."""
        norm = self.feature_norm if self.form == "v1" else self.head_norm
        return Needs(
            views=1,
            more_views=True,
            min_batch=2 if norm == "batch" else 1,
            features=("h",) if self.form == "v1" else ("h", "z"),
            multi_crop=True,
        )


class DeepCluster(Method):
    r"""Caron et al. 2018, "Deep Clustering for Unsupervised Learning of Visual Features" (arXiv:1807.05520).

    Once an epoch all items are clustered by k-means on what the network makes of them, and until the next time the
    network learns to predict each item's cluster from augmented views. In v1 the features are whitened by PCA and a
    classifier, drawn anew after each clustering because clusters have no fixed order, predicts them. In v2 (Caron et
    al. 2020, arXiv:2006.09882, appendix D) the centroids themselves are the weights of the prediction, there are
    several clusterings, and nothing has to be learnt anew.

    Formula:
        $$ y_i = \arg\min_k \Vert f(x_i) - c_k \Vert^2, \qquad
        \mathcal{L}_{v1} = \frac{1}{N} \sum_i -\log \mathrm{softmax}(W h_i)_{y_i} $$
        $$ \mathcal{L}_{v2} = \frac{1}{NT} \sum_i \sum_{t=1}^{T}
        -\log \mathrm{softmax}\left(C_t z_i / \tau\right)_{y_i^t} $$
        N items; f the features h after PCA, whitening and division by their length, $c_k$ their centroids, W the
        classifier; z the projection of length 1, T clusterings, $C_t$ the centroids of clustering t, $\tau$ the
        temperature.

    Use it when:
        Batches must be small, or the set has groups of unequal size: unlike SeLa and SwAV nothing forces clusters to
        be equal. v2 is the safer choice for small cohorts. Give v1 the sampler `cluster_balanced`, as its authors do:
        without it a few large clusters rule the loss.

    Leave it when:
        Epochs are a handful of steps (each clustering embeds the whole set), or intensity tells scanners apart and
        augmentation does not hide it: k-means then finds the scanners first.

    Items are clustered as they are, without augmentation and in evaluation mode (the programs: from augmented views;
    v2's gathers them over the epoch before and gives each clustering another crop). k-means starts from items drawn
    with a seed of their own each time, and no cluster stays empty. Before the first clustering labels go in turn.

    Attributes:
        classifier: Of v1: h (N, F) to logits (N, K).
        prototypes: Of v2: centroids (T, K, D) of length 1, without gradient.
        assignments: The labels.
        refreshes: How many clusterings there were.
    """

    prototypes: Tensor
    refreshes: Tensor

    def __init__(self, config: DeepClusterConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features = parts.encoder.out_features
        self.n_heads = 1 if config.form == "v1" else config.n_heads
        self.iterations = config.iterations or (20 if config.form == "v1" else 10)
        self.assignments = Assignments(self.n_heads, config.n_clusters)
        self.seed = torch.initial_seed()
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))
        if config.form == "v1":
            self.norm = SyncBatchNorm(features) if config.feature_norm == "batch" else nn.Identity()
            self.classifier = nn.Linear(features, config.n_clusters)
        else:
            self.head = ProjectionHead(features, config.hidden_dim or features, config.projection_dim, config.head_norm)
            start = torch.randn(self.n_heads, config.n_clusters, config.projection_dim)
            self.register_buffer("prototypes", unit(start))
        self._drawn: list[nn.Parameter] = []
        self._clipped = False

    def fit_labels(self, table: ItemTable) -> None:
        """Size the labels, and fill them in turn until the first clustering.

        Raises:
            ConfigError: Fewer items than clusters.
        """
        self.assignments.fit(table, seed=self.seed)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Cross-entropy of the clusters over the items of every process."""
        if self.head is None:
            _, watched = embed_views(self.encoder, nn.Identity(), batch)  # (N, V, F)
            features, temperature = {"h": watched[:, 0]}, 1.0
            compared = self.norm(watched.flatten(0, 1)).unflatten(0, watched.shape[:2])
        else:
            h, watched = embed_views(self.encoder, self.head, batch)  # (N, V, D)
            features, temperature, compared = {"h": h, "z": watched[:, 0]}, self.config.temperature, watched
        logits = self._logits(compared)
        labels = self.assignments.of(batch.items["row"])
        agrees = (logits.detach().argmax(3) == labels[:, None]).float().flatten(1).mean(1)
        own = cluster_cross_entropy(logits, labels, temperature=temperature)
        loss, agrees, embedding = gather((own, agrees, watched[:, 0].detach()))
        return LossOutput(loss.mean(), cluster_logs(self.assignments, agrees), embedding, features)

    def refresh_steps(self, total_steps: int) -> Collection[int]:
        """The start of every ``refresh_epochs`` epochs."""
        return range(0, total_steps, max(1, round(self.config.refresh_epochs * self.steps_per_epoch)))

    @torch.no_grad()
    def refresh(self, embed_all: EmbedAll) -> None:
        """Cluster every item anew; v1 draws its classifier, v2 takes the centroids as prototypes."""
        h = whole_set(embed_all, self.assignments)
        rows = self._whitened(h) if self.head is None else evaluated(self.head, h.to(self.prototypes))
        self.refreshes += 1
        moment = int(self.refreshes)
        found = [
            k_means(
                rows,
                self.config.n_clusters,
                iterations=self.iterations,
                seed=derive_seed(self.seed, CLUSTERS, moment, head),
                spherical=self.head is not None,
            )
            for head in range(self.n_heads)
        ]
        self.assignments.store(torch.stack([labels for labels, _ in found]))
        if self.head is None:
            set_statistics(self.norm, h)
            self._draw_classifier(derive_seed(self.seed, CLUSTERS, moment, self.n_heads))
        else:
            self.prototypes.copy_(distributed.from_first(torch.stack([centroids for _, centroids in found])))

    def reinitialised(self) -> Collection[nn.Parameter]:
        """The classifier of v1."""
        return self._drawn

    def clusters(self) -> Ints:
        """The labels (T, n) of the training items."""
        return self.assignments.numpy()

    @torch.no_grad()
    def assign(self, h: Tensor) -> Tensor:
        """The cluster (T, n) that is predicted for encoder outputs (n, F)."""
        like = self.classifier.weight if self.head is None else self.prototypes
        rows = evaluated(self.norm if self.head is None else self.head, h.to(like))
        return self._logits(rows[:, None]).argmax(3)[:, 0].T

    def _logits(self, x: Tensor) -> Tensor:
        """(N, V, F) or (N, V, D) to (N, V, T, K), before the temperature."""
        if self.head is None:
            return self.classifier(x)[:, :, None]
        z = unit(x)
        with torch.autocast(z.device.type, enabled=False):
            return torch.einsum("nvd,tkd->nvtk", z, self.prototypes.to(z.dtype))

    def _whitened(self, h: Tensor) -> Tensor:
        """PCA to at most ``n_components``, whitened, rows of length 1 (Caron et al. 2018, section 3.3).

        Of items that are all equal, one direction of zeros: a collapse is for the monitor to name.
        """
        if bool((h == h[0]).all()):
            return h.new_zeros(len(h), 1)
        n, width = h.shape
        wanted = min(self.config.n_components, width, max(1, n // ITEMS_PER_DIRECTION))
        pca = PCA(wanted, whiten=True, random_state=0).fit(h.double().cpu().numpy())
        kept = int((pca.explained_variance_ > NEGLIGIBLE * pca.explained_variance_[0]).sum())
        if kept < self.config.n_components and not self._clipped:
            self._clipped = True
            log.info(
                "deepcluster: %d of n_components %d: %d items of %d features have no more that tell them apart",
                kept,
                self.config.n_components,
                n,
                width,
            )
        scores = torch.from_numpy(pca.transform(h.double().cpu().numpy())[:, :kept])
        return unit(scores.to(h.device, torch.promote_types(h.dtype, torch.float32)))

    def _draw_classifier(self, seed: int) -> None:
        """Normal weights of deviation 0.01 and no bias (the authors' program); drawn on the CPU, alike everywhere."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(self.classifier.weight.shape).normal_(0, 0.01, generator=generator)
        self.classifier.weight.copy_(weight)
        nn.init.zeros_(self.classifier.bias)
        self._drawn = [self.classifier.weight, self.classifier.bias]
