"""What never changes about a known cohort: `data_manifests/<cohort>.yaml`, validated.

The files give classes, target grid, partitions, published lists of ids, licence and citation, so that recipes and
pages can quote one place.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from medssl.core.errors import ConfigError, DataError
from medssl.core.schema import StrictModel, validate
from medssl.transforms.preprocess import PrepareConfig

_COLUMNS: Final = ("role", "n_labelled", "draw", "subjects")


class PublishedSplits(StrictModel):
    """Published lists of ids.

    Attributes:
        file: CSV (role, n_labelled, draw, subjects), relative to the YAML file.
        clean: The same without the validation ids in the unlabelled list, or None where the published one is clean.
        source: Where the lists are from.
        note: What to know before quoting results on them.
    """

    file: str
    clean: str | None = None
    source: str = Field(min_length=1)
    note: str = ""


class CohortFacts(StrictModel):
    """One known cohort.

    Attributes:
        name: For titles.
        cohort: The layout (a name in `COHORTS`) and, in `options`, how it is listed.
        label_names: Structure by value in the label files, background (0) included; the sorted values are the classes.
            Empty: the cohort has no label maps.
        array_shapes: Shape of one person's array by the value of the option `modality`, where files are arrays.
        label_aliases: Stray values in the files and the value that they stand for.
        prepare: Spacing, size and intensities; `prepare_source` says where the numbers are from.
        slice_axis: Axis along which partitions are counted.
        partitions: S, and in `partitions_tried` the other values that the publication used; None without partitions.
        status: How far recipes on this cohort were tried.
        notes: What a user should know.
    """

    name: str
    cohort: Literal["acdc", "msd", "mmwhs", "openbhb"]
    options: dict[str, str] = {}
    label_names: dict[int, str] = {}
    label_aliases: dict[int, int] = {}
    array_shapes: dict[str, tuple[int, ...]] = {}
    modality: str
    prepare: PrepareConfig
    prepare_source: str = Field(min_length=1)
    slice_axis: Literal[0, 1, 2] = 2
    partitions: int | None = Field(default=None, ge=2)
    partitions_tried: tuple[int, ...] = ()
    splits: PublishedSplits | None = None
    licence: str = Field(min_length=1)
    citation: str = Field(min_length=1)
    source: str = Field(min_length=1)
    status: Literal["layout-tested on generated data", "run on real data"]
    notes: tuple[str, ...] = ()

    @field_validator("label_names")
    @classmethod
    def _has_background(cls, value: dict[int, str]) -> dict[int, str]:
        if value and value.get(0) != "background":
            raise ValueError("0 must be background")
        return dict(sorted(value.items()))

    @model_validator(mode="after")
    def _aliases_lead_to_labels(self) -> CohortFacts:
        for stray, value in self.label_aliases.items():
            if stray in self.label_names or value not in self.label_names:
                raise ValueError(f"label_aliases: {stray} must be unknown and {value} a label")
        return self

    @model_validator(mode="after")
    def _prepare_maps_the_labels(self) -> CohortFacts:
        consecutive = tuple(self.label_names) == tuple(range(len(self.label_names))) and not self.label_aliases
        if self.prepare.label_values != self.label_values and (self.prepare.label_values or not consecutive):
            raise ValueError(f"prepare.label_values must be {self.label_values}")
        return self

    @property
    def label_values(self) -> dict[int, int]:
        """Class number by value in the label files: the position among the sorted values; stray values included."""
        classes = {value: index for index, value in enumerate(self.label_names)}
        return classes | {stray: classes[value] for stray, value in self.label_aliases.items()}


class PublishedList(StrictModel):
    """One row of a published list."""

    role: Literal["labelled", "validation", "test", "unlabelled", "upper_bound"]
    n_labelled: int | None
    draw: int | None
    subjects: tuple[str, ...] = Field(min_length=1)

    @field_validator("subjects")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a subject is listed twice")
        return value


def read_facts(path: str | Path) -> CohortFacts:
    """Read and validate one file of `data_manifests/`, and the lists that it names.

    Raises:
        DataError: If a file is missing or no YAML.
        ConfigError: If a value is wrong, with every mistake of the file.
    """
    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise DataError("cannot read the facts of the cohort", where=str(file), found=found) from error
    facts = validate(CohortFacts, values, source=file.name)
    if facts.splits is not None:
        for name in filter(None, (facts.splits.file, facts.splits.clean)):
            read_published_lists(file.parent / name)
    return facts


def read_published_lists(path: str | Path) -> list[PublishedList]:
    """Read a CSV of published ids and check that no list of a draw contradicts another.

    Raises:
        DataError: If the file cannot be read, or a validation or test id is among the labelled ones of the same draw.
        ConfigError: If a row is wrong.
    """
    file = Path(path)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            records = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the published lists", where=str(file), found=str(error)) from error
    if not records or tuple(records[0]) != _COLUMNS:
        raise DataError("the published lists need other columns", where=str(file), fix=f"use {', '.join(_COLUMNS)}")
    lists = [_published_list(record, f"{file.name}, line {line}") for line, record in enumerate(records, start=2)]
    by_key = {(one.role, one.n_labelled, one.draw): set(one.subjects) for one in lists}
    if len(by_key) != len(lists):
        raise DataError("two rows have the same role, n_labelled and draw", where=str(file))
    tested = set().union(*(ids for (role, _, _), ids in by_key.items() if role == "test"))
    for (role, n_labelled, draw), ids in by_key.items():
        if role == "test":
            continue
        shared = ids & tested
        if role == "labelled":
            if ("validation", n_labelled, draw) not in by_key:
                raise DataError(f"draw {draw} of {n_labelled} labelled has no validation list", where=str(file))
            shared |= ids & by_key["validation", n_labelled, draw]
            if len(ids) != n_labelled:
                raise DataError(f"draw {draw} of {n_labelled} labelled holds {len(ids)} ids", where=str(file))
        if shared:
            raise DataError(f"ids are on two sides of draw {draw}", where=str(file), found=", ".join(sorted(shared)))
    return lists


def _published_list(record: Mapping[str, str | None], where: str) -> PublishedList:
    try:
        numbers = {name: int(record[name] or "") if record[name] else None for name in ("n_labelled", "draw")}
    except (TypeError, ValueError) as error:
        raise ConfigError("n_labelled and draw are whole numbers", where=where, found=str(error)) from error
    subjects = tuple((record["subjects"] or "").split())
    return validate(PublishedList, {"role": record["role"], **numbers, "subjects": subjects}, source=where)
