"""What --profile_steps and --profile_memory ask for, and ranges for outside profilers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from bert_pretraining.config import Config
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group, profilers, ranges
from bert_pretraining.runtime.operator_table import named
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.step_trace import StepTrace

FIRST_STEPS = 3  # whose memory is written without profile_steps
MANY_STEPS = 50  # in a trace
VIEWER, MEMORY_VIEWER = "https://ui.perfetto.dev", "https://pytorch.org/memory_viz"


class Profile:
    """Watches the steps that a run is asked to profile. Every rank makes one, and enters it.

    Where Nsight Systems runs the program and watches the device, --profile_steps tells it which
    steps to keep, in place of torch.profiler: only one of both can record a device's work.
    """

    def __init__(self, config: Config, ranks: Ranks, log: RunLog) -> None:
        self._device, self._say = ranks.device, log.say
        self._asked, self._steps = config.profile_steps, config.steps_to_profile
        self._last_step = config.max_steps
        self._begun = False
        self._watchers: list[_Watcher] = []
        if self._steps is None and not config.profile_memory:
            return
        # Only rank 0 has a folder. A machine that does not share its disk makes its own.
        folder = process_group.from_main(lambda: log.folder) / "profile"
        window = profilers.outside_window(ranks.device, os.environ)
        if self._steps is not None and window is not None:
            self._watchers.append(_OutsideWindow(window, self._steps, ranks, log.say))
        elif self._steps is not None:
            self._watchers.append(_Trace(folder, self._steps, ranks, log.say))
        if not config.profile_memory:
            return
        history = profilers.memory_history(ranks.device)
        if history is not None:
            self._watchers.append(_Memory(history, folder, self._steps, ranks, log.say))
        else:
            where = "a CPU" if ranks.device.type == "cpu" else f"{ranks.device.type} devices"
            log.say(
                "Notice: profile_memory has no effect: PyTorch keeps no history of the memory of "
                f"{where}"
            )

    def __enter__(self) -> Profile:
        # An outside profiler's library may take the device's events for itself as soon as a range
        # is made. Then torch.profiler would get none.
        waits = any(isinstance(watcher, _Trace) for watcher in self._watchers)
        watched = profilers.is_watched(os.environ) and not waits
        ranges.use(profilers.outside_ranges(self._device) if watched else None)
        return self

    def before_update(self, step: int) -> None:
        """step: the number that the next update has if none before it was skipped."""
        if not self._begun:
            self._begin(step)
        for watcher in self._watchers:
            watcher.before_update(step)

    def ended(self) -> None:
        """Training is over: write what was recorded, or say that nothing was."""
        for watcher in self._watchers:
            watcher.ended()
        if self._steps is not None and not any(watcher.began for watcher in self._watchers):
            self._miss("the run ended before them", "pass steps that the run has")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ranges.use(None)
        for watcher in self._watchers:
            watcher.left(error)

    def _begin(self, step: int) -> None:
        """Training begins with this step."""
        self._begun = True
        if self._steps is None:
            return
        count = min(self._steps.stop, self._last_step + 1) - self._steps.start
        if self._steps.stop <= step:
            example = f"{step + 1}:{step + 1 + len(self._steps)}"
            self._miss(f"the run goes on with step {step}", f"pass, for example, {example}")
        elif count <= 0:
            self._miss(f"the run ends at step {self._last_step} (max_steps)", "pass earlier steps")
        elif count > MANY_STEPS:
            self._say(
                f"Notice: profile_steps {self._asked}: to write a trace of {count:,} steps takes "
                "minutes and much memory; five steps are usually enough"
            )

    def _miss(self, why: str, fix: str) -> None:
        """Say, once, that the steps do not come."""
        self._say(f"Notice: profile_steps {self._asked}: no step is profiled, since {why}; {fix}")
        self._steps, self._watchers = None, []


class _Watcher(Protocol):
    """Watches some steps. began: whether one of them has begun."""

    began: bool

    def before_update(self, step: int) -> None: ...

    def ended(self) -> None: ...

    def left(self, error: BaseException | None) -> None:
        """Nothing follows; error: what the run ends with, if anything."""


class _Trace:
    """A trace and a table of operators, by torch.profiler."""

    def __init__(
        self, folder: Path, steps: range, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self._steps, self._ranks, self._say = steps, ranks, say
        self._trace = StepTrace(folder, steps, ranks)
        self.began = False

    def before_update(self, step: int) -> None:
        self.began = self.began or step in self._steps
        if self._trace.is_over:
            return
        if self._trace.is_running:
            self._write(self._trace.advance)
        elif self._steps.start - 1 <= step < self._steps.stop:
            self._trace.start(step)

    def ended(self) -> None:
        if self._trace.is_running:
            self._write(self._trace.stop)

    def left(self, error: BaseException | None) -> None:
        # The device may be the cause. Then it fails here again, and the first error is told.
        with contextlib.suppress(RuntimeError) if error else contextlib.nullcontext():
            self._trace.abandon()

    def _write(self, go_on: Callable[[], None]) -> None:
        """Go on; say where the files are, once there are any."""
        try:
            go_on()
        except OSError as error:
            _cannot_write(error, self._ranks)
            return
        trace = self._trace
        if not trace.recorded:
            return
        cut = ", where the run ended" if trace.recorded.stop < self._steps.stop else ""
        self._say(
            f"Profile of {named(trace.recorded)}{cut}, slowed down by it: open "
            f"{trace.trace_path} at {VIEWER}; costliest operators: {trace.table_path.name} "
            "beside it"
        )
        if trace.lacks_device:
            self._say(
                f"Notice: the profile shows the host alone: torch.profiler recorded no work of the "
                f"{self._ranks.device.type} device; docs/performance.md names the causes"
            )


class _OutsideWindow:
    """The steps that Nsight Systems keeps."""

    def __init__(
        self,
        window: profilers.OutsideWindow,
        steps: range,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self._window, self._steps, self._ranks, self._say = window, steps, ranks, say
        self.began = self._is_open = False

    def before_update(self, step: int) -> None:
        if step in self._steps and not self.began:
            devices.synchronize(self._ranks.device)  # the work of earlier steps is not theirs
            self._window.start()
            self.began = self._is_open = True
        elif step >= self._steps.stop:
            self.ended()

    def ended(self) -> None:
        if self._is_open:
            devices.synchronize(self._ranks.device)
            self._window.stop()
            self._is_open = False
            self._say(
                f"Profile of {named(self._steps)}: left to Nsight Systems, which keeps nothing "
                "else if it was started with --capture-range=cudaProfilerApi"
            )

    def left(self, error: BaseException | None) -> None:
        pass


class _Memory:
    """Snapshots of the device's memory.

    steps: None: memory is recorded from the start, and written after the first steps.
    """

    def __init__(
        self,
        history: profilers.MemoryHistory,
        folder: Path,
        steps: range | None,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self._history, self._folder, self._ranks, self._say = history, folder, ranks, say
        self._steps, self._keeps_on = steps, steps is None
        self._is_recording = self._is_written = self.began = False
        if self._keeps_on:
            self._start()

    def before_update(self, step: int) -> None:
        if self._steps is None:
            self._steps = range(step, step + FIRST_STEPS)
        if step in self._steps and not self.began:
            self.began = True
            if not self._keeps_on:
                self._start()
        elif step >= self._steps.stop:
            self.ended()

    def ended(self) -> None:
        if not self.began or self._is_written:
            return
        self._is_written = True
        path = self._write("memory")
        if path is not None:
            self._say(f"Memory snapshot: open {path} at {MEMORY_VIEWER}")
        if not self._keeps_on:
            self._stop()

    def left(self, error: BaseException | None) -> None:
        if self._is_recording and profilers.is_out_of_memory(error):
            path = self._write("out_of_memory")
            if path is not None:
                name = f"rank {self._ranks.rank}"
                print(
                    f"Memory snapshot of {name}, where memory ran out: open {path} at "
                    f"{MEMORY_VIEWER}",
                    file=sys.stderr,
                    flush=True,
                )
        self._stop()

    def _start(self) -> None:
        self._history.start()
        self._is_recording = True

    def _stop(self) -> None:
        if self._is_recording:
            self._history.stop()
            self._is_recording = False

    def _write(self, what: str) -> Path | None:
        """The file; None where it cannot be written, which is said."""
        path = self._folder / f"rank{self._ranks.rank}.{what}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._history.write(path)
        except OSError as error:
            _cannot_write(error, self._ranks)
            return None
        return path


def _cannot_write(error: OSError, ranks: Ranks) -> None:
    """A profile that cannot be written does not end the run."""
    print(
        f"Warning: rank {ranks.rank}: cannot write the profile {error.filename or ''} "
        f"({error.strerror or error}); the run goes on without it",
        file=sys.stderr,
        flush=True,
    )
