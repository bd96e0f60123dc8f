"""Signals that ask a run to stop: SIGTERM, Slurm's warning SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher passes on what a terminal may have sent to the whole group already.
SECONDS_OF_ONE_SIGNAL = 1.0


class StopRequest:
    """Remembers that a signal asked this process to stop; a second signal ends it at once.

    While nothing is there to finish, the first one raises KeyboardInterrupt; inside
    `deferred`, it only sets `received`, for the training loop to look at.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._received_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals meanwhile. Only for a process's main thread."""
        before = {number: signal.signal(number, self._handle) for number in ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember signals meanwhile."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if name == self.received and now - self._received_at < SECONDS_OF_ONE_SIGNAL:
            return
        if self.received is not None:
            # Without clean-up, which may be what takes too long.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._received_at = name, now
        if not self._deferred:
            raise KeyboardInterrupt(self.received)
