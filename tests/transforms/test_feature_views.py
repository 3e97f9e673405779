import pytest
import torch

from medssl.core.errors import ConfigError
from medssl.transforms.augment_config import AugmentConfig, Blur, Mask, Noise
from medssl.transforms.views import ViewsConfig, make_views, resolve_views

ROWS = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
VIEWS = ViewsConfig(preset="features")


def views(rows=ROWS, slots=range(8), config=VIEWS, *, seed=3, step=5):
    return make_views(rows, config, seed=seed, step=step, slots=slots).views


def test_each_process_makes_the_views_that_one_process_would_make():
    whole = views()
    for slots in (range(4), range(4, 8), [6, 1]):
        part = views(ROWS[list(slots)], list(slots))
        for one, other in zip(whole, part, strict=True):
            assert torch.equal(one[list(slots)], other)


def test_views_steps_seeds_and_rows_draw_independently():
    first, second = views(ROWS.new_ones(8, 50))
    others = [second, views(ROWS.new_ones(8, 50), step=6)[0], views(ROWS.new_ones(8, 50), seed=4)[0], first.roll(1, 0)]
    assert all((first != other).float().mean() > 0.5 for other in others)
    assert torch.equal(first, views(ROWS.new_ones(8, 50))[0])


def test_noise_and_masks_are_as_strong_as_the_policy_says():
    rows = torch.ones(2000, 50)
    noisy = views(rows, range(2000), ViewsConfig(augment=AugmentConfig(noise=Noise(probability=0.5, std=(0.2, 0.2)))))
    changed = (noisy[0] != 1).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.5, abs=0.05)
    assert (noisy[0][changed] - 1).std() == pytest.approx(0.2, abs=0.01)
    masked = views(rows, range(2000), ViewsConfig(augment=AugmentConfig(mask=Mask(probability=0.5, share=(0.3, 0.3)))))
    empty = (masked[0] == 0).float().mean(dim=1)
    assert set(masked[0].unique().tolist()) == {0.0, 1.0}
    assert (empty > 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert empty[empty > 0].mean() == pytest.approx(0.3, abs=0.01)


def test_the_original_is_untouched_and_voxel_changes_are_refused():
    before = ROWS.clone()
    made = views(config=ViewsConfig(n_views=2, original=True, preset="features"))
    assert torch.equal(made[0], before)
    assert torch.equal(ROWS, before)
    with pytest.raises(ConfigError, match="no voxels to change"):
        resolve_views(ViewsConfig(augment=AugmentConfig(blur=Blur())), 0)
