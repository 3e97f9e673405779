"""The age-site protocol of a comparison: probe what frozen embeddings know of people's age and site."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from medssl.core.schema import StrictModel

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
