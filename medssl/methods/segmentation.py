"""Segmentation, trained from scratch or from pretrained weights."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from medssl.core.distributed import all_reduce_sum, gather
from medssl.core.errors import ConfigError, InputError
from medssl.core.schema import StrictModel
from medssl.core.seeding import MIXUP, numpy_rng, permutation
from medssl.core.transfer import onto
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.models.decoders import SegmentationNet

SMOOTH: Final = 1e-5
"""Keeps Dice defined where a class is neither labelled nor predicted."""


class MixupConfig(StrictModel):
    """Convex combinations of two items and of their labels (Zhang et al. 2018, arXiv:1710.09412)."""

    alpha: PositiveFloat = 0.1
    """First parameter of the Beta distribution of the share of an item (0.1 as the GCL and LCL paper uses Mixup)."""
    beta: PositiveFloat = 0.1
    """Second parameter."""


class SegmentationConfig(StrictModel):
    """Settings of the segmentation task."""

    name: Literal["segmentation"] = "segmentation"
    n_classes: Annotated[int, Field(ge=2)] | None = None
    """With the background; null: as many as the manifest's label names need."""
    dice_weight: NonNegativeFloat = 1.0
    """Factor of the Dice loss."""
    cross_entropy_weight: NonNegativeFloat = 1.0
    """Factor of the cross-entropy; 0 gives the loss of the GCL and LCL paper."""
    dice_over: Literal["batch", "item"] = "batch"
    """Sums of Dice over the whole batch (steadier where classes are missing in slices) or within each item."""
    include_background: bool = True
    """Whether the background counts in Dice (the GCL and LCL paper: yes)."""
    mixup: MixupConfig | None = None
    """null: no Mixup."""

    def needs(self) -> Needs:
        """One view of each item, with its label map."""
        return Needs(
            views=1,
            labels=("label_map",),
            spatial_dims=IMAGES,
            decoder=True,
            trains=("encoder", "decoder"),
            features=(),
        )


class Segmentation(Method):
    """A network for segmentation, attribute ``network``, trained by Dice and cross-entropy.

    Pretrained weights are loaded into the parts before. ``batch.labels["label_map"]`` is int64 (N, *spatial) on the
    grid of view 0; voxels below 0 are unlabelled and ignored.

    Raises:
        ConfigError: No decoder, no number of classes, or no loss.
    """

    def __init__(self, config: SegmentationConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        if parts.decoder is None:
            raise ConfigError("segmentation needs a decoder", fix="leave model.decoder_blocks out to build all blocks")
        if config.n_classes is None:
            raise ConfigError("the number of classes is not known", where="task.n_classes", fix="set it")
        if config.dice_weight == config.cross_entropy_weight == 0:
            raise ConfigError("both weights are 0: there is no loss", where="task", fix="set task.dice_weight: 1")
        # The only place where the parts are registered: a second one would double every tensor of the state dict.
        self.network = SegmentationNet(parts.encoder, parts.decoder, config.n_classes)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]  # read-only here
        """The encoder of the network."""
        return self.network.encoder

    @property
    def decoder(self) -> nn.Module:  # type: ignore[override]  # read-only here
        """The decoder of the network."""
        return self.network.decoder

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Dice and cross-entropy over the items of every process."""
        n_classes = self.network.n_classes
        images, label_map = batch.views[0], batch.labels["label_map"]
        if label_map.device.type == "cpu" and bool((label_map >= n_classes).any()):
            raise InputError(
                "a label map holds more classes than the network",
                found=f"label {int(label_map.max())}, {n_classes} classes",
                fix="set task.n_classes to the number of classes with the background",
            )
        target, labelled = one_hot(label_map, n_classes)
        if self.config.mixup is not None:
            images, target, labelled = mix_items(images, target, labelled, batch, self.config.mixup)
        logits = self.network(images)
        with torch.autocast(logits.device.type, enabled=False):
            cross_entropy, dice = segmentation_losses(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                target,
                labelled,
                over=self.config.dice_over,
                background=self.config.include_background,
            )
            loss = self.config.cross_entropy_weight * cross_entropy + self.config.dice_weight * dice
        # On an accelerator nobody waits to look at the labels; an unknown one stops the run by its loss instead.
        loss = loss + torch.where((label_map >= n_classes).any(), torch.nan, 0.0)
        return LossOutput(loss, {"cross_entropy": cross_entropy.detach(), "dice_loss": dice.detach()})


def one_hot(label_map: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Targets float32 (N, K, *spatial) and which voxels are labelled, float32 (N, 1, *spatial)."""
    classes = torch.arange(n_classes, device=label_map.device).view(1, -1, *(1,) * (label_map.ndim - 1))
    return (label_map[:, None] == classes).float(), (label_map[:, None] >= 0).float()


def mix_items(
    images: Tensor, target: Tensor, labelled: Tensor, batch: ViewBatch, config: MixupConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup: each item becomes share x itself + (1 - share) x a partner drawn from the whole batch.

    The partners are a random order of the global batch and every item has a share of its own, both from the seed, the
    step and the slot. Images are gathered: a partner may lie in another process. A voxel counts where both are
    labelled.
    """
    slot = batch.items["slot"]
    all_images, all_target, all_labelled, slots = gather((images, target, labelled, slot))
    order = onto(torch.from_numpy(permutation(len(slots), batch.seed, MIXUP, batch.step)), slots.device)
    by_slot = slots.argsort()
    partner = by_slot[order[slot]]
    shares = numpy_rng(batch.seed, MIXUP, batch.step, 1).beta(config.alpha, config.beta, len(slots))
    share = onto(torch.from_numpy(shares).to(images.dtype), images.device)[slot].view(-1, *(1,) * (images.ndim - 1))
    return (
        share * images + (1 - share) * all_images[partner],
        share * target + (1 - share) * all_target[partner],
        labelled * all_labelled[partner],
    )


def segmentation_losses(
    logits: Tensor, target: Tensor, labelled: Tensor, *, over: Literal["batch", "item"], background: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and soft Dice loss over the items of every process.

    Cross-entropy: -sum_k y_k log p_k, mean over labelled voxels, in nats. Dice (Milletari et al. 2016,
    arXiv:1606.04797, with plain sums): 1 - (2 sum p y + s) / (sum p + sum y + s), s = 1e-5, mean over classes (and
    over items with any label); a class that neither labels nor predictions hold gives 0.

    Args:
        logits: float32 (N, K, *spatial).
        target: (N, K, *spatial), rows over K sum to 1 where labelled.
        labelled: (N, 1, *spatial), 1 or 0.
        over: Sums of Dice over the batch of all processes, or within each item.
        background: Whether class 0 counts in Dice.

    Returns:
        Two scalars; 0 with gradient 0 where nothing is labelled.
    """
    axes = list(range(2, logits.ndim))
    log_p = logits.log_softmax(1)
    voxels = all_reduce_sum(labelled.sum())
    cross_entropy = all_reduce_sum(-(target * log_p * labelled).sum()) / voxels.clamp(min=1)
    p = log_p.exp() * labelled
    target = target * labelled
    overlap, size = (p * target).sum(axes), (p + target).sum(axes)  # (N, K)
    seen = labelled.amax([1, *axes])[:, None].expand_as(size)  # an item without labels has no Dice
    if over == "batch":
        overlap, size, seen = all_reduce_sum(overlap.sum(0)), all_reduce_sum(size.sum(0)), all_reduce_sum(seen.sum(0))
        seen = (seen > 0).float()
    dice = 1 - (2 * overlap + SMOOTH) / (size + SMOOTH)
    first = 0 if background else 1
    dice, seen = dice[..., first:], seen[..., first:]
    if over == "batch":
        return cross_entropy, (dice * seen).mean()
    counted = all_reduce_sum(seen.sum())
    return cross_entropy, all_reduce_sum((dice * seen).sum()) / counted.clamp(min=1)
