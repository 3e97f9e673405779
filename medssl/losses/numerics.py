"""What the losses share: exact arithmetic, unit rows, checks at the door."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn.functional import softplus

from medssl.core.errors import InputError, ShapeError, nearest

SHORTEST = 1e-12
"""Rows shorter than this have no direction: they become 0."""


class EmptyComparisonWarning(UserWarning):
    """A loss had nothing to compare with, so that it is (partly) constant."""


def exact_float32(device: torch.device) -> torch.autocast:
    """A region without autocast: inside one, a product of float32 tensors would come back in half precision."""
    return torch.autocast(device.type, enabled=False)


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Rows (last axis) of length 1, in float32 or wider.

    A row shorter than 1e-12 gives 0 with gradient 0 (dividing by a floor instead would give a gradient of 1e12).
    """
    x = widen(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    has_direction = length >= SHORTEST
    return x / torch.where(has_direction, length, 1.0) * has_direction


def attached_zero(*inputs: Tensor) -> Tensor:
    """A zero that depends on ``inputs`` with gradient 0, whatever they contain."""
    return torch.stack([widen(x).flatten()[:0].sum() for x in inputs]).sum()


def excess(negatives: Tensor, positive: Tensor) -> Tensor:
    """-log of e^positive / (e^positive + e^negatives), elementwise; 0 where ``negatives`` is -inf.

    Exact for small results too, where the difference of two logarithms would cancel.
    """
    return softplus(negatives - positive, threshold=50.0)


def warn_if(nothing: Tensor | bool, message: str) -> None:
    """Warn where a comparison set is empty.

    Python shows a warning of one place once. On an accelerator the question would make the processor wait for the
    device at every step, so only what is known without looking at values is reported there.
    """
    if isinstance(nothing, Tensor) and nothing.device.type != "cpu":
        return
    if bool(nothing):
        warnings.warn(message, EmptyComparisonWarning, stacklevel=3)


def check_temperature(temperature: float) -> None:
    """Refuse temperatures that are not positive and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError("temperature must be a positive number", found=str(temperature), fix="0.1 is usual")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is not among ``known``."""
    if value not in known:
        raise InputError(f"{name} `{value}` is not known. {nearest(value, known)}")


def check_float(name: str, x: Tensor, layout: str, ndim: int) -> None:
    """Refuse tensors that are not floating, have another number of axes, or have an empty axis."""
    if x.ndim != ndim or 0 in x.shape:
        raise ShapeError(f"{name} must be {layout}, no axis empty", found=str(tuple(x.shape)))
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating", found=str(x.dtype))


def check_paired(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Refuse two tensors of different shapes."""
    if x1.shape != x2.shape:
        raise ShapeError(f"{name1} and {name2} must have one shape", found=f"{tuple(x1.shape)} and {tuple(x2.shape)}")


def check_codes(name: str, codes: Tensor | None, n: int, needed_by: str) -> Tensor:
    """An integer code per item, (N,); refuses it missing, of another length, or floating."""
    if codes is None:
        raise ShapeError(f"{needed_by} needs `{name}`", fix=f"pass {name}: int64 ({n},), one code per item")
    if codes.shape != (n,):
        raise ShapeError(f"{name} must have one code per item, ({n},)", found=str(tuple(codes.shape)))
    if codes.is_floating_point() or codes.is_complex():
        raise InputError(f"{name} must hold integer codes", found=str(codes.dtype))
    return codes


def check_labels(name: str, labels: Tensor, n: int | None = None) -> Tensor:
    """One label per item, (N,) of any real dtype; refuses other shapes and, naming the items, NaN and infinity.

    Values on an accelerator are not looked at, because the question would wait for the device: see `poisoned`.
    """
    expected = "(N,)" if n is None else f"({n},)"
    if labels.ndim != 1 or (n is not None and len(labels) != n):
        raise ShapeError(f"{name} must have one value per item, {expected}", found=str(tuple(labels.shape)))
    if labels.is_complex():
        raise InputError(f"{name} must be real", found=str(labels.dtype))
    check_finite(name, labels, "leave these items out, or give them a label")
    return labels


def check_finite(name: str, values: Tensor, fix: str) -> None:
    """Refuse NaN and infinity in rows of ``values`` (N, ...), naming the rows; on the CPU only."""
    if values.device.type != "cpu" or not values.is_floating_point():
        return
    bad = ~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(bad.any()):
        raise InputError(f"{name} must be finite", where=rows_named(bad), found="NaN or infinity", fix=fix)


def rows_named(bad: Tensor) -> str:
    """Where ``bad`` (N,) is true, in words."""
    rows: list[int] = bad.nonzero().flatten().tolist()
    return f"rows {', '.join(map(str, rows[:10]))}" + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


def check_weights(name: str, weights: Tensor, n: int, *, lowest: float = 0.0, highest: float = math.inf) -> Tensor:
    """A constant per pair of items, (N, N), in float32 or wider; on the CPU also finite, from lowest to highest."""
    if weights.shape != (n, n):
        raise ShapeError(f"{name} must have one value per pair of items, ({n}, {n})", found=str(tuple(weights.shape)))
    if weights.is_complex():
        raise InputError(f"{name} must be real", found=str(weights.dtype))
    check_finite(name, weights, "are labels missing? see label_kernel(missing=...)")
    if weights.device.type == "cpu":
        outside = ((weights < lowest) | (weights > highest)).any(1)
        if bool(outside.any()):
            limits = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
            found = f"{float(weights.min()):g} to {float(weights.max()):g}"
            raise InputError(f"{name} must be {limits}", where=rows_named(outside), found=found)
    return widen(weights.detach())


def poisoned(value: Tensor, *inputs: Tensor) -> Tensor:
    """``value``, or NaN where an input holds NaN or infinity that nobody could look at without waiting for a device."""
    for x in inputs:
        if x.is_floating_point() and x.device.type != "cpu":
            value = torch.where(x.isfinite().all(), value, torch.nan)
    return value
