"""The cardiac half of the demo: pretrain, fine-tune with few labels, compare, report, on generated hearts.

Every setting below was fixed before any pretrained network was fine-tuned: from the time budget, from the scratch arm
on a cohort of another seed, and, for the global contrast, from its own loss and spread. The verdict is what comes out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medssl.config import FinetuneConfig, PretrainConfig, load_config
from medssl.core.files import atomic_write
from medssl.data.cohorts import synthetic
from medssl.data.manifest import read_manifest
from medssl.reporting.text import labels_phrase, spread
from medssl.runs import cohort as cohorts
from medssl.runs.demo_parts import Half, checked, one_thread, shell, stages, status, yaml_path
from medssl.runs.finetune import finetune
from medssl.runs.pretrain import pretrain
from medssl.runs.summary import Finetuned

TITLE: Final = "Few-label segmentation: with and without pretraining"

_SHARED: Final = """
runs: {out}
seed: {seed}
status: "{status}"
data:
  manifest: {manifest}
  splits: [train]          # test people are never pretrained on
  cache: {cache}
  prepare: {{size: [{size}, {size}, null], spacing: null}}
model:
  encoder: {{name: unet2d, widths: [8, 16, 32, 64], norm: group}}
  decoder_blocks: {blocks}
"""

_GCL: Final = """\
# Global contrast (Chaitanya et al. 2020, arXiv:2006.10511): slices of the same part of the heart attract each other.
kind: pretrain
name: gcl
method: {{name: gcl, strategy: gd, temperature: 0.1, pool: flatten, hidden_dim: 256}}
items: {{geometry: slice, partitions: 4}}
sampler: {{name: partition, n_volumes: {gcl_volumes}}}
views: {{preset: gcl, n_views: 3, original: true}}
optimizer: {{name: adam, learning_rate: 5.0e-4}}
schedule: {{name: cosine, warmup_steps: 2}}
training: {{steps: {gcl_steps}, workers: 1, accelerator: cpu}}"""

_LCL: Final = """\
# Local contrast (the same paper): regions of one slice tell themselves apart, on top of the encoder from gcl.
kind: pretrain
name: lcl
weights: {gcl}
method: {{name: lcl, strategy: lr, temperature: 0.1}}
items: {{geometry: slice}}
sampler: {{name: random, batch_size: 12}}
views: {{preset: intensity, n_views: 2}}
optimizer: {{name: adam, learning_rate: 1.0e-3}}
schedule: {{name: cosine, warmup_steps: 2}}
training: {{steps: {lcl_steps}, workers: 1, accelerator: cpu}}"""

_FINETUNE: Final = """\
# The same network with few labels, from scratch and from the weights of lcl; everything else is equal.
kind: finetune
name: finetune
task: {{name: segmentation}}
items: {{geometry: slice}}
batch_size: 4
views: {{preset: segmentation, n_views: 1}}
optimizer: {{name: adamw, learning_rate: 1.0e-2, weight_decay: 1.0e-4}}
schedule: {{name: cosine, warmup_steps: 2}}
training: {{steps: {steps}, validate_every: {validate_every}, workers: 0, accelerator: cpu}}
grid:
  arms:
    - {{name: scratch}}
    - {{name: pretrained, weights: {lcl}}}
  n_labelled: {n_labelled}
  draws: {draws}
  n_validation: {n_validation}
  upper_bound: {upper_bound}
  jobs: {jobs}
evaluate_on: test"""


@dataclass(frozen=True)
class CardiacSettings:
    """What differs between the demo and its smoke test."""

    n_subjects: int
    n_test: int
    gcl_steps: int
    gcl_volumes: int
    lcl_steps: int
    finetune_steps: int
    n_labelled: tuple[int, ...]
    draws: int
    n_validation: int
    upper_bound: bool
    jobs: int
    seed: int = 0
    size: int = 64


FULL: Final = CardiacSettings(
    n_subjects=40,
    n_test=13,
    gcl_steps=250,
    gcl_volumes=4,
    lcl_steps=200,
    finetune_steps=600,
    n_labelled=(1, 2),
    draws=3,
    n_validation=2,
    upper_bound=False,
    jobs=2,
)
QUICK: Final = CardiacSettings(
    n_subjects=8,
    n_test=3,
    gcl_steps=3,
    gcl_volumes=2,
    lcl_steps=3,
    finetune_steps=4,
    n_labelled=(1, 2),
    draws=1,
    n_validation=1,
    upper_bound=False,
    jobs=1,
)


def cardiac(out: Path, settings: CardiacSettings, *, smoke: bool) -> Half:
    """Run the cardiac half in ``out``, or go on with it.

    Raises:
        DataError: A generated volume has been changed.
        Interrupted: Stopped; the same command goes on.
    """
    begun = time.monotonic()
    commands = _commands(out, settings)
    with one_thread(), stages("cardiac", 4) as stage:
        stage(f"generating {settings.n_subjects} hearts, checking and splitting them by person")
        _data(out, settings)
        files = write_configs(out, settings, smoke=smoke)
        stage(f"pretraining the encoder without labels: gcl, {settings.gcl_steps} steps")
        pretrain(load_config(PretrainConfig, files["gcl"]), resume=(out / "gcl").exists())
        stage(f"pretraining the decoder on top of it: lcl, {settings.lcl_steps} steps")
        pretrain(load_config(PretrainConfig, files["lcl"]), resume=(out / "lcl").exists())
        n_cells = 2 * settings.draws * len(settings.n_labelled) + settings.upper_bound
        stage(f"fine-tuning {n_cells} networks, {settings.finetune_steps} steps each, and scoring them on test people")
        done = finetune(load_config(FinetuneConfig, files["finetune"]), resume=(out / "finetune").exists())
    return _half(done, commands, time.monotonic() - begun)


def _data(out: Path, settings: CardiacSettings) -> None:
    """The cohort with its manifest and split; what is there already stays."""
    data, manifest = out / "data", out / "manifest.csv"
    if not (data / synthetic.MARKER).is_file():
        synthetic.generate(data, "cardiac", n_subjects=settings.n_subjects, seed=settings.seed, size=settings.size)
    if not manifest.is_file():
        cohorts.scan(data, manifest, kind="synthetic", options={}, force=True)
    checked(manifest)
    if not read_manifest(manifest).table["split"].notna().any():
        cohorts.split(
            manifest,
            test=settings.n_test,
            validation=0,
            seed=settings.seed,
            stratify=("site",),
            mapping={},
            out=None,
            force=False,
        )


def write_configs(out: Path, settings: CardiacSettings, *, smoke: bool) -> dict[str, Path]:
    """Write ``gcl.yaml``, ``lcl.yaml`` and ``finetune.yaml``, each a complete run for the command line."""
    values = {
        "out": yaml_path(out),
        "manifest": yaml_path(out / "manifest.csv"),
        "cache": yaml_path(out / "cache"),
        "gcl": yaml_path(out / "gcl"),
        "lcl": yaml_path(out / "lcl"),
        "status": status(smoke),
        "size": settings.size,
        "seed": settings.seed,
        "gcl_steps": settings.gcl_steps,
        "gcl_volumes": settings.gcl_volumes,
        "lcl_steps": settings.lcl_steps,
        "steps": settings.finetune_steps,
        "validate_every": max(1, settings.finetune_steps // 8),
        "n_labelled": list(settings.n_labelled),
        "draws": settings.draws,
        "n_validation": settings.n_validation,
        "upper_bound": str(settings.upper_bound).lower(),
        "jobs": min(settings.jobs, os.cpu_count() or 1),
    }
    files = {}
    for name, blocks, template in (("gcl", "null", _GCL), ("lcl", "2", _LCL), ("finetune", "null", _FINETUNE)):
        files[name] = out / f"{name}.yaml"
        atomic_write(files[name], (template + _SHARED).format_map(values | {"blocks": blocks}))
    return files


def _commands(out: Path, settings: CardiacSettings) -> tuple[str, ...]:
    """How each step is run by hand, from the folder in which the demo was started."""
    thread = "OMP_NUM_THREADS=1 "
    manifest = shell(out / "manifest.csv")
    return (
        f"medssl data scan {shell(out / 'data')} --kind synthetic -o {manifest} --force",
        f"medssl data check {manifest} --deep",
        f"medssl data split {manifest} --test {settings.n_test} --seed {settings.seed} --stratify site",
        f"medssl data show {manifest} -o {shell(out / 'montage.png')}",
        *(
            f"{thread}medssl {verb} {shell(out / (name + '.yaml'))} --set name={name}-again"
            for verb, name in (("pretrain", "gcl"), ("pretrain", "lcl"), ("finetune", "finetune"))
        ),
    )


def _half(done: Finetuned, commands: tuple[str, ...], seconds: float) -> Half:
    assert done.report is not None  # built at the end of every grid
    table, _, _ = done.text().rpartition("\n\n")
    return Half(
        name="cardiac",
        verdict=done.verdict,
        lines=tuple(_line(row) for row in done.summary["table"]),
        table=tuple(table.splitlines()),
        report=done.report,
        seconds=seconds,
        summary=done.summary,
        commands=commands,
    )


def _line(row: Mapping[str, Any]) -> str:
    """What one arm reached with so many labels."""
    draws = f" over {row['n_draws']} draws" if row["n_draws"] > 1 else ""
    labels = labels_phrase(row["n_labelled"], row["n_validation"])
    return f"{row['arm']}, {labels}: Dice {spread(row['mean'], row['sd'])}{draws}."
