"""Weights remember whom they were begun from: a person seen two pretrainings ago is seen."""

from pathlib import Path

import pandas as pd
import pytest
from small_runs import pretrain_values

from medssl.config import PretrainConfig
from medssl.core.errors import DataError
from medssl.core.files import atomic_write
from medssl.core.schema import validate
from medssl.data.manifest import ManifestMeta, read_manifest, write_manifest
from medssl.data.splits import TEST_SPLITS
from medssl.runs.pretrain import check_leaks
from medssl.runs.volumes import pretraining_manifests


def run(root: Path, name: str, subjects: str, begun_from: Path | None = None) -> Path:
    """What a finished pretraining leaves of its data: a manifest and a configuration."""
    folder = root / "runs" / name
    table = pd.DataFrame({"subject": list(subjects), "image": [f"/data/{one}.nii.gz" for one in subjects]})
    write_manifest(table, ManifestMeta(), folder / "manifest.csv")
    atomic_write(folder / "config.yaml", f"weights: {'null' if begun_from is None else begun_from}\n")
    atomic_write(folder / "weights" / "encoder.safetensors", "")
    return folder


@pytest.fixture
def chain(tmp_path) -> Path:
    """Pretrained on a and b, from weights of b and c, from weights of t."""
    first = run(tmp_path, "first", "t")
    second = run(tmp_path, "second", "bc", first / "weights")
    return run(tmp_path, "third", "ab", second)


@pytest.mark.parametrize("below", ["", "weights", "weights/encoder.safetensors"])
def test_every_pretraining_of_the_chain_is_found(chain, below):
    manifests = pretraining_manifests(chain / below)
    assert ["".join(one.table["subject"]) for one in manifests] == ["ab", "bc", "t"]


def test_chain_that_closes_or_breaks_ends(tmp_path):
    first = run(tmp_path, "first", "a", tmp_path / "runs" / "first")
    assert len(pretraining_manifests(first)) == 1
    assert len(pretraining_manifests(run(tmp_path, "second", "b", tmp_path / "gone"))) == 1


@pytest.mark.parametrize("tested", TEST_SPLITS)
def test_pretraining_that_begins_from_test_people_is_refused(tmp_path, chain, tested):
    table = pd.DataFrame({"subject": ["a", "t"], "image": ["a.nii", "other.nii"], "split": ["train", tested]})
    write_manifest(table, ManifestMeta(), tmp_path / "manifest.csv")
    values = pretrain_values(tmp_path / "manifest.csv", tmp_path)
    manifest = read_manifest(tmp_path / "manifest.csv")
    assert check_leaks(validate(PretrainConfig, values, source="test"), manifest) == []
    values["weights"] = str(chain)
    with pytest.raises(DataError, match="group t is in the pretraining that this one begins from and in test"):
        check_leaks(validate(PretrainConfig, values, source="test"), manifest)
    values["data"]["transductive"] = True
    assert len(check_leaks(validate(PretrainConfig, values, source="test"), manifest)) == 1
    values |= {"weights": None, "data": {**values["data"], "transductive": False, "splits": ["train", tested]}}
    with pytest.raises(DataError, match="group t is in pretraining and in test"):
        check_leaks(validate(PretrainConfig, values, source="test"), manifest)
