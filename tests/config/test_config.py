"""The configuration of a run: mistakes named with their place, YAML that runs nothing, --set, rules across sections."""

import copy
from pathlib import Path

import pytest
import yaml

from medssl.config import FinetuneConfig, PretrainConfig, dump_config, load_any, load_config
from medssl.config.load import apply_override
from medssl.core.errors import ConfigError
from medssl.core.files import parse_yaml
from medssl.methods import METHODS

ROOT = Path(__file__).parents[2]
PRETRAIN = {
    "name": "run",
    "data": {"manifest": "manifest.csv"},
    "items": {"geometry": "slice", "partitions": 4},
    "model": {"encoder": {"name": "unet2d"}},
    "method": {"name": "gcl", "strategy": "gd"},
    "sampler": {"name": "partition"},
    "views": {"n_views": 3, "original": True, "preset": "gcl"},
    "training": {"steps": 1},
}
LCL = {
    **PRETRAIN,
    "method": {"name": "lcl"},
    "sampler": {"name": "random"},
    "views": {"n_views": 2, "preset": "intensity"},
    "model": {"encoder": {"name": "unet2d"}, "decoder_blocks": 3},
}
FINETUNE = {
    "name": "run",
    "data": {"manifest": "manifest.csv"},
    "items": {"geometry": "volume"},
    "model": {"encoder": {"name": "unet3d"}},
    "task": {"name": "segmentation"},
    "views": {"n_views": 1, "preset": "segmentation"},
    "training": {"steps": 1},
}


@pytest.fixture
def load(tmp_path):
    def load(values, overrides=(), model=PretrainConfig):
        path = tmp_path / "run.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return load_config(model, path, overrides)

    return load


def with_value(values, key, value):
    changed = copy.deepcopy(values)
    apply_override(changed, f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return changed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_validates_and_says_how_far_it_was_tried(path):
    config = load_any(path)
    tried = config.status
    known = ("layout-tested on generated data", "run on real data", "settings ours", "settings of the paper; not run")
    assert tried.startswith(known)
    if config.kind == "pretrain":
        assert config.notes == []


@pytest.mark.parametrize("folder", ["generic", "hippocampus"])
def test_there_is_a_recipe_for_every_method(folder):
    recipes = [load_any(path) for path in (ROOT / "configs" / folder).glob("*.yaml")]
    assert {recipe.method.name for recipe in recipes if recipe.kind == "pretrain"} == set(METHODS)


def test_the_examples_of_this_file_are_valid(load):
    assert load(PRETRAIN).method.name == "gcl"
    assert load(LCL).method.name == "lcl"
    assert load(FINETUNE, model=FinetuneConfig).task.name == "segmentation"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("method.temperatur", "temperature"), ("data.manifets", "manifest"), ("trainig", "training"),
     ("views.augment", None), ("model.encoder.widhts", "widths"), ("sampler.n_volume", "n_volumes"),
     ("data.prepare.spacings", "spacing")],
)  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest_known_one(load, key, nearest):
    if nearest is None:  # a key that is known, but not beside a preset
        with pytest.raises(ConfigError, match="preset or augment, not both"):
            load(with_value(PRETRAIN, key, {}))
        return
    with pytest.raises(ConfigError) as caught:
        load(with_value(PRETRAIN, key, 1))
    place = key.split(".")[-1]
    assert f"{place}: unknown key. Did you mean `{nearest}`?" in str(caught.value)


def test_several_mistakes_are_reported_at_once(load):
    values = {**PRETRAIN, "seed": -1, "extra": 1, "training": {"steps": 0}}
    del values["name"]
    with pytest.raises(ConfigError) as caught:
        load(values)
    message = str(caught.value)
    for part in ("name: required, but missing", "seed:", "extra: unknown key", "training.steps:", "run.yaml"):
        assert part in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [("method.name", "gcll", "Did you mean `gcl`?"), ("sampler.name", "partitoin", "Did you mean `partition`?"),
     ("model.encoder.name", "unet4d", "unknown name `unet4d`"), ("method.strategy", "gd--", "strategy"),
     ("method.name", None, "method.name")],
)  # fmt: skip
def test_a_union_is_told_apart_by_its_name(load, key, value, part):
    with pytest.raises(ConfigError) as caught:
        load(with_value(PRETRAIN, key, value))
    assert part in str(caught.value)


def test_a_section_without_a_name_is_asked_for_it(load):
    with pytest.raises(ConfigError, match=r"method\.name: required, but missing"):
        load({**PRETRAIN, "method": {"temperature": 0.1}})


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("method.temperature=0.2", lambda c: c.method.temperature == 0.2),
        ("training.steps=7", lambda c: c.training.steps == 7),
        ("data.prepare.spacing=[1, 1, null]", lambda c: c.data.prepare.spacing == (1, 1, None)),
        ("data.prepare={n4: true}", lambda c: c.data.prepare.n4),
        ("data.splits=", lambda c: c.data.splits is None),
        ("name=a=b", lambda c: c.name == "a=b"),
        ("data.map.group=person", lambda c: c.data.map == {"group": "person"}),
        ("optimizer.learning_rate=1.0e-4", lambda c: c.optimizer.learning_rate == 1e-4),
    ],
)
def test_set_overrides_one_value_read_as_yaml(load, override, read):
    assert read(load(PRETRAIN, [override]))


def test_only_true_and_false_are_truth_values():
    """YAML 1.1 reads the key `on` as true, and a site called NO as false."""
    read = parse_yaml("{on: h, sites: [NO, yes, off], n4: true, other: False}", source="test")
    assert read == {"on": "h", "sites": ["NO", "yes", "off"], "n4": True, "other": False}


def test_set_reaches_into_lists(load):
    arms = {"grid": {"arms": [{"name": "scratch"}, {"name": "b", "weights": "x"}]}}
    config = load({**FINETUNE, **arms}, ["grid.arms.1.weights=runs/y"], model=FinetuneConfig)
    assert config.grid.arms[1].weights == Path("runs/y")
    assert config.grid.arms[0].weights is None
    with pytest.raises(ConfigError, match="use 0 to 1"):
        load({**FINETUNE, **arms}, ["grid.arms.2.weights=runs/y"], model=FinetuneConfig)


@pytest.mark.parametrize(
    ("override", "part"),
    [("method.temperature", "KEY=VALUE"), ("=1", "KEY=VALUE"), ("method..x=1", "KEY=VALUE"),
     ("seed.deep=1", "`seed` is a single value"), ("method.temprature=1", "Did you mean `temperature`?"),
     ("data.prepare={n4: [}", "not valid YAML"), ("method.temperature=hot", "method.gcl.temperature")],
)  # fmt: skip
def test_a_wrong_set_is_refused(load, override, part):
    with pytest.raises(ConfigError) as caught:
        load({**PRETRAIN, "seed": 1}, [override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: !!python/object/apply:os.system ['touch broken']", "constructor"),
        ("name: !!python/name:os.system", "constructor"),
        ("a: &a [1]\nb: *a", "aliases"),
        ("name: a\nname: b", "duplicate key `name`"),
        ("? [1, 2]\n: 3", "keys must be plain"),
        ("name: [", "line 1"),
        ("- a list", "a configuration is a mapping"),
        ("just text", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_yaml_that_is_not_plain_values_is_refused(load, tmp_path, monkeypatch, text, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert part in str(caught.value)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(load, value):
    with pytest.raises(ConfigError, match="temperature"):
        load(PRETRAIN, [f"method.temperature={value}"])


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_any(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_any(tmp_path / "binary.yaml")


def test_the_kind_of_a_file_is_read_or_told_from_its_sections(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FINETUNE))
    assert isinstance(load_any(path), FinetuneConfig)
    path.write_text(yaml.safe_dump(PRETRAIN))
    assert isinstance(load_any(path), PretrainConfig)
    path.write_text(yaml.safe_dump({**PRETRAIN, "kind": "pretrian"}))
    with pytest.raises(ConfigError, match="Did you mean `pretrain`"):
        load_any(path)


@pytest.mark.parametrize("values", [PRETRAIN, LCL, FINETUNE])
def test_what_is_written_into_a_run_reads_back_the_same(load, tmp_path, values):
    model = FinetuneConfig if "task" in values else PretrainConfig
    config = load(values, model=model)
    assert load(dump_config(config), model=model) == config


@pytest.mark.parametrize(
    ("base", "overrides", "part"),
    [
        (PRETRAIN, ["sampler={name: random}"], "needs the sampler partition, not `random`"),
        (PRETRAIN, ["items.partitions=null"], "items.partitions: required"),
        (PRETRAIN, ["method.strategy=gr", "views={n_views: 2}", "items.partitions=null"], "items.partitions: required"),
        (PRETRAIN, ["views.n_views=2"], "needs views.n_views: 3"),
        (PRETRAIN, ["views={n_views: 3, preset: gcl}"], "needs views.original: true"),
        (PRETRAIN, ["model.decoder_blocks=3"], "trains no decoder: remove model.decoder_blocks"),
        (LCL, ["model.decoder_blocks=null"], "trains a decoder: set model.decoder_blocks"),
        (LCL, ["views.preset=gcl"], "changes? intensities only"),
        (LCL, ["method.strategy=ld"], "needs the sampler partition or partition_pairs"),
        (
            PRETRAIN,
            ["items.geometry=volume", "items.partitions=null"],
            "gives 3D items, but model.encoder `unet2d` is 2D",
        ),
        (PRETRAIN, ["items.geometry=slab"], "depth is the number of slices of a slab"),
        (PRETRAIN, ["items.geometry=volume"], "lies in no partition"),
        (
            PRETRAIN,
            ["views={n_views: 3, original: true, augment: {flip: {axes: [2]}}}"],
            "an axis that the images do not",
        ),
        (PRETRAIN, ["training={steps: 1, seconds: 1}"], "either as steps or as seconds"),
        (PRETRAIN, ["model.encoder={name: unet2d, preset: gcl, widths: [4, 8]}"], "preset gcl fixes widths"),
        (PRETRAIN, ["model.encoder.strides=[[2, 2]]"], "6 levels need 5 entries"),
        (FINETUNE, ["evaluate_on=train"], "one of data.splits, which are trained on"),
        (FINETUNE, ["views.n_views=2"], "set views.n_views: 1"),
        (FINETUNE, ["grid.arms=[{name: a}, {name: a}]"], "names of their own"),
        (FINETUNE, ["grid.arms=[{name: ../a}]"], "grid.arms.0.name"),
        (FINETUNE, ["training.devices=2"], "one process; set both to 1, and grid.jobs"),
        (FINETUNE, ["inference.window=[16, 16]"], "inference.window: give 3 lengths"),
        (FINETUNE, ["data.splits=[]"], "data.splits"),
        (FINETUNE, ["grid.arms=[]"], "grid.arms"),
        (FINETUNE, ["grid.n_labelled=[]"], "grid.n_labelled"),
        (FINETUNE, ["grid.seeds=[]"], "grid.seeds"),
        (FINETUNE, ["grid={n_labelled: [1, 2], draws: {1: 5}}"], r"one for each of n_labelled \[1, 2\]"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(load, base, overrides, part):
    with pytest.raises(ConfigError, match=part):
        load(base, overrides, model=FinetuneConfig if base is FINETUNE else PretrainConfig)


def test_every_unmet_need_of_a_method_is_named_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load(PRETRAIN, ["method={name: lcl, strategy: ld}", "sampler={name: random}", "items.partitions=null"])
    for part in ("sampler", "items.partitions", "views.original", "intensities only", "model.decoder_blocks"):
        assert part in str(caught.value)


def test_draws_may_differ_between_numbers_of_labels(load):
    config = load(FINETUNE, ["grid={n_labelled: [1, 8], draws: {1: 5, 8: 3}}"], model=FinetuneConfig)
    assert [config.grid.n_draws(n) for n in (1, 8)] == [5, 3]
    assert load(FINETUNE, ["grid={draws: 4}"], model=FinetuneConfig).grid.n_draws(2) == 4


def test_an_encoder_without_maps_for_a_decoder_is_refused_where_one_is_trained(load):
    with pytest.raises(ConfigError, match="method `lcl` trains a decoder, which model.encoder `resnet18_2d`"):
        load(with_value(LCL, "model.encoder", {"name": "resnet18_2d"}))
    with pytest.raises(ConfigError, match="task `segmentation` .* use unet2d or unet3d"):
        load(with_value(FINETUNE, "model.encoder", {"name": "densenet121_3d"}), model=FinetuneConfig)
    assert load(with_value(PRETRAIN, "model.encoder", {"name": "resnet18_2d"})).model.encoder.stem_stride == 2


def test_a_schedule_that_never_falls_is_said_so(load):
    config = load(PRETRAIN, ["training.steps=20", "schedule={name: cosine, warmup_steps: 20}"])
    assert "never falls" in config.schedule_note
    for fine in ("{name: cosine, warmup_steps: 19}", "{name: constant, warmup_steps: 20}"):
        assert load(PRETRAIN, ["training.steps=20", f"schedule={fine}"]).schedule_note is None


def test_views_that_a_method_does_not_look_at_are_said_so(load):
    three = with_value(PRETRAIN, "views", {"n_views": 3})
    three = with_value(three, "sampler", {"name": "random"})
    (note,) = load(with_value(three, "method", {"name": "simclr"})).notes
    assert "looks at 2 of the 3 views" in note
    assert "views.n_views: 2" in note
    assert load(with_value(three, "method", {"name": "sela"})).notes == []


@pytest.mark.parametrize("schedule", ["{name: constant, final_fraction: 0.1}", "{name: cosine, gamma: 0.5}"])
def test_settings_of_another_schedule_are_refused(load, schedule):
    with pytest.raises(ConfigError, match="does nothing"):
        load(PRETRAIN, [f"schedule={schedule}"])
