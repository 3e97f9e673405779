"""Step time and peak memory of every pretraining method beside SimCLR at the same batch, and its lines of code.

Run: python benchmarks/methods.py [--rounds 5] [--batch 8] [--only moco byol] [--json]. Each method runs in a process of
its own with one thread, on volumes of 32 x 40 x 28 voxels and a small 3D U-Net (8, 16, 32, 64 channels, group norm); it
gets the views that it needs, with its default settings but for sizes that must fit 64 items. A step is loss, backward,
Adam and what the method does after the step; SimCLR takes turns with it, and the ratio is the median of the ratios
inside a round, so that a busy machine disturbs both sides. Memory is the growth of the resident peak over three steps,
before SimCLR is built. Lines of code are those of the method's own file without comments, docstrings and blank lines.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.core.types import ItemTable, Method, ModelParts, Needs, ViewBatch
from medssl.methods import METHODS
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import UNet3dConfig

SHAPE = (1, 32, 40, 28)
N_ITEMS = 64
N_REGIONS = 8
REFERENCE = "simclr"
# What a default leaves open, or what 64 items cannot fill.
SETTINGS: dict[str, dict[str, Any]] = {
    "moco": {"queue_size": 32},
    "swav": {"n_prototypes": 16},
    "sela": {"n_clusters": 8},
    "deepcluster": {"n_clusters": 8},
    "gcl": {"pool": "avg"},
}


def build(name: str) -> tuple[Method, Needs]:
    entry = METHODS[name]
    config = entry.config(name=name, **SETTINGS.get(name, {}))
    needs: Needs = config.needs()
    encoder = build_encoder(UNet3dConfig(widths=(8, 16, 32, 64), norm="group", strides=((2, 2, 2),) * 3), SHAPE, seed=0)
    decoder = build_decoder(encoder, seed=0) if needs.decoder else None
    method = entry.build(config, ModelParts(encoder, decoder, SHAPE), seed=0)
    method.fit_labels(table())
    method.steps_per_epoch = 8
    if 0 in method.refresh_steps(100):
        generator = torch.Generator().manual_seed(1)
        method.refresh(lambda: (torch.randn(N_ITEMS, encoder.out_features, generator=generator), columns()))
    return method.train(), needs


def columns() -> dict[str, torch.Tensor]:
    row = torch.arange(N_ITEMS)
    volume, partition = row // 4, row % 4
    return {"row": row, "subject": volume, "volume": volume, "partition": partition, "position": partition}


def labels(row: torch.Tensor, dense: tuple[int, ...] = SHAPE[1:]) -> dict[str, torch.Tensor]:
    """Of every kind that a method may ask for."""
    grid = torch.arange(dense[0]) * N_REGIONS // dense[0] + 1
    regions = grid[:, None, None].expand(dense).expand(len(row), *dense)
    heights = (torch.arange(N_REGIONS)[:, None] - torch.arange(N_REGIONS)).abs().float().flatten()
    return {
        "age": 20.0 + (row * 7 % 60).double(),
        "site": row % 3,
        "diagnosis": row % 3,
        "sex": row % 2,
        "label_map": regions.clone(),
        "region_heights": heights.expand(len(row), -1).clone(),
    }


def table() -> ItemTable:
    known = {name: value.numpy() for name, value in columns().items()}
    flat = labels(torch.arange(N_ITEMS), dense=(N_REGIONS, 1, 1))
    weak = {k: np.asarray(v) for k, v in flat.items() if not k.endswith("_map")}
    return ItemTable(**known, n_partitions=4, labels=weak)


def make_batch(needs: Needs, n: int) -> ViewBatch:
    """The first ``n`` items: partitions 0 to 3 of each volume. Values do not matter for time and memory."""
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.rand(n, *SHAPE, generator=generator) for _ in range(needs.views))
    items = {name: value[:n] for name, value in columns().items()} | {"slot": torch.arange(n)}
    known = labels(items["row"])
    # A run hands maps of regions out as label maps.
    wanted = needs.labels if "region_map" not in needs.labels else ("label_map", "region_heights")
    return ViewBatch(views, (None,) * len(views), items, {name: known[name] for name in wanted})


def stepper(name: str, n: int) -> tuple[Callable[[], None], int]:
    method, needs = build(name)
    batch = make_batch(needs, n)
    optimizer = torch.optim.Adam([weight for weight in method.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> None:
        loss = method.training_loss(batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        method.after_optimizer_step(0.5)

    return step, needs.views


def resident_mib() -> float:
    """What is resident now; where /proc does not say, the peak until now."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return peak_mib()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (2**10 if sys.platform == "linux" else 1) / 2**20


def measure(name: str, n: int, rounds: int) -> dict[str, Any]:
    """One method, in this process."""
    torch.set_num_threads(1)
    torch.ones(2, requires_grad=True).sum().backward()  # what the first backward of a process costs anyway
    step, views = stepper(name, n)
    before = resident_mib()
    for _ in range(3):
        step()
    memory = peak_mib() - before
    reference, _ = stepper(REFERENCE, n)
    reference()
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            (step, reference)[which]()
            times[which].append(time.perf_counter() - start)
    ratios = [own / other for own, other in zip(*times, strict=True)]
    return {
        "method": name,
        "views": views,
        "step_ms": round(1000 * statistics.median(times[0]), 1),
        "step_ratio": round(statistics.median(ratios), 2),
        "step_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "peak_mib": round(memory, 1),
        "lines": code_lines(Path(inspect.getfile(METHODS[name].method))),
    }


def code_lines(path: Path) -> int:
    """Lines that hold code: no comments, docstrings (those under fields included) or blank lines."""
    text = path.read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def in_process(name: str, n: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--batch", str(n), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="items; a multiple of 4 holds whole sets of partitions")
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), help="these methods, and SimCLR")
    parser.add_argument("--json", action="store_true", help="print the results for machines")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.batch, options.rounds)))
        return
    names = [name for name in METHODS if options.only is None or name in options.only]
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    results = [in_process(name, options.batch, options.rounds) for name in names]
    for result in results:
        result["peak_ratio"] = round(result["peak_mib"] / results[0]["peak_mib"], 2)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print("| method | views | step, ms | step / SimCLR (range) | peak, MiB | peak / SimCLR | lines |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        low, high = r["step_ratio_range"]
        print(
            f"| {r['method']} | {r['views']} | {r['step_ms']:.0f} | {r['step_ratio']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{r['peak_mib']:.0f} | {r['peak_ratio']:.2f} | {r['lines']} |"
        )


if __name__ == "__main__":
    main()
