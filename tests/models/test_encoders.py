"""What every listed encoder promises; U-Nets have more tests of their own."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.models import ENCODERS, build_decoder, build_encoder, encoder_from_weights, save_weights
from medssl.models.encoders import MLPConfig

SHAPES = {0: (7,), 2: (2, 40, 36), 3: (1, 33, 36, 34)}


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
        return SHAPES[self.config.dims]

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.settings.values())])

    def build(self, seed: int = 0) -> nn.Module:
        return build_encoder(self.config, self.image_shape, seed=seed)

    def images(self, n: int = 2) -> torch.Tensor:
        return torch.randn(n, *self.image_shape, generator=torch.Generator().manual_seed(1))


CASES = [
    *(Small(name, {"widths": (4, 8, 8), "norm": norm}) for name in ("unet2d", "unet3d") for norm in ("group", "batch")),
    *(Small("mlp", {"norm": norm, "widths": (8, 5)}) for norm in ("none", "batch", "layer")),
    Small("mlp", {"activation": "gelu", "dropout": 0.2}),
]
every_encoder = pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])


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
    if encoder.dims:
        with pytest.raises(ShapeError, match="smaller than"):
            encoder(x[..., :1])


def test_what_has_no_map_at_full_resolution_gets_no_decoder():
    with pytest.raises(ConfigError, match="`mlp`") as caught:
        build_decoder(build_encoder(MLPConfig(), (7,)))
    assert "unet3d" in str(caught.value)
