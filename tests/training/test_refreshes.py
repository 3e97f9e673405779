"""Refreshes come when they are due, change what follows from them, and are not repeated by a resumed run."""

import signal

import numpy as np
import pytest
import torch
from torch import nn
from training_toy import N_ITEMS, ToyMethod, ToyReader, logged, same_state, toy_source, toy_train

from medssl.core.errors import ConfigError, Interrupted
from medssl.samplers import SAMPLERS
from medssl.training import OptimizerConfig
from medssl.training.refreshing import Refreshes


class ClusterToy(ToyMethod):
    """Sorts items by the sum of their embedding into clusters, and draws its last layer anew each time."""

    def __init__(self, *, every: int = 3, heads: int = 1, **settings):
        super().__init__(**settings)
        self.every, self.heads = every, heads
        self.last = nn.Linear(8, 4)
        self.register_buffer("labels", torch.full((heads, N_ITEMS), -1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.drawn, self.seen = [], []

    def training_loss(self, batch):
        output = super().training_loss(batch)
        self.seen.append(batch.items["row"].tolist())
        wanted = self.labels[0, batch.items["row"]].clamp_min(0)
        loss = nn.functional.cross_entropy(self.last(self.encoder(batch.views[0])), wanted)
        return type(output)(output.loss + loss, output.logs, output.embedding)

    def refresh_steps(self, total_steps):
        return range(0, total_steps, self.every)

    def refresh(self, embed_all):
        h, _ = embed_all()
        rank = h.sum(1).argsort().argsort()
        self.labels.copy_((rank * rank * 4 // N_ITEMS**2).expand(self.heads, -1))  # unequal sizes
        self.count += 1
        generator = torch.Generator().manual_seed(int(self.count))
        with torch.no_grad():
            self.last.weight.copy_(torch.randn(4, 8, generator=generator))
        self.drawn = list(self.last.parameters())

    def reinitialised(self):
        return self.drawn

    def clusters(self):
        return self.labels.numpy()


def cluster_source(workers=2, **settings):
    reader = ToyReader()
    return toy_source(
        reader=reader, sampler=SAMPLERS["cluster_balanced"](reader.table, seed=0, batch_size=6, **settings)
    )


def train_clusters(folder, *, method=None, workers=2, **settings):
    return toy_train(folder, method=method or ClusterToy(), source=cluster_source(workers), **settings)


def test_batches_follow_the_new_clusters_and_are_the_same_for_any_number_of_workers(tmp_path):
    one, _ = train_clusters(tmp_path / "a", workers=2)
    two, _ = train_clusters(tmp_path / "b", workers=0)
    assert same_state(one, two)
    assert one.seen == two.seen
    assert one.count == 4  # before steps 0, 3, 6, 9
    plain = SAMPLERS["cluster_balanced"](ToyReader().table, seed=0, batch_size=6)
    last = plain.with_clusters(one.clusters())  # of step 9, used by steps 9 to 11
    assert one.seen[9:] == [last.batch(step).tolist() for step in (9, 10, 11)]
    assert one.seen[8] != last.batch(8).tolist()
    assert one.seen[0] != plain.batch(0).tolist()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_goes_on_with_the_clusters_it_had_bit_for_bit(tmp_path, stop):
    whole, _ = train_clusters(tmp_path / "whole")
    folder = tmp_path / "cut"

    def interrupt(name, values):
        if name == "checkpoint" and values["step"] == stop:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_clusters(folder, checkpoint_every=1, on_event=interrupt)
    refreshed = []
    resumed, _ = train_clusters(
        folder, resume=True, on_event=lambda name, v: refreshed.append(v["step"]) if name == "refresh" else None
    )
    assert refreshed == [step for step in (0, 3, 6, 9) if step >= stop]
    assert same_state(whole, resumed)
    assert whole.seen[stop:] == resumed.seen
    assert logged(folder) == logged(tmp_path / "whole")


def test_the_optimiser_forgets_weights_that_were_drawn_anew_and_no_others(tmp_path):
    source, method = cluster_source(), ClusterToy()
    optimizer = torch.optim.Adam(method.parameters())
    for _ in range(2):
        method.training_loss(source.batch(0)).loss.backward()
        optimizer.step()
    refreshes = Refreshes(method, source, optimizer, 12)
    refreshes.run()
    assert all(weight not in optimizer.state for weight in method.last.parameters())
    assert all(optimizer.state[weight]["step"] == 2 for weight in method.encoder.parameters())
    # And in a training: Adam's first step after a refresh is as long as the learning rate, whatever came before.
    before, moved = {}, []

    class Watch(ClusterToy):
        def training_loss(self, batch):
            before[batch.step] = self.last.weight.detach().clone()
            return super().training_loss(batch)

        def after_optimizer_step(self, progress):
            moved.append(float((self.last.weight.detach() - before[max(before)]).abs().max()))

    settings = OptimizerConfig(name="adam", learning_rate=1e-2)
    train_clusters(tmp_path, method=Watch(), optimizer=settings)
    rate = {int(row["step"]): float(row["learning_rate"]) for row in logged(tmp_path)}
    for step in (3, 6, 9):
        assert moved[step] == pytest.approx(rate[step + 1], rel=1e-3)


def test_a_head_that_the_method_does_not_have_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="no such head"):
        toy_train(tmp_path, method=ClusterToy(), source=cluster_source(head=1))


class Planned(ToyMethod):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.asked = plan, []

    def refresh_steps(self, total_steps):
        self.asked.append(total_steps)
        return self.plan(total_steps)


def test_with_a_budget_in_seconds_refreshes_come_by_the_estimated_number_of_steps():
    method = Planned(lambda total: [round(total * i / 10) for i in range(10)])
    refreshes = Refreshes(method, toy_source(), torch.optim.SGD(method.parameters(), lr=1.0), None)
    assert method.steps_per_epoch == N_ITEMS // 6
    assert refreshes.due(0, 0.0) == 1
    assert method.asked == [4]
    # 20 steps took a tenth of the time: 200 in all, with refreshes at 0 and 20; a slower step makes the total smaller.
    assert refreshes.due(19, 0.095) == 1
    assert refreshes.due(20, 0.1) == 2
    assert refreshes.due(21, 0.35) == 4
    assert method.asked[-1] == 60
    assert refreshes.next(20) is None


def test_a_training_of_seconds_refreshes_once_for_each_due_step_and_never_twice(tmp_path, monkeypatch):
    from medssl.training import loop

    clock = iter(np.arange(0, 1000, 0.01))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    steps = []
    method, result = toy_train(
        tmp_path,
        method=Planned(lambda total: range(0, total, 5)),
        steps=None,
        seconds=1.0,
        on_event=lambda name, v: steps.append(v["step"]) if name == "refresh" else None,
    )
    assert result.steps >= 15
    assert steps == list(range(0, result.steps, 5))
