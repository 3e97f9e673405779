"""One comparison: several ways to learn an embedding, evaluated alike on the same people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from medssl.config.models import MethodConfig, PretrainConfig, RunConfig, SamplerConfig
from medssl.core.schema import StrictModel
from medssl.data.splits import TEST_SPLITS
from medssl.methods.debias import DebiasConfig

INPUT = "input"
"""The layer of an arm that trains nothing: the features themselves."""
PROBED = ("age", "site")
"""What the probes predict."""


class ArmCombat(StrictModel):
    """Harmonisation of one arm by ComBat, fitted on each cell's training people."""

    on: Literal["input", "h", "z"]
    """input: the features, before anything is learnt; h, z: the embedding (z normalised first, if
    `protocol.normalise_z`), before it is probed: the arm is then evaluated on that layer alone."""
    covariates: tuple[str, ...] = ()
    """Columns of the manifest whose effect is kept, such as sex."""

    @field_validator("covariates")
    @classmethod
    def _not_probed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        shared = sorted(set(value) & set(PROBED))
        if shared:
            raise ValueError(f"{' and '.join(shared)} of evaluated people is what the probes predict: leave it out")
        return value


class CompareArm(StrictModel):
    """One arm; all arms share every setting that they do not name themselves."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
    method: MethodConfig | None = None
    """What is trained in every cell; null: nothing, the features themselves are probed (layer `input`)."""
    debias: DebiasConfig | None = None
    """Regulariser that is added to the method."""
    combat: ArmCombat | None = None
    """Harmonise by ComBat; null: not."""
    weights: Path | None = None
    """Run folder or weights folder that every cell begins from; null: random weights."""
    sampler: SamplerConfig | None = None
    """Another sampler than the plan's, such as one that balances sites; null: the plan's."""
    steps: PositiveInt | None = None
    """Steps of this arm; null: training.steps."""

    @model_validator(mode="after")
    def _whole(self) -> CompareArm:
        trains = ("debias", "weights", "sampler", "steps")
        unused = [name for name in trains if getattr(self, name) is not None]
        if self.method is None and unused:
            raise ValueError(f"{', '.join(unused)}: only for an arm with a method; this one trains nothing")
        if self.method is None and self.combat is not None and self.combat.on != INPUT:
            raise ValueError("combat.on: an arm without a method has only its input: set combat.on: input")
        return self


class AgeSiteProtocol(StrictModel):
    """Predict age and site from frozen embeddings of people who were not trained on, as the OpenBHB challenge does."""

    name: Literal["age_site"] = "age_site"
    folds: Annotated[int, Field(ge=2)] | None = 5
    """Cross-validation over people, balanced over sites and determined by the plan's `seed`; every site then needs as
    many people as there are folds. null: the manifest's own splits: `internal_test` (or `test`) and `external_test`."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Each trains every arm once more on every fold; folds stay the same."""
    layers: Annotated[tuple[Annotated[str, Field(pattern=r"^(z|h|block[0-9]+)$")], ...], Field(min_length=1)] = (
        "z",
        "h",
    )
    """Probed layers: z, the projection; h, the encoder's output; block0, block1, ..., its feature maps, pooled."""
    normalise_z: bool = True
    """Scale each projection to length 1 before probing, as contrastive losses see it."""
    leave_site_out: bool = False
    """Also train without each site in turn (one seed) and evaluate on that site and on 20 % of the others' people."""
    evaluate_on: Literal["test", "validation"] = "test"
    """validation, while settings are chosen: test people are not touched and 20 % of the training people (or the
    manifest's `validation` rows) are evaluated instead."""
    solver: Literal["saga", "lbfgs"] = "saga"
    """Of the site probe. saga stops after 150 iterations, as in the challenge; lbfgs finds the optimum of the same
    probe many times faster, for choosing settings."""
    n_bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of people for each interval."""
    n_permutations: Annotated[int, Field(ge=100)] = 1000
    """Permutations of the sites for the range of chance."""
    baseline: str | None = None
    """The arm that all others are compared with; null: the first."""

    @model_validator(mode="after")
    def _consistent(self) -> AgeSiteProtocol:
        for name in ("seeds", "layers"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: names a value twice")
        if self.leave_site_out and self.evaluate_on == "validation":
            raise ValueError("leave_site_out: not while settings are chosen; it evaluates everyone once")
        return self


class CompareConfig(RunConfig):
    """One comparison of arms."""

    kind: Literal["compare"] = "compare"
    arms: Annotated[tuple[CompareArm, ...], Field(min_length=1)]
    """What is compared, in the order of the tables."""
    protocol: AgeSiteProtocol = AgeSiteProtocol()
    """How every arm is evaluated."""
    sampler: SamplerConfig
    """Which items form a step, for arms that name no sampler of their own."""
    jobs: PositiveInt = 1
    """Cells that are computed at the same time, each in a process of its own."""

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with."""
        return self.protocol.baseline or self.arms[0].name

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

    def layers(self, arm: CompareArm) -> tuple[str, ...]:
        """The layers on which an arm is evaluated: those asked for that it has."""
        if arm.method is None:
            return (INPUT,)
        if arm.combat is not None and arm.combat.on != INPUT:
            return (arm.combat.on,)
        return tuple(layer for layer in self.protocol.layers if layer != "z" or has_projection(arm.method))

    @model_validator(mode="after")
    def _sections_fit(self) -> CompareConfig:
        self._check_encoder()
        if self.training.devices * self.training.nodes != 1:
            raise ValueError(
                "training.devices, training.nodes: each cell is trained by one process; "
                "set both to 1, and jobs to compute several cells at a time"
            )
        if self.protocol.folds is None and set(TEST_SPLITS) & set(self.data.splits or TEST_SPLITS):
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
        problems = [f"arms.{i} ({arm.name}): {line}" for i, arm in enumerate(self.arms) for line in self._wrong(arm)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong(self, arm: CompareArm) -> list[str]:
        """Why an arm cannot be part of this plan."""
        features = self.spatial_dims == 0
        if arm.combat is not None and arm.combat.on == INPUT and not features:
            return ["combat.on: input harmonises rows of a feature table, not voxels; use h or z"]
        if arm.method is None:
            return [] if features else ["without a method its input is probed, which needs items.geometry: features"]
        try:
            needs = self.pretraining(arm, self.protocol.seeds[0]).needs
        except ValidationError as error:
            return [str(item["msg"]).removeprefix("Value error, ") for item in error.errors(include_url=False)]
        if "encoder" not in needs.trains:
            return [f"method `{arm.method.name}` trains no encoder, so there is no embedding to evaluate"]
        if arm.combat is not None and arm.combat.on == "z" and not has_projection(arm.method):
            return [f"combat.on: z, but method `{arm.method.name}` has no projection"]
        if not self.layers(arm):
            return [f"protocol.layers asks for z alone, but method `{arm.method.name}` has no projection: add h"]
        return []


def has_projection(method: Any) -> bool:
    """Whether a method, as it is configured, has a projection z."""
    return "z" in method.needs().features
