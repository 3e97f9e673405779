"""Code of an accelerator, on tensors without values: looking at one fails, and so does a copy that would wait."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_toy import ToyReader, ToySampler

from medssl.core.types import ModelParts, ViewBatch
from medssl.losses import global_contrastive, local_contrastive, nearest_negatives, nt_xent, region_corners
from medssl.methods import METHODS, TASKS
from medssl.models import ENCODERS, build_decoder, build_encoder
from medssl.training import BatchSource, source
from medssl.transforms import genesis
from medssl.transforms.augment import Affine, AugmentConfig, BiasField, Blur, Contrast, CropResize, Flip, Gamma
from medssl.transforms.resampling import resample_labels
from medssl.transforms.views import ViewsConfig

# No noise: there is no generator without a device.
POLICY = AugmentConfig(
    crop_resize=CropResize(), flip=Flip(), affine=Affine(padding="zeros"), blur=Blur(probability=0.5),
    bias_field=BiasField(probability=0.5), gamma=Gamma(), contrast=Contrast(probability=0.5),
)  # fmt: skip


class NoWait(TorchDispatchMode):
    """Refuses copies from the CPU that wait for the device."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            to = kwargs.get("device")
            if to is not None and to.type == "meta":
                self.copies += 1
                assert kwargs.get("non_blocking"), "a copy to the device waits for it"
        return func(*args, **kwargs)


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # there is none for meta tensors
    monkeypatch.setattr(source._Raw, "pinned", lambda raw, device: raw)
    monkeypatch.setattr(genesis, "_uniform", lambda shape, dtype, device, seed: torch.empty(shape, device=device))
    return NoWait()


class Labelled(ToyReader):
    def read(self, rows):
        images, _ = super().read(rows)
        return images, torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)


def test_a_batch_is_made_on_the_device_without_waiting(no_wait):
    views = ViewsConfig(n_views=2, augment=POLICY)
    batches = BatchSource(ToySampler(), Labelled(), views, seed=0, device="meta")
    with no_wait:
        batch = batches.batch(0)
    assert {v.device.type for v in (*batch.views, *batch.items.values(), batch.labels["label_map"])} == {"meta"}
    assert batch.labels["label_map"].shape == (6, 8, 8)
    assert no_wait.copies > 10


def test_losses_do_not_wait(no_wait):
    z, f = torch.empty(6, 3, 4, device="meta"), torch.empty(6, 2, 8, 8, device="meta")
    codes = torch.arange(6)
    corners = region_corners((8, 8))
    with no_wait:
        nt_xent(z[:, 0], z[:, 1])
        global_contrastive(z, codes // 2, codes, strategy="gd")
        for negatives in (None, nearest_negatives(corners, 3)):
            local_contrastive(f, f, corners, negatives=negatives, strategy="ld", partition=codes // 2, volume=codes)


CASES = {
    "simclr": {},
    "gcl": {"strategy": "gd"},
    "lcl": {"strategy": "ld", "regions": "random", "freeze_encoder": False},
    "segmentation": {"n_classes": 3, "mixup": {}},
    "models_genesis": {"shuffle_windows": 40},
    "hierarchical_grouping": {"hidden_dim": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_method_does_not_wait(no_wait, name):
    entry = (METHODS | TASKS)[name]
    config = entry.config(name=name, **CASES[name])
    encoder = build_encoder(ENCODERS["unet2d"].config(widths=(4, 4, 4), norm="batch"), (1, 32, 32))
    parts = ModelParts(encoder, build_decoder(encoder) if config.needs().decoder else None, (1, 32, 32))
    method = entry.build(config, parts).to("meta")
    method._looked = True  # models_genesis looks at its first batch
    codes = torch.arange(6)
    names = ("row", "subject", "volume", "partition", "position", "slot")
    batch = ViewBatch(
        tuple(torch.zeros(6, 1, 32, 32) for _ in range(3)), (None,) * 3, dict.fromkeys(names, codes),
        {"label_map": torch.zeros(6, 32, 32, dtype=torch.int64), "region_heights": torch.zeros(6, 1600)},
    ).to("meta")  # fmt: skip
    with no_wait:
        loss = method.training_loss(batch).loss
        loss.backward()
    assert loss.shape == ()


@pytest.mark.parametrize("spatial", [(9, 7), (9, 7, 5)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_label_maps_moved_at_once_equal_those_moved_one_by_one(spatial, padding):
    """The way of an accelerator, run on a CPU."""
    from medssl.transforms.augment import draw
    from medssl.transforms.resampling import _nearest, voxels_from_theta

    labels = torch.randint(0, 4, (5, *spatial), generator=torch.Generator().manual_seed(0))
    labels[2] = -1
    config = AugmentConfig(crop_resize=CropResize(), flip=Flip(), affine=Affine(probability=0.6, padding=padding))
    params = draw(config, spatial, seed=0, step=0, slots=range(5), view=0)
    assert params.rotated.any()
    assert not params.rotated.all()
    one_by_one = resample_labels(labels, params.theta, spatial, padding, ~params.rotated)
    at_once = _nearest(labels, *voxels_from_theta(params.theta, spatial, spatial), spatial, padding == "border")
    assert torch.equal(one_by_one, at_once)
