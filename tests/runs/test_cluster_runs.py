"""Clusters of a run from end to end: followed, exported, and learnt by another network from the exported table."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
from small_runs import pretrain_values, small_cohort

from medssl.config import PretrainConfig
from medssl.core.errors import ConfigError, DataError, Interrupted
from medssl.core.schema import validate
from medssl.core.types import ItemTable
from medssl.data.manifest import read_manifest
from medssl.runs.clusters import LABELS, LOG
from medssl.runs.item_labels import read_item_labels
from medssl.runs.pretrain import pretrain
from medssl.runs.volumes import pretraining_manifests

COLUMNS = ["partition", "subject", "site"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters")
    small_cohort(folder / "data")
    return folder


def clustering(root, name, **changes):
    values = pretrain_values(root / "data/manifest.csv", root, name=name)
    values |= {
        "views": {"preset": "simclr", "n_views": 1},
        "method": {"name": "deepcluster", "n_clusters": 4},
        "sampler": {"name": "cluster_balanced", "batch_size": 8},
        "cluster_columns": COLUMNS,
        "training": {"steps": 8, "accelerator": "cpu", "log_every": 1, "checkpoint_every": 1},
    }
    return validate(PretrainConfig, {**values, **changes}, source=name)


@pytest.fixture(scope="module")
def done(root):
    return pretrain(clustering(root, "whole"))


def test_clusters_are_compared_after_every_refresh_and_at_the_end(root, done):
    log = pd.read_csv(done.folder / LOG)
    assert sorted(set(log["step"])) == [0, 3, 6, 8]  # 30 items in batches of 8: 3 steps an epoch
    assert log.groupby("step")["column"].apply(list).map(sorted).tolist() == [sorted(COLUMNS)] * 4
    assert (log["n"] == 24).all()  # six people, two partitions of two of the five slices
    summary = json.loads((done.folder / "eval/pretrain.json").read_text())["clusters"]
    assert [row["column"] for row in summary] == COLUMNS
    last = log[log["step"] == 8].set_index("column")
    assert summary[1]["ami"] == pytest.approx(last.loc["subject", "ami"])
    assert 'id="clusters"' in done.report.read_text()


def test_the_exported_table_names_every_item_and_its_cluster(root, done):
    table = pd.read_csv(done.weights / LABELS)
    assert list(table) == ["case", "subject", "volume", "position", "cluster0"]
    assert len(table) == 24
    assert not table.duplicated(["case", "position"]).any()
    assert set(table["cluster0"]) <= {0, 1, 2, 3}
    manifest = read_manifest(root / "data/manifest.csv").table.set_index("volume")
    assert (manifest.loc[table["volume"], "case"].to_numpy() == table["case"]).all()
    assert set(manifest.loc[table["volume"], "split"]) == {"train"}


def test_a_run_that_was_stopped_goes_on_with_its_clusters(root, done, monkeypatch):
    from medssl.training import checkpoint

    save = checkpoint.Checkpoints.save

    def stop_after_four(self, step, *arguments):
        save(self, step, *arguments)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", stop_after_four)
    with pytest.raises(Interrupted):
        pretrain(clustering(root, "cut"))
    monkeypatch.undo()
    resumed = pretrain(clustering(root, "cut"), resume=True)
    for name in (LOG, f"weights/{LABELS}", "weights/encoder.safetensors"):
        assert (resumed.folder / name).read_bytes() == (done.folder / name).read_bytes(), name


def test_another_network_is_trained_on_the_exported_labels(root, done):
    changes = {
        "model": {"encoder": {"name": "resnet18_2d"}},
        "method": {"name": "supervised", "target": "cluster0", "loss": "cross_entropy"},
        "sampler": {"name": "random", "batch_size": 8},
        "cluster_columns": [],
        "training": {"steps": 1, "accelerator": "cpu"},
    }
    data = pretrain_values(root / "data/manifest.csv", root)["data"] | {"item_labels": str(done.weights / LABELS)}
    learnt = pretrain(clustering(root, "learnt", data=data, **changes))
    assert learnt.summary["clusters"] == []
    assert not (learnt.weights / LABELS).exists()
    n = len(np.unique(pd.read_csv(done.weights / LABELS)["cluster0"]))
    # Of the network that made the labels everything is known that it was trained on.
    assert len(pretraining_manifests(learnt.folder)) == 2
    config = clustering(root, "wrong", data=data, **{**changes, "method": {**changes["method"], "n_classes": n + 1}})
    with pytest.raises(ConfigError, match="another number of values"):
        pretrain(config)
    config = clustering(root, "lacking", data=data, **{**changes, "items": {"geometry": "slice"}})
    with pytest.raises(DataError, match="no row for 6 of the 30 items") as caught:  # the slices of no partition
        pretrain(config)
    assert "heart" in str(caught.value)
    assert "slice 4" in str(caught.value)


def test_labels_of_a_network_that_saw_test_people_are_refused(root, done):
    manifest = root / "data/other.csv"
    table = pd.read_csv(root / "data/manifest.csv")
    table["split"] = np.where(table["split"] == "test", "train", "test")
    table.to_csv(manifest, index=False)
    data = pretrain_values(manifest, root)["data"] | {"item_labels": str(done.weights / LABELS)}
    everyone = pd.read_csv(done.weights / LABELS, dtype={"case": str})
    others = [everyone.assign(case=case) for case in table["subject"].unique()]
    enough = done.weights / "more.csv"
    labels = pd.concat(others).drop_duplicates(["case", "position"])
    labels.assign(cluster0=np.arange(len(labels)) % 2).to_csv(enough, index=False)  # never all the same
    for where, refused in ((enough, True), (root / "more.csv", False)):
        where.write_bytes(enough.read_bytes())
        config = clustering(
            root,
            f"leak-{refused}",
            data={**data, "item_labels": str(where)},
            sampler={"name": "random", "batch_size": 8},
            method={"name": "supervised", "target": "cluster0", "loss": "cross_entropy"},
            cluster_columns=[],
            training={"steps": 1, "accelerator": "cpu"},
        )
        if refused:
            with pytest.raises(DataError, match="behind the item labels"):
                pretrain(config)
        else:
            pretrain(config)


def items(n=4):
    column = np.arange(n, dtype=np.int64)
    return ItemTable(column + 9, column // 2, column // 2, np.full(n, -1), column % 2, labels={"age": column * 1.0})


@pytest.fixture
def rows(root):
    manifest = read_manifest(root / "data/manifest.csv")
    return manifest.select(np.arange(len(manifest)) < 2)


def write(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


CASES = ["heart001", "heart001", "heart002", "heart002"]


def test_labels_are_joined_by_case_and_position_whatever_their_order(tmp_path, rows):
    path = write(tmp_path / "t.csv", kind=["d", "a", "b", "a"], position=[1, 0, 0, 1], case=CASES[::-1], k=[4, 3, 2, 1])
    table = read_item_labels(path, rows, geometry="slice").join(items(), rows)
    assert table.labels["k"].tolist() == [2.0, 1.0, 3.0, 4.0]
    assert table.labels["kind"].tolist() == [1, 0, 0, 2]
    assert table.labels["age"].tolist() == [0, 1, 2, 3]
    whole = write(tmp_path / "v.csv", case=["heart002", "heart001", "other"], k=[5, None, 7])
    one = read_item_labels(whole, rows, geometry="volume").join(items().select(np.array([0, 2])), rows)
    assert one.labels["k"].tolist() == pytest.approx([np.nan, 5.0], nan_ok=True)


@pytest.mark.parametrize(
    ("columns", "geometry", "message"),
    [
        ({"subject": CASES, "position": [0, 1, 0, 1], "k": 1}, "slice", "lacks the column `case`"),
        ({"case": CASES, "k": [1, 2, 3, 4]}, "slice", "lacks the column `position`"),
        ({"case": CASES, "position": [0, 1, 0, 1], "volume": 0}, "slice", "holds no labels"),
        ({"case": CASES, "position": [0, 1, 0, 0], "k": 1}, "slice", "several rows of one item"),
        ({"case": CASES, "position": [0, 1, 0, 1], "k": 1}, "volume", "it is one of slices"),
        ({"case": CASES, "position": [0, 1, 0, 1.5], "k": 1}, "slice", "whole numbers"),
        ({"case": CASES, "position": [0, 1, 0, 1], "site": "A"}, "slice", "of these names already: site"),
        ({"case": ["heart001", "x"], "k": [1, 2]}, "volume", "no row for 1 of the 2 volumes"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_prepared(tmp_path, rows, columns, geometry, message):
    with pytest.raises(DataError, match=message):
        read_item_labels(write(tmp_path / "t.csv", **columns), rows, geometry=geometry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster_columns": ["sites"]}, "Did you mean `site`"),
        ({"items": {"geometry": "slice"}, "cluster_columns": ["partition"]}, "lie in no partition"),
        ({"sampler": {"name": "cluster_balanced", "batch_size": 8, "head": 1}}, "no such head"),
    ],
)
def test_clusters_that_cannot_be_followed_are_refused_before_training(root, changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(clustering(root, f"refused-{len(message)}", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster_columns": ["site"]}, "cluster_columns: method `simclr` has no clusters"),
        ({"sampler": {"name": "cluster_balanced"}}, "which method `simclr` does not store"),
    ],
)
def test_a_method_without_clusters_is_told_so(root, changes, message):
    values = {"method": {"name": "simclr"}, "views": {"preset": "simclr", "n_views": 2}, "cluster_columns": []}
    random = {"sampler": {"name": "random", "batch_size": 8}}
    with pytest.raises(ConfigError, match=message):
        clustering(root, "none", **{**values, **random, **changes})
