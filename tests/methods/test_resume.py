"""Every method and task, stopped at every step of a short run, goes on bit for bit: weights, optimiser, logs."""

import os
import signal

import numpy as np
import pytest
import torch
from method_examples import SIZE, examples, patterns, table

from medssl.core.errors import Interrupted
from medssl.samplers import SAMPLERS
from medssl.training import BatchSource, OptimizerConfig, ScheduleConfig, TrainingConfig, train
from medssl.training.checkpoint import Checkpoints
from medssl.transforms.views import ViewsConfig

STEPS = 4
EXAMPLES = [example for example in examples() if not example.costly]


class PatternReader:
    """The patterns of method_examples as items: volumes of a few slices (or slabs), or rows of a table."""

    def __init__(self, dims: int):
        self.images, self.table = patterns(dims), table()

    def find(self, rows):
        return np.asarray(rows, dtype=np.int64)

    def describe(self, rows):
        return [f"row {row}" for row in rows]

    def read(self, rows):
        images = self.images[torch.from_numpy(self.find(rows))]
        return images, None if images.ndim == 2 else (images[:, 0] > 0.2).long() + (images[:, 0] > 0.6)


def crops_of(example):
    if not example.crops:
        return ()
    return [{"count": example.crops, "size": [length // 2 for length in SIZE[example.dims]], "scale": (0.5, 0.8)}]


def run(example, folder, *, stop_after=None, resume=False):
    needs = example.needs
    reader = PatternReader(example.dims)
    preset = "intensity" if needs.moves == "none" else "segmentation" if "label_map" in needs.labels else "simclr"
    preset = "features" if example.dims == 0 else preset
    name = next(iter(sorted(needs.samplers)), "partition")
    source = BatchSource(
        SAMPLERS[name](reader.table, seed=5, n_volumes=2),
        reader,
        ViewsConfig(n_views=needs.views, original=needs.original, preset=preset, crops=crops_of(example)),
        seed=5,
        workers=1,
    )

    def stop(event, values):
        if event == "checkpoint" and values["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    method = example.build()
    train(
        method,
        source,
        TrainingConfig(steps=STEPS, log_every=1, checkpoint_every=1, accelerator="cpu", monitor_every=2),
        seed=5,
        run_dir=folder,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        schedule=ScheduleConfig(name="cosine"),
        resume=resume,
        on_event=stop,
    )
    return method


def result(folder):
    """Everything a finished run holds: checkpoint tensors and the logged numbers that are no times."""
    loaded = Checkpoints(folder / "checkpoints").load()
    assert loaded.step == STEPS
    lines = (folder / "logs" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    kept = [i for i, name in enumerate(header) if name not in ("seconds", "data_wait_share")]
    return loaded.tensors, [[line.split(",")[i] for i in kept] for line in lines]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_resuming_from_any_step_is_bit_equal(tmp_path, example):
    run(example, tmp_path / "whole")
    tensors, logged = result(tmp_path / "whole")
    for step in range(1, STEPS):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            run(example, folder, stop_after=step)
        assert Checkpoints(folder / "checkpoints").load().step == step
        run(example, folder, resume=True)
        again, logged_again = result(folder)
        assert again.keys() == tensors.keys()
        assert any(name.startswith("optimizer") for name in tensors)
        different = [name for name in tensors if not torch.equal(tensors[name], again[name])]
        assert different == []
        assert logged_again == logged
