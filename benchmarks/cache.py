"""Reading one volume: a hit in the cache against nibabel on .nii.gz, and one slice against the whole volume.

Contenders take turns in one process and one thread, in rotated order; ratios are medians over rounds. A synthetic head
of 121 x 145 x 121 float32 (the size of an OpenBHB map). Target: a cache hit, as contiguous (C, X, Y, Z), at most 0.08
of nibabel. Whole volumes should be prepared with slice axis X: any other has to be transposed at every hit.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from medssl.data.cache import prepare
from medssl.data.volume import read_volume
from medssl.transforms.preprocess import PrepareConfig

SHAPE, ROUNDS, TARGET = (121, 145, 121), 15, 0.08


class OneVolume:
    """The least manifest."""

    def __init__(self, path):
        self.path = path
        self.table = pd.DataFrame({"volume": [0], "case": ["head"], "frame": [None]})

    def image_paths(self, volume):
        return [self.path]

    def label_path(self, volume):
        return None

    def channels(self, volume):
        return None


def write_head(path):
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    inside = (grid**2).sum(0) < 0.7
    field = gaussian_filter(rng.normal(size=SHAPE), 6) * 200 + 100 + rng.normal(size=SHAPE) * 5
    nib.save(nib.Nifti1Image(np.where(inside, field, 0).astype(np.float32), np.diag([1.5, 1.5, 1.5, 1])), path)


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.nii.gz"
        write_head(path)
        volumes = prepare(OneVolume(path), PrepareConfig(), Path(folder) / "cache", slice_axis=0)
        slices = prepare(OneVolume(path), PrepareConfig(), Path(folder) / "cache", slice_axis=2)
        contenders = {
            "nibabel .nii.gz": lambda: nib.load(path).get_fdata(dtype=np.float32),
            "read_volume .nii.gz (checksum verified)": lambda: read_volume(path).data,
            "cache hit, whole volume, slice axis X": lambda: np.array(volumes.image(0), order="C"),
            "cache hit, whole volume, slice axis Z": lambda: np.array(slices.image(0), order="C"),  # transposes
            "cache hit, slab of 16 slices": lambda: slices.image_slab(0, 60, 16),
            "cache hit, one slice": lambda: slices.image_slice(0, 60),
        }
        times = {name: [] for name in contenders}
        names = list(contenders)
        for round_number in range(ROUNDS + 1):
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                contenders[name]()
                if round_number:  # the first round fills the page cache
                    times[name].append(time.perf_counter() - start)
    base = times["nibabel .nii.gz"]
    print(f"{'reader':42} {'median ms':>10} {'min':>8} {'x nibabel':>10}")
    ratios = {}
    for name, values in times.items():
        ratios[name] = statistics.median(own / other for own, other in zip(values, base, strict=True))
        print(f"{name:42} {statistics.median(values) * 1e3:10.2f} {min(values) * 1e3:8.2f} {ratios[name]:10.4f}")
    hit = ratios["cache hit, whole volume, slice axis X"]
    print(f"cache hit: {hit:.3f} x nibabel, target at most {TARGET}: {'met' if hit <= TARGET else 'MISSED'}")
    return 0 if hit <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
