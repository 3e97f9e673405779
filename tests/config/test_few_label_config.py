"""Plans of few-label comparisons: what each arm's pretrainings and fine-tunings are, and what is refused."""

import copy

import pytest

from medssl.config import CompareConfig, dump_config, load_any
from medssl.core.errors import ConfigError
from medssl.core.schema import validate

SIMCLR = {"name": "simclr"}
STAGES = [
    {"method": {"name": "gcl"}, "sampler": {"name": "partition", "n_volumes": 2},
     "items": {"geometry": "slab", "depth": 8, "partitions": 4}, "views": {"n_views": 3, "original": True}},
    {"method": {"name": "lcl"}, "views": {"preset": "intensity"}, "optimizer": {"learning_rate": 0.5}},
]  # fmt: skip
PLAN = {
    "name": "plan",
    "data": {"manifest": "manifest.csv"},
    "items": {"geometry": "volume"},
    "model": {"encoder": {"name": "unet3d"}},
    "views": {"augment": {"flip": {"axes": [1]}}},
    "sampler": {"name": "random"},
    "training": {"steps": 100},
    "protocol": {
        "name": "few_label",
        "finetune": {
            "task": {"name": "segmentation"},
            "prepare": {"size": [40, 40, 40]},
            "views": {"preset": "segmentation", "n_views": 1},
            "training": {"seconds": 30},
        },
    },
    "arms": [
        {"name": "simclr", "method": {"name": "simclr"}},
        {"name": "scratch"},
        {"name": "both", "stages": STAGES},
    ],
}  # fmt: skip


def plan(**changes) -> CompareConfig:
    return validate(CompareConfig, {**PLAN, **changes}, source="plan.yaml")


def changed(place: str, value) -> CompareConfig:
    """The plan with one value at a dotted place."""
    values = copy.deepcopy(PLAN)
    at = values
    *path, last = place.split(".")
    for part in path:
        at = at.setdefault(part, {})
    at[last] = value
    return validate(CompareConfig, values, source="plan.yaml")


def staged(**settings) -> list[dict]:
    return [{"name": "both", "stages": [{**stage, **settings} for stage in STAGES]}]


def test_plan_survives_writing_and_its_baseline_is_the_arm_from_scratch(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(dump_config(plan()))
    assert load_any(path) == plan()
    assert plan().baseline == "scratch"
    assert changed("protocol.baseline", "simclr").baseline == "simclr"


def test_stages_take_what_they_do_not_name_from_the_plan():
    config = plan()
    first, second = config.pretrainings(config.arm("both"), "unet3d", 7)
    assert (first.training.steps, second.training.steps, first.seed, second.seed) == (50, 50, 7, 7)
    assert first.items.geometry == "slab"
    assert (first.views.n_views, first.views.original, first.views.augment.flip.axes) == (3, True, (1,))
    assert (second.items.geometry, second.views.preset, second.views.augment) == ("volume", "intensity", None)
    assert (first.optimizer.learning_rate, second.optimizer.learning_rate) == (1e-3, 0.5)
    assert (first.sampler.name, second.sampler.name) == ("partition", "random")
    assert config.pretrainings(config.arm("scratch"), "unet3d", 0) == ()


def test_decoder_blocks_are_those_that_a_method_trains():
    config = plan()
    first, second = config.pretrainings(config.arm("both"), "unet3d", 0)
    assert (first.model.decoder_blocks, second.model.decoder_blocks) == (None, 3)
    config = plan(arms=[{"name": "x", "stages": [{**STAGES[1], "decoder_blocks": 2}]}])
    assert config.pretrainings(config.arm("x"), "unet3d", 0)[0].model.decoder_blocks == 2


@pytest.mark.parametrize(
    ("training", "shares", "expected"),
    [
        ({"steps": 10}, (0.25, 0.75), [2, 8]),
        ({"steps": 3}, (None, None), [2, 1]),
        ({"seconds": 90}, (0.3, 0.7), [27, 63]),
    ],
)
def test_stages_share_the_budget_and_no_more(training, shares, expected):
    stages = [{**stage, "share": share} for stage, share in zip(STAGES, shares, strict=True)]
    config = plan(training=training, arms=[{"name": "both", "stages": stages}])
    found = [one.training for one in config.pretrainings(config.arm("both"), "unet3d", 0)]
    name = next(iter(training))
    assert [getattr(one, name) for one in found] == pytest.approx(expected)
    assert sum(getattr(one, name) for one in found) == pytest.approx(training[name])


def test_fine_tuning_is_the_same_for_every_arm():
    config = changed("protocol.more_encoders", {"wide": {"name": "unet3d", "widths": [8, 16]}})
    tuning = config.finetuning("wide", (3,), {"both": None})
    assert tuning.model.encoder.widths == (8, 16)
    assert (tuning.data.prepare.size, tuning.training.seconds, tuning.grid.seeds) == ((40, 40, 40), 30, (3,))
    assert (tuning.data.splits, tuning.items.geometry) == (("train",), "volume")
    assert list(config.encoders) == ["unet3d", "wide"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [{"name": "a", "method": {"name": "mocco"}}]}, r"arm 0 \(`a`\).*`mocco`. Did you mean `moco`"),
        ({"arms": [{"name": "b", "stages": [{"method": {"name": "simclrr"}}]}]}, r"arm 0 \(`b`\).*mean `simclr`"),
        ({"arms": [{"name": "upper_bound"}]}, "taken by the training on every label"),
        ({"arms": [{"name": "a", "method": {"name": "simclr"}, "steps": 9}]}, r"arms.0 \(a\): steps: .*same budget"),
        ({"arms": [{"name": "a", "method": SIMCLR, "combat": {"on": "z"}}]}, "only for the protocol age_site"),
        ({"arms": [{"name": "a", "method": {"name": "simclr"}, "stages": STAGES}]}, "name it in each of `stages`"),
        ({"arms": staged(share=0.6)}, "the shares are 1.2 together"),
        ({"arms": [{"name": "a", "stages": [{**STAGES[0], "share": 0.5}, STAGES[1]]}]}, "every stage a share, or none"),
        ({"arms": staged(), "training": {"steps": 1}}, "1 steps are too few"),
        ({"arms": staged(), "model": {"encoder": {"name": "resnet18_3d"}}}, r"arms.0 \(both\): .*trains a decoder"),
        ({"arms": [{"name": "a", "method": {"name": "gcl"}}]}, r"arms.0 \(a\): .*needs the sampler"),
        ({"model": {"encoder": {"name": "unet3d"}, "decoder_blocks": 2}}, "name it in the stage"),
        ({"protocol": {"name": "few_label"}}, "finetune: required"),
        ({"protocol": {"name": "fewlabel"}}, "fewlabel"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("protocol.seeds", [1, 1], "names a value twice"),
        ("protocol.evaluate_on", "train", "is one of data.splits"),
        ("protocol.baseline", "nobody", "no arm `nobody`"),
        ("protocol.more_encoders", {"unet3d": {"name": "unet3d"}}, "is the name of model.encoder"),
        ("protocol.more_encoders", {"flat": {"name": "unet2d"}}, "gives 3D items"),
        ("protocol.finetune.views", {"n_views": 2}, "protocol.finetune: fine-tuning takes one view"),
        ("protocol.finetune.batchsize", 3, "batchsize: unknown key. Did you mean `batch_size`"),
    ],
)
def test_sections_that_all_arms_share_must_fit(place, value, message):
    with pytest.raises(ConfigError, match=message):
        changed(place, value)


def test_stages_belong_to_few_labels():
    values = {**PLAN, "arms": [{"name": "both", "stages": STAGES}], "protocol": {"name": "age_site"}}
    with pytest.raises(ConfigError, match="only for the protocol few_label"):
        validate(CompareConfig, values, source="plan.yaml")
