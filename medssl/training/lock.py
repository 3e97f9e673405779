"""One writer per run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from medssl.core.errors import CheckpointError
from medssl.core.files import explain_disk_errors

BEAT_S: Final = 30.0
STALE_S: Final = 300.0


class RunLock:
    """Exclusive lock on a run folder: ``run.lock`` with host, pid and start time.

    On one host the operating system's lock decides, and a killed process loses it. A process on another host shows
    that it lives by touching the file every half minute (``beat``); after five minutes without, it counts as dead.

    Raises:
        CheckpointError: Another process writes this run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._handle: int | None = None
        self._beaten = 0.0

    def __enter__(self) -> RunLock:
        with explain_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return self

    def _take(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._refuse(self._owner(handle))
            locked = False  # a file system without locks: what the file says decides
        owner = self._owner(handle)
        if owner and not self._is_gone(owner, locked):
            self._refuse(owner)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
        with explain_disk_errors(self.path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, content.encode(), 0)
            os.fsync(handle)

    @staticmethod
    def _owner(handle: int) -> dict[str, Any]:
        try:
            content = json.loads(os.pread(handle, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _is_gone(self, owner: dict[str, Any], locked: bool) -> bool:
        if owner.get("host") != socket.gethostname():
            return time.time() - self.path.stat().st_mtime > STALE_S
        if locked:
            return True  # the operating system gave us the lock, so its last holder is dead
        try:
            os.kill(int(owner.get("pid", 0)), 0)
        except (ProcessLookupError, ValueError):
            return True
        except PermissionError:
            return False
        return False

    def _refuse(self, owner: dict[str, Any]) -> None:
        raise CheckpointError(
            "another process writes this run",
            where=str(self.path),
            found=f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}",
            fix="wait for it, stop it, or choose another run name; a host that died is given up after five minutes",
        )

    def beat(self) -> None:
        """Show that this process lives; cheap enough for every step."""
        now = time.monotonic()
        if self._handle is not None and now - self._beaten > BEAT_S:
            self._beaten = now
            os.utime(self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None
