import json
import os
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from medssl.core.errors import WeightsError
from medssl.models import (
    ClusterHeads,
    ProjectionHead,
    build_decoder,
    build_encoder,
    clusters_from_weights,
    encoder_from_weights,
    head_from_weights,
    load_weights,
    save_weights,
)
from medssl.models.encoders import UNet2dConfig, UNet3dConfig


def encoder(channels: int = 1, seed: int = 0, **settings):
    config = UNet2dConfig(**{"widths": (4, 6, 8), "norm": "batch", **settings})
    return build_encoder(config, (channels, 16, 16), seed=seed)


def same(a, b) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_what_is_saved_comes_back_and_can_be_rebuilt_from_the_folder(tmp_path):
    trained = encoder(seed=1)
    trained(torch.randn(4, 1, 16, 16))  # moves the running statistics
    save_weights(tmp_path / "weights", trained, info={"method": "gcl"})
    fresh = encoder(seed=2)
    report = load_weights(fresh, tmp_path)  # the run folder
    assert same(fresh, trained)
    assert len(report.matched) == len(trained.state_dict())
    assert not report.skipped
    assert not report.missing
    assert same(encoder_from_weights(tmp_path / "weights"), trained)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["encoder.safetensors", "model.json"]


def test_model_json_holds_no_paths(tmp_path):
    save_weights(tmp_path, encoder(), info={"step": 3})
    text = (tmp_path / "model.json").read_text()
    assert str(tmp_path) not in text
    assert os.sep + "home" not in text
    assert json.loads(text)["info"] == {"step": 3}


def test_input_channels_are_adapted_so_that_a_repeated_image_gives_the_same_response(tmp_path):
    trained = encoder(channels=2, seed=1)
    save_weights(tmp_path, trained)
    fresh = encoder(channels=3, seed=2)
    report = load_weights(fresh, tmp_path)
    assert report.adapted == ("levels.0.0.conv.weight",)
    x = torch.randn(2, 1, 16, 16)
    assert_close(fresh.eval()(x.expand(-1, 3, -1, -1)), trained.eval()(x.expand(-1, 2, -1, -1)), atol=1e-5, rtol=1e-4)


def test_a_decoder_of_few_blocks_loads_into_a_complete_one(tmp_path):
    trained = encoder()
    few = build_decoder(trained, blocks=1, seed=5)
    save_weights(tmp_path, trained, few)
    many = build_decoder(trained, seed=6)
    report = load_weights(many, tmp_path, part="decoder")
    assert all(torch.equal(value, many.state_dict()[name]) for name, value in few.state_dict().items())
    assert report.missing
    assert all(name.startswith("blocks.1.") for name in report.missing)


def test_another_architecture_is_refused_by_name_and_leaves_the_model_alone(tmp_path):
    volume = build_encoder(UNet3dConfig(widths=(4, 6, 8), norm="group"), (1, 16, 16, 16))
    save_weights(tmp_path, volume)
    model, before = encoder(), encoder()
    with pytest.raises(WeightsError, match="weights of another architecture") as caught:
        load_weights(model, tmp_path)
    assert "unet3d widths [4, 6, 8] norm group" in str(caught.value)
    assert "unet2d widths [4, 6, 8] norm batch" in str(caught.value)
    assert same(model, before)
    assert load_weights(model, tmp_path, allow_partial=True).matched  # scale and shift of the norms fit


def test_one_flipped_byte_anywhere_is_found(tmp_path):
    save_weights(tmp_path, encoder())
    file = tmp_path / "encoder.safetensors"
    data = file.read_bytes()
    for place in range(0, len(data), max(len(data) // 40, 1)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(WeightsError, match="checksum"):
            load_weights(encoder(), tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b'{"format": 1}', b'{"format": 99, "sha256": {}, "encoder": {}}']
)
def test_a_damaged_description_is_refused(tmp_path, damage):
    save_weights(tmp_path, encoder())
    (tmp_path / "model.json").write_bytes(damage)
    with pytest.raises(WeightsError, match=r"damaged|newer"):
        load_weights(encoder(), tmp_path)


class Canary:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["CANARY"]),))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
def test_a_poisoned_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    file = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "bad": Canary()}, file)
    with pytest.raises(WeightsError, match="not a readable weights file"):
        load_weights(encoder(), file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_of_other_programs_load_or_are_refused_but_never_crash(tmp_path, suffix):
    trained = encoder()
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), whole)
    else:
        save_weights(tmp_path, trained)
        (tmp_path / "model.json").unlink()
        (tmp_path / "encoder.safetensors").rename(whole)
    data, rng, refused = whole.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randrange(1, 6)):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 1500))] = rng.randrange(256)
        (tmp_path / f"damaged{suffix}").write_bytes(damaged)
        try:
            load_weights(encoder(), tmp_path / f"damaged{suffix}")
        except WeightsError:
            refused += 1
    assert refused > 100


def test_nothing_that_fits_is_refused_even_when_part_of_it_would_do(tmp_path):
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="0 of"):
        load_weights(encoder(), tmp_path / "other.pt", allow_partial=True)


def test_a_state_dict_of_another_program_loads_under_its_prefix(tmp_path):
    trained = encoder(seed=1)
    state = {f"module.encoder.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state | {"module.head.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    fresh = encoder(seed=2)
    assert load_weights(fresh, tmp_path / "other.pt").skipped == ("module.head.weight",)
    assert same(fresh, trained)


def test_values_that_are_not_finite_and_missing_files_are_refused(tmp_path):
    broken = encoder()
    broken.levels[0][0].conv.weight.data[0] = torch.nan
    save_weights(tmp_path, broken)
    with pytest.raises(WeightsError, match="not finite"):
        load_weights(encoder(), tmp_path)
    with pytest.raises(WeightsError, match="no weights of the decoder"):
        load_weights(encoder(), tmp_path, part="decoder")


def test_other_strides_than_the_weights_were_trained_with_are_reported(tmp_path, caplog):
    save_weights(tmp_path, encoder(strides=((2, 2), (2, 2))))
    load_weights(encoder(strides=((2, 2), (1, 2))), tmp_path)
    assert "trained with strides" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"norm": "batch", "n_hidden": 2, "bias": False}], ids=str)
def test_the_projection_head_is_kept_beside_the_encoder(tmp_path, settings):
    head = ProjectionHead(8, 5, 3, **settings)
    with torch.no_grad():
        head(torch.randn(4, 8))  # moves running statistics
    save_weights(tmp_path / "weights", encoder(), head=head)
    again = head_from_weights(tmp_path)
    assert same(again, head)
    h = torch.randn(6, 8)
    assert_close(again.eval()(h), head.eval()(h))

    damaged = bytearray((tmp_path / "weights" / "head.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "weights" / "head.safetensors").write_bytes(damaged)
    with pytest.raises(WeightsError, match="checksum"):
        head_from_weights(tmp_path)

    save_weights(tmp_path / "weights", encoder())
    assert head_from_weights(tmp_path) is None
    assert not (tmp_path / "weights" / "head.safetensors").exists()


def test_weights_from_before_heads_were_kept_have_none(tmp_path):
    save_weights(tmp_path, encoder())
    description = json.loads((tmp_path / "model.json").read_text())
    del description["head"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    assert head_from_weights(tmp_path) is None


def test_a_head_of_an_unknown_kind_is_refused(tmp_path):
    save_weights(tmp_path, encoder(), head=ProjectionHead(8, 5, 3))
    description = json.loads((tmp_path / "model.json").read_text())
    description["head"]["kind"] = "of tomorrow"
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(WeightsError, match="unknown kind"):
        head_from_weights(tmp_path)


def test_cluster_heads_come_back_and_go_when_there_are_none(tmp_path):
    torch.manual_seed(0)
    heads = ClusterHeads(4, 2, 3, 7)
    save_weights(tmp_path, encoder(), clusters=heads)
    again = clusters_from_weights(tmp_path)
    assert same(heads, again)
    assert again.n_clusters == {"main": 3, "over": 7}
    description = json.loads((tmp_path / "model.json").read_text())
    description["clusters"]["k_main"] = 4
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(WeightsError, match="too few of the tensors fit"):
        clusters_from_weights(tmp_path)
    del description["clusters"]["k_main"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(WeightsError, match="incomplete"):
        clusters_from_weights(tmp_path)
    save_weights(tmp_path, encoder())
    assert clusters_from_weights(tmp_path) is None
    assert not (tmp_path / "clusters.safetensors").exists()
