from pathlib import Path

import layouts
import numpy as np
import pytest
import yaml

from medssl.core.errors import ConfigError, DataError
from medssl.data.cohorts import acdc, discover_any, mmwhs, msd, openbhb
from medssl.data.cohorts.facts import read_facts, read_published_lists

FOLDER = Path(__file__).parents[2] / "data_manifests"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_is_a_file_for_each_published_cohort() -> None:
    assert [path.stem for path in FILES] == ["acdc", "hippocampus", "mmwhs", "openbhb", "prostate"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_facts_are_valid_and_match_what_a_scan_finds(path: Path, tmp_path: Path) -> None:
    facts = read_facts(path)
    write = {
        "acdc": layouts.write_acdc,
        "hippocampus": layouts.write_msd_hippocampus,
        "mmwhs": layouts.write_mmwhs,
        "openbhb": layouts.write_openbhb,
        "prostate": layouts.write_msd_prostate,
    }[path.stem]
    found = discover_any(write(tmp_path), **facts.options)
    assert found.cohort == facts.cohort
    assert list(found.meta.label_names) == list(facts.label_names)
    assert sorted(set(facts.label_values.values())) == list(range(len(facts.label_names)))
    assert facts.partitions == (None if path.stem == "openbhb" else 4)
    shapes = [np.load(tmp_path / image).shape for image in found.table["image"] if image.endswith(".npy")]
    assert set(shapes) == ({facts.array_shapes["vbm"]} if path.stem == "openbhb" else set())


def test_licence_and_citation_of_the_facts_are_those_of_the_scan() -> None:
    for name, meta in (("acdc", acdc.META), ("mmwhs", mmwhs.META), ("openbhb", openbhb.META)):
        facts = read_facts(FOLDER / f"{name}.yaml")
        assert (facts.citation, facts.label_names) == (meta.citation, meta.label_names)
        assert facts.licence.split()[0] == meta.licence.split()[0]
    for name in ("prostate", "hippocampus"):
        facts = read_facts(FOLDER / f"{name}.yaml")
        assert (facts.licence, facts.citation) == (msd.LICENCE, msd.CITATION)


def test_published_grids() -> None:
    grids = {name: read_facts(FOLDER / f"{name}.yaml").prepare for name in ("acdc", "prostate", "mmwhs")}
    assert {name: (grid.spacing, grid.size) for name, grid in grids.items()} == {
        "acdc": ((1.367, 1.367, None), (192, 192, None)),
        "prostate": ((0.625, 0.625, None), (192, 192, None)),
        "mmwhs": ((1.5, 1.5, None), (160, 160, None)),
    }
    assert grids["mmwhs"].label_values[421] == grids["mmwhs"].label_values[420] == 2


@pytest.mark.parametrize(
    ("name", "draws", "unlabelled", "clean", "test"),
    [
        ("acdc", {1: 5, 2: 5, 8: 3}, 52, 51, 20),
        ("prostate", {1: 5, 2: 5, 8: 3}, 17, 11, 15),
        ("mmwhs", {1: 5, 2: 4, 8: 3}, 10, 4, 10),
    ],
)
def test_published_lists_have_the_published_counts(
    name: str, draws: dict[int, int], unlabelled: int, clean: int, test: int
) -> None:
    splits = read_facts(FOLDER / f"{name}.yaml").splits
    lists = read_published_lists(FOLDER / splits.file)
    assert {n: sum(one.role == "labelled" and one.n_labelled == n for one in lists) for n in draws} == draws
    sizes = {one.role: len(one.subjects) for one in lists}
    assert (sizes["unlabelled"], sizes["test"]) == (unlabelled, test)
    tidy = read_published_lists(FOLDER / splits.clean)
    pool = next(set(one.subjects) for one in tidy if one.role == "unlabelled")
    assert len(pool) == clean
    assert not any(pool & set(one.subjects) for one in tidy if one.role in ("validation", "test"))
    assert [one for one in lists if one.role != "unlabelled"] == [one for one in tidy if one.role != "unlabelled"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_names": {1: "x"}}, "0 must be background"),
        ({"label_aliases": {3: 9}}, "must be unknown and 9 a label"),
        ({"partition": 4}, "Did you mean `partitions`"),
        ({"licence": ""}, "licence"),
        ({"label_names": {0: "background", 7: "x"}}, "prepare.label_values must be"),
    ],
)
def test_wrong_facts_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    values = yaml.safe_load((FOLDER / "hippocampus.yaml").read_text())
    path = tmp_path / "facts.yaml"
    path.write_text(yaml.safe_dump(values))
    assert read_facts(path).name == "Hippocampus"
    path.write_text(yaml.safe_dump({**values, **change}))
    with pytest.raises(ConfigError, match=message):
        read_facts(path)


def test_unreadable_facts_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.yaml"):
        read_facts(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(DataError, match=r"bad\.yaml"):
        read_facts(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("labelled,1,1,a\nvalidation,1,1,a\n", DataError, "two sides"),
        ("labelled,2,1,a\nvalidation,2,1,b\n", DataError, "holds 1 ids"),
        ("labelled,1,1,a\n", DataError, "no validation list"),
        ("labelled,1,1,a\nvalidation,1,1,b\ntest,1,,a\n", DataError, "two sides"),
        ("unlabelled,,,a b\nunlabelled,,,c\n", DataError, "same role"),
        ("unlabelled,,,a a\n", ConfigError, "listed twice"),
        ("train,,,a\n", ConfigError, "line 2"),
        ("unlabelled,x,,a\n", ConfigError, "whole numbers"),
        ("", DataError, "other columns"),
    ],
)
def test_published_lists_that_contradict_themselves_are_refused(
    tmp_path: Path, rows: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "lists.csv"
    path.write_text("role,n_labelled,draw,subjects\n" + rows)
    with pytest.raises(error, match=message):
        read_published_lists(path)
