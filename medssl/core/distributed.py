"""Gathering with gradients, so that a loss over several processes is the loss over one.

Every process gathers the embeddings (and labels) of the whole batch and computes the same loss. The backward pass of
``gather`` adds up what every process asked of a tensor, so each holds world_size times its share of the gradient; the
mean over processes that data-parallel training takes then gives exactly the gradient of a single process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Tree = TypeVar("Tree")


def world_size() -> int:
    """Number of processes; 1 when nothing was launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 when nothing was launched."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        # Both sides contiguous: NCCL copies memory as it lies, so that parts with the strides of a transposed tensor
        # would come back with their values in another order.
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes, differentiable: the gradient is the sum of what every process asked for."""
    if world_size() == 1:
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor)
    return result


def gather(tree: Tree) -> Tree:
    """Concatenate the tensors of every process along their first axis, in the order of ranks.

    Args:
        tree: A tensor, None, or a tuple, list, mapping or dataclass of such; every process holds the same shapes.

    Returns:
        The same structure. Floating tensors keep their gradient; integer and boolean ones come back without.
        With one process, ``tree`` itself.
    """
    if world_size() == 1:
        return tree
    return _gather(tree)


def _gather(tree: Any) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        if tree.dtype == torch.bool:
            return _Gather.apply(tree.to(torch.uint8)).bool()
        return _Gather.apply(tree)
    if isinstance(tree, Mapping):
        return {name: _gather(value) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_gather(value) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _gather(getattr(tree, f.name)) for f in fields(tree)})
    raise TypeError(f"gather takes tensors, None, tuples, lists, mappings and dataclasses, not {type(tree).__name__}")


def from_first(tensor: Tensor) -> Tensor:
    """The first process's values of a tensor that has one shape on every process, without gradient.

    For what every process computes alike but must have to the bit, such as labels that a nearly tied comparison gives.
    """
    if world_size() == 1:
        return tensor
    shared = tensor.detach().contiguous().clone()
    dist.broadcast(shared, src=0)
    return shared


def barrier() -> None:
    """Wait until every process is here; nothing to wait for with one."""
    if world_size() > 1:
        dist.barrier()
