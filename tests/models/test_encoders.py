"""What every listed encoder promises; U-Nets have more tests of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from monai.networks import nets
from torch import nn
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.models import (
    ENCODERS,
    SyncBatchNorm,
    build_decoder,
    build_encoder,
    encoder_from_weights,
    load_weights,
    save_weights,
)
from medssl.models.encoders import MLPConfig

SHAPES = {0: (7,), 2: (2, 40, 36), 3: (1, 33, 36, 34)}
LARGER = {"alexnet_2d": (2, 70, 75), "alexnet_3d": (1, 69, 70, 72)}
VBM, CUBE = (1, 121, 145, 121), (1, 128, 128, 128)
"""What brain volumes come as: OpenBHB's grey matter maps, and the usual crop."""


@dataclass(frozen=True)
class Small:
    """An encoder of few channels."""

    name: str
    settings: dict[str, Any]

    @property
    def config(self) -> Any:
        return ENCODERS[self.name].config(name=self.name, **self.settings)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return LARGER.get(self.name, SHAPES[self.config.dims])

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.settings.values())])

    def build(self, seed: int = 0) -> nn.Module:
        return build_encoder(self.config, self.image_shape, seed=seed)

    def images(self, n: int = 2) -> torch.Tensor:
        return torch.randn(n, *self.image_shape, generator=torch.Generator().manual_seed(1))


NORMS = ("group", "instance", "batch")
CASES = [
    *(Small(name, {"widths": (4, 8, 8), "norm": norm}) for name in ("unet2d", "unet3d") for norm in NORMS),
    *(Small(f"resnet18_{dims}d", {"widths": (4, 8, 8, 6), "norm": norm}) for dims in (2, 3) for norm in NORMS),
    *(Small(f"resnet50_{dims}d", {"widths": (2, 4, 4, 2), "stem_stride": stride}) for dims, stride in ((2, 2), (3, 1))),
    *(Small(f"densenet121_{dims}d", {"init_features": 4, "growth_rate": 2}) for dims in (2, 3)),
    Small("densenet121_2d", {"init_features": 4, "growth_rate": 2, "norm": "group"}),
    *(Small(f"alexnet_{dims}d", {"widths": (2, 4, 4, 6, 8), "norm": norm}) for dims in (2, 3) for norm in NORMS),
    *(Small(f"vgg_{dims}d", {"widths": (2, 4, 4, 6), "norm": norm}) for dims in (2, 3) for norm in NORMS),
    Small("vgg_3d", {"widths": (2, 4, 4), "padding": "replicate"}),
    *(Small("mlp", {"norm": norm, "widths": (8, 5)}) for norm in ("none", "batch", "layer")),
    Small("mlp", {"activation": "gelu", "dropout": 0.2}),
]
every_encoder = pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])


@every_encoder
def test_blocks_hold_every_weight_once_and_make_one_map_each(case):
    encoder, x = case.build().eval(), case.images()
    blocks = [[p for module in block for p in module.parameters()] for block in encoder.blocks()]
    assert [id(p) for block in blocks for p in block] == [id(p) for p in encoder.parameters()]
    for number, level in enumerate(encoder.feature_maps(x), start=1):
        encoder.zero_grad()
        level.square().sum().backward(retain_graph=True)
        reached = {id(p) for p in encoder.parameters() if p.grad is not None}
        assert reached == {id(p) for block in blocks[:number] for p in block}
    assert number == len(blocks)


def test_every_encoder_is_covered():
    assert {case.name for case in CASES} == set(ENCODERS)


@every_encoder
def test_pooled_features_and_maps_from_fine_to_coarse(case):
    encoder, x = case.build().eval(), case.images()
    maps = encoder.feature_maps(x)
    assert [m.shape[1] for m in maps] == list(encoder.width)
    voxels = [m[0, 0].numel() for m in maps]
    assert voxels == sorted(voxels, reverse=True)
    assert len(encoder.width) >= 2
    features = encoder(x)
    assert features.shape == (2, encoder.out_features)
    assert encoder.dims == case.config.dims
    assert_close(features, maps[-1].flatten(2).mean(2) if encoder.dims else maps[-1])


@every_encoder
def test_gradient_reaches_every_weight_and_nothing_is_overwritten(case):
    encoder, x = case.build(), case.images(4).requires_grad_()
    maps = encoder.feature_maps(x)
    copies = [m.detach().clone() for m in maps]
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    assert bool(x.grad.any())
    assert all(torch.equal(a, b) for a, b in zip(maps, copies))


@every_encoder
def test_every_norm_is_one_that_two_processes_share(case):
    kinds = {type(m) for m in case.build().modules() if "Norm" in type(m).__name__}
    wanted = {"batch": {SyncBatchNorm}, "layer": {nn.LayerNorm}, "none": set()}
    assert kinds == wanted.get(case.build().norm, {nn.GroupNorm})


@every_encoder
def test_weights_depend_on_the_seed_alone(case):
    before = torch.get_rng_state()
    first = case.build(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = case.build(seed=1).state_dict(), case.build(seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every_encoder
def test_weights_on_disk_rebuild_the_encoder_exactly(case, tmp_path):
    encoder = case.build(seed=3)
    encoder.train()(case.images(4))  # running statistics move
    save_weights(tmp_path, encoder)
    again = encoder_from_weights(tmp_path)
    assert again.architecture == encoder.architecture
    assert torch.equal(again.eval()(case.images()), encoder.eval()(case.images()))


@every_encoder
def test_wrong_inputs_are_refused(case):
    encoder, x = case.build(), case.images()
    for wrong in (x[:, :1].repeat(1, 9, *(1,) * encoder.dims), x[0], x[..., None]):
        with pytest.raises(ShapeError, match="takes"):
            encoder(wrong)
    with pytest.raises(ConfigError, match="takes"):
        build_encoder(case.config, (1, *(16,) * (encoder.dims + 1 if encoder.dims else 2)))
    if encoder.dims and getattr(encoder, "smallest", 2) > 1:
        with pytest.raises(ShapeError, match="smaller than"):
            encoder(x[..., :1])


@pytest.mark.parametrize("name", ["resnet18_2d", "densenet121_2d", "alexnet_2d"])
def test_the_smallest_image_that_is_not_refused_leaves_a_voxel(name):
    encoder = ENCODERS[name].build(ENCODERS[name].config(), 1).eval()
    n = encoder.smallest
    assert encoder.feature_maps(torch.randn(1, 1, n, n))[-1].shape[2:] == (1, 1)
    if n > 1:
        with pytest.raises(RuntimeError):
            list(encoder.stages(torch.randn(1, 1, n - 1, n - 1)))


# Of torchvision's networks for photographs (3 channels, classifier taken off), and of MONAI's in 3D (1 channel).
N_WEIGHTS = {"resnet18_2d": 11_689_512 - 513_000, "resnet50_2d": 25_557_032 - 2_049_000}
N_WEIGHTS |= {"densenet121_2d": 7_978_856 - 1_025_000}


def n_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, in_channels: int = 1, **settings: Any) -> nn.Module:
    """An encoder of full width without values: sizes can be followed through it in no time."""
    with torch.device("meta"):
        return ENCODERS[name].build(ENCODERS[name].config(**settings), in_channels).eval()


@pytest.mark.parametrize("name", N_WEIGHTS)
def test_2d_forms_are_the_published_networks(name):
    assert n_weights(on_meta(name, in_channels=3)) == N_WEIGHTS[name]


@pytest.mark.parametrize("name", ["resnet18_3d", "resnet50_3d"])
def test_3d_resnets_are_monais_networks(name):
    config, shared = ENCODERS[name].config, {"feed_forward": False, "bias_downsample": False, "conv1_t_stride": 2}
    with torch.device("meta"):
        theirs = getattr(nets, name.removesuffix("_3d"))(n_input_channels=1, **shared)
    assert n_weights(on_meta(name)) == n_weights(theirs)
    narrow = nets.ResNet(config.block, config.depths, [4, 6, 8, 10], n_input_channels=1, **shared).eval()
    same_features(ENCODERS[name].build(config(widths=(4, 6, 8, 10)), 1), narrow, lambda x: narrow(x).flatten(1))


def test_the_3d_densenet_is_monais_network():
    with torch.device("meta"):
        theirs = nets.DenseNet121(3, 1, 1)
    assert n_weights(on_meta("densenet121_3d")) == n_weights(theirs.features)
    narrow = nets.DenseNet121(3, 1, 1, init_features=4, growth_rate=2).eval()
    pooled = nn.Sequential(narrow.features, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(1))
    narrow.class_layers = nn.Identity()
    config = ENCODERS["densenet121_3d"].config(init_features=4, growth_rate=2)
    same_features(ENCODERS["densenet121_3d"].build(config, 1), narrow, pooled)


def same_features(ours: nn.Module, theirs: nn.Module, features: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Weights of the same names give the same features."""
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, 32, 33, 34)
    with torch.no_grad():
        assert_close(ours.eval()(x), features(x))


def test_the_vgg_preset_has_a_total_stride_of_4_in_plane_and_shallow_stacks_keep_their_slices():
    vgg = {name: ENCODERS[name] for name in ("vgg_2d", "vgg_3d")}
    flat = build_encoder(vgg["vgg_2d"].config(widths=(2, 2, 2)), (1, 32, 40))
    assert [tuple(m.shape[2:]) for m in flat.feature_maps(torch.zeros(1, 1, 32, 40))] == [(32, 40), (16, 20), (8, 10)]
    stack = build_encoder(vgg["vgg_3d"].config(widths=(2, 2, 2)), (1, 32, 40, 6))
    assert tuple(stack.feature_maps(torch.zeros(1, 1, 32, 40, 6))[-1].shape[2:]) == (8, 10, 6)
    with pytest.raises(ConfigError, match="strides auto"):
        vgg["vgg_3d"].build(vgg["vgg_3d"].config(), 1)


def test_replicate_padding_cannot_tell_where_the_border_is():
    spread = {}
    for padding in ("zeros", "replicate"):
        config = ENCODERS["vgg_2d"].config(widths=(4, 4, 4, 4), padding=padding, norm="group")
        with torch.no_grad():
            last = build_encoder(config, (1, 32, 32)).feature_maps(torch.full((1, 1, 32, 32), 0.7))[-1]
        spread[padding] = float(last.flatten(2).std(2).max())
    assert spread["replicate"] < 1e-5 < 1e-2 < spread["zeros"]


def test_alexnet_has_the_weights_of_its_five_convolutions():
    pairs = [(1, 64, 5), (64, 128, 3), (128, 192, 3), (192, 192, 3), (192, 128, 3)]
    expected = sum(i * o * k**3 + 2 * o for i, o, k in pairs)  # two for each norm
    assert n_weights(on_meta("alexnet_3d")) == expected


@pytest.mark.parametrize(
    ("name", "out_features"),
    [("resnet18_3d", 512), ("resnet50_3d", 2048), ("densenet121_3d", 1024), ("alexnet_3d", 128)],
)
def test_brain_volumes_fit_every_3d_encoder(name, out_features):
    encoder = on_meta(name)
    for shape in (VBM, CUBE):
        maps = encoder.feature_maps(torch.zeros(2, *shape, device="meta"))
        assert [m.shape[1] for m in maps] == list(encoder.width)
        assert all(min(m.shape[2:]) >= 1 for m in maps)
        assert encoder(torch.zeros(2, *shape, device="meta")).shape == (2, out_features)


def test_a_stem_of_stride_1_works_on_eight_times_the_voxels():
    strided, dense = on_meta("resnet18_3d"), on_meta("resnet18_3d", stem_stride=1)
    x = torch.zeros(1, *CUBE, device="meta")
    pairs = zip(strided.feature_maps(x), dense.feature_maps(x), strict=True)
    assert all(8 * a.numel() == b.numel() for a, b in pairs)
    assert n_weights(strided) == n_weights(dense)


def test_a_whole_brain_volume_goes_through_a_narrow_encoder():
    encoder = build_encoder(ENCODERS["resnet18_3d"].config(widths=(2, 2, 4, 4)), VBM).eval()
    with torch.no_grad():
        maps = encoder.feature_maps(torch.randn(1, *VBM))
    sizes = [tuple(m.shape[2:]) for m in maps]
    assert sizes == [(61, 73, 61), (31, 37, 31), (16, 19, 16), (8, 10, 8), (4, 5, 4)]
    assert all(bool(m.isfinite().all()) for m in maps)


def test_weights_of_another_stem_stride_are_loaded_with_a_warning(tmp_path, caplog):
    config = ENCODERS["resnet18_2d"].config
    save_weights(tmp_path, build_encoder(config(widths=(4, 4, 4, 4)), (1, 32, 32)))
    load_weights(build_encoder(config(widths=(4, 4, 4, 4), stem_stride=1), (1, 32, 32)), tmp_path)
    assert "stem_stride 2, the model has 1" in caplog.text


def test_what_has_no_map_at_full_resolution_gets_no_decoder():
    with pytest.raises(ConfigError, match="`mlp`") as caught:
        build_decoder(build_encoder(MLPConfig(), (7,)))
    assert "unet3d" in str(caught.value)
