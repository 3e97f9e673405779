import pytest
import torch
from torch import nn
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.schema import validate
from medssl.models import ENCODERS, SegmentationNet, SyncBatchNorm, build_decoder, build_encoder, make_norm
from medssl.models.encoders import UNet2dConfig, UNet3dConfig, auto_strides

UNETS = ("unet2d", "unet3d")
SHAPES = {2: (2, 16, 20), 3: (1, 16, 12, 4)}


def small(name: str, norm: str = "group") -> tuple[nn.Module, tuple[int, ...]]:
    entry = ENCODERS[name]
    shape = SHAPES[entry.config.dims]
    return build_encoder(entry.config(widths=(4, 8, 8), norm=norm), shape), shape


@pytest.mark.parametrize("name", UNETS)
def test_unets_offer_pooled_features_and_maps_from_fine_to_coarse(name):
    encoder, shape = small(name)
    x = torch.randn(3, *shape)
    maps = encoder.feature_maps(x)
    assert [m.shape[1] for m in maps] == list(encoder.width)
    assert maps[0].shape[2:] == x.shape[2:]
    assert maps[-1][0, 0].numel() < maps[0][0, 0].numel()
    assert encoder(x).shape == (3, encoder.out_features)
    assert_close(encoder(x), maps[-1].flatten(2).mean(2))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_gradient_reaches_every_weight_of_encoder_and_decoder(name, norm):
    encoder, shape = small(name, norm)
    network = SegmentationNet(encoder, build_decoder(encoder), 3)
    network(torch.randn(2, *shape)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", UNETS)
def test_weights_depend_on_the_seed_alone(name):
    config, shape = ENCODERS[name].config(widths=(4, 8)), SHAPES[ENCODERS[name].config.dims]
    before = torch.get_rng_state()
    first = build_encoder(config, shape, seed=1).state_dict()
    torch.rand(7)
    torch.set_rng_state(before)
    again, other = build_encoder(config, shape, seed=1).state_dict(), build_encoder(config, shape, seed=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["levels.0.0.conv.weight"], other["levels.0.0.conv.weight"])


def test_the_gcl_preset_is_the_network_of_the_paper():
    encoder = build_encoder(UNet2dConfig(preset="gcl"), (1, 192, 192))
    assert encoder.width == (16, 32, 64, 128, 128, 128)
    assert len(encoder.pools) == 5
    assert isinstance(encoder.levels[0][0].norm, SyncBatchNorm)
    with torch.no_grad():
        maps = encoder.eval().feature_maps(torch.zeros(1, 1, 192, 192))
        assert maps[-1].shape == (1, 128, 6, 6)
        third = build_decoder(encoder, blocks=3).eval()(maps)
    assert third.shape == (1, 64, 48, 48)  # a quarter of the image


def test_a_preset_refuses_settings_that_contradict_it_and_accepts_its_own_dump():
    config = UNet2dConfig(preset="gcl")
    assert validate(UNet2dConfig, config.model_dump(mode="json"), source="dump") == config
    with pytest.raises(ConfigError, match=r"preset gcl fixes norm to batch, found group"):
        validate(UNet2dConfig, {"name": "unet2d", "preset": "gcl", "norm": "group"}, source="run.yaml")


def test_automatic_strides_leave_a_shallow_axis_alone():
    assert auto_strides((64, 64, 8), 4) == ((2, 2, 2), (2, 2, 1), (2, 2, 1))
    assert auto_strides((9, 3), 3) == ((2, 1), (1, 1))


@pytest.mark.parametrize("shape", [(1, 17, 13, 9), (1, 11, 8, 5)])
def test_a_complete_decoder_returns_to_odd_image_sizes(shape):
    encoder = build_encoder(UNet3dConfig(widths=(4, 4, 4)), shape)
    network = SegmentationNet(encoder, build_decoder(encoder), 4)
    assert network(torch.randn(1, *shape)).shape == (1, 4, *shape[1:])


def test_an_incomplete_decoder_still_gives_logits_on_the_grid_of_the_image():
    encoder = build_encoder(UNet2dConfig(widths=(4, 4, 4)), (1, 16, 16))
    decoder = build_decoder(encoder, blocks=1)
    assert not decoder.complete
    assert SegmentationNet(encoder, decoder, 2)(torch.randn(1, 1, 16, 16)).shape == (1, 2, 16, 16)


def test_few_decoder_blocks_are_the_first_of_many():
    encoder = build_encoder(UNet2dConfig(widths=(4, 6, 8, 8)), (1, 32, 32))
    few, many = build_decoder(encoder, blocks=2).state_dict(), build_decoder(encoder).state_dict()
    assert set(few) < set(many)
    assert all(few[name].shape == many[name].shape for name in few)


def test_wrong_inputs_are_refused_with_a_remedy():
    encoder = build_encoder(UNet2dConfig(preset="gcl"), (1, 32, 32))
    with pytest.raises(ShapeError, match=r"at least \(32, 32\)"):
        encoder(torch.zeros(1, 1, 32, 16))
    with pytest.raises(ShapeError, match="1 channels"):
        encoder(torch.zeros(1, 2, 32, 32))
    with pytest.raises(ConfigError, match="2D items"):
        build_encoder(UNet2dConfig(), (1, 32, 32, 32))
    with pytest.raises(ConfigError, match="size of the items"):
        ENCODERS["unet3d"].build(UNet3dConfig(), 1)
    with pytest.raises(ConfigError, match="1 to 5 blocks"):
        build_decoder(encoder, blocks=6)
    with pytest.raises(ConfigError, match="3 levels need 2 entries"):
        validate(UNet3dConfig, {"name": "unet3d", "widths": [4, 4, 4], "strides": [[2, 2, 2]]}, source="run.yaml")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_one_process_is_torchs(training):
    torch.manual_seed(0)
    ours, theirs = make_norm("batch", 5, 3).train(training), nn.BatchNorm3d(5).train(training)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(4, 5, 3, 2, 2) * 3 + 1
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_groups_hold_two_channels_or_more():
    groups = {channels: make_norm("group", channels, 2).num_groups for channels in (1, 3, 4, 8, 16, 24, 128)}
    assert groups == {1: 1, 3: 1, 4: 2, 8: 4, 16: 8, 24: 8, 128: 8}


def test_instance_norm_is_torchs_and_takes_a_single_voxel():
    x = torch.randn(2, 6, 4, 4)
    assert_close(make_norm("instance", 6, 2)(x), nn.InstanceNorm2d(6)(x))
    assert make_norm("instance", 6, 2)(torch.randn(2, 6, 1, 1)).isfinite().all()
