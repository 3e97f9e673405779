"""One augmented view against MONAI and TorchIO: flip, affine, blur, bias field, gamma, noise, cutout, probability 1.

Contenders take turns round by round in one process on one thread, in rotated order; a ratio is the median over rounds
of that round's ratio to MONAI. TorchIO has no cutout and goes without. Run: python benchmarks/views.py [--rounds 7]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")  # TorchIO and medssl resample through ITK

import monai.data
import monai.transforms as mt
import torch
import torchio as tio

from medssl.transforms.augment import AugmentConfig, apply, draw

OURS = AugmentConfig(
    flip={"probability": 1, "axes": (0,)},
    affine={"probability": 1, "degrees": 15, "scale": (0.9, 1.1)},
    blur={"probability": 1, "sigma": (0.5, 1.5)},
    bias_field={"probability": 1, "coefficient": 0.3, "degree": 3},
    gamma={"probability": 1, "gamma": (0.7, 1.5)},
    noise={"probability": 1, "std": (0.05, 0.05)},
    cutout={"probability": 1, "size": (0.25, 0.25)},
)


def monai_view(shape):
    turn = (0.26, 0.26, 0.26)
    return mt.Compose(
        [
            mt.RandFlipd("image", prob=1, spatial_axis=0),
            mt.RandAffined(
                "image", prob=1, rotate_range=turn, scale_range=(0.1, 0.1, 0.1), mode="bilinear", padding_mode="border"
            ),
            mt.RandGaussianSmoothd("image", prob=1, sigma_x=(0.5, 1.5), sigma_y=(0.5, 1.5), sigma_z=(0.5, 1.5)),
            mt.RandBiasFieldd("image", prob=1, degree=3, coeff_range=(-0.3, 0.3)),
            mt.RandAdjustContrastd("image", prob=1, gamma=(0.7, 1.5)),
            mt.RandGaussianNoised("image", prob=1, mean=0.0, std=0.05),
            mt.RandCoarseDropoutd("image", prob=1, holes=1, spatial_size=tuple(s // 4 for s in shape), fill_value=0),
        ]
    )


def torchio_view():
    return tio.Compose(
        [
            tio.RandomFlip(axes=(0,), flip_probability=1),
            tio.RandomAffine(scales=(0.9, 1.1), degrees=15),
            tio.RandomBlur(std=(0.5, 1.5)),
            tio.RandomBiasField(coefficients=0.3, order=3),
            tio.RandomGamma(log_gamma=(-0.36, 0.41)),
            tio.RandomNoise(mean=0, std=(0.05, 0.05)),
        ]
    )


def contenders(shape):
    image = torch.rand(1, *shape)
    monai_pipeline, torchio_pipeline = monai_view(shape), torchio_view()
    step = iter(range(10**9))

    def ours(method, n):
        params = draw(OURS, shape, seed=0, step=next(step), slots=range(n), view=0)
        apply(image.expand(n, 1, *shape), params, OURS, method=method)

    def plain_monai():
        monai.data.set_track_meta(False)
        monai_pipeline({"image": image.clone()})
        monai.data.set_track_meta(True)

    return {
        "MONAI (MetaTensor)": (1, lambda: monai_pipeline({"image": monai.data.MetaTensor(image.clone())})),
        "MONAI (plain tensors)": (1, plain_monai),
        "TorchIO (no cutout)": (1, lambda: torchio_pipeline(tio.Subject(image=tio.ScalarImage(tensor=image.clone())))),
        "medssl, item by item": (1, lambda: ours("items", 1)),
        "medssl, batch of 4": (4, lambda: ours("batched", 4)),
    }


def measure(shape, rounds):
    runs = contenders(shape)
    times = {name: [] for name in runs}
    names = list(runs)
    for number in range(-1, rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            n, run = runs[name]
            start = time.perf_counter()
            run()
            if number >= 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) / n)
    base = times["MONAI (MetaTensor)"]
    print(f"\n{'x'.join(map(str, shape))}, {rounds} rounds, 1 thread: ms per view, median (min-max), speed")
    for name, values in times.items():
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        ms = [1e3 * v for v in values]
        print(f"  {name:24s} {statistics.median(ms):7.1f} ({min(ms):.1f}-{max(ms):.1f})  {ratio:5.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for shape in ((96, 96, 96), (121, 145, 121)):
        measure(shape, rounds)


if __name__ == "__main__":
    main()
