"""Decoupled uniformity: centroids of each item's views spread out, guided by a kernel of prior knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from medssl.core.distributed import gather
from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.core.types import ItemTable, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.data.weak_labels import LabelUse
from medssl.losses import decoupled_uniformity
from medssl.methods.entry import embed_views
from medssl.methods.heads import HeadConfig
from medssl.methods.kernels import KernelConfig, table_kernel

PRIOR: Final = "prior"
"""Name under which the rows of a prior table are joined to the items' labels."""
_MANY: Final = 1000


class PriorConfig(StrictModel):
    """What is known of people beforehand: weak attributes, or any table of embeddings."""

    attributes: KernelConfig | None = None
    """A kernel of columns of the manifest."""
    table: Path | None = None
    """Table of embeddings (.csv, .parquet, .npy) as `medssl embed` writes, joined by its column `case`, else `subject`;
    a relative path is relative to the folder in which the command is run."""
    kernel: Literal["rbf", "cosine"] = "rbf"
    """Of the rows of the table."""
    sigma: PositiveFloat | None = None
    """Width of rbf in the units of the table; null: the median distance between the people that are trained on
    (the paper sets it by data set: 10 to 100)."""

    @model_validator(mode="after")
    def _one_source(self) -> PriorConfig:
        if (self.attributes is None) == (self.table is None):
            raise ValueError("give either attributes or table")
        if self.attributes is not None and (self.kernel != "rbf" or self.sigma is not None):
            raise ValueError("kernel and sigma belong to a table; those of attributes are set under attributes")
        if self.kernel == "cosine" and self.sigma is not None:
            raise ValueError("kernel cosine takes no sigma")
        if self.attributes is not None and self.attributes.missing == "ignore":
            raise ValueError(
                "attributes.missing: a kernel that ignores missing labels need not be positive semidefinite, which "
                "this loss requires; leave out the people without labels (data.exclude)"
            )
        return self


class DecoupledUniformityConfig(HeadConfig):
    """Settings of decoupled uniformity."""

    name: Literal["decoupled_uniformity"] = "decoupled_uniformity"
    prior: PriorConfig | None = None
    """Prior knowledge; null: none, the plain loss."""
    t: PositiveFloat = 2.0
    """Sharpness of the potential (the authors' runs: 2; the paper's text: 1)."""
    regularization: PositiveFloat = 0.01
    """Added to the diagonal of the kernel before it is solved (the authors' program: 0.01)."""
    projection_dim: PositiveInt = 256
    """Length of the compared vectors (Dufumier et al. 2023)."""

    def needs(self) -> Needs:
        """One view or more of anything, and what the prior needs; one view aligns nothing."""
        labels: tuple[str, ...] = ()
        if self.prior is not None:
            labels = (PRIOR,) if self.prior.attributes is None else self.prior.attributes.columns
        return Needs(views=1, more_views=True, min_batch=2, labels=labels, features=("h", "z"))

    def label_uses(self) -> tuple[LabelUse, ...]:
        """What the columns of an attribute prior must be."""
        if self.prior is None or self.prior.attributes is None:
            return ()
        return self.prior.attributes.uses("method.prior.attributes")


class DecoupledUniformity(Method):
    r"""Dufumier et al. 2023, "Integrating Prior Knowledge in Contrastive Learning with Kernel" (arXiv:2206.01646).

    The centroids of each item's views spread over the sphere; averaging the views is what aligns them. A prior says
    which people shall share their centroids: a kernel of columns (`prior.attributes`), or the rows of any table of
    embeddings (`prior.table`). There are no positive pairs and no temperature.

    Formula:
        $$ \mathcal{L} = \log \frac{1}{N(N-1)} \sum_{i \ne j} e^{-t \Vert m_i - m_j \Vert^2}, \qquad
        m \leftarrow (K + \lambda 1)^{-1} K m $$
        N items, $m_i$ the mean of the projections, of length 1, of the views of item i; K the kernel of the priors
        (without a prior m stays as it is), $\lambda$ the regularization.

    Use it when:
        You have a prior that you trust more than the augmentations: weak labels, or the code of a `vae`.

    Leave it when:
        The prior holds what you want to be free of: the code of an autoencoder follows what varies most, which may be
        the scanner. The width of its kernel is a choice: null takes the median distance between people, which is a
        start.

    Needs at least two views to align anything (one is allowed). A table is joined by its column `case`, else by
    `subject`; every person that is trained on must be in it, others need not. A table whose network was trained on test
    people is refused. A prior table comes as ``batch.labels["prior"]``, float (N, P). The median distance, where it is
    the width of the kernel, is a buffer, so that a resumed run has the one that it began with.

    With the code of a `vae` as the prior:

        medssl pretrain vae.yaml
        medssl embed runs/vae manifest.csv --layer z -o prior.parquet
        medssl pretrain guided.yaml --set method.prior.table=prior.parquet
    """

    sigma: Tensor

    def __init__(self, config: DecoupledUniformityConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        self.head = config.projection_head(parts.encoder.out_features)
        if self._has_width:
            prior = config.prior
            assert prior is not None
            self.register_buffer("sigma", torch.tensor(prior.sigma or torch.nan))

    @property
    def _has_width(self) -> bool:
        prior = self.config.prior
        return prior is not None and prior.table is not None and prior.kernel == "rbf"

    def fit_labels(self, table: ItemTable) -> None:
        """The median distance between priors, where no sigma is given.

        Raises:
            ConfigError: All priors are equal, or the items have none.
        """
        prior = self.config.prior
        if not self._has_width or prior is None or prior.sigma is not None:
            return
        if PRIOR not in table.labels:
            raise ConfigError("the items have no prior", where="method.prior.table", fix="join the table first")
        _, first = np.unique(table.volume, return_index=True)
        rows = torch.from_numpy(table.labels[PRIOR][first].astype(np.float64))
        if len(rows) > _MANY:  # evenly over the cohort: the median of a million distances is near enough
            rows = rows[torch.linspace(0, len(rows) - 1, _MANY).long()]
        median = torch.pdist(rows).median() if len(rows) > 1 else torch.zeros(())
        if not median > 0:
            raise ConfigError(
                "most rows of the prior table are equal, so that there is no median distance to take as sigma",
                where="method.prior.sigma",
                fix="set it, or use a table whose rows tell people apart",
            )
        self.sigma.fill_(float(median))

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Decoupled uniformity over the items of every process."""
        config = self.config
        h, own = embed_views(self.encoder, self.head, batch)
        z, kernel = self._with_kernel(own, batch)
        loss = decoupled_uniformity(z, t=config.t, prior_kernel=kernel, regularization=config.regularization)
        # With all centroids at one point; a prior moves equal centroids apart.
        logs = {"chance_loss": torch.zeros_like(loss.detach())} if kernel is None else {}
        return LossOutput(loss, logs, embedding=z[:, 0].detach(), features={"h": h, "z": own[:, 0]})

    def _with_kernel(self, own: Tensor, batch: ViewBatch) -> tuple[Tensor, Tensor | None]:
        """Projections and kernel of the items of every process."""
        prior = self.config.prior
        if prior is None:
            return gather(own), None
        if prior.attributes is not None:
            z, labels = gather((own, prior.attributes.columns_of(batch.labels)))
            return z, prior.attributes.weights(labels)
        z, rows = gather((own, batch.labels[PRIOR]))
        return z, table_kernel(rows, prior.kernel, self.sigma if self._has_width else None)
