"""A method, items and a sampler small enough to train in milliseconds; also run as a script, to be killed."""

import argparse
import json
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from medssl.core.seeding import SAMPLER, numpy_rng
from medssl.core.types import ItemTable, LossOutput, Method
from medssl.training import BatchSource, OptimizerConfig, ScheduleConfig, TrainingConfig, train
from medssl.transforms.views import ViewsConfig

N_ITEMS, SHAPE = 24, (1, 8, 8)


class ToyReader:
    """Images drawn once from a seed."""

    def __init__(self, n: int = N_ITEMS):
        column = np.arange(n, dtype=np.int64)
        self.table = ItemTable(
            row=column,
            subject=column // 3,
            volume=column // 3,
            partition=column % 3,
            position=column % 3,
            n_partitions=3,
            labels={"age": np.linspace(20, 80, n)},
        )
        self.images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(7))
        self.fail_at: int | None = None

    def find(self, rows):
        return np.asarray(rows, dtype=np.int64)

    def describe(self, rows):
        return [f"row {row}: case{row // 3}, slice {row % 3}" for row in np.asarray(rows).tolist()]

    def read(self, rows):
        if self.fail_at is not None and self.fail_at in np.asarray(rows).tolist():
            raise OSError(f"cannot read row {self.fail_at}")
        return self.images[torch.as_tensor(rows)].clone(), None


class ToySampler:
    def __init__(self, n: int = N_ITEMS, *, seed: int = 0, batch_size: int = 6):
        self.n, self.seed, self.batch_size = n, seed, batch_size

    def batch(self, step, rank=0, world_size=1):
        rows = numpy_rng(self.seed, SAMPLER, step).permutation(self.n)[: self.batch_size].astype(np.int64)
        part = self.batch_size // world_size
        return rows[rank * part : (rank + 1) * part]


class ToyMethod(Method):
    """Two views must agree with a slowly moving teacher; dropout, a queue and a teacher make resuming hard."""

    def __init__(self, *, seed: int = 0, poison_step: int | None = None, collapsed: bool = False, refresh_at=()):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.dropout = nn.Dropout(0.3)
        self.teacher = nn.Linear(64, 8).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(12, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("refreshed", torch.zeros(8))
        self.poison_step, self.collapsed, self.refresh_at = poison_step, collapsed, refresh_at

    def training_loss(self, batch):
        z = self.encoder(self.dropout(batch.views[0]))
        if self.collapsed:
            z = z * 0 + 1 + 1e-6 * z
        target = self.teacher(batch.views[-1].flatten(1))
        loss = (z - target).square().mean() + 0.01 * (z @ self.queue.clone().T).square().mean()
        if batch.step == self.poison_step:
            loss = loss * float("nan")
        with torch.no_grad():
            at = int(self.place)
            self.queue[at : at + len(z)] = target[: 12 - at]
            self.place.fill_((at + len(z)) % 12)
        return LossOutput(loss, {"agreement": (z - target).abs().mean().detach()}, z.detach())

    def after_optimizer_step(self, progress):
        decay = 0.9 + 0.1 * progress
        with torch.no_grad():
            self.teacher.weight.mul_(decay).add_(0.01 * (1 - decay))

    def refresh_steps(self, total_steps):
        return self.refresh_at

    def refresh(self, embed_all):
        embeddings, columns = embed_all()
        assert len(embeddings) == len(columns["row"])
        self.refreshed.copy_(embeddings.mean(dim=0))


def toy_source(**settings):
    views = settings.pop("views", ViewsConfig(n_views=2, preset="simclr"))
    sampler = settings.pop("sampler", None) or ToySampler()
    reader = settings.pop("reader", None) or ToyReader()
    return BatchSource(sampler, reader, views, seed=settings.pop("seed", 0), **settings)


def toy_train(run_dir: Path, *, method=None, steps=12, workers=0, optimizer=None, **keywords):
    method = method or ToyMethod()
    names = set(TrainingConfig.model_fields)
    settings = {name: keywords.pop(name) for name in list(keywords) if name in names}
    settings = {"accelerator": "cpu", "log_every": 1, "monitor_every": 4, "checkpoint_minutes": None} | settings
    result = train(
        method,
        keywords.pop("source", None) or toy_source(workers=workers),
        TrainingConfig(steps=steps, **settings),
        seed=0,
        run_dir=run_dir,
        optimizer=optimizer or OptimizerConfig(name="adam", learning_rate=1e-2),
        schedule=ScheduleConfig(name="cosine", warmup_steps=3),
        **keywords,
    )
    return method, result


def validate(method, step):
    """A score that depends on weights and is best in the middle."""
    return -abs(step - 6) - 0.001 * float(method.encoder[1].weight.abs().mean())


def logged(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that tell the time."""
    import csv

    with (run_dir / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_wait_share")} for row in rows]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    print("ready", flush=True)
    trained, outcome = toy_train(
        options.run_dir, steps=options.steps, checkpoint_every=options.every, resume=True, log_every=5
    )
    print(json.dumps({"steps": outcome.steps, "skipped": outcome.skipped}))
