"""Models Genesis: restore an item from a deformed copy of itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medssl.core import distributed
from medssl.core.distributed import gather
from medssl.core.errors import ConfigError, InputError
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.models.blocks import CONV
from medssl.transforms.genesis import DeformationConfig, deform, draw

MOST_CLIPPED = 0.25
"""Mean distance of intensities from [0, 1] beyond which they are taken to be of another scale."""


class ModelsGenesisConfig(DeformationConfig):
    """Settings of the restoration of deformed items."""

    name: Literal["models_genesis"] = "models_genesis"

    def needs(self) -> Needs:
        """One view, which is what is restored; encoder and decoder."""
        return Needs(
            views=1,
            spatial_dims=IMAGES,
            decoder=True,
            trains=("encoder", "decoder"),
            features=(),
            unit_range=True,
        )


class ModelsGenesis(Method):
    r"""Zhou et al. 2021, "Models Genesis" (Medical Image Analysis 67, arXiv:2004.07882).

    An item is deformed: voxels are shuffled within small windows, intensities go through a random curve, and noise is
    painted into boxes or around them. A U-Net restores the item as it was, voxel by voxel. Encoder and decoder are both
    pretrained, so that segmentation begins with a whole network.

    Formula:
        $$ L = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|\Omega|} \sum_{u \in \Omega}
        \bigl(\sigma(f(\tilde x_i))_u - x_{i,u}\bigr)^2 $$
        $x_i$ is item i with intensities in [0, 1], $\tilde x_i$ its deformed copy, $f$ encoder, decoder and a
        convolution of one voxel, $\sigma$ the logistic function, $\Omega$ all voxels (and channels).

    Use it when:
        The task to come is segmentation with the same network, and there are too few volumes for contrast between
        people. Items are small volumes or slices, with intensities scaled by percentiles. It needs no labels, no
        positions, and works with batches of one.

    Leave it when:
        The task works on one vector per item (age, diagnosis): nothing asks the encoder's output to tell people apart.
        Intensities carry the meaning (CT, quantitative maps): the curve teaches the network to look past them, and
        inverts them in 45 % of the items. Feature tables have no neighbourhoods to shuffle or paint.

    Before you use it in a product: the authors' repository declares a licence for non-commercial use only, and "patent
    pending". The code here was written from the published definition and holds nothing of theirs; a patent would apply
    to the method all the same. This is a note, not legal advice.

    It compares no items, so there is no embedding to collapse. What a restoration is worth shows beside it in the logs:
    `one_grey` is the error of the best constant, where training begins, and `untouched` that of the deformed item.

    Intensities beyond [0, 1] are cut off, in the item that is restored too. Deformations are drawn for each item from
    (seed, step, place in the batch); flips, the authors' only other augmentation, are up to ``views``.

    Raises:
        ConfigError: No decoder, or one that does not reach the resolution of the item.
    """

    def __init__(self, config: ModelsGenesisConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        if parts.decoder is None or not parts.decoder.complete:
            raise ConfigError(
                "models_genesis restores every voxel and trains the whole decoder",
                where="model.decoder_blocks",
                fix="train as many decoder blocks as the encoder has levels below the first",
            )
        self.decoder = parts.decoder
        self.restoring = CONV[parts.spatial_dims](parts.decoder.out_channels, parts.image_shape[0], 1)
        self._looked = False

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Mean squared error over voxels and over the items of every process.

        Raises:
            InputError: At the first batch: intensities far outside [0, 1].
        """
        view = batch.views[0]
        wide = torch.promote_types(view.dtype, torch.float32)
        clean = view.detach().to(wide).clamp(0, 1)
        clipped = (view - clean).abs().flatten(1).mean(1)
        self._look_once(clipped)
        # Not batch.items["slot"]: reading that would wait for the device.
        first = distributed.rank() * len(view)
        slots = range(first, first + len(view))
        deformed = deform(clean, draw(self.config, clean.shape[2:], seed=batch.seed, step=batch.step, slots=slots))
        logits = self.restoring(self.decoder(self.encoder.feature_maps(deformed)))
        with torch.autocast(view.device.type, enabled=False):
            error = _mean_square(logits.to(wide).sigmoid() - clean)
            as_it_is = _mean_square(deformed - clean)
            rows = torch.stack([as_it_is, clean.flatten(1).mean(1), _mean_square(clean), clipped], dim=1)
            error, rows = gather((error, rows))
            loss = error.mean()
            untouched, mean, square, beyond = rows.mean(0).detach()
        logs = {
            "untouched": untouched,  # error of a network that hands its input through
            "one_grey": square - mean.square(),  # error of the best constant
            "clipped": beyond,
        }
        return LossOutput(loss, logs=logs)

    def _look_once(self, clipped: Tensor) -> None:
        """Refuse intensities of another scale; only at the first batch, because looking waits for the device."""
        if self._looked:
            return
        self._looked = True
        if float(clipped.mean()) > MOST_CLIPPED:
            raise InputError(
                "models_genesis restores intensities in [0, 1], and these lie elsewhere",
                found=f"a mean distance of {float(clipped.mean()):.2g} from that range in the first batch",
                fix="set data.prepare.intensity: percentile",
            )


def _mean_square(images: Tensor) -> Tensor:
    """(N,) mean over channels and voxels."""
    return images.square().flatten(1).mean(1)
