"""Methods that learn from weak labels: what reaches the losses, and what a regulariser adds to them."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_examples import Example, make_batch, table
from pydantic import ValidationError
from torch.testing import assert_close

from medssl.core.errors import ConfigError, InputError
from medssl.core.types import LossOutput, Method, ViewBatch
from medssl.losses import EmptyComparisonWarning, end, fair_kl, label_kernel, nt_xent, sup_con
from medssl.methods import METHODS, EnDConfig, FairKLConfig, TargetConfig, with_debias
from medssl.methods.classes import class_labels
from medssl.methods.decoupled_uniformity import DecoupledUniformityConfig
from medssl.methods.kernels import AttributeKernel, KernelConfig, table_kernel
from medssl.methods.supcon import SupConConfig


def example(name: str, *, views: int = 2, debias=None, **settings) -> Example:
    entry = METHODS[name]
    config = entry.config(name=name, hidden_dim=16, projection_dim=8, **settings)
    return Example(entry, config, 0, views=views, debias=debias)


def with_labels(batch: ViewBatch, **labels: torch.Tensor) -> ViewBatch:
    return replace(batch, labels={**batch.labels, **labels})


# --- kernels -----------------------------------------------------------------------------------------------------


def test_a_kernel_is_the_product_over_its_columns():
    kernel = KernelConfig(attributes={"age": {"sigma": 5.0}, "sex": {"kind": "equal"}})
    labels = {"age": torch.tensor([20.0, 25.0, 70.0]), "sex": torch.tensor([0, 1, 0])}
    age = torch.exp(-0.5 * torch.tensor([[0.0, 1, 100], [1, 0, 81], [100, 81, 0]], dtype=torch.float64))
    sex = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    assert_close(kernel.weights(labels), age * sex)
    assert kernel.columns == ("age", "sex")


def test_a_missing_category_is_refused_or_counts_as_any():
    labels = {"sex": torch.tensor([0, 1, -1])}  # -1: the cell was empty
    kernel = KernelConfig(attributes={"sex": {"kind": "equal"}})
    with pytest.raises(InputError, match="missing"):
        kernel.weights(labels)
    ignored = KernelConfig(attributes={"sex": {"kind": "equal"}}, missing="ignore").weights(labels)
    assert ignored.tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("sigma", [0, -5.0, float("nan"), None])
def test_sigma_of_no_width_is_refused_by_the_schema(sigma):
    with pytest.raises(ValidationError, match="sigma"):
        AttributeKernel(sigma=sigma)


def test_a_kernel_without_columns_or_with_a_useless_sigma_is_refused():
    with pytest.raises(ValidationError):
        KernelConfig(attributes={})
    with pytest.raises(ValidationError, match="kind equal takes no sigma"):
        AttributeKernel(kind="equal", sigma=1.0)


@given(n=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 2**31 - 1))
def test_kernels_of_a_table_are_symmetric_and_semidefinite(n, width, seed):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    for kind, sigma in (("rbf", 0.7), ("cosine", None)):
        kernel = table_kernel(rows, kind, sigma)
        assert_close(kernel, kernel.T)
        assert_close(kernel.diagonal(), torch.ones(n, dtype=torch.float64))
        assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-9


def test_the_rbf_of_a_one_column_table_is_that_of_the_label():
    age = torch.tensor([20.0, 31.5, 31.5, 77.0])
    assert_close(table_kernel(age[:, None], "rbf", 5.0), label_kernel(age.double(), sigma=5.0))


# --- classes -----------------------------------------------------------------------------------------------------


def test_bins_of_a_number_are_the_smallest_edge_at_or_above_it():
    labels = {"age": torch.tensor([4.0, 4.1, 6.0, 91.0])}
    edges = tuple(float(edge) for edge in range(4, 92, 2))
    by_edge = class_labels(labels, "age", edges)
    assert by_edge.tolist() == [0, 1, 1, len(edges)]
    by_width = class_labels(labels, "age", 2.0)
    assert by_width.tolist() == [2, 3, 3, 46]


def test_missing_classes_stay_missing():
    labels = {"age": torch.tensor([4.0, torch.nan]), "diagnosis": torch.tensor([1, -1])}
    for column, bins in (("age", 2.0), ("age", (1.0, 5.0)), ("diagnosis", None)):
        assert class_labels(labels, column, bins).isnan().tolist() == [False, True]


def test_exact_ages_as_classes_are_refused():
    with pytest.raises(ValidationError, match="set bins"):
        SupConConfig(label="age")
    with pytest.raises(ValidationError, match="set bins"):
        TargetConfig(column="age")
    with pytest.raises(ValidationError, match="rise"):
        SupConConfig(label="age", bins=(10.0, 10.0))


# --- methods -----------------------------------------------------------------------------------------------------


def embed(case: Example, method: Method, batch: ViewBatch) -> torch.Tensor:
    return torch.stack([method.head(method.encoder(view)) for view in batch.views], dim=1)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_every_view_of_the_batch_is_compared(views):
    case = example("supcon", views=views)
    method, batch = case.build(), make_batch(case, 0)
    assert len(batch.views) == views
    output = method.training_loss(batch)
    z = embed(case, method, batch)
    assert_close(output.loss, sup_con(z, batch.labels["diagnosis"]))
    assert_close(output.features["z"], z[:, 0])
    assert_close(output.features["h"], method.encoder(batch.views[0]))


def test_y_aware_of_people_with_nothing_in_common_is_simclr():
    case = example("y_aware", kernel={"attributes": {"row": {"kind": "equal"}}})
    batch = make_batch(replace(case, views=2, config=METHODS["simclr"].config()), 0)
    batch = with_labels(batch, row=batch.items["row"])
    method = case.build()
    z = embed(case, method, batch)
    assert_close(method.training_loss(batch).loss, nt_xent(z[:, 0], z[:, 1]), atol=1e-5, rtol=1e-5)


def test_one_view_attracts_other_people_only():
    case = example("y_aware", views=1)
    method, batch = case.build(), make_batch(case, 0)
    alone = with_labels(batch, age=torch.arange(6).double() * 1000)  # nobody is near in age
    assert float(method.training_loss(batch).loss.detach()) > 0
    assert float(method.training_loss(alone).loss.detach()) == 0


def test_a_label_that_the_batch_lacks_is_named():
    case = example("l_exp")
    batch = replace(make_batch(case, 0), labels={})
    with pytest.raises(ConfigError, match="no label `age`"):
        case.build().training_loss(batch)


def test_a_prior_from_a_table_equals_the_same_one_from_attributes():
    by_age = example("decoupled_uniformity", prior={"attributes": {"attributes": {"age": {"sigma": 5.0}}}})
    by_table = example("decoupled_uniformity", prior={"table": "ages.csv", "sigma": 5.0})
    plain = example("decoupled_uniformity")
    batch = make_batch(by_age, 0)
    batch = with_labels(batch, prior=batch.labels["age"][:, None])
    losses = [case.build().training_loss(batch).loss.detach() for case in (by_age, by_table, plain)]
    assert_close(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_the_width_of_a_prior_is_the_median_distance_unless_it_is_given():
    method = example("decoupled_uniformity", prior={"table": "p.csv"}).build()
    items = table()
    _, first = np.unique(items.volume, return_index=True)
    people = torch.from_numpy(items.labels["prior"][first])
    assert_close(float(method.sigma), float(torch.pdist(people).median()))
    assert float(example("decoupled_uniformity", prior={"table": "p.csv", "sigma": 3.0}).build().sigma) == 3.0
    same = replace(items, labels={"prior": np.ones((len(items), 2))})
    with pytest.raises(ConfigError, match="no median distance"):
        method.fit_labels(same)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({}, "either attributes or table"),
        ({"table": "a.csv", "attributes": {"attributes": {"age": {"sigma": 1}}}}, "either attributes or table"),
        ({"table": "a.csv", "kernel": "cosine", "sigma": 1.0}, "takes no sigma"),
        ({"attributes": {"attributes": {"age": {"sigma": 1}}}, "sigma": 1.0}, "belong to a table"),
        ({"attributes": {"attributes": {"age": {"sigma": 1}}, "missing": "ignore"}}, "positive semidefinite"),
    ],
)
def test_priors_that_contradict_themselves_are_refused(prior, message):
    with pytest.raises(ValidationError, match=message):
        DecoupledUniformityConfig(prior=prior)


# --- debias ------------------------------------------------------------------------------------------------------

DEBIAS = [
    FairKLConfig(on="h", weight=3.0),
    FairKLConfig(on="z", weight=0.5, mode="moments", target={"column": "diagnosis"}),
    FairKLConfig(on="z", weight=2.0, target={"column": "age", "sigma": 5.0}),
    EnDConfig(on="h", weight=2.0, target={"column": "age", "bin_width": 10.0}),
    EnDConfig(on="z", weight=1.5, perpendicular_weight=0.0, parallel_weight=1.0),
]


def by_hand(config, features, labels):
    """The regulariser as its definition says, from the layer and the labels."""
    target = config.target
    binned = None if target is None or target.bin_width is None else torch.ceil(labels["age"] / target.bin_width)
    if config.name == "end":
        alike = binned if binned is not None else torch.zeros(len(features))
        terms = end(features, labels["site"], alike)
        return config.perpendicular_weight * terms.perpendicular + config.parallel_weight * terms.parallel
    given = {}
    if target is not None and target.sigma is not None:
        given = {"weights": label_kernel(labels["age"], sigma=target.sigma)}
    elif target is not None:
        given = {"labels": labels[target.column]}
    terms = fair_kl(features, labels["site"], mode=config.mode, **given)
    return terms.positive + terms.negative


@pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")
@pytest.mark.parametrize("config", DEBIAS, ids=lambda one: f"{one.name}-{one.on}-{one.weight}")
def test_a_regulariser_adds_exactly_its_weight_times_its_value(config):
    plain, debiased = example("y_aware"), example("y_aware", debias=config)
    batch = make_batch(debiased, 0)
    main = plain.build().training_loss(batch)
    output = debiased.build().training_loss(batch)
    value = by_hand(config, main.features[config.on], batch.labels)
    assert float(value.detach()) > 0
    assert_close(output.loss, main.loss + config.weight * value)
    assert_close(output.logs["main_loss"], main.loss.detach())
    assert_close(output.logs["debias"], value.detach())
    pairs = [int(output.logs[f"debias_{kind}_pairs"]) for kind in ("aligned", "conflicting")]
    assert pairs == [6, 9]  # two sites of three items each


def test_training_against_the_site_takes_it_out_of_the_layer():
    config = FairKLConfig(on="z", weight=20.0, mode="moments")
    plain, debiased = example("simclr"), example("simclr", debias=config)

    def seen_at(step: int) -> ViewBatch:
        """A batch in which half of the features tell the site."""
        batch = make_batch(debiased, step)
        shift = 2.0 * batch.labels["site"][:, None] * (torch.arange(16) % 2)
        return replace(batch, views=tuple(view + shift for view in batch.views))

    def gap(case: Example) -> float:
        method = case.build()
        optimizer = torch.optim.Adam(method.parameters(), lr=5e-3)
        for step in range(60):
            optimizer.zero_grad()
            method.training_loss(seen_at(step)).loss.backward()
            optimizer.step()
        values = []
        for batch in map(seen_at, range(100, 110)):
            z = method.head(method.encoder(batch.views[0]))
            values.append(by_hand(config, z, batch.labels))
        return float(torch.stack(values).mean().detach())

    assert gap(debiased) < 0.2 * gap(plain)


def test_what_is_exported_is_the_method_s_own():
    plain, debiased = example("simclr").build(), example("simclr", debias=FairKLConfig()).build()
    assert debiased.encoder is debiased.inner.encoder
    assert debiased.head is debiased.inner.head
    assert debiased.decoder is None
    assert {f"inner.{name}" for name in plain.state_dict()} | {"batches_without_pairs"} == set(debiased.state_dict())
    assert with_debias(plain, None) is plain


def test_a_batch_without_one_kind_of_pairs_is_counted_and_warned_about_once():
    case = example("simclr", debias=EnDConfig())
    method, batch = case.build(), make_batch(case, 0)
    one_site = with_labels(batch, site=torch.zeros(6, dtype=torch.int64))
    all_apart = with_labels(batch, site=torch.arange(6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [method.training_loss(one) for one in (batch, one_site, all_apart, one_site)]
    ours = [str(one.message) for one in caught if "samplers site_balanced" in str(one.message)]
    assert len(ours) == 1
    assert "no conflicting pairs" in ours[0]
    assert all(issubclass(one.category, EmptyComparisonWarning) for one in caught)
    assert [int(out.logs["debias_conflicting_pairs"]) for out in outputs] == [9, 0, 15, 0]
    assert [int(out.logs["debias_aligned_pairs"]) for out in outputs] == [6, 15, 0, 15]
    assert int(method.batches_without_pairs) == 3


def test_a_layer_that_the_method_does_not_have_is_refused():
    class OnlyH(Method):
        def training_loss(self, batch: ViewBatch) -> LossOutput:
            h = batch.views[0]
            return LossOutput(h.mean(), features={"h": h})

    method = with_debias(OnlyH(), FairKLConfig(on="z"))
    with pytest.raises(ConfigError, match="debias works on z") as caught:
        method.training_loss(make_batch(example("simclr", debias=FairKLConfig()), 0))
    assert "features: h" in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (EnDConfig, {"perpendicular_weight": 0, "parallel_weight": 0}, "changes nothing"),
        (EnDConfig, {"target": {"column": "age", "sigma": 5.0}}, "set bin_width"),
        (FairKLConfig, {"weight": 0}, "greater than 0"),
        (FairKLConfig, {"target": {"column": "age", "sigma": 5.0, "bin_width": 5.0}}, "not both"),
        (FairKLConfig, {"on": "y"}, "'h' or 'z'"),
    ],
)
def test_regularisers_that_would_do_nothing_or_contradict_themselves_are_refused(cls, settings, message):
    with pytest.raises(ValidationError, match=message):
        cls(**settings)
