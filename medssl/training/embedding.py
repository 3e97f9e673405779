"""Embedding of every item that is trained on, for methods that look at the whole training set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medssl.core.types import Method
from medssl.training.source import COLUMNS, BatchSource


@torch.no_grad()
def embed_table(method: Method, source: BatchSource) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Encoder output of each item of the table, without augmentation, in the table's order.

    Every process embeds everything: the same result everywhere without talking.

    Returns:
        ``(n, F)`` float32 on the CPU, and the items' columns as int64 ``(n,)``.
    """
    table = source.reader.table
    size = source.sampler.batch_size
    was_training = method.training
    method.eval()
    try:
        parts = [
            method.encoder(source.plain(table.row[start : start + size])).float().cpu()
            for start in range(0, len(table), size)
        ]
    finally:
        method.train(was_training)
    return torch.cat(parts), {name: torch.as_tensor(getattr(table, name)) for name in COLUMNS}
