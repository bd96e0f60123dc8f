"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to launcher and ranks, and the launcher forwards it: the same signal
# within this time (in seconds) counts once.
SECONDS_OF_ONE_SIGNAL = 1.0


class StopRequest:
    """Remembers that a signal asked this process to stop; a second signal ends it at once.

    The first signal raises KeyboardInterrupt. Inside `deferred` it only sets `received`, and the
    training loop stops after the current step.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._received_at = 0.0

    @contextlib.contextmanager
    def listening(self, ignore_afterwards: bool = False) -> Iterator[None]:
        """Handle the signals inside this context. Only for the main thread.

        ignore_afterwards: a run that ended without an error ignores them from then on. For a rank
        that has nothing left to stop, but that other ranks still wait for.
        """
        before = {number: signal.signal(number, self._handle) for number in ASKING}
        after = before
        try:
            yield
            if ignore_afterwards:
                after = dict.fromkeys(ASKING, signal.SIG_IGN)
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember signals inside this context."""
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
            # End without clean-up, because the clean-up may be what takes too long.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._received_at = name, now
        if not self._deferred:
            raise KeyboardInterrupt(self.received)
