"""The losses as loops, written from their formulas in float64, and what their tests share."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Row = tuple[int, int]  # item, view


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def value_and_grad(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) / (a.norm() * b.norm())


def anchors(z: Tensor) -> Iterator[tuple[Row, list[Row]]]:
    """Each row of z (N, V, D) and all others."""
    rows = [(i, v) for i in range(z.shape[0]) for v in range(z.shape[1])]
    for anchor in rows:
        yield anchor, [row for row in rows if row != anchor]


def mean(terms: list[Tensor], z: Tensor) -> Tensor:
    return sum(terms, z.sum() * 0) / (z.shape[0] * z.shape[1])


def loop_y_aware(z: Tensor, weights: Tensor, tau: float) -> Tensor:
    terms = []
    for a, others in anchors(z):
        total = sum(weights[a[0], t[0]] for t in others)
        denominator = sum(torch.exp(cosine(z[a], z[t]) / tau) for t in others)
        for k in others:
            if total > 0:
                share = weights[a[0], k[0]] / total
                terms.append(-share * torch.log(torch.exp(cosine(z[a], z[k]) / tau) / denominator))
    return mean(terms, z)


def loop_l_thr(z: Tensor, weights: Tensor, tau: float, normalizer: str) -> Tensor:
    terms = []
    for a, others in anchors(z):
        w = {t: weights[a[0], t[0]] for t in others}
        for k in others:
            lower = [t for t in others if t != k and w[t] < w[k]]
            if lower:
                norm = sum(w[t] for t in (others if normalizer == "all" else lower))
                denominator = sum(torch.exp(cosine(z[a], z[t]) / tau) for t in lower)
                terms.append(-w[k] / norm * torch.log(torch.exp(cosine(z[a], z[k]) / tau) / denominator))
    return mean(terms, z)


def loop_l_exp(z: Tensor, weights: Tensor, tau: float, similarity: str, positive_in_denominator: bool) -> Tensor:
    def s(a: Row, t: Row) -> Tensor:
        if similarity == "cosine":
            return cosine(z[a], z[t]) / tau
        return -(z[a] / z[a].norm() - z[t] / z[t].norm()).square().sum() / (2 * tau)

    terms = []
    for a, others in anchors(z):
        w = {t: weights[a[0], t[0]] for t in others}
        total = sum(w.values())
        for k in others:
            compared = [t for t in others if positive_in_denominator or t != k]
            if total > 0 and compared:
                denominator = sum(torch.exp(s(a, t) * (1 - w[t])) for t in compared)
                terms.append(-w[k] / total * torch.log(torch.exp(s(a, k)) / denominator))
    return mean(terms, z)


def loop_supervised(z: Tensor, labels: list[float], tau: float, epsilon: float, kind: str) -> Tensor:
    """SupCon ("con") and SupInfoNCE ("out", "in"), each with epsilon."""
    terms = []
    for a, others in anchors(z):
        positives = [torch.exp(cosine(z[a], z[t]) / tau) for t in others if labels[t[0]] == labels[a[0]]]
        negatives = sum(torch.exp(cosine(z[a], z[t]) / tau) for t in others if labels[t[0]] != labels[a[0]])
        if not positives:
            continue
        shrunk, count = [math.exp(-epsilon) * p for p in positives], len(positives)
        if kind == "con":
            terms += [-torch.log(p / (sum(shrunk) + negatives)) / count for p in positives]
        elif kind == "out":
            terms += [-torch.log(p / (q + negatives)) / count for p, q in zip(positives, shrunk)]
        else:
            terms.append(-torch.log(sum(positives) / (sum(shrunk) / count + negatives)))
    return mean(terms, z)
