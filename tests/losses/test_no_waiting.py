"""No loss asks an accelerator for a value, forward or backward: on tensors without values that would raise."""

import contextlib
import sys

import pytest
import torch

from medssl.losses import (
    alignment,
    barlow_twins,
    byol,
    contrastive,
    decoupled_contrastive,
    decoupled_uniformity,
    end,
    fair_kl,
    fairness,
    iic,
    iic_segmentation,
    l_exp,
    l_thr,
    label_kernel,
    momentum,
    nt_xent,
    pixel,
    pixel_contrast,
    queue_info_nce,
    redundancy,
    sinkhorn_knopp,
    sup_con,
    sup_info_nce,
    supcon,
    swav,
    uniformity,
    vicreg,
    weak,
    y_aware,
)

swav_module, sinkhorn_module = sys.modules[swav.__module__], sys.modules[sinkhorn_knopp.__module__]
iic_module = sys.modules[iic.__module__]
uniformity_module = sys.modules[decoupled_uniformity.__module__]  # its name is also that of a function

LOSSES = {
    "nt_xent": lambda z, y, w: nt_xent(z[:, 0], z[:, 1]),
    "decoupled_contrastive": lambda z, y, w: decoupled_contrastive(z[:, 0], z[:, 1], weight_sigma=0.5),
    "queue_info_nce": lambda z, y, w: queue_info_nce(z[:, 0], z[:, 1], z[:, 1], negative_mask=w > 0.5),
    "byol": lambda z, y, w: byol(z[:, 0], z[:, 1], z[:, 1], z[:, 0]),
    "barlow_twins": lambda z, y, w: barlow_twins(z[:, 0], z[:, 1]) + barlow_twins(z[:, 0].T, z[:, 1].T),
    "vicreg": lambda z, y, w: vicreg(z[:, 0], z[:, 1]) + vicreg(z[:, 0].T, z[:, 1].T),
    "pixel_contrast": lambda z, y, w: pixel_contrast(z[:, 0], y, y[:, None], y[:, None].expand(-1, 3)),
    "sup_con": lambda z, y, w: sup_con(z, y, epsilon=0.5),
    "sup_info_nce": lambda z, y, w: sup_info_nce(z, y) + sup_info_nce(z, y.float(), form="in"),
    "y_aware": lambda z, y, w: y_aware(z, w),
    "l_thr": lambda z, y, w: l_thr(z, w) + l_thr(z, w, normalizer="compared"),
    "iic": lambda z, y, w: (
        iic(z[:, 0], z[:, 1])
        + sum(
            iic_segmentation(
                *z[..., None, None].expand(-1, -1, -1, 5, 5).unbind(1),
                mask=w[:, :5, None].expand(-1, 5, 5),
                max_displacement=reach,
            )
            for reach in (1, 3)
        )
    ),
    "l_exp": lambda z, y, w: l_exp(z, w) + l_exp(z, w, positive_in_denominator=True),
    "fair_kl": lambda z, y, w: sum(vars(fair_kl(z[:, 0], y, labels=y)).values()),
    "fair_kl weights": lambda z, y, w: sum(vars(fair_kl(z[:, 0], y.float(), weights=w)).values()),
    "end": lambda z, y, w: sum(vars(end(z[:, 0], y, y)).values()),
    "swav": lambda z, y, w: swav(z, z[:, 0].detach(), queue=z.detach().transpose(0, 1)),
    "alignment": lambda z, y, w: alignment(z[:, 0], z[:, 1], alpha=1.0) + uniformity(z[:, 0]),
    "decoupled_uniformity": lambda z, y, w: decoupled_uniformity(z, prior_kernel=w),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_wait_for_values(name, monkeypatch):
    for module in (
        contrastive,
        fairness,
        iic_module,
        momentum,
        swav_module,
        sinkhorn_module,
        pixel,
        redundancy,
        supcon,
        uniformity_module,
        weak,
    ):  # autocast knows no meta device
        monkeypatch.setattr(module, "exact_float32", lambda device: contextlib.nullcontext())
    z = torch.randn(6, 2, 4, device="meta", requires_grad=True)
    codes, ages = torch.zeros(6, dtype=torch.int64, device="meta"), torch.zeros(6, device="meta")
    weights = label_kernel(ages, sigma=5.0, missing="ignore")
    value = LOSSES[name](z, codes, weights)
    value.backward()
    assert value.shape == ()
    assert z.grad.shape == z.shape
    with pytest.raises(RuntimeError, match="meta"):
        bool(value > 0)
