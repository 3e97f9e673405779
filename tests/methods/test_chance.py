"""`chance_loss` of contrastive methods: what their loss is when all embeddings are equal."""

import math
from dataclasses import replace

import pytest
import torch
from method_examples import examples, make_batch
from torch.testing import assert_close

CONTRASTS = {"simclr", "dcl", "gcl", "supcon", "sup_info_nce", "y_aware", "decoupled_uniformity"}
EXAMPLES = [one for one in examples() if one.config.name in CONTRASTS and one.dims != 3 and one.debias is None]
EXAMPLES += [
    replace(one, config=one.config.model_copy(update={"prior": None}))
    for one in EXAMPLES
    if one.config.name == "decoupled_uniformity" and one.first
]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_head_that_gives_one_point_has_the_loss_that_is_logged_as_chance(example):
    method = example.build()
    batch = make_batch(example, 0)
    healthy = method.training_loss(batch)
    last = [part for part in method.head.modules() if isinstance(part, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)
    if last.bias is not None:
        torch.nn.init.ones_(last.bias)
    collapsed = method.training_loss(batch)
    if example.config.name == "decoupled_uniformity" and example.config.prior is not None:
        assert not collapsed.logs  # a prior moves equal centroids apart
        return
    chance = collapsed.logs["chance_loss"]
    assert not chance.requires_grad
    assert_close(collapsed.loss.detach(), chance, rtol=1e-5, atol=1e-5)
    assert_close(healthy.logs["chance_loss"], chance)  # whatever the embeddings are
    assert (healthy.loss.detach() - chance).abs() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"), [("simclr", math.log(11)), ("dcl", math.log(10)), ("y_aware", math.log(11))]
)
def test_chance_of_six_items_in_two_views(name, value):
    """2N - 1 rows beside the anchor, of which dcl leaves the positive out."""
    example = next(one for one in EXAMPLES if one.config.name == name)
    logs = example.build().training_loss(make_batch(example, 0)).logs
    assert_close(logs["chance_loss"], torch.tensor(value))
