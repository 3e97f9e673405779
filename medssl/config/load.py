"""From a YAML file and --set overrides to one validated run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel

from medssl.config.compare import CompareConfig
from medssl.config.models import FinetuneConfig, PretrainConfig
from medssl.core.errors import ConfigError, nearest
from medssl.core.files import parse_yaml, read_yaml
from medssl.core.schema import validate

Config = TypeVar("Config", bound=BaseModel)

CONFIGS: Final[Mapping[str, Any]] = MappingProxyType(
    {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "compare": CompareConfig}
)
"""The class that validates a run's file, by its ``kind``."""
_TOLD_BY: Final = {"finetune": "task", "compare": "arms"}
"""Sections that only one kind of run has, for files that do not say their kind."""


def load_config(model: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read one complete run from a YAML file.

    Args:
        model: The configuration class of the verb.
        path: The YAML file.
        overrides: ``key.path=value`` strings; values are read as YAML.

    Raises:
        ConfigError: Every mistake at once, each with its place and the nearest known key.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError("a configuration is a mapping of keys", where=str(path), found=type(values).__name__)
    for override in overrides:
        apply_override(values, override)
    return validate(model, values, source=str(path))


def load_any(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig | CompareConfig:
    """Read a configuration of whichever kind its key ``kind`` says (or, without it, its sections tell)."""
    values = read_yaml(path)
    kind: Any = values.get("kind") if isinstance(values, dict) else None
    if kind is None and isinstance(values, dict):
        kind = next((kind for kind, section in _TOLD_BY.items() if section in values), "pretrain")
    if kind not in CONFIGS:
        raise ConfigError(f"unknown kind of run `{kind}`. {nearest(str(kind), CONFIGS)}", where=str(path))
    loaded: PretrainConfig | FinetuneConfig | CompareConfig = load_config(CONFIGS[kind], path, overrides)
    return loaded


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key of ``values`` in place.

    Raises:
        ConfigError: Not of the form KEY=VALUE, or the path runs through something that is no section.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set takes KEY=VALUE, not `{override}`", fix="for example --set method.temperature=0.2")
    place: Any = values
    for depth, part in enumerate(parts[:-1]):
        place = _enter(place, part, ".".join(parts[: depth + 1]), create=True)
    value = parse_yaml(text, source=f"--set {key}") if text else None
    if isinstance(place, list):
        place[_index(place, parts[-1], key)] = value
    else:
        place[parts[-1]] = value


def _enter(place: Any, part: str, name: str, *, create: bool) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, name)]
    if create and place.get(part) is None:
        place[part] = {}
    inner = place[part]
    if not isinstance(inner, (dict, list)):
        raise ConfigError(f"--set: `{name}` is a single value, not a section", found=repr(inner))
    return inner


def _index(place: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise ConfigError(f"--set: `{name}` is not an entry of a list", fix=f"use 0 to {len(place) - 1}")
    return int(part)


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
