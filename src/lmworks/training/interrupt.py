"""Ctrl-C and SIGTERM: the first asks for an end after the current step, the second ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """True once a signal has arrived inside the block."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the next one finds the handlers of before."""
        self.signal = signal.Signals(number)
        self.restore()

    def restore(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
