"""Recipes of configs/generic, narrowed, on a small generated cohort with the columns that they ask for."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from medssl.config import load_any
from medssl.data.cohorts import synthetic
from medssl.runs.pretrain import pretrain

CONFIGS = Path(__file__).parents[2] / "configs" / "generic"
SHORT = ("training.steps=1", "training.accelerator=cpu", "training.workers=0", "training.log_every=1", "data.jobs=1")
RESNET = "model.encoder.widths=[4, 8, 8, 16]"
BOTTLENECKS = "model.encoder={name: resnet50_2d, widths: [4, 4, 8, 8]}"
DENSENET = "model.encoder={name: densenet121_3d, init_features: 8, growth_rate: 4}"
UNET = "model.encoder={name: unet2d, widths: [4, 4, 8, 8, 8, 8], norm: batch, strides: [[2,2],[2,2],[2,2],[2,2],[2,2]]}"
HEAD = "method.hidden_dim=16"
SHORT_Z = "method.projection_dim=8"
CROPS = "views.crops=[{count: 2, size: [16, 16], scale: [0.3, 0.5]}]"
SLICES = ("data.prepare.size=[32, 32, null]", "sampler.batch_size=6")
VOLUMES = ("data.prepare.size=[32, 32, 32]", "data.prepare.spacing=null", "sampler.batch_size=4")
# What one small computer cannot do: large images, wide networks, large batches.
SMALLER = {
    "simclr": (*SLICES, BOTTLENECKS, HEAD),
    "dcl": (*SLICES, BOTTLENECKS, HEAD),
    "align_uniform": (*SLICES, BOTTLENECKS),
    "barlow_twins": (*SLICES, BOTTLENECKS, HEAD, SHORT_Z),
    "vicreg": (*SLICES, BOTTLENECKS, HEAD, SHORT_Z),
    "byol": (*SLICES, BOTTLENECKS, HEAD, SHORT_Z),
    "moco": (*SLICES, BOTTLENECKS, HEAD, "method.queue_size=12", "method.shuffle_groups=2"),
    "deepcluster_v2": (*SLICES, BOTTLENECKS, HEAD, CROPS, "method.n_clusters=4"),
    "swav": (*SLICES, BOTTLENECKS, HEAD, "method.n_prototypes=4", "method.queue_size=12", CROPS),
    "supcon": (*SLICES, BOTTLENECKS, HEAD),
    "sup_info_nce": (*SLICES, RESNET),
    "y_aware": (*VOLUMES, DENSENET, HEAD),
    "l_thr": (*VOLUMES, RESNET),
    "l_exp": (*VOLUMES, RESNET),
    "supervised": (*VOLUMES, RESNET),
    "decoupled_uniformity": (*SLICES, BOTTLENECKS, HEAD),
    "gcl": ("data.prepare.size=[32, 32, null]", "data.prepare.n4=false", UNET, HEAD),
    "lcl": (*SLICES, "data.prepare.size=[64, 64, null]", "data.prepare.n4=false", UNET),
    "sela": (*SLICES, BOTTLENECKS, "method.n_clusters=4", "method.n_heads=2"),
    "deepcluster": (*SLICES, RESNET, "method.n_clusters=4", "method.n_components=4"),
    "iic_segmentation": (*SLICES, "model.encoder.widths=[4, 4, 8, 8]"),
    "hierarchical_grouping": (*SLICES, BOTTLENECKS, HEAD, SHORT_Z),
    "models_genesis": (
        "data.prepare.size=[32, 32, 32]",
        "items.depth=16",
        "sampler.batch_size=2",
        "model.encoder.widths=[4, 4, 8, 8]",
        "views.augment.size=[16, 16, 16]",
        "method.shuffle_windows=10",
    ),
    "vae": (*VOLUMES, RESNET, "method.decoder_channels=8"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with DATA/manifest.csv in it, as the recipes name it."""
    folder = tmp_path_factory.mktemp("generic")
    manifest = synthetic.generate(folder / "DATA", "brain", n_subjects=8, size=32)
    table = pd.read_csv(manifest)
    table["diagnosis"] = ["patient", "patient", "control", "control"] * 2
    table.to_csv(manifest, index=False)
    return folder


def test_every_recipe_is_tried_here():
    assert set(SMALLER) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name", SMALLER)
def test_first_step_of_a_recipe_works(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("medssl.runs.pretrain.build_report", lambda folder: None)  # drawn in tests/reporting
    alone = ("weights=null",) if name == "lcl" else ()  # which only a whole run of gcl makes
    alone += ("method.freeze_encoder=false",) if name == "lcl" else ()
    done = pretrain(load_any(CONFIGS / f"{name}.yaml", [*SHORT, *SMALLER[name], *alone]))
    last = done.summary["last"]
    assert done.summary["steps"] == 1
    assert torch.isfinite(torch.tensor(list(last.values()))).all()
    assert last["loss"] != 0
