"""Pretraining on feature tables and `medssl embed`: prepared as for the pretraining, guarded, one row a person."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import ENCODER, pretrain_values, small_cohort
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import PretrainConfig, load_any
from medssl.core.errors import ConfigError, DataError, InputError, WeightsError
from medssl.core.schema import validate
from medssl.data.features import read_features
from medssl.data.manifest import read_manifest
from medssl.inference.predict import slab_centres
from medssl.models import encoder_from_weights
from medssl.models.weights import head_from_weights
from medssl.runs import cohort
from medssl.runs.embed import embed, embed_rows, layers, open_for_weights
from medssl.runs.init import write_config
from medssl.runs.pretrain import pretrain
from medssl.runs.volumes import weights_statistics

N, N_TEST, FEATURES = 40, 10, 7


def people(folder, seed=0):
    """A table of 40 people of two sites; one feature is large, one constant, one copies the age."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, N)
    frame = pd.DataFrame(
        {"participant_id": [f"p{seed}{i:02d}" for i in range(N)], "age": age, "site": ["A", "B"] * (N // 2)}
    )
    for k in range(FEATURES - 3):
        frame[f"thickness_{k}"] = 2.5 - 0.01 * age + rng.normal(0, 0.1, N)
    frame["icv"] = rng.normal(1.5e6, 1e5, N)
    frame["constant"] = 0.1
    frame["noise"] = rng.normal(0, 1, N)
    frame.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def scan(table, **options):
    out = table.with_name("manifest.csv")
    cohort.scan(table, out, kind="table", options=options, force=True)
    cohort.split(out, test=N_TEST, validation=0, seed=0, stratify=("site",), mapping={}, out=None, force=True)
    return out


def config(manifest, root, **changes):
    values = {
        "name": "rows",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest), "cache": str(root / "cache")},
        "items": {"geometry": "features"},
        "model": {"encoder": {"name": "mlp", "widths": [8, 6]}},
        "views": {"preset": "features"},
        "method": {"name": "simclr", "projection_dim": 4},
        "sampler": {"name": "random", "batch_size": 16},
        "training": {"steps": 5, "accelerator": "cpu", "workers": 0},
        **changes,
    }
    return validate(PretrainConfig, values, source="test")


@pytest.fixture(scope="module")
def rows_run(tmp_path_factory):
    """A finished pretraining on a table; (run folder, manifest, table)."""
    root = tmp_path_factory.mktemp("rows")
    table = people(root)
    manifest = scan(table)
    done = pretrain(config(manifest, root))
    return done.folder, manifest, table


# Feature tables -------------------------------------------------------------------------------------------------------


def test_rows_are_embedded_as_the_weights_and_the_training_rows_say(rows_run, tmp_path):
    run, manifest, table = rows_run
    out = tmp_path / "e.parquet"
    done = embed(run, manifest, out, layer="h")
    written = read_features(out)
    assert (done.n_rows, done.n_columns) == written.values.shape == (N, 6)
    loaded = read_manifest(manifest).table
    train = (loaded["split"] == "train").to_numpy()
    raw = read_features(table)
    rows = raw.values.astype(np.float64)
    mean, sd = rows[train].mean(axis=0), rows[train].std(axis=0)
    constant = raw.names.index("constant")
    scaled = (rows - mean) / np.where(sd > 1e-9, sd, 1)
    scaled[:, constant] = 0
    with torch.no_grad():
        expected = encoder_from_weights(run)(torch.from_numpy(scaled.astype(np.float32)))
    np.testing.assert_allclose(written.values, expected.numpy(), atol=1e-5)
    keys = written.keys
    assert list(keys["subject"]) == list(loaded["subject"])
    assert list(keys["pretrained_on"]) == list(train)
    assert done.n_pretrained_on == N - N_TEST
    np.testing.assert_allclose(keys["age"], loaded["age"])
    about = json.loads((tmp_path / "e.parquet.json").read_text())
    assert about["layer"] == "h"
    assert (
        about["weights"]["encoder.safetensors"]
        == json.loads((run / "weights/model.json").read_text())["sha256"]["encoder.safetensors"]
    )
    assert about["folder"] == str(run.resolve())
    assert about["features"] == list(weights_statistics(run).names)
    assert about["pretrained_on"] == json.loads((run / "weights/model.json").read_text())["info"]["pretrained_on"]
    assert weights_statistics(run).n_rows == N - N_TEST


def test_every_layer_can_be_embedded_and_z_only_with_a_head(rows_run, tmp_path):
    run, manifest, _ = rows_run
    encoder, head = encoder_from_weights(run), head_from_weights(run)
    _, _, reader = open_for_weights(run, manifest)
    assert head is not None
    assert layers(encoder, head) == ("z", "h", "block0", "block1")
    h, z, block = (embed_rows(encoder, head, reader, layer=name) for name in ("h", "z", "block1"))
    np.testing.assert_array_equal(block, h)  # the last layer of an mlp is its output
    head.eval()
    np.testing.assert_allclose(z, head(torch.from_numpy(h)).detach().numpy(), atol=1e-6)
    chosen = embed_rows(encoder, head, reader, [9, 4], batch_size=1)
    np.testing.assert_allclose(chosen, z[[9, 4]], atol=1e-6)
    without = tmp_path / "copy"
    shutil.copytree(run, without)
    model = json.loads((without / "weights/model.json").read_text())
    (without / "weights/model.json").write_text(json.dumps({**model, "head": None}))
    assert embed(without, manifest, tmp_path / "h.csv").layer == "h"
    for layer in ("z", "block7", "H"):
        with pytest.raises(ConfigError, match="there is no layer") as caught:
            embed(without, manifest, tmp_path / "z.csv", layer=layer)
        assert "h, block0, block1" in caught.value.fix
    assert not (tmp_path / "z.csv").exists()


def test_reordered_columns_give_the_same_and_other_columns_are_named(rows_run, tmp_path):
    run, manifest, table = rows_run
    embed(run, manifest, tmp_path / "e.csv", layer="h")
    frame = pd.read_csv(table)
    for name, changed in (
        ("reordered", frame.iloc[:, ::-1].assign(more=1.5)),
        ("renamed", frame.rename(columns={"icv": "eTIV"})),
    ):
        (tmp_path / name).mkdir()
        changed.to_csv(tmp_path / name / "table.csv", index=False)
        scan(tmp_path / name / "table.csv")
    embed(run, tmp_path / "reordered/manifest.csv", tmp_path / "r.csv", layer="h")
    np.testing.assert_array_equal(read_features(tmp_path / "r.csv").values, read_features(tmp_path / "e.csv").values)
    with pytest.raises(DataError, match="columns of a feature table") as caught:
        embed(run, tmp_path / "renamed/manifest.csv", tmp_path / "n.csv")
    assert "missing: icv" in caught.value.found
    assert "eTIV" in caught.value.found


def test_a_split_is_embedded_alone_and_nothing_is_overwritten(rows_run, tmp_path):
    run, manifest, _ = rows_run
    out = tmp_path / "e.npy"
    done = embed(run, manifest, out, splits=("test",))
    assert (done.n_rows, done.n_pretrained_on) == (N_TEST, 0)
    ids = read_features(out).keys
    assert set(ids["split"]) == {"test"}
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        embed(run, manifest, out)
    assert out.read_bytes() == before
    assert embed(run, manifest, out, force=True).n_rows == N == len(read_features(out))
    with pytest.raises(DataError, match="no volume has the split"):
        embed(run, manifest, tmp_path / "x.csv", splits=("validation",))
    with pytest.raises(ConfigError, match="overwrite the manifest"):
        embed(run, manifest, manifest, force=True)
    with pytest.raises(ConfigError, match=r"\.parquet, \.csv or \.npy"):
        embed(run, manifest, tmp_path / "e.xlsx")


def test_weights_away_from_their_run_folder_need_the_configuration(rows_run, tmp_path):
    run, manifest, _ = rows_run
    alone = tmp_path / "elsewhere" / "w"
    shutil.copytree(run / "weights", alone)
    with pytest.raises(ConfigError, match="no run folder") as caught:
        embed(alone, manifest, tmp_path / "e.csv")
    assert "--config" in caught.value.fix
    embed(alone, manifest, tmp_path / "e.csv", config=run / "config.yaml")
    embed(run / "weights", manifest, tmp_path / "w.csv")
    np.testing.assert_array_equal(read_features(tmp_path / "e.csv").values, read_features(tmp_path / "w.csv").values)
    (alone / "features.json").unlink()
    with pytest.raises(WeightsError, match=r"features\.json"):
        embed(alone, manifest, tmp_path / "x.csv", config=run / "config.yaml")


def test_embeddings_that_are_not_finite_are_refused(rows_run):
    run, manifest, _ = rows_run
    encoder = encoder_from_weights(run)
    with torch.no_grad():
        encoder.levels[0].linear.bias[:] = 3e38
    _, _, reader = open_for_weights(run, manifest)
    with pytest.raises(InputError, match="not finite") as caught:
        embed_rows(encoder, None, reader, layer="h")
    assert caught.value.where == "p000"


def test_a_row_of_the_test_split_under_another_name_is_refused(tmp_path):
    table = people(tmp_path)
    manifest = scan(table)
    loaded = read_manifest(manifest).table
    test, train = (loaded.index[loaded["split"] == name][0] for name in ("test", "train"))
    frame = pd.read_csv(table)
    features = list(frame.columns[3:])
    frame.loc[train, features] = frame.loc[test, features].to_numpy()
    frame.to_csv(table, index=False)
    with pytest.raises(DataError, match="leak into each other") as caught:
        pretrain(config(manifest, tmp_path))
    assert "identical image" in caught.value.found
    assert str(loaded["case"][train]) in caught.value.found
    assert not (tmp_path / "runs").exists()
    allowed = config(manifest, tmp_path, data={"manifest": str(manifest), "transductive": True})
    assert len(pretrain(allowed).summary["leaks_let_pass"]) == 1


def test_weights_that_saw_a_test_row_elsewhere_are_refused(rows_run, tmp_path):
    run, _, table = rows_run
    alone = tmp_path / "w"  # without the run's manifest, only the fingerprints tell
    shutil.copytree(run / "weights", alone)
    frame = pd.read_csv(table)
    frame["participant_id"] = [f"other{i}" for i in range(N)]
    frame["more"] = np.arange(N)  # a column that the weights do not know changes nothing
    frame.to_csv(tmp_path / "table.csv", index=False)
    manifest = scan(tmp_path / "table.csv")
    with pytest.raises(DataError, match="were pretrained on"):
        pretrain(config(manifest, tmp_path, weights=str(alone)))
    fresh = scan(people(tmp_path / "fresh", seed=1))
    done = pretrain(config(fresh, tmp_path, weights=str(alone)))
    # What the weights assume of their input goes on with them.
    assert weights_statistics(done.folder).n_rows == N - N_TEST
    np.testing.assert_array_equal(weights_statistics(done.folder).mean, weights_statistics(run).mean)


def test_sections_that_do_not_fit_feature_tables_are_refused(rows_run, tmp_path):
    _, manifest, _ = rows_run
    for changes, message in (
        ({"model": {"encoder": ENCODER}}, "gives rows of a table"),
        ({"items": {"geometry": "volume"}}, "`mlp` takes rows of features"),
        ({"items": {"geometry": "features", "partitions": 2}}, "no partition"),
        ({"views": {"preset": "simclr"}}, "no voxels to change"),
        ({"method": {"name": "gcl", "strategy": "gr"}}, "not defined for rows of a feature table"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(manifest, tmp_path, **changes)
    volumes = pretrain_values(manifest, tmp_path)
    with pytest.raises(DataError, match="rows of feature tables, not images"):
        pretrain(validate(PretrainConfig, volumes, source="test"))


def test_the_command_line_goes_from_a_table_to_embeddings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people(tmp_path)

    def run(*words, code=0):
        result = CliRunner().invoke(app, list(words), standalone_mode=True)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    run("data", "scan", "table.csv", "-o", "manifest.csv")
    assert "W-FEATURE-CONSTANT" in run("data", "check", "manifest.csv", "--deep")
    run("data", "split", "manifest.csv", "--test", "0.25", "--stratify", "site")
    assert "30 rows of 7 features" in run("init", "pretrain", "manifest.csv")
    written = load_any(tmp_path / "pretrain.yaml")
    assert (written.method.name, written.items.geometry) == ("y_aware", "features")
    assert "nothing to do" in run("data", "prepare", "pretrain.yaml")
    run(
        "pretrain", "pretrain.yaml", "--set", "training.steps=3", "--set", "training.accelerator=cpu", "--set", "name=r"
    )
    shown = json.loads(run("embed", "runs/r", "manifest.csv", "-o", "e.parquet", "--split", "test", "--json"))
    assert (shown["n_rows"], shown["n_pretrained_on"]) == (10, 0)
    assert isinstance(CliRunner().invoke(app, ["data", "show", "manifest.csv"]).exception, DataError)


def test_init_says_what_a_table_lacks(tmp_path):
    frame = pd.read_csv(people(tmp_path)).drop(columns="age")
    frame.loc[3, "noise"] = np.nan
    frame.to_csv(tmp_path / "table.csv", index=False)
    manifest = scan(tmp_path / "table.csv")
    write_config("pretrain", manifest, tmp_path / "c.yaml")
    written = load_any(tmp_path / "c.yaml")
    assert (written.method.name, written.data.features.impute) == ("simclr", "mean")
    with pytest.raises(DataError, match="neither `age` nor `diagnosis`"):
        write_config("finetune", manifest, tmp_path / "f.yaml")


# Images ---------------------------------------------------------------------------------------------------------------


def test_slices_are_averaged_and_prepared_as_for_the_pretraining(tmp_path):
    manifest = small_cohort(tmp_path / "data", n_subjects=4, n_test=1)
    values = pretrain_values(manifest, tmp_path)
    pretrained = pretrain(validate(PretrainConfig, values, source="test"))
    done = embed(pretrained.folder, manifest, tmp_path / "e.csv", layer="h")
    written = read_features(tmp_path / "e.csv")
    assert done.n_rows == len(read_manifest(manifest))
    _, opened, reader = open_for_weights(pretrained.folder, manifest)
    assert reader.config.partitions is None  # a volume with fewer slices than there were partitions can be embedded
    encoder = encoder_from_weights(pretrained.folder).eval()
    for volume, row in zip(opened.chosen.table["volume"], written.values):
        slices = torch.from_numpy(np.array(reader.store.image(volume))).movedim(3, 0)  # all 5, in no partition too
        assert slices.shape == (5, 1, 32, 32)
        with torch.no_grad():
            expected = encoder(slices).mean(dim=0)
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert not written.keys["pretrained_on"][written.keys["split"] == "test"].any()
    assert written.keys["pretrained_on"][written.keys["split"] == "train"].all()
    block = embed_rows(encoder, None, reader, [0], layer="block0")
    with torch.no_grad():
        maps = encoder.feature_maps(torch.from_numpy(np.array(reader.store.image(0))).movedim(3, 0))[0]
    np.testing.assert_allclose(block[0], maps.mean(dim=(0, 2, 3)).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "depth"), [(16, 16), (17, 16), (40, 16), (48, 16), (5, 16), (9, 4), (1, 3), (3, 3)])
def test_slabs_cover_a_volume_without_leaving_it(n, depth):
    starts = [centre - depth // 2 for centre in slab_centres(n, depth)]
    inside = [range(start, start + depth) for start in starts]
    assert set(range(n)) <= {position for slab in inside for position in slab}
    assert all(0 <= centre < n for centre in slab_centres(n, depth))
    assert len(starts) == max(1, -(-n // depth))
    if n >= depth:
        assert all(slab[0] >= 0 and slab[-1] < n for slab in inside)


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "n_features", "n_constant"), [("ixi", 72, 0), ("fcon1000", 218, 4)])
def test_real_tables_from_the_file_to_embeddings(real_data, tmp_path, name, n_features, n_constant):
    manifest = tmp_path / "manifest.csv"
    cohort.scan(real_data / f"brain-tables/{name}.csv", manifest, kind="table", options={}, force=False)
    assert cohort.check(manifest, deep=True, jobs=1, mapping={}, out=None).n_errors == 0
    cohort.split(manifest, test=0.2, validation=0, seed=0, stratify=("site",), mapping={}, out=None, force=False)
    done = pretrain(config(manifest, tmp_path, training={"steps": 3, "accelerator": "cpu", "workers": 0}))
    statistics = weights_statistics(done.folder)
    assert (len(statistics.names), len(statistics.constant) >= n_constant) == (n_features, True)
    embed(done.folder, manifest, tmp_path / "e.parquet", splits=("test",))
    written = read_features(tmp_path / "e.parquet")
    assert np.isfinite(written.values).all()
    assert (written.values.std(axis=0) > 0).any()
    assert not written.keys["pretrained_on"].any()


@pytest.mark.real_data
def test_real_oblique_volumes_of_several_grids_from_the_file_to_embeddings(real_data, tmp_path):
    manifest = real_data / "brain-t1-age/manifest.csv"
    values = pretrain_values(manifest, tmp_path, name="t1")
    values |= {
        "data": {
            "manifest": str(manifest),
            "map": {"session": "study"},
            "cache": str(tmp_path / "cache"),
            "prepare": {"spacing": [6, 6, 6], "size": [32, 32, 24]},
        },
        "items": {"geometry": "volume"},
        "model": {"encoder": {"name": "unet3d", "widths": [4, 8], "norm": "group"}},
        "views": {"preset": "simclr"},
        "method": {"name": "simclr", "projection_dim": 4},
        "sampler": {"name": "random", "batch_size": 4},
    }
    done = pretrain(validate(PretrainConfig, values, source="test"))
    written_to = tmp_path / "e.parquet"
    embed(done.folder, manifest, written_to, mapping={"session": "study"})
    written = read_features(written_to)
    assert len(written) == 8
    assert np.isfinite(written.values).all()
    assert list(written.keys["case"])[:2] == ["patient01_1", "patient01_2"]
    assert written.keys["pretrained_on"].all()
    assert written.keys["group"].nunique() == 6
