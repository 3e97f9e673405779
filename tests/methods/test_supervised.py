import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from medssl.core.errors import ConfigError, InputError
from medssl.core.types import ItemTable, ModelParts, ViewBatch
from medssl.methods import METHODS
from medssl.methods.supervised import Supervised, SupervisedConfig, n_classes_of
from medssl.models import build_encoder
from medssl.models.encoders import MLPConfig


def build(n_features: int = 4, **settings) -> Supervised:
    encoder = build_encoder(MLPConfig(widths=(16, 8)), (n_features,))
    config = SupervisedConfig(**settings)
    return METHODS["supervised"].build(config, ModelParts(encoder, None, (n_features,)))


def table(**labels) -> ItemTable:
    n = len(next(iter(labels.values())))
    ids = np.arange(n)
    return ItemTable(ids, ids, ids + 40, np.full(n, -1), np.zeros(n, dtype=np.int64), labels=labels)


def batch(images: torch.Tensor, **labels) -> ViewBatch:
    return ViewBatch((images,), (None,), {}, labels)


def test_loss_is_in_units_of_the_population_and_the_log_in_years():
    ages = np.array([20.0, 30.0, 50.0, 80.0])
    x, age = torch.randn(3, 4), torch.tensor([20.0, 50.0, 80.0], dtype=torch.float64)
    for loss, power in (("l1", 1), ("mse", 2)):
        method = build(loss=loss)
        method.fit_labels(table(age=ages))
        output = method.training_loss(batch(x, age=age))
        assert float(method.target_mean) == ages.mean()
        assert float(method.target_scale) == pytest.approx(ages.std())
        error = (method.predict(x).double() - age).abs()
        assert float(output.logs["mae"]) == pytest.approx(float(error.mean()), rel=1e-5)
        assert float(output.loss.detach()) == pytest.approx(float((error / ages.std()).pow(power).mean()), rel=1e-5)


def test_training_learns_years_from_rows():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(64, 4))).float()
    age = 50 + 12 * x[:, 0].double() - 6 * x[:, 1].double()
    method = build(projection_dim=6)
    method.fit_labels(table(age=age.numpy()))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        method.training_loss(batch(x, age=age)).loss.backward()
        optimizer.step()
    assert (method.predict(x) - age).abs().mean() < 2  # the mean age is off by 11


def test_classes_are_the_values_of_the_column_in_their_order():
    method = build(target="grade", loss="cross_entropy", n_classes=3)
    grades = np.array([1.0, 2.5, 4.0, 1.0])
    method.fit_labels(table(grade=grades))
    x, grade = torch.randn(4, 4), torch.from_numpy(grades)
    output = method.training_loss(batch(x, grade=grade))
    probabilities = method.predict(x)
    index = torch.tensor([0, 1, 2, 0])
    assert_close(probabilities.sum(1), torch.ones(4))
    assert_close(output.loss.detach(), -probabilities[torch.arange(4), index].log().mean())
    assert float(output.logs["accuracy"]) == float((probabilities.argmax(1) == index).float().mean())
    assert bool(method.training_loss(batch(x, grade=grade.clone().fill_(3.0))).loss.isnan())  # 3 is no class
    assert n_classes_of(table(grade=grades), "grade") == 3


def test_prediction_uses_running_statistics_and_leaves_the_mode_alone():
    encoder = build_encoder(MLPConfig(widths=(8,), norm="batch", dropout=0.5), (4,))
    method = METHODS["supervised"].build(SupervisedConfig(), ModelParts(encoder, None, (4,)))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    x = torch.randn(6, 4)
    assert_close(method.predict(x)[:2], method.predict(x[:2]))
    assert method.training
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_features_are_h_and_the_projection_where_there_is_one():
    x, age = torch.randn(3, 4), torch.tensor([20.0, 50.0, 80.0])
    plain, projected = build(), build(projection_dim=6, hidden_dim=5)
    assert {k: tuple(v.shape) for k, v in plain.training_loss(batch(x, age=age)).features.items()} == {"h": (3, 8)}
    features = projected.training_loss(batch(x, age=age)).features
    assert_close(features["z"], projected.head(features["h"]))
    assert plain.head is None


def test_targets_that_cannot_be_learnt_are_refused():
    method = build()
    with pytest.raises(InputError, match=r"missing for 2 volumes[\s\S]*41, 43"):
        method.fit_labels(table(age=np.array([30.0, np.nan, 40.0, np.nan])))
    with pytest.raises(InputError, match="nothing to learn"):
        method.fit_labels(table(age=np.array([30.0, 30.0])))
    with pytest.raises(ConfigError, match="holds text"):
        method.fit_labels(table(age=np.array([0, 1, 2])))
    with pytest.raises(ConfigError, match="Did you mean `agee`"):
        method.fit_labels(table(agee=np.array([30.0, 31.0])))
    classes = build(target="sex", loss="cross_entropy", n_classes=2)
    with pytest.raises(InputError, match="missing for 1 volumes"):
        classes.fit_labels(table(sex=np.array([0, 1, -1])))
    with pytest.raises(ConfigError, match="3 values in the training items"):
        classes.fit_labels(table(sex=np.array([0, 1, 2])))
    with pytest.raises(ConfigError, match="number of classes is not known"):
        build(loss="cross_entropy", target="sex")


@pytest.mark.parametrize("settings", [{"n_classes": 3}, {"loss": "cross_entropy", "n_classes": 1}, {"hidden_dim": 4}])
def test_settings_that_would_do_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        SupervisedConfig(**settings)
