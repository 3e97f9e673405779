import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from medssl.core.errors import ShapeError
from medssl.core.types import ModelParts, ViewBatch
from medssl.methods import METHODS
from medssl.methods.vae import VAE, VAEConfig, kl_to_unit_normal
from medssl.models import ENCODERS, build_encoder, save_weights
from medssl.models.encoders import MLPConfig, ResNet18In3dConfig, UNet2dConfig, UNet3dConfig
from medssl.models.vae import map_sizes, mirrored_decoder
from medssl.models.weights import encoder_from_weights, head_from_weights

NARROW = {
    "unet": {"widths": (2, 4, 4)},
    "resnet18": {"widths": (2, 4, 4, 4)},
    "resnet50": {"widths": (2, 2, 2, 2)},
    "densenet121": {"init_features": 2, "growth_rate": 2},
    "alexnet": {"widths": (2, 4, 4, 4, 4)},
    "vgg": {"widths": (2, 4, 4)},
    "mlp": {"widths": (6, 4)},
}


def narrow(name: str, image_shape: tuple[int, ...], norm: str) -> nn.Module:
    config = ENCODERS[name].config(norm=norm, **NARROW[name.removesuffix("2d").removesuffix("3d").removesuffix("_")])
    return build_encoder(config, image_shape)


def build(encoder: nn.Module, image_shape: tuple[int, ...], **given) -> VAE:
    return METHODS["vae"].build(VAEConfig(**{"latent_dim": 3, **given}), ModelParts(encoder, None, image_shape))


def batch(x: torch.Tensor, *, step: int = 0, slots: slice = slice(None), seed: int = 0) -> ViewBatch:
    return ViewBatch((x[slots],), (None,), {"slot": torch.arange(len(x))[slots]}, step=step, seed=seed)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_decoder_mirrors_every_encoder(name):
    dims = ENCODERS[name].config.dims
    shape = {0: (9,), 2: (2, 75, 70), 3: (1, 70, 73, 69)}[dims]
    encoder = narrow(name, shape, "group" if dims else "layer")  # a batch norm would take biases before it out again
    decoder = mirrored_decoder(encoder, shape, 3, channels=8)
    drawn = decoder(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (4, *shape)
    drawn.square().mean().backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@settings(max_examples=15)
@given(size=st.tuples(*[st.integers(9, 30)] * 3))
def test_volumes_of_any_size_come_back_in_their_size(size):
    encoder = build_encoder(UNet3dConfig(widths=(2, 2, 2)), (1, *size))
    assert mirrored_decoder(encoder, (1, *size), 2)(torch.randn(1, 2)).shape == (1, 1, *size)


def test_brain_volumes_are_drawn_in_their_size_with_a_bearable_number_of_weights():
    shape = (1, 121, 145, 121)
    with torch.device("meta"):
        encoder = ENCODERS["resnet18_3d"].build(ResNet18In3dConfig(), 1)
        decoder = mirrored_decoder(encoder, shape, 64)
        assert decoder(torch.zeros(2, 64)).shape == (2, *shape)
    assert sum(p.numel() for p in decoder.parameters()) < 10_000_000


def test_sizes_are_followed_without_touching_the_encoder():
    encoder = narrow("resnet18_2d", (1, 33, 40), "batch")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    sizes = map_sizes(encoder, (1, 33, 40))
    assert sizes == [tuple(m.shape[2:]) for m in encoder.eval().feature_maps(torch.zeros(1, 1, 33, 40))]
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_divergence_is_that_of_torchs_distributions():
    mean, log_variance = torch.randn(2, 5, 4, dtype=torch.float64)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert_close(kl_to_unit_normal(mean, log_variance), theirs.sum(1))
    assert_close(kl_to_unit_normal(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))


def test_loss_is_the_bound_divided_by_the_number_of_voxels():
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    method = build(build_encoder(UNet2dConfig(widths=(4, 8)), (1, 8, 8)), (1, 8, 8), beta=3.0).double()
    with torch.no_grad():  # a code without noise can be followed
        method.log_variance.weight.zero_()
        method.log_variance.bias.fill_(-80.0)  # clamped to -20
    output = method.training_loss(batch(x))
    h = method.encoder(x)
    mean = method.head(h)
    bound = [
        0.5 * (method.drawing(mean)[i] - x[i]).square().sum()
        + 3.0 * 0.5 * (mean[i].square() + math.exp(-20) + 20 - 1).sum()
        for i in range(4)
    ]
    assert_close(output.loss, torch.stack(bound).mean() / 64, rtol=1e-3, atol=0)
    assert_close(output.features["z"], mean)
    assert_close(output.features["h"], h)


def test_noise_follows_seed_step_and_place_in_the_batch():
    method = build(build_encoder(MLPConfig(widths=(4,)), (5,)), (5,))
    x = torch.zeros(6, 5)
    noise = method._noise(batch(x))
    assert torch.equal(noise, method._noise(batch(x)))
    assert not torch.equal(noise, method._noise(batch(x, step=1)))
    assert not torch.equal(noise, method._noise(batch(x, seed=1)))
    assert len({tuple(row) for row in noise.tolist()}) == 6
    many = torch.stack([method._noise(batch(x, step=step)) for step in range(500)])
    assert abs(float(many.mean())) < 0.05
    assert abs(float(many.std()) - 1) < 0.05


def test_training_finds_the_principal_directions_and_leaves_the_rest_of_the_code_silent():
    rng = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 2, generator=rng))[0].T
    rows = 2 * torch.randn(256, 2, generator=rng) @ directions + 0.1 * torch.randn(256, 12, generator=rng)
    method = build(build_encoder(MLPConfig(widths=(32, 16)), (12,)), (12,), latent_dim=6)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(600):
        output = method.training_loss(batch(rows, step=step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert float(output.logs["active_dimensions"]) == 2
    # Probabilistic principal components (Tipping & Bishop 1999): with noise of variance 1 the mean of a direction of
    # variance v has variance 1 - 1 / v, and directions of variance below 1 are not used.
    eigenvalues = torch.linalg.eigvalsh(torch.cov(rows.T))[-2:]
    variances = method.head(method.encoder(rows)).detach().var(0).sort().values
    assert_close(variances[-2:].sum(), (1 - 1 / eigenvalues).sum(), atol=0.15, rtol=0)
    assert float(variances[:-2].max()) < 0.01


def test_the_exported_head_gives_the_mean(tmp_path):
    method = build(narrow("resnet18_2d", (1, 32, 32), "batch"), (1, 32, 32))
    save_weights(tmp_path, method.encoder, head=method.head)
    encoder, head, x = encoder_from_weights(tmp_path).eval(), head_from_weights(tmp_path), torch.randn(3, 1, 32, 32)
    assert torch.equal(head(encoder(x)), method.head(method.encoder.eval()(x)))


def test_views_of_another_size_are_refused():
    method = build(build_encoder(UNet2dConfig(widths=(4, 8)), (1, 8, 8)), (1, 8, 8))
    with pytest.raises(ShapeError, match=r"views \(1, 8, 10\), built for \(1, 8, 8\)"):
        method.training_loss(batch(torch.zeros(2, 1, 8, 10)))
    with pytest.raises(ShapeError, match="rows of 5 features"):
        mirrored_decoder(build_encoder(MLPConfig(), (5,)), (6,), 2)
