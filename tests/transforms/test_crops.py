"""Multi-crop: sets of small views beside those of full size."""

import pytest
import torch
from torch.testing import assert_close

from medssl.core.errors import ConfigError
from medssl.core.schema import validate
from medssl.transforms.views import ViewsConfig, check_sizes, make_views, resolve_views, warp

KEYS = {"seed": 3, "step": 7}


def ramps(n, *spatial):
    """Channel a holds the coordinate along axis a, -1 to 1 between the outer faces."""
    lines = [(2 * torch.arange(length) + 1) / length - 1 for length in spatial]
    return torch.stack(torch.meshgrid(*lines, indexing="ij")).repeat(n, 1, *[1] * len(spatial))


@pytest.mark.parametrize(
    ("spatial", "sizes"),
    [((40, 36), [(18, 16)]), ((24, 20, 22), [(10, 8, 9), (6, 6, 5)])],
)
def test_crops_come_last_show_their_share_and_know_where_they_are(spatial, sizes):
    scales = [(0.3, 0.5), (0.2, 0.2)]
    crops = [{"count": k + 2, "size": s, "scale": scales[k]} for k, s in enumerate(sizes)]
    policy = {"flip": {}, "crop_resize": {"scale": (0.8, 1.0)}}
    config = ViewsConfig(n_views=2, augment=policy, crops=crops)
    images = ramps(5, *spatial)
    made = make_views(images, config, **KEYS, slots=range(5))
    expected = [spatial, spatial, *(s for k, s in enumerate(sizes) for _ in range(k + 2))]
    assert [tuple(view.shape[2:]) for view in made.views] == expected == list(config.sizes(spatial))
    full = make_views(images, ViewsConfig(n_views=2, augment=policy), **KEYS, slots=range(5))
    assert all(torch.equal(a, b) for a, b in zip(made.views, full.views))
    dims = len(spatial)
    for view, theta, size in list(zip(made.views, made.geometry, expected))[2:]:
        low, high = scales[sizes.index(size)]
        share = theta[:, :, :dims].diagonal(dim1=1, dim2=2).abs()
        assert bool(((share > low - 1e-6) & (share < high + 1e-6)).all())
        assert_close(view, warp(images, theta, size, padding="border"), atol=1e-4, rtol=1e-4)
    assert not torch.equal(made.views[-1], made.views[-2])


def test_a_set_may_have_a_policy_of_its_own_and_the_original_may_be_the_only_full_view():
    crops = [{"count": 2, "size": (6, 6), "augment": {}}, {"count": 1, "size": (6, 6)}]
    config = resolve_views(ViewsConfig(n_views=1, original=True, preset="gcl", crops=crops), 2)
    assert [policy.brightness is None for policy in config.policies] == [True, True, False]
    made = make_views(torch.rand(2, 1, 16, 16), config, **KEYS, slots=[0, 1])
    assert [tuple(view.shape[2:]) for view in made.views] == [(16, 16), (6, 6), (6, 6), (6, 6)]
    assert made.geometry[0] is None
    again = validate(ViewsConfig, config.model_dump(mode="json"), source="resolved")
    assert again.policies == config.policies


@pytest.mark.parametrize("preset", ["simclr", "intensity"])
def test_written_out_views_mean_the_same(preset):
    config = ViewsConfig(n_views=3, preset=preset, crops=[{"size": (4, 4)}])
    written = resolve_views(config, 2)
    assert written.preset is None
    assert written.policies == config.policies
    assert len(written.policies) == 9


def test_crops_that_cannot_be_made_are_refused():
    crops = ViewsConfig(crops=[{"size": (8, 8, 8)}, {"size": (8, 20, 30)}])
    check_sizes(crops, (8, 20, 30))
    with pytest.raises(ConfigError, match=r"larger than the items on axes 1, 2\n.*views.crops\[1\].size") as error:
        check_sizes(crops, (8, 19, 29))
    assert "crops of 8 x 20 x 30, items of 8 x 19 x 29 voxels" in str(error.value)
    with pytest.raises(ConfigError, match="one number per spatial axis"):
        resolve_views(crops, 2)
    with pytest.raises(ConfigError, match="a row of a feature table has nothing to crop"):
        resolve_views(ViewsConfig(preset="features", crops=[{"size": (8, 8)}]), 0)
    with pytest.raises(ConfigError, match="made by its size and scale"):
        validate(ViewsConfig, {"crops": [{"size": [8, 8], "augment": {"crop_resize": {}}}]}, source="views")
