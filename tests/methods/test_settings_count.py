"""Every setting of a method's objective changes its loss or its labels, and the losses are those of their functions."""

import pytest
import torch
from method_examples import HEAD, Example, make_batch
from torch.testing import assert_close

from medssl.losses import (
    alignment,
    barlow_twins,
    byol,
    decoupled_contrastive,
    swav,
    uniformity,
    vicreg,
)
from medssl.methods import METHODS, deepcluster, sela
from medssl.methods.entry import embed_views

SWAV = {"n_prototypes": 4, "freeze_steps": 0, **HEAD}
GROUPING = {"hidden_dim": 8, "projection_dim": 6, "map_stride": 2}
V2 = {"form": "v2", "n_clusters": 3, **HEAD}
COUNTS = [
    ("dcl", HEAD, {"temperature": 0.5}),
    ("dcl", HEAD, {"weight_sigma": 0.5}),
    ("dcl", {**HEAD, "weight_sigma": 0.5}, {"weight_sigma": 1.0}),
    ("align_uniform", HEAD, {"align_weight": 2.0}),
    ("align_uniform", HEAD, {"uniform_weight": 2.0}),
    ("align_uniform", HEAD, {"alpha": 1.0}),
    ("align_uniform", HEAD, {"t": 3.0}),
    ("barlow_twins", HEAD, {"redundancy_weight": 0.1}),
    ("vicreg", HEAD, {"invariance_weight": 1.0}),
    ("vicreg", HEAD, {"variance_weight": 1.0}),
    ("vicreg", HEAD, {"covariance_weight": 10.0}),
    ("moco", {**HEAD, "queue_size": 8}, {"temperature": 0.5}),
    ("swav", SWAV, {"temperature": 0.5}),
    ("swav", SWAV, {"epsilon": 0.5}),
    ("swav", SWAV, {"iterations": 1}),
    ("swav", SWAV, {"assign_views": (1,)}),
    ("deepcluster", V2, {"temperature": 0.5}),
    ("iic_segmentation", {}, {"lamb_over": 2.0}),
    ("iic_segmentation", {"alternate_steps": None}, {"lamb_main": 2.0}),
    ("iic_segmentation", {}, {"max_displacement": 2}),
    ("iic_segmentation", {}, {"collapsed": True}),
    ("hierarchical_grouping", GROUPING, {"temperature": 0.5}),
    ("hierarchical_grouping", GROUPING, {"sigma_positive": 1.0}),
    ("hierarchical_grouping", GROUPING, {"sigma_negative": 0.05}),
    ("hierarchical_grouping", GROUPING, {"n_positives": 3}),
    ("hierarchical_grouping", GROUPING, {"n_negatives": 3}),
]


def example(name, **settings):
    entry = METHODS[name]
    config = entry.config(**settings)
    return Example(entry, config, min(config.needs().spatial_dims))


def loss_of(case):
    return float(case.build().double().training_loss(make_batch(case, 0, dtype=torch.float64)).loss.detach())


@pytest.mark.parametrize(
    ("name", "settings", "change"), [pytest.param(*c, id=f"{c[0]}-{'-'.join(c[2])}") for c in COUNTS]
)
def test_a_setting_changes_the_loss(name, settings, change):
    before, after = loss_of(example(name, **settings)), loss_of(example(name, **{**settings, **change}))
    assert abs(before - after) > 1e-6 * max(1.0, abs(before))  # far above the rounding of float64


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "dcl",
            {"temperature": 0.3, "weight_sigma": 0.7},
            lambda z: decoupled_contrastive(z[:, 0], z[:, 1], temperature=0.3, weight_sigma=0.7),
        ),
        (
            "align_uniform",
            {"align_weight": 2.0, "uniform_weight": 3.0, "alpha": 1.5, "t": 1.5},
            lambda z: (
                2 * alignment(z[:, 0], z[:, 1], alpha=1.5)
                + 3 * (uniformity(z[:, 0], t=1.5) + uniformity(z[:, 1], t=1.5)) / 2
            ),
        ),
        (
            "barlow_twins",
            {"redundancy_weight": 0.2},
            lambda z: barlow_twins(z[:, 0], z[:, 1], redundancy_weight=0.2),
        ),
        (
            "vicreg",
            {"invariance_weight": 2.0, "variance_weight": 3.0, "covariance_weight": 4.0},
            lambda z: vicreg(z[:, 0], z[:, 1], invariance_weight=2.0, variance_weight=3.0, covariance_weight=4.0),
        ),
    ],
    ids=["dcl", "align_uniform", "barlow_twins", "vicreg"],
)
def test_joint_embeddings_have_the_loss_of_their_function(name, settings, expected):
    case = example(name, **HEAD, **settings)
    method, batch = case.build(), make_batch(case, 0)
    _, z = embed_views(method.encoder, method.head, batch)
    if name == "align_uniform":
        z = torch.nn.functional.normalize(z, dim=2)
    assert_close(method.training_loss(batch).loss, expected(z))


def test_byol_predicts_what_the_teacher_makes_of_the_other_view():
    case = example("byol", **HEAD)
    method, batch = case.build(), make_batch(case, 0)
    with torch.no_grad():
        for weight in method.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    images = torch.cat(batch.views)
    p1, p2 = method.predictor(method.head(method.encoder(images))).chunk(2)
    t1, t2 = method.teacher(images).chunk(2)
    assert_close(method.training_loss(batch).loss, byol(p1, p2, t1, t2))


def test_swav_takes_the_settings_of_its_codes():
    case = example("swav", **SWAV, temperature=0.3, epsilon=0.2, iterations=2)
    method, batch = case.build(), make_batch(case, 0)
    _, z = embed_views(method.encoder, method.head, batch)
    expected = swav(z, method.prototypes, temperature=0.3, epsilon=0.2, iterations=2)
    assert_close(method.training_loss(batch).loss, expected)


@pytest.mark.parametrize(
    ("module", "function", "name", "settings", "expected"),
    [
        (
            sela,
            "sela_assignment",
            "sela",
            {"lamb": 7.0, "tolerance": 0.02, "max_iterations": 11, "n_heads": 2},
            {"lamb": 7.0, "tolerance": 0.02, "max_iterations": 11},
        ),
        (deepcluster, "k_means", "deepcluster", {"iterations": 3}, {"iterations": 3, "spherical": False}),
        (deepcluster, "k_means", "deepcluster", {}, {"iterations": 20, "spherical": False}),
        (deepcluster, "k_means", "deepcluster", V2, {"iterations": 10, "spherical": True}),
    ],
    ids=["sela", "v1-given", "v1", "v2"],
)
def test_a_refresh_asks_for_labels_with_the_settings(monkeypatch, module, function, name, settings, expected):
    asked, original = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *rows, **given: asked.append(given) or original(*rows, **given))
    method = example(name, **{"n_clusters": 3, **settings}).build()
    method.refresh(lambda: (torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), {}))
    assert len(asked) == settings.get("n_heads", 3 if settings is V2 else 1)
    for given in asked:
        assert expected.items() <= given.items()
    seeds = [given["seed"] for given in asked if "seed" in given]
    assert len(set(seeds)) == len(seeds)
