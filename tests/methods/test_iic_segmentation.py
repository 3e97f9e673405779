import math
from dataclasses import replace

import pytest
import torch
from method_examples import Example, make_batch
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.types import ModelParts
from medssl.losses import EmptyComparisonWarning, iic_segmentation
from medssl.methods import METHODS
from medssl.methods.iic_segmentation import IICSegmentationConfig, seen_in_both
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import UNet2dConfig
from medssl.training import TrainingConfig
from medssl.training.monitors import DEAD, collapse_signs
from medssl.transforms.geometry import compose_theta, inverse_theta, warp

SHIFT = torch.tensor([[[1.0, 0, 0.25], [0, 1, -0.5]]])  # of the last axis by 1/8 of it, of the first by 1/4
TURN = torch.tensor([[[0.8, 0.3, 0.1], [-0.3, 0.9, 0.0]]])


def case(dims: int = 2, **settings) -> Example:
    return Example(METHODS["iic_segmentation"], IICSegmentationConfig(**settings), dims)


def test_composed_maps_apply_one_after_the_other():
    x = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    inner, outer = SHIFT.double(), TURN.double()
    expected = outer[0] @ torch.cat([inner[0] @ x, torch.ones(1, dtype=torch.float64)])
    assert_close(compose_theta(outer, inner)[0] @ x, expected)
    identity = compose_theta(inverse_theta(TURN), TURN)
    assert_close(identity, torch.eye(2, 3)[None], atol=1e-6, rtol=0)


def test_places_seen_in_both_views_are_those_of_the_item_that_both_show():
    between, mask = seen_in_both(SHIFT, None, (8, 8))
    assert_close(between, SHIFT)
    # View 1 begins 2 voxels before the item on the first axis, and ends 1 voxel behind it on the last.
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:, :7] = True
    assert torch.equal(mask[0], expected)
    assert torch.equal(seen_in_both(None, SHIFT, (8, 8))[1][0], expected.flip(0, 1))
    assert bool(seen_in_both(SHIFT, SHIFT, (8, 8))[1][0, 2:, :7].all())
    assert seen_in_both(None, None, (8, 8)) == (None, None)


def test_the_same_geometry_in_both_views_leaves_out_only_what_lies_outside_the_item():
    between, mask = seen_in_both(TURN, TURN, (8, 8))
    assert_close(between, torch.eye(2, 3)[None], atol=1e-6, rtol=0)
    assert bool(mask[0, 3:5, 3:5].all())
    inside = warp(torch.ones(1, 1, 8, 8), TURN, mode="nearest")[0, 0] > 0
    assert torch.equal(mask[0], inside)


@pytest.mark.parametrize("head", ["over", "main"])
def test_the_loss_undoes_the_geometry_of_both_views_on_the_map(head):
    """With the image itself as map, clusters are known where they came from."""
    torch.manual_seed(0)
    settings = IICSegmentationConfig(on="encoder", k_main=3, k_over=3, max_displacement=1, lamb_main=1.5)
    encoder = build_encoder(UNet2dConfig(widths=(4, 4)), (1, 16, 16))
    method = METHODS["iic_segmentation"].build(settings, ModelParts(encoder, None, (1, 16, 16)))
    method.dense_map = lambda images: images.repeat(1, 4, 1, 1)
    # Along an axis every place differs from its neighbours, so that only the right geometry brings equals together.
    source = torch.randn(2, 1, 16, 16)
    thetas = (SHIFT.expand(2, 2, 3), TURN.expand(2, 2, 3))
    views = tuple(warp(source, theta) for theta in thetas)
    batch = replace(make_batch(case(), 0), views=views, geometry=thetas, step=0 if head == "over" else 1)
    output = method.training_loss(batch)
    logits = [getattr(method.cluster_heads, head)(method.dense_map(view)) for view in views]
    between, mask = seen_in_both(*thetas, (16, 16))
    lamb = {"over": 1.0, "main": 1.5}[head]
    expected = iic_segmentation(*logits, affine2_to_1=between, mask=mask, max_displacement=1, lamb=lamb)
    assert_close(output.loss, expected)
    assert_close(output.logs[f"iic_{head}"], expected.detach())


@pytest.mark.parametrize("dims", [2, 3])
def test_undoing_the_geometry_brings_equal_places_together(dims):
    """Clusters of smooth images, one the other shifted: found again only where the shift is undone."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 16)] * dims, indexing="ij")
    image = sum(torch.sin(3 * axis + i) for i, axis in enumerate(axes))[None, None]
    theta = torch.eye(dims, dims + 1)[None].clone()
    theta[:, 0, -1] = 0.5
    view = warp(image, theta)

    def loss(affine, mask):
        logits = [20 * torch.cat([x, -x], 1) for x in (image, view)]
        return iic_segmentation(*logits, affine2_to_1=affine, mask=mask)

    right = loss(*seen_in_both(None, theta, (16,) * dims))
    wrong = loss(*seen_in_both(theta, None, (16,) * dims))
    assert right < wrong - 0.2
    assert right < -0.4


def test_heads_take_turns_and_the_other_one_gets_no_gradient():
    example = case(alternate_steps=2)
    method = example.build()
    assert [method.active(step)[0] for step in range(6)] == ["over", "over", "main", "main", "over", "over"]
    for step, idle in ((0, "main"), (2, "over")):
        method.zero_grad()
        output = method.training_loss(make_batch(example, step))
        output.loss.backward()
        assert not any(bool(p.grad.any()) for p in getattr(method.cluster_heads, idle).parameters())
        assert {"iic_main", "iic_over", "chance_loss", "used_prototypes", "n_prototypes"} == set(output.logs)
    both = case(alternate_steps=None)
    output = both.build().training_loss(make_batch(both, 0))
    assert_close(output.loss.detach(), (output.logs["iic_main"] + output.logs["iic_over"]) / 2)


def test_a_network_without_an_opinion_is_at_chance_and_uses_one_cluster():
    example = case(alternate_steps=None, k_main=4, k_over=6, lamb_main=1.5)
    method = example.build()
    with torch.no_grad():
        for weight in method.parameters():
            weight.zero_()
    output = method.training_loss(make_batch(example, 0))
    assert_close(output.logs["chance_loss"], torch.tensor(-0.5 * math.log(4)))
    assert_close(output.loss.detach(), output.logs["chance_loss"])
    assert_close(output.logs["used_prototypes"], torch.tensor(0.25))


@pytest.mark.parametrize("step", [0, 1])
def test_one_cluster_for_everything_is_a_collapse_by_name(step):
    method = case(k_main=3, k_over=15).build()
    with torch.no_grad():
        for head in (method.cluster_heads.main, method.cluster_heads.over):
            head.weight.zero_()
            head.bias.copy_(20.0 * (torch.arange(len(head.bias)) == 0))
    output = method.training_loss(make_batch(case(), step))
    logs = {"loss": output.loss, **output.logs}
    signs, _ = collapse_signs(TrainingConfig(steps=1), logs=logs, embedding=None, items=6)
    assert DEAD in signs


def test_views_that_share_no_place_give_0_with_gradient_0():
    example = case()
    method, batch = example.build(), make_batch(example, 0)
    far = torch.tensor([[[1.0, 0, 0], [0, 1, 3]]]).expand(len(batch.views[0]), 2, 3)
    with pytest.warns(EmptyComparisonWarning):
        output = method.training_loss(replace(batch, geometry=(None, far)))
    output.loss.backward()
    assert output.loss == 0
    assert not any(bool(p.grad.any()) for p in method.parameters())


def test_parts_that_do_not_fit_are_refused_before_training():
    entry = METHODS["iic_segmentation"]
    encoder = build_encoder(UNet2dConfig(widths=(4, 4, 4)), (1, 16, 16))
    with pytest.raises(ConfigError, match="no decoder"):
        entry.build(IICSegmentationConfig(), ModelParts(encoder, None, (1, 16, 16)))
    with pytest.raises(ConfigError, match=r"multiples of \(4, 4\)"):
        entry.build(IICSegmentationConfig(on="encoder"), ModelParts(encoder, None, (1, 18, 16)))
    with pytest.raises(ConfigError, match="at most 3"):
        entry.build(IICSegmentationConfig(on="encoder", max_displacement=4), ModelParts(encoder, None, (1, 16, 16)))
    whole = ModelParts(encoder, build_decoder(encoder), (1, 18, 18))
    entry.build(IICSegmentationConfig(), whole)  # a whole decoder's map is the image
    method = entry.build(IICSegmentationConfig(on="encoder"), ModelParts(encoder, None, (1, 16, 16)))
    example = case()
    batch = make_batch(example, 0)
    with pytest.raises(ShapeError, match="evenly"):
        method.training_loss(replace(batch, views=tuple(view[..., :14] for view in batch.views)))
