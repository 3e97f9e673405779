"""The generated cohort: the public layout, sites that depend on age, arrays that hold both."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medssl.core.errors import ConfigError
from medssl.data.cohorts import discover_any, synthetic
from medssl.data.cohorts.synthetic_openbhb import MASK, Settings, draw_centres, generate
from medssl.data.features import read_features
from medssl.data.manifest import read_manifest
from medssl.data.masks import read_mask

N = 200


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("openbhb")
    synthetic.generate(root, "openbhb", n_subjects=N, seed=1, size=24, sites=6, external_sites=2, regions="both")
    return root


def test_it_is_recognised_and_says_that_it_is_synthetic(cohort):
    found = discover_any(cohort)
    assert found.cohort == "openbhb"
    assert "synthetic" in found.meta.name
    assert found.meta.licence == "Apache-2.0"
    assert len(found.table) == N
    manifest = read_manifest(cohort / "manifest.csv")
    assert manifest.table["image"].tolist() == found.table["image"].tolist()
    assert {one.why for one in found.skipped} == {
        *(f"holds roi_{name}, asked for vbm" for name in ("cat12", "desikan", "destrieux")),
        "table of other measures, asked for vbm",
    }


def test_sites_of_the_external_test_are_unseen_and_those_of_the_internal_test_are_not(cohort):
    table = discover_any(cohort).table
    sites = {split: set(part["site"]) for split, part in table.groupby("split")}
    assert sites["internal_test"] == sites["train"] == set("012345")
    assert sites["external_test"] == {"6", "7"}
    assert table["split"].value_counts().to_dict() == {"train": 130, "external_test": 40, "internal_test": 30}
    assert table["subject"].is_unique
    assert table["age"].between(18, 86).all()
    assert set(table["sex"]) == {"F", "M"}


def test_arrays_and_measures_have_the_published_shapes(cohort):
    folder = next((cohort / "train" / "derivatives").glob("sub-*/ses-1"))
    shapes = {path.name.split("_", 1)[1]: np.load(path).shape for path in folder.iterdir()}
    assert shapes == {
        "preproc-cat12vbm_desc-gm_T1w.npy": (1, 24, 24, 24),
        "preproc-cat12vbm_desc-gm_ROI.npy": (1, 284),
        "preproc-freesurfer_desc-desikan_ROI.npy": (7, 68),
        "preproc-freesurfer_desc-destrieux_ROI.npy": (7, 148),
    }
    subject = folder.parent.name.removeprefix("sub-")
    for name in ("cat12vbm_roi/cat12vbm", "freesurfer_roi/desikan", "freesurfer_roi/destrieux"):
        table = read_features(cohort / "train" / "derivatives" / f"{name}_roi_features.csv")
        row = table.values[table.keys["participant_id"].tolist().index(subject)]
        measure = {"cat12vbm": "cat12vbm_desc-gm"}.get(name.split("/")[1], f"freesurfer_desc-{name.split('/')[1]}")
        own = np.load(folder / f"sub-{subject}_preproc-{measure}_ROI.npy").ravel()
        np.testing.assert_allclose(row, own, rtol=1e-5)


def test_age_and_site_are_both_in_the_arrays_and_age_alone_tells_something_of_the_site(cohort):
    """Ridge and logistic regression on measures of regions, fitted on the training set."""
    found = discover_any(cohort, modality="roi_desikan").table
    tables = {path: read_features(cohort / path).values for path in found["image"].unique()}
    features = np.stack([tables[path][frame] for path, frame in zip(found["image"], found["frame"])])
    age, site = found["age"].to_numpy(float), found["site"].to_numpy(str)
    train, seen, unseen = ((found["split"] == name).to_numpy() for name in ("train", "internal_test", "external_test"))
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13))).fit(features[train], age[train])
    for held_out, share in ((seen, 0.75), (unseen, 0.9)):
        error = np.abs(ridge.predict(features[held_out]) - age[held_out]).mean()
        assert 3 < error < share * np.abs(age[held_out] - np.median(age[train])).mean()
    where = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(features[train], site[train])
    from_images = balanced_accuracy_score(site[seen], where.predict(features[seen]))
    powers = np.stack([age, age**2, age**3], axis=1)
    alone = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(powers[train], site[train])
    from_age = balanced_accuracy_score(site[train], alone.predict(powers[train]))
    assert from_images > from_age + 0.15
    assert from_age > 1 / 6 + 0.05


def test_the_template_keeps_the_grey_matter(cohort):
    inside, _ = read_mask(cohort / MASK, 0.05)
    maps = np.stack([np.load(path)[0] for path in sorted(cohort.glob("*/derivatives/sub-*/ses-1/*gm_T1w.npy"))[:20]])
    assert 0.1 < inside.mean() < 0.6
    assert maps[:, inside].sum() > 0.98 * maps.sum()
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_a_person_depends_on_the_seed_and_a_site_on_its_number(tmp_path):
    roots = [tmp_path / name for name in ("a", "b", "c")]
    for root, seed in zip(roots, (0, 0, 1)):
        generate(root, n_subjects=4, seed=seed, shape=(16, 18, 17), sites=2, external_sites=1, arrays=["quasiraw"])
    files = [sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in roots]
    assert files[0] == files[1]
    assert all((roots[0] / name).read_bytes() == (roots[1] / name).read_bytes() for name in files[0])
    tables = [pd.read_csv(root / "participants.tsv", sep="\t") for root in roots]
    assert not tables[0]["age"].equals(tables[2]["age"])
    assert np.load(next(roots[0].glob("train/derivatives/sub-*/ses-1/*quasiraw_T1w.npy"))).shape == (1, 16, 18, 17)
    few, many = draw_centres(Settings(sites=2, external_sites=1)), draw_centres(Settings(sites=40, external_sites=0))
    assert few == many[:3]
    assert len({centre.site for centre in many}) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (8, 32, 32)}, "shape"),
        ({"sites": 0}, "sites"),
        ({"external_share": 1.0}, "external_share"),
        ({"arrays": ("t2",)}, "arrays"),
        ({"arrays": (), "regions": "none"}, "nothing would be written"),
        ({"siets": 3}, "unknown setting"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()


def test_its_settings_belong_to_its_kind(tmp_path):
    with pytest.raises(ConfigError, match="belong to the kind openbhb"):
        synthetic.generate(tmp_path / "none", "brain", external_sites=2)
