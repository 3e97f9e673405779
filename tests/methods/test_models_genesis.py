"""Restoration: what is compared with what, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

from medssl.config import PretrainConfig
from medssl.core.errors import ConfigError, InputError
from medssl.core.types import ModelParts, ViewBatch
from medssl.methods import METHODS
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import UNet2dConfig
from medssl.transforms.genesis import deform, draw

SHAPE = (2, 16, 12)


def build(blocks=None, **settings):
    encoder = build_encoder(UNet2dConfig(widths=(4, 8, 8)), SHAPE, seed=0)
    config = METHODS["models_genesis"].config(**settings)
    parts = ModelParts(encoder, build_decoder(encoder, blocks=blocks, seed=0), SHAPE)
    return METHODS["models_genesis"].build(config, parts, seed=0)


def batch(images, step=0):
    slot = torch.arange(len(images))
    return ViewBatch((images,), (None,), {"slot": slot}, step=step, seed=7)


def images(n=4):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1


def test_the_loss_compares_the_restored_copy_with_the_item_itself():
    method, x = build(), images()
    kept = x.clone()
    output = method.training_loss(batch(x, step=3))
    assert torch.equal(x, kept)
    clean = x.clamp(0, 1)
    deformed = deform(clean, draw(method.config, SHAPE[1:], seed=7, step=3, slots=range(4)))
    restored = method.restoring(method.decoder(method.encoder.feature_maps(deformed))).sigmoid()
    assert_close(output.loss, ((restored - clean) ** 2).mean())
    assert_close(output.logs["untouched"], ((deformed - clean) ** 2).mean())
    assert_close(output.logs["one_grey"], clean.var(correction=0))
    assert_close(output.logs["clipped"], (x - clean).abs().mean())
    assert output.logs["untouched"] > 0.01
    assert not torch.equal(method.training_loss(batch(x, step=4)).loss, output.loss)


def test_a_network_that_answers_with_one_grey_shows_in_the_logs():
    method = build()
    with torch.no_grad():
        for weight in method.parameters():
            weight.zero_()
    output = method.training_loss(batch(images()))
    assert output.loss >= output.logs["one_grey"]


def test_a_decoder_that_stops_early_is_refused():
    with pytest.raises(ConfigError, match="trains the whole decoder"):
        build(blocks=1)


@pytest.mark.parametrize("scale", [200.0, -3.0])
def test_intensities_of_another_scale_are_refused_at_the_first_batch(scale):
    with pytest.raises(InputError, match=r"restores intensities in \[0, 1\]"):
        build().training_loss(batch(images() * scale))


def test_standardised_intensities_are_refused_before_anything_is_read():
    values = {
        "name": "run",
        "data": {"manifest": "manifest.csv", "prepare": {"intensity": "zscore"}},
        "items": {"geometry": "slice"},
        "model": {"encoder": {"name": "unet2d"}, "decoder_blocks": 5},
        "method": {"name": "models_genesis"},
        "sampler": {"name": "random", "batch_size": 6},
        "views": {"n_views": 1, "preset": "none"},
        "training": {"steps": 1},
    }
    with pytest.raises(ValueError, match="intensities in \\[0, 1\\]: set data.prepare.intensity: percentile"):
        PretrainConfig.model_validate(values)
    PretrainConfig.model_validate({**values, "data": {"manifest": "manifest.csv"}})
