from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.core.errors import ConfigError, DataError
from medssl.data.manifest import Manifest, ManifestMeta, read_manifest
from medssl.data.splits import kfold, label_draws, leave_site_out, published_sets, refuse_leak, split_table


def cohort(groups, *, site=None, age=None, subject=None, label=True, image=None, cohort="", path="manifest.csv"):
    n = len(groups)
    subjects = list(subject) if subject is not None else [f"s-{group}" for group in groups]
    labels = [f"lab{i}.nii.gz" if has else None for i, has in enumerate(np.broadcast_to(label, n))]
    table = pd.DataFrame(
        {
            "subject": pd.Series(subjects, dtype=object),
            "image": pd.Series(image or [f"img{i}.nii.gz" for i in range(n)], dtype=object),
            "label": pd.Series(labels, dtype=object),
            "frame": pd.Series([pd.NA] * n, dtype="Int64"),
            "site": pd.Series(site if site is not None else [None] * n, dtype=object),
            "age": pd.Series(age if age is not None else [np.nan] * n, dtype=float),
            "split": pd.Series([None] * n, dtype=object),
            "group": pd.Series(list(groups), dtype=object),
            "volume": np.arange(n),
            "case": pd.Series([f"case{i}" for i in range(n)], dtype=object),
        }
    )  # fmt: skip
    return Manifest(table, ManifestMeta(cohort=cohort), Path(path))


def groups_by_part(table):
    parts = {}
    for part, group in zip(table["split"].tolist(), table["group"].tolist()):
        parts.setdefault(part, set()).add(group)
    return parts


def disjoint(sets):
    sets = list(sets)
    return sum(len(one) for one in sets) == len(set().union(*sets))


cohorts = st.lists(st.integers(0, 12), min_size=4, max_size=40).map(lambda ids: [f"g{i}" for i in ids])


@settings(max_examples=50)
@given(
    cohort_seed=st.integers(0, 2**31),
    test=st.one_of(st.floats(0, 0.9), st.integers(0, 5)),
    validation=st.one_of(st.floats(0, 0.9), st.integers(0, 5)),
    seed=st.integers(0, 2**31),
)
def test_none_of_1000_random_cohorts_is_split_through_a_group(cohort_seed, test, validation, seed):
    rng = np.random.default_rng(cohort_seed)
    for _ in range(20):  # many cohorts an example: drawing them is what takes the time
        groups = [f"g{i}" for i in rng.integers(0, rng.integers(1, 14), rng.integers(1, 40))]
        check_split(groups, test, validation, seed)


def check_split(groups, test, validation, seed):
    table = pd.DataFrame({"group": groups, "volume": range(len(groups))})
    manifest = Manifest(table, ManifestMeta(), Path("manifest.csv"))  # only what a split looks at
    n_groups = len(set(groups))
    n_test, n_validation = (
        value if isinstance(value, int) else max(round(value * n_groups), value > 0) for value in (test, validation)
    )
    if n_test + n_validation >= n_groups:
        with pytest.raises(DataError, match="no group for training"):
            split_table(manifest, test=test, validation=validation, seed=seed)
        return
    table = split_table(manifest, test=test, validation=validation, seed=seed)
    parts = groups_by_part(table)
    assert disjoint(parts.values())
    assert set().union(*parts.values()) == set(groups)
    assert parts["train"]
    assert table["volume"].tolist() == list(range(len(groups)))
    assert (len(parts.get("test", ())), len(parts.get("validation", ()))) == (n_test, n_validation)


@settings(max_examples=100)
@given(groups=cohorts, n_folds=st.integers(2, 5), seed=st.integers(0, 2**31), validation=st.sampled_from([0, 1, 0.2]))
def test_every_group_is_tested_in_exactly_one_fold(groups, n_folds, seed, validation):
    if len(set(groups)) < max(n_folds, 4):
        return
    tested = []
    for table in kfold(cohort(groups), n_folds=n_folds, seed=seed, validation=validation):
        parts = groups_by_part(table)
        assert disjoint(parts.values())
        assert ("validation" in parts) == (validation > 0)
        tested.append(parts["test"])
    assert disjoint(tested)
    assert set().union(*tested) == set(groups)
    assert max(map(len, tested)) - min(map(len, tested)) <= 1


def test_split_depends_on_the_seed_and_not_on_the_order_of_rows():
    groups = [f"g{i % 20}" for i in range(50)]
    one = groups_by_part(split_table(cohort(groups), test=0.3, validation=4, seed=5))
    assert groups_by_part(split_table(cohort(groups[::-1]), test=0.3, validation=4, seed=5)) == one
    assert groups_by_part(split_table(cohort(groups), test=0.3, validation=4, seed=6)) != one
    assert len(one["test"]) == 6
    assert len(one["validation"]) == 4


def test_counts_may_be_written_as_floats_and_nonsense_is_refused():
    manifest = cohort([f"g{i}" for i in range(10)])
    assert groups_by_part(split_table(manifest, test=2.0)) == groups_by_part(split_table(manifest, test=2))
    for wrong in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ConfigError, match="share of the groups"):
            split_table(manifest, test=wrong)
    with pytest.raises(ConfigError, match="seed"):
        split_table(manifest, test=2, seed=-1)
    with pytest.raises(DataError, match="10 groups, 9 for test, 1 for validation"):
        split_table(manifest, test=9, validation=1)


def test_stratified_parts_share_sites_and_ages_in_proportion():
    n = 120
    site = ["a"] * 60 + ["b"] * 36 + ["c"] * 24
    age = np.tile(np.linspace(20, 80, 12), 10)
    manifest = cohort([f"g{i}" for i in range(n)], site=site, age=age)
    for seed in range(5):
        table = split_table(manifest, test=0.25, validation=0.25, seed=seed, stratify="site")
        for part in ("test", "validation"):
            counts = table[table["split"] == part]["site"].value_counts()
            assert abs(counts["a"] - 15) <= 1
            assert abs(counts["b"] - 9) <= 1
            assert abs(counts["c"] - 6) <= 1
        table = split_table(manifest, test=0.25, seed=seed, stratify=["site", "age"])
        assert abs(table[table["split"] == "test"]["age"].mean() - 50) < 5
        folds = kfold(manifest, n_folds=4, seed=seed, stratify="site")
        assert all(abs((fold[fold["split"] == "test"]["site"] == "b").sum() - 9) <= 1 for fold in folds)
    with pytest.raises(ConfigError, match="Did you mean `site`"):
        split_table(manifest, test=0.2, stratify="sites")


def test_kfold_refuses_too_few_groups_or_folds():
    manifest = cohort(["a", "a", "b"])
    with pytest.raises(DataError, match="2 groups, 3 folds"):
        kfold(manifest, n_folds=3)
    with pytest.raises(ConfigError, match="two folds"):
        kfold(manifest, n_folds=1)
    with pytest.raises(DataError, match="no group for training"):
        kfold(manifest, n_folds=2, validation=1)


def test_leaving_a_site_out_leaves_its_people_out_of_training():
    manifest = cohort(["p", "p", "q", "r", "s"], site=["a", "b", "b", "b", "a"])
    tables = leave_site_out(manifest)
    assert tables["a"]["split"].tolist() == ["test", None, "train", "train", "test"]
    assert tables["b"]["split"].tolist() == [None, "test", "test", "test", "train"]
    with pytest.raises(DataError, match="at least two sites"):
        leave_site_out(cohort(["p", "q"], site=["a", "a"]))
    with pytest.raises(DataError, match="line 3"):
        leave_site_out(cohort(["p", "q", "r"], site=["a", None, "b"]))
    with pytest.raises(DataError, match="no group for training"):
        leave_site_out(cohort(["p", "p"], site=["a", "b"]))


@settings(max_examples=100)
@given(groups=cohorts, seed=st.integers(0, 2**31), draws=st.integers(1, 4), n_validation=st.integers(0, 3))
def test_label_draws_are_nested_and_of_distinct_groups(groups, seed, draws, n_validation):
    has_label = np.arange(len(groups)) % 4 != 3
    manifest = cohort(groups, label=has_label)
    available = {group for group, has in zip(groups, has_label) if has}
    sizes = [4, 1, 2]
    if len(available) < 4 + n_validation:
        with pytest.raises(DataError, match=f"{len(available)} groups with labels; 4 for training"):
            label_draws(manifest, n_labelled=sizes, draws=draws, n_validation=n_validation, seed=seed)
        return
    found = label_draws(manifest, n_labelled=sizes, draws=draws, n_validation=n_validation, seed=seed)
    assert [(one.n_labelled, one.draw) for one in found] == [(n, d + 1) for n in (1, 2, 4) for d in range(draws)]
    for one in found:
        used = [groups[volume] for volume in one.train + one.validation]
        assert len(set(used)) == len(used) == one.n_labelled + n_validation
        assert all(has_label[volume] for volume in one.train + one.validation)
    for one in found:
        largest = next(other for other in found if other.draw == one.draw and other.n_labelled == 4)
        assert one.train == largest.train[: one.n_labelled]
        assert one.validation == largest.validation
    more = label_draws(manifest, n_labelled=sizes, draws=draws + 1, n_validation=n_validation, seed=seed)
    assert [one for one in more if one.draw <= draws] == found


def test_draws_differ_from_each_other_and_by_seed():
    manifest = cohort([f"g{i}" for i in range(60)])
    one = label_draws(manifest, n_labelled=[8], draws=3, seed=0)
    other = label_draws(manifest, n_labelled=[8], draws=3, seed=1)
    assert len({tuple(draw.train) for draw in one + other}) == 6
    for wrong in ({"n_labelled": [0]}, {"n_labelled": []}, {"n_labelled": [1], "draws": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            label_draws(manifest, **{"draws": 1, **wrong})


PUBLISHED = """role,n_labelled,draw,subjects
labelled,1,1,p_002
validation,1,1,p_011 p_012
labelled,1,2,p_003
validation,1,2,p_011 p_013
labelled,2,1,p_002 p_003
validation,2,1,p_011 p_012
unlabelled,,,p_002 p_004
test,3,,p_005
upper_bound,3,,p_002 p_003 p_004
"""


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    return path


def patients(pattern, numbers=(2, 3, 4, 5, 11, 12, 13)):
    subjects = [pattern.format(n) for n in numbers for _ in range(2)]  # two frames each
    return cohort(subjects, subject=subjects)


@pytest.mark.parametrize("pattern", ["p_{:03d}", "prostate_{:02d}"])
def test_published_draws_are_found_by_id_or_by_number(published, pattern):
    manifest = patients(pattern)
    found = label_draws(manifest, n_labelled=[1, 2], draws=1, n_validation=2, published=published)
    assert [(one.n_labelled, one.draw) for one in found] == [(1, 1), (2, 1)]
    assert found[0].train == [0, 1]  # every labelled volume of the subject
    assert found[1].train == [0, 1, 2, 3]
    assert found[0].validation == [8, 9, 10, 11]
    sets = published_sets(manifest, published)
    assert sets == {"unlabelled": [0, 1, 4, 5], "test": [6, 7], "upper_bound": [0, 1, 2, 3, 4, 5]}


def test_published_draws_say_what_is_missing(published):
    with pytest.raises(DataError, match="not in the manifest with a label: p_012"):
        label_draws(patients("p_{:03d}", (2, 3, 11)), n_labelled=[1], draws=1, published=published)
    with pytest.raises(ConfigError, match="1 draws of 2 labelled, 2 are asked for"):
        label_draws(patients("p_{:03d}"), n_labelled=[2], draws=2, published=published)
    with pytest.raises(ConfigError, match="0 draws of 5 labelled"):
        label_draws(patients("p_{:03d}"), n_labelled=[5], draws=1, published=published)
    with pytest.raises(ConfigError, match="set n_validation: 2"):
        label_draws(patients("p_{:03d}"), n_labelled=[1], draws=1, n_validation=3, published=published)
    with pytest.raises(DataError, match="p_004"):
        published_sets(patients("p_{:03d}", (2, 3, 5)), published)


def test_an_ambiguous_number_matches_nobody(published):
    manifest = cohort(["x"] * 4, subject=["a_2", "b_2", "a_11", "a_12"])
    with pytest.raises(DataError, match="p_002"):
        label_draws(manifest, n_labelled=[1], draws=1, published=published)


@pytest.mark.parametrize(
    ("text", "part"),
    [("role,subjects\n", "no column draw, n_labelled"), (PUBLISHED.replace("test", "tset"), "Did you mean `test`"),
     (PUBLISHED.replace("labelled,1,2", "labelled,one,2"), "cannot be read")],
)  # fmt: skip
def test_a_broken_published_list_is_refused(tmp_path, text, part):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=part):
        published_sets(patients("p_{:03d}"), path)
    with pytest.raises(DataError, match="cannot be read"):
        published_sets(patients("p_{:03d}"), tmp_path / "none.csv")


def test_leak_of_a_group_is_refused_and_named():
    one, other = cohort(["a", "b"], image=["1", "2"]), cohort(["b", "c"], image=["3", "4"], subject=["t-b", "t-c"])
    with pytest.raises(DataError, match="group b is in train and in test"):
        refuse_leak({"train": one, "test": other})
    passed = refuse_leak({"train": one, "test": other}, transductive=True)
    assert [(leak.kind, leak.what, leak.sets) for leak in passed] == [("group", "b", ("train", "test"))]


def test_leak_of_a_subject_in_two_groups_is_refused():
    one = cohort(["a"], subject=["s1"], image=["1"])
    other = cohort(["b"], subject=["s1"], image=["2"])
    with pytest.raises(DataError, match="subject s1 is in train and in test"):
        refuse_leak({"train": one, "test": other})


def test_equal_ids_of_two_named_cohorts_are_different_people():
    one = cohort(["a"], image=["1"], cohort="x")
    assert refuse_leak({"train": one, "test": cohort(["a"], image=["2"], cohort="y")}) == []
    with pytest.raises(DataError, match="group a"):
        refuse_leak({"train": one, "test": cohort(["a"], image=["2"])})


def test_the_same_file_and_a_copy_under_another_name_are_refused(tmp_path):
    one = cohort(["a"], image=["x.nii"], path=tmp_path / "m.csv")
    same = cohort(["b"], image=["x.nii"], path=tmp_path / "m.csv")
    copy = cohort(["b"], image=["y.nii"], path=tmp_path / "m.csv")
    with pytest.raises(DataError, match=r"file .*x.nii is in train and in test"):
        refuse_leak({"train": one, "test": same})
    assert refuse_leak({"train": one, "test": copy}) == []
    hashes = {tmp_path / "x.nii": "1234", tmp_path / "y.nii": "1234"}
    with pytest.raises(DataError, match="identical image case0"):
        refuse_leak({"train": one, "test": copy}, hashes=hashes)


def test_two_frames_of_one_file_are_not_one_image():
    one, other = cohort(["a"], image=["x"]), cohort(["b"], image=["x"])
    one.table["frame"] = pd.Series([0], dtype="Int64")
    other.table["frame"] = pd.Series([1], dtype="Int64")
    assert refuse_leak({"train": one, "test": other}, hashes={Path("x"): "1"}) == []


def test_an_empty_set_is_refused_even_when_transductive():
    full = cohort(["a"])
    with pytest.raises(DataError, match="validation set is empty"):
        refuse_leak({"train": full, "validation": full.select(np.zeros(1, bool))}, transductive=True)


def test_splits_of_real_people_keep_both_sides_together(real_data):
    manifest = read_manifest(real_data / "hippocampus", mapping={"group": "person"})
    table = split_table(manifest, test=0.2, validation=0.1, seed=0, stratify="intensity_group")
    parts = groups_by_part(table)
    assert disjoint(parts.values())
    assert sum(map(len, parts.values())) == 129
    sets = {part: manifest.select(table["split"] == part) for part in parts}
    assert refuse_leak(sets) == []


def test_frame_saved_as_a_file_of_its_own_is_found_by_its_voxels():
    one, other = cohort(["a"], image=["cine.nii"]), cohort(["b"], image=["frame0.nii"])
    one.table["frame"] = pd.Series([0], dtype="Int64")
    other.table["volume"] = [1]
    assert refuse_leak({"train": one, "test": other}, voxels={0: "1234", 1: "5678"}) == []
    with pytest.raises(DataError, match=r"identical image case0 \(cine.nii, frame 0\)"):
        refuse_leak({"train": one, "test": other}, voxels={0: "1234", 1: "1234"})
