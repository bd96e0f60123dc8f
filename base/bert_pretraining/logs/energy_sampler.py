"""Reads a machine's counters of energy in a thread of its own, and keeps what they say."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from bert_pretraining.logs.mlperf_power import MlperfPower
from bert_pretraining.logs.power_file import PowerFile
from bert_pretraining.runtime.power import Counter

PERIOD = 1.0  # seconds from sample to sample
PATIENCE = 5.0  # seconds that the end of a run waits for a reading that hangs
TRAINING_BEGAN, TRAINING_ENDED, CLOCK_STARTED, CLOCK_STOPPED, END = range(5)


class Mark(NamedTuple):
    """What happens in the run, such as TRAINING_BEGAN, and at which Unix time."""

    what: int
    time: float


class Span(NamedTuple):
    """Joules in so many seconds."""

    joules: float = 0.0
    seconds: float = 0.0


class MachineEnergy(NamedTuple):
    """What one machine took.

    kinds: how many counters, by (source, kind). failure: why this is not all; "" if it is.
    readings: in MLPerf's power log; None without one.
    """

    host: str
    kinds: dict[tuple[str, str], int]
    run: Span = Span()
    training: Span = Span()
    failure: str = ""
    readings: int | None = None


class Sampler:
    """Reads a machine's counters, and keeps and writes what they say. For one thread at a time.

    The first sample should follow at once: counters count from when they were made.

    Args:
        period: seconds from sample to sample. One that follows another sooner, because something
            happens in the run, counts, but no file gets a line: over a moment, a counter that
            moves in steps would show any power.
    """

    def __init__(
        self,
        counters: Sequence[Counter],
        period: float = PERIOD,
        file: PowerFile | None = None,
        mlperf: MlperfPower | None = None,
    ) -> None:
        self.period, self.total, self.training = period, Span(), Span()
        self._counters, self._file, self._mlperf = counters, file, mlperf
        self._started = self._written = 0.0
        self._joules: dict[str, float] = {}  # of each device, in the line written last
        self._begun = Span()  # the total as training began

    def sample(self, now: float, mark: Mark | None = None) -> None:
        """Read every counter at the Unix time `now`. Raises CounterError, or OSError of a file.

        mark: why the counters are read now, if not because a period is over.
        """
        self._started = self._started or now
        counted = {counter.device: counter.joules(now) for counter in self._counters}
        if self._file is not None and now - self._written >= self.period / 2:
            self._write(now, counted)
        before, self.total = self.total, Span(sum(counted.values()), now - self._started)
        what = None if mark is None else mark.what
        if self._mlperf is not None:
            if what == CLOCK_STARTED:
                self._mlperf.start(mark.time)
            else:
                self._mlperf.read(now, self.total.joules - before.joules)
            if what == CLOCK_STOPPED:
                self._mlperf.stop()
        if what == TRAINING_BEGAN:
            self._begun = self.total
        if what == TRAINING_ENDED:
            joules, seconds = self._begun
            self.training = Span(self.total.joules - joules, self.total.seconds - seconds)

    def _write(self, now: float, counted: dict[str, float]) -> None:
        seconds = now - self._written if self._written else None
        for counter in self._counters:
            name, joules = counter.device, counted[counter.device]
            watts = None if seconds is None else (joules - self._joules[name]) / seconds
            self._file.write(now, name, watts, joules, counter.state())
        self._written, self._joules = now, counted

    @property
    def mlperf_readings(self) -> int | None:
        return None if self._mlperf is None else self._mlperf.readings

    def close(self) -> None:
        for file in (self._file, self._mlperf):
            if file is not None:
                file.close()


class EnergyMonitor:
    """Has a `Sampler` work in a thread of its own; the run never waits for it before its end.

    A reading that fails ends the sampling; `failure` then says why, in one line.

    Args:
        kinds: how many counters the sampler reads, by (source, kind).
        uncounted: what no counter counts although the run uses it; "" for nothing.
    """

    def __init__(
        self,
        sampler: Sampler,
        kinds: dict[tuple[str, str], int],
        uncounted: str = "",
    ) -> None:
        self.failure = ""
        self._sampler, self._kinds, self._uncounted = sampler, kinds, uncounted
        self._marks: queue.SimpleQueue[Mark] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="energy", daemon=True)
        self._thread.start()

    def mark(self, what: int) -> None:
        """Have the counters read now, because of TRAINING_BEGAN or the like. Does not wait."""
        self._marks.put(Mark(what, time.time()))

    def finish(self) -> MachineEnergy:
        """Read the counters for the last time, and say what they counted."""
        self.close()
        sampler = self._sampler
        return MachineEnergy(
            socket.gethostname(),
            self._kinds,
            sampler.total,
            sampler.training,
            self.failure or self._uncounted,
            sampler.mlperf_readings,
        )

    def close(self) -> None:
        """End the thread. One that hangs in a driver is left alone after PATIENCE."""
        self.mark(END)
        self._thread.join(PATIENCE)
        if self._thread.is_alive() and not self.failure:
            self.failure = f"a counter gave no answer for {PATIENCE:.0f} s"

    def _work(self) -> None:
        try:
            due, mark = time.monotonic(), None
            while mark is None or mark.what != END:
                self._sampler.sample(time.time(), mark)
                if mark is None:  # what a busy machine has missed is not made up for
                    due = max(due + self._sampler.period, time.monotonic())
                mark = None
                with contextlib.suppress(queue.Empty):
                    mark = self._marks.get(timeout=max(due - time.monotonic(), 0.0))
            self._sampler.sample(time.time())
        except Exception as error:  # nothing that happens here may end the run
            self.failure = self.failure or str(error) or type(error).__name__
        finally:
            with contextlib.suppress(OSError):
                self._sampler.close()
