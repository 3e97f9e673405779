"""The run folder: paths that hold from anywhere, names that are taken, files that nothing may replace."""

import os
from pathlib import Path

import pandas as pd
import pytest

from medssl.core.errors import ConfigError, DiskError
from medssl.core.files import atomic_write
from medssl.data.manifest import ManifestMeta, read_manifest, write_manifest
from medssl.methods.segmentation import SegmentationConfig
from medssl.runs.cohort import check
from medssl.runs.finetune import finish
from medssl.runs.folder import open_run, read_status, record_run, tracked
from medssl.runs.grid import Cell


@pytest.fixture
def manifest(tmp_path) -> Path:
    table = pd.DataFrame({"subject": ["a"], "image": ["images/a.nii.gz;../b.nii.gz"], "label": ["labels/a.nii.gz"]})
    write_manifest(table, ManifestMeta(), tmp_path / "data" / "manifest.csv")
    return tmp_path / "data" / "manifest.csv"


def test_manifest_of_a_run_names_the_same_files_from_its_own_folder(tmp_path, manifest, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = read_manifest(Path("data/manifest.csv"))
    record_run(Path("runs/one"), config_text="a: 1\n", manifest=loaded)
    monkeypatch.chdir("/")
    kept = read_manifest(tmp_path / "runs" / "one" / "manifest.csv")
    images = [tmp_path / "data/images/a.nii.gz", tmp_path / "b.nii.gz"]
    assert [Path(os.path.normpath(path)) for path in kept.image_paths(0)] == images
    assert kept.label_path(0) == tmp_path / "data/labels/a.nii.gz"


def test_file_in_the_place_of_a_run_folder(tmp_path, manifest):
    (tmp_path / "taken").write_text("not a run")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="a file where the run folder"):
            open_run(
                tmp_path, "taken", kind="pretrain", config_text="", manifest=read_manifest(manifest), resume=resume
            )
    assert (tmp_path / "taken").read_text() == "not a run"


def test_file_where_a_folder_is_needed_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="cannot be written at this place") as caught:
        atomic_write(tmp_path / "file" / "below.txt", "y")
    assert "below.txt" in str(caught.value)


def test_findings_never_replace_the_manifest(manifest):
    for name in ("manifest.csv", "manifest.meta.yaml"):
        target = manifest.with_name(name)
        before = target.read_bytes()
        with pytest.raises(ConfigError, match="overwrite the manifest"):
            check(manifest, deep=False, jobs=1, mapping={}, out=target)
        assert target.read_bytes() == before


def test_person_and_structure_called_na_are_counted(tmp_path, monkeypatch):
    """`NA` is a name; read as a missing value it would drop its rows from the mean."""
    seen = {}

    def keep(config, cohort, folder, per_case, results, leaks):
        seen["rows"] = per_case
        raise StopIteration

    monkeypatch.setattr("medssl.runs.finetune.summarise_grid", keep)
    cell = Cell("scratch", 1, 1, 0)
    text = "case,subject,group,class,dice,missed\nNA,NA,NA,None,0.5,False\n1,1,1,2,,False\n"
    atomic_write(tmp_path / "cells" / cell.name / "per_case.csv", text)
    done = dict.fromkeys(("n_validation", "best_step", "best_score", "steps", "seconds", "data_wait_share"), 0)

    class Leaks:
        n_groups, notes = 0, ()

    class Config:
        task = SegmentationConfig()

    with pytest.raises(StopIteration):
        finish(Config(), None, tmp_path, {cell: done}, Leaks())
    assert seen["rows"][["group", "class"]].to_numpy().tolist() == [["NA", "None"], ["1", "2"]]
    assert seen["rows"]["dice"].isna().tolist() == [False, True]


def test_a_name_is_free_again_when_its_run_was_refused_before_it_began(tmp_path, manifest):
    def begin(text):
        return open_run(
            tmp_path, "run", kind="pretrain", config_text=text, manifest=read_manifest(manifest), resume=False
        )

    folder = begin("a: 1\n")
    with pytest.raises(ConfigError, match="too many"), tracked(folder, "pretrain"):
        raise ConfigError("too many clusters")
    assert begin("a: 2\n") == folder
    assert (folder / "config.yaml").read_text() == "a: 2\n"
    assert read_status(folder) == {}
    (folder / "logs").mkdir()  # it had begun
    with pytest.raises(OSError, match="later"), tracked(folder, "pretrain"):
        raise OSError("later")
    with pytest.raises(ConfigError, match="exists already"):
        begin("a: 3\n")
    assert (folder / "config.yaml").read_text() == "a: 2\n"
