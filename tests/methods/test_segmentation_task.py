import math

import pytest
import torch
from method_examples import Example, make_batch
from torch.testing import assert_close

from medssl.core.errors import ConfigError, InputError
from medssl.core.types import ModelParts, ViewBatch
from medssl.methods import TASKS
from medssl.methods.segmentation import MixupConfig, SegmentationConfig, mix_items, one_hot, segmentation_losses

ENTRY = TASKS["segmentation"]


def example(dims: int = 2, **settings) -> Example:
    return Example(ENTRY, SegmentationConfig(n_classes=3, **settings), dims)


def losses(logits, label_map, *, over="batch", background=True):
    target, labelled = one_hot(label_map, logits.shape[1])
    return segmentation_losses(logits, target, labelled, over=over, background=background)


@pytest.mark.parametrize("over", ["batch", "item"])
@pytest.mark.parametrize("background", [True, False])
def test_losses_equal_a_loop_over_voxels(over, background):
    torch.manual_seed(0)
    logits, label_map = torch.randn(3, 3, 4, 5), torch.randint(-1, 3, (3, 4, 5))
    p = logits.softmax(1)
    terms, sums = [], {}
    for n in range(3):
        for k in range(3):
            for x in range(4):
                for y in range(5):
                    if label_map[n, x, y] < 0:
                        continue
                    true = float(label_map[n, x, y] == k)
                    if true:
                        terms.append(-math.log(p[n, k, x, y]))
                    key = (n if over == "item" else 0, k)
                    overlap, size = sums.get(key, (0.0, 0.0))
                    sums[key] = (overlap + float(p[n, k, x, y]) * true, size + float(p[n, k, x, y]) + true)
    dice = [1 - (2 * o + 1e-5) / (s + 1e-5) for (_, k), (o, s) in sums.items() if background or k > 0]
    found = losses(logits, label_map, over=over, background=background)
    assert_close(found[0], torch.tensor(sum(terms) / len(terms)))
    assert_close(found[1], torch.tensor(sum(dice) / len(dice)))


def test_a_perfect_prediction_costs_nothing_and_a_uniform_one_log_k():
    label_map = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    sure = 50.0 * one_hot(label_map, 3)[0]
    assert_close(torch.stack(losses(sure, label_map)), torch.zeros(2), atol=1e-5, rtol=0)
    assert_close(losses(torch.zeros(2, 3, 6, 6), label_map)[0], torch.tensor(math.log(3)))


@pytest.mark.parametrize("over", ["batch", "item"])
def test_unlabelled_voxels_have_no_say(over):
    torch.manual_seed(0)
    logits, label_map = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    label_map[0, :2] = -1
    sum(losses(logits, label_map, over=over)).backward()
    assert not logits.grad[0, :, :2].any()
    assert logits.grad[0, :, 2:].any()
    nothing = losses(logits.detach(), torch.full((2, 4, 4), -1), over=over)
    assert [float(value) for value in nothing] == [0.0, 0.0]


def test_an_item_without_labels_leaves_the_dice_of_the_others_alone():
    torch.manual_seed(0)
    logits, label_map = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    alone = losses(logits[:1], label_map[:1], over="item")
    label_map[1] = -1
    assert_close(losses(logits, label_map, over="item"), alone)


def test_mixup_takes_the_same_share_of_image_and_labels_from_seed_step_and_slot():
    n = 8
    images = torch.eye(n)[:, None, :, None].expand(n, 1, n, 2).contiguous()
    target, labelled = images[:, 0, :, None].expand(n, n, 3, 2), torch.ones(n, 1, 3, 2)
    config = MixupConfig(alpha=1.0, beta=1.0)

    def mixed(order, step=0):
        batch = ViewBatch((images,), (None,), {"slot": order}, step=step, seed=5)
        image, label, _ = mix_items(images[order], target[order], labelled[order], batch, config)
        assert_close(image[:, 0, :, 0], label[:, :, 0, 0])
        return image[order.argsort()]

    slots = torch.arange(n)
    shares = mixed(slots)[:, 0, :, 0]
    assert_close(shares.sum(1), torch.ones(n))
    assert ((shares > 0).sum(1) <= 2).all()
    assert_close(mixed(slots.flip(0)), mixed(slots))  # the order in which a process holds its items does not matter
    assert not torch.equal(mixed(slots, step=1), mixed(slots))


def test_mixup_counts_voxels_that_both_items_label():
    batch = ViewBatch((torch.zeros(2, 1, 3, 3),), (None,), {"slot": torch.arange(2)}, seed=1)
    label_map = torch.zeros(2, 3, 3, dtype=torch.int64)
    label_map[0, 0] = -1
    order = [mix_items(batch.views[0], *one_hot(label_map, 2), replace_step(batch, s), MixupConfig()) for s in range(8)]
    first_line = torch.stack([labelled[:, 0, 0, 0] for _, _, labelled in order])
    assert not first_line[:, 0].any()
    assert {0.0, 1.0} == set(first_line[:, 1].tolist())  # hidden where item 0 is the partner


def replace_step(batch: ViewBatch, step: int) -> ViewBatch:
    return ViewBatch(batch.views, batch.geometry, batch.items, batch.labels, step=step, seed=batch.seed)


@pytest.mark.parametrize("dims", [2, 3])
def test_network_gives_logits_on_the_grid_of_the_image(dims):
    method = example(dims).build()
    images = make_batch(example(dims), 0).views[0]
    assert method.network(images).shape == (len(images), 3, *images.shape[2:])
    assert method.encoder is method.network.encoder
    assert method.decoder is method.network.decoder


def test_the_classifier_depends_on_the_seed():
    a, b = (example().build(seed=seed).network.classifier.weight for seed in (0, 1))
    assert not torch.equal(a, b)


def test_labels_beyond_the_classes_and_incomplete_settings_are_refused():
    method, batch = example().build(), make_batch(example(), 0)
    batch.labels["label_map"][0, 3, 3] = 3
    with pytest.raises(InputError, match="label 3, 3 classes"):
        method.training_loss(batch)
    parts = ModelParts(method.encoder, method.decoder, (1, 16, 16))
    with pytest.raises(ConfigError, match="number of classes"):
        ENTRY.build(SegmentationConfig(), parts)
    with pytest.raises(ConfigError, match="no loss"):
        ENTRY.build(SegmentationConfig(n_classes=2, dice_weight=0, cross_entropy_weight=0), parts)
    with pytest.raises(ConfigError, match="needs a decoder"):
        ENTRY.build(SegmentationConfig(n_classes=2), ModelParts(method.encoder, None, (1, 16, 16)))
