"""Strict pydantic models and readable, complete reports of what is wrong with a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medssl.core.errors import ConfigError, nearest


class StrictModel(BaseModel):
    """A configuration section: unknown keys, infinities and NaN are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class HasConfig(Protocol):
    """A table entry with the configuration class of what it builds."""

    @property
    def config(self) -> type[StrictModel]:
        """The class that validates this entry's section of the YAML."""


def tagged_union(entries: Mapping[str, HasConfig]) -> Any:
    """The union of the configuration classes of a table, told apart by their ``name``."""
    classes = tuple(dict.fromkeys(entry.config for entry in entries.values()))
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="name")]  # noqa: UP007 - built at run time


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Any, *, source: str) -> Model:
    """Validate ``values`` and report every mistake at once.

    Args:
        model: The pydantic class to build.
        values: What was read (a mapping for any valid configuration).
        source: File or option that the values come from, named in the message.

    Raises:
        ConfigError: With one line per mistake: place, what is wrong, the nearest known key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_describe(item, model) for item in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(f"{source}: {line}" for line in lines),
            fix="correct the file, or override one value with --set KEY=VALUE",
        ) from error


def _describe(item: Any, model: type[BaseModel]) -> str:
    location = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    place = ".".join(str(part) for part in location) or "(whole file)"
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown key. {nearest(str(location[-1]), _keys_beside(model, location[:-1]))}"
    if kind == "missing":
        return f"{place}: required, but missing"
    if kind == "union_tag_invalid":
        context = item.get("ctx", {})
        known = [name.strip(" '\"") for name in str(context.get("expected_tags", "")).split(",")]
        return f"{place}.name: unknown name `{context.get('tag')}`. {nearest(str(context.get('tag')), known)}"
    if kind == "union_tag_not_found":
        return f"{place}.name: required, but missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = repr(item.get("input"))
    if kind == "value_error" or len(shown) > 80:
        return f"{place}: {message}"
    return f"{place}: {message} (found {shown})"


def _keys_beside(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Field names of the model that ``location`` leads to (through unions by tag, lists and mappings)."""
    candidates: list[Any] = [model]
    for part in location:
        following: list[Any] = []
        for candidate in candidates:
            following += _step(candidate, part)
        candidates = following or candidates
    keys: list[str] = []
    for candidate in candidates:
        for cls in _models_in(candidate):
            keys += cls.model_fields
    return list(dict.fromkeys(keys))


def _step(annotation: Any, part: Any) -> list[Any]:
    found = []
    for cls in _models_in(annotation):
        if isinstance(part, str) and part in cls.model_fields:
            found.append(cls.model_fields[part].annotation)
        elif "name" in cls.model_fields and cls.model_fields["name"].default == part:
            found.append(cls)
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found
