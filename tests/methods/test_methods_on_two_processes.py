"""Every method over two processes equals one: loss, gradient, and the running statistics of batch norms."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_examples import Example, examples, make_batch, part_of
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference in norm, relative: float32 sums in another order, float64 shows that nothing else differs."""


def cases() -> list[Example]:
    return [e for norm in ("group", "batch") for e in examples(norm) if not e.costly]


def one_step(example: Example, dtype: torch.dtype, rows: slice) -> dict[str, Tensor]:
    """Loss, gradient averaged over processes as data-parallel training does, and buffers after one step."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    method = example.build(seed=1).to(dtype)
    batch = part_of(make_batch(example, 0, dtype=dtype), rows)
    loss = method.training_loss(batch).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    if processes > 1:
        dist.all_reduce(gradient)
    buffers = [b.flatten().to(dtype) for b in method.buffers()]
    return {
        "loss": loss.detach()[None],
        "gradient": gradient / processes,
        "buffers": torch.cat([*buffers, torch.ones(1, dtype=dtype)]),
    }


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = slice(rank * 3, rank * 3 + 3)
    results = {f"{case} {dtype}": one_step(case, dtype, rows) for case in cases() for dtype in TOLERANCE}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_every_method_on_two_processes_equals_one(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    worst: dict[tuple[torch.dtype, str], tuple[float, str]] = {}
    for case in cases():
        for dtype in TOLERANCE:
            one = one_step(case, dtype, slice(0, 6))
            for two in results:
                for what, expected in one.items():
                    off = (two[f"{case} {dtype}"][what] - expected).norm() / expected.norm()
                    worst[dtype, what] = max(worst.get((dtype, what), (-1.0, "")), (float(off), str(case)))
    for (dtype, what), (off, case) in worst.items():
        print(f"{dtype} {what}: largest relative difference {off:.1e} ({case})")
        assert off < TOLERANCE[dtype]
