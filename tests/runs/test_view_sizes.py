"""Views that items, encoder or method cannot take are refused before anything is trained."""

from pathlib import Path

import pytest

from medssl.config import load_any
from medssl.core.errors import ConfigError
from medssl.models import build_encoder
from medssl.runs.view_sizes import check_view_sizes

SWAV = Path(__file__).parents[2] / "configs" / "hippocampus" / "swav.yaml"
SHAPE = (1, 32, 40, 28)


def check(*overrides):
    config = load_any(SWAV, overrides)
    check_view_sizes(config, build_encoder(config.model.encoder, SHAPE), SHAPE)


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


def test_fine_tuning_takes_no_crops():
    with pytest.raises(ConfigError, match="views.n_views: 1, without views.crops"):
        load_any(SWAV.with_name("finetune.yaml"), ["views.crops=[{size: [16, 16, 16]}]"])
