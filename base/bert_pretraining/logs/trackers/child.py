"""The process in which one tracker lives: `python -m bert_pretraining.logs.trackers.child`.

Arguments: the tracker's name, and the file descriptors of the calls (in) and the answers (out).
A call is a line of JSON, [method, argument, ...]; see `Tracker`. There is one answer at the end:
{"done": true}, or {"failed": what, "in": method}. What packages print goes to a log file, since
this process's stdout and stderr are one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator

from bert_pretraining.logs.trackers.table import CLASSES
from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker

NICE = 10  # the trainer comes first where both want a CPU
LONGEST = 200  # characters of an error's message
SECONDS_TO_END = 60  # more than the run itself waits, see `process.Patience`


def serve(make: type[Tracker], calls: Iterable[bytes]) -> dict[str, object]:
    """Make a tracker and do the calls; the answer to them.

    Where they end without a `finish`, the run's process has gone: the tracker is told "aborted".
    """
    method, step = "import", 0
    is_started = is_finished = False
    try:
        tracker = make()
        for line in calls:
            method, *arguments = json.loads(line)
            if method == "start":
                arguments[0], is_started = TrackedRun(**arguments[0]), True
            else:
                step, is_finished = arguments[0], method == "finish"
            getattr(tracker, method)(*arguments)
        if is_started and not is_finished:
            method = "finish"
            tracker.finish(step, "aborted", {})
    except BaseException as error:  # whatever a package raises, SystemExit too
        traceback.print_exc()
        words = " ".join(str(error).split())[:LONGEST]
        return {"failed": f"{type(error).__name__}: {words}", "in": method}
    return {"done": True}


def _until_the_end(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines. After the last one this process has so many seconds to end, whoever waits."""
    yield from lines
    signal.alarm(SECONDS_TO_END)


def main() -> None:
    """The process. It ends when its calls end: signals are for the run."""
    with contextlib.suppress(OSError):  # it is not allowed everywhere
        os.nice(NICE)
    with contextlib.suppress(OSError):
        # Ctrl-C in a terminal reaches neither it nor its children, and where the run is killed, the
        # launcher does not kill it too: it has the end to write.
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        # A function, since the package's own children would inherit that a signal is ignored.
        signal.signal(number, lambda *_: None)
    name, calls, answers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with os.fdopen(calls, "rb") as lines:
        answer = serve(CLASSES[name], _until_the_end(lines))
    with contextlib.suppress(BrokenPipeError):  # the run's process has gone
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
