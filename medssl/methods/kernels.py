"""Weak labels of a run as a kernel between people: which columns, how wide, what a missing label means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from medssl.core.errors import ConfigError
from medssl.core.schema import StrictModel
from medssl.data.weak_labels import LabelUse
from medssl.losses import label_kernel


class AttributeKernel(StrictModel):
    """How alike two values of one column are."""

    kind: Literal["rbf", "gaussian", "cauchy", "equal"] = "rbf"
    """rbf: exp(-d^2 / (2 sigma^2)); gaussian: the same over sqrt(2 pi) sigma, at most 0.4 / sigma; cauchy:
    1 / (sigma d^2 + 1); equal: 1 for equal values and 0 otherwise, for categories."""
    sigma: PositiveFloat | None = None
    """Width in the column's units (of cauchy: gamma, in 1 / units^2); not for equal."""

    @model_validator(mode="after")
    def _sigma_where_it_counts(self) -> AttributeKernel:
        if (self.sigma is None) != (self.kind == "equal"):
            raise ValueError(
                "kind equal takes no sigma" if self.kind == "equal" else f"kind {self.kind} needs sigma, above 0"
            )
        return self


class KernelConfig(StrictModel):
    """Kernel between people: the product over columns of the manifest."""

    attributes: Annotated[dict[str, AttributeKernel], Field(min_length=1)]
    """Column: its kernel. `{age: {sigma: 5}, sex: {kind: equal}}`."""
    missing: Literal["raise", "ignore"] = "raise"
    """raise: a missing label is refused before training; ignore: it gives its attribute factor 1."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the manifest that are used."""
        return tuple(self.attributes)

    def uses(self, by: str) -> tuple[LabelUse, ...]:
        """What each column must be, for the check before training; ``by`` is this section's key."""
        return tuple(
            LabelUse(name, by, number=one.kind != "equal", missing_allowed=self.missing == "ignore")
            for name, one in self.attributes.items()
        )

    def columns_of(self, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What must be gathered for ``weights``: the columns as float64 with NaN where missing.

        Raises:
            ConfigError: A column that the labels do not hold.
        """
        return {name: label_values(labels, name) for name in self.attributes}

    def weights(self, labels: Mapping[str, Tensor]) -> Tensor:
        """Kernel of a (gathered) batch.

        Args:
            labels: Per column (N,) numbers with NaN where missing, or int64 codes with -1 where missing.

        Returns:
            float64 (N, N), see `medssl.losses.label_kernel`.

        Raises:
            ConfigError: A column that the labels do not hold.
            InputError: A missing label that is not ignored.
        """
        kernel: Tensor | None = None
        for name, one in self.attributes.items():
            factor = label_kernel(label_values(labels, name), sigma=one.sigma, kind=one.kind, missing=self.missing)
            kernel = factor if kernel is None else kernel * factor
        assert kernel is not None  # there is at least one attribute
        return kernel


AGE_5 = KernelConfig(attributes={"age": AttributeKernel(sigma=5.0)})
"""Ages within a few years attract: rbf, sigma 5 years (Dufumier et al. 2021, arXiv:2106.08808)."""


def label_values(labels: Mapping[str, Tensor], column: str) -> Tensor:
    """A column as float64 with NaN where it is missing.

    Raises:
        ConfigError: No such column in the batch.
    """
    if column not in labels:
        raise ConfigError(
            f"the items have no label `{column}`",
            found=f"labels: {', '.join(sorted(labels)) or 'none'}",
            fix="fill this column of the manifest, or name another one",
        )
    values = labels[column]
    if values.is_floating_point():
        return values.double()
    return torch.where(values < 0, torch.nan, values.double())  # codes of text: -1 is a missing cell


def table_kernel(prior: Tensor, kind: Literal["rbf", "cosine"], sigma: Tensor | float | None) -> Tensor:
    """Kernel between rows of an embedding table.

    Args:
        prior: (N, P) float.
        kind: "rbf": exp(-|p_i - p_j|^2 / (2 sigma^2)); "cosine": of the rows, 0 for a row of length 0.
        sigma: In the units of the table; for rbf.

    Returns:
        float64 (N, N), positive semidefinite.
    """
    rows = prior.detach().double()
    if kind == "cosine":
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / torch.where(length > 0, length, 1.0)
        return rows @ rows.T
    assert sigma is not None
    # Not by the product of rows: x^2 + y^2 - 2xy would lose the small distances.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-0.5 * (distance / sigma).square())
