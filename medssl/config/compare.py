"""One comparison: several ways to learn an embedding, evaluated alike on the same people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from medssl.config.age_site import INPUT, AgeSiteProtocol, ArmCombat
from medssl.config.few_label import FewLabelProtocol, Stage, stage_shares, stage_views, staged_training
from medssl.config.models import (
    ArmConfig,
    FinetuneConfig,
    GridConfig,
    MethodConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    SamplerConfig,
)
from medssl.core.errors import nearest
from medssl.core.schema import StrictModel
from medssl.data.splits import TEST_SPLITS
from medssl.methods import METHODS
from medssl.methods.debias import DebiasConfig
from medssl.models import ENCODERS
from medssl.training import TrainingConfig

UPPER_BOUND = "upper_bound"
"""What a training on every label is called, beside the arms."""


class CompareArm(StrictModel):
    """One arm; all arms share every setting that they do not name themselves."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
    method: MethodConfig | None = None
    """What is trained in every cell. null, age_site: nothing, the features themselves are probed (layer `input`);
    few_label: no pretraining, fine-tuning begins from scratch."""
    stages: tuple[Stage, ...] = ()
    """few_label only: several pretrainings, each of which begins from the one before, or one that needs its own items,
    views, optimizer or schedule; instead of `method`. They share the budget that any other arm has."""
    debias: DebiasConfig | None = None
    """Regulariser that is added to the method."""
    combat: ArmCombat | None = None
    """age_site only: harmonise by ComBat; null: not."""
    weights: Path | None = None
    """Run folder or weights folder that every cell begins from; null: random weights."""
    sampler: SamplerConfig | None = None
    """Another sampler than the plan's, such as one that balances sites; null: the plan's."""
    steps: PositiveInt | None = None
    """age_site only: steps of this arm; null: training.steps."""

    @model_validator(mode="after")
    def _whole(self) -> CompareArm:
        if self.stages:
            twice = [name for name in ("method", "debias", "sampler") if getattr(self, name) is not None]
            if twice:
                raise ValueError(f"{', '.join(twice)}: name it in each of `stages`, not beside them")
            return self
        trains = ("debias", "weights", "sampler", "steps")
        unused = [name for name in trains if getattr(self, name) is not None]
        if self.method is None and unused:
            raise ValueError(f"{', '.join(unused)}: only for an arm with a method; this one trains nothing")
        if self.method is None and self.combat is not None and self.combat.on != INPUT:
            raise ValueError("combat.on: an arm without a method has only its input: set combat.on: input")
        return self

    @property
    def pretrainings(self) -> tuple[Stage, ...]:
        """Its pretrainings, one after the other; none for an arm that begins from scratch."""
        if self.stages or self.method is None:
            return self.stages
        return (Stage(method=self.method, sampler=self.sampler, debias=self.debias),)


Protocol: Any = Annotated[AgeSiteProtocol | FewLabelProtocol, Field(discriminator="name")]


class CompareConfig(RunConfig):
    """One comparison of arms."""

    kind: Literal["compare"] = "compare"
    arms: Annotated[tuple[CompareArm, ...], Field(min_length=1)]
    """What is compared, in the order of the tables."""
    protocol: Protocol = AgeSiteProtocol()
    """How every arm is evaluated; without a name: `age_site`."""
    sampler: SamplerConfig
    """Which items form a step, for arms that name no sampler of their own."""
    jobs: PositiveInt = 1
    """Cells that are computed at the same time, each in a process of its own."""

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with."""
        first = self.arms[0]
        if self.few_label:
            first = next((arm for arm in self.arms if not arm.pretrainings), first)
        return str(self.protocol.baseline or first.name)

    @property
    def few_label(self) -> bool:
        """Whether arms are judged by fine-tuning with few labels."""
        return isinstance(self.protocol, FewLabelProtocol)

    @property
    def encoders(self) -> dict[str, Any]:
        """Settings of every encoder by name; `model.encoder` is the first and is called what it is."""
        first = {self.model.encoder.name: self.model.encoder}
        return first | self.protocol.more_encoders if self.few_label else first

    def arm(self, name: str) -> CompareArm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def pretraining(self, arm: CompareArm, seed: int) -> PretrainConfig:
        """The configuration of one cell's training, as if it were a pretraining run of its own.

        Raises:
            ValueError: The arm does not fit the rest of the plan (pydantic's ValidationError).
        """
        shared = {name: getattr(self, name) for name in RunConfig.model_fields}
        own = {"seed": seed, "method": arm.method, "debias": arm.debias, "weights": arm.weights}
        if arm.steps is not None:
            shared["training"] = self.training.model_copy(update={"steps": arm.steps, "seconds": None})
        return PretrainConfig(**{**shared, **own}, sampler=arm.sampler or self.sampler)

    def pretrainings(self, arm: CompareArm, encoder: str, seed: int) -> tuple[PretrainConfig, ...]:
        """The configurations of an arm's pretrainings on one encoder (few_label); none for scratch.

        The first one begins from the arm's weights; where the others begin is known when the one before is done.

        Raises:
            ValueError: The arm does not fit the rest of the plan (pydantic's ValidationError is one).
        """
        stages = arm.pretrainings
        if not stages:
            return ()
        budgets = staged_training(self.training, stage_shares(stages))
        return tuple(
            self._stage(stage, encoder, seed, budget, arm.weights if i == 0 else None)
            for i, (stage, budget) in enumerate(zip(stages, budgets, strict=True))
        )

    def _stage(
        self, stage: Stage, encoder: str, seed: int, training: TrainingConfig, weights: Path | None
    ) -> PretrainConfig:
        network = self.encoders[encoder]
        blocks = stage.decoder_blocks
        if blocks is None and stage.method.needs().decoder and ENCODERS[network.name].decoder:
            blocks = len(network.widths) - 1
        shared = {name: getattr(self, name) for name in RunConfig.model_fields}
        names = ("items", "optimizer", "schedule")
        own = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        own |= {"seed": seed, "training": training, "views": stage_views(stage.views, self.views), "weights": weights}
        own |= {"method": stage.method, "debias": stage.debias, "sampler": stage.sampler or self.sampler}
        own["model"] = ModelConfig(encoder=network, decoder_blocks=blocks)
        return PretrainConfig(**{**shared, **own})

    def finetuning(self, encoder: str, seeds: tuple[int, ...], weights: Mapping[str, Path | None]) -> FinetuneConfig:
        """The fine-tunings of some arms on one encoder, as if they were a grid of their own (few_label).

        Args:
            encoder: Its name.
            seeds: Of the fine-tunings.
            weights: By arm: what it begins from; None: from scratch.

        Raises:
            ValueError: The section does not fit the rest of the plan (pydantic's ValidationError).
        """
        protocol = self.protocol
        section = protocol.finetune
        names = ("views", "optimizer", "schedule", "training", "batch_size", "inference")
        task = section.task
        if "train" in type(task).model_fields and not any(weights.values()):
            task = task.model_copy(update={"train": "whole"})  # random weights are never frozen
        data = self.data if section.prepare is None else self.data.model_copy(update={"prepare": section.prepare})
        shown = ("n_labelled", "draws", "n_validation", "published_draws", "upper_bound")
        return FinetuneConfig(
            name=self.name,
            runs=self.runs,
            seed=self.seed,
            status=self.status,
            data=data,
            items=section.items or self.items,
            model=ModelConfig(encoder=self.encoders[encoder]),
            grid=GridConfig(
                arms=tuple(ArmConfig(name=name, weights=path) for name, path in weights.items()),
                seeds=seeds,
                jobs=self.jobs,
                **{name: getattr(protocol, name) for name in shown},
            ),
            task=task,
            evaluate_on=protocol.evaluate_on,
            save_predictions="none" if "label_map" in section.task.needs().labels else "all",
            **{name: getattr(section, name) for name in names},
        )

    def layers(self, arm: CompareArm) -> tuple[str, ...]:
        """The layers on which an arm is evaluated: those asked for that it has."""
        if arm.method is None:
            return (INPUT,)
        if arm.combat is not None and arm.combat.on != INPUT:
            return (arm.combat.on,)
        return tuple(layer for layer in self.protocol.layers if layer != "z" or has_projection(arm.method))

    @field_validator("protocol", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Plans of before there was a second protocol name none."""
        return {"name": "age_site", **value} if isinstance(value, Mapping) else value

    @field_validator("arms", mode="before")
    @classmethod
    def _known_methods(cls, value: Any) -> Any:
        """An unknown method is named with its arm: a number alone is hard to find in a long plan."""
        for i, arm in enumerate(value if isinstance(value, (list, tuple)) else ()):
            if not isinstance(arm, Mapping):
                continue
            stages = arm.get("stages")
            for part in (arm, *(stages if isinstance(stages, (list, tuple)) else ())):
                method = part.get("method") if isinstance(part, Mapping) else None
                name = method.get("name") if isinstance(method, Mapping) else None
                if isinstance(name, str) and name not in METHODS:
                    raise ValueError(
                        f"arm {i} (`{arm.get('name')}`): method: unknown name `{name}`. {nearest(name, METHODS)}"
                    )
        return value

    @model_validator(mode="after")
    def _sections_fit(self) -> CompareConfig:
        self._check_encoder()
        if self.training.devices * self.training.nodes != 1:
            raise ValueError(
                "training.devices, training.nodes: each cell is trained by one process; "
                "set both to 1, and jobs to compute several cells at a time"
            )
        if (
            not self.few_label
            and self.protocol.folds is None
            and set(TEST_SPLITS) & set(self.data.splits or TEST_SPLITS)
        ):
            raise ValueError(
                "data.splits: with protocol.folds: null these rows are trained on, so name them, and none of "
                f"{', '.join(TEST_SPLITS)}"
            )
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"arms: every arm needs a name of its own; {', '.join(twice)} occurs more than once")
        if self.baseline not in names:
            raise ValueError(f"protocol.baseline: there is no arm `{self.baseline}`; arms: {', '.join(names)}")
        wrong = self._wrong_few_label if self.few_label else self._wrong
        problems = [f"arms.{i} ({arm.name}): {line}" for i, arm in enumerate(self.arms) for line in wrong(arm)]
        problems += self._wrong_finetuning() if self.few_label else []
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong(self, arm: CompareArm) -> list[str]:
        """Why an arm cannot be part of this plan (age_site)."""
        if arm.stages:
            return ["stages: only for the protocol few_label"]
        features = self.spatial_dims == 0
        if arm.combat is not None and arm.combat.on == INPUT and not features:
            return ["combat.on: input harmonises rows of a feature table, not voxels; use h or z"]
        if arm.method is None:
            return [] if features else ["without a method its input is probed, which needs items.geometry: features"]
        try:
            needs = self.pretraining(arm, self.protocol.seeds[0]).needs
        except ValidationError as error:
            return messages(error)
        if "encoder" not in needs.trains:
            return [f"method `{arm.method.name}` trains no encoder, so there is no embedding to evaluate"]
        if arm.combat is not None and arm.combat.on == "z" and not has_projection(arm.method):
            return [f"combat.on: z, but method `{arm.method.name}` has no projection"]
        if not self.layers(arm):
            return [f"protocol.layers asks for z alone, but method `{arm.method.name}` has no projection: add h"]
        return []

    def _wrong_few_label(self, arm: CompareArm) -> list[str]:
        """Why an arm cannot be part of this plan (few_label)."""
        if arm.name == UPPER_BOUND:
            return ["this name is taken by the training on every label"]
        problems = []
        if arm.combat is not None:
            problems.append("combat: only for the protocol age_site")
        if arm.steps is not None:
            problems.append("steps: in the protocol few_label every arm has the same budget (training)")
        if not arm.pretrainings and arm.weights is not None:
            problems.append("weights: only for an arm with a method")
        for encoder in self.encoders:
            try:
                self.pretrainings(arm, encoder, self.protocol.seeds[0])
            except ValueError as error:
                problems += [
                    f"{line} (encoder `{encoder}`)" if len(self.encoders) > 1 else line for line in messages(error)
                ]
        return problems

    def _wrong_finetuning(self) -> list[str]:
        """What does not fit in the sections that all arms share (few_label)."""
        problems = []
        if self.model.decoder_blocks is not None:
            problems.append("model.decoder_blocks: name it in the stage of the arm that needs it")
        if self.model.encoder.name in self.protocol.more_encoders:
            problems.append(f"protocol.more_encoders: `{self.model.encoder.name}` is the name of model.encoder")
        for encoder in self.encoders:
            try:
                self.finetuning(encoder, self.protocol.seeds, {self.baseline: None})
            except ValueError as error:
                problems += [f"protocol.finetune: {line} (encoder `{encoder}`)" for line in messages(error)]
        return problems


def messages(error: ValueError) -> list[str]:
    """What pydantic found, one line each, without its preambles."""
    if not isinstance(error, ValidationError):
        return [str(error)]
    return [str(item["msg"]).removeprefix("Value error, ") for item in error.errors(include_url=False)]


def has_projection(method: Any) -> bool:
    """Whether a method, as it is configured, has a projection z."""
    return "z" in method.needs().features
