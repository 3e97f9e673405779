"""Being asked to stop: a flag that the loop looks at after each step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final

log = logging.getLogger(__name__)

# SIGUSR1 is left alone: NCCL uses it.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """While entered, SIGTERM, SIGINT and SIGUSR2 set ``raised`` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. The handlers that were there before are put back on leaving, and
    an enclosing flag hears of a signal that came too late to be acted upon (in the last moments of one of many runs).
    Outside the main thread, where handlers cannot be set, nothing is changed.
    """

    def __init__(self) -> None:
        self.raised: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._interrupts = 0

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopFlag) and self.raised is not None:
                outer.raised = self.raised
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            log.warning("stopping after this step and saving; press Ctrl-C again to stop at once")
