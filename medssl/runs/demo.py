"""The main job on a cohort that is generated on the spot: pretrain, fine-tune with few labels, compare, report.

Every setting below was fixed before any pretrained network was fine-tuned: from the time budget, from the scratch arm
on a cohort of another seed, and, for the global contrast, from its own loss and spread. The verdict is what comes out.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from medssl.config import FinetuneConfig, PretrainConfig, load_config
from medssl.core.errors import ConfigError, DataError
from medssl.core.files import atomic_write, write_json
from medssl.data.cohorts import synthetic
from medssl.data.manifest import read_manifest
from medssl.runs import cohort as cohorts
from medssl.runs.cohort import Outcome
from medssl.runs.finetune import finetune
from medssl.runs.pretrain import pretrain
from medssl.runs.summary import Finetuned

log = logging.getLogger(__name__)

MARKER: Final = "demo.json"
VERSION: Final = 1  # raised when the settings below change, so that old and new results are never mixed
SYNTHETIC: Final = "These are synthetic data: drawn by a program, not patients. Nothing here says anything about MRI."
SMOKE: Final = "SMOKE TEST: a handful of steps, to see that everything runs. Its numbers mean nothing."


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
class Settings:
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
    version: int = VERSION

    @property
    def status(self) -> str:
        """What every report says about its numbers."""
        return SYNTHETIC if self.draws > 1 else f"{SMOKE} {SYNTHETIC}"


FULL: Final = Settings(
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
QUICK: Final = Settings(
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


def demo(out: Path, smoke: bool = False) -> Outcome:
    """Run the cardiac half of the demo in ``out``; a folder of an earlier, unfinished demo is gone on with.

    Args:
        out: Folder for the cohort, the configurations and the runs.
        smoke: The same path in seconds, with numbers that mean nothing.

    Raises:
        ConfigError: The folder holds something else, or a demo with other settings.
        Interrupted: Stopped; the same command goes on.
    """
    settings = QUICK if smoke else FULL
    return run_demo(out, settings, smoke=smoke)


def run_demo(out: Path, settings: Settings, *, smoke: bool) -> Outcome:
    """The demo with any settings."""
    begun = time.monotonic()
    _claim(out, settings)
    log.info("%s", SYNTHETIC)
    commands = _commands(out, settings)
    with _one_thread(), _stages(begun, 4) as stage:
        stage(f"generating {settings.n_subjects} hearts, checking and splitting them by person")
        _data(out, settings)
        files = write_configs(out, settings)
        stage(f"pretraining the encoder without labels: gcl, {settings.gcl_steps} steps")
        pretrain(load_config(PretrainConfig, files["gcl"]), resume=(out / "gcl").exists())
        stage(f"pretraining the decoder on top of it: lcl, {settings.lcl_steps} steps")
        pretrain(load_config(PretrainConfig, files["lcl"]), resume=(out / "lcl").exists())
        n_cells = 2 * settings.draws * len(settings.n_labelled) + settings.upper_bound
        stage(f"fine-tuning {n_cells} networks, {settings.finetune_steps} steps each, and scoring them on test people")
        done = finetune(load_config(FinetuneConfig, files["finetune"]), resume=(out / "finetune").exists())
    return _outcome(done, commands, time.monotonic() - begun, smoke=smoke)


def _claim(out: Path, settings: Settings) -> None:
    """Take a new or empty folder, or one that this demo began with the same settings."""
    marker = out / MARKER
    mine = json.loads(json.dumps(asdict(settings)))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        write_json(marker, mine)
        return
    fix = "name a new or empty folder with --out"
    if not marker.is_file():
        raise ConfigError("the folder holds something else; nothing in it was touched", where=str(out), fix=fix)
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the record of the demo cannot be read", where=str(marker), found=str(error), fix=fix
        ) from error
    if found != mine:
        raise ConfigError(
            "the folder holds a demo with other settings (such as --smoke); nothing in it was touched",
            where=str(out),
            fix=fix,
        )
    log.info("going on with the demo in %s: what is finished is not repeated", out)


def _data(out: Path, settings: Settings) -> None:
    """The cohort with its manifest and split; what is there already stays."""
    data, manifest = out / "data", out / "manifest.csv"
    if not (data / synthetic.MARKER).is_file():
        synthetic.generate(data, "cardiac", n_subjects=settings.n_subjects, seed=settings.seed, size=settings.size)
    if not manifest.is_file():
        cohorts.scan(data, manifest, kind="synthetic", options={}, force=True)
    checked = cohorts.check(manifest, deep=True, jobs=1, mapping={}, out=None)
    if checked.n_errors:
        raise DataError(
            "the generated volumes have been changed or damaged",
            where=str(manifest),
            found=checked.text(),
            fix="name a new or empty folder with --out",
        )
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


def write_configs(out: Path, settings: Settings) -> dict[str, Path]:
    """Write ``gcl.yaml``, ``lcl.yaml`` and ``finetune.yaml``, each a complete run for the command line."""
    values = {
        "out": _yaml_path(out),
        "manifest": _yaml_path(out / "manifest.csv"),
        "cache": _yaml_path(out / "cache"),
        "gcl": _yaml_path(out / "gcl"),
        "lcl": _yaml_path(out / "lcl"),
        "status": settings.status,
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


def _yaml_path(path: Path) -> str:
    """A path as a YAML string, whatever characters it holds."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def _commands(out: Path, settings: Settings) -> list[str]:
    """How each step is run by hand, from the folder in which the demo was started."""
    thread = "OMP_NUM_THREADS=1 "
    manifest = _shell(out / "manifest.csv")
    return [
        f"medssl data scan {_shell(out / 'data')} --kind synthetic -o {manifest} --force",
        f"medssl data check {manifest} --deep",
        f"medssl data split {manifest} --test {settings.n_test} --seed {settings.seed} --stratify site",
        f"medssl data show {manifest} -o {_shell(out / 'montage.png')}",
        *(
            f"{thread}medssl {verb} {_shell(out / (name + '.yaml'))} --set name={name}-again"
            for verb, name in (("pretrain", "gcl"), ("pretrain", "lcl"), ("finetune", "finetune"))
        ),
    ]


def _shell(path: Path) -> str:
    return shlex.quote(str(path))


@contextmanager
def _one_thread() -> Iterator[None]:
    """These networks are so small that a second thread costs more than it brings; cells run side by side instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stages(begun: float, total: int) -> Iterator[Any]:
    """Yields a function that announces a stage, with the time since the beginning."""
    number = 0

    def stage(title: str) -> None:
        nonlocal number
        number += 1
        log.info("[%4.0f s] %d/%d %s", time.monotonic() - begun, number, total, title)

    yield stage


def _outcome(done: Finetuned, commands: list[str], seconds: float, *, smoke: bool) -> Outcome:
    notes = [SYNTHETIC, *([SMOKE] if smoke else [])]
    table, _, _ = done.text().rpartition("\n\n")
    lines = [
        f"report: {done.report}",
        "",
        *notes,
        "",
        done.verdict,
        "",
        table,
        "",
        f"{seconds:.0f} s in all. The same by hand, step by step:",
        *(f"  {command}" for command in commands),
    ]
    fields = {
        "report": str(done.report),
        "synthetic": True,
        "smoke": smoke,
        "notes": notes,
        "seconds": round(seconds, 1),
        "commands": commands,
        **done.summary,
    }
    return Outcome(lines, fields)
