"""A training state as named tensors and plain JSON, and back, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from medssl.core.errors import CheckpointError


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Copies on the CPU of everything in ``state_dict``, named ``prefix/name``.

    Raises:
        CheckpointError: The module keeps extra state that is no tensor.
    """
    tensors = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"`{name}` of the method is no tensor and cannot be saved", fix="register a buffer")
        tensors[f"{prefix}/{name}"] = _copy(value)
    return tensors


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named ``prefix/...``, without the prefix."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put tensors saved by ``module_tensors`` back, all of them.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    try:
        module.load_state_dict(under(tensors, prefix), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            "the checkpoint does not fit the model", found=str(error), fix="resume with the configuration of the run"
        ) from error


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors, named ``optimizer/<weight>/<name>``, and everything else as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = _copy(value)
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Put back what ``optimizer_state`` gave.

    Raises:
        CheckpointError: The state belongs to other weights.
    """
    state: dict[int, dict[str, Any]] = {}
    for path, value in under(tensors, "optimizer").items():
        index, name = path.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    for index, entries in info["plain"].items():
        state.setdefault(int(index), {}).update(entries)
    try:
        optimizer.load_state_dict({"state": state, "param_groups": info["param_groups"]})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            "the checkpoint's optimiser does not fit", found=str(error), fix="resume with the configuration of the run"
        ) from error


def all_finite(module: nn.Module) -> bool:
    """Whether every floating weight and buffer is finite; waits for the device once."""
    flags = [
        torch.isfinite(value).all().reshape(())
        for value in module.state_dict().values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return not flags or bool(torch.stack(flags).all())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
