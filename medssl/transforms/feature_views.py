"""Views of rows of a feature table: jitter and masking, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medssl.core.seeding import MASK, NOISE, VIEWS, numpy_rng
from medssl.core.transfer import onto
from medssl.transforms.augment_config import AugmentConfig


def augment_rows(
    rows: Tensor, config: AugmentConfig, *, seed: int, step: int, slots: Sequence[int], view: int
) -> Tensor:
    """One view of each row; ``rows`` themselves stay as they are.

    Each number is the one that its place in the global batch has in a stream of (seed, step, view), so every process
    finds its own rows' numbers by drawing those of the rows before them too. That costs next to nothing, whereas a
    generator for each row costs more than a small network's whole step. The numbers are drawn on the CPU and are the
    same for every device.

    Args:
        rows: (N, F) float, standardised features.
        config: The policy; noise, then mask.
        seed: The run's seed.
        step: The training step.
        slots: (N,) place of each row in the global batch.
        view: Number of the view; views of one row draw independently.

    Returns:
        (N, F) float32 on the device of ``rows``.

    Raises:
        ConfigError: The policy changes voxels, which rows do not have.
    """
    config.check(0)
    result = rows.detach().float()
    if not len(slots):
        return result
    slot, count = np.asarray(slots, dtype=np.int64), max(slots) + 1
    shape = (count, rows.shape[1])
    chances = numpy_rng(seed, VIEWS, step, view).random((count, 4), dtype=np.float32)[slot]
    if config.noise is not None:
        low, high = config.noise.std
        std = np.where(chances[:, 0] < config.noise.probability, low + (high - low) * chances[:, 1], 0.0)
        normal = numpy_rng(seed, NOISE, step, view).standard_normal(shape, dtype=np.float32)[slot]
        result = result + onto(torch.from_numpy(normal * std.astype(np.float32)[:, None]), rows.device)
    if config.mask is not None:
        low, high = config.mask.share
        share = np.where(chances[:, 2] < config.mask.probability, low + (high - low) * chances[:, 3], 0.0)
        masked = numpy_rng(seed, MASK, step, view).random(shape, dtype=np.float32)[slot] < share[:, None]
        result = result.masked_fill(onto(torch.from_numpy(masked), rows.device), 0.0)
    return result
