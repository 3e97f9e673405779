"""Every recipe for cohorts with label maps, shortened, on small cohorts laid out as the real ones."""

import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from layouts import MMWHS_VALUES, write_acdc, write_mmwhs, write_msd
from safetensors.torch import load_file
from typer.testing import CliRunner

from medssl.cli.main import app
from medssl.config import load_any
from medssl.core.errors import DataError
from medssl.data.cohorts.facts import read_facts
from medssl.data.items import ItemReader, build_items
from medssl.data.manifest import Manifest, ManifestMeta
from medssl.data.splits import label_draws, with_published_splits
from medssl.runs import cohort
from medssl.runs.finetune import CellRunner, build_task, finetune, plan_cells, plan_draws
from medssl.runs.pretrain import open_training, pretrain
from medssl.runs.volumes import in_splits, open_cohort
from medssl.samplers import FewLabelSampler
from medssl.training import BatchSource

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PUBLISHED = ("acdc", "prostate", "mmwhs")
SEGMENTED = (*PUBLISHED, "hippocampus")
PLANS = {"hippocampus/comparison"}  # of many runs: tests of compare
RECIPES = sorted({f"{name}/{path.stem}" for name in SEGMENTED for path in (CONFIGS / name).glob("*.yaml")} - PLANS)
BELOW_ZERO = ("align_uniform", "decoupled_uniformity", "iic_segmentation")  # losses that are 0 or less from the start
SHORT = ("training.steps=2", "training.accelerator=cpu", "training.workers=0", "data.jobs=1")
IN_PLANE = "data.prepare.size=[64, 64, null]"
NARROW = "model.encoder={name: unet2d, widths: [4, 4, 8, 8, 8], norm: batch, strides: [[2,2],[2,2],[2,2],[2,2]]}"
# Six people by the numbers that end their ids, as short as lists can be.
LISTS = """role,n_labelled,draw,subjects
labelled,1,1,{0}
validation,1,1,{1} {2}
unlabelled,,,{0} {1} {3} {4}
test,1,,{5}
"""
IDS = {
    "acdc": [f"patient00{n}" for n in range(1, 7)],
    "prostate": [f"prostate_00{n}" for n in range(6)],  # three digits; the files have two
    "mmwhs": [f"mr_train_100{n}" for n in range(1, 7)],
}


def path_of(recipe):
    return CONFIGS / f"{recipe}.yaml"


def scan_command(recipe):
    """The command that the head of a recipe tells people to run first."""
    return re.search(r"^#   medssl (data scan .*)$", path_of(recipe).read_text(), re.MULTILINE).group(1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with DATA/ in it, as the recipes name it, and a short list of ids per cohort."""
    folder = tmp_path_factory.mktemp("recipes")
    data = folder / "DATA"
    write_acdc(data / "acdc", n_training=6, n_testing=1)
    counts = {"prostate": 8, "hippocampus": 120}  # more than any recipe has clusters or rows in a queue
    tasks = {name: [f"{name}_{n:02d}" for n in range(count)] for name, count in counts.items()}
    write_msd(
        data / "Task05_Prostate",
        "Prostate",
        ("T2", "ADC"),
        ("background", "PZ", "TZ"),
        tasks["prostate"][:6],
        tasks["prostate"][6:],
    )
    write_mmwhs(data / "mmwhs", n=6)
    labels = ("background", "Anterior", "Posterior")
    write_msd(data / "hippocampus", "Hippocampus", ("MRI",), labels, tasks["hippocampus"], ())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in PUBLISHED:
            (folder / f"{name}.csv").write_text(LISTS.format(*IDS[name]))
            done = CliRunner().invoke(app, shlex.split(scan_command(f"{name}/gcl_gd")))
            assert done.exit_code == 0, done.output
        manifest = data / "hippocampus" / "manifest.csv"
        cohort.scan(data / "hippocampus", manifest, kind="msd", options={}, force=False)
        cohort.split(
            manifest, test=2, validation=1, seed=0, stratify=(), mapping={"group": "subject"}, out=None, force=True
        )
        table = pd.read_csv(manifest)
        table["intensity_group"] = ["uint8", "float-1e3", "float-1e6"] * (len(table) // 3)
        table.to_csv(manifest, index=False)
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def shortened(recipe, *overrides):
    """The recipe with 64 pixels, two steps and the short list of ids."""
    name = recipe.split("/")[0]
    if name in PUBLISHED:
        overrides = (IN_PLANE, f"data.published_splits={name}.csv", *overrides)
        if recipe.endswith("finetune"):
            few = ("grid.n_labelled=[1]", "grid.draws=1", "training.validate_every=2", "batch_size=4")
            overrides = (f"grid.published_draws={name}.csv", *few, *overrides)
    else:
        overrides = (f"data.manifest=DATA/{name}/manifest.csv", "data.map={group: subject}", *overrides)
    return load_any(path_of(recipe), [*SHORT, *overrides])


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_loss_of_every_recipe_is_finite(here, recipe):
    """With the published network; local contrast without the weights that it begins from."""
    # Local contrast begins from weights that only a whole run makes; that is the next test.
    alone = ("weights=null", "method.freeze_encoder=false") if load_any(path_of(recipe)).kind == "pretrain" else ()
    alone = alone if "lcl" in recipe else ()
    config = shortened(recipe, "data.prepare.n4=false", *alone)
    splits = None if config.kind == "pretrain" else (*config.data.splits, config.evaluate_on)
    opened = open_cohort(config.data, slice_axis=config.items.slice_axis, splits=splits)
    if config.kind == "pretrain":
        started = open_training(config, opened)
        method, source = started.method, started.source
    else:
        config = config.model_copy(
            update={"grid": config.grid.model_copy(update={"n_labelled": (1,), "draws": 1, "n_validation": 2})}
        )
        draws = plan_draws(config, opened)
        draw = draws[1, 1]
        runner = CellRunner(config, opened, draws, here)
        cell = plan_cells(config, draws)[0]
        method, _ = build_task(config, opened, runner.arm(cell), cell.seed, draw)
        train = opened.chosen.select(opened.chosen.table["volume"].isin(draw.train).to_numpy(dtype=bool))
        table = build_items(train, opened.store, config.items)
        reader = ItemReader(opened.store, table, config.items)
        sampler = FewLabelSampler(table, seed=0, batch_size=config.batch_size)
        source = BatchSource(sampler, reader, config.views, seed=config.seed, workers=0)
    source.place("cpu", 0, 1)
    with torch.no_grad():  # gradients of every method are looked at in tests/methods; the published network is large
        loss = method.training_loss(source.batch(0)).loss
    assert torch.isfinite(loss)
    if config.kind != "pretrain" or config.method.name not in BELOW_ZERO:
        assert loss.item() > 0.05  # something is left to learn


def run_chain(name, globally, locally, *settings):
    """Global contrast, local contrast from its weights, fine-tuning from both; returns all three."""
    first = pretrain(shortened(f"{name}/{globally}", NARROW, *settings))
    second = pretrain(shortened(f"{name}/{locally}", NARROW, f"weights={first.folder}", *settings))
    arms = [f"grid.arms.1.weights={first.folder}", f"grid.arms.2.weights={second.folder}"]
    bound = f"grid.upper_bound={str(name == 'acdc').lower()}"
    return first, second, finetune(shortened(f"{name}/finetune", NARROW, *arms, bound, *settings))


@pytest.mark.parametrize(
    ("name", "globally", "locally"),
    [("acdc", "gcl_gd", "lcl_lr"), ("prostate", "gcl_gd-minus", "lcl_ld"), ("mmwhs", "gcl_gr", "lcl_lr")],
)
def test_pretraining_and_fine_tuning_run_end_to_end(here, monkeypatch, name, globally, locally):
    if name != "acdc":  # drawing figures takes most of the time of runs this short; one cohort shows that it works
        monkeypatch.setattr("medssl.runs.pretrain.build_report", lambda folder: None)
        monkeypatch.setattr("medssl.runs.finetune.build_report", lambda folder: None)
    # N4 is the other slow part, and the same for all.
    first, second, tuned = run_chain(name, globally, locally, f"data.prepare.n4={str(name == 'prostate').lower()}")
    # The local contrast trains three decoder blocks and leaves the encoder as it got it.
    encoders = [load_file(run.weights / "encoder.safetensors") for run in (first, second)]
    assert all(torch.equal(encoders[1][key], value) for key, value in encoders[0].items())
    assert (second.weights / "decoder.safetensors").is_file()
    assert not (first.weights / "decoder.safetensors").exists()
    assert [row["arm"] for row in tuned.summary["table"]] == ["scratch", "gcl_gd", "gcl_gd+lcl_lr"]
    assert all(np.isfinite(row["mean"]) for row in tuned.summary["table"])
    assert (tuned.summary["upper_bound"] is not None) == (name == "acdc")
    assert (tuned.folder / "report.html").is_file() == (name == "acdc")
    # Pretraining saw the unlabelled people, testing the one test person; nobody is in both.
    seen, tested = (set(pd.read_csv(run.folder / "manifest.csv")["subject"]) for run in (first, tuned))
    assert len(seen) == 4
    scores = pd.read_csv(tuned.folder / "eval" / "per_case.csv")
    assert scores["subject"].nunique() == 1
    assert not seen & set(scores["subject"])
    assert tested >= seen
    check_predictions(tuned.folder, name)


def check_predictions(folder, name):
    """Predicted label maps lie on the grid of their image and hold the values of the label files."""
    table = pd.read_csv(folder / "manifest.csv").query("split == 'test'")
    predictions = sorted((folder / "predictions" / "scratch-n1-draw1-seed0").glob("*.nii.gz"))
    assert len(predictions) == len(table) == (2 if name == "acdc" else 1)
    values = set(MMWHS_VALUES) if name == "mmwhs" else {0, 1, 2, 3}
    for path, label in zip(predictions, table["label"]):
        predicted, truth = nibabel.load(path), nibabel.load(label)
        assert predicted.shape == truth.shape
        assert set(np.unique(np.asarray(predicted.dataobj)).tolist()) <= values


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.split("/")[0] in PUBLISHED])
def test_recipe_holds_the_published_numbers(recipe):
    name = recipe.split("/")[0]
    config, facts = load_any(path_of(recipe)), read_facts(ROOT / "data_manifests" / f"{name}.yaml")
    assert config.data.prepare.model_copy(update={"label_values": facts.prepare.label_values}) == facts.prepare
    assert config.data.published_splits == Path("data_manifests") / facts.splits.file
    assert config.items.partitions in (None, facts.partitions)
    assert config.status == facts.status
    assert config.model.encoder.preset == "gcl"
    assert (config.optimizer.name, config.optimizer.learning_rate, config.training.steps) == ("adam", 1e-3, 10_001)
    assert (config.schedule.name, config.training.precision) == ("constant", "32")
    if config.kind == "finetune":
        task = config.task
        assert (task.dice_weight, task.cross_entropy_weight, task.include_background) == (1.0, 0.0, True)
        assert (config.batch_size, config.training.validate_every, config.evaluate_on) == (20, 50, "test")
        assert config.grid.published_draws == config.data.published_splits
        return
    assert config.method.temperature == 0.1
    sampler = config.sampler
    assert (sampler.batch_size if sampler.name == "random" else sampler.n_volumes * config.items.partitions) == 12
    if config.method.name == "lcl":
        assert (config.model.decoder_blocks, config.method.regions, config.method.region_size) == (3, "full", 3)
        assert config.method.n_negatives == {"lr": 5, "ld": 4}[config.method.strategy]
        assert config.weights == Path(f"runs/{name}_gcl_gd")
    else:
        assert (config.method.hidden_dim, config.method.projection_dim, config.method.pool) == (1024, 128, "flatten")


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_runs_that_recipes_share_are_right(name):
    made = {f"runs/{load_any(path).name}" for path in (CONFIGS / name).glob("*.yaml")}
    tune = load_any(CONFIGS / name / "finetune.yaml")
    used = {str(arm.weights) for arm in tune.grid.arms if arm.weights}
    assert len(made) == 6
    assert used <= made


def whole_cohort(name):
    """A manifest that holds every id of the real cohort, named as its files are."""
    subjects = {
        "acdc": [f"patient{n:03d}" for n in range(1, 151)],
        "prostate": [f"prostate_{n:02d}" for n in range(48)],
        "mmwhs": [f"mr_train_{n}" for n in range(1001, 1021)],
    }[name]
    frames = 2 if name == "acdc" else 1
    rows = [{"subject": s, "image": f"{s}{k}.nii", "label": f"{s}{k}_gt.nii"} for s in subjects for k in range(frames)]
    table = pd.DataFrame(rows).assign(split="train")
    table = table.assign(group=table["subject"], volume=range(len(table)), case=table["image"])
    return Manifest(table, ManifestMeta(), Path("manifest.csv"))


@pytest.mark.parametrize(
    ("name", "unlabelled", "train", "test", "cleaned"),
    [("acdc", 52, 28, 20, 51), ("prostate", 17, 0, 15, 11), ("mmwhs", 10, 0, 10, 4)],
)
def test_published_lists_divide_the_whole_cohort(name, unlabelled, train, test, cleaned):
    manifest = whole_cohort(name)
    config = load_any(CONFIGS / name / "finetune.yaml")
    divided = with_published_splits(manifest, ROOT / config.data.published_splits)
    people = divided.table.groupby("split")["subject"].nunique().to_dict()
    assert people == {"unlabelled": unlabelled, "test": test, **({"train": train} if train else {})}
    clean = with_published_splits(manifest, ROOT / "data_manifests" / "splits" / f"{name}_clean.csv")
    assert clean.table.query("split == 'unlabelled'")["subject"].nunique() == cleaned
    assert manifest.table["split"].eq("train").all()  # the manifest that was given stays what it was
    pool = in_splits(divided, config.data.splits)
    for n in config.grid.n_labelled:
        draws = label_draws(
            pool,
            n_labelled=[n],
            draws=config.grid.n_draws(n),
            n_validation=config.grid.n_validation,
            published=ROOT / config.grid.published_draws,
        )
        assert [one.draw for one in draws] == list(range(1, {("mmwhs", 2): 4}.get((name, n), 3 if n == 8 else 5) + 1))
        assert all(len(set(one.train)) == n * (2 if name == "acdc" else 1) for one in draws)
        assert not any(set(one.train) & set(one.validation) for one in draws)


def test_lists_that_test_on_people_they_train_on_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text(LISTS.format(*IDS["mmwhs"][:5], IDS["mmwhs"][0]))
    with pytest.raises(DataError, match="listed for training too") as caught:
        with_published_splits(whole_cohort("mmwhs"), tmp_path / "list.csv")
    assert caught.value.found == IDS["mmwhs"][0]
