"""A generated cohort of a few small stacks, and complete configurations that train on it in seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from medssl.data.cohorts.synthetic import generate
from medssl.runs.cohort import split

SIZE = 32
ENCODER = {"name": "unet2d", "widths": [4, 8, 8], "norm": "group"}


def small_cohort(folder: Path, n_subjects: int = 9, n_test: int = 3) -> Path:
    """The manifest of a split cohort of cardiac stacks, 32 x 32 x 5."""
    manifest = generate(folder, "cardiac", n_subjects=n_subjects, size=SIZE, n_slices=(5, 5), seed=3)
    split(manifest, test=n_test, validation=0, seed=0, stratify=(), mapping={}, out=None, force=False)
    return manifest


def pretrain_values(manifest: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A global contrast of a few steps."""
    return {
        "kind": "pretrain",
        "name": "gcl",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest), "cache": str(root / "cache"), "prepare": {"size": [SIZE, SIZE, None]}},
        "items": {"geometry": "slice", "partitions": 2},
        "model": {"encoder": ENCODER},
        "views": {"preset": "gcl", "n_views": 3, "original": True},
        "method": {"name": "gcl", "pool": "avg", "hidden_dim": 8, "projection_dim": 8},
        "sampler": {"name": "partition", "n_volumes": 2},
        "training": {"steps": 3, "accelerator": "cpu"},
        **changes,
    }


def finetune_values(manifest: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A grid of two cells of three steps, from scratch."""
    return {
        "kind": "finetune",
        "name": "finetune",
        "runs": str(root / "runs"),
        "data": {"manifest": str(manifest), "cache": str(root / "cache"), "prepare": {"size": [SIZE, SIZE, None]}},
        "items": {"geometry": "slice"},
        "model": {"encoder": ENCODER},
        "views": {"preset": "segmentation", "n_views": 1},
        "task": {"name": "segmentation"},
        "batch_size": 2,
        "training": {"steps": 3, "validate_every": 2, "workers": 0, "accelerator": "cpu"},
        "grid": {"n_labelled": [1, 2], "draws": 1, "n_validation": 1, "upper_bound": False},
        **changes,
    }


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """The configuration as a file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
