"""The loop as it runs on an accelerator, where it waits for the device only now and then; and late signals."""

import os
import signal

import pytest
from training_toy import ToyMethod, toy_source, toy_train, validate

from medssl.core.errors import Interrupted, TrainingError
from medssl.training import TrainingConfig, loop, train
from medssl.training.checkpoint import Checkpoints
from medssl.training.signals import StopFlag


@pytest.fixture
def rare_waits(monkeypatch):
    """Looks at losses and signals every tenth step, on a CPU."""
    init = loop.Loop.__init__

    def rarely(self, *arguments):
        init(self, *arguments)
        self.sync_every = loop.SYNC_EVERY_ON_GPU

    monkeypatch.setattr(loop.Loop, "__init__", rarely)


@pytest.mark.parametrize("settings", [{"monitor_every": 1}, {"monitor_every": 4}, {"monitor_every": 50}])
def test_a_loss_that_is_not_finite_names_its_step_even_if_it_is_noticed_later(tmp_path, rare_waits, settings):
    with pytest.raises(TrainingError, match="step 2;"):
        toy_train(tmp_path, method=ToyMethod(poison_step=2), **settings)


def test_a_signal_stops_after_the_step(tmp_path, rare_waits):
    def ask(name, values):
        if name == "validated" and values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        toy_train(tmp_path, validate=validate, validate_every=2, on_event=ask)
    assert Checkpoints(tmp_path / "checkpoints").load().step == 2


def test_a_signal_after_the_last_step_reaches_the_enclosing_flag(tmp_path):
    def ask(name, values):
        if name == "finished":
            os.kill(os.getpid(), signal.SIGTERM)

    with StopFlag() as outer:
        toy_train(tmp_path, steps=2, on_event=ask)
        assert outer.raised == signal.SIGTERM


def test_a_budget_in_seconds_validates_its_last_step(tmp_path):
    seen = []

    def score(method, step):
        seen.append(step)
        return 0.5

    settings = TrainingConfig(seconds=0.2, accelerator="cpu", validate_every=10**6)
    result = train(ToyMethod(), toy_source(), settings, seed=0, run_dir=tmp_path, validate=score)
    assert seen == [result.steps] == [result.best_step]
    again = train(ToyMethod(), toy_source(), settings, seed=0, run_dir=tmp_path, validate=score, resume=True)
    assert again.best_step == result.best_step
    assert len(seen) == 1
