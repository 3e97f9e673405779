"""Views of feature rows: noise in standard deviations, masked features, and nothing that needs voxels."""

import pytest
import torch

from medssl.core.errors import ConfigError
from medssl.transforms.augment_config import AugmentConfig, Brightness, Flip, Mask, Noise
from medssl.transforms.views import Artefact, ViewsConfig, make_views, resolve_views

KEYS = {"seed": 3, "step": 7}


def rows(n, features=200):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(0))


def views(source, policy, slots=None, **keys):
    config = ViewsConfig(augment=policy)
    return make_views(source, config, **{**KEYS, **keys}, slots=range(len(source)) if slots is None else slots)


def test_the_preset_jitters_and_masks_and_leaves_the_rows_alone():
    source = rows(64)
    before = source.clone()
    made = make_views(source, ViewsConfig(preset="features"), **KEYS, slots=range(64))
    assert torch.equal(source, before)
    assert made.geometry == (None, None)
    for view in made.views:
        assert view.shape == source.shape
        masked = (view == 0).float().mean(dim=1)
        assert masked.min() > 0.03
        assert masked.max() < 0.55  # 10 to 40 % of 200 features
        kept = (view - source)[view != 0]
        assert 0.1 < kept.std() < 0.3
    assert not torch.equal(*made.views)


@pytest.mark.parametrize(("share", "n"), [((0.0, 0.0), 0), ((1.0, 1.0), 200), ((0.25, 0.25), 50)])
def test_a_mask_takes_the_share_that_was_asked_for(share, n):
    made = views(torch.ones(400, 200), AugmentConfig(mask=Mask(share=share)))
    counts = (made.views[0] == 0).sum(dim=1).float()
    assert abs(counts.mean() - n) < 1.5
    # Bernoulli: the spread of counts is that of 200 independent features.
    assert abs(counts.std() - (200 * share[0] * (1 - share[0])) ** 0.5) < 0.8


def test_a_mask_happens_as_often_as_asked_and_covers_noise():
    policy = AugmentConfig(mask=Mask(probability=0.5, share=(1, 1)), noise=Noise(probability=1, std=(0.2, 0.2)))
    gone = (views(torch.ones(400, 20), policy).views[0] == 0).all(dim=1)
    assert 0.4 < gone.float().mean() < 0.6


def test_a_view_depends_on_seed_step_slot_and_view_alone():
    source, policy = rows(6), AugmentConfig(mask=Mask(), noise=Noise(probability=1))
    whole = views(source, policy, slots=range(10, 16))
    part = views(source[4:], policy, slots=[14, 15])
    for one, other in zip(whole.views, part.views, strict=True):
        assert torch.equal(one[4:], other)
    assert not torch.equal(views(source, policy, step=8).views[0], whole.views[0])
    assert not torch.equal(views(source, policy, seed=4).views[0], whole.views[0])


def test_switching_the_mask_off_leaves_the_noise_as_it_was():
    source, noise = rows(6), Noise(probability=1, std=(0.1, 0.5))
    alone = views(source, AugmentConfig(noise=noise)).views[0]
    both = views(source, AugmentConfig(noise=noise, mask=Mask())).views[0]
    kept = both != 0
    assert torch.equal(both[kept], alone[kept])


def test_which_features_are_masked_says_nothing_of_their_noise():
    policy = AugmentConfig(mask=Mask(share=(0.5, 0.5)), noise=Noise(probability=1, std=(1, 1)))
    view = views(torch.full((64, 256), 100.0), policy).views[0]
    kept = view[view != 0] - 100
    assert abs(kept.mean()) < 0.05
    assert abs(kept.std() - 1) < 0.05


def test_preset_none_gives_the_row_itself():
    source = rows(3)
    made = make_views(source, ViewsConfig(preset="none"), **KEYS, slots=range(3))
    assert all(torch.equal(view, source) for view in made.views)


@pytest.mark.parametrize(
    "config",
    [ViewsConfig(), ViewsConfig(preset="gcl"), *(ViewsConfig(augment=AugmentConfig(**one)) for one in (
        {"flip": Flip()}, {"brightness": Brightness()}, {"size": (8, 8)}, {"clip": (0.0, 1.0)}))],
)  # fmt: skip
def test_changes_of_voxels_are_refused_for_rows_and_masks_for_images(config):
    with pytest.raises(ConfigError, match="no voxels to change") as caught:
        resolve_views(config, 0)
    assert "preset: features" in caught.value.fix
    with pytest.raises(ConfigError, match="no voxels"):
        make_views(rows(2), config, **KEYS, slots=range(2))
    for dims in (2, 3):
        with pytest.raises(ConfigError, match="mask is for feature tables"):
            resolve_views(ViewsConfig(preset="features"), dims)


def test_artefacts_are_refused_for_rows():
    config = ViewsConfig(preset="features", artefacts=(Artefact(name="ghosting"),))
    with pytest.raises(ConfigError, match="artefacts are for images"):
        resolve_views(config, 0)
