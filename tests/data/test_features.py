"""Feature tables: what is a feature, that values survive writing, standardising, opening by manifest, checking."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medssl.core.errors import DataError
from medssl.data.cohorts import discover_any
from medssl.data.feature_store import FeatureReader, fit_statistics, open_features
from medssl.data.features import (
    FeaturesConfig,
    FeatureStatistics,
    FeatureTable,
    numbered,
    read_features,
    write_features,
)
from medssl.data.integrity import check_manifest
from medssl.data.items import ItemsConfig, build_items
from medssl.data.manifest import Manifest, ManifestMeta, read_manifest, write_manifest

RNG = np.random.default_rng(0)


def table_file(folder, name="measures.csv", *, n=6, **columns):
    """A CSV of three people a site with two features, and further columns."""
    frame = pd.DataFrame(
        {
            "participant_id": [f"{i:03d}" for i in range(n)],
            "age": np.linspace(20, 70, n),
            "sex": [1, 2] * (n // 2),
            "site": ["A", "B"] * (n // 2),
            "lh_thickness": RNG.normal(2.5, 0.1, n),
            "volume_mm3": RNG.normal(1.2e6, 1e5, n),
            **columns,
        }
    )
    frame.to_csv(folder / name, index=False)
    return folder / name


def manifest_of(folder, rows, meta=None):
    write_manifest(pd.DataFrame(rows), meta or ManifestMeta(), folder / "manifest.csv")
    return read_manifest(folder / "manifest.csv")


def rows_of(file, n=6):
    return [{"subject": f"{i:03d}", "image": file.name, "frame": i} for i in range(n)]


# What is a feature ----------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_person_is_never_a_feature(tmp_path):
    file = table_file(
        tmp_path, Site=[7] * 6, scanner=[1] * 6, ok=[True] * 6, note=["x"] * 6, **{"Unnamed: 0": range(6)}
    )
    read = read_features(file)
    assert read.names == ("lh_thickness", "volume_mm3")
    assert read.values.dtype == np.float32
    assert list(read.keys["participant_id"]) == ["000", "001", "002", "003", "004", "005"]  # zeros in front survive
    assert {"age", "sex", "Site", "scanner", "ok", "note"} <= set(read.keys)
    assert read.keys["age"].dtype == float
    with pytest.raises(DataError, match="cannot be features") as caught:
        read_features(file, ["*"])
    assert "age" in caught.value.found


def test_a_person_called_na_and_missing_features_are_told_apart(tmp_path):
    (tmp_path / "t.csv").write_text("subject,site,a,b\nNA,,1,NA\nnull,NA,,2.5\n")
    read = read_features(tmp_path / "t.csv")
    assert list(read.keys["subject"]) == ["NA", "null"]
    assert list(read.keys["site"]) == [None, "NA"]
    np.testing.assert_array_equal(read.values, np.array([[1, np.nan], [np.nan, 2.5]], np.float32))


def test_globs_choose_features_in_the_order_of_the_file(tmp_path):
    file = table_file(tmp_path, rh_thickness=range(6), text=["a"] * 6)
    assert read_features(file, ["rh_*", "lh_*"]).names == ("lh_thickness", "rh_thickness")
    with pytest.raises(DataError, match="no column matches `mh_"):
        read_features(file, ["lh_*", "mh_*"])
    with pytest.raises(DataError, match="must be numbers") as caught:
        read_features(file, ["text", "lh_*"])
    assert "row 0, column text" in caught.value.where


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"subject,a,a\nx,1,2\n", "same name"),
        ("t.csv", b"", "empty"),
        ("t.csv", b"subject,a\n", "no features"),
        ("t.csv", b"subject;a\nx;1,5\n", "not separated by commas"),
        ("t.csv", b"subject,a\nx,\xff\xfe\n", "cannot be read"),
        ("t.csv", b"subject,name\nx,y\n", "no features"),
        ("t.parquet", b"PAR1 not really", "not a readable parquet"),
        ("t.npy", b"\x93NUMPY broken", "not a readable .npy"),
        ("t.xlsx", b"x", "not a table of features"),
    ],
)
def test_files_that_are_no_tables_say_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / name)


def test_arrays_are_rows_and_further_axes_are_flattened(tmp_path):
    regions = RNG.normal(size=(7, 68)).astype(np.float32)
    np.save(tmp_path / "one.npy", regions)
    np.save(tmp_path / "several.npy", np.stack([regions, regions + 1]))
    np.save(tmp_path / "objects.npy", np.array(["a"]))
    assert read_features(tmp_path / "one.npy").values.shape == (7, 68)
    alone = read_features(tmp_path / "one.npy", one_row=True)
    np.testing.assert_array_equal(alone.values, regions.reshape(1, -1))
    assert alone.names == numbered(476)
    assert alone.positional
    np.testing.assert_array_equal(read_features(tmp_path / "several.npy").values[1], regions.ravel() + 1)
    with pytest.raises(DataError, match="rows of numbers"):
        read_features(tmp_path / "objects.npy")


@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.floats(width=32, allow_infinity=False),
    )
)
def test_values_survive_writing(tmp_path_factory, values):
    keys = pd.DataFrame({"subject": [f"0{i}" for i in range(len(values))], "age": np.arange(len(values)) + 0.5})
    table = FeatureTable(numbered(values.shape[1]), values, keys)
    folder = tmp_path_factory.mktemp("written")
    for suffix in (".csv", ".parquet", ".npy"):
        if suffix == ".csv" and np.isnan(values).all(axis=0).any():
            continue  # a column without any value is not known to hold numbers
        back = read_features(write_features(table, folder / f"t{suffix}", about={"layer": "h"}))
        np.testing.assert_array_equal(back.values, values)
        assert back.names == table.names
        pd.testing.assert_frame_equal(back.keys, keys, check_dtype=False)
        assert (folder / f"t{suffix}.json").is_file()


# Statistics -----------------------------------------------------------------------------------------------------------


def test_standardising_takes_mean_and_deviation_and_leaves_constants_at_zero():
    values = np.stack([RNG.normal(1.2e6, 1e5, 50), np.full(50, 0.1), RNG.normal(2.5, 1e-3, 50)], axis=1)
    rows = values.astype(np.float32)
    statistics = FeatureStatistics.fit(("a", "b", "c"), rows, FeaturesConfig())
    made = statistics.apply(rows).astype(np.float64)
    np.testing.assert_allclose(made.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(made.std(axis=0), [1, 0, 1], atol=1e-6)
    assert statistics.constant == ("b",)
    # New rows move neither statistics nor a feature that was constant where it was learnt.
    np.testing.assert_array_equal(statistics.apply(rows[:1] + np.float32(7))[0, 1], 0)


def test_missing_features_take_the_mean_of_the_rows_trained_on():
    rows = np.array([[1, 10], [3, np.nan], [5, 30]], np.float32)
    statistics = FeatureStatistics.fit(("a", "b"), rows, FeaturesConfig(impute="mean", standardise=False))
    np.testing.assert_array_equal(statistics.apply(rows)[1], [3, 20])
    standardised = dataclasses.replace(statistics, standardise=True).apply(rows)
    assert standardised[1, 1] == 0
    with pytest.raises(DataError, match="without any value") as caught:
        FeatureStatistics.fit(("a", "b"), np.array([[1, np.nan], [2, np.nan]], np.float32), FeaturesConfig())
    assert caught.value.found == "b"
    with pytest.raises(DataError, match="every feature is constant"):
        FeatureStatistics.fit(("a",), np.ones((4, 1), np.float32), FeaturesConfig())


def test_statistics_keep_every_digit_on_disk_and_damage_is_noticed(tmp_path):
    statistics = FeatureStatistics.fit(("a", "b"), RNG.normal(size=(9, 2)).astype(np.float32), FeaturesConfig())
    file = statistics.save(tmp_path / "features.json")
    back = FeatureStatistics.load(file)
    rows = RNG.normal(size=(5, 2)).astype(np.float32)
    np.testing.assert_array_equal(back.apply(rows), statistics.apply(rows))
    for broken in (file.read_text().replace('"b"', '"b", "c"'), file.read_text()[:-20], "[]"):
        file.write_text(broken)
        with pytest.raises(DataError, match="cannot be read"):
            FeatureStatistics.load(file)


# Rows of a manifest ---------------------------------------------------------------------------------------------------


def test_rows_are_opened_in_the_order_of_the_manifest_and_of_the_names(tmp_path):
    file = table_file(tmp_path)
    whole = read_features(file)
    manifest = manifest_of(tmp_path, rows_of(file)[::-1])
    store = open_features(manifest, FeaturesConfig(), names=("volume_mm3", "lh_thickness"))
    np.testing.assert_array_equal(store.values, whole.values[::-1, ::-1])
    np.testing.assert_array_equal(store.rows([5, 0]), whole.values[[0, 5]][:, ::-1])
    assert store.case(0) == "005"  # the row of the table is not part of the name


def test_tables_of_other_columns_are_refused_and_reordered_ones_are_not(tmp_path):
    file = table_file(tmp_path)
    frame = pd.read_csv(file, dtype={"participant_id": str})
    frame.iloc[:3, ::-1].to_csv(tmp_path / "reordered.csv", index=False)
    frame.iloc[3:].rename(columns={"volume_mm3": "volume_ml"}).to_csv(tmp_path / "renamed.csv", index=False)
    rows = rows_of(file)
    two = [{**row, "image": "reordered.csv"} if i < 3 else row for i, row in enumerate(rows)]
    np.testing.assert_array_equal(
        open_features(manifest_of(tmp_path, two[::-1]), FeaturesConfig()).values[::-1], read_features(file).values
    )
    other = [{**row, "image": "renamed.csv", "frame": i - 3} if i >= 3 else row for i, row in enumerate(rows)]
    manifest = manifest_of(tmp_path, other)
    with pytest.raises(DataError, match="columns of a feature table") as caught:
        open_features(manifest, FeaturesConfig())
    assert "missing: volume_mm3" in caught.value.found
    assert "not known: volume_ml" in caught.value.found


def test_columns_by_place_must_be_as_many_while_named_ones_may_be_more(tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((2, 3)))
    manifest = manifest_of(tmp_path, [{"subject": f"s{i}", "image": "wide.npy", "frame": i} for i in range(2)])
    with pytest.raises(DataError, match="columns of a feature table"):
        open_features(manifest, FeaturesConfig(), names=numbered(2))
    file = table_file(tmp_path)
    store = open_features(manifest_of(tmp_path, rows_of(file)), FeaturesConfig(), names=("volume_mm3",))
    assert store.values.shape == (6, 1)


def test_rows_that_are_not_there_and_values_that_cannot_be_used_are_named(tmp_path):
    file = table_file(tmp_path, extra=[1, np.nan, np.inf, 4, 5, 6])
    with pytest.raises(DataError, match="no such row") as caught:
        open_features(
            manifest_of(tmp_path, [*rows_of(file), {"subject": "x", "image": file.name, "frame": 6}]), FeaturesConfig()
        )
    assert "line 8" in caught.value.where
    with pytest.raises(DataError, match="does not say which"):
        open_features(manifest_of(tmp_path, [{"subject": "x", "image": file.name}]), FeaturesConfig())
    with pytest.raises(DataError, match="infinite features in 1 rows") as caught:
        open_features(manifest_of(tmp_path, rows_of(file)), FeaturesConfig(impute="mean"))
    assert "002 (line 4): extra" in caught.value.found
    some = [row for row in rows_of(file) if row["subject"] != "002"]
    with pytest.raises(DataError, match="missing features in 1 rows") as caught:
        open_features(manifest_of(tmp_path, some), FeaturesConfig())
    assert "001 (line 3): extra" in caught.value.found
    assert np.isnan(open_features(manifest_of(tmp_path, some), FeaturesConfig(impute="mean")).values).sum() == 1


def test_one_array_a_person(tmp_path):
    arrays = RNG.normal(size=(3, 7, 68)).astype(np.float32)
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"p{i}.npy", array)
    store = open_features(
        manifest_of(tmp_path, [{"subject": f"s{i}", "image": f"p{i}.npy"} for i in range(3)]), FeaturesConfig()
    )
    np.testing.assert_array_equal(store.values, arrays.reshape(3, -1))


def test_a_row_has_one_hash_whatever_its_file_and_the_order_of_columns(tmp_path):
    file = table_file(tmp_path)
    frame = pd.read_csv(file, dtype={"participant_id": str})
    frame.iloc[::-1, ::-1].to_parquet(tmp_path / "copy.parquet", index=False)
    store = open_features(manifest_of(tmp_path, rows_of(file)), FeaturesConfig())
    copy = open_features(
        manifest_of(tmp_path, [{**r, "image": "copy.parquet"} for r in rows_of(file)]), FeaturesConfig()
    )
    assert [store.voxels(v) for v in range(6)] == [copy.voxels(5 - v) for v in range(6)]
    assert len({store.voxels(v) for v in range(6)}) == 6


def test_a_reader_gives_standardised_rows_of_the_statistics_it_is_told(tmp_path):
    file = table_file(tmp_path)
    manifest = manifest_of(tmp_path, rows_of(file))
    store = open_features(manifest, FeaturesConfig())
    table = build_items(manifest, store, ItemsConfig(geometry="features"))
    reader = FeatureReader(store, table, fit_statistics(store, [0, 1, 2, 3], FeaturesConfig()))
    images, maps = reader.read([4, 0])
    trained = store.values[:4].astype(np.float64)
    expected = (store.values[[4, 0]] - trained.mean(axis=0)) / trained.std(axis=0)
    np.testing.assert_allclose(images.numpy(), expected, rtol=1e-5)
    assert maps is None
    assert reader.image_shape == (2,)
    assert reader.describe([4]) == ["row 4: 004"]
    with pytest.raises(DataError, match="other features"):
        FeatureReader(store, table, FeatureStatistics(("x",), np.zeros(1), np.ones(1), 2))


# Scan and check -------------------------------------------------------------------------------------------------------


def scanned(file, folder, **options):
    found = discover_any(file, **options)
    source = Manifest(found.table.assign(volume=range(len(found.table)), label=None), found.meta, file.parent / "m.csv")
    write_manifest(source.relocated(folder / "manifest.csv"), found.meta, folder / "manifest.csv")
    return read_manifest(folder / "manifest.csv"), found


def test_scanning_keeps_what_is_known_of_people_and_which_columns_are_features(tmp_path):
    file = table_file(tmp_path, education=range(6))
    manifest, found = scanned(file, tmp_path, features="lh_*; volume_*")
    assert found.cohort == "table"
    table = manifest.table
    assert list(table["subject"]) == list(table["case"]) == [f"{i:03d}" for i in range(6)]
    assert list(table["frame"]) == list(range(6))
    assert list(table["site"]) == ["A", "B"] * 3
    assert table["age"].iloc[-1] == 70
    assert list(table["education"]) == list(range(6))
    assert open_features(manifest, FeaturesConfig()).names == ("lh_thickness", "volume_mm3")
    pd.read_csv(file).drop(columns="participant_id").to_csv(tmp_path / "nobody.csv", index=False)
    with pytest.raises(DataError, match="whose rows"):
        discover_any(tmp_path / "nobody.csv", kind="table")
    with pytest.raises(DataError, match="is a file"):
        discover_any(tmp_path, kind="table")


def test_the_check_finds_every_fault_of_a_table_in_one_pass(tmp_path):
    file = table_file(tmp_path, extra=[1, np.nan, np.inf, 4, 5, 6], constant=[3] * 6)
    frame = pd.read_csv(file, dtype={"participant_id": str})
    frame.drop(columns="extra").to_csv(tmp_path / "narrow.csv", index=False)
    frame.iloc[[3]].to_csv(tmp_path / "again.csv", index=False)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    rows = [
        *rows_of(file),
        {"subject": "beyond", "image": file.name, "frame": 9},
        {"subject": "narrow", "image": "narrow.csv", "frame": 0},
        {"subject": "again", "image": "again.csv", "frame": 0},
        {"subject": "broken", "image": "broken.parquet", "frame": 0},
        {"subject": "gone", "image": "gone.csv", "frame": 0},
    ]
    manifest = manifest_of(tmp_path, rows)
    found = {(one.code, one.row) for one in check_manifest(manifest, deep=True)}
    assert found == {
        ("E-FEATURE-MISSING", 3),
        ("E-NOT-FINITE", 4),
        ("W-FEATURE-CONSTANT", 2),
        ("E-FRAME-RANGE", 8),
        ("E-FEATURE-COLUMNS", 9),
        ("E-DUPLICATE-IMAGE", 10),
        ("E-DAMAGED", 11),
        ("E-MISSING-FILE", 12),
    }
    shallow = {one.code for one in check_manifest(manifest)}
    assert shallow == {"E-FRAME-RANGE", "E-FEATURE-COLUMNS", "E-DAMAGED", "E-MISSING-FILE"}
