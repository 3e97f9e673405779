"""The command line: parse, call one run, print, exit.

Nothing here imports torch or MONAI before a command runs, so that ``medssl --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import medssl
from medssl.core.errors import MedsslError

app = typer.Typer(
    name="medssl",
    help="Pretrain 3D encoders on unlabelled MRI, fine-tune segmentation with few labels, report honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Find, check, split, look at and prepare a cohort.", no_args_is_help=True)
init = typer.Typer(help="Write a commented configuration for a manifest.", no_args_is_help=True)
evaluate = typer.Typer(help="Score predictions or embeddings.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(init, name="init")
app.add_typer(evaluate, name="evaluate")

Json = Annotated[bool, typer.Option("--json", help="Print the result for machines.")]
Map = Annotated[list[str] | None, typer.Option("--map", help="Read a column of another name, e.g. group=person.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, e.g. method.temperature=0.2.", metavar="KEY=VALUE"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")]
AllowChanged = Annotated[
    bool, typer.Option("--allow-changed", help="Resume although the configuration or manifest changed.")
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, help="Processes (GPUs) on each node.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Number of nodes.")]
Precision = Annotated[str | None, typer.Option("--precision", help="auto, 32 or bf16.")]
Strategy = Annotated[str | None, typer.Option("--strategy", help="auto or ddp.")]
Accelerator = Annotated[str | None, typer.Option("--accelerator", help="auto, cpu or gpu.")]
ConfigFile = Annotated[Path, typer.Argument(help="The YAML file of the run.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"medssl {medssl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "fontTools", "monai", "nibabel", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _show(result: Any, as_json: bool) -> None:
    """Print what a run returned: its own words for people, its fields for machines."""
    if not result.text():
        return  # of several processes, the first one speaks
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, default=str))
    else:
        typer.echo(result.text())


def _mapping(pairs: list[str] | None) -> dict[str, str]:
    mapping = {}
    for pair in pairs or []:
        name, separator, column = pair.partition("=")
        if not separator or not name or not column:
            raise typer.BadParameter(f"--map takes NAME=COLUMN, not `{pair}`")
        mapping[name] = column
    return mapping


def _launch_overrides(**values: Any) -> list[str]:
    return [f"training.{name}={value}" for name, value in values.items() if value is not None]


@data.command("scan")
def data_scan(
    root: Annotated[Path, typer.Argument(help="Folder of the cohort, or one table of features.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the manifest.")] = Path("manifest.csv"),
    kind: Annotated[str, typer.Option(help="auto, or a cohort by name (acdc, msd, mmwhs, bids, ...).")] = "auto",
    pattern: Annotated[
        str | None, typer.Option(help="folder: file names with fields, e.g. '{subject}_{session}.nii.gz'.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="folder: label of an image, with the same fields.")] = None,
    channels: Annotated[str | None, typer.Option(help="msd: all, both, or one modality of a 4D image.")] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            help="mmwhs: both, MR or CT; openbhb: vbm, quasiraw, roi_cat12, roi_desikan, roi_destrieux; folder: any."
        ),
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="bids: images, e.g. T1w; 'T1w;FLAIR' as channels.")] = None,
    frames: Annotated[str | None, typer.Option(help="acdc: labelled (ED and ES) or cine (every frame).")] = None,
    features: Annotated[
        str | None, typer.Option(help="table: columns that are features, as globs: 'lh_*;rh_*'; default: all numbers.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing manifest.")] = False,
    as_json: Json = False,
) -> None:
    """Write a manifest of a folder of MRI or a table of features: one row a volume, and what was skipped and why."""
    from medssl.runs import cohort

    options = {
        "pattern": pattern,
        "label": label,
        "channels": channels,
        "modality": modality,
        "suffix": suffix,
        "frames": frames,
        "features": features,
    }
    given = {name: value for name, value in options.items() if value is not None}
    _show(cohort.scan(root, out, kind=kind, options=given, force=force), as_json)


@data.command("check")
def data_check(
    manifest: Annotated[Path, typer.Argument(help="manifest.csv")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every voxel, not only headers.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Files read at the same time.")] = 1,
    mapping: Map = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the findings as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """List every problem of a manifest and its files in one pass; exit code 3 when there are errors."""
    from medssl.runs import cohort

    result = cohort.check(manifest, deep=deep, jobs=jobs, mapping=_mapping(mapping), out=out)
    _show(result, as_json)
    if result.n_errors:
        raise typer.Exit(3)


@data.command("split")
def data_split(
    manifest: Annotated[Path, typer.Argument(help="manifest.csv")],
    test: Annotated[float, typer.Option(min=0, help="Groups for testing: a count, or a share below 1.")],
    validation: Annotated[float, typer.Option(min=0, help="Groups for validation: a count, or a share below 1.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Which of the possible splits.")] = 0,
    stratify: Annotated[list[str] | None, typer.Option(help="Column to balance, e.g. site; may be repeated.")] = None,
    mapping: Map = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; default: the same file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a split that is there already.")] = False,
    as_json: Json = False,
) -> None:
    """Divide a manifest into train, validation and test, never dividing a group (a person)."""
    from medssl.runs import cohort

    result = cohort.split(
        manifest,
        test=test,
        validation=validation,
        seed=seed,
        stratify=tuple(stratify or ()),
        mapping=_mapping(mapping),
        out=out,
        force=force,
    )
    _show(result, as_json)


@data.command("show")
def data_show(
    manifest: Annotated[Path, typer.Argument(help="manifest.csv")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("montage.png"),
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="Number of volumes.")] = 12,
    case: Annotated[list[str] | None, typer.Option(help="Show these cases or subjects; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which volumes are drawn.")] = 0,
    mapping: Map = None,
    as_json: Json = False,
) -> None:
    """Draw a montage of volumes with the outlines of their labels."""
    from medssl.runs import cohort

    _show(cohort.show(manifest, out, n=n, cases=tuple(case or ()), seed=seed, mapping=_mapping(mapping)), as_json)


@data.command("prepare")
def data_prepare(
    config: ConfigFile,
    overrides: Set = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Volumes prepared at the same time.")] = None,
    as_json: Json = False,
) -> None:
    """Preprocess the volumes of a run's configuration into the cache (a run does this by itself as well)."""
    from medssl.runs import cohort

    extra = [] if jobs is None else [f"data.jobs={jobs}"]
    _show(cohort.prepare_for(config, [*(overrides or []), *extra]), as_json)


def _init(kind: str, manifest: Path, out: Path | None, mapping: list[str] | None, force: bool, as_json: bool) -> None:
    from medssl.runs import init as run

    _show(run.write_config(kind, manifest, out, mapping=_mapping(mapping), force=force), as_json)


@init.command("pretrain")
def init_pretrain(
    manifest: Annotated[Path, typer.Argument(help="manifest.csv")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: pretrain.yaml")] = None,
    mapping: Map = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented pretraining configuration that fits a manifest."""
    _init("pretrain", manifest, out, mapping, force, as_json)


@init.command("finetune")
def init_finetune(
    manifest: Annotated[Path, typer.Argument(help="manifest.csv")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: finetune.yaml")] = None,
    mapping: Map = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented fine-tuning configuration that fits a manifest."""
    _init("finetune", manifest, out, mapping, force, as_json)


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Set = None,
    resume: Resume = False,
    allow_changed: AllowChanged = False,
    devices: Devices = None,
    nodes: Nodes = None,
    precision: Precision = None,
    strategy: Strategy = None,
    accelerator: Accelerator = None,
    as_json: Json = False,
) -> None:
    """Pretrain an encoder (or a decoder) on unlabelled volumes."""
    from medssl.config import PretrainConfig, load_config
    from medssl.runs.pretrain import pretrain as run

    extra = _launch_overrides(
        devices=devices, nodes=nodes, precision=precision, strategy=strategy, accelerator=accelerator
    )
    loaded = load_config(PretrainConfig, config, [*(overrides or []), *extra])
    _show(run(loaded, resume=resume, allow_changed=allow_changed), as_json)


@app.command()
def finetune(
    config: ConfigFile,
    overrides: Set = None,
    resume: Resume = False,
    allow_changed: AllowChanged = False,
    precision: Precision = None,
    accelerator: Accelerator = None,
    as_json: Json = False,
) -> None:
    """Fine-tune with few labels: arms x label fractions x draws x seeds, then score and report."""
    from medssl.config import FinetuneConfig, load_config
    from medssl.runs.finetune import finetune as run

    extra = _launch_overrides(precision=precision, accelerator=accelerator)
    loaded = load_config(FinetuneConfig, config, [*(overrides or []), *extra])
    _show(run(loaded, resume=resume, allow_changed=allow_changed), as_json)


@app.command()
def compare(
    plan: Annotated[Path, typer.Option("--plan", help="The YAML file of the comparison.")],
    overrides: Set = None,
    resume: Resume = False,
    allow_changed: AllowChanged = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells computed at the same time.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="pretraining or cells: compute only these, and do not aggregate (array jobs).")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every N-th cell of the stage, from I on.")
    ] = None,
    precision: Precision = None,
    accelerator: Accelerator = None,
    as_json: Json = False,
) -> None:
    """Compare methods: train every arm with one budget on the same people, evaluate all alike, report once."""
    from medssl.config import CompareConfig, load_config
    from medssl.runs.compare import compare as run
    from medssl.runs.parts import read_part

    chosen = read_part(stage, part)
    extra = _launch_overrides(precision=precision, accelerator=accelerator)
    given = [*(overrides or []), *extra, *([] if jobs is None else [f"jobs={jobs}"])]
    loaded = load_config(CompareConfig, plan, given)
    if loaded.few_label and extra:  # the device of both halves
        loaded = load_config(CompareConfig, plan, [*given, *(f"protocol.finetune.{one}" for one in extra)])
    result = run(loaded, resume=resume, allow_changed=allow_changed, part=chosen)
    _show(result, as_json)
    if result.failed:  # the others' results are there, but not all that was asked for
        raise typer.Exit(1)


@app.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="The YAML file of a pretraining, a fine-tuning or a comparison.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Script to write; default: CONFIG.sbatch.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it too.")] = False,
    overrides: Set = None,
    time: Annotated[str, typer.Option(help="Time limit; the job saves, is queued again and goes on.")] = "12:00:00",
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that pays.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of each node; default: training.devices.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each process; default: from the workers.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node, e.g. 64G.")] = None,
    parts: Annotated[int | None, typer.Option(min=1, help="compare: jobs that share the work of each stage.")] = None,
    array_limit: Annotated[int | None, typer.Option(min=1, help="compare: most jobs at the same time.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--sbatch", help="Another option of sbatch, e.g. --constraint=a100; repeatable.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Line of shell before medssl, e.g. 'module load cuda'; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace scripts that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run as a job of Slurm that is queued again before its time is over; a comparison as job arrays."""
    from medssl.runs.slurm import Resources, write_job

    resources = Resources(
        time=time,
        partition=partition,
        account=account,
        mem=mem,
        gpus=gpus,
        cpus=cpus,
        array_limit=array_limit,
        parts=parts,
        more=tuple(more or ()),
        setup=tuple(setup or ()),
    )
    result = write_job(config, out, resources, overrides=tuple(overrides or ()), submit=submit, force=force)
    _show(result, as_json)


@app.command()
def embed(
    weights: Annotated[Path, typer.Argument(help="Run folder, or its weights folder.")],
    manifest: Annotated[Path, typer.Argument(help="manifest.csv: who is embedded.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .parquet, .csv or .npy file.")],
    layer: Annotated[
        str | None, typer.Option(help="z (projection), h (encoder), block0, block1, ...; default: z if there is one.")
    ] = None,
    splits: Annotated[list[str] | None, typer.Option("--split", help="Only rows of this split; repeatable.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The run's configuration, for weights outside a run folder.")
    ] = None,
    mapping: Map = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or slices in one pass.")] = 64,
    accelerator: Accelerator = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Embed volumes or feature rows with pretrained weights, prepared as for the pretraining."""
    from medssl.runs.embed import embed as run

    result = run(
        weights,
        manifest,
        out,
        layer=layer,
        splits=tuple(splits) if splits else None,
        config=config,
        mapping=_mapping(mapping),
        batch_size=batch_size,
        accelerator=accelerator or "auto",
        force=force,
    )
    _show(result, as_json)


@app.command()
def predict(
    weights: Annotated[Path, typer.Argument(help="Cell of a fine-tuning run (runs/NAME/cells/CELL).")],
    inputs: Annotated[Path, typer.Argument(help="A manifest.csv, one volume, or a folder of volumes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for label maps, or predictions.csv.")],
    accelerator: Accelerator = None,
    as_json: Json = False,
) -> None:
    """Predict new volumes: label maps in the geometry of their input, or a table of numbers or classes.

    Exit code 3 when a volume failed.
    """
    from medssl.runs.predict import predict as run

    result = run(weights, inputs, out, accelerator=accelerator or "auto")
    _show(result, as_json)
    if result.failed:
        raise typer.Exit(3)


@evaluate.command("seg")
def evaluate_seg(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label maps, named by case or image.")],
    manifest: Annotated[Path, typer.Argument(help="manifest.csv with labels.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for per_case.csv and summary.json.")] = None,
    splits: Annotated[str | None, typer.Option("--split", help="Score only rows of this split.")] = None,
    mapping: Map = None,
    as_json: Json = False,
) -> None:
    """Score any folder of predictions against the labels of a manifest."""
    from medssl.runs.evaluate import evaluate_segmentation

    _show(evaluate_segmentation(predictions, manifest, out=out, split=splits, mapping=_mapping(mapping)), as_json)


@evaluate.command("clusters")
def evaluate_clusters(
    run: Annotated[Path, typer.Argument(help="Folder of an iic_segmentation run, or its weights folder.")],
    manifest: Annotated[Path | None, typer.Option("--manifest", help="Whose images; default: the run's.")] = None,
    fit_splits: Annotated[
        list[str] | None,
        typer.Option("--fit-split", help="Where clusters are matched to classes; repeatable; default: the run's."),
    ] = None,
    splits: Annotated[list[str] | None, typer.Option("--split", help="What is scored; default: test.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; default: RUN/eval.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The run's configuration, for weights outside a run folder.")
    ] = None,
    mapping: Map = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the views and intervals.")] = 0,
    accelerator: Accelerator = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Score clusters of voxels: matched to labels of other people, over two views, and on a blank image."""
    from medssl.runs.evaluate_clusters import evaluate_clusters as score

    result = score(
        run,
        manifest=manifest,
        out=out,
        fit_splits=tuple(fit_splits or ()),
        splits=tuple(splits or ("test",)),
        config=config,
        mapping=_mapping(mapping),
        seed=seed,
        accelerator=accelerator or "auto",
        force=force,
    )
    _show(result, as_json)


Source = Annotated[Path, typer.Argument(help="A table of embeddings or features, or a run folder (with --manifest).")]
ManifestOfRun = Annotated[Path | None, typer.Option("--manifest", help="Of a run: who is embedded.")]
Layers = Annotated[
    list[str] | None, typer.Option("--layer", help="Of a run: z, h, block0, ...; repeatable; default: z and h.")
]
Normalise = Annotated[
    bool | None, typer.Option("--normalise/--no-normalise", help="Scale rows to length 1; default: projections (z).")
]
Folds = Annotated[int | None, typer.Option(min=2, help="Folds by person of all rows; default: the table's splits.")]
Columns = Annotated[str | None, typer.Option(help="Features of a table, e.g. 'lh_*;rh_*'; default: all numbers.")]


@evaluate.command("age-site")
def evaluate_age_site(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results and the report.")],
    manifest: ManifestOfRun = None,
    layers: Layers = None,
    normalise: Normalise = None,
    folds: Folds = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of the folds.")] = 1,
    leave_site_out: Annotated[
        bool, typer.Option("--leave-site-out", help="Also predict the age of each site from all others.")
    ] = False,
    combat: Annotated[bool, typer.Option("--combat", help="Also evaluate after ComBat.")] = False,
    combat_covariates: Annotated[
        list[str] | None, typer.Option(help="Column that ComBat keeps, e.g. sex; repeatable.")
    ] = None,
    solver: Annotated[str, typer.Option(help="Site probe: saga (the challenge's) or lbfgs (faster).")] = "saga",
    columns: Columns = None,
    mapping: Map = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an evaluation that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Brain age and what remains of the site: the OpenBHB probes, intervals over people, the age-only floor."""
    from medssl.runs.evaluate_embeddings import evaluate_age_site as run

    if solver not in ("saga", "lbfgs"):
        raise typer.BadParameter(f"--solver is saga or lbfgs, not `{solver}`")
    result = run(
        source,
        out,
        manifest=manifest,
        layers=tuple(layers or ()),
        normalise=normalise,
        folds=folds,
        seeds=seeds,
        leave_site_out=leave_site_out,
        combat=combat,
        combat_covariates=tuple(combat_covariates or ()),
        solver=solver,  # type: ignore[arg-type]  # checked above
        columns=_globs(columns),
        mapping=_mapping(mapping),
        force=force,
    )
    _show(result, as_json)


@evaluate.command("knn")
def evaluate_knn(
    source: Source,
    target: Annotated[str, typer.Option(help="Column to predict, e.g. diagnosis, sex, site, age.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval/probes.json.")] = None,
    task: Annotated[str | None, typer.Option(help="regression or classification; default: from the column.")] = None,
    manifest: ManifestOfRun = None,
    layers: Layers = None,
    normalise: Normalise = None,
    folds: Folds = None,
    second: Annotated[Path | None, typer.Option(help="Table of another view of the same rows: alignment.")] = None,
    columns: Columns = None,
    mapping: Map = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Predict a label from the nearest people: balanced accuracy and AUC, or MAE, with intervals over people."""
    given = {"out": out, "manifest": manifest, "layers": layers, "normalise": normalise, "folds": folds}
    _probes(source, target, ("knn",), task, columns, mapping, as_json, second=second, force=force, **given)


@evaluate.command("probe")
def evaluate_probe(
    source: Source,
    target: Annotated[str, typer.Option(help="Column to predict, e.g. diagnosis, sex, site, age.")],
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="linear, mlp or knn; repeatable; default: linear and mlp.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval/probes.json.")] = None,
    task: Annotated[str | None, typer.Option(help="regression or classification; default: from the column.")] = None,
    manifest: ManifestOfRun = None,
    layers: Layers = None,
    normalise: Normalise = None,
    folds: Folds = None,
    second: Annotated[Path | None, typer.Option(help="Table of another view of the same rows: alignment.")] = None,
    columns: Columns = None,
    mapping: Map = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Predict a label with a linear probe or a small network on frozen features, at any layer."""
    given = {"out": out, "manifest": manifest, "layers": layers, "normalise": normalise, "folds": folds}
    chosen = tuple(kinds or ("linear", "mlp"))
    _probes(source, target, chosen, task, columns, mapping, as_json, second=second, force=force, **given)


def _probes(
    source: Path,
    target: str,
    kinds: tuple[str, ...],
    task: str | None,
    columns: str | None,
    mapping: list[str] | None,
    as_json: bool,
    *,
    layers: list[str] | None,
    **options: Any,
) -> None:
    from medssl.runs.evaluate_embeddings import evaluate_probe as run

    if task not in (None, "regression", "classification"):
        raise typer.BadParameter(f"--task is regression or classification, not `{task}`")
    result = run(
        source,
        target=target,
        kinds=kinds,
        task=task,  # type: ignore[arg-type]  # checked above
        layers=tuple(layers or ()),
        columns=_globs(columns),
        mapping=_mapping(mapping),
        **options,
    )
    _show(result, as_json)


def _globs(columns: str | None) -> tuple[str, ...] | None:
    return None if columns is None else tuple(one.strip() for one in columns.split(";") if one.strip())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Json = False,
) -> None:
    """Build report.html and the figures of a run again from its files."""
    from medssl.runs.report import rebuild

    _show(rebuild(run), as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the pretraining methods with what they need and where they come from."""
    from medssl.runs.listing import list_methods

    _show(list_methods(), as_json)


@app.command()
def encoders(as_json: Json = False) -> None:
    """List the encoders."""
    from medssl.runs.listing import list_encoders

    _show(list_encoders(), as_json)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Folder in which runs and caches will be written.")] = Path(),
    as_json: Json = False,
) -> None:
    """Print versions, devices, disk and shared memory, try a write, and say what is wrong."""
    from medssl.runs.doctor import examine

    result = examine(folder)
    _show(result, as_json)
    if result.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the cohort and the runs.")] = Path("runs/demo"),
    smoke: Annotated[bool, typer.Option("--smoke", help="The same path in seconds; its numbers mean nothing.")] = False,
    half: Annotated[
        Literal["cardiac", "brain", "both"],
        typer.Option(help="cardiac: few-label segmentation; brain: brain age and site."),
    ] = "both",
    as_json: Json = False,
) -> None:
    """Run both jobs on small generated cohorts and end with a report. No download, no GPU needed."""
    from medssl.runs.demo import demo as run

    _show(run(out, smoke=smoke, half=half), as_json)


def main() -> None:
    """Entry point: errors become one message with cause, place and remedy, and an exit code."""
    debug = "--debug" in sys.argv
    # torch's C++ side warns of harmless things on every process (such as a search for unused parameters).
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()  # exits by itself: 0, or 2 for a command line that it cannot parse
    except MedsslError as error:
        if debug:
            raise
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        typer.echo(
            f"Unexpected {type(error).__name__}: {error}\n  fix:   this is a fault of medssl: run again with "
            "`medssl --debug ...` and report what it prints",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
