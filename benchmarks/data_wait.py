"""Share of a CPU training step that is spent waiting for data, with one worker thread, on a generated cohort.

The loop, sampler, reader and views of a real run: GCL (gd) on slices and on slabs, and fine-tuning with the few-label
sampler. One thread computes, one prepares. Shares are over the whole training, its first step included. Target: below
5 % each. On a machine without a second free core the worker competes with the step, and the share says so.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from pathlib import Path

import torch

from medssl.core.types import ModelParts
from medssl.data.cache import prepare
from medssl.data.cohorts.synthetic import generate
from medssl.data.items import ItemReader, ItemsConfig, build_items
from medssl.data.manifest import read_manifest
from medssl.methods import METHODS, TASKS
from medssl.models import ENCODERS, build_decoder, build_encoder
from medssl.samplers import FewLabelSampler, PartitionSampler
from medssl.training import BatchSource, TrainingConfig, train
from medssl.transforms.preprocess import PrepareConfig
from medssl.transforms.views import ViewsConfig

TARGET, SIZE, SECONDS = 0.05, 64, 6.0
SLICE = {"geometry": "slice", "partitions": 4}
GCL_VIEWS = {"n_views": 3, "original": True, "preset": "simclr"}
RUNS = {
    "gcl gd, 3 x 4 slices": ("gcl", SLICE, GCL_VIEWS, {"name": "unet2d"}),
    "gcl gd, 3 x 4 slabs": (
        "gcl", {"geometry": "slab", "partitions": 4, "depth": 4}, GCL_VIEWS, {"name": "unet3d", "widths": (8, 16, 32)},
    ),
    "segmentation, 20 slices": (
        "segmentation", {"geometry": "slice"}, {"n_views": 1, "preset": "segmentation"}, {"name": "unet2d"},
    ),
}  # fmt: skip


def waited(name, manifest, store, folder):
    """(share of the time spent waiting, seconds a step)."""
    method, items, views, encoder = RUNS[name]
    items = ItemsConfig(**items)
    table = build_items(manifest, store, items)
    reader = ItemReader(store, table, items, with_labels=method == "segmentation")
    network = build_encoder(ENCODERS[encoder["name"]].config(**encoder), reader.image_shape)
    if method == "gcl":
        config, entry = METHODS["gcl"].config(strategy="gd"), METHODS["gcl"]
        sampler, decoder = PartitionSampler(table, seed=0, n_volumes=3), None
    else:
        config, entry = TASKS["segmentation"].config(n_classes=4), TASKS["segmentation"]
        sampler, decoder = FewLabelSampler(table, seed=0, batch_size=20), build_decoder(network)
    source = BatchSource(sampler, reader, ViewsConfig(**views), seed=0, workers=1)
    result = train(
        entry.build(config, ModelParts(network, decoder, reader.image_shape)),
        source,
        TrainingConfig(seconds=SECONDS, workers=1, accelerator="cpu", checkpoint_minutes=None),
        seed=0,
        run_dir=folder,
    )
    return result.data_wait_share, result.seconds / result.steps


def main():
    torch.set_num_threads(1)
    begun, worst = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        manifest = read_manifest(generate(folder / "data", n_subjects=12, size=SIZE))
        settings = PrepareConfig(size=(SIZE, SIZE, None))
        store = prepare(manifest, settings, folder / "cache")
        for number, name in enumerate(RUNS):
            share, seconds = waited(name, manifest, store, folder / str(number))
            worst = max(worst, share)
            print(f"{name}: {100 * share:.1f} % of the time waiting for data, {1000 * seconds:.0f} ms a step")
    print(f"largest {100 * worst:.1f} %, target below {100 * TARGET:.0f} %; {time.monotonic() - begun:.0f} s in all")
    return 0 if worst < TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
