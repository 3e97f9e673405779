"""Views of a batch: presets, the original, labels, artefacts, and independence of the split over processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.schema import validate
from medssl.transforms.artefacts import Artefact, add_artefacts
from medssl.transforms.augment import AugmentConfig
from medssl.transforms.views import PRESETS, ViewsConfig, inverse_theta, make_views, resolve_views, warp

KEYS = {"seed": 3, "step": 7}


def images(n, *spatial, seed=0):
    return torch.rand(n, 1, *spatial, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spatial", [(21, 18), (12, 13, 11), (8, 9, 1)])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "features"])
def test_presets_give_finite_views_that_still_vary(preset, spatial):
    source = images(6, *spatial)
    made = make_views(source, ViewsConfig(preset=preset), **KEYS, slots=range(6))
    assert len(made.views) == len(made.geometry) == 2
    for view, theta in zip(made.views, made.geometry, strict=True):
        assert view.shape == source.shape
        assert view.isfinite().all()
        assert (view.flatten(1).std(dim=1) > 0.02).all()
        assert (theta is None) == (not PRESETS[preset].moves)
        assert theta is None or theta.shape == (6, len(spatial), len(spatial) + 1)
    assert torch.equal(made.views[0], made.views[1]) == (preset == "none")


def test_gcl_preset_crops_the_published_share_and_clips():
    made = make_views(images(40, 192, 192), ViewsConfig(preset="gcl", n_views=1), **KEYS, slots=range(40))
    theta = made.geometry[0]
    assert_close(theta[:, 0, 0], torch.full((40,), 100 / 192))
    assert_close(theta[:, 0, 1], torch.zeros(40))
    corner = (theta[:, :, 2] + 1 - 100 / 192) / 2 * 192
    assert corner.min() >= -1e-3
    assert corner.max() <= 92 + 1e-3
    assert corner.std() > 15
    assert made.views[0].min() >= 0
    assert made.views[0].max() <= 1.5


def test_segmentation_preset_never_flips():
    made = make_views(images(30, 8, 8, 8), ViewsConfig(preset="segmentation", n_views=1), **KEYS, slots=range(30))
    assert (torch.linalg.det(made.geometry[0][:, :, :3]) > 0).all()


def test_original_is_view_zero_and_labels_stay_with_it():
    source, labels = images(3, 10, 9), torch.randint(-1, 3, (3, 10, 9))
    config = ViewsConfig(n_views=3, original=True, preset="gcl")
    made = make_views(source, config, **KEYS, slots=[0, 1, 2], label_maps=labels)
    assert len(made.views) == 3
    assert torch.equal(made.views[0], source)
    assert made.geometry[0] is None
    assert torch.equal(made.label_map, labels)
    assert not torch.equal(made.views[1], made.views[2])


def test_label_map_moves_with_view_zero():
    # Images that show their own label map: after moving, both still agree away from edges between classes.
    labels = torch.zeros(5, 24, 20, 22, dtype=torch.long)
    labels[:, 6:16, 4:15, 8:18] = 1
    policy = AugmentConfig(crop_resize={"scale": (0.6, 0.9)}, flip={}, affine={"probability": 1, "degrees": 20})
    for way in ("items", "batched"):
        made = make_views(
            labels[:, None].float(),
            ViewsConfig(augment=policy),
            **KEYS,
            slots=range(5),
            label_maps=labels,
            method=way,
        )
        sure = (made.views[0] - 0.5).abs()[:, 0] > 0.3
        assert torch.equal((made.views[0][:, 0] > 0.5)[sure], made.label_map.bool()[sure])
        assert (made.label_map != labels).float().mean() > 0.05


def test_a_batch_is_the_same_over_one_or_two_processes():
    source, labels = images(4, 9, 8, 7), torch.randint(0, 3, (4, 9, 8, 7))
    config = ViewsConfig(preset="simclr")
    whole = make_views(source, config, **KEYS, slots=range(8, 12), label_maps=labels)
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        part = make_views(source[rows], config, **KEYS, slots=torch.arange(8, 12)[rows], label_maps=labels[rows])
        for a, b in zip(part.views, whole.views, strict=True):
            assert_close(a, b[rows], atol=2e-6, rtol=1e-5)
        assert torch.equal(part.label_map, whole.label_map[rows])


def test_one_policy_per_view_gives_views_of_their_own_sizes():
    large = AugmentConfig(crop_resize={"scale": (0.7, 1)})
    small = AugmentConfig(crop_resize={"scale": (0.3, 0.5)}, size=(6, 6))
    config = ViewsConfig(n_views=3, augment=(large, large, small))
    made = make_views(images(2, 12, 12), config, **KEYS, slots=[0, 1])
    assert [tuple(view.shape[2:]) for view in made.views] == [(12, 12), (12, 12), (6, 6)]


def test_a_feature_map_of_a_view_comes_back_to_the_grid_of_the_item():
    lines = torch.meshgrid(*(torch.linspace(0, 3, 32),) * 2, indexing="ij")
    source = (torch.sin(lines[0]) + torch.cos(lines[1])).expand(2, 1, 32, 32)
    policy = AugmentConfig(flip={}, affine={"probability": 1, "degrees": 15, "scale": (1, 1)})
    made = make_views(source, ViewsConfig(augment=policy), **KEYS, slots=[0, 1])
    for view, theta in zip(made.views, made.geometry, strict=True):
        coarse = torch.nn.functional.avg_pool2d(view, 2)
        back = warp(coarse, inverse_theta(theta), padding="border")
        expected = torch.nn.functional.avg_pool2d(source, 2)
        assert_close(back[..., 4:12, 4:12], expected[..., 4:12, 4:12], atol=0.03, rtol=0)


def test_resolving_writes_the_preset_out_and_checks_it():
    resolved = resolve_views(ViewsConfig(preset="simclr"), 3)
    assert resolved.preset is None
    assert resolved.augment == (PRESETS["simclr"],) * 2
    assert resolve_views(resolved, 3) == resolved
    assert ViewsConfig.model_validate(resolved.model_dump()) == resolved
    assert ViewsConfig().policies == (PRESETS["simclr"],) * 2
    with pytest.raises(ConfigError, match="flip names an axis"):
        resolve_views(ViewsConfig(augment=AugmentConfig(flip={"axes": (2,)})), 2)


def test_moves_says_whether_a_view_can_move_voxels():
    assert ViewsConfig(preset="gcl").moves
    assert not ViewsConfig(preset="intensity").moves
    assert not ViewsConfig(n_views=1, original=True).moves


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "simclrr"}, "Did you mean `simclr`"),
        ({"preset": "gcl", "augment": {}}, "not both"),
        ({"n_views": 3, "augment": [{}, {}]}, "lists 2 policies for 3"),
        ({"n_views": 1, "original": True, "preset": "gcl"}, "only view is the original"),
        ({"artefacts": [{"name": "wrap"}]}, "artefacts.0.name"),
        ({"augment": {"flipp": {}}}, "flip"),
    ],
)
def test_wrong_configurations_say_what_to_do(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(ViewsConfig, values, source="run.yaml")


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="slot"):
        make_views(images(2, 4, 4), ViewsConfig(), **KEYS, slots=[0])
    with pytest.raises(ShapeError, match="label maps"):
        make_views(images(2, 4, 4), ViewsConfig(), **KEYS, slots=[0, 1], label_maps=torch.zeros(2, 5, 4))


@pytest.mark.parametrize("name", ["motion", "ghosting", "spike"])
@pytest.mark.parametrize("spatial", [(16, 14), (12, 10, 8)])
def test_artefacts_change_the_item_by_its_own_stream(name, spatial):
    source = images(3, *spatial)
    always = (Artefact(name=name, probability=1),)
    state = torch.get_rng_state()
    changed = add_artefacts(source, always, **KEYS, slots=[0, 1, 2], view=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.shape == source.shape
    assert changed.isfinite().all()
    assert ((changed - source).abs().flatten(1).amax(dim=1) > 1e-3).all()
    alone = add_artefacts(source[1:2], always, **KEYS, slots=[1], view=0)
    assert torch.equal(alone[0], changed[1])
    assert add_artefacts(source, (Artefact(name=name, probability=0),), **KEYS, slots=[0, 1, 2], view=0) is source


@pytest.mark.parametrize("spatial", [(40, 36), (24, 28, 26)])
def test_motion_blends_the_image_with_moved_copies_of_itself(spatial):
    lines = torch.meshgrid(*(torch.linspace(-2, 2, s) for s in spatial), indexing="ij")
    source = torch.exp(-sum(line**2 for line in lines)).expand(6, 1, *spatial)
    moved = add_artefacts(source, (Artefact(name="motion", probability=1),), **KEYS, slots=range(6), view=0)
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(source, moved, strict=True)]
    likeness = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert likeness.min() > 0.6  # turned about the corner instead of the middle, images leave the field of view
    assert likeness.min() < 0.999
    assert (moved.flatten(1).mean(dim=1) / source.flatten(1).mean(dim=1) - 1).abs().max() < 0.2


def test_views_made_in_several_threads_are_those_made_in_one():
    source = images(4, 20, 18, 16)
    config = ViewsConfig(preset="simclr", artefacts=(Artefact(name="motion", probability=0.5),))

    def at(step):
        return make_views(source, config, seed=1, step=step, slots=range(4)).views

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(at, range(8)))
    for step, views in enumerate(together):
        for a, b in zip(views, at(step), strict=True):
            assert torch.equal(a, b)


def test_half_precision_and_permuted_images_give_the_same_float32_views():
    source = images(2, 10, 9, 8).half()
    stored = source.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not stored.is_contiguous()
    made = [make_views(x, ViewsConfig(preset="simclr"), **KEYS, slots=[0, 1]).views[0] for x in (source, stored)]
    assert made[0].dtype == torch.float32
    assert torch.equal(*made)


def test_views_with_artefacts_leave_the_source_and_the_original_alone():
    source = images(2, 12, 12)
    before = source.clone()
    config = ViewsConfig(original=True, preset="none", artefacts=(Artefact(name="spike", probability=1),))
    made = make_views(source, config, **KEYS, slots=[0, 1])
    assert torch.equal(source, before)
    assert torch.equal(made.views[0], source)
    assert not torch.allclose(made.views[1], source)
