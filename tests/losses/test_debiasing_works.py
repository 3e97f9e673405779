"""Both regularisers keep an embedding from a shortcut that holds in training and never in the test set."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from medssl.losses import end, fair_kl, sup_info_nce

N_CLASSES, HALF = 4, 16
NOISE, SHORTCUT_NOISE = 1.0, 0.3  # in units of the spread of the class patterns: the shortcut is the easier half
WEIGHT = 1.0  # of either regulariser


def people(n: int, agreement: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, 32), label, bias: half of the features tell the label, half the bias, which agrees that often."""
    patterns = torch.randn(2, N_CLASSES, HALF, generator=torch.Generator().manual_seed(99))
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, N_CLASSES, (n,), generator=rng)
    other = (label + torch.randint(1, N_CLASSES, (n,), generator=rng)) % N_CLASSES
    bias = torch.where(torch.rand(n, generator=rng) < agreement, label, other)
    signal = patterns[0][label] + NOISE * torch.randn(n, HALF, generator=rng)
    shortcut = patterns[1][bias] + SHORTCUT_NOISE * torch.randn(n, HALF, generator=rng)
    return torch.cat([signal, shortcut], 1), label, bias


def accuracy_without_shortcut(regulariser: str | None, seed: int, steps: int = 60, batch_size: int = 128) -> float:
    """Of the nearest class mean, which is taken from the biased training set too."""
    x, label, bias = people(2000, 0.99, seed)
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2 * HALF, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (batch_size,), generator=rng)
        z = network(x[chosen][:, None] + 0.1 * torch.randn(batch_size, 2, 2 * HALF, generator=rng))
        loss = sup_info_nce(z, label[chosen], epsilon=0.25)
        if regulariser == "fair_kl":
            kl = fair_kl(z[:, 0], bias[chosen], labels=label[chosen])
            loss = loss + WEIGHT * (kl.positive + kl.negative)
        elif regulariser == "end":
            entangled = end(z[:, 0], bias[chosen], label[chosen])
            loss = loss + WEIGHT * (entangled.perpendicular + entangled.parallel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_test, label_test, _ = people(1000, 0.0, seed + 500)
    with torch.no_grad():
        means = one_hot(label).float().T @ normalize(network(x), dim=1)
        means = means / one_hot(label).sum(0)[:, None]
        predicted = (normalize(network(x_test), dim=1) @ means.T).argmax(1)
    return float((predicted == label_test).float().mean())


# In about a quarter of the batches the 1 % who disagree with the shortcut are missing: that term is then 0.
@pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")
def test_fair_kl_and_end_improve_on_the_epsilon_loss_alone():
    accuracy = {arm: [accuracy_without_shortcut(arm, seed) for seed in range(3)] for arm in (None, "fair_kl", "end")}
    print({arm: [round(value, 3) for value in values] for arm, values in accuracy.items()})
    alone = accuracy.pop(None)
    for arm, margin in (("fair_kl", 0.1), ("end", 0.04)):
        gains = [ours - theirs for ours, theirs in zip(accuracy[arm], alone)]
        assert min(gains) > 0, (arm, gains)
        assert sum(gains) / len(gains) > margin, (arm, gains)
