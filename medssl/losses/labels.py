"""How alike two people's weak labels are: the kernel that the weakly supervised losses take as weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from medssl.core.errors import InputError, ShapeError
from medssl.losses.numerics import check_choice, rows_named

Kind = Literal["rbf", "gaussian", "cauchy", "equal"]
KINDS = ("rbf", "gaussian", "cauchy", "equal")
T = TypeVar("T")


def label_kernel(
    labels: Tensor,
    *,
    sigma: float | Sequence[float | None] | None,
    kind: Kind | Sequence[Kind] = "rbf",
    missing: Literal["raise", "ignore"] = "raise",
) -> Tensor:
    """Kernel between labels: the product over attributes of a kernel of their difference d.

    - "rbf": exp(-d^2 / (2 sigma^2)), 1 at d = 0 (Dufumier et al. 2021, "Contrastive Learning with Continuous Proxy
      Meta-Data for 3D MRI Classification", arXiv:2106.08808).
    - "gaussian": the same divided by sqrt(2 pi) sigma, so 0.399 / sigma at d = 0 (Barbano et al. 2023, "Contrastive
      learning for regression in multi-site brain age prediction", arXiv:2211.08326, as their program has it).
    - "cauchy": 1 / (sigma d^2 + 1): here sigma is gamma, in 1 / units^2.
    - "equal": 1 where the labels are equal, else 0, for categories; sigma is not used and may be None.

    Args:
        labels: (N,) or (N, L) of any real dtype, L attributes. NaN is a missing label; integers have none, so that a
            code which stands for missing must become NaN first.
        sigma: Kernel width in the label's units, above 0; one for all attributes or one for each.
        kind: One for all attributes or one for each.
        missing: "raise" refuses missing labels; "ignore" gives an attribute that is missing on either side factor 1.
            Such a kernel need not be positive semidefinite any more.

    Returns:
        (N, N), symmetric, in the labels' dtype and at least float32. Equal labels have exactly equal weights.

    Raises:
        ShapeError: Other shapes, or another number of sigmas or kinds than of attributes.
        InputError: A missing or infinite label (the message names the rows), a sigma that is not positive, an
            unknown kind. Labels on an accelerator are not looked at: there a missing label makes its weights NaN.
    """
    check_choice("missing", missing, ("raise", "ignore"))
    if labels.ndim not in (1, 2) or 0 in labels.shape or labels.is_complex():
        raise ShapeError("labels must be real, (N,) or (N, L), no axis empty", found=str(tuple(labels.shape)))
    columns = labels.detach().reshape(len(labels), -1)
    n_attributes = columns.shape[1]
    kinds = _per_attribute("kind", [kind] if isinstance(kind, str) else kind, n_attributes)
    # A sequence has a length; numbers of numpy and torch have none, and no common type.
    given: Any = sigma if getattr(sigma, "ndim", int(hasattr(sigma, "__len__"))) > 0 else [sigma]
    sigmas = _per_attribute("sigma", [None if one is None else float(one) for one in given], n_attributes)
    for one, width in zip(kinds, sigmas, strict=True):
        check_choice("kind", one, KINDS)
        if one != "equal" and not (width is not None and width > 0 and math.isfinite(width)):
            raise InputError(f"sigma of kind {one} must be a positive number", found=str(width))
    _check_values(columns, missing)

    # Differences of integers are exact (as float32, codes above 2^24 would merge); kernels are taken in float64, where
    # a tiny sigma neither overflows nor divides 0 by 0.
    columns = columns.double() if columns.is_floating_point() else columns.long()
    kernel = torch.ones(len(columns), len(columns), dtype=torch.float64, device=columns.device)
    for column, one, width in zip(columns.T, kinds, sigmas, strict=True):
        factor = _factor(column[:, None] - column[None, :], one, width)
        if missing == "ignore":
            gap = column.isnan()
            factor = factor.masked_fill(gap[:, None] | gap[None, :], 1.0)
        kernel = kernel * factor
    return kernel.to(torch.promote_types(labels.dtype, torch.float32))


def _factor(difference: Tensor, kind: Kind, sigma: float | None) -> Tensor:
    if kind == "equal" or sigma is None:
        # A missing label is equal to nothing, itself included; NaN says so, as the other kinds do.
        return torch.where(difference.isnan(), torch.nan, (difference == 0).double())
    if kind == "cauchy":
        return 1 / (sigma * difference.double().square() + 1)
    rbf = torch.exp(-0.5 * (difference / sigma).double().square())
    return rbf / (math.sqrt(2 * math.pi) * sigma) if kind == "gaussian" else rbf


def _per_attribute(name: str, values: Sequence[T], n: int) -> Sequence[T]:
    if len(values) not in (1, n):
        raise ShapeError(f"{name} must be one value or one per attribute", found=f"{len(values)} for {n} attributes")
    return list(values) * n if len(values) == 1 else values


def _check_values(columns: Tensor, missing: str) -> None:
    if columns.device.type != "cpu" or not columns.is_floating_point():
        return
    infinite, gap = columns.isinf().any(1), columns.isnan().any(1)
    if bool(infinite.any()):
        raise InputError("labels must not be infinite", where=rows_named(infinite))
    if missing == "raise" and bool(gap.any()):
        raise InputError(
            "labels are missing (NaN)",
            where=rows_named(gap),
            fix='leave these items out, or give missing attributes factor 1 with missing="ignore"',
        )
