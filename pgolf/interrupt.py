"""Ctrl-C and SIGTERM as a wish that a loop reads between steps, so that nothing is lost."""

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):
    """The work was interrupted by a signal, after saving; the message says how to go on."""


class StopSignal:
    """While active, the first signal only sets `wanted`; a second one acts as usual."""

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever embeds us owns the signals
                break
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self._old[number])

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
