"""Views that items, encoder or method cannot take are refused before anything is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.config import load_any
from medssl.core.errors import ConfigError
from medssl.core.types import ItemTable, ViewBatch
from medssl.models import build_encoder
from medssl.runs.pretrain import build_method
from medssl.runs.view_sizes import view_shape
from medssl.transforms.views import make_views

SWAV = Path(__file__).parents[2] / "configs" / "hippocampus" / "swav.yaml"
SHAPE = (1, 32, 40, 28)


def check(*overrides):
    config = load_any(SWAV, overrides)
    return view_shape(config, build_encoder(config.model.encoder, SHAPE), SHAPE)


def test_crops_that_fit_pass():
    check("views.crops=[{size: [8, 8, 8]}, {size: [32, 40, 28], count: 1}]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["views.crops=[{size: [33, 16, 16]}]"], r"crops are larger than the items on axis 0\n.*views.crops\[0\].size"),
        (["views.crops=[{size: [16, 7, 16]}]"], r"views of 16 x 7 x 16 voxels do not fit the encoder: the image is sm"),
        (
            ["method={name: simclr}", "views.crops=[{size: [16, 16, 16]}]"],
            "`simclr` takes views of one size: remove vi",
        ),
        (
            ["method={name: simclr}", "views.augment=[{size: [16, 16, 16]}, {}]"],
            r"one size\n.*\n.*\(16, 16, 16\), \(32",
        ),
        (["method.assign_views=[0, 2]", "views.crops=[{size: [16, 16, 16]}]"], "needs views.n_views: 3, not 2"),
    ],
)
def test_crops_that_do_not_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(*overrides)


@pytest.mark.parametrize(
    "method", [{"name": "vae", "latent_dim": 4}, {"name": "gcl", "strategy": "gr", "pool": "flatten", "hidden_dim": 8}]
)
def test_networks_are_built_for_views_of_another_size_than_the_items(method):
    config = load_any(SWAV, [f"method={json.dumps(method)}", "views.n_views=2"])
    assert view_shape(config, build_encoder(config.model.encoder, SHAPE), SHAPE) == (1, 24, 32, 24)
    rows = np.arange(4)
    built, _ = build_method(config, SHAPE, ItemTable(rows, rows, rows, rows, rows))
    views = make_views(torch.rand(4, *SHAPE), config.views, seed=0, step=0, slots=rows).views
    items = {name: torch.arange(4) for name in ("row", "subject", "volume", "partition", "position", "slot")}
    loss = built.training_loss(ViewBatch(views, (None,) * 2, items)).loss
    loss.backward()
    assert loss.isfinite()


def test_fine_tuning_takes_no_crops():
    with pytest.raises(ConfigError, match="views.n_views: 1, without views.crops"):
        load_any(SWAV.with_name("finetune.yaml"), ["views.crops=[{size: [16, 16, 16]}]"])
