"""Regression and classification: what is trained and what is frozen, class weights, targets in their own unit."""

import pytest
import torch
from method_examples import Example, make_batch, patterns, table, train

from medssl.config import FinetuneConfig
from medssl.core.errors import ConfigError
from medssl.core.schema import validate
from medssl.core.types import ModelParts
from medssl.methods import TASKS
from medssl.models import build_encoder
from medssl.models.encoders import MLPConfig, UNet2dConfig

REGRESSION, CLASSIFICATION = TASKS["regression"], TASKS["classification"]


def example(name="regression", dims=0, norm="batch", **settings) -> Example:
    return Example(TASKS[name], TASKS[name].config(**settings), dims, norm)


def trainable(task) -> set[str]:
    return {name for name, weight in task.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("dims", [0, 2, 3])
@pytest.mark.parametrize(("trained", "prefixes"), [
    ("head", ("output.",)),
    ({"last_blocks": 1}, ("output.", "encoder.levels.LAST.")),
    ("whole", ("output.", "encoder.")),
])  # fmt: skip
def test_only_what_is_asked_for_is_trained_and_the_rest_stays_as_it_was(dims, trained, prefixes):
    case = example(dims=dims, train=trained)
    task = case.build()
    last = str(len(task.encoder.width) - 1)
    wanted = tuple(prefix.replace("LAST", last) for prefix in prefixes)
    assert trainable(task) == {name for name, _ in task.named_parameters() if name.startswith(wanted)}
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train(case, task.train(), 3)
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {n for n in changed if n.startswith(wanted)}  # running statistics of frozen norms too
    assert trainable(task) <= changed


def test_frozen_dropout_is_off_in_training():
    encoder = build_encoder(MLPConfig(widths=(16, 8), dropout=0.5), (16,))
    task = REGRESSION.build(REGRESSION.config(train="head"), ModelParts(encoder, None, (16,))).train()
    x = patterns(0)
    assert torch.equal(task.encoder(x), task.encoder(x))
    whole = REGRESSION.build(REGRESSION.config(), ModelParts(encoder, None, (16,))).train()
    assert not torch.equal(whole.encoder(x), whole.encoder(x))


def test_more_blocks_than_there_are_are_refused():
    encoder = build_encoder(UNet2dConfig(widths=(4, 8, 8)), (1, 16, 16))
    with pytest.raises(ConfigError, match="the encoder has 3 blocks"):
        REGRESSION.build(REGRESSION.config(train={"last_blocks": 4}), ModelParts(encoder, None, (1, 16, 16)))


def test_predictions_come_in_years_and_as_probabilities():
    case = example(loss="mse")
    task = case.build()
    train(case, task, 150, learning_rate=1e-2)
    ages = torch.as_tensor(table().labels["age"])
    predicted = task(patterns(0))
    assert predicted.shape == (12, 1)
    assert (predicted[:, 0] - ages).abs().mean() < 0.5 * (ages - ages.mean()).abs().mean()
    shares = example("classification", n_classes=3).build()(patterns(0))
    torch.testing.assert_close(shares.sum(1), torch.ones(12))


def test_balanced_weights_are_the_inverse_of_the_shares_and_1_on_average():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    items = table()
    items.labels["diagnosis"] = labels.numpy()
    losses = {}
    for weights in ("balanced", "none"):
        case = example("classification", n_classes=3, class_weights=weights)
        task = CLASSIFICATION.build(
            case.config, ModelParts(build_encoder(case.encoder(), (16,), seed=0), None, (16,)), seed=0
        )
        task.fit_labels(items)
        batch = make_batch(case, 0)
        rows = batch.items["row"]
        batch.labels["diagnosis"] = labels[rows]
        output = task.eval().output(task.encoder(batch.views[0]))
        each = torch.nn.functional.cross_entropy(output, labels[rows], reduction="none")
        known = torch.tensor([2 / 3, 4 / 3, 4 / 3]) if weights == "balanced" else torch.ones(3)
        losses[weights] = task.training_loss(batch).loss
        torch.testing.assert_close(losses[weights], (each * known[labels[rows]]).mean())
        assert known[labels].mean() == pytest.approx(1)
    assert losses["balanced"] != losses["none"]


VALUES = {
    "kind": "finetune",
    "name": "f",
    "data": {"manifest": "m.csv"},
    "items": {"geometry": "features"},
    "model": {"encoder": {"name": "mlp"}},
    "views": {"n_views": 1, "preset": "none"},
    "task": {"name": "regression"},
    "training": {"steps": 1},
}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"task": {"name": "regression", "train": "head"}}, "there is nothing to freeze"),
        ({"task": {"name": "regression", "train": {"last_blocks": 0}}}, "greater than 0"),
        ({"task": {"name": "regression", "loss": "cross_entropy"}}, "loss"),
        ({"evaluate_on": ["test", "train"]}, "`train` is one of data.splits"),
        ({"evaluate_on": ["test", "test"]}, "named twice"),
        ({"grid": {"published_draws": "list.csv"}}, "published_draws"),
        ({"model": {"encoder": {"name": "mlp"}, "decoder_blocks": 1}}, "remove model.decoder_blocks"),
        ({"inference": {"window": [4, 4, 4]}}, "sees items whole"),
        ({"save_predictions": "none"}, "writes no label maps"),
    ],
)
def test_configurations_that_cannot_mean_anything_are_refused(changes, part):
    with pytest.raises(ConfigError, match=part):
        validate(FinetuneConfig, {**VALUES, **changes}, source="test")
    assert validate(FinetuneConfig, VALUES, source="test").evaluated == ("test",)
