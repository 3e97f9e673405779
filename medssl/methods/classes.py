"""Columns of the manifest as classes: categories as they are, numbers in bins."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor

from medssl.core.transfer import onto
from medssl.data.weak_labels import LabelUse
from medssl.methods.kernels import label_values


def _rising(edges: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError("edges of bins must rise")
    return edges


Edges = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_rising)]
Bins = PositiveFloat | Edges


def check_bins(column: str, bins: float | tuple[float, ...] | None) -> None:
    """Refuse exact ages as classes: nobody would share one.

    Raises:
        ValueError: The column is `age` and there are no bins.
    """
    if column == "age" and bins is None:
        raise ValueError("age is a number: set bins, a width in years or a list of edges")


def class_use(column: str, bins: float | tuple[float, ...] | None, by: str) -> LabelUse:
    """What the column must be, for the check before training."""
    return LabelUse(column, by, number=bins is not None)


def class_labels(labels: Mapping[str, Tensor], column: str, bins: float | tuple[float, ...] | None) -> Tensor:
    """One class per item, to be compared for equality.

    Args:
        labels: Of a (gathered) batch.
        column: Which of them.
        bins: None: equal values are one class. A width w: the class of x is the smallest k with k w >= x. Edges: the
            smallest edge that is at least x (above the last edge: one more class), as Barbano et al. 2023 bin ages for
            their supervised baseline (4, 6, ..., 90 years).

    Returns:
        float64 (N,), NaN where the label is missing.
    """
    values = label_values(labels, column)
    if bins is None:
        return values
    if isinstance(bins, float):
        return torch.ceil(values / bins)
    edges = onto(torch.tensor(bins, dtype=torch.float64), values.device)
    return torch.where(values.isnan(), torch.nan, torch.searchsorted(edges, values.contiguous()).double())
