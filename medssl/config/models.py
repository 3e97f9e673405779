"""The sections of a run and the rules that hold between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from medssl.core.schema import StrictModel, tagged_union
from medssl.core.types import Needs
from medssl.data.features import FeaturesConfig
from medssl.data.items import ItemsConfig
from medssl.inference.config import InferenceConfig
from medssl.methods import METHODS, TASKS, DebiasConfig
from medssl.models import ENCODERS
from medssl.samplers import SAMPLERS
from medssl.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from medssl.transforms.preprocess import PrepareConfig
from medssl.transforms.views import ViewsConfig, resolve_views

EncoderConfig = tagged_union(ENCODERS)
MethodConfig = tagged_union(METHODS)
TaskConfig = tagged_union(TASKS)
SamplerConfig = tagged_union(SAMPLERS)


class DataConfig(StrictModel):
    """Which volumes, and how they are prepared."""

    manifest: Path
    """manifest.csv; a relative path is relative to the folder in which the command is run."""
    map: dict[str, str] = {}
    """Columns of other names: {group: person} reads the column `person` as `group`."""
    splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = ("train",)
    """Rows used for training: those whose `split` is one of these. Without any split in the manifest, or null: all."""
    published_splits: Path | None = None
    """CSV of published lists (data_manifests/splits/). Splits are then `test`, `unlabelled` (listed for pretraining)
    and `train` (listed otherwise) instead of the manifest's own; volumes in no list have none."""
    exclude: tuple[str, ...] = ()
    """Subjects or cases to leave out; the report says so."""
    cache: Path = Path(".medssl-cache")
    """Prepared volumes are kept here and shared between runs."""
    prepare: PrepareConfig = PrepareConfig()
    features: FeaturesConfig = FeaturesConfig()
    """For `items.geometry: features`, instead of `prepare`."""
    jobs: PositiveInt = 1
    """Processes that prepare volumes in parallel."""
    transductive: bool = False
    """Allow test people in pretraining; written in every result."""
    item_labels: Path | None = None
    """Pretraining only: CSV with labels of single items, such as runs/NAME/weights/clusters.csv of a clustering method.
    Columns: `case`, for slices and slabs `position`, and labels, which a method can name like columns of the manifest
    (method: {name: supervised, target: cluster0, loss: cross_entropy})."""


class ModelConfig(StrictModel):
    """The network."""

    encoder: EncoderConfig  # type: ignore[valid-type]  # a union made from the table of encoders
    decoder_blocks: PositiveInt | None = None
    """Decoder blocks to build, counted from the coarsest; null: all of them (fine-tuning), none (encoder methods)."""


class RunConfig(StrictModel):
    """What every training run has."""

    name: str
    runs: Path = Path("runs")
    """Folder that holds the run folders."""
    seed: NonNegativeInt = 0
    status: str = ""
    """Of a recipe: how far it has been tried."""
    data: DataConfig
    items: ItemsConfig
    model: ModelConfig
    views: ViewsConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _only_pretraining_joins_labels(self) -> RunConfig:
        if self.data.item_labels is not None and getattr(self, "kind", "pretrain") != "pretrain":
            raise ValueError("data.item_labels: only a pretraining is trained on labels of single items; remove it")
        return self

    @property
    def spatial_dims(self) -> int:
        """2 for slices, 3 for slabs and volumes, 0 for rows of feature tables."""
        return {"slice": 2, "features": 0}.get(self.items.geometry, 3)

    @property
    def schedule_note(self) -> str | None:
        """Says it where the learning rate would only rise: the warm-up takes all steps, and the schedule is unused."""
        steps, schedule = self.training.steps, self.schedule
        if schedule.name == "constant" or steps is None or schedule.warmup_steps < steps:
            return None
        return (
            f"The learning rate rises in all {steps} steps and never falls: schedule.warmup_steps is "
            f"{schedule.warmup_steps}, so `{schedule.name}` does nothing."
        )

    @property
    def notes(self) -> list[str]:
        """What is allowed, but hardly meant; said before training starts."""
        return [] if self.schedule_note is None else [self.schedule_note]

    def _check_encoder(self) -> None:
        name = self.model.encoder.name
        if (name == "mlp") != (self.spatial_dims == 0):
            raise ValueError(
                "model.encoder `mlp` takes rows of features: set items.geometry: features, or choose another encoder"
                if name == "mlp"
                else f"items.geometry `features` gives rows of a table, but model.encoder `{name}` takes images: "
                "set model.encoder: {name: mlp, widths: [64, 32]}"
            )
        dims = 2 if name.endswith("2d") else 3
        if name != "mlp" and dims != self.spatial_dims:
            raise ValueError(
                f"items.geometry `{self.items.geometry}` gives {self.spatial_dims}D items, "
                f"but model.encoder `{name}` is {dims}D"
            )


class PretrainConfig(RunConfig):
    """One pretraining run."""

    kind: Literal["pretrain"] = "pretrain"
    method: MethodConfig  # type: ignore[valid-type]  # a union made from the table of methods
    sampler: SamplerConfig  # type: ignore[valid-type]  # a union made from the table of samplers
    debias: DebiasConfig | None = None
    """A regulariser beside the method that takes an attribute (the site) out of its embedding; null: none."""
    weights: Path | None = None
    """Run folder or weights folder to begin from (the local contrast begins from the global one's encoder)."""
    cluster_columns: tuple[str, ...] = ()
    """Of a method with clusters: columns of the manifest, or partition, volume or subject, with which the clusters are
    compared after every refresh and at the end (logs/clusters.csv, report). Nothing is learnt from them."""

    @property
    def needs(self) -> Needs:
        """What the method and its regulariser ask of the rest of the run."""
        needs: Needs = self.method.needs()
        if self.debias is None:
            return needs
        columns = [use.column for use in self.debias.label_uses()]
        return replace(needs, labels=tuple(dict.fromkeys([*needs.labels, *columns])))

    @property
    def notes(self) -> list[str]:
        """Also views that the method does not look at."""
        n_views = resolve_views(self.views, self.spatial_dims).n_views
        if self.needs.more_views or n_views <= self.needs.views:
            return super().notes
        unused = (
            f"Method `{self.method.name}` looks at {self.needs.views} of the {n_views} views that are made of each "
            f"item: set views.n_views: {self.needs.views} to save the time."
        )
        return [*super().notes, unused]

    @model_validator(mode="after")
    def _sections_fit(self) -> PretrainConfig:
        self._check_encoder()
        check_needs(self)
        return self


def check_needs(config: PretrainConfig) -> None:
    """Refuse a method whose needs the rest of the configuration does not meet.

    Raises:
        ValueError: Every unmet need, one after the other.
    """
    needs, method = config.needs, config.method.name
    problems = []
    if config.spatial_dims not in needs.spatial_dims:
        items = f"{config.spatial_dims}D items" if config.spatial_dims else "rows of a feature table"
        problems.append(f"method `{method}` is not defined for {items}")
    if needs.samplers and config.sampler.name not in needs.samplers:
        problems.append(
            f"method `{method}` needs the sampler {' or '.join(sorted(needs.samplers))}, not `{config.sampler.name}`"
        )
    if (needs.partitions or config.sampler.name.startswith("partition")) and not config.items.partitions:
        problems.append("items.partitions: required by the method or the sampler, but missing")
    entry = METHODS[method]
    if config.sampler.name == "cluster_balanced" and not entry.keeps_clusters:
        problems.append(f"sampler `cluster_balanced` balances clusters, which method `{method}` does not store")
    if config.cluster_columns and not entry.has_clusters:
        problems.append(f"cluster_columns: method `{method}` has no clusters to compare: remove them")
    views = resolve_views(config.views, config.spatial_dims)
    if views.n_views < needs.views:
        problems.append(f"method `{method}` needs views.n_views: {needs.views}, not {views.n_views}")
    if views.crops and not needs.multi_crop:
        problems.append(f"method `{method}` takes views of one size: remove views.crops")
    if needs.original != views.original:
        problems.append(
            f"method `{method}` needs views.original: {str(needs.original).lower()} "
            "(whether view 0 is the image without augmentation)"
        )
    if needs.moves == "none" and views.moves:
        problems.append(
            f"method `{method}` compares the same place in two views: it needs views that change intensities only "
            "(views.preset: intensity)"
        )
    if needs.unit_range and config.data.prepare.intensity == "zscore":
        problems.append(f"method `{method}` works on intensities in [0, 1]: set data.prepare.intensity: percentile")
    if needs.decoder and not ENCODERS[config.model.encoder.name].decoder:
        problems.append(no_decoder(f"method `{method}`", config.model.encoder.name))
    elif needs.decoder and config.model.decoder_blocks is None:
        problems.append(f"method `{method}` trains a decoder: set model.decoder_blocks")
    if not needs.decoder and config.model.decoder_blocks is not None:
        problems.append(f"method `{method}` trains no decoder: remove model.decoder_blocks")
    if config.debias is not None and config.debias.on not in needs.features:
        has = f"it has {' and '.join(needs.features)}" if needs.features else "it embeds no whole items"
        problems.append(f"debias.on: method `{method}` has no {config.debias.on} ({has})")
    if problems:
        raise ValueError("; ".join(problems))


def no_decoder(by: str, encoder: str) -> str:
    """What is wrong with an encoder that cannot carry the decoder which is asked for."""
    known = " or ".join(name for name, entry in ENCODERS.items() if entry.decoder)
    return f"{by} trains a decoder, which model.encoder `{encoder}` has no maps for: use {known}"


class ArmConfig(StrictModel):
    """One way to begin fine-tuning; all arms share every other setting."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
    weights: Path | None = None
    """Run folder or weights folder of a pretraining; null: from scratch."""
    steps: PositiveInt | None = None
    """Steps of this arm; null: training.steps. For a scratch arm that also receives the pretraining's steps."""


class GridConfig(StrictModel):
    """Label fractions x draws x seeds x arms."""

    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)] = (ArmConfig(name="scratch"),)
    n_labelled: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 8)
    draws: PositiveInt | dict[PositiveInt, PositiveInt] = 5
    """How often each number of labelled volumes is drawn; {1: 5, 8: 3} where they differ, as in published lists."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    n_validation: NonNegativeInt = 2
    """Labelled volumes on which the best step is chosen; they count as labels in what is written."""
    published_draws: Path | None = None
    """CSV of published draws (role, n_labelled, draw, subjects) instead of random ones."""
    upper_bound: bool = True
    """Also train from scratch on every training label."""
    jobs: PositiveInt = 1
    """Cells that run at the same time, each in a process of its own."""

    def n_draws(self, n_labelled: int) -> int:
        """Draws of one number of labelled volumes."""
        return self.draws if isinstance(self.draws, int) else self.draws[n_labelled]

    @model_validator(mode="after")
    def _draws_of_each(self) -> GridConfig:
        if not isinstance(self.draws, int) and set(self.draws) != set(self.n_labelled):
            raise ValueError(f"draws: give one number, or one for each of n_labelled {sorted(set(self.n_labelled))}")
        return self

    @field_validator("arms")
    @classmethod
    def _unique(cls, arms: tuple[ArmConfig, ...]) -> tuple[ArmConfig, ...]:
        names = [arm.name for arm in arms]
        if len(set(names)) < len(names) or "upper_bound" in names:
            raise ValueError("arms need names of their own; `upper_bound` is taken")
        return arms


class FinetuneConfig(RunConfig):
    """One fine-tuning grid."""

    kind: Literal["finetune"] = "finetune"
    task: TaskConfig  # type: ignore[valid-type]  # a union made from the table of tasks
    batch_size: PositiveInt = 4
    grid: GridConfig = GridConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluate_on: str | Annotated[tuple[str, ...], Field(min_length=1)] = "test"
    """The split that is predicted and scored; `validation` while settings are searched. Regression and classification
    take several, such as [internal_test, external_test], and score each by itself; the first one leads."""
    save_predictions: Literal["all", "none"] = "all"

    @model_validator(mode="after")
    def _sections_fit(self) -> FinetuneConfig:
        self._check_encoder()
        for split in self.evaluated:
            if split in (self.data.splits or ()):
                raise ValueError(f"evaluate_on: `{split}` is one of data.splits, which are trained on")
        if len(set(self.evaluated)) < len(self.evaluated):
            raise ValueError("evaluate_on: a split is named twice")
        self._check_task()
        if self.spatial_dims not in self.task.needs().spatial_dims:
            raise ValueError(f"items.geometry: task `{self.task.name}` is not defined for {self.items.geometry}")
        if self.task.needs().decoder and not ENCODERS[self.model.encoder.name].decoder:
            raise ValueError(no_decoder(f"task `{self.task.name}`", self.model.encoder.name))
        if resolve_views(self.views, self.spatial_dims).n_views != 1 or self.views.crops:
            raise ValueError("fine-tuning takes one view of each item: set views.n_views: 1, without views.crops")
        if self.training.devices * self.training.nodes != 1:
            raise ValueError(
                "training.devices, training.nodes: each cell is trained by one process; "
                "set both to 1, and grid.jobs to compute several cells at a time"
            )
        window = self.inference.window
        if window is not None and len(window) != self.spatial_dims:
            raise ValueError(f"inference.window: give {self.spatial_dims} lengths for {self.spatial_dims}D items")
        return self

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that are scored."""
        return (self.evaluate_on,) if isinstance(self.evaluate_on, str) else self.evaluate_on

    def _check_task(self) -> None:
        """What only some tasks take."""
        if "label_map" in self.task.needs().labels:
            if len(self.evaluated) > 1:
                raise ValueError(f"evaluate_on: task `{self.task.name}` scores one split")
            return
        if self.model.decoder_blocks is not None:
            raise ValueError(f"task `{self.task.name}` trains no decoder: remove model.decoder_blocks")
        if self.inference.window is not None:
            raise ValueError(f"inference.window: task `{self.task.name}` sees items whole: remove it")
        if self.save_predictions == "none":
            raise ValueError(f"save_predictions: task `{self.task.name}` writes no label maps; remove it")
        if self.grid.published_draws is not None:
            raise ValueError(f"grid.published_draws: lists of label maps; task `{self.task.name}` draws its own")
        if self.task.train != "whole" and all(arm.weights is None for arm in self.grid.arms):
            raise ValueError(
                "task.train: there is nothing to freeze, as no arm begins from weights: name them in "
                "grid.arms, or set task.train: whole"
            )
