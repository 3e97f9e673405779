"""The few-label protocol of a comparison: pretrain every arm with one budget, fine-tune all alike with few labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from medssl.config.models import EncoderConfig, MethodConfig, SamplerConfig, TaskConfig
from medssl.core.schema import StrictModel
from medssl.data.items import ItemsConfig
from medssl.inference.config import InferenceConfig
from medssl.methods import DebiasConfig
from medssl.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from medssl.transforms.preprocess import PrepareConfig
from medssl.transforms.views import ViewsConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]


class Stage(StrictModel):
    """One pretraining of an arm; the next stage begins from its weights. What it does not name is the plan's."""

    method: MethodConfig  # type: ignore[valid-type]  # a union made from the table of methods
    """What is learnt."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the arm's steps or seconds; give it to all stages of an arm (together 1) or to none (equal parts)."""
    sampler: SamplerConfig | None = None  # type: ignore[valid-type]  # a union made from the table of samplers
    """Which items form a step; null: the plan's."""
    debias: DebiasConfig | None = None
    """Regulariser that is added to the method."""
    items: ItemsConfig | None = None
    """What an item is, such as slabs with partitions; null: the plan's."""
    views: ViewsConfig | None = None
    """Augmented copies of each item; null: the plan's. With neither `preset` nor `augment` they are augmented (and
    given artefacts) as the plan's are, so that `{n_views: 1}` is enough."""
    decoder_blocks: PositiveInt | None = None
    """Decoder blocks that are trained; null: all of them by a method that trains a decoder, else none."""
    optimizer: OptimizerConfig | None = None
    """How weights are updated; null: as the plan says."""
    schedule: ScheduleConfig | None = None
    """How the learning rate moves; null: as the plan says."""


class FinetuneSection(StrictModel):
    """How every arm is fine-tuned: nothing in here differs between arms."""

    task: TaskConfig  # type: ignore[valid-type]  # a union made from the table of tasks
    """What is learnt from labels."""
    prepare: PrepareConfig | None = None
    """How volumes are prepared for fine-tuning; null: as for pretraining (data.prepare)."""
    items: ItemsConfig | None = None
    """What an item is; null: the plan's `items`."""
    views: ViewsConfig
    """One augmented copy of each item."""
    batch_size: PositiveInt = 4
    """Items in a batch, equally many of every labelled volume."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights are updated."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves."""
    training: TrainingConfig
    """Budget of each fine-tuning, in steps or in seconds, whichever the pretraining has."""
    inference: InferenceConfig = InferenceConfig()
    """How whole volumes are predicted."""


class FewLabelProtocol(StrictModel):
    """Pretrain each arm without labels, fine-tune it on few labelled volumes, score it on people never seen."""

    name: Literal["few_label"] = "few_label"
    finetune: FinetuneSection
    """How every arm is fine-tuned."""
    more_encoders: dict[Name, EncoderConfig] = {}  # type: ignore[valid-type]  # a union made from the table of encoders
    """Further encoders by a name of your choice, beside `model.encoder`: every arm is run on each."""
    n_labelled: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2,)
    """Numbers of labelled training volumes."""
    draws: PositiveInt = 3
    """How often each number of labelled volumes is drawn; all arms, encoders and seeds get the same draws."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Each pretrains and fine-tunes every arm once more."""
    n_validation: NonNegativeInt = 2
    """Further labelled volumes on which the best step is chosen; 0: none, the last step counts."""
    published_draws: Path | None = None
    """CSV of published draws (role, n_labelled, draw, subjects) instead of random ones."""
    evaluate_on: str = "test"
    """The split that is scored; `validation` while settings are chosen."""
    baseline: str | None = None
    """The arm that all others are compared with; null: the first one without a method."""
    upper_bound: bool = True
    """Also train from scratch on every training label, once for each encoder."""

    @model_validator(mode="after")
    def _consistent(self) -> FewLabelProtocol:
        for name in ("seeds", "n_labelled"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: names a value twice")
        return self


def stage_views(own: ViewsConfig | None, shared: ViewsConfig) -> ViewsConfig:
    """A stage's views: its own, augmented as the plan's are where they do not say how.

    Raises:
        ValueError: The plan lists another number of policies than the stage has augmented views.
    """
    if own is None:
        return shared
    if own.preset is not None or own.augment is not None or (own.n_augmented == 0 and not own.crops):
        return own
    inherited = {name: getattr(shared, name) for name in ("preset", "augment")}
    artefacts = own.artefacts or shared.artefacts
    return ViewsConfig(**{**{name: getattr(own, name) for name in type(own).model_fields}, **inherited,
                          "artefacts": artefacts})  # fmt: skip


def stage_shares(stages: tuple[Stage, ...]) -> tuple[float, ...]:
    """What part of an arm's budget each of its stages has.

    Raises:
        ValueError: Some stages name a share and others do not, or together they are not 1.
    """
    given = [stage.share for stage in stages if stage.share is not None]
    if not given:
        return (1 / len(stages),) * len(stages)
    if len(given) < len(stages):
        raise ValueError("stages: give every stage a share, or none")
    if abs(sum(given) - 1) > 1e-6:
        raise ValueError(f"stages: the shares are {sum(given):g} together, not 1")
    return tuple(given)


def staged_training(training: TrainingConfig, shares: tuple[float, ...]) -> tuple[TrainingConfig, ...]:
    """The budget of each stage; steps are rounded so that together they are the arm's.

    Raises:
        ValueError: A stage without a single step.
    """
    ends = [sum(shares[: i + 1]) for i in range(len(shares))]
    if training.steps is None:
        assert training.seconds is not None
        return tuple(training.model_copy(update={"seconds": training.seconds * share}) for share in shares)
    borders = [0, *(round(end * training.steps) for end in ends)]
    steps = [after - before for before, after in zip(borders, borders[1:], strict=False)]
    if min(steps) < 1:
        raise ValueError(f"stages: {training.steps} steps are too few for shares {', '.join(f'{s:g}' for s in shares)}")
    return tuple(training.model_copy(update={"steps": n}) for n in steps)
