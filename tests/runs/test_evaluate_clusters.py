"""From a pretraining to scores of its clusters: the same numbers as by hand, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import SIZE, pretrain_values, small_cohort, write_yaml

from medssl.cli.main import main
from medssl.config import PretrainConfig, load_config
from medssl.core.errors import ConfigError, DataError, WeightsError
from medssl.evaluation import cluster_counts, match_clusters, score_clusters
from medssl.models import clusters_from_weights, encoder_from_weights
from medssl.runs.evaluate_clusters import evaluate_clusters
from medssl.runs.pretrain import pretrain

VGG = {"name": "vgg_2d", "widths": [4, 4, 8], "norm": "group", "padding": "replicate"}
FLIPS = {"n_views": 2, "augment": {"flip": {"axes": [0, 1]}, "affine": {"degrees": 20.0}, "noise": {}}}


def run_of(folder: Path, manifest: Path, name: str, **changes) -> Path:
    values = {
        "name": name,
        "items": {"geometry": "slice"},
        "model": {"encoder": VGG},
        "views": FLIPS,
        "method": {"name": "iic_segmentation", "on": "encoder", "k_main": 4, "k_over": 6},
        "sampler": {"name": "random", "batch_size": 6},
        **changes,
    }
    config = write_yaml(folder / f"{name}.yaml", pretrain_values(manifest, folder, **values))
    return pretrain(load_config(PretrainConfig, config)).folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clusters")
    manifest = small_cohort(folder / "data", n_subjects=5, n_test=2)
    return folder, manifest


@pytest.fixture(scope="module")
def vgg(made) -> Path:
    return run_of(*made, "vgg")


def by_hand(run: Path, volume: int, cohort) -> np.ndarray:
    """Main clusters of one volume, slice by slice, with nothing of the run but its networks."""
    encoder, heads = encoder_from_weights(run).eval(), clusters_from_weights(run)
    image = torch.from_numpy(np.array(cohort.store.image(volume)))  # (1, X, Y, Z)
    with torch.no_grad():
        logits = heads(encoder.feature_maps(image.movedim(3, 0))[-1])["main"]
        enlarged = torch.nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return enlarged.argmax(1).movedim(0, 2).numpy()


def test_scores_are_those_of_clusters_matched_on_the_training_people(vgg):
    from medssl.runs.embed import run_config
    from medssl.runs.volumes import open_run_cohort

    result = evaluate_clusters(vgg).fields
    cohort = open_run_cohort(run_config(vgg), splits=("train", "test"))
    n_classes = 1 + max(one.number for one in cohort.classes)
    counts = {}
    for split in ("train", "test"):
        volumes = [int(v) for v in cohort.rows((split,)).table["volume"]]
        tables = [
            cluster_counts(by_hand(vgg, v, cohort), np.asarray(cohort.store.label(v)), 4, n_classes) for v in volumes
        ]
        counts[split] = sum(tables)
    expected = score_clusters(counts["test"], match_clusters(counts["train"], "hungarian"))
    main_head = result["heads"]["main"]
    assert main_head["miou"] == pytest.approx(expected.miou)
    assert main_head["class_accuracy"] == pytest.approx(expected.class_accuracy)
    assert (result["fitted_on"]["n_people"], result["scored_on"]["n_people"]) == (3, 2)
    assert (main_head["k"], result["heads"]["over"]["k"], result["n_pretrained_on"]) == (4, 6, 0)
    assert main_head["invariance"]["n_places"] > 0
    assert main_head["other_people"]["n_places"] > 0
    # Padded with its own border, the network sees no border in a blank image.
    assert {check["n_clusters"] for check in main_head["blank"].values()} == {1}
    per_case = pd.read_csv(vgg / "eval" / "clusters_per_case.csv")
    assert len(per_case) == 2 * 2 * n_classes
    assert set(per_case["class"]) == set(result["classes"])
    with pytest.raises(ConfigError, match="evaluated here already"):
        evaluate_clusters(vgg)


@pytest.mark.parametrize("geometry", ["volume", "slab"])
def test_a_unet_in_3d_is_evaluated_on_its_decoder(made, geometry, capsys, monkeypatch):
    folder, manifest = made
    run = run_of(
        folder,
        manifest,
        geometry,
        items={"geometry": geometry, **({"depth": 4} if geometry == "slab" else {})},
        model={
            "encoder": {"name": "unet3d", "widths": [4, 4], "strides": [[2, 2, 1]], "norm": "group"},
            "decoder_blocks": 1,
        },
        method={"name": "iic_segmentation", "k_main": 3, "k_over": 5, "max_displacement": 1},
        sampler={"name": "random", "batch_size": 2},
    )
    assert (run / "weights" / "clusters.safetensors").is_file()
    arguments = ["medssl", "evaluate", "clusters", str(run), "--out", str(folder / geometry), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr().out
    assert (left.value.code or 0) == 0
    assert json.loads(shown)["heads"].keys() == {"main", "over"}
    assert json.loads((folder / geometry / "clusters.json").read_text())["scored_on"]["n_volumes"] == 2


def test_what_cannot_be_evaluated_is_refused_with_a_reason(made, vgg, tmp_path):
    folder, manifest = made
    with pytest.raises(ConfigError, match="that flatters"):
        evaluate_clusters(vgg, out=tmp_path, splits=("train",))
    with pytest.raises(DataError, match="no volume has the split"):
        evaluate_clusters(vgg, out=tmp_path, splits=("validation",))
    with pytest.raises(ConfigError, match="give it with --manifest"):
        evaluate_clusters(vgg, out=tmp_path, mapping={"group": "subject"})
    table = pd.read_csv(manifest)
    no_split, no_labels = manifest.with_name("plain.csv"), manifest.with_name("unlabelled.csv")
    table.drop(columns="split").to_csv(no_split, index=False)
    table.assign(label=table["label"].where(table["split"] != "test")).to_csv(no_labels, index=False)
    meta = manifest.with_name("manifest.meta.yaml")
    for other in (no_split, no_labels):
        other.with_name(f"{other.stem}.meta.yaml").write_bytes(meta.read_bytes())
    with pytest.raises(DataError, match="no split"):
        evaluate_clusters(vgg, manifest=no_split, out=tmp_path)
    with pytest.raises(DataError, match="no volume of test has a label"):
        evaluate_clusters(vgg, manifest=no_labels, out=tmp_path)
    other = run_of(
        folder,
        manifest,
        "simclr",
        method={"name": "simclr", "hidden_dim": 8, "projection_dim": 8},
        training={"steps": 1, "accelerator": "cpu"},
    )
    with pytest.raises(ConfigError, match="no clusters of places"):
        evaluate_clusters(other, out=tmp_path)
    (vgg / "weights" / "clusters.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="damaged"):
        evaluate_clusters(vgg, out=tmp_path)
