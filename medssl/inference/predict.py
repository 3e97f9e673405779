"""Prediction and embedding of whole volumes: slices in batches, a padded volume in one pass, or sliding windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from medssl.core.errors import ConfigError, InputError, ShapeError
from medssl.data.store import VolumeStore

Network = Callable[[Tensor], Tensor]


def predict_volume(
    network: nn.Module,
    image: Tensor | npt.NDArray[np.float32],
    *,
    spatial_dims: int,
    slice_axis: int = 2,
    batch_size: int = 8,
    window: Sequence[int] | None = None,
    overlap: float = 0.5,
    device: torch.device | str = "cpu",
    multiple: int | Sequence[int] = 1,
    softmax: bool = True,
) -> Tensor:
    """Run a dense network over one prepared volume.

    A volume (or slice) that fits into the window, or any when no window is given, takes one pass of the padded whole:
    twice as fast as windows, and without seams. Otherwise windows are blended with Gaussian weights.

    Args:
        network: (N, C, *spatial) to (N, K, *spatial) logits. Put into evaluation mode for the call.
        image: (C, X, Y, Z).
        spatial_dims: 2: slices along ``slice_axis``, ``batch_size`` at a time. 3: the volume.
        slice_axis: 0, 1 or 2.
        batch_size: Slices, or windows, per pass.
        window: ``spatial_dims`` lengths in voxels, or None.
        overlap: Share of a window that its neighbour covers, in [0, 1).
        device: Where the network is; the result comes back to the CPU.
        multiple: What lengths must be divisible by (total stride of the network), one or one per spatial axis; padding
            with 0, the value of background, is cut off again.
        softmax: Give probabilities; else the logits.

    Returns:
        (K, X, Y, Z) float32 on the CPU.

    Raises:
        ShapeError: The network's output has another grid than its input.
        ConfigError: An impossible window or overlap; too little GPU memory for the pass (with what to change).
    """
    # A copy: prepared volumes are read-only maps of files, which torch warns about.
    volume = torch.as_tensor(np.array(image) if isinstance(image, np.ndarray) else image, dtype=torch.float32)
    if volume.ndim != 4 or spatial_dims not in (2, 3):
        raise ShapeError("predict_volume takes (C, X, Y, Z) and 2 or 3 dimensions", found=str(tuple(volume.shape)))
    if window is not None and (len(window) != spatial_dims or min(window) < 1 or not 0 <= overlap < 1):
        raise ConfigError(
            "impossible window",
            found=f"window {tuple(window)}, overlap {overlap}",
            fix=f"give {spatial_dims} positive lengths, and an overlap from 0 to below 1",
        )
    items = volume[None] if spatial_dims == 3 else volume.movedim(slice_axis + 1, 0)
    run = _forward(network, window, overlap, batch_size, multiple, device, softmax)
    with evaluating(network), _explain_memory(window):
        parts = [run(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    result = torch.cat(parts)
    return result[0] if spatial_dims == 3 else result.movedim(0, slice_axis + 1).contiguous()


def _forward(
    network: Network,
    window: Sequence[int] | None,
    overlap: float,
    batch_size: int,
    multiple: int | Sequence[int],
    device: torch.device | str,
    softmax: bool,
) -> Network:
    """A function from a batch on the CPU to float32 results on the CPU, on the same grid."""

    def run(batch: Tensor) -> Tensor:
        spatial = tuple(batch.shape[2:])
        padded, start = pad_to_multiple(batch.to(device), multiple)
        if window is None or all(length <= side for length, side in zip(padded.shape[2:], window, strict=True)):
            logits = network(padded)
        else:
            sides = _rounded_up(window, multiple)
            logits = sliding_window_inference(padded, sides, batch_size, network, overlap=overlap, mode="gaussian")
        if logits.shape[2:] != padded.shape[2:] or len(logits) != len(batch):
            raise ShapeError(
                "a dense network must keep the grid of its input",
                found=f"{tuple(padded.shape)} became {tuple(logits.shape)}",
                fix="set `multiple` to the total stride of the network",
            )
        inside = logits[(..., *(slice(first, first + n) for first, n in zip(start, spatial, strict=True)))].float()
        return (inside.softmax(1) if softmax else inside).cpu()

    return run


def _rounded_up(lengths: Sequence[int], multiple: int | Sequence[int]) -> tuple[int, ...]:
    factors = [multiple] * len(lengths) if isinstance(multiple, int) else list(multiple)
    if len(factors) != len(lengths) or min(factors) < 1:
        raise ConfigError("`multiple` needs one positive number, or one per axis", found=str(multiple))
    return tuple(-(-length // factor) * factor for length, factor in zip(lengths, factors, strict=True))


def pad_to_multiple(batch: Tensor, multiple: int | Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Pad the spatial axes of (N, C, *spatial) with 0 on both sides to the next multiple; also says where it starts."""
    spatial = batch.shape[2:]
    extra = [whole - length for whole, length in zip(_rounded_up(spatial, multiple), spatial, strict=True)]
    start = tuple(amount // 2 for amount in extra)
    if not any(extra):
        return batch, start
    sides = [side for first, amount in zip(start, extra, strict=True) for side in (amount - first, first)]
    return F.pad(batch, sides[::-1]), start


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part of the network is in the mode it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _explain_memory(window: Sequence[int] | None) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for this pass",
            found=str(error).splitlines()[0],
            fix="set a window, such as 96 96 96" if window is None else "use a smaller window or batch size",
        ) from error


def embed_volumes(
    encoder: nn.Module,
    store: VolumeStore,
    volumes: Sequence[int] | None = None,
    *,
    spatial_dims: int,
    depth: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    multiple: int | Sequence[int] = 1,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """One embedding per volume.

    Args:
        encoder: (N, C, *spatial) to (N, F).
        store: Prepared volumes.
        volumes: Which, in this order; all when None.
        spatial_dims: 3: the encoder sees whole volumes, or slabs. 2: the mean of the embeddings of all slices.
        depth: Slices of a slab, for an encoder of slabs: the mean of the embeddings of slabs that cover the volume
            (the last one ends with it; a thinner volume has its end slices repeated).
        batch_size: Slices or slabs per pass (volumes may differ in size and go one by one).
        device: Where the encoder is.
        multiple: As for ``predict_volume``.
        progress: Called with the number of volumes done and the number of all.

    Returns:
        (len(volumes), F) float32.

    Raises:
        InputError: An embedding that is not finite, naming the volume.
    """
    rows = []
    chosen = list(store.volumes if volumes is None else volumes)
    with evaluating(encoder), _explain_memory(None):
        for volume in chosen:
            if depth is not None:
                slabs = [store.image_slab(volume, at, depth) for at in slab_centres(store.n_slices(volume), depth)]
                items = torch.from_numpy(np.stack(slabs))
            else:
                image = torch.from_numpy(np.array(store.image(volume)))
                items = image[None] if spatial_dims == 3 else image.movedim(store.slice_axis + 1, 0)
            parts = [
                encoder(pad_to_multiple(items[start : start + batch_size].to(device), multiple)[0]).float().cpu()
                for start in range(0, len(items), batch_size)
            ]
            row = torch.cat(parts).double().mean(0).float().numpy()
            if not np.isfinite(row).all():
                raise InputError("an embedding is not finite", where=store.case(volume), fix="check the weights")
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(chosen))
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def slab_centres(n_slices: int, depth: int) -> list[int]:
    """Centres, as ``VolumeStore.image_slab`` takes them, of the fewest slabs that cover a volume without leaving it."""
    last = max(0, n_slices - depth)
    starts = [*range(0, last, depth), last]
    return [min(start + depth // 2, n_slices - 1) for start in starts]
