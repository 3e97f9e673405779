"""Hierarchical grouping: which pixels are drawn, what is left out, and a run with maps of regions."""

import logging
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from method_examples import HEIGHTS, examples, make_batch, part_of, table
from torch.testing import assert_close

from medssl.config import PretrainConfig
from medssl.core.errors import CheckpointError, ConfigError, DataError
from medssl.core.types import ModelParts
from medssl.losses import EmptyComparisonWarning
from medssl.methods.hierarchical_grouping import (
    HierarchicalGrouping,
    HierarchicalGroupingConfig,
    draw_pixels,
    n_uniforms,
)
from medssl.models import build_encoder
from medssl.models.encoders import UNet2dConfig
from medssl.runs.pretrain import pretrain

EXAMPLE = next(e for e in examples() if e.config.name == "hierarchical_grouping" and e.dims == 2)
TREE = HEIGHTS.view(1, 4, 4)


def drawn(regions, config, n_draws, heights=TREE, seed=0):
    """Pixels of ``n_draws`` independent draws in one image, (n_draws, A, 1 + p + n)."""
    uniforms = torch.rand(n_draws, n_uniforms(heights.shape[1], config), generator=torch.Generator().manual_seed(seed))
    regions = torch.tensor(regions)[None]
    return draw_pixels(regions.expand(n_draws, -1), heights.expand(n_draws, -1, -1), uniforms, config)


def test_pixels_are_drawn_as_often_as_their_heights_say():
    """Compared with probabilities pixel by pixel, which also depend on how many pixels regions have."""
    regions = [4, 1, 0, 2, 1, 3, 3, 3, 1, 2, -1, 0]  # 0 and -1 lie outside
    config = HierarchicalGroupingConfig(n_anchors=1, sigma_positive=0.4, sigma_negative=0.7)
    chosen, n = drawn(regions, config, 40_000), len(regions)
    anchors = torch.bincount(chosen[:, 0, 0], minlength=n) / len(chosen)
    size = torch.tensor([regions.count(r) for r in regions])
    inside = torch.tensor(regions) > 0
    assert_close(anchors, torch.where(inside, 0.25 / size, 0.0), atol=0.01, rtol=0)  # every region equally likely
    for anchor in (1, 9):
        rows = chosen[chosen[:, 0, 0] == anchor, 0]
        d = TREE[0][regions[anchor] - 1, torch.tensor(regions).clamp(min=1) - 1]
        for weight, pixels in (((-d / 0.4).exp(), rows[:, 1:11]), (1 - (-d / 0.7).exp(), rows[:, 11:])):
            weight = weight * inside
            weight[anchor] = 0  # never its own partner
            found = torch.bincount(pixels.flatten(), minlength=n) / pixels.numel()
            assert_close(found, weight / weight.sum(), atol=0.015, rtol=0)
            assert not found[weight == 0].any()


def test_anchors_lie_in_different_regions_and_are_missing_where_there_are_fewer():
    config = HierarchicalGroupingConfig(n_anchors=7)
    chosen = drawn([1, 1, 2, 4, 4, 4], config, 200)
    assert chosen.shape == (200, 4, 16)  # of four regions that a tree can have
    assert bool((chosen[:, 3] == -1).all())  # region 3 is not to be seen
    places = torch.tensor([1, 1, 2, 4, 4, 4])[chosen[:, :3, 0]].sort(1).values
    assert bool((places == torch.tensor([1, 2, 4])).all())


@pytest.mark.parametrize("regions", [[2, 2, 2, 2], [0, 0, 0, -1], [3, 0, 0, 0]])
def test_an_image_that_shows_one_region_or_none_is_skipped(regions):
    assert bool((drawn(regions, HierarchicalGroupingConfig(), 20) == -1).all())


def test_regions_of_one_height_and_pixels_without_a_likely_positive():
    same = torch.zeros(1, 2, 2)  # nothing between them: no negatives
    assert bool((drawn([1, 2, 1, 2], HierarchicalGroupingConfig(), 5, same) == -1).all())
    far = torch.tensor([[[0.0, 1e4], [1e4, 0.0]]])  # each region has one pixel, the other is out of reach
    assert bool((drawn([1, 2], HierarchicalGroupingConfig(), 5, far) == -1).all())


def test_skipped_images_are_left_out_of_the_mean_and_counted():
    method, batch = EXAMPLE.build(), make_batch(EXAMPLE, 0)
    method.eval()  # norms that see each item by itself, so that the others can be compared alone
    maps = batch.labels["label_map"].clone()
    maps[2:] = 1
    labels = {**batch.labels, "label_map": maps}
    some = method.training_loss(replace(batch, labels=labels))
    assert some.logs["skipped_items"] == 4
    # Without them the same numbers are drawn: those of a batch of two are the first of a larger one's.
    uniforms = method._uniforms(batch, 4)
    method._uniforms = lambda part, n: uniforms[: len(part.views[0])]
    alone = method.training_loss(part_of(replace(batch, labels=labels), slice(0, 2)))
    assert alone.logs["skipped_items"] == 0
    assert_close(some.loss, alone.loss)
    with pytest.warns(EmptyComparisonWarning, match="no anchor pixel"):
        nothing = method.training_loss(part_of(replace(batch, labels=labels), slice(2, 6)))
    assert nothing.loss == 0
    nothing.loss.backward()
    assert not any(bool(p.grad.any()) for p in method.parameters() if p.grad is not None)


def test_draws_depend_on_seed_step_and_slot_alone():
    method, batch = EXAMPLE.build(), make_batch(EXAMPLE, 0)
    uniforms = method._uniforms(batch, 4)
    backwards = {**batch.items, "slot": batch.items["slot"].flip(0)}
    assert torch.equal(method._uniforms(replace(batch, items=backwards), 4), uniforms.flip(0))
    for other in (replace(batch, step=1), replace(batch, seed=1)):
        assert not torch.equal(method._uniforms(other, 4), uniforms)
    assert method.training_loss(batch).logs["chance_loss"] == pytest.approx(math.log(6))


def test_training_sets_without_boundaries_are_refused_or_mentioned(caplog):
    method, items = EXAMPLE.build(), table()
    single = torch.full_like(HEIGHTS, torch.inf)
    single[0] = 0
    heights = items.labels["region_heights"].copy()
    heights[:3] = single
    with caplog.at_level(logging.WARNING):
        method.fit_labels(replace(items, labels={"region_heights": heights}))
    assert "3 of 12 items are one single region" in caplog.text
    heights[:] = single
    with pytest.raises(DataError, match="each of the 12 items is one single region"):
        method.fit_labels(replace(items, labels={"region_heights": heights}))
    with pytest.raises(ConfigError, match="no regions"):
        method.fit_labels(replace(items, labels={}))


def test_what_is_coarser_than_the_hypercolumn_is_not_trained():
    encoder = build_encoder(UNet2dConfig(widths=(4, 8, 8)), (1, 16, 16))
    config = HierarchicalGroupingConfig(levels=(0, 1), hidden_dim=4, map_stride=2)
    method = HierarchicalGrouping(config, ModelParts(encoder, None, (1, 16, 16)))
    method.training_loss(make_batch(EXAMPLE, 0)).loss.backward()
    assert all(p.grad is not None for level in (0, 1) for p in encoder.levels[level].parameters())
    assert not any(p.requires_grad for p in encoder.levels[2].parameters())


@pytest.mark.parametrize("levels", [(-1, 2), (0, 3), (-4, 0)])
def test_levels_that_are_one_or_not_there_are_refused(levels):
    encoder = build_encoder(UNet2dConfig(widths=(4, 8, 8)), (1, 16, 16))
    with pytest.raises(ConfigError, match="two different maps"):
        HierarchicalGrouping(HierarchicalGroupingConfig(levels=levels), ModelParts(encoder, None, (1, 16, 16)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four volumes with a bright box; beside each the boundary of two halves, and one that is blank."""
    folder = tmp_path_factory.mktemp("grouping")
    rng, rows = np.random.default_rng(0), ["subject,image,edges"]
    edges = np.zeros((16, 16, 4), dtype=np.float32)
    edges[:, 8] = 0.5
    nib.save(nib.Nifti1Image(0 * edges, np.eye(4)), folder / "none.nii.gz")
    for n in range(4):
        image = rng.normal(0, 0.1, edges.shape)
        image[3 : 9 + n, 4:10] += 3
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"i{n}.nii.gz")
        nib.save(nib.Nifti1Image(edges, np.eye(4)), folder / f"edges{n}.nii.gz")
        rows.append(f"s{n},i{n}.nii.gz,edges{n}.nii.gz")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def config_of(cohort, name, **method):
    return PretrainConfig.model_validate(
        {
            "name": name,
            "runs": str(cohort / "runs"),
            "data": {"manifest": str(cohort / "manifest.csv"), "cache": str(cohort / "cache")},
            "items": {"geometry": "slice"},
            "model": {"encoder": {"name": "unet2d", "widths": [4, 8], "norm": "group"}},
            "method": {"name": "hierarchical_grouping", "hidden_dim": 4, "map_stride": 2, **method},
            "sampler": {"name": "random", "batch_size": 4},
            "views": {"n_views": 1, "augment": {"affine": {"padding": "zeros"}, "flip": {}}},
            "training": {"steps": 2, "accelerator": "cpu", "log_every": 1},
        }
    )


def test_a_run_takes_its_regions_from_the_gradient_and_says_so(cohort):
    done = pretrain(config_of(cohort, "gradient"))
    assert "stands in for boundaries learnt from annotations" in done.summary["label_notes"][0]
    assert "stands in for boundaries" in done.report.read_text()
    assert done.summary["last"]["skipped_items"] == 0
    assert (done.weights / "encoder.safetensors").is_file()


def test_a_run_with_supplied_boundaries_notices_when_they_change(cohort):
    config = config_of(cohort, "edges", regions={"boundaries": "edges"})
    first = pretrain(config)
    assert first.summary["label_notes"] == []
    path = cohort / "edges2.nii.gz"
    image = nib.load(path)
    changed = np.array(image.dataobj)
    changed[8, :] = 0.25
    nib.save(nib.Nifti1Image(changed, np.eye(4)), path)
    with pytest.raises(CheckpointError, match="files"):
        pretrain(config, resume=True)


@pytest.mark.parametrize(
    ("regions", "says"),
    [({"boundaries": "borders"}, "needs the column `borders`"), ({"boundaries": "blank"}, "one single region")],
)
def test_runs_that_cannot_learn_are_refused_before_training(cohort, regions, says):
    text = (cohort / "manifest.csv").read_text()
    if "blank" not in text:
        header, *rows = text.splitlines()
        (cohort / "manifest.csv").write_text("\n".join([f"{header},blank", *(f"{row},none.nii.gz" for row in rows)]))
    with pytest.raises(DataError, match=says):
        pretrain(config_of(cohort, f"refused-{regions['boundaries']}", regions=regions))
