"""What SwAV costs: Sinkhorn-Knopp beside plain InfoNCE, and a multi-crop step beside one of two views.

Run: python benchmarks/swav.py [--rounds 9] [--json]. Contenders take turns round by round in rotated order, one thread;
a ratio is the median of the ratios inside a round, so that a busy machine disturbs both sides. Sinkhorn has no backward
pass, so it is held against InfoNCE's forward pass alone and against forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from medssl.core.types import ModelParts, ViewBatch
from medssl.losses import nt_xent, sinkhorn_knopp, swav
from medssl.methods.swav import SwAV, SwAVConfig
from medssl.models import build_encoder
from medssl.models.encoders import UNet3dConfig
from medssl.transforms.views import ViewsConfig, make_views

B, K, D = 1024, 3000, 128  # of the paper's prototypes and a batch at which the losses are compared
ITEMS, SIZE, CROP = 8, (32, 40, 28), (16, 20, 14)  # half of each axis: an eighth of the voxels
CROPS = ViewsConfig(crops=[{"count": 6, "size": CROP}])
Contenders = dict[str, Callable[[], object]]


def losses() -> Contenders:
    """The first is what the others are compared with."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, 2, D, generator=generator, requires_grad=True)
    prototypes = torch.randn(K, D, generator=generator, requires_grad=True)
    with torch.no_grad():
        scores = torch.nn.functional.normalize(z[:, 0], dim=1) @ torch.nn.functional.normalize(prototypes, dim=1).T

    def forward() -> None:
        with torch.no_grad():
            nt_xent(z[:, 0], z[:, 1])

    return {
        "InfoNCE, forward and backward": lambda: nt_xent(z[:, 0], z[:, 1]).backward(),
        "InfoNCE, forward": forward,
        "Sinkhorn, 3 iterations": lambda: sinkhorn_knopp(scores),
        "SwAV loss, forward and backward": lambda: swav(z, prototypes).backward(),
    }


def steps() -> Contenders:
    """Training steps of a small 3D U-Net on ready views, and the making of the views."""
    torch.manual_seed(0)
    encoder = build_encoder(UNet3dConfig(widths=(8, 16, 32, 64), norm="group", strides=((2, 2, 2),) * 3), (1, *SIZE))
    method = SwAV(SwAVConfig(n_prototypes=ITEMS, freeze_steps=0), ModelParts(encoder, None, (1, *SIZE)))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    images = torch.rand(ITEMS, 1, *SIZE)

    def make(config: ViewsConfig) -> tuple[torch.Tensor, ...]:
        return make_views(images, config, seed=0, step=0, slots=range(ITEMS)).views

    ready = {"two views": make(ViewsConfig()), "2 + 6 views": make(CROPS)}

    def step(views: tuple[torch.Tensor, ...]) -> None:
        optimizer.zero_grad()
        method.training_loss(ViewBatch(views, (None,) * len(views), {})).loss.backward()
        optimizer.step()
        method.after_optimizer_step(0.0)

    return {
        "step, two views": lambda: step(ready["two views"]),
        "step, 2 + 6 views": lambda: step(ready["2 + 6 views"]),
        "making two views": lambda: make(ViewsConfig()),
        "making 2 + 6 views": lambda: make(CROPS),
    }


def measure(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and ratio to the first, medians over the rounds."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            if turn:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "ms": statistics.median(times[name]),
            "fastest": min(times[name]),
            "slowest": max(times[name]),
            "ratio": statistics.median(t / r for t, r in zip(times[name], times[names[0]], strict=True)),
            "ratio_to_second": statistics.median(t / r for t, r in zip(times[name], times[names[1]], strict=True)),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"losses: {B} items, {K} prototypes, {D} dimensions": measure(losses(), options.rounds),
        f"steps: {ITEMS} items of {SIZE}, crops of {CROP}": measure(steps(), options.rounds),
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for title, table in found.items():
        first, second, *_ = table
        print(f"\n{title}; {options.rounds} rounds\n| | ms | fastest to slowest | to {first} | to {second} |")
        print("| --- | --- | --- | --- | --- |")
        for name, row in table.items():
            spread = f"{row['fastest']:.1f} to {row['slowest']:.1f}"
            print(f"| {name} | {row['ms']:.1f} | {spread} | {row['ratio']:.2f} | {row['ratio_to_second']:.2f} |")


if __name__ == "__main__":
    main()
