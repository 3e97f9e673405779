"""Settings of the optimiser, its schedule and the training loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from medssl.core.schema import StrictModel

Fraction = Annotated[float, Field(ge=0, le=1)]


class OptimizerConfig(StrictModel):
    """How weights are updated."""

    name: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    """Peak of the schedule. 1e-3 with Adam: Chaitanya et al. 2020, section 4."""
    weight_decay: NonNegativeFloat = 0.0
    """adam, sgd, lars: L2 term of the gradient; adamw: decoupled. Never applied to biases and norm weights by lars."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd and lars only."""
    trust_coefficient: PositiveFloat = 1e-3
    """lars only: eta of You et al. 2017 (arXiv:1708.03888)."""
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of all gradients together; null: not clipped."""


class ScheduleConfig(StrictModel):
    """How the learning rate moves, as a pure function of the step."""

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Linear rise from learning_rate / warmup_steps."""
    final_fraction: Fraction = 0.0
    """cosine only: share of the learning rate that is left at the end."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    """step only: factor of the learning rate after every `every_steps` steps."""
    every_steps: PositiveInt | None = None
    """step only, and required there: steps between two falls of the learning rate, counted after the warm-up."""

    @model_validator(mode="after")
    def _steps_of_step(self) -> ScheduleConfig:
        if (self.name == "step") != (self.every_steps is not None):
            raise ValueError("every_steps belongs to the schedule `step`, which needs it")
        for name, owner in (("gamma", "step"), ("final_fraction", "cosine")):
            if self.name != owner and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to the schedule `{owner}` and does nothing in `{self.name}`")
        return self


class TrainingConfig(StrictModel):
    """Budget, device, checkpoints, logs and monitors."""

    steps: PositiveInt | None = None
    """Budget in optimiser steps; this or `seconds`."""
    seconds: PositiveFloat | None = None
    """Budget in seconds of training. The number of steps then depends on the machine; it is recorded."""
    workers: NonNegativeInt = 1
    """Threads that prepare batches ahead; 0: none. Batches are the same for any number."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    """Processes on each node, each with one device."""
    nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, 32 elsewhere."""
    validate_every: PositiveInt | None = None
    """Steps between validations, where the run has any; null: 20 times over the budget."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; null: by minutes alone."""
    checkpoint_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints; null: by steps alone."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics.csv."""
    tensorboard: bool = False
    monitor_every: PositiveInt = 50
    """Steps between looks for signs of collapse, which the settings below define."""
    collapse_spread: NonNegativeFloat = 0.05
    """Constant embedding: spread of unit embeddings (1 when evenly spread, 0 when all are equal) below; 0: never."""
    collapse_rank: NonNegativeFloat = 1.5
    """Dimensional collapse: effective rank of the embedding (1: all on one line) below; 0: never. At most half of the
    rank that the batch allows counts."""
    collapse_chance: Fraction = 0.01
    """Loss at chance: within this share of the loss of a uniform guess, where a method logs that; 0: never."""
    collapse_prototypes: Fraction = 0.25
    """Dead prototypes: below this share of the prototypes that the batch would prefer if all were alike, or a single
    one; 0: never."""
    collapse_checks: PositiveInt = 3
    """Looks in a row that show a sign before it is an alarm."""

    @field_validator("precision", mode="before")
    @classmethod
    def _number_as_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # YAML reads 32 as a number

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingConfig:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("set the budget either as steps or as seconds")
        return self
