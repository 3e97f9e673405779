import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training_toy import logged, same_state, toy_source, toy_train, validate

from medssl.core import distributed
from medssl.core.errors import Interrupted
from medssl.core.types import LossOutput, Method
from medssl.training import loop
from medssl.training.checkpoint import Checkpoints
from medssl.training.signals import STOP_SIGNALS, StopFlag

FULL = os.environ.get("MEDSSL_FAULTS") == "full"
FORK = multiprocessing.get_context("fork")


def send_at(name: str, step: int, number: signal.Signals):
    def on_event(event, values):
        if event == name and values["step"] == step:
            os.kill(os.getpid(), number)

    return on_event


MOMENTS = {
    "before step 1": ("started", 0, 0),
    "in validation": ("validated", 4, 4),
    "after a checkpoint": ("checkpoint", 6, 7),
}


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", STOP_SIGNALS if FULL else [signal.SIGTERM, signal.SIGUSR2], ids=lambda n: n.name)
def test_a_signal_stops_within_one_step_and_the_run_goes_on_bit_for_bit(tmp_path, moment, number):
    event, at, expected = MOMENTS[moment]
    settings = {"validate": validate, "validate_every": 2, "checkpoint_every": 3}
    whole, _ = toy_train(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted) as caught:
        toy_train(tmp_path / "run", on_event=send_at(event, at, number), **settings)
    assert caught.value.exit_code == 75
    assert number.name in str(caught.value)
    assert "--resume" in str(caught.value)
    assert expected - 1 <= Checkpoints(tmp_path / "run/checkpoints").load().step <= expected
    resumed, _ = toy_train(tmp_path / "run", resume=True, **settings)
    assert same_state(whole, resumed)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_a_signal_while_saving_does_not_harm_the_checkpoint(tmp_path, monkeypatch):
    real = Checkpoints.save

    def save(self, step, tensors, info):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, tensors, info)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Interrupted):
        toy_train(tmp_path, checkpoint_every=5)
    assert Checkpoints(tmp_path / "checkpoints").load().step == 5


def test_the_second_interrupt_stops_at_once_and_the_last_checkpoint_stays(tmp_path):
    def hurry(event, values):
        if event == "validated" and values["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, checkpoint_every=4, validate=validate, validate_every=2, on_event=hurry)
    assert Checkpoints(tmp_path / "checkpoints").load().step == 4


def test_handlers_are_put_back_and_other_threads_leave_them_alone():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopFlag() as flag:
        assert all(signal.getsignal(number) == flag._handle for number in STOP_SIGNALS)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    seen = []

    def enter():
        with StopFlag():
            seen.append([signal.getsignal(number) for number in STOP_SIGNALS])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


# -- kill -9 ------------------------------------------------------------------------------------------------------


def train_in_child(run_dir: Path, steps: int, saved) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def note(event, values):
        if event in ("started", "checkpoint"):
            saved.value = values["step"]

    toy_train(run_dir, steps=steps, checkpoint_every=1, resume=True, on_event=note)


@pytest.mark.faults
def test_kill_9_while_saving_all_the_time_loses_at_most_one_step(tmp_path):
    kills, steps, rng = (50 if FULL else 6), 120, random.Random(1)
    whole, _ = toy_train(tmp_path / "whole", steps=steps)
    rows = logged(tmp_path / "whole")
    saved, killed, survived, run = FORK.Value("q", -1), 0, 0, 0
    while killed < kills:
        folder = tmp_path / str(run)
        saved.value = -1
        child = FORK.Process(target=train_in_child, args=(folder, steps, saved))
        child.start()
        deadline = time.monotonic() + 60
        while saved.value < 0 and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        child.kill()
        child.join()
        loaded = Checkpoints(folder / "checkpoints").load()
        assert loaded is not None or saved.value == 0
        if loaded is not None:
            assert loaded.skipped == []
            assert loaded.step >= saved.value
        if child.exitcode == -signal.SIGKILL:
            killed += 1
            survived += loaded is not None
        if child.exitcode == 0 or killed == kills:  # the run came to its end between kills, or goes on undisturbed
            resumed, _ = toy_train(folder, steps=steps, resume=True)
            assert same_state(whole, resumed)
            assert logged(folder) == rows
            run += 1
        assert child.exitcode in (0, -signal.SIGKILL)
    assert survived >= kills // 2


# -- two processes ------------------------------------------------------------------------------------------------


class Gathering(Method):
    """Loss over the embeddings of the whole batch; equal in one process and in two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        self.unused = nn.Linear(2, 2)

    def training_loss(self, batch):
        a, b = (distributed.gather(self.encoder(view)) for view in batch.views)
        logits = nn.functional.normalize(a) @ nn.functional.normalize(b).T / 0.1
        loss = nn.functional.cross_entropy(logits, torch.arange(len(a)))
        return LossOutput(loss, {}, a.detach())


def one_of_two(rank: int, port: int, folder: Path, interrupt: bool) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)

    class Alarm(Gathering):
        def after_optimizer_step(self, progress):
            assert distributed.world_size() == 2
            if interrupt and rank == 1 and progress == 0.5:
                os.kill(os.getpid(), signal.SIGTERM)

    code = 0
    loop.LINGER_S = 0.0
    try:
        for resume in (False, True) if interrupt else (False,):
            interrupt = interrupt and not resume
            try:
                method, _ = toy_train(folder, method=Alarm(), source=toy_source(), devices=2, resume=resume)
            except Interrupted as error:
                code = error.exit_code
        if rank == 0:
            torch.save(method.state_dict(), folder / "final.pt")
        (folder / f"code{rank}").write_text(str(code))
    finally:
        os._exit(0)


@pytest.mark.distributed
def test_two_processes_train_as_one_and_stop_together(tmp_path):
    import socket

    one, _ = toy_train(tmp_path / "one", method=Gathering())
    losses = [float(row["loss"]) for row in logged(tmp_path / "one")]
    for interrupt in (False, True):
        folder = tmp_path / f"two{interrupt}"
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [FORK.Process(target=one_of_two, args=(rank, port, folder, interrupt)) for rank in (0, 1)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode is not None, "a process hangs"
        assert [(folder / f"code{rank}").read_text() for rank in (0, 1)] == ["75" if interrupt else "0"] * 2
        assert [float(row["loss"]) for row in logged(folder)] == pytest.approx(losses, rel=1e-5)
        final = torch.load(folder / "final.pt", weights_only=True)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(final[name], value, rtol=1e-4, atol=1e-6)
