"""What asks a run to stop: SIGTERM, SIGUSR1 (Slurm's warning), Ctrl-C, SIGHUP, and failures.

A failure is what ends the run with an error, but leaves time to save: a full disk, or a shard that
cannot be read any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime import rank_variables, screen
from bert_pretraining.runtime.output import OutputLost

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A terminal sends Ctrl-C to launcher and ranks, and the launcher forwards it: the same signal
# within this time (in seconds) counts once.
SECONDS_OF_ONE_SIGNAL = 1.0


class StopRequest:
    """Remembers what asked this process to stop.

    The first signal raises KeyboardInterrupt. Inside `deferred` it only sets `received`, the main
    rank says so, and the training loop stops after the current step. A second signal ends the
    process at once. SIGHUP counts neither as a first nor as a second one: where a terminal is
    closed, several programs send it, together with other signals. Where it is ignored (nohup), it
    stays ignored.

    Attributes:
        received: the signal's name, or None. It is "SIGHUP" also where stdout's reader is gone.
        failure: the error to end with once the run is saved, or None.
    """

    def __init__(self) -> None:
        self._handled: list[int] = []
        self.received: str | None = None
        self.failure: UserError | TrainingError | None = None
        self._deferred = False
        self._first: str | None = None  # the first signal that counts
        self._first_at = 0.0

    @property
    def asked(self) -> bool:
        """Whether the run is to stop."""
        return self.received is not None or self.failure is not None

    def fail(self, error: UserError | TrainingError) -> None:
        """Stop the run after the current step, save, and end with this error. The first counts."""
        self.failure = self.failure or error

    def output_lost(self, lost: OutputLost) -> None:
        """For `output.when_lost`: stop the run after the current step, also before its first one.

        A full disk is a failure. A reader or terminal that is gone is the same as SIGHUP.
        """
        if lost.is_full:
            self.fail(lost.as_error())
        elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and self.received is None:
            self.received = signal.SIGHUP.name
            print(f"Notice: nobody reads stdout ({lost.reason}): stopping", file=sys.stderr)

    @contextlib.contextmanager
    def listening(self, ignore_afterwards: bool = False) -> Iterator[None]:
        """Handle the signals inside this context. Only for the main thread.

        ignore_afterwards: a run that ended without an error ignores them from then on. For a rank
        that has nothing left to stop, but that other ranks still wait for.
        """
        handled = self._handled = [
            number
            for number in ASKING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        before = {number: signal.signal(number, self._handle) for number in handled}
        after = before
        try:
            yield
            if ignore_afterwards:
                after = dict.fromkeys(handled, signal.SIG_IGN)
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Inside this context, which is inside of `listening`, a signal ends the process at once.

        For a wait in C++ with nothing to save. A handler in Python would run only after the wait.
        """
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in self._handled:
                signal.signal(number, self._handle)

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
        if number == signal.SIGHUP:
            if self.received is not None:
                return
        elif self._first is None:
            self._first, self._first_at = name, now
        elif name == self._first and now - self._first_at < SECONDS_OF_ONE_SIGNAL:
            return
        else:
            # End without clean-up, because the clean-up may be what takes too long.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_first = self.received is None
        self.received = self.received or name
        if not self._deferred:
            raise KeyboardInterrupt(name)
        if is_first and rank_variables.own_rank() == 0:
            screen.tell_at_once(_answer(number))


def _answer(number: int) -> str:
    """What a run that stops says to the signal."""
    stopping = "topping after this update and saving"
    if number == signal.SIGINT:
        return f"S{stopping}; Ctrl-C again ends at once"
    second = "" if number == signal.SIGHUP else "; a second signal ends at once"
    return f"{signal.Signals(number).name}: s{stopping}{second}"
