"""Heads that give every place of a dense map a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from medssl.core.errors import ConfigError, ShapeError
from medssl.models.blocks import CONV


class ClusterHeads(nn.Module):
    """A dense map (N, C, *spatial) to logits of two clusterings, each by one 1^d convolution.

    Ji et al. 2019 (arXiv:1807.06653), section 4.2: the main head has as many clusters as there are classes, the
    over-clustering head more, so that it can use what the main head has no room for. Exported beside the encoder,
    because the clusters are the result.

    Args:
        channels: C.
        dims: 2 or 3.
        k_main: Clusters of the main head.
        k_over: Clusters of the over-clustering head.

    Attributes:
        architecture: What ``build_cluster_heads`` needs to build it again.
    """

    kind: Final = "clusters"

    def __init__(self, channels: int, dims: int, k_main: int, k_over: int) -> None:
        super().__init__()
        self.channels, self.dims = channels, dims
        self.n_clusters = {"main": k_main, "over": k_over}
        self.architecture: dict[str, Any] = {
            "kind": self.kind,
            "channels": channels,
            "dims": dims,
            "k_main": k_main,
            "k_over": k_over,
        }
        self.main, self.over = CONV[dims](channels, k_main, 1), CONV[dims](channels, k_over, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits ``main`` (N, k_main, *spatial) and ``over`` (N, k_over, *spatial)."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.channels:
            raise ShapeError(f"cluster heads take {self.channels} channels in {self.dims}D", found=str(tuple(x.shape)))
        return {"main": self.main(x), "over": self.over(x)}


def build_cluster_heads(architecture: Mapping[str, Any]) -> ClusterHeads:
    """The heads that ``architecture`` describes, with fresh weights.

    Raises:
        ConfigError: A description that this version does not know.
    """
    settings = {name: value for name, value in architecture.items() if name != "kind"}
    if architecture.get("kind") != ClusterHeads.kind:
        raise ConfigError("cluster heads of an unknown kind", found=str(dict(architecture))[:200])
    try:
        return ClusterHeads(**settings)
    except (TypeError, KeyError) as error:
        raise ConfigError("the description of cluster heads is incomplete", found=str(error)) from error
