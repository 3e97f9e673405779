"""Random numbers as pure functions of (seed, what for, where): nothing here keeps state between calls.

A batch can therefore be made again from its step number alone, by any number of workers and on any number of processes.
"""

from __future__ import annotations

from typing import Final

import numpy as np

# One number per use, so that two uses of the same (seed, step, ...) never share a stream.
SAMPLER: Final = 1
VIEWS: Final = 2
NOISE: Final = 3
REGIONS: Final = 4
MODEL: Final = 5
SPLIT: Final = 6
MIXUP: Final = 7
BOOTSTRAP: Final = 8
COHORT: Final = 9
MASK: Final = 10
LATENT: Final = 11
SHUFFLE: Final = 12
DEFORMATION: Final = 13
CLUSTERS: Final = 14
PIXELS: Final = 15


def numpy_rng(*keys: int) -> np.random.Generator:
    """A NumPy generator determined by ``keys`` (non-negative integers) alone."""
    return np.random.default_rng([int(key) for key in keys])


def derive_seed(*keys: int) -> int:
    """A 63-bit seed determined by ``keys`` (non-negative integers) alone."""
    low, high = np.random.SeedSequence([int(key) for key in keys]).generate_state(2, np.uint32).tolist()
    return int(low | (high << 32)) & (2**63 - 1)


def permutation(n: int, *keys: int) -> np.ndarray:
    """A permutation of ``range(n)`` determined by ``keys`` alone, int64."""
    return numpy_rng(*keys).permutation(n).astype(np.int64)
