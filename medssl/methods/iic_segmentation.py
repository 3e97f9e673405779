"""IIC for dense maps: clusters of places that stay the same in another view."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from medssl.core.distributed import all_reduce_sum, gather
from medssl.core.errors import ConfigError, ShapeError
from medssl.core.schema import StrictModel
from medssl.core.transfer import onto
from medssl.core.types import IMAGES, LossOutput, Method, ModelParts, Needs, ViewBatch
from medssl.losses.iic import joint_loss, segmentation_joints
from medssl.methods.entry import stacked_views
from medssl.models.cluster_heads import ClusterHeads
from medssl.transforms.geometry import compose_theta, grid, inverse_theta

Clusters = Annotated[int, Field(ge=2)]
WATCHED = 4
"""Places on an axis of the map whose features are watched for collapse."""


class IICSegmentationConfig(StrictModel):
    """Settings of invariant information clustering of places."""

    name: Literal["iic_segmentation"] = "iic_segmentation"
    on: Literal["decoder", "encoder"] = "decoder"
    """Which map is clustered: the decoder's (a U-Net), or the encoder's coarsest, without skip connections (the
    authors' network is VGG-like: encoders vgg_2d, vgg_3d)."""
    k_main: Clusters = 3
    """Clusters of the main head: as many as classes, background included (Ji et al. 2019, COCO-Stuff-3: 3)."""
    k_over: Clusters = 15
    """Clusters of the over-clustering head (Ji et al. 2019, COCO-Stuff-3: 15, Potsdam-3: 24)."""
    lamb_main: PositiveFloat = 1.5
    """Weight of the entropy of the clusters in the main head; above 1 it pushes towards clusters of equal size (Ji et
    al. 2019: 1.5 for sets of 3 classes, 1 for all classes). Background that fills most of an image asks for 1."""
    lamb_over: PositiveFloat = 1.0
    """The same in the over-clustering head (Ji et al. 2019: 1)."""
    alternate_steps: PositiveInt | None = 1
    """Steps for which one head is trained before the other takes its turn, over-clustering first (the authors' program
    alternates by epochs); null: the mean of both losses at every step."""
    max_displacement: NonNegativeInt = 1
    """T: also places up to so many voxels of the map apart, on every axis, should share their cluster. The paper has 5
    to 10 in photographs of 128 to 200 pixels, for (2T + 1)^2 displacements; 3D has (2T + 1)^3, so ours is 1."""
    collapsed: bool = False
    """Sum over displacements before the logarithms (the paper's formula); false: the mean of a loss for each, which is
    what every published command of the authors runs."""

    def needs(self) -> Needs:
        """Two views of an image, which may move voxels in any affine way; a decoder where its map is clustered."""
        on_decoder = self.on == "decoder"
        return Needs(
            views=2,
            spatial_dims=IMAGES,
            decoder=on_decoder,
            trains=("encoder", "decoder") if on_decoder else ("encoder",),
            features=(),
        )


class IICSegmentation(Method):
    r"""Ji et al. 2019, "Invariant Information Clustering for Unsupervised Image Classification and Segmentation"
    (arXiv:1807.06653).

    A network gives every place of an image a probability for each of K clusters. It is trained so that the cluster of
    a place in one view tells as much as possible about the cluster of the same place, or of one nearby, in another view
    whose geometry is undone on the map. A second head with more clusters is trained beside the main one and thrown
    away or mapped to classes many to one.

    Formula:
        $$ L = \frac{1}{(2T+1)^d} \sum_{t \in [-T, T]^d} - \sum_{c, c'} P^t_{cc'} \left( \log P^t_{cc'}
        - \lambda \log P^t_c - \lambda \log P^t_{c'} \right), \qquad
        P^t \propto \sum_{n, u} \Phi_{n, u + t} \Phi'^\top_{n, u} $$

        with $\Phi_{n,u}$ the cluster probabilities of view 1 of item n at place u, $\Phi'$ those of view 2 brought onto
        the grid of view 1, both 0 where a place is not seen in both, $P^t$ symmetrised and divided by its sum, $P^t_c$
        its marginal, t the displacement and $\lambda$ the weight of the marginal entropies.

    Use it when:
        You want regions without any label and can look at them afterwards: tissue classes of similar size and clear
        contrast (brain tissue, fat and muscle) in images that were cropped to the organ. `medssl evaluate clusters`
        matches clusters to labels, and checks whether they depend on the image at all.

    Leave it when:
        The structure of interest is a small part of the volume: clusters of similar size then split the background.
        Clusters follow intensity and position before anatomy, and a network that is padded with zeros tells position
        from the border alone: after short trainings on hippocampus crops, a U-Net and a VGG split a blank image in
        half, the same VGG with `padding: replicate` not at all, and none of them found the hippocampus. Look at the
        blank-image check before anything else.

    Raises:
        ConfigError: No decoder where its map is to be clustered, or a map that does not cover the image evenly.
    """

    def __init__(self, config: IICSegmentationConfig, parts: ModelParts) -> None:
        super().__init__()
        self.config = config
        self.encoder = parts.encoder
        if config.on == "decoder":
            if parts.decoder is None:
                raise ConfigError(
                    "iic_segmentation clusters the decoder's map, but there is no decoder",
                    fix="set model.decoder_blocks: 3, or method.on: encoder",
                )
            self.decoder = parts.decoder
        channels = self.encoder.width[-1] if self.decoder is None else self.decoder.out_channels
        self.cluster_heads = ClusterHeads(channels, parts.spatial_dims, config.k_main, config.k_over)
        self._lamb = {"main": config.lamb_main, "over": config.lamb_over}
        map_size = dense_map_size(self.encoder, self.decoder, parts.image_shape)
        check_covers(parts.image_shape[1:], map_size, ConfigError)
        if config.max_displacement >= min(map_size):
            raise ConfigError(
                "the displacement is as large as the map",
                where="method.max_displacement",
                found=f"{config.max_displacement}, the map has {map_size} voxels",
                fix=f"set it to at most {min(map_size) - 1}",
            )

    def dense_map(self, images: Tensor) -> Tensor:
        """The map (N, C, *spatial) that is clustered, of images (N, C, *spatial)."""
        return dense_map(self.encoder, self.decoder, images)

    def active(self, step: int) -> tuple[str, ...]:
        """The heads that are trained at a step."""
        turn = self.config.alternate_steps
        return ("main", "over") if turn is None else (("over", "main")[step // turn % 2],)

    def training_loss(self, batch: ViewBatch) -> LossOutput:
        """Negative mutual information over the items of every process, of the heads whose turn it is.

        Only the joints of clusters are exchanged between processes: they add up, and are far smaller than maps.
        """
        config = self.config
        features = self.dense_map(stacked_views(batch, 2))
        logits = {name: maps.chunk(2) for name, maps in self.cluster_heads(features).items()}
        size = tuple(features.shape[2:])
        check_covers(tuple(batch.views[0].shape[2:]), size, ShapeError)
        affine, mask = seen_in_both(batch.geometry[0], batch.geometry[1], size)
        active, losses = self.active(batch.step), {}
        for name, (first, second) in logits.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in active):
                joints = segmentation_joints(
                    first, second, affine2_to_1=affine, mask=mask, max_displacement=config.max_displacement
                )
                losses[name] = joint_loss(all_reduce_sum(joints), lamb=self._lamb[name], collapsed=config.collapsed)
        loss = torch.stack([losses[name] for name in active]).mean()
        for name in losses.keys() - active:
            # The other head takes part with gradient 0: data-parallel training waits for every weight.
            loss = loss + 0.0 * torch.stack([p.sum() for p in getattr(self.cluster_heads, name).parameters()]).sum()
        logs = {f"iic_{name}": value.detach() for name, value in losses.items()}
        logs["chance_loss"] = torch.full_like(loss.detach(), sum(self._chance(name) for name in active) / len(active))
        logs["used_prototypes"] = used_share(logits["main"][0])
        # Of them a single one is a collapse, which the level of a guess does not tell where lamb_main is not 1.
        logs["n_prototypes"] = torch.full_like(loss.detach(), config.k_main)
        return LossOutput(loss, logs, embedding=gather(_watched(features.detach().chunk(2)[0])))

    def _chance(self, head: str) -> float:
        """The loss of a uniform guess: -2 (lamb - 1) log K, 0 for the mutual information itself."""
        return -2 * (self._lamb[head] - 1) * math.log(self.cluster_heads.n_clusters[head])


def dense_map(encoder: nn.Module, decoder: nn.Module | None, images: Tensor) -> Tensor:
    """The decoder's map of images (N, C, *spatial), or without one the encoder's coarsest: (N, C', *spatial')."""
    maps = encoder.feature_maps(images)  # type: ignore[operator]  # every encoder has it
    result: Tensor = maps[-1] if decoder is None else decoder(maps)
    return result


def dense_map_size(encoder: nn.Module, decoder: nn.Module | None, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial size of ``dense_map`` for images (C, *spatial)."""
    networks = nn.ModuleList([encoder] if decoder is None else [encoder, decoder])
    modes = [(module, module.training) for module in networks.modules()]
    networks.eval()  # running statistics must not see the empty image
    try:
        with torch.no_grad():
            image = torch.zeros(1, *image_shape, device=next(networks.parameters()).device)
            return tuple(dense_map(encoder, decoder, image).shape[2:])
    finally:
        for module, mode in modes:
            module.training = mode


def check_covers(image: tuple[int, ...], map_size: tuple[int, ...], error: type[ConfigError | ShapeError]) -> None:
    """Refuse images of which a coarser map leaves out the last voxels: its places would not lie where it is said."""
    if any(n % m for n, m in zip(image, map_size, strict=True)):
        steps = [2 ** round(math.log2(n / m)) for n, m in zip(image, map_size, strict=True)]  # encoders halve
        raise error(
            "the map that is clustered does not cover the image evenly, so views could not be brought onto each other",
            where="data.prepare.size",
            found=f"images of {tuple(image)}, a map of {tuple(map_size)}",
            fix=f"give images lengths that are multiples of {tuple(steps)}",
        )


def seen_in_both(
    theta1: Tensor | None, theta2: Tensor | None, size: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """How view 2 is brought onto the grid of view 1, and which places of that lie in both.

    Args:
        theta1: (N, d, d + 1), view 1 -> item, or None where no voxel was moved.
        theta2: The same of view 2.
        size: Of the map, the same for both views.

    Returns:
        (N, d, d + 1), view 1 -> view 2 = inverse(theta2) o theta1, and the mask (N, *size): inside the item, and at
        least as far inside view 2 as the centre of its outermost voxels. Both None where neither view moved.
    """
    if theta1 is None and theta2 is None:
        return None, None
    like = theta1 if theta1 is not None else theta2
    assert like is not None
    identity = torch.eye(like.shape[1], like.shape[2], dtype=like.dtype, device=like.device).expand_as(like)
    first, second = (identity if theta is None else theta for theta in (theta1, theta2))
    between = compose_theta(inverse_theta(second), first)
    # Coordinates run from the last axis to the first; rounding must not cut off the outermost voxels.
    edge = onto(torch.tensor([1.0 - 1.0 / n for n in reversed(size)], dtype=like.dtype) + 1e-4, like.device)
    inside = (grid(between, size).abs() <= edge).all(-1) & (grid(first, size).abs() <= 1 + 1e-4).all(-1)
    return between, inside


def used_share(logits: Tensor) -> Tensor:
    """Share of the clusters that any place of the batch of every process prefers, of logits (N, K, *spatial)."""
    k = logits.shape[1]
    places = logits.detach().argmax(1).flatten()
    used = torch.zeros(k, device=logits.device).scatter(0, places, 1.0)
    return gather(used[None]).amax(0).mean()


def _watched(features: Tensor) -> Tensor:
    """Features of a few places of every item, (N places, C)."""
    size = [min(WATCHED, n) for n in features.shape[2:]]
    pool = adaptive_avg_pool2d if features.ndim == 4 else adaptive_avg_pool3d
    return pool(features.float(), size).flatten(2).transpose(1, 2).flatten(0, 1)
