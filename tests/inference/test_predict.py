import json

import numpy as np
import pytest
import torch
from torch import nn

from medssl.core.errors import ConfigError, InputError, ShapeError
from medssl.data.store import CaseGeometry, VolumeStore
from medssl.inference import embed_volumes, predict_volume
from medssl.inference.predict import pad_to_multiple


class Counting(nn.Module):
    """A dense network that keeps the shapes it was given: 1 x 1 convolution, so every voxel stands alone."""

    def __init__(self, dims, channels=2, classes=3, stride=1):
        super().__init__()
        torch.manual_seed(0)
        self.layer = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, classes, 1)
        self.dropout = nn.Dropout(0.5)
        self.stride, self.seen = stride, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        assert all(length % self.stride == 0 for length in x.shape[2:])
        return self.dropout(self.layer(x))

    def expected(self, image):
        weight = self.layer.weight.detach().flatten(1)
        logits = torch.einsum("kc,cxyz->kxyz", weight, image) + self.layer.bias.detach()[:, None, None, None]
        return logits.softmax(0)


def image(shape=(13, 10, 7), channels=2):
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_slices_are_predicted_in_batches_and_put_back_in_place(slice_axis):
    network, volume = Counting(2, stride=4), image()
    result = predict_volume(network, volume, spatial_dims=2, slice_axis=slice_axis, batch_size=3, multiple=4)
    torch.testing.assert_close(result, network.expected(volume))
    n = volume.shape[slice_axis + 1]
    assert [shape[0] for shape in network.seen] == [3] * (n // 3) + ([n % 3] if n % 3 else [])
    assert result.is_contiguous()


def test_a_volume_goes_in_one_pass_when_it_fits_and_in_windows_when_not():
    for window, passes in ((None, 1), ((16, 16, 8), 1), ((8, 8, 4), 36)):
        network, volume = Counting(3, stride=4), image()
        result = predict_volume(network, volume, spatial_dims=3, window=window, multiple=4, batch_size=1, overlap=0.5)
        torch.testing.assert_close(result, network.expected(volume), atol=1e-5, rtol=1e-4)
        if passes == 1:
            assert network.seen == [(1, 2, 16, 12, 8)]
        else:
            assert {shape[2:] for shape in network.seen} == {(8, 8, 4)}
            assert len(network.seen) > 1


def test_windows_of_slices_agree_with_whole_slices():
    network, volume = Counting(2), image((20, 18, 5))
    result = predict_volume(network, volume, spatial_dims=2, window=(8, 8), batch_size=2)
    torch.testing.assert_close(result, network.expected(volume), atol=1e-5, rtol=1e-4)


def test_logits_are_given_on_request_and_arrays_are_accepted():
    network, volume = Counting(3), image()
    logits = predict_volume(network, volume.numpy(), spatial_dims=3, softmax=False)
    torch.testing.assert_close(logits.softmax(0), network.expected(volume))
    assert logits.min() < 0


def test_the_network_is_in_evaluation_mode_only_during_the_call():
    network = Counting(3)
    network.layer.eval()
    first = predict_volume(network, image(), spatial_dims=3)
    torch.testing.assert_close(first, predict_volume(network, image(), spatial_dims=3), rtol=0, atol=0)
    assert network.training
    assert network.dropout.training
    assert not network.layer.training
    assert not first.requires_grad
    first.add_(1)  # an ordinary tensor, that callers may change


def test_a_network_that_changes_the_grid_is_refused():
    with pytest.raises(ShapeError, match="multiple"):
        predict_volume(nn.Conv3d(2, 3, 2, stride=2), image(), spatial_dims=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (4, 4)}, "impossible window"),
        ({"window": (0, 4, 4)}, "impossible window"),
        ({"window": (4, 4, 4), "overlap": 1.0}, "impossible window"),
        ({"multiple": (2, 2)}, "multiple"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        predict_volume(Counting(3), image(), spatial_dims=3, **settings)


def test_too_little_memory_says_what_to_change():
    class Hungry(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    with pytest.raises(ConfigError, match="set a window"):
        predict_volume(Hungry(), image(), spatial_dims=3)


def test_padding_is_even_on_both_sides_with_background():
    batch = torch.ones(1, 1, 5, 8, 3)
    padded, start = pad_to_multiple(batch, (4, 4, 2))
    assert padded.shape == (1, 1, 8, 8, 4)
    assert start == (1, 0, 0)
    assert padded[0, 0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert padded[0, 0, 2, 0].tolist() == [1, 1, 1, 0]


@pytest.fixture
def store(tmp_path):
    """Two volumes of different size, written as the cache writes them."""
    rng, entries = np.random.default_rng(0), {}
    for volume, shape in {4: (6, 5, 3), 9: (7, 5, 4)}.items():
        entry = tmp_path / str(volume)
        entry.mkdir()
        array = rng.normal(size=(shape[2], 1, *shape[:2])).astype(np.float32)
        np.save(entry / "image.npy", array)
        geometry = CaseGeometry(np.eye(4), shape, np.eye(4), shape, 2)
        size = (entry / "image.npy").stat().st_size
        (entry / "geometry.json").write_text(json.dumps({**geometry.to_json(), "bytes": {"image": size}}))
        entries[volume] = entry
    return VolumeStore(entries, {4: "four", 9: "nine"})


class Mean(nn.Module):
    """Mean and mean square of what it sees."""

    def forward(self, x):
        return torch.stack([x.flatten(1).mean(1), x.flatten(1).square().mean(1)], dim=1)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_embeddings_of_volumes_are_in_the_order_asked_for(store, spatial_dims):
    result = embed_volumes(Mean(), store, [9, 4], spatial_dims=spatial_dims, batch_size=2)
    expected = [[store.image(v).mean(), np.square(store.image(v)).mean()] for v in (9, 4)]
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(embed_volumes(Mean(), store, spatial_dims=spatial_dims), result[::-1])


def test_an_embedding_that_is_not_finite_names_its_volume(store):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] / 0

    with pytest.raises(InputError, match="four"):
        embed_volumes(Broken(), store, spatial_dims=3)
