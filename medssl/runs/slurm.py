"""Runs as jobs of Slurm: a script that can be read, goes back into the queue before its time is over, and goes on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jinja2

from medssl.config import CompareConfig, FinetuneConfig, PretrainConfig
from medssl.config.load import load_any
from medssl.core.errors import ConfigError, MedsslError
from medssl.core.files import atomic_write
from medssl.runs.cohort import Outcome
from medssl.runs.few_label_pretraining import pretrain_cells
from medssl.runs.folder import run_folder

Run = PretrainConfig | FinetuneConfig | CompareConfig

WARNING_S: Final = 300
"""Seconds before the time limit at which a job is told to stop: enough to end a step and save."""
MOST_RESTARTS: Final = 100
"""A job that comes back more often gets nowhere."""
# What sbatch --time takes: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
_TIME: Final = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<plain>\d+(?::\d+){0,2}))")


@dataclass(frozen=True)
class Resources:
    """What is asked of Slurm for a job; None: the cluster's default, or what the configuration tells.

    Attributes:
        time: Time limit as sbatch takes it.
        partition, account, mem: Passed on.
        gpus: Of each node; None: one per device, none for `training.accelerator: cpu`.
        cpus: Of each process; None: one and its workers', for every cell computed at the same time.
        array_limit: Most parts of a comparison that run at the same time.
        parts: Parts of each stage of a comparison.
        more: Further options of sbatch, such as ``--constraint=a100``.
        setup: Lines of shell before medssl, such as ``module load cuda``.
    """

    time: str = "12:00:00"
    partition: str | None = None
    account: str | None = None
    mem: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    array_limit: int | None = None
    parts: int | None = None
    more: Sequence[str] = ()
    setup: Sequence[str] = ()


def write_job(
    config: Path,
    out: Path | None,
    resources: Resources,
    *,
    overrides: Sequence[str] = (),
    submit: bool = False,
    force: bool = False,
) -> Outcome:
    """Write the script of a run, and for a comparison another one that submits its stages; perhaps submit.

    Args:
        config: YAML of a pretraining, a fine-tuning or a comparison.
        out: The script; None: named after ``config``, here.
        resources: What to ask of Slurm.
        overrides: ``key=value``, passed on to medssl.
        submit: Submit it too.
        force: Replace scripts that exist.

    Raises:
        ConfigError: The configuration, an option or the place of the script cannot be used; no sbatch to submit with.
        MedsslError: sbatch refused the job.
    """
    run = load_any(config, overrides)
    if submit and shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no `sbatch` here, so nothing was submitted or written",
            fix="leave --submit out, and run the script where Slurm is",
        )
    script = out or Path(f"{config.stem}.sbatch")
    stages = _stages(run, resources)
    texts = {script: _job_script(run, config, script, resources, overrides)}
    begin = ["sbatch", str(script)]
    if stages:
        submitter = script.with_suffix(".submit.sh")
        texts[submitter] = _submit_script(run, script, submitter, stages, resources)
        begin = ["bash", str(submitter)]
    for path in texts:
        if path.exists() and not force:
            raise ConfigError(
                "the script exists already; it was not touched",
                where=str(path),
                fix="choose another name with --out, or replace it with --force",
            )
    for path, text in texts.items():
        atomic_write(path, text)
    lines = [f"written: {path}" for path in texts]
    fields = {"scripts": [str(path) for path in texts], "command": shlex.join(begin), "submitted": None}
    if submit:
        fields["submitted"] = _submit(begin)
        lines.append(str(fields["submitted"]))
    else:
        lines.append(f"next: {shlex.join(begin)}")
    return Outcome(lines, fields)


def _submit(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the script just written
    if done.returncode != 0:
        raise MedsslError(
            "the job was not submitted",
            where=shlex.join(command),
            found=done.stderr.strip() or f"exit code {done.returncode}",
            fix="correct the options of Slurm, and replace the script with --force",
        )
    return done.stdout.strip()


def _stages(run: Run, resources: Resources) -> list[tuple[str, int]]:
    """Stages of a comparison and the parts of each; none for a run that is one job."""
    if not isinstance(run, CompareConfig):
        given = [f"--{name.replace('_', '-')}" for name in ("array_limit", "parts") if getattr(resources, name)]
        if given:
            raise ConfigError(f"{' and '.join(given)}: only a comparison is divided into parts", fix="leave it out")
        return []
    if not run.few_label:
        return [("cells", resources.parts or len(run.arms) * len(run.protocol.seeds))]
    trainings = len(pretrain_cells(run))
    pretraining = min(trainings, resources.parts or trainings)
    cells = resources.parts or len(run.arms) * len(run.encoders) * len(run.protocol.seeds)
    return [("pretraining", pretraining), ("cells", cells)] if pretraining else [("cells", cells)]


def _job_script(run: Run, config: Path, script: Path, resources: Resources, overrides: Sequence[str]) -> str:
    kind, training = run.kind, run.training
    plan = isinstance(run, CompareConfig)
    jobs = run.jobs if isinstance(run, CompareConfig) else run.grid.jobs if isinstance(run, FinetuneConfig) else 1
    gpus = (0 if training.accelerator == "cpu" else training.devices) if resources.gpus is None else resources.gpus
    if training.accelerator == "gpu" and gpus == 0:
        raise ConfigError("training.accelerator is gpu, but no GPU is asked for", where="--gpus", fix="leave it out")
    asked = {
        "job-name": _job_name(run),
        "chdir": str(Path.cwd()),
        "time": _checked_time(resources.time),
        "nodes": training.nodes,
        "ntasks-per-node": training.devices,
        "cpus-per-task": resources.cpus or jobs * (training.workers + 1),
        "gres": f"gpu:{gpus}" if gpus else None,
        "mem": resources.mem,
        "partition": resources.partition,
        "account": resources.account,
    }
    options = [f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]
    for line in (*options, *resources.more, *resources.setup, *overrides, str(config)):
        if not line.isprintable():
            raise ConfigError("a line break or control character would begin another line of the script", found=line)
    bad = [option for option in resources.more if not option.startswith("-")]
    if bad:
        raise ConfigError("an option of sbatch begins with a dash", where="--sbatch", found=", ".join(bad))
    words = ["--plan", str(config.resolve())] if plan else [str(config.resolve())]
    arguments = shlex.join([kind, *words, "--resume", *(word for one in overrides for word in ("--set", one))])
    return _template("slurm.sbatch").render(
        title=f"{kind} {run.name}",
        usage=[f"bash {script.with_suffix('.submit.sh')}" if plan else f"sbatch {script}"],
        options=[*options, *resources.more],
        warning_s=WARNING_S,
        medssl=shlex.join(_medssl()),
        run_folder=shlex.quote(str(run_folder(run.runs, run.name).absolute())),
        most_restarts=MOST_RESTARTS,
        setup=resources.setup,
        plan=plan,
        arguments=f'{arguments} "${{part[@]}}"' if plan else arguments,
    )


def _submit_script(
    run: Run, script: Path, submitter: Path, stages: Sequence[tuple[str, int]], resources: Resources
) -> str:
    return _template("slurm.submit.sh").render(
        title=f"{run.kind} {run.name}",
        submit=submitter,
        script=shlex.quote(str(script.absolute())),
        stages=stages,
        job_name=_job_name(run),
        limit=f"%{resources.array_limit}" if resources.array_limit else "",
    )


def _job_name(run: Run) -> str:
    return f"medssl-{run.name}"


def _medssl() -> list[str]:
    """The program that is running now, so that the job needs no activated environment."""
    program = Path(sys.executable).with_name("medssl")
    return [str(program)] if program.exists() else [sys.executable, "-m", "medssl.cli.main"]


def _checked_time(time: str) -> str:
    """``time``, which must leave more than the warning.

    Raises:
        ConfigError: Not a time of sbatch, or too short.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError("not a time limit of Slurm", where="--time", found=time, fix="for example 12:00:00 or 2-00")
    if found["plain"] is None:
        numbers = [int(found[name] or 0) for name in ("days", "h", "m", "s")]
        seconds = 86400 * numbers[0] + 3600 * numbers[1] + 60 * numbers[2] + numbers[3]
    else:
        numbers = [int(number) for number in found["plain"].split(":")]
        factors = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
        seconds = sum(number * factor for number, factor in zip(numbers, factors, strict=True))
    if seconds < 2 * WARNING_S:
        raise ConfigError(
            f"a job is told to stop {WARNING_S} seconds before its time is over, so it needs at least {2 * WARNING_S}",
            where="--time",
            found=f"{time} ({seconds} seconds)",
            fix="ask for more, for example 12:00:00",
        )
    return time


def _template(name: str) -> jinja2.Template:
    # Nothing is rendered as HTML; what goes into lines of shell is quoted before.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("medssl.runs"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{name}.j2")
