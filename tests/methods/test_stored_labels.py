"""SeLa and DeepCluster: labels of every item, made between steps and found by row number."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_examples import Example, embed_all, make_batch, part_of, table
from pydantic import ValidationError
from sklearn.metrics import adjusted_rand_score
from torch.testing import assert_close

from medssl.core import distributed
from medssl.core.errors import ConfigError, ShapeError, TrainingError
from medssl.core.seeding import CLUSTERS, derive_seed
from medssl.losses import k_means, sela_assignment
from medssl.methods import METHODS, deepcluster

N = len(table())
V2 = {"form": "v2", "n_heads": 2, "hidden_dim": 16, "projection_dim": 8}


def example(name, **settings):
    entry = METHODS[name]
    return Example(entry, entry.config(**{"n_clusters": 3, **settings}), dims=0)


ALL = [example("sela", n_heads=2), example("deepcluster"), example("deepcluster", **V2)]
every = pytest.mark.parametrize("case", ALL, ids=["sela", "v1", "v2"])


def blobs(n=60, k=3, width=8):
    """Encoder outputs in k well separated groups, and the groups."""
    rng = torch.Generator().manual_seed(0)
    group = torch.arange(n) % k
    return 5 * torch.randn(k, width, generator=rng)[group] + 0.1 * torch.randn(n, width, generator=rng), group


def fitted(case, n):
    method = case.build()
    rows = np.arange(n)
    none = np.zeros(n, dtype=np.int64)
    method.fit_labels(replace(table(), row=rows, subject=rows, volume=rows, partition=none, position=none, labels={}))
    return method


@every
def test_labels_start_balanced_and_more_clusters_than_items_are_refused(case):
    method = case.build()
    sizes = np.stack([np.bincount(head, minlength=3) for head in method.clusters()])
    assert (sizes == N // 3).all()
    with pytest.raises(ConfigError, match=r"fewer items.*(\n.*)*n_clusters 13, 12 items(\n.*)*at most 12"):
        example(case.config.name, **{**case.config.model_dump(exclude_unset=True), "n_clusters": N + 1}).build()


@every
def test_labels_are_found_by_row_in_a_table_of_any_order_and_an_unknown_row_makes_the_loss_nan(case):
    method = case.build()
    order = np.random.default_rng(0).permutation(N)
    shuffled = replace(table().select(order), row=100 + 7 * order)
    method.fit_labels(shuffled)
    stored = torch.from_numpy(method.clusters())
    found = method.assignments.of(torch.from_numpy(shuffled.row))
    assert torch.equal(found.T, stored)
    assert (method.assignments.of(torch.tensor([99, 101, 10_000])) == -1).all()
    assert bool(method.training_loss(make_batch(case, 0)).loss.isnan())  # its rows are 0 to 11


@every
def test_a_refresh_repeats_on_every_process_and_changes_with_the_seed(case):
    first, second, other = (case.build(seed=seed) for seed in (1, 1, 2))
    for method in (first, second, other):
        method.refresh(lambda: embed_all(case, first))
    assert np.array_equal(first.clusters(), second.clusters())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("case", [example("deepcluster", n_components=2), ALL[2]], ids=["v1", "v2"])
def test_groups_of_the_encoders_output_are_found_and_given_to_other_items(case):
    method, (h, group) = fitted(case, 60), blobs()
    for _ in range(6):  # k-means starts from other items each time, two in one group now and then
        method.refresh(lambda: (h, {}))
        scores = [adjusted_rand_score(group, head) for head in method.clusters()]
        if max(scores) == 1:
            break
    assert max(scores) == 1
    if case.config.form == "v2":
        given = method.assign(h + 0.01 * h.roll(1, 1))
        assert adjusted_rand_score(group, given[int(np.argmax(scores))]) == 1


def test_sela_labels_are_the_argmax_of_the_transport_of_each_classifier():
    method, (h, _) = fitted(ALL[0], 60), blobs()
    method.refresh(lambda: (h, {}))
    standard = (h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()  # by the whole set, whatever batches were seen before
    logits = method.classifiers(standard).detach().unflatten(1, (2, 3))
    for head in range(2):
        expected = sela_assignment(logits[:, head], tolerance=1e-3, max_iterations=1000).argmax(1)
        assert method.clusters()[head].tolist() == expected.tolist()
        assert method.assign(h)[head].tolist() == logits[:, head].argmax(1).tolist()


@pytest.mark.parametrize(
    ("n_assignments", "expected"), [(1, {0}), (2, {0}), (3, {0, 25}), (11, {i * i for i in range(10)})]
)
def test_sela_assigns_at_squared_shares_of_training(n_assignments, expected):
    assert set(example("sela", n_assignments=n_assignments).build().refresh_steps(100)) == expected


def test_deepcluster_clusters_at_every_epoch_or_every_few():
    method = example("deepcluster", refresh_epochs=1.5).build()
    method.steps_per_epoch = 10
    assert list(method.refresh_steps(50)) == [0, 15, 30, 45]
    method.steps_per_epoch = 1
    assert list(example("deepcluster", refresh_epochs=0.1).build().refresh_steps(3)) == [0, 1, 2]


def test_v1_clusters_whitened_directions_of_unit_length(caplog):
    method, (h, _) = fitted(example("deepcluster", n_components=5), 60), blobs()
    h[:, 7] = h[:, 6]  # one direction less
    method.refresh(lambda: (h, {}))
    centred = (h - h.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / 59)
    rows = (centred @ vectors[:, -5:] / values[-5:].sqrt()).flip(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected, _ = k_means(rows, 3, seed=derive_seed(method.seed, CLUSTERS, 1, 0))
    assert method.clusters()[0].tolist() == expected.tolist()
    wide = fitted(example("deepcluster"), 60)
    with caplog.at_level(logging.INFO):
        wide.refresh(lambda: (h, {}))
        wide.refresh(lambda: (h, {}))
    assert caplog.text.count("7 of n_components 256: 60 items of 8 features") == 1


def test_v1_keeps_few_enough_directions_to_tell_items_apart(monkeypatch):
    seen = []
    monkeypatch.setattr(
        deepcluster, "k_means", lambda rows, *rest, **given: seen.append(rows) or k_means(rows, *rest, **given)
    )
    case = example("deepcluster", feature_norm="none")
    method = fitted(case, 40)
    h = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    method.refresh(lambda: (h, {}))
    labels = method.clusters()
    assert seen[0].shape == (40, 10)
    apart = torch.pdist(seen[0])
    assert apart.std() > 0.1 * apart.mean()  # in all 39 directions every pair would be equally far apart
    again = fitted(case, 40)
    again.refresh(lambda: (h * (1 + 1e-7 * torch.randn(h.shape)), {}))
    assert np.array_equal(again.clusters(), labels)


def test_v1_draws_its_classifier_anew_each_time():
    case = ALL[1]
    method = case.build()
    assert list(method.reinitialised()) == []
    drawn = []
    for _ in range(2):
        with torch.no_grad():
            method.classifier.bias.fill_(1)
        method.refresh(lambda: embed_all(case, method))
        assert {id(p) for p in method.reinitialised()} == {id(p) for p in method.classifier.parameters()}
        assert float(method.classifier.bias.detach().abs().max()) == 0
        drawn.append(method.classifier.weight.detach().clone())
    assert not torch.equal(*drawn)
    assert float(drawn[0].std()) == pytest.approx(0.01, rel=0.5)
    assert_close(method.training_loss(make_batch(case, 0)).loss.item(), math.log(3), atol=0.05, rtol=0)


def test_v2_takes_centroids_of_projections_as_prototypes_that_nothing_trains():
    case = ALL[2]
    method = case.build()
    h, _ = embed_all(case, method)
    method.refresh(lambda: (h, {}))
    with torch.no_grad():
        z = torch.nn.functional.normalize(method.head.eval()(h), dim=1)
    for labels, prototypes in zip(method.assignments.labels, method.prototypes):
        means = torch.stack([z[labels == k].mean(0) for k in range(3)])
        assert_close(prototypes, torch.nn.functional.normalize(means, dim=1))
    assert list(method.reinitialised()) == []
    assert "prototypes" not in dict(method.named_parameters())


def test_v2_projects_the_whole_set_in_evaluation_mode_and_goes_on_in_training_mode():
    case = example("deepcluster", **V2, head_norm="batch")
    method = case.build()
    statistics = method.head.layers[1].running_mean.clone()
    method.refresh(lambda: embed_all(case, method))
    assert torch.equal(method.head.layers[1].running_mean, statistics)
    assert method.head.training
    method.training_loss(make_batch(case, 0))
    assert not torch.equal(method.head.layers[1].running_mean, statistics)


@every
def test_logs_say_the_loss_of_a_guess_the_clusters_in_use_and_the_agreement(case):
    method = case.build()
    method.assignments.store(torch.zeros_like(method.assignments.labels))
    logs = method.training_loss(make_batch(case, 0)).logs
    assert float(logs["chance_loss"]) == pytest.approx(math.log(3))
    assert float(logs["used_prototypes"]) == pytest.approx(1 / 3)
    assert 0 <= float(logs["agreement"]) <= 1


@every
def test_items_that_are_all_equal_are_clustered_and_training_goes_on(case):
    method = case.build()
    method.refresh(lambda: (torch.full((N, 8), 0.3), {}))
    assert method.clusters().min() >= 0
    loss = method.training_loss(make_batch(case, 0)).loss
    loss.backward()
    assert bool(loss.isfinite())


def test_a_batch_norm_wants_two_items():
    assert [case.config.needs().min_batch for case in ALL] == [2, 2, 2]
    free = [example("sela", feature_norm="none"), example("deepcluster", feature_norm="none")]
    free.append(example("deepcluster", **V2, head_norm="none"))
    assert [case.config.needs().min_batch for case in free] == [1, 1, 1]
    for case in free:
        batch = part_of(make_batch(case, 0), slice(0, 1))
        assert bool(case.build().training_loss(batch).loss.isfinite())


@every
def test_what_cannot_be_clustered_is_named(case):
    method = case.build()
    h, columns = embed_all(case, method)
    h[4] = math.nan
    with pytest.raises(TrainingError, match=r"not finite for 1 of 12 items(.*\n)+.*items 4 of"):
        method.refresh(lambda: (h, columns))
    with pytest.raises(ShapeError, match="11 embedded, 12"):
        method.refresh(lambda: (h[:11], columns))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_heads": 2}, "n_heads: belongs to form v2, this is v1"),
        ({"form": "v2", "n_components": 8}, "n_components: belongs to form v1, this is v2"),
        ({"refresh_epochs": 0}, "refresh_epochs"),
        ({"n_clusters": 0}, "n_clusters"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        METHODS["deepcluster"].config(**settings)


@every
def test_every_process_keeps_the_labels_of_the_first(case, monkeypatch):
    first, second = case.build(seed=1), case.build(seed=2)
    kept = []
    first.refresh(lambda: embed_all(case, first))
    monkeypatch.setattr(distributed, "from_first", lambda own: kept.append(own) or first.assignments.labels)
    second.assignments.store(second.assignments.labels)
    assert len(kept) == 1
    assert np.array_equal(first.clusters(), second.clusters())
