"""Forward and backward time and memory of every loss, beside plain InfoNCE measured in the same rounds.

Run: python benchmarks/losses.py [--rounds 7] [--sizes 64 256 1024]. Contenders take turns round by round in rotated
order, one thread; a ratio is the median of the ratios inside a round, so that a busy machine disturbs both sides.
Memory is the growth of the resident peak during one call, in a process forked for it (Linux and macOS).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medssl.losses import (
    alignment,
    decoupled_uniformity,
    end,
    fair_kl,
    global_contrastive,
    l_exp,
    l_thr,
    label_kernel,
    local_contrastive,
    nearest_negatives,
    nt_xent,
    region_corners,
    sup_con,
    sup_info_nce,
    uniformity,
    y_aware,
)

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
    table |= weak(z)
    if n <= DENSE_PAIRS_LIMIT:
        table["local ld, 5 nearest"] = lambda: local_contrastive(a, b, corners, strategy="ld", **dense, **codes)
    return table


def weak(z: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What takes labels, of two views (the regularisers: of one); the kernel is given, as in a training step."""
    n, pair = len(z), z[:, 1:]
    age, site = 20 + 60 * torch.rand(n, dtype=torch.float64), torch.randint(0, 20, (n,))
    decade, kernel = (age // 10).long(), label_kernel(age, sigma=5.0)
    unit = torch.nn.functional.normalize

    def fairness(**positives: Tensor) -> Tensor:
        terms = fair_kl(z[:, 1], site, **positives)
        return terms.positive + terms.negative

    def entangle() -> Tensor:
        terms = end(z[:, 1], site, decade)
        return terms.perpendicular + terms.parallel

    return {
        "sup_con": lambda: sup_con(pair, decade, epsilon=0.1),
        "sup_info_nce out": lambda: sup_info_nce(pair, decade, epsilon=0.1),
        "sup_info_nce in": lambda: sup_info_nce(pair, decade, epsilon=0.1, form="in"),
        "y_aware": lambda: y_aware(pair, kernel),
        "y_aware and its kernel": lambda: y_aware(pair, label_kernel(age, sigma=5.0)),
        "l_thr": lambda: l_thr(pair, kernel),
        "l_thr compared": lambda: l_thr(pair, kernel, normalizer="compared"),
        "l_exp": lambda: l_exp(pair, kernel),
        "l_exp as run": lambda: l_exp(pair, kernel, similarity="neg_sqdist", positive_in_denominator=True),
        "fair_kl all pairs": fairness,
        "fair_kl labels": lambda: fairness(labels=decade),
        "fair_kl kernel": lambda: fairness(weights=kernel),
        "end": entangle,
        "align and uniform": lambda: (
            alignment(unit(z[:, 1], dim=1), unit(z[:, 2], dim=1)) + uniformity(unit(z[:, 1], dim=1))
        ),
        "decoupled plain": lambda: decoupled_uniformity(pair),
        "decoupled kernel": lambda: decoupled_uniformity(pair, prior_kernel=kernel),
    }


def peak_mib(loss: Callable[[], Tensor]) -> float:
    """Growth of the resident peak over one forward and backward, in a forked process of its own."""
    context = multiprocessing.get_context("fork")
    grown = context.SimpleQueue()

    def child() -> None:
        unit = 2**10 if sys.platform == "linux" else 1
        torch.ones(2, requires_grad=True).sum().backward()  # what the first backward of a process costs anyway
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss().backward()
        grown.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20)

    process = context.Process(target=child)
    process.start()
    process.join()
    return float(grown.get())


def measure(table: dict[str, Callable[[], Tensor]], peaks: dict[str, float], n: int, rounds: int) -> None:
    names = list(table)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            table[name]().backward()
            if turn:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    print(f"\nn = {n}, {rounds} rounds: ms, median (min-max), ratio to the reference; MiB at the peak, ratio")
    for name in names:
        ratio = statistics.median(t / r for t, r in zip(times[name], times[names[0]], strict=True))
        spread = f"({min(times[name]):.1f}-{max(times[name]):.1f})"
        memory = f"{peaks[name]:8.0f}{peaks[name] / max(peaks[names[0]], 1e-9):7.2f}x"
        print(f"  {name:<24}{statistics.median(times[name]):8.1f} {spread:<18}{ratio:6.2f}x{memory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--only", help="contenders whose name contains this, and the reference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    for n in options.sizes:
        chosen = {k: v for k, v in contenders(n).items() if options.only is None or options.only in k or "refer" in k}
        # All peaks come first: memory that a timed round had freed would be used again without growth.
        tables[n] = chosen, {name: peak_mib(loss) for name, loss in chosen.items()}
    for n, (table, peaks) in tables.items():
        measure(table, peaks, n, options.rounds)


if __name__ == "__main__":
    main()
