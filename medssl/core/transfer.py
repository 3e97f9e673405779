"""Small tensors on their way to an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for what the device is still working on.

    A plain copy from the CPU waits until everything queued before it is done: a handful of drawn parameters would
    then empty the queue several times a step. What comes from ordinary memory is staged before the call returns, so
    that the source may be freed at once. Copies to the CPU do wait, because their values would not be there yet.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")
