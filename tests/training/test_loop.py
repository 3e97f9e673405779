import json

import pytest
import torch
from training_toy import ToyMethod, ToySampler, logged, same_state, toy_source, toy_train, validate

from medssl.core.errors import CheckpointError, ConfigError, TrainingError
from medssl.training import TrainingConfig, train
from medssl.training.config import OptimizerConfig


def test_the_same_seed_gives_the_same_weights_and_logs(tmp_path):
    one, result = toy_train(tmp_path / "a")
    two, _ = toy_train(tmp_path / "b")
    assert result.steps == 12
    assert same_state(one, two)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert not same_state(one, ToyMethod())
    other, _ = toy_train(tmp_path / "c", source=toy_source(sampler=ToySampler(seed=1)))
    assert not same_state(one, other)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_resuming_equals_an_undisturbed_run_bit_for_bit(tmp_path, name):
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=1e-3, clip_norm=1.0)
    whole, _ = toy_train(tmp_path / "whole", optimizer=optimizer, validate=validate, validate_every=4)
    rows = logged(tmp_path / "whole")
    for stop in (1, 5, 11) if name == "adam" else (7,):
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(_StopHere):
            toy_train(
                folder,
                optimizer=optimizer,
                validate=validate,
                validate_every=4,
                checkpoint_every=1,
                on_event=_stop_at(stop),
            )
        resumed, result = toy_train(folder, optimizer=optimizer, validate=validate, validate_every=4, resume=True)
        assert result.steps == 12
        assert same_state(whole, resumed)
        assert logged(folder) == rows


class _StopHere(Exception):  # noqa: N818
    pass


def _stop_at(step):
    def stop(name, values):
        if name == "checkpoint" and values["step"] == step:
            raise _StopHere

    return stop


def test_optimiser_state_after_resume_is_bit_equal(tmp_path):
    from safetensors.torch import load_file

    toy_train(tmp_path / "whole")
    with pytest.raises(_StopHere):
        toy_train(tmp_path / "cut", checkpoint_every=1, on_event=_stop_at(6))
    toy_train(tmp_path / "cut", resume=True)
    one, two = (load_file(tmp_path / run / "checkpoints/step-12/state.safetensors") for run in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer/") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_after_the_checkpoint_are_cut_on_resume(tmp_path):
    toy_train(tmp_path / "whole")
    rows = logged(tmp_path / "whole")
    with pytest.raises(_StopHere):
        toy_train(tmp_path / "cut", checkpoint_every=4, on_event=_stop_at(8))
    metrics = tmp_path / "cut/logs/metrics.csv"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1].replace("8,", "9,", 1) + "\n10,0.0")
    toy_train(tmp_path / "cut", resume=True)
    assert logged(tmp_path / "cut") == rows


def test_best_weights_are_put_back_and_survive_a_resume(tmp_path):
    kept = {}

    def remember(method, step):
        kept[step] = {name: value.clone() for name, value in method.state_dict().items()}
        return validate(method, step)

    method, result = toy_train(tmp_path / "whole", validate=remember, validate_every=3)
    assert result.best_step == 6
    assert sorted(kept) == [3, 6, 9, 12]
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, kept[6][name], rtol=0, atol=0)
    with pytest.raises(_StopHere):
        toy_train(tmp_path / "cut", validate=validate, validate_every=3, checkpoint_every=10, on_event=_stop_at(10))
    resumed, again = toy_train(tmp_path / "cut", validate=validate, validate_every=3, resume=True)
    assert again.best_step == 6
    assert again.best_score == result.best_score
    assert same_state(method, resumed)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    method, _ = toy_train(tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    again, result = toy_train(tmp_path, resume=True)
    after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert result.steps == 12
    assert same_state(method, again)
    assert [n for n, _ in before] == [n for n, _ in after]


def test_without_resume_an_earlier_training_is_not_overwritten(tmp_path):
    toy_train(tmp_path)
    with pytest.raises(CheckpointError, match="earlier training"):
        toy_train(tmp_path)


def test_a_changed_run_is_refused_with_its_differences_unless_allowed(tmp_path, caplog):
    before = {"config": {"method": {"temperature": 0.1}, "training": {"workers": 0}}, "manifest": "aa"}
    toy_train(tmp_path, fingerprint=before)
    free = {"config": {"method": {"temperature": 0.1}, "training": {"workers": 2}}, "manifest": "aa"}
    toy_train(tmp_path, fingerprint=free, resume=True)
    changed = {"config": {"method": {"temperature": 0.2}, "training": {"workers": 0}}, "manifest": "bb"}
    with pytest.raises(CheckpointError) as caught:
        toy_train(tmp_path, fingerprint=changed, resume=True)
    assert "config.method.temperature: 0.1 -> 0.2" in str(caught.value)
    assert "manifest: 'aa' -> 'bb'" in str(caught.value)
    toy_train(tmp_path, fingerprint=changed, resume=True, allow_changed=True)
    assert "resuming a changed run" in caplog.text


def test_another_environment_warns(tmp_path, caplog):
    from medssl.training import resume

    toy_train(tmp_path)
    real = resume._environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "_environment", lambda fabric: {**real(fabric), "torch": "1.0"})
        toy_train(tmp_path, resume=True)
    assert "-> '1.0'" in caplog.text


def test_a_loss_that_is_not_finite_stops_before_the_weights_see_it_and_names_the_items(tmp_path):
    method = ToyMethod(poison_step=7)
    with pytest.raises(TrainingError) as caught:
        toy_train(tmp_path / "bad", method=method, steps=20, checkpoint_every=3)
    rows = ToySampler().batch(7)
    assert "step 7" in str(caught.value)
    for row in rows:
        assert f"row {row}: case{row // 3}" in str(caught.value)
    assert json.loads((tmp_path / "bad/logs/nonfinite_step-7.json").read_text())["step"] == 7
    assert (tmp_path / "bad/checkpoints/last").read_text() == "step-6\n"
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def spoil(name, values):
        if name == "checkpoint" and values["step"] == 4:
            with torch.no_grad():
                method.refreshed[0] = float("inf")  # a buffer that the loss does not look at

    method = ToyMethod()
    with pytest.raises(TrainingError, match="not saved"):
        toy_train(tmp_path, method=method, checkpoint_every=2, on_event=spoil)
    assert (tmp_path / "checkpoints/last").read_text() == "step-4\n"


def test_collapse_is_named_once_and_recorded(tmp_path, caplog):
    _, result = toy_train(tmp_path, method=ToyMethod(collapsed=True), monitor_every=2, collapse_checks=3)
    assert len(result.collapse) == 1
    assert "constant embedding: spread" in result.collapse[0]
    assert "< 0.05" in result.collapse[0]
    assert result.collapse[0] in caplog.text
    assert [row["step"] for row in logged(tmp_path) if row["collapse_alarm"] == "1.0"] == ["6"]
    settings = {"monitor_every": 2, "collapse_checks": 3}
    with pytest.raises(_StopHere):
        toy_train(
            tmp_path / "cut", method=ToyMethod(collapsed=True), checkpoint_every=4, on_event=_stop_at(4), **settings
        )
    _, resumed = toy_train(tmp_path / "cut", method=ToyMethod(collapsed=True), resume=True, **settings)
    assert resumed.collapse == result.collapse
    _, healthy = toy_train(tmp_path / "healthy", monitor_every=2)
    assert healthy.collapse == []


def test_refresh_sees_every_item_before_its_step_and_batches_stay_the_same(tmp_path):
    events = []
    method, _ = toy_train(
        tmp_path / "a",
        method=ToyMethod(refresh_at=(0, 5)),
        workers=2,
        on_event=lambda name, v: events.append((name, v)),
    )
    assert [values["step"] for name, values in events if name == "refresh"] == [0, 5]
    assert method.refreshed.abs().sum() > 0
    inline, _ = toy_train(tmp_path / "b", method=ToyMethod(refresh_at=(0, 5)))
    assert same_state(method, inline)


def test_a_budget_in_seconds_stops_in_time_and_is_recorded(tmp_path):
    _, result = toy_train(tmp_path, steps=None, seconds=0.5)
    assert result.seconds == pytest.approx(0.5, abs=0.4)
    assert result.steps > 5
    info = json.loads((tmp_path / f"checkpoints/step-{result.steps}/trainer.json").read_text())
    assert info["seconds"] >= 0.5


@pytest.mark.parametrize("settings", [{}, {"steps": 5, "seconds": 3.0}])
def test_exactly_one_budget(settings):
    with pytest.raises(ValueError, match="budget"):
        TrainingConfig(**settings)


def test_a_device_or_precision_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="bf16"):
        toy_train(tmp_path / "a", precision="bf16")
    assert not (tmp_path / "a").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="GPU"):
            toy_train(tmp_path / "b", accelerator="gpu")
        assert not (tmp_path / "b").exists()


def test_nothing_trainable_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        toy_train(tmp_path, method=ToyMethod().requires_grad_(False))


def test_no_memory_at_the_first_step_gives_advice(tmp_path):
    class Greedy(ToyMethod):
        def training_loss(self, batch):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9e15")

    with pytest.raises(TrainingError) as caught:
        toy_train(tmp_path, method=Greedy())
    assert "halve the batch (it has 6 items)" in str(caught.value)


def test_tensorboard_events_are_written_when_asked(tmp_path):
    toy_train(tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    toy_train(tmp_path / "off")
    assert not (tmp_path / "off/tensorboard").exists()


def test_autocast_reaches_the_loss_with_one_process():
    """Fabric skips its precision for marked forward methods with one process; LossModule must not."""
    from lightning_fabric import Fabric

    from medssl.training.device import Batch, LossModule

    seen = []

    class Look(ToyMethod):
        def training_loss(self, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().training_loss(batch)

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    method = Look()
    model = fabric.setup_module(LossModule(method))
    loss, _, _ = model(Batch(toy_source().batch(0)))
    fabric.backward(loss)
    assert seen == [True]


def test_train_takes_a_launched_fabric(tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    method = ToyMethod()
    result = train(
        method, toy_source(), TrainingConfig(steps=2, accelerator="cpu"), seed=0, run_dir=tmp_path, fabric=fabric
    )
    assert result.steps == 2
