"""Forward and backward time of every loss, beside plain InfoNCE timed in the same rounds.

Run: python benchmarks/losses.py [--rounds 7] [--sizes 64 256 1024]. Contenders take turns round by round in rotated
order, one thread; a ratio is the median of the ratios inside a round, so that a busy machine disturbs both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medssl.losses import global_contrastive, local_contrastive, nearest_negatives, nt_xent, region_corners

D = 128
CHANNELS, SIDE = 128, 16  # dense maps: single voxels of 128 channels stand for learned regions of 128 values
DENSE_PAIRS_LIMIT = 256  # LD compares all N x N pairs of maps; batches of it hold tens of items


def info_nce(z1: Tensor, z2: Tensor) -> Tensor:
    """The reference: one matrix, nothing else."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(similarity, torch.arange(len(z)).roll(len(z1)))


def contenders(n: int) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    z = torch.randn(n, 3, D, requires_grad=True)
    a, b = (torch.randn(n, CHANNELS, SIDE, SIDE, requires_grad=True) for _ in range(2))
    partition, volume = torch.arange(n) % 4, torch.arange(n) // 4
    corners = region_corners((SIDE, SIDE), 1)
    five = nearest_negatives(corners, 5)
    codes = {"partition": partition, "volume": volume}
    dense = {"region_size": 1, "negatives": five}
    table: dict[str, Callable[[], Tensor]] = {
        "InfoNCE (reference)": lambda: info_nce(z[:, 1], z[:, 2]),
        "nt_xent": lambda: nt_xent(z[:, 1], z[:, 2]),
        "global gd-": lambda: global_contrastive(z, partition, volume, strategy="gd-"),
        "global gd": lambda: global_contrastive(z, partition, volume, strategy="gd"),
        "local lr, 5 nearest": lambda: local_contrastive(a, b, corners, **dense),
        "local lr, all others": lambda: local_contrastive(a, b, corners, region_size=1),
    }
    if n <= DENSE_PAIRS_LIMIT:
        table["local ld, 5 nearest"] = lambda: local_contrastive(a, b, corners, strategy="ld", **dense, **codes)
    return table


def measure(n: int, rounds: int) -> None:
    table = contenders(n)
    names = list(table)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            table[name]().backward()
            if turn:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    print(f"\nn = {n}, {rounds} rounds: ms, median (min-max), and ratio to the reference")
    for name in names:
        ratio = statistics.median(t / r for t, r in zip(times[name], times[names[0]], strict=True))
        spread = f"({min(times[name]):.1f}-{max(times[name]):.1f})"
        print(f"  {name:<22}{statistics.median(times[name]):8.1f} {spread:<18}{ratio:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for n in options.sizes:
        measure(n, options.rounds)


if __name__ == "__main__":
    main()
