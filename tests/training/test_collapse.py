"""Each collapse is named by what it looks like, at limits that settings move, and forgotten when it is gone."""

import math

import pytest
import torch
from training_toy import ToyMethod, logged, toy_train

from medssl.training import TrainingConfig
from medssl.training.monitors import (
    CHANCE,
    CONSTANT,
    DEAD,
    RANK,
    CollapseAlarm,
    collapse_signs,
    effective_rank,
    embedding_spread,
)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def signs(embedding=None, *, items=8, logs=(), **settings):
    return collapse_signs(
        TrainingConfig(steps=1, **settings), logs={"loss": 1.0, **dict(logs)}, embedding=embedding, items=items
    )[0]


def test_spread_is_one_on_the_sphere_and_zero_when_collapsed():
    assert embedding_spread(drawn(20_000, 16)) == pytest.approx(1.0, abs=0.01)
    assert embedding_spread(torch.ones(10, 4)) == 0.0
    assert embedding_spread(torch.arange(1.0, 11.0)[:, None] * torch.ones(1, 4)) == pytest.approx(0.0, abs=1e-7)
    assert embedding_spread(torch.ones(1, 4)) == 0.0


def test_effective_rank_counts_equal_directions():
    directions = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(directions) == pytest.approx(5.0)
    assert effective_rank(torch.outer(torch.arange(6.0), torch.ones(4))) == pytest.approx(1.0)
    assert effective_rank(torch.ones(6, 4)) == 0.0


def test_a_healthy_batch_shows_no_sign():
    logs = {"loss": 2.0, "chance_loss": math.log(20), "used_prototypes": 0.3}
    assert signs(drawn(16, 8), logs=logs) == {}


def test_the_embedding_is_constant_or_has_lost_dimensions_never_both():
    constant = torch.ones(16, 8) + 1e-3 * drawn(16, 8)
    line = torch.outer(torch.linspace(-1, 1, 16), drawn(8)) + 1e-3 * drawn(16, 8)
    assert list(signs(constant)) == [CONSTANT]
    assert "< 0.05" in signs(constant)[CONSTANT]
    assert list(signs(line)) == [RANK]
    assert "where 8 is possible" in signs(line)[RANK]
    assert list(signs(torch.ones(16, 8))) == [CONSTANT]
    assert signs(constant, collapse_spread=0.0) == signs(line, collapse_rank=0.0) == {}


def test_a_rank_that_the_batch_does_not_allow_is_no_sign():
    plane = drawn(16, 2) @ drawn(2, 8)
    assert list(signs(plane, collapse_rank=3.0)) == [RANK]
    assert signs(plane[:4], collapse_rank=3.0) == {}  # of 3 possible directions half is enough
    assert signs(drawn(2, 8)) == {}  # two rows have one direction
    assert signs(torch.ones(1, 8)) == {}  # one row says nothing


@pytest.mark.parametrize(
    ("loss", "chance", "named"),
    [(6.85, 6.9, True), (6.80, 6.9, False), (6.95, 6.9, True), (0.005, 0.0, True), (0.02, 0.0, False)],
)
def test_a_loss_near_that_of_a_uniform_guess_is_named(loss, chance, named):
    logs = {"loss": loss, "chance_loss": chance}
    assert (CHANCE in signs(logs=logs)) == named
    assert CHANCE not in signs(logs=logs, collapse_chance=0.0)
    beside = {**logs, "main_loss": loss, "loss": loss + 3.0}  # a regulariser on top is no learning
    assert (CHANCE in signs(logs=beside)) == named


def test_without_a_chance_there_is_no_chance_level():
    assert signs(logs={"loss": 0.0}) == {}


@pytest.mark.parametrize(
    ("k", "items", "used", "named"),
    [
        (3000, 256, 100 / 3000, False),  # 245 would be hit by even choices: 41 %
        (3000, 256, 50 / 3000, True),
        (10, 64, 0.3, False),
        (10, 64, 0.2, True),
        (3, 8, 1 / 3, True),  # a single one, though a third of all
        (3, 8, 2 / 3, False),
        (100, 1, 0.01, False),  # one item prefers one
    ],
)
def test_prototypes_are_dead_where_the_batch_could_have_used_more(k, items, used, named):
    logs = {"loss": 0.0, "chance_loss": math.log(k), "used_prototypes": used}
    assert (DEAD in signs(logs=logs, items=items)) == named
    assert DEAD not in signs(logs=logs, items=items, collapse_prototypes=0.0)


def test_the_alarm_waits_for_looks_in_a_row_of_one_sign_and_can_go_off_again():
    alarm = CollapseAlarm(TrainingConfig(steps=1, collapse_checks=2))
    a, b = {CONSTANT: "spread 0"}, {RANK: "effective rank 1"}
    looks = [a, {}, a, b, b, a | b, a, {}, a, a]
    fired = [alarm.look(10 * i, found) for i, found in enumerate(looks)]
    assert [len(lines) for lines in fired] == [0, 0, 0, 0, 1, 0, 1, 0, 0, 1]
    assert fired[4] == ["dimensional collapse: effective rank 1, at 2 looks in a row up to step 40; try a larger "
                        "batch, stronger views or a wider projection"]  # fmt: skip
    assert list(alarm.alarms) == [CONSTANT]
    assert [line.split(";")[-1] for line in alarm.recovered] == [" gone at step 60", " gone at step 70"]


class Guess(ToyMethod):
    """At chance until step 8."""

    def training_loss(self, batch):
        output = super().training_loss(batch)
        chance = output.loss.detach() + (0.0 if batch.step < 8 else 2.0)
        logs = {**output.logs, "chance_loss": chance, "used_prototypes": torch.tensor(1.0)}
        return type(output)(output.loss, logs, None)


def test_a_training_names_what_is_there_at_the_end_and_what_went_away(tmp_path):
    events = []
    settings = {"monitor_every": 2, "collapse_checks": 2, "collapse_prototypes": 0.0}
    _, result = toy_train(
        tmp_path,
        method=Guess(),
        on_event=lambda name, values: events.append(values) if name == "collapse" else None,
        **settings,
    )
    assert result.collapse == []
    assert len(result.recovered) == 1
    assert result.recovered[0].startswith("loss at chance: loss ")
    assert result.recovered[0].endswith("gone at step 10")
    assert [values["step"] for values in events] == [4]
    assert [row["step"] for row in logged(tmp_path) if row["collapse_alarm"] == "1.0"] == ["4"]
    _, stuck = toy_train(tmp_path / "stuck", method=Guess(), steps=8, **settings)
    assert [line.split(":")[0] for line in stuck.collapse] == [CHANCE]
