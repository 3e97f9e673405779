"""Content hashes of files, remembered so that an unchanged file is read once."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from pathlib import Path

from medssl.core.errors import DataError
from medssl.core.files import atomic_write
from medssl.data.volume import check_file

logger = logging.getLogger(__name__)

RECENT_SECONDS = 2.0
"""A file changed this recently could change again within one tick of its clock, so its hash is not remembered."""


def file_hash(path: Path) -> str:
    """SHA-256 of the content of a file, as 64 hexadecimal digits.

    Raises:
        DataError: Missing, not an ordinary file, or unreadable.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("the file cannot be read", where=str(path), found=str(error), fix="check it") from error


class HashMemory:
    """Remembers the content hash of files by path, size and time of change, in one JSON file.

    Losing the JSON file costs time only; a damaged one is started anew. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known = self._load()
        self._changed = False

    def _load(self) -> dict[str, list[object]]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); files will be hashed again", self.path, error)
            return {}
        return known if isinstance(known, dict) else {}

    def hash(self, path: Path) -> str:
        """Content hash of ``path``; read only when it is new or its size or time of change differs."""
        check_file(path)
        status = path.stat()
        name, state = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        with self._lock:
            entry = self._known.get(name)
        if isinstance(entry, list) and entry[:2] == state and len(entry) == 3 and isinstance(entry[2], str):
            return entry[2]
        digest = file_hash(path)
        if time.time() - status.st_mtime > RECENT_SECONDS:
            with self._lock:
                self._known[name] = [*state, digest]
                self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt, keeping what another process wrote meanwhile."""
        with self._lock:
            if self._changed:
                self._known = {**self._load(), **self._known}
                atomic_write(self.path, json.dumps(self._known))
                self._changed = False
