"""Variational autoencoder: an item is squeezed into a short random code and drawn from it again."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from medssl.core import seeding
from medssl.core.distributed import gather, world_size
from medssl.core.errors import ShapeError
from medssl.core.schema import StrictModel
from medssl.core.transfer import onto
from medssl.core.types import LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.models.heads import LinearHead
from medssl.models.vae import mirrored_decoder

LOG_VARIANCE: tuple[float, float] = (-20.0, 20.0)
"""Beyond, exp would leave what half precision and sums over many dimensions can hold."""
ACTIVE_VARIANCE = 0.01
"""A dimension whose mean varies more than this over the batch carries something (Burda et al. 2016)."""


class VAEConfig(StrictModel):
    """Settings of the variational autoencoder."""

    name: Literal["vae"] = "vae"
    latent_dim: PositiveInt = 64
    """Length of the code z."""
    beta: NonNegativeFloat = 1.0
    """Weight of the divergence from the unit normal; 1: the evidence bound, above: Higgins et al. 2017."""
    decoder_channels: PositiveInt = 256
    """Most channels of a level of the decoder, which otherwise has the encoder's; not for feature tables."""

    def needs(self) -> Needs:
        """One view of anything: the view itself is drawn again."""
        return Needs(views=1, features=("h", "z"))


class VAE(Method):
    """Kingma & Welling 2014 (arXiv:1312.6114), with the weight beta of Higgins et al. 2017 (beta-VAE).

    The encoder's features h give the mean and the log variance of the code by a linear map each; a decoder that mirrors
    the encoder draws the item from the code. With decoder noise of variance 1 an item's bound is

        sum over voxels of (x - drawn)^2 / 2  +  beta * sum over dimensions of (mu^2 + sigma^2 - log sigma^2 - 1) / 2.

    The loss is its mean over items **divided by the number of voxels** (of features), so that it and the learning rate
    do not depend on the size of the items; beta = 1 still is the bound. ``z`` and the exported head are the mean.
    """

    def __init__(self, config: VAEConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        features = parts.encoder.out_features
        self.head = LinearHead(features, config.latent_dim)
        self.log_variance = nn.Linear(features, config.latent_dim)
        self.drawing = mirrored_decoder(
            parts.encoder, parts.image_shape, config.latent_dim, channels=config.decoder_channels
        )

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Bound per voxel, mean over the items of every process.

        Raises:
            ShapeError: Views of another size than the items.
        """
        x = batch.views[0]
        if tuple(x.shape[1:]) != self.drawing.image_shape:
            raise ShapeError(
                "a variational autoencoder draws items of one size",
                found=f"views {tuple(x.shape[1:])}, built for {self.drawing.image_shape}",
                fix="let views keep the size of the items",
            )
        h = self.encoder(x)
        mu, log_variance = self.head(h), self.log_variance(h)
        wide = torch.promote_types(mu.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            mean, log_variance = mu.to(wide), log_variance.to(wide).clamp(*LOG_VARIANCE)
            z = mean + (0.5 * log_variance).exp() * self._noise(batch).to(mean)
        drawn = self.drawing(z)
        with torch.autocast(x.device.type, enabled=False):
            error = 0.5 * (drawn.to(wide) - x.to(wide)).square().flatten(1).mean(1)
            divergence = kl_to_unit_normal(mean, log_variance)
            error, divergence, means = gather((error, divergence, mean.detach()))
            n_voxels = x[0].numel()
            loss = (error + self.config.beta / n_voxels * divergence).mean()
        logs = {
            "reconstruction": error.detach().mean(),
            "kl": divergence.detach().mean(),
            "active_dimensions": (means.var(0, correction=0) > ACTIVE_VARIANCE).sum(),
        }
        return LossOutput(loss, logs=logs, embedding=means, features={"h": h, "z": mu})

    def _noise(self, batch: ViewBatch) -> Tensor:
        """Unit normal (N, L) of this process's items, from the seed, the step and their place in the global batch."""
        slot = batch.items["slot"]
        shape = (len(slot) * world_size(), self.config.latent_dim)
        rng = torch.Generator().manual_seed(seeding.derive_seed(batch.seed, seeding.LATENT, batch.step))
        return onto(torch.randn(shape, generator=rng), slot.device)[slot]


def kl_to_unit_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of independent normals from unit normals, summed over dimensions.

    Kingma & Welling 2014, appendix B. Both (N, L); nats, (N,).
    """
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
