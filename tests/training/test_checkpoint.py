import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from training_toy import same_state, toy_train

from medssl.core.errors import CheckpointError, DiskError
from medssl.training import checkpoint
from medssl.training.checkpoint import Checkpoints, differences
from medssl.training.lock import STALE_S, RunLock

FULL = os.environ.get("MEDSSL_FAULTS") == "full"
MEMBERS = ("state.safetensors", "trainer.json", "SHA256SUMS")


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"method/w": torch.randn(16, 5, generator=generator), "optimizer/0/step": torch.tensor(float(step))}


def write(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), {"step": step, "list": [1, None, 0.1]})
    return checkpoints


def is_state(tensors: dict[str, torch.Tensor], step: int) -> bool:
    return tensors.keys() == state(step).keys() and all(torch.equal(tensors[n], v) for n, v in state(step).items())


def test_what_is_saved_is_what_is_loaded(tmp_path):
    tensors = {
        "a": torch.tensor(3),
        "b": torch.randn(2, 3).bfloat16(),
        "c": torch.empty(0, 4),
        "d": torch.tensor([True, False]),
        "e": torch.tensor([float("nan"), 1e-45], dtype=torch.float64),
    }
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(7, tensors, {"lr": 0.1})
    loaded = checkpoints.load()
    assert sorted(p.name for p in path.iterdir()) == sorted(MEMBERS)
    assert (loaded.step, loaded.info, loaded.skipped) == (7, {"lr": 0.1}, [])
    for name, value in tensors.items():
        assert loaded.tensors[name].dtype == value.dtype
        torch.testing.assert_close(loaded.tensors[name], value, rtol=0, atol=0, equal_nan=True)


def test_the_newest_are_kept_and_last_names_the_newest(tmp_path):
    checkpoints = write(tmp_path, 1, 2, 10, 9 + 11, keep=3)
    assert checkpoints.steps() == [20, 10, 2]
    assert (tmp_path / "last").read_text() == "step-20\n"
    assert not list(tmp_path.glob("*.tmp"))
    assert Checkpoints(tmp_path / "none").load() is None


def damages(rng: random.Random):
    """(name, function of a checkpoint folder) for each damage that must be noticed."""

    def truncate(member, share):
        def act(folder):
            content = (folder / member).read_bytes()
            (folder / member).write_bytes(content[: int(share * len(content))])

        return act

    def flip(member, place, bit):
        def act(folder):
            content = bytearray((folder / member).read_bytes())
            content[int(place * len(content))] ^= 1 << bit
            (folder / member).write_bytes(bytes(content))

        return act

    def delete(member):
        return lambda folder: (folder / member).unlink()

    for i in range(20 if FULL else 4):
        member = MEMBERS[i % 3]
        yield f"truncated {member}", truncate(member, i / 20)
    for i in range(200 if FULL else 24):
        member = MEMBERS[i % 3]
        yield f"flipped {member}", flip(member, rng.random(), rng.randrange(8))
    for member in MEMBERS:
        yield f"deleted {member}", delete(member)
    yield "wrong sums", lambda folder: (folder / "SHA256SUMS").write_text("0" * 64 + "  state.safetensors\n")


@pytest.mark.faults
def test_every_damage_is_noticed_and_the_checkpoint_before_is_taken(tmp_path):
    original = tmp_path / "original"
    write(original, 1, 2)
    for number, (name, damage) in enumerate(damages(random.Random(0))):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        damage(folder / "step-2")
        loaded = Checkpoints(folder).load()
        assert loaded.step == 1, name
        assert is_state(loaded.tensors, 1), name
        assert len(loaded.skipped) == 1
        assert "step-2 skipped" in loaded.skipped[0]
        shutil.rmtree(folder)


def test_when_all_are_damaged_nothing_is_loaded(tmp_path):
    checkpoints = write(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step}/trainer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load()
    assert "step-1 skipped" in str(caught.value)
    assert "step-2 skipped" in str(caught.value)


def test_a_run_resumes_before_a_damaged_checkpoint_and_replaces_it(tmp_path):
    whole, _ = toy_train(tmp_path / "whole")
    toy_train(tmp_path / "run", checkpoint_every=4, keep=3)
    for name in ("step-12", "step-8"):
        (tmp_path / "run/checkpoints" / name / "state.safetensors").write_bytes(b"damaged")
    resumed, result = toy_train(tmp_path / "run", checkpoint_every=4, keep=3, resume=True)
    assert [line.split()[1] for line in result.skipped] == ["step-12", "step-8"]
    assert same_state(whole, resumed)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    assert checkpoints.load().step == 12
    assert checkpoints.load(8).step == 8
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))


def test_nothing_executes_on_load(tmp_path):
    import pickle

    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    checkpoints = write(tmp_path / "c", 1, 2)
    evil = tmp_path / "c/step-2"
    contents = {"state.safetensors": pickle.dumps(Canary()), "trainer.json": (evil / "trainer.json").read_bytes()}
    for name, content in (contents | {"SHA256SUMS": checkpoint._sums(contents)}).items():
        (evil / name).write_bytes(content)
    assert checkpoints.load().step == 1
    assert not (tmp_path / "executed").exists()


# -- full disks ---------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(n_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.faults
def test_a_full_disk_keeps_the_old_checkpoint_and_says_space(tmp_path):
    checkpoints = write(tmp_path, 1)
    size = (tmp_path / "step-1/state.safetensors").stat().st_size
    for limit in range(0, size, size // 10 if FULL else size // 2):
        with file_size_limit(limit), pytest.raises(DiskError, match="space"):
            checkpoints.save(2, state(2), {})
        assert is_state(checkpoints.load().tensors, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]
    checkpoints.save(2, state(2), {})
    assert checkpoints.load().step == 2


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = write(tmp_path, 1)
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DiskError, match="space"):
        checkpoints.save(2, state(2), {})
    assert checkpoints.steps() == [1]


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path, monkeypatch):
    checkpoints = write(tmp_path, 1)

    def refuse(*_args, **_keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint, "_write", refuse)
    with pytest.raises(DiskError, match="read-only"):
        checkpoints.save(2, state(2), {})
    assert checkpoints.load().step == 1


# -- kills at every operation -------------------------------------------------------------------------------------


def killed_at(operation: int, folder: Path) -> bool:
    """Save step 3 in a child that dies at its n-th operation on the disk; False when it lived to the end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            count = 0

            def dying(function):
                def call(*args, **keywords):
                    nonlocal count
                    if count == operation:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                    return function(*args, **keywords)

                return call

            os.fsync, os.rmdir, os.unlink = dying(os.fsync), dying(os.rmdir), dying(os.unlink)
            os.replace, os.mkdir = dying(os.replace), dying(os.mkdir)
            Path.replace, Path.mkdir, Path.open = dying(Path.replace), dying(Path.mkdir), dying(Path.open)
            Checkpoints(folder).save(3, state(3), {"step": 3})
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.faults
def test_a_kill_at_any_operation_of_a_save_loses_nothing(tmp_path):
    original = tmp_path / "original"
    write(original, 1, 2)
    seen = set()
    for operation in range(200):
        folder = tmp_path / str(operation)
        shutil.copytree(original, folder)
        killed = killed_at(operation, folder)
        loaded = Checkpoints(folder).load()
        assert loaded.step in (2, 3)
        assert loaded.skipped == []
        assert is_state(loaded.tensors, loaded.step)
        seen.add(loaded.step)
        checkpoints = Checkpoints(folder)
        checkpoints.clean()
        assert not list(folder.glob("*.tmp"))
        checkpoints.save(4, state(4), {})
        assert checkpoints.load().step == 4
        assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
        if not killed:
            break
    assert operation >= 12
    assert seen == {2, 3}


# -- one writer ---------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(CheckpointError) as caught:
            toy_train(tmp_path)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    toy_train(tmp_path, steps=1)


def test_a_killed_writer_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).__enter__()
        (tmp_path / "locked").touch()
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(CheckpointError):
        RunLock(tmp_path).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_writer_on_another_host_counts_until_it_falls_silent(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2026-01-01T00:00:00+00:00"}))
    with pytest.raises(CheckpointError, match="another process"):
        RunLock(tmp_path).__enter__()
    silent = time.time() - STALE_S - 1
    os.utime(path, (silent, silent))
    with RunLock(tmp_path) as lock:
        os.utime(path, (silent, silent))
        lock.beat()
        assert time.time() - path.stat().st_mtime < 60


def test_differences_are_listed_by_place():
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": True, "same": None}
    now = {"a": {"b": 2, "c": [1, 2]}, "new": "x", "same": None}
    assert differences(before, now) == ["a.b: 1 -> 2", "gone: True -> None", "new: None -> 'x'"]
