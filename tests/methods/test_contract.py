"""What every listed method and task promises. A new entry is covered with its defaults by being listed."""

import pytest
import torch
from method_examples import Example, examples, make_batch, spread, train

from medssl.core.types import Method

EXAMPLES = [pytest.param(example, id=str(example)) for example in examples()]
every_method = pytest.mark.parametrize("example", EXAMPLES)
TRAINED = [p for p in EXAMPLES if not p.values[0].costly]  # training takes seconds


def backward(example: Example, method: Method, step: int = 0) -> torch.Tensor:
    loss = method.training_loss(make_batch(example, step)).loss
    loss.backward()
    return loss.detach()


def silent(module: torch.nn.Module) -> list[str]:
    """Weights that no gradient reached."""
    return [name for name, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())]


@every_method
def test_loss_is_a_finite_scalar_and_what_is_watched_is_detached(example):
    method = example.build()
    output = method.training_loss(make_batch(example, 0))
    assert output.loss.shape == ()
    assert bool(output.loss.isfinite())
    assert all(value.shape == () and not value.requires_grad for value in output.logs.values())
    if output.embedding is not None:
        assert output.embedding.ndim == 2
        assert not output.embedding.requires_grad


@every_method
def test_features_are_those_that_the_configuration_promises(example):
    method, batch = example.build(), make_batch(example, 0)
    features = method.training_loss(batch).features
    assert set(features) == set(example.needs.features)
    trained = any(weight.requires_grad for weight in method.encoder.parameters())
    for value in features.values():
        assert len(value) == len(batch.views[0])
        assert value.requires_grad == trained
    if "h" in features:
        h = method.encoder(batch.views[0])  # its norms see each item by itself, so the other views play no part
        torch.testing.assert_close(features["h"], h, atol=1e-5, rtol=1e-4)


@every_method
def test_gradient_reaches_what_must_learn_and_nothing_else(example):
    method = example.build()
    backward(example, method)
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in method.named_parameters() if not p.requires_grad and p.grad is not None] == []
    for part, module in (("encoder", method.encoder), ("decoder", method.decoder)):
        if part in example.needs.trains:
            assert silent(module) == []
        elif module is not None:
            assert all(p.grad is None for p in module.parameters())


@every_method
def test_the_same_seed_gives_the_same_loss_and_gradient_to_the_bit(example):
    first, second, other = example.build(seed=3), example.build(seed=3), example.build(seed=4)
    torch.rand(5)  # the global generator has no say
    losses = [backward(example, method) for method in (first, second, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    gradients = [[p.grad for p in method.parameters() if p.grad is not None] for method in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_method
def test_state_survives_save_and_load(example):
    method = example.build(seed=1)
    train(example, method, 3)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    storages = [value.data_ptr() for value in method.state_dict().values() if value.numel()]
    assert len(set(storages)) == len(storages)  # a tensor under two names cannot be saved as it is
    restored = example.build(seed=2)
    restored.load_state_dict(state)
    batch = make_batch(example, 3)
    assert torch.equal(method.training_loss(batch).loss, restored.training_loss(batch).loss)


@pytest.mark.parametrize("example", TRAINED)
def test_training_lowers_the_loss_and_keeps_the_spread(example):
    outputs = train(example, example.build(), 200)
    losses = torch.stack([output.loss for output in outputs])
    assert bool(losses.isfinite().all())
    assert losses[-20:].mean() < losses[:5].mean()
    if outputs[-1].embedding is not None:
        assert min(spread(output.embedding) for output in outputs[-20:]) > 0.1


@every_method
def test_bfloat16_autocast_stays_finite(example):
    method = example.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method.training_loss(make_batch(example, 0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert bool(output.loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "example",
    [
        e
        for e in EXAMPLES
        if not e.id.startswith(("models_genesis", "segmentation", "supervised", "regression", "classification"))
    ],
)
def test_a_collapsed_network_shows_in_the_embedding(example):
    method = example.build()
    with torch.no_grad():
        for weight in method.parameters():
            weight.zero_()
    assert spread(method.training_loss(make_batch(example, 0)).embedding) < 1e-3
