"""SwAV: frozen prototypes, the queue, multi-crop, and what it refuses."""

import logging

import pytest
import torch
from method_examples import HEAD, Example, make_batch, table, train
from torch.testing import assert_close

from medssl.core.errors import ConfigError
from medssl.losses import swav
from medssl.methods import METHODS
from medssl.methods.entry import embed_views
from medssl.methods.swav import SwAVConfig
from medssl.training.optimizers import LARS


def example(dims=0, crops=0, views=2, **settings):
    config = SwAVConfig(**{"n_prototypes": 4, **HEAD, **settings})
    return Example(METHODS["swav"], config, dims, views=views, crops=crops)


def step(method, optimizer, batch, progress):
    output = method.training_loss(batch)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    method.after_optimizer_step(progress)
    return output


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5), lambda p: LARS(p, lr=1)])
def test_frozen_prototypes_do_not_move_by_a_bit_and_then_learn_at_length_one(optimizer):
    case = example(freeze_steps=2)
    method = case.build()
    start = method.prototypes.detach().clone()
    assert_close(start.norm(dim=1), torch.ones(4))
    update = optimizer(method.parameters())
    for number in range(4):
        step(method, update, make_batch(case, number), number / 4)
        assert torch.equal(method.prototypes, start) == (number < 2)
    assert_close(method.prototypes.norm(dim=1), torch.ones(4))


def test_by_default_prototypes_are_frozen_for_an_epoch():
    method = example().build()
    method.steps_per_epoch = 3
    for number in range(5):
        method.training_loss(make_batch(example(), number)).loss.backward()
        assert method.prototypes.grad.any() == (number >= 3)
        method.prototypes.grad = None


def test_the_queue_fills_first_in_first_out_from_its_share_and_counts_once_it_is_full():
    case = example(queue_size=9, queue_from=0.5, epsilon=0.5)
    method, settings = case.build(), {"epsilon": 0.5}
    update = torch.optim.SGD(method.parameters(), lr=0.0)
    seen = []
    for number in range(6):
        batch = make_batch(case, number)
        _, z = embed_views(method.encoder, method.head, batch)
        queue = method.queue.clone() if len(seen) >= 2 else None
        for _ in range(2):  # asking changes nothing
            output = method.training_loss(batch)
        assert_close(output.loss, swav(z, method.prototypes, queue=queue, **settings))
        assert (queue is None) == torch.equal(output.loss, swav(z, method.prototypes, **settings))
        step(method, update, batch, (number + 1) / 6)
        if (number + 1) / 6 >= 0.5:
            unit = torch.nn.functional.normalize(z.detach(), dim=2).transpose(0, 1)
            seen.insert(0, unit)
            kept = torch.cat(seen, dim=1)[:, :9]
            assert_close(method.queue[:, : kept.shape[1]], kept)
        assert not method.queue[:, 6 * len(seen) :].any()
        assert int(method.queue_filled) == min(9, 6 * len(seen))


def test_a_queue_smaller_than_the_batch_keeps_the_first_of_the_newest_and_a_loaded_state_is_looked_at_again():
    case = example(queue_size=4, queue_from=0.0)
    method = case.build()
    empty = {name: value.clone() for name, value in method.state_dict().items()}
    batch = make_batch(case, 0)
    without = method.training_loss(batch).loss
    method.after_optimizer_step(0.1)
    assert int(method.queue_filled) == 4
    method.train()
    assert not torch.equal(method.training_loss(batch).loss, without)
    method.load_state_dict(empty)
    assert torch.equal(method.training_loss(batch).loss, without)


def test_one_pass_through_the_encoder_for_each_size_and_crops_only_predict():
    case = example(dims=3, crops=3)
    method, batch = case.build(), make_batch(example(dims=3, crops=3), 0)
    sizes = []
    method.encoder.register_forward_hook(lambda module, inputs, out: sizes.append(tuple(inputs[0].shape)))
    loss = method.training_loss(batch).loss
    assert sizes == [(12, 1, 8, 8, 8), (18, 1, 4, 4, 4)]
    with torch.no_grad():
        h = torch.stack([method.encoder(view) for view in batch.views])  # (V, N, F)
        z = method.head(h.flatten(0, 1)).unflatten(0, h.shape[:2]).transpose(0, 1)
        assert_close(loss, swav(z, method.prototypes))
        order = [2, 0, 3, 1, 4]  # sizes mixed up
        mixed = type(batch)(tuple(batch.views[v] for v in order), batch.geometry, batch.items)
        _, again = embed_views(method.encoder, method.head, mixed)
        assert_close(again, z[:, order])


def test_assign_gives_the_nearest_prototype_in_evaluation_mode():
    case = example()
    method = case.build()
    h = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    buffers = {name: value.clone() for name, value in method.named_buffers()}
    found = method.assign(h)
    assert method.head.training
    assert all(torch.equal(buffers[name], value) for name, value in method.named_buffers())
    z = torch.nn.functional.normalize(method.head.eval()(h), dim=1)
    assert torch.equal(found, torch.cdist(z, method.prototypes).argmin(1)[None])


def test_logs_say_what_a_guess_costs_and_how_many_prototypes_are_used():
    method = example(n_prototypes=8).build()
    with torch.no_grad():
        method.prototypes.copy_(method.prototypes[:1].clone())  # all alike: ties go to one
    logs = method.training_loss(make_batch(example(), 0)).logs
    assert_close(logs["chance_loss"], torch.tensor(8.0).log())
    assert_close(logs["used_prototypes"], torch.tensor(1 / 8))


def test_more_prototypes_or_a_longer_queue_than_items_are_refused_and_few_rows_are_warned_of(caplog):
    with pytest.raises(ConfigError, match="n_prototypes is larger than the number of items") as error:
        example(n_prototypes=13).build()
    assert "13 for 12 items" in str(error.value)
    with pytest.raises(ConfigError, match="queue_size is larger"):
        example(queue_size=13).build()
    with pytest.raises(ValueError, match="named twice"):
        SwAVConfig(assign_views=(1, 1))
    few, enough = example(n_prototypes=12, queue_size=5).build(), example(n_prototypes=12, queue_size=6).build()
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            enough.training_loss(make_batch(example(), number))
        assert caplog.messages == []
        for number in range(2):
            few.training_loss(make_batch(example(), number))
    assert len(caplog.messages) == 1
    assert "11 rows (batch and queue) are shared out over 12 prototypes" in caplog.messages[0]


@pytest.mark.parametrize("queue", [{}, {"queue_size": 9, "queue_from": 0.0}])
def test_it_comes_to_tell_items_apart_far_better_than_a_guess(queue):
    case = example(**queue)
    outputs = train(case, case.build(), 150, learning_rate=1e-2)
    last = torch.stack([output.loss for output in outputs[-20:]]).mean()
    assert last < 0.5 * outputs[-1].logs["chance_loss"]
    assert torch.stack([output.logs["used_prototypes"] for output in outputs[-20:]]).mean() > 0.5


def test_the_table_of_the_examples_is_what_the_limits_above_refer_to():
    assert len(table()) == 12
