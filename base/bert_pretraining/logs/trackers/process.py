"""A tracker's process, as the run sees it: calls go in, and nothing of it can stop or slow the run.

A package that hangs, prints, asks the network, or breaks does so in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bert_pretraining.runtime import process_stat, rank_variables

MOST_UNSENT = 2**26  # bytes of calls that wait for a slow tracker
QUIET_SECONDS = 1.0  # that the end of a run waits before it says so
ANSWER_BYTES = 65536


class Patience(NamedTuple):
    """How long the end of a run waits for a tracker, in seconds.

    idle: in which its process uses no processor time, and waits for none: it hangs. most: in all,
    after the run.
    """

    idle: float
    most: float


USUAL = Patience(idle=5.0, most=30.0)


def encode(method: str, *arguments: object) -> bytes:
    """A call of a method of `Tracker`, for its process. arguments: what JSON can hold."""
    return json.dumps([method, *arguments]).encode() + b"\n"


class TrackerProcess:
    """Starts the process, and passes calls to it without ever waiting, until the end of the run.

    Args:
        name: of the tracker.
        log: file for what the packages print; it is removed if nothing fails.
        failed: called once, with a line that says what failed, if something does.
        say: called once, with a line that says so, if the end of the run waits for it.
        patience: how long it waits.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        failed: Callable[[str], None],
        say: Callable[[str], None],
        patience: Patience,
    ) -> None:
        self._name, self._log, self._tell, self._say = name, log, failed, say
        self._patience, self._busy_at, self._ticks = patience, 0.0, 0
        self._unsent, self._answer = bytearray(), b""
        self._over = self._done = self._has_said = False
        reading, self._calls = os.pipe()
        self._answers, writing = os.pipe()
        os.set_blocking(self._calls, False)
        os.set_blocking(self._answers, False)
        self._process: subprocess.Popen | None = None
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-u", "-m", "bert_pretraining.logs.trackers.child"),
                        *(name, str(reading), str(writing)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[reading, writing],
                    env=rank_variables.environment_without_rank(),
                )
        except OSError as error:
            self._fail(f"its process cannot be started: {error.strerror or error}")
        finally:
            os.close(reading)
            os.close(writing)

    def call(self, line: bytes) -> None:
        """Pass on a call, as `encode` makes it."""
        if self._over:
            return
        self._unsent += line
        self._send()
        self._read_answer()
        if len(self._unsent) > MOST_UNSENT:
            self._fail("it takes figures more slowly than the run makes them")

    def end_calls(self, ended: float) -> None:
        """Pass on what is left, and say that nothing follows.

        ended: when the run ended, of time.monotonic().
        """
        while self._unsent and not self._over and self._is_worth_waiting(ended):
            self._send()
            self._read_answer()
        os.close(self._calls)

    def wait(self, ended: float) -> None:
        """Wait for the process, as long as `patience` says; then end it."""
        while not self._over and not self._done:
            if not self._is_worth_waiting(ended):
                seconds = time.monotonic() - ended
                late = f"it did not finish within {seconds:.1f} s after the run"
                self._fail(late, "it may lack the run's end")
                break
            self._read_answer()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._deadline(ended) - time.monotonic()))
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        if self._done:
            with contextlib.suppress(OSError):
                self._log.unlink(missing_ok=True)

    def _deadline(self, ended: float) -> float:
        """The process is ended then; of time.monotonic()."""
        if self._process is not None:
            ticks = process_stat.cpu_ticks(self._process.pid)
            if ticks is None:
                return ended + self._patience.most
            # On a busy machine a process of low priority gets no CPU for seconds.
            if ticks > self._ticks or process_stat.is_runnable(self._process.pid):
                self._ticks, self._busy_at = ticks, time.monotonic()
        idle_since = max(ended, self._busy_at)
        return min(idle_since + self._patience.idle, ended + self._patience.most)

    def _is_worth_waiting(self, ended: float) -> bool:
        """Wait until the process answers or takes calls, a while at most; False at the deadline."""
        left = self._deadline(ended) - time.monotonic()
        if left <= 0:
            return False
        writing = [self._calls] if self._unsent else []
        ready = select.select([self._answers], writing, [], min(left, QUIET_SECONDS))
        if not self._has_said and not any(ready):
            self._has_said = True
            left = max(1, math.ceil(ended + self._patience.most - time.monotonic()))
            self._say(f"Notice: waiting for the tracker {self._name}, {left} s at most")
        return True

    def _send(self) -> None:
        """Write what the pipe takes."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._calls, self._unsent)]
        except BlockingIOError:
            pass  # the rest goes with the next call
        except BrokenPipeError:
            self._unsent.clear()  # the process has ended: its answer, or its end, says why

    def _read_answer(self) -> None:
        """Take the answers that are there."""
        try:
            piece = os.read(self._answers, ANSWER_BYTES)
        except BlockingIOError:
            return
        if not piece:
            code = self._process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._fail(f"its process ended {how}")
            return
        *lines, self._answer = (self._answer + piece).split(b"\n")
        for answer in map(json.loads, lines):
            self._done |= "done" in answer
            if "failed" in answer:
                self._fail(f"in its {answer['in']}, {answer['failed']}")

    def _fail(self, what: str, effect: str = "the run goes on without it") -> None:
        """Say once what failed; nothing is passed on from now on."""
        if self._over:
            return
        self._over = True
        self._unsent.clear()
        self._tell(
            f"the tracker {self._name} has failed ({what}), and {effect}; see {self._log}, then "
            "mend it for the next run or leave it out of --track"
        )
