"""Writing that never harms what was there, and reading YAML that never runs anything."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from medssl.core.errors import ConfigError, DiskError

MAX_YAML_BYTES = 1_000_000
_BOOL = "tag:yaml.org,2002:bool"


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors of writing ``path`` into a DiskError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskError(
                "no space left to write a file; what was there before is untouched",
                where=str(path),
                fix="free some space, or choose another folder",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise DiskError(
                "a file could not be written: no permission, or a read-only folder",
                where=str(path),
                fix="choose a folder that you may write to",
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            raise DiskError(
                "a file cannot be written at this place",
                where=str(path),
                found=error.strerror,
                fix="check the path: a file may stand where a folder is needed, or the other way round",
            ) from error
        raise


def atomic_write(path: Path, content: bytes | str) -> Path:
    """Write a file so that readers see the old content or the new, never a part; returns ``path``.

    Raises:
        DiskError: No space or no permission; the old file is untouched and nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON atomically, indented, with NaN refused."""
    return atomic_write(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Raise DiskError when ``folder`` has less than ``needed`` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"not enough space for {what}",
            where=str(folder),
            found=f"{free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed",
            fix="free some space, or choose another folder",
        )


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses duplicate keys and aliases (an alias bomb expands without end).

    Only ``true`` and ``false`` are truth values, as in YAML 1.2: PyYAML would read the key ``on`` as true, and a site
    called NO as false.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases (`*name`) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain values", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key}`", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text; see ``read_yaml``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = source
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            where = f"{source}, line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {problem}", where=where, fix="correct this place in the file") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file with plain values only: no tags that build objects, no aliases, no duplicate keys.

    Raises:
        ConfigError: Missing, unreadable, larger than 1 MB, not UTF-8 or not valid YAML; with line and column.
    """
    if not path.is_file():
        raise ConfigError("no such file", where=str(path), fix="check the path")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError("too large for a configuration file", where=str(path), found=f"{path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read as UTF-8 text", where=str(path), found=str(error)) from error
    return parse_yaml(text, source=str(path))
