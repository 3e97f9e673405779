"""`medssl init`: the file that it writes validates, fits the volumes, and runs unchanged."""

import numpy as np
import pandas as pd
import pytest
from layouts import save, voxels

from medssl.config import load_any
from medssl.core.errors import ConfigError, DataError
from medssl.data.cohorts.synthetic import generate
from medssl.data.manifest import read_manifest
from medssl.data.volume import read_volume, write_nifti
from medssl.runs import cohort
from medssl.runs.finetune import finetune
from medssl.runs.init import fit_grid, write_config
from medssl.runs.pretrain import pretrain

SHORT = ["training.steps=2", "training.accelerator=cpu"]


def divide(manifest, **counts):
    cohort.split(
        manifest, **{"test": 2, "validation": 0, **counts}, seed=0, stratify=(), mapping={}, out=None, force=True
    )


def volumes(folder, shapes, spacing, affine=None, **columns):
    """A manifest of images of these shapes."""
    rows = []
    for number, shape in enumerate(shapes):
        save(folder / f"v{number}.nii.gz", voxels(number, shape), spacing, affine=affine)
        rows.append({"subject": f"s{number}", "image": f"v{number}.nii.gz"})
    pd.DataFrame(rows).assign(**columns).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def cardiac(tmp_path_factory):
    """Stacks of 64 x 64 pixels of 2.7 mm and slices of 10 mm."""
    manifest = generate(tmp_path_factory.mktemp("cardiac"), "cardiac", 6, size=64, n_slices=(5, 6))
    divide(manifest)
    return manifest


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """Heads of 24 voxels; their labels are thresholds of themselves."""
    folder = tmp_path_factory.mktemp("brain")
    manifest = generate(folder, "brain", 6, size=24)
    loaded = read_manifest(manifest)
    labels = []
    for volume in loaded.table["volume"]:
        image = read_volume(loaded.image_paths(volume))
        labels.append(f"label{volume}.nii.gz")
        bright = (image.data[0] > np.percentile(image.data, 80)).astype(np.int16)
        write_nifti(folder / labels[-1], bright, image.affine, dtype=np.int16)
    table = pd.read_csv(manifest).assign(label=labels)
    table.to_csv(manifest, index=False)
    divide(manifest)
    return manifest


def test_thick_slices_are_taken_in_2d_and_run_unchanged(cardiac, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = write_config("pretrain", cardiac, None)
    assert "2D slices along axis 2" in outcome.text()
    config = load_any(tmp_path / "pretrain.yaml", SHORT)
    assert config.items.geometry == "slice"
    assert config.items.partitions == 4
    assert config.model.encoder.name == "unet2d"
    assert config.model.encoder.strides == ((2, 2),) * 4
    assert config.data.prepare.size[2] is None
    assert config.data.prepare.size[0] % 16 == 0
    assert config.data.splits == ("train",)
    done = pretrain(config)
    assert (done.weights / "encoder.safetensors").is_file()

    write_config("finetune", cardiac, None)
    short = [*SHORT, "training.validate_every=2", "grid.draws=1", "grid.upper_bound=false", "grid.n_labelled=[1]"]
    arms = f"grid.arms=[{{name: scratch}}, {{name: pretrained, weights: {done.folder}}}]"
    tuned = finetune(load_any(tmp_path / "finetune.yaml", [*short, arms]))
    assert [row["arm"] for row in tuned.summary["table"]] == ["scratch", "pretrained"]


def test_even_voxels_are_taken_in_3d_and_run_unchanged(brain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ": 3D" in write_config("pretrain", brain, None, mapping={"group": "subject"}).text()
    config = load_any(tmp_path / "pretrain.yaml", [*SHORT, "model.encoder.widths.0=4"])
    assert config.items.geometry == "slab"
    assert config.data.map == {"group": "subject"}
    assert config.items.depth <= config.data.prepare.size[config.items.slice_axis]
    done = pretrain(config)

    write_config("finetune", brain, None)
    tune = load_any(tmp_path / "finetune.yaml")
    assert tune.items.geometry == "volume"
    assert tune.model.encoder == load_any(tmp_path / "pretrain.yaml").model.encoder
    assert tune.data.prepare == config.data.prepare
    short = [*SHORT, "training.validate_every=2", "grid.draws=1", "grid.upper_bound=false", "grid.n_labelled=[1]"]
    arms = f"grid.arms=[{{name: pretrained, weights: {done.folder}}}]"
    tuned = finetune(load_any(tmp_path / "finetune.yaml", [*short, arms, "model.encoder.widths.0=4"]))
    assert len(tuned.summary["table"]) == 1


def test_the_number_of_labels_fits_the_labelled_groups(cardiac, tmp_path):
    write_config("finetune", cardiac, tmp_path / "f.yaml")
    grid = load_any(tmp_path / "f.yaml").grid
    assert (grid.n_labelled, grid.n_validation) == ((1, 2), 2)  # 4 groups train: 2 validate, 2 are left


@pytest.mark.parametrize(
    ("shape", "spacing", "geometry", "axis", "partitions"),
    [
        ((40, 40, 3), (1.0, 1.0, 8.0), "slice", 2, 3),
        ((40, 40, 12), (1.0, 1.0, 8.0), "slice", 2, 4),
        ((6, 40, 40), (5.0, 1.0, 1.0), "slice", 0, 4),
        ((40, 40, 20), (1.0, 1.0, 2.5), "slab", 2, 4),
        ((24, 40, 24), (1.0, 1.0, 1.0), "slab", 1, 4),
        ((24, 24, 24), (1.0, 1.0, 1.0), "slab", 2, 4),
        ((40, 40, 1), (1.0, 1.0, 8.0), "slice", 2, 0),
    ],
)
def test_geometry_follows_spacing_and_partitions_the_slices(tmp_path, shape, spacing, geometry, axis, partitions):
    manifest = volumes(tmp_path, [shape, shape], spacing)
    grid, notes = fit_grid(read_manifest(manifest))
    assert (grid.geometry, grid.slice_axis, grid.partitions) == (geometry, axis, partitions)
    assert not notes
    write_config("pretrain", manifest, tmp_path / "p.yaml")
    assert (load_any(tmp_path / "p.yaml").method.strategy == "gd") == (partitions > 1)


def test_axes_of_a_file_that_is_not_in_ras_order_are_followed(tmp_path):
    affine = np.zeros((4, 4))  # sagittal slices: the file's third axis is left-right
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 1.0, 1.0, 6.0, 1.0
    write_nifti(tmp_path / "v.nii.gz", voxels(0, (40, 48, 7)), affine, dtype=np.int16)
    (tmp_path / "manifest.csv").write_text("subject,image\na,v.nii.gz\n")
    grid, _ = fit_grid(read_manifest(tmp_path / "manifest.csv"))
    assert (grid.geometry, grid.slice_axis, grid.n_slices) == ("slice", 0, 7)
    assert grid.size == (None, 40, 48)
    assert grid.spacing == (None, 1.0, 1.0)


def test_the_grid_holds_all_but_the_largest_volumes_and_says_so(tmp_path):
    shapes = [(20, 20, 8)] * 39 + [(50, 50, 8)]
    manifest = volumes(tmp_path, shapes, (1.0, 1.0, 5.0))
    grid, notes = fit_grid(read_manifest(manifest))
    assert grid.size[:2] == (20, 20)
    assert grid.n_cropped == 1
    assert "1 volumes are larger" in notes[0]


def test_without_a_split_all_volumes_pretrain_and_nothing_is_fine_tuned(tmp_path):
    manifest = volumes(tmp_path, [(20, 20, 8)] * 3, (1.0, 1.0, 5.0))
    write_config("pretrain", manifest, tmp_path / "p.yaml")
    assert load_any(tmp_path / "p.yaml").data.splits is None
    with pytest.raises(DataError, match="medssl data split"):
        write_config("finetune", manifest, tmp_path / "f.yaml")
    assert not (tmp_path / "f.yaml").exists()


def test_an_existing_file_is_only_replaced_when_asked(cardiac, tmp_path):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="not touched"):
        write_config("pretrain", cardiac, out)
    assert out.read_text() == "mine"
    write_config("pretrain", cardiac, out, force=True)
    assert load_any(out).kind == "pretrain"


@pytest.mark.parametrize(
    ("columns", "part"),
    [({"split": ["train", "train", "test"]}, "no volume of the splits test and validation has a label"),
     ({"split": ["train", "test", "test"], "label": "l.nii.gz"}, "two groups at least")],
)  # fmt: skip
def test_too_few_labels_are_refused(tmp_path, columns, part):
    manifest = volumes(tmp_path, [(20, 20, 8)] * 3, (1.0, 1.0, 5.0), **columns)
    with pytest.raises(DataError, match=part):
        write_config("finetune", manifest, tmp_path / "f.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no manifest"):
        write_config("pretrain", tmp_path / "manifest.csv", tmp_path / "p.yaml")
    manifest = volumes(tmp_path, [(20, 20, 8)] * 3, (1.0, 1.0, 5.0))
    (tmp_path / "v1.nii.gz").write_bytes(b"no volume")
    assert "v1.nii.gz" in write_config("pretrain", manifest, tmp_path / "p.yaml").text()
    for number in (0, 2):
        (tmp_path / f"v{number}.nii.gz").unlink()
    with pytest.raises(DataError, match="no volume of the manifest can be read"):
        write_config("pretrain", manifest, tmp_path / "p.yaml", force=True)
    with pytest.raises(ConfigError, match="no configuration for `predict`"):
        write_config("predict", manifest, None)


def test_names_that_yaml_would_read_otherwise_are_quoted(tmp_path):
    folder = tmp_path / "a: b # c"
    folder.mkdir()
    manifest = volumes(folder, [(20, 20, 8)] * 2, (1.0, 1.0, 5.0))
    write_config("pretrain", manifest, tmp_path / "p.yaml")
    config = load_any(tmp_path / "p.yaml")
    assert config.data.manifest == manifest
    assert config.name == "a_b_c_gcl"
