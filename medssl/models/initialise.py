"""Starting weights that depend on a seed and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from medssl.core.seeding import MODEL, derive_seed

ENCODER, DECODER, HEADS = range(3)
"""One number per part of a model, so that a part starts the same whatever is built beside it."""


@contextlib.contextmanager
def seeded_init(seed: int, part: int) -> Iterator[None]:
    """Modules built inside start from weights determined by (seed, part); the global generator is left as it was.

    Build on the CPU and move afterwards: weights are then the same for every device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derive_seed(seed, MODEL, part))
        yield


def he_normal(module: nn.Module) -> None:
    """He et al. 2015 (arXiv:1502.01852) normal weights for convolutions and linear maps of ``module``, biases 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
