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
    r"""Kingma & Welling 2014 (arXiv:1312.6114), with the weight beta of Higgins et al. 2017 (beta-VAE).

    The encoder's averaged output h gives the mean and variance of a short code z, and a decoder that mirrors the
    encoder draws the item from a sample of it. Its embedding can be the prior of `decoupled_uniformity`. It takes any
    encoder and one view, which is drawn as it is seen.

    Formula:
        $$ \mathcal{L} = \frac{1}{N V} \sum_i \Big[ \tfrac12 \Vert x_i - \hat x_i \Vert^2
        + \tfrac{\beta}{2} \sum_d \left( \mu_{id}^2 + \sigma_{id}^2 - \log \sigma_{id}^2 - 1 \right) \Big] $$
        N items of V voxels (or features), so that neither the loss nor the learning rate depends on their size;
        $\hat x$ what is drawn, $\mu$ and $\sigma$ mean and deviation of the code. With $\beta = 1$ this is the bound of
        a decoder with noise of variance 1.

    Use it when:
        You want a prior without labels, or a compact code of tables or small volumes.

    Leave it when:
        The code must follow anatomy rather than the scanner: it follows what varies most. Where a direction of the data
        varies less than beta (in units of the standardised intensities, summed over voxels), its code falls silent, and
        with too large a beta all of it does: watch `active_dimensions`.

    `kl` in `metrics.csv` is not divided by the voxels; `active_dimensions` counts those whose mean varies over the
    batch. ``z`` and the exported head are the mean.
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
                fix="build it for images of the size of the views",
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
