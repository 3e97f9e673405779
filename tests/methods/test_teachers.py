"""MoCo and BYOL: what their teachers and queue do between steps, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_examples import HEAD, Example, make_batch, part_of, table
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from medssl.core.errors import CheckpointError, ConfigError, InputError
from medssl.core.seeding import SHUFFLE, permutation
from medssl.core.types import ItemTable
from medssl.losses import queue_info_nce
from medssl.methods import METHODS
from medssl.methods.teacher import Teacher
from medssl.models.norm import SyncBatchNorm, norm_groups


def example(name="moco", dims=0, norm="group", **settings) -> Example:
    head = {} if settings.get("version") == "v1" else HEAD
    sizes = {"queue_size": 8} if name == "moco" else {}
    entry = METHODS[name]
    return Example(entry, entry.config(name=name, **{**sizes, **head, **settings}), dims, norm)


def step(method, batch, *, learning_rate=0.1):
    output = method.training_loss(batch)
    output.loss.backward()
    with torch.no_grad():
        for weight in method.parameters():
            if weight.grad is not None:
                weight -= learning_rate * weight.grad
                weight.grad = None
    return output


def test_a_teacher_averages_weights_and_keeps_its_own_statistics_in_training_mode():
    student = [nn.Linear(3, 4), SyncBatchNorm(4)]
    teacher = Teacher(*student)
    assert not any(weight.requires_grad for weight in teacher.parameters())
    with torch.no_grad():
        for part in student:
            for weight in part.parameters():
                weight += 1
    student[1](10 + torch.randn(6, 4))
    before = [weight.clone() for weight in teacher.parameters()]
    teacher.update(*student, decay=0.75)
    for weight, old in zip(teacher.parameters(), before, strict=True):
        assert_close(weight, old + 0.25)
    norm = teacher.network[1]
    assert not bool(norm.running_mean.any())
    assert teacher.eval().network[1].training
    out = teacher(torch.randn(5, 3))
    assert not out.requires_grad
    assert bool(norm.running_mean.any())
    assert_close(out.mean(0), norm.bias)  # the statistics of its batch


def test_byol_teacher_slows_down_on_a_cosine_and_stands_still_at_the_end():
    method = example("byol", ema_decay=0.9).build()
    assert method.decay(0) == pytest.approx(0.9)
    assert method.decay(0.5) == pytest.approx(0.95)
    assert method.decay(1) == 1
    step(method, make_batch(example("byol"), 0))
    before = [weight.clone() for weight in method.teacher.parameters()]
    method.after_optimizer_step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.teacher.parameters(), strict=True))
    method.after_optimizer_step(0.5)
    student = [*method.encoder.parameters(), *method.head.parameters()]
    for old, new, followed in zip(before, method.teacher.parameters(), student, strict=True):
        assert_close(new, 0.95 * old + 0.05 * followed.detach())


def test_moco_compares_with_the_queue_as_it_was_and_enqueues_after_the_step():
    case = example(queue_size=8)
    method = case.build()
    assert_close(method.queue.norm(dim=1), torch.ones(8))
    start, subject = method.queue.clone(), []
    for number in range(3):  # 6 keys a step into 8 places: the second and third wrap around
        batch = make_batch(case, number)
        with torch.no_grad():
            key = normalize(method.teacher(batch.views[1]), dim=1)
            query = method.head(method.encoder(batch.views[0]))
        known = method.queue_subject.clone()
        mask = known[None, :] != batch.items["subject"][:, None]
        queue = method.queue.clone()
        output = step(method, batch)
        assert_close(output.loss.detach(), queue_info_nce(query, key, queue, temperature=0.2, negative_mask=mask))
        assert_close(output.logs["chance_loss"], (1 + mask.sum(1)).float().log().mean())
        assert torch.equal(method.queue, queue)  # nothing moves before the step is done
        method.after_optimizer_step(0.5)
        for i, row in enumerate(key):
            place = (6 * number + i) % 8
            assert_close(method.queue[place], row)
            assert method.queue_subject[place] == batch.items["subject"][i]
        subject.append(batch.items["subject"])
        if number == 0:
            assert torch.equal(method.queue[6:], start[6:])
            assert method.queue_subject[6:].tolist() == [-1, -1]
    assert int(method.queue_pointer) == 18 % 8
    assert sorted(method.queue_subject.tolist()) == sorted([*subject[1][4:].tolist(), *subject[2].tolist()])


def test_keys_of_the_own_subject_repel_only_where_that_is_asked():
    case = example()
    batch = make_batch(case, 0)
    losses = []
    for exclude in (True, False):
        method = replace(case, config=case.config.model_copy(update={"exclude_same_subject": exclude})).build()
        method.queue_subject.copy_(batch.items["subject"][torch.arange(8) % 6])
        with torch.no_grad():  # every key of a subject is its own key: the hardest negative that there is
            method.queue.copy_(normalize(method.teacher(batch.views[1]), dim=1)[torch.arange(8) % 6])
        losses.append(float(method.training_loss(batch).loss.detach()))
    assert losses[0] < losses[1] - 0.1


def test_versions_differ_in_head_and_temperature():
    v1, v2 = example(version="v1", projection_dim=8).build(), example().build()
    assert (v1.temperature, v2.temperature) == (0.07, 0.2)
    assert sum(isinstance(part, nn.Linear) for part in v1.head.modules()) == 1
    assert sum(isinstance(part, nn.Linear) for part in v2.head.modules()) == 2
    with pytest.raises(ValueError, match="which version v1 has not"):
        METHODS["moco"].config(version="v1", head_norm="batch")
    assert example(temperature=0.5).build().temperature == 0.5


def test_a_queue_that_cannot_work_is_refused_before_training():
    with pytest.raises(ConfigError, match="longer than there are items") as error:
        example(queue_size=13).build()
    assert "13, for 12 items" in str(error.value)
    assert example(queue_size=5).config.needs().max_batch == 5
    with pytest.raises(InputError, match="shorter than the batch"):
        example(queue_size=5).build().training_loss(make_batch(example(), 0))
    rows = table()
    one = ItemTable(rows.row, rows.subject * 0, rows.volume, rows.partition, rows.position)
    with pytest.raises(ConfigError, match="one subject"):
        example().build().fit_labels(one)
    example(exclude_same_subject=False).build().fit_labels(one)
    with pytest.raises(ConfigError, match="the encoder has none"):
        example(norm="group", dims=2, shuffle_groups=2).build()
    grouped = example(norm="batch", shuffle_groups=4)
    assert grouped.config.needs().batch_multiple == 4
    assert [example(head_norm=norm).config.needs().min_batch for norm in ("none", "batch")] == [1, 2]
    with pytest.raises(InputError, match="divide the batch"):
        grouped.build().training_loss(make_batch(grouped, 0))


def test_a_queue_of_other_people_is_refused_with_a_message():
    method, other = example().build(), example().build()
    rows = table()
    other.fit_labels(ItemTable(rows.row, rows.subject[::-1].copy(), rows.volume, rows.partition, rows.position))
    with pytest.raises(CheckpointError, match="keys of other items"):
        other.load_state_dict(method.state_dict())
    example().build(seed=5).load_state_dict(method.state_dict())


def test_norms_in_groups_use_the_statistics_of_each_group():
    x = 3 + 2 * torch.randn(8, 4, 5, 5, dtype=torch.float64)
    ours, reference = SyncBatchNorm(4).double(), nn.BatchNorm2d(4).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(4))
        reference.weight.copy_(ours.weight)
    with norm_groups(ours, 2):
        assert_close(ours(x), torch.cat([reference(x[:4]), reference(x[4:])]))
    assert ours.groups == 0
    moments = [[part.mean((0, 2, 3)), part.var((0, 2, 3))] for part in (x[:4], x[4:])]
    assert_close(ours.running_mean, 0.1 * (moments[0][0] + moments[1][0]) / 2)
    assert_close(ours.running_var, 0.9 + 0.1 * (moments[0][1] + moments[1][1]) / 2)


def shuffled(rank=0, processes=1):
    """Two steps with groups that see other items in keys than in queries; what is left behind."""
    case = example(norm="batch", dims=2, shuffle_groups=2, queue_size=12)
    method = case.build(seed=1).double()
    found = []
    for number in range(2):
        batch = part_of(make_batch(case, number, dtype=torch.float64), slice(rank * 6 // processes, None))
        batch = part_of(batch, slice(0, 6 // processes))
        loss = method.training_loss(batch).loss
        loss.backward()
        trained = [weight for weight in method.parameters() if weight.grad is not None]
        for weight in trained:
            if processes > 1:
                dist.all_reduce(weight.grad)
            with torch.no_grad():
                weight -= 0.1 * weight.grad / processes
            weight.grad = None
        method.after_optimizer_step(0.5)
        found.append(loss.detach()[None])
    return torch.cat([*found, *(value.double().flatten() for value in method.state_dict().values())])


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(shuffled(rank, 2), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_shuffled_groups_and_the_queue_are_the_same_on_two_processes(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    one = shuffled()
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one, rtol=1e-9, atol=1e-9)


def test_shuffling_gives_each_key_the_statistics_of_other_items_than_its_query():
    case = example(norm="batch", dims=2, shuffle_groups=2, queue_size=12, head_norm="batch")
    method, batch = case.build(), make_batch(case, 0)
    _, query, key = method._in_groups(batch)
    order = permutation(6, 0, SHUFFLE, 0)
    again = case.build()
    expected = torch.empty_like(key)
    for group in order.reshape(2, 3):
        expected[group] = again.teacher(batch.views[1][group])
    assert_close(key, expected)
    groups = [again.head(again.encoder(batch.views[0][rows])) for rows in (slice(0, 3), slice(3, 6))]
    assert_close(query, torch.cat(groups))  # the head's norm in groups too, as the teacher's is
    assert not np.array_equal(np.sort(order.reshape(2, 3)[0]), [0, 1, 2])
    with pytest.raises(AssertionError):
        assert_close(key, case.build().teacher(batch.views[1]))
