"""Gathering hands over memory as the fastest backend reads it: NCCL ignores strides."""

import torch

from medssl.core import distributed


def test_gathering_a_transposed_tensor_keeps_its_values_in_place(monkeypatch):
    """A stand-in for NCCL: the bytes of the input land in the parts as they lie."""

    def all_gather(parts, tensor):
        assert tensor.is_contiguous()
        for part in parts:
            part.as_strided((part.numel(),), (1,)).copy_(tensor.flatten())

    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    z = torch.arange(24.0).view(3, 4, 2).transpose(0, 1)  # as views of items come: (N, V, D), view-major in memory
    assert not z.is_contiguous()
    assert torch.equal(distributed.gather(z), torch.cat([z, z]))
