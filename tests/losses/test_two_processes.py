"""Every loss over two processes equals the loss over one: value, and gradient of the network below it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from medssl.core.distributed import from_first, gather, world_size
from medssl.losses import (
    alignment,
    barlow_twins,
    byol,
    cluster_cross_entropy,
    decoupled_contrastive,
    decoupled_uniformity,
    end,
    fair_kl,
    global_contrastive,
    iic,
    iic_segmentation,
    l_exp,
    l_thr,
    label_kernel,
    local_contrastive,
    nearest_negatives,
    nt_xent,
    pixel_contrast,
    queue_info_nce,
    region_corners,
    sup_con,
    sup_info_nce,
    swav,
    uniformity,
    vicreg,
    y_aware,
)
from medssl.losses.numerics import unit

N, D = 12, 6  # 3 volumes x 4 partitions, as one global batch
PARTITION, VOLUME = torch.arange(N) % 4, torch.arange(N) // 4
AGE = torch.tensor([20.0, 31, 31, 55, 54, 20, 70, 66, 23, 40, 41, 20], dtype=torch.float64)
QUEUE = unit(torch.randn(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
PROTOTYPES = torch.linspace(-1, 1, 5 * D, dtype=torch.float64).view(5, D).cos()
CORNERS = region_corners((8, 8), 3)
ROW = 3 * torch.arange(N)


def gd(strategy):
    return lambda z, p, v: global_contrastive(z, p, v, strategy=strategy)


def dense(strategy):
    return lambda f, p, v: local_contrastive(
        f[:, 0], f[:, 1], CORNERS, negatives=nearest_negatives(CORNERS, 4), strategy=strategy, partition=p, volume=v
    )


ROWS = {
    "nt_xent": lambda z, p, v: nt_xent(z[:, 1], z[:, 2]),
    "cluster_cross_entropy": lambda z, p, v: cluster_cross_entropy(z[:, :, None], p[:, None]).mean(),
    "global gr": lambda z, p, v: global_contrastive(z[:, 1:], strategy="gr"),
    "global gd-": gd("gd-"),
    "global gd": gd("gd"),
    "iic": lambda z, p, v: iic(z[:, 0], z[:, 1], lamb=1.5),
    # Views are pixels here, items images: pixel 0 of each image with pixel 1 against pixel 2 and the next image's.
    "pixel_contrast": lambda z, p, v: pixel_contrast(
        z.flatten(0, 1), ROW, ROW[:, None] + 1, torch.stack([ROW + 2, (ROW + 5) % (3 * N)], 1)
    ),
    "swav": lambda z, p, v: swav(z, PROTOTYPES, assign_views=(0, 2)),
    "decoupled_contrastive": lambda z, p, v: decoupled_contrastive(z[:, 1], z[:, 2], weight_sigma=0.5),
    "queue_info_nce": lambda z, p, v: queue_info_nce(
        z[:, 0], z[:, 1], QUEUE, negative_mask=p[:, None] != torch.arange(len(QUEUE)) % 4
    ),
    "byol": lambda z, p, v: byol(z[:, 0], z[:, 1], z[:, 2], z[:, 1]),
    "barlow_twins": lambda z, p, v: barlow_twins(z[:, 0], z[:, 1]),
    "vicreg": lambda z, p, v: vicreg(z[:, 0], z[:, 1]),
}
# Partitions stand for diagnoses and volumes for sites; the kernel is made of gathered ages on every process.
LABELLED = {
    "sup_con": lambda z, y, b, w: sup_con(z, y, epsilon=0.2),
    "sup_info_nce out": lambda z, y, b, w: sup_info_nce(z, y, epsilon=0.2),
    "sup_info_nce in": lambda z, y, b, w: sup_info_nce(z, y, form="in"),
    "y_aware": lambda z, y, b, w: y_aware(z, w),
    "l_thr": lambda z, y, b, w: l_thr(z, w),
    "l_thr compared": lambda z, y, b, w: l_thr(z, w, normalizer="compared"),
    "l_exp": lambda z, y, b, w: l_exp(z, w),
    "l_exp as run": lambda z, y, b, w: l_exp(z, w, similarity="neg_sqdist", positive_in_denominator=True),
    "fair_kl labels": lambda z, y, b, w: sum(vars(fair_kl(z[:, 0], b, labels=y // 2)).values()),
    "fair_kl kernel": lambda z, y, b, w: sum(vars(fair_kl(z[:, 0], b, weights=w, mode="moments")).values()),
    "end": lambda z, y, b, w: sum(vars(end(z[:, 0], b, y)).values()),
    "alignment": lambda z, y, b, w: alignment(z[:, 0], z[:, 1]),
    "uniformity": lambda z, y, b, w: uniformity(z[:, 0]),
    "decoupled_uniformity": lambda z, y, b, w: decoupled_uniformity(z, prior_kernel=w),
}


def with_kernel(loss):
    return lambda z, y, b, age: loss(z, y, b, label_kernel(age, sigma=15.0))


MAPS = {
    "iic segmentation": lambda f, p, v: iic_segmentation(f[:, 0], f[:, 1], max_displacement=1),
    "local lr": dense("lr"),
    "local ld": dense("ld"),
}


def losses_and_gradients(rank: int, processes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of this process's share of the batch, gradients averaged over the processes as data-parallel training does."""
    torch.manual_seed(0)
    x = torch.randn(N, 3, 10, dtype=torch.float64)
    maps = torch.randn(N, 2, 3, 8, 8, dtype=torch.float64)
    linear, convolution = nn.Linear(10, D).double(), nn.Conv2d(3, 4, 3, padding=1).double()
    mine = slice(rank * N // processes, (rank + 1) * N // processes)
    results = {}
    labelled = {name: with_kernel(loss) for name, loss in LABELLED.items()}
    for name, loss in (ROWS | MAPS | labelled).items():
        if name not in MAPS:
            network, z = linear, linear(x[mine])
        else:
            network, z = convolution, convolution(maps[mine].flatten(0, 1)).unflatten(0, (-1, 2))
        whole, partition, volume, age = gather((z, PARTITION[mine], VOLUME[mine], AGE[mine]))
        assert len(whole) == N
        network.zero_grad()
        value = loss(whole, partition, volume, *([age] if name in labelled else []))
        value.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        if world_size() > 1:
            dist.all_reduce(gradient)
        results[name] = (value.detach(), gradient / processes)
    return results


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert torch.equal(
        from_first(torch.full((2, 3), rank)), torch.zeros(2, 3).long()
    )  # what nearly ties must decide once
    torch.save(losses_and_gradients(rank, 2), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    one = losses_and_gradients(0, 1)
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for name, (value, gradient) in two.items():
            expected, expected_gradient = one[name]
            off = float((value - expected).abs() / expected.abs())
            off_gradient = float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max())
            print(f"{name}, rank {rank}: relative difference of loss {off:.1e}, of gradient {off_gradient:.1e}")
            assert off < 1e-12, (name, rank, off)
            assert off_gradient < 1e-12, (name, rank, off_gradient)
