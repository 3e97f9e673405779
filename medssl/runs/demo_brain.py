"""The brain half of the demo: brain age with and without the scanner, on generated brains of several sites.

The cohort of the full demo was fixed before anything was trained on it. Method settings were chosen on a cohort of
another seed alone, on people set aside there for validation, from the time budget and from whether a training leaves
its plateau within it. Each trial was one training, so these choices are rough: FairKL compares moments, because in
mode kl a weight of 1 kept L^exp on its plateau and one of 0.3 changed little; weight 10 was no worse than 50. The
combination below was first trained as such in the demo itself. The verdict is what comes out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medssl.config import CompareConfig, load_config
from medssl.core.files import atomic_write
from medssl.data.cohorts import openbhb, synthetic
from medssl.reporting.age_site_results import paired_reading
from medssl.reporting.text import number, signed, spread
from medssl.runs.compare import compare
from medssl.runs.compare_summary import Compared
from medssl.runs.demo_parts import Half, checked, one_thread, shell, stages, status, yaml_path

TITLE: Final = "Brain age and site: with and without debiasing"
LAYER: Final = "z"
"""The projection: what the losses work on, and FairKL too."""
BASELINE: Final = "l_exp"
DEBIASED: Final = "l_exp_fair_kl"
_MEANS: Final = {"one_step": " (as good as untrained)", "l1": " (supervised)"}

_PLAN: Final = """\
# Age is learnt from generated brains of several sites; age and site are then predicted from what was learnt, for
# people of the same sites (internal_test) and of others (external_test). Arms differ in method and debias alone.
kind: compare
name: compare
runs: {out}
seed: {seed}
status: "{status}"
data:
  manifest: {manifest}
  splits: [train]          # nobody else is trained on
  cache: {cache}
  prepare: {{intensity: percentile, upper: 99.5}}
items: {{geometry: volume}}
model:
  encoder: {{name: resnet18_3d, widths: [8, 16, 32, 64]}}
arms:
  - name: one_step         # as good as untrained: what the images give away without learning
    method: {{name: supervised, projection_dim: 128}}
    steps: 1
  - name: l1               # trained from scratch on age, without contrast
    method: {{name: supervised, projection_dim: 128}}
  - name: y_aware          # Dufumier et al. 2021 (arXiv:2106.08808)
    method: {{name: y_aware, projection_dim: 128}}
  - name: l_exp            # Barbano et al. 2023 (arXiv:2211.08326)
    method: {{name: l_exp, projection_dim: 128}}
  - name: l_exp_fair_kl    # and FairKL against the site (Barbano et al. 2023, arXiv:2211.05568)
    method: {{name: l_exp, projection_dim: 128}}
    debias: {{name: fair_kl, attribute: site, on: z, mode: moments, weight: 10, target: {{column: age, sigma: 5}}}}
sampler: {{name: site_balanced, n_sites: {batch_sites}, n_per_site: 8}}
views: {{n_views: 1, preset: none}}
optimizer: {{name: adamw, learning_rate: 2.0e-3, weight_decay: 1.0e-2}}
schedule: {{name: cosine, warmup_steps: 10}}
training: {{steps: {steps}, workers: 0, accelerator: cpu}}
protocol: {{name: age_site, folds: null, seeds: {seeds}, layers: [z, h], solver: lbfgs, baseline: l_exp}}
jobs: {jobs}
"""


@dataclass(frozen=True)
class BrainSettings:
    """What differs between the demo and its smoke test."""

    n_subjects: int
    sites: int
    external_sites: int
    steps: int
    batch_sites: int
    seeds: tuple[int, ...]
    jobs: int
    size: int = 32
    external_share: float = 0.25
    seed: int = 0


FULL: Final = BrainSettings(
    n_subjects=400, sites=6, external_sites=2, steps=150, batch_sites=4, seeds=(0, 1, 2), jobs=2
)
QUICK: Final = BrainSettings(
    n_subjects=48, sites=2, external_sites=1, steps=2, batch_sites=2, seeds=(0,), jobs=1, size=16
)


def brain(out: Path, settings: BrainSettings, *, smoke: bool) -> Half:
    """Run the brain half in ``out``, or go on with it.

    Raises:
        DataError: A generated volume has been changed.
        Interrupted: Stopped; the same command goes on.
    """
    begun = time.monotonic()
    with one_thread(), stages("brain", 2) as stage:
        stage(f"generating {settings.n_subjects} brains of {settings.sites + settings.external_sites} sites")
        _data(out, settings)
        config = load_config(CompareConfig, write_plan(out, settings, smoke=smoke))
        n_cells = len(config.arms) * len(settings.seeds)
        stage(f"training {n_cells} networks on age, up to {settings.steps} steps each, and probing them for the site")
        done = compare(config, resume=(out / "compare").exists())
    return _half(done, _commands(out), time.monotonic() - begun)


def _data(out: Path, settings: BrainSettings) -> None:
    """The cohort with its manifest, which holds OpenBHB's splits; what is there already stays."""
    data = out / "data"
    if not (data / openbhb.SYNTHETIC_MARKER).is_file() or not (data / "manifest.csv").is_file():
        synthetic.generate(
            data,
            "openbhb",
            n_subjects=settings.n_subjects,
            seed=settings.seed,
            size=settings.size,
            sites=settings.sites,
            external_sites=settings.external_sites,
            external_share=settings.external_share,
            arrays=("quasiraw",),
            regions="none",
        )
    checked(data / "manifest.csv")


def write_plan(out: Path, settings: BrainSettings, *, smoke: bool) -> Path:
    """Write ``compare.yaml``, a complete plan for the command line."""
    values = {
        "out": yaml_path(out),
        "manifest": yaml_path(out / "data" / "manifest.csv"),
        "cache": yaml_path(out / "cache"),
        "status": status(smoke),
        "seed": settings.seed,
        "steps": settings.steps,
        "batch_sites": settings.batch_sites,
        "seeds": list(settings.seeds),
        "jobs": min(settings.jobs, os.cpu_count() or 1),
    }
    return atomic_write(out / "compare.yaml", _PLAN.format_map(values))


def _commands(out: Path) -> tuple[str, ...]:
    """How each step is run by hand, from the folder in which the demo was started."""
    data = out / "data"
    manifest = shell(data / "manifest.csv")
    return (
        f"medssl data scan {shell(data)} --kind openbhb --modality quasiraw -o {manifest} --force",
        f"medssl data check {manifest} --deep",
        f"OMP_NUM_THREADS=1 medssl compare --plan {shell(out / 'compare.yaml')} --set name=compare-again",
    )


def _half(done: Compared, commands: tuple[str, ...], seconds: float) -> Half:
    assert done.report is not None  # built at the end of every comparison
    headline, lines = brain_verdict(done.summary)
    table, _, _ = done.text().partition("\nnote: ")
    return Half(
        name="brain",
        verdict=headline,
        lines=lines,
        table=tuple(table.splitlines()),
        report=done.report,
        seconds=seconds,
        summary=done.summary,
        commands=commands,
    )


def brain_verdict(summary: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What FairKL did to site and age, and how the other arms compare with L^exp; both from the same people.

    Args:
        summary: Of the comparison (``eval/age_site.json``).

    Returns:
        The headline, and a line for each other thing that should be known.
    """
    rows = {row["arm"]: row for row in summary["rows"] if row["layer"] == LAYER}
    reading = paired_reading(_pair(summary, DEBIASED, "bacc"))
    begin = {
        "lower": "FairKL takes some of the site out of the embedding",
        "higher": "FairKL makes the site easier to read off the embedding",
    }.get(reading, "Whether FairKL hides the site cannot be told from noise")
    worse = paired_reading(_pair(summary, DEBIASED, "mae_internal")) == "higher"
    begin += ", and some of the age with it" if worse and reading == "lower" else ""
    both = (rows[DEBIASED], rows[BASELINE])
    site, seen, unseen = (_instead(summary, metric, *both) for metric in ("bacc", "mae_internal", "mae_external"))
    headline = (
        f"{begin}: the site is predicted with balanced accuracy {site}. "
        f"Age error in years at seen sites: {seen}; at unseen sites: {unseen}."
    )
    spreads = f", ± over {rows[BASELINE]['n_seeds']} seeds" if rows[BASELINE]["n_seeds"] > 1 else ""
    arms = [
        f"{arm}{_MEANS.get(arm, '')}: age error {_shown(row, 'mae_internal')} years at seen sites, "
        f"{_shown(row, 'mae_external')} at unseen ones; site {_shown(row, 'bacc')}{_against(summary, arm)}"
        for arm, row in rows.items()
    ]
    return headline, (
        f"Chance predicts the site with {number(summary['chance'], 2)}, true age alone with "
        f"{number(summary['age_only'], 2)}: an embedding that keeps age cannot be expected below that.",
        *arms,
        f"All on {LAYER}, the projection that was trained{spreads}, for {summary['n_people']} people who were not "
        "trained on; intervals (95 %) are over people.",
    )


def _instead(summary: Mapping[str, Any], metric: str, treated: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """With FairKL, without, and whether the difference is one."""
    shown = _difference(summary, DEBIASED, metric)
    return f"{number(treated[metric], 2)} instead of {number(plain[metric], 2)} ({shown})"


def _against(summary: Mapping[str, Any], arm: str) -> str:
    """How the age error of an arm compares with the baseline's."""
    if arm == BASELINE:
        return "."
    return f". Age at seen sites against {BASELINE}: {_difference(summary, arm, 'mae_internal')}."


def _pair(summary: Mapping[str, Any], arm: str, metric: str) -> Mapping[str, Any]:
    """The paired comparison of an arm with the baseline."""
    wanted = (arm, LAYER, metric)
    return next(row for row in summary["paired"] if (row["arm"], row["layer"], row["metric"]) == wanted)


def _difference(summary: Mapping[str, Any], arm: str, metric: str) -> str:
    """A paired difference with its interval and what it amounts to."""
    row = _pair(summary, arm, metric)
    low, high = (signed(end, 2) for end in row["ci"])
    return f"{signed(row['difference'], 2)}, interval {low} to {high}, {paired_reading(row)}"


def _shown(row: Mapping[str, Any], name: str) -> str:
    return spread(row[name], row[f"{name}_sd"], 2)
