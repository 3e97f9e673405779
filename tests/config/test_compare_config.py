"""Plans of comparisons: what they may ask for, and that what they mean survives writing and reading."""

import pytest

from medssl.config import CompareConfig, dump_config, load_any
from medssl.core.errors import ConfigError
from medssl.core.files import parse_yaml
from medssl.core.schema import validate

L_EXP = {"name": "l_exp"}
PLAN = {
    "name": "plan",
    "data": {"manifest": "manifest.csv"},
    "items": {"geometry": "features"},
    "model": {"encoder": {"name": "mlp"}},
    "views": {"preset": "features"},
    "sampler": {"name": "random"},
    "training": {"steps": 10},
    "arms": [
        {"name": "raw"},
        {"name": "plain", "method": L_EXP},
        {"name": "fair", "method": L_EXP, "debias": {"name": "fair_kl", "on": "z"},
         "sampler": {"name": "site_balanced"}},
        {"name": "longer", "method": L_EXP, "combat": {"on": "h", "covariates": ["sex"]}, "steps": 20},
    ],
}  # fmt: skip
VOLUMES = {
    "items": {"geometry": "volume"},
    "model": {"encoder": {"name": "resnet18_3d"}},
    "views": {"preset": "simclr"},
}


def plan(**changes) -> CompareConfig:
    return validate(CompareConfig, {**PLAN, **changes}, source="plan.yaml")


def test_plan_is_known_by_its_arms_and_survives_writing(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(dump_config(plan()))
    assert load_any(path) == plan()
    path.write_text(str(PLAN))
    assert load_any(path, ["arms.1.debias={name: end, on: h}"]).arms[1].debias.on == "h"


def test_each_arm_is_a_pretraining_of_the_shared_settings():
    config = plan()
    fair = config.pretraining(config.arm("fair"), 7)
    assert (fair.seed, fair.sampler.name, fair.debias.on, fair.training.steps) == (7, "site_balanced", "z", 10)
    longer = config.pretraining(config.arm("longer"), 0)
    assert (longer.sampler.name, longer.debias, longer.training.steps) == ("random", None, 20)
    assert config.baseline == "raw"


def test_layers_of_an_arm_are_those_that_it_has():
    supervised = {"name": "supervised", "method": {"name": "supervised"}}
    config = plan(arms=[*PLAN["arms"], supervised])
    assert [config.layers(arm) for arm in config.arms] == [("input",), ("z", "h"), ("z", "h"), ("h",), ("h",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "a occurs more than once"),
        ({"arms": []}, "at least 1"),
        ({"arms": [{"name": "../a"}]}, "pattern"),
        ({"arms": [{"name": "a", "method": {"name": "byool"}}]}, "unknown name `byool`"),
        ({"arms": [{"name": "a", "steps": 3, "debias": {"name": "end"}}]}, "debias, steps: only for an arm"),
        ({"arms": [{"name": "a", "combat": {"on": "z"}}]}, "has only its input"),
        ({"arms": [{"name": "a", "combat": {"on": "input", "covariates": ["age"]}}]}, "age of evaluated people"),
        ({"arms": [{"name": "a", "method": {"name": "supervised"}, "combat": {"on": "z"}}]}, "has no projection"),
        ({"arms": [{"name": "a", "method": {"name": "supervised"}}], "protocol": {"layers": ["z"]}}, "add h"),
        (
            {"arms": [{"name": "a", "method": {"name": "supervised"}, "debias": {"name": "fair_kl", "on": "z"}}]},
            r"arms.0 \(a\): .*debias.on.*z",
        ),
        ({"arms": [{"name": "a", "method": {"name": "gcl"}}]}, r"arms.0 \(a\): .*not defined for"),
        ({"arms": [{"name": "a"}], **VOLUMES}, "needs items.geometry: features"),
        ({"arms": [{"name": "a", "method": L_EXP, "combat": {"on": "input"}}], **VOLUMES}, "not voxels"),
        ({"protocol": {"baseline": "nobody"}}, "no arm `nobody`"),
        ({"protocol": {"leave_site_out": True, "evaluate_on": "validation"}}, "not while settings are chosen"),
        ({"protocol": {"seeds": [1, 1]}}, "names a value twice"),
        ({"protocol": {"folds": 1}}, "greater than or equal to 2"),
        ({"protocol": {"folds": None}, "data": {"manifest": "m.csv", "splits": ["train", "test"]}}, "are trained on"),
        ({"protocol": {"folds": None}, "data": {"manifest": "m.csv", "splits": None}}, "are trained on"),
        ({"training": {"steps": 1, "devices": 2}}, "each cell is trained by one process"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_a_yaml_plan_reads_on_as_a_word():
    text = "{name: fair, method: {name: l_exp}, debias: {name: fair_kl, on: z, weight: 10}}"
    assert plan(arms=[parse_yaml(text, source="test")]).arms[0].debias.on == "z"
