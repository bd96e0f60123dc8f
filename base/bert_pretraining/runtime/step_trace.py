"""A trace of some steps by torch.profiler, and a table of their costliest operators, as files."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, record_function

from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import ranges
from bert_pretraining.runtime.files import with_ending, write_whole
from bert_pretraining.runtime.operator_table import operator_table
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.profilers import device_activity

# The profiler's library prints lines of its own on stderr; this level is above all of them.
# What matters of them, that no work of the device was recorded, is seen in the trace.
QUIET = {"KINETO_LOG_LEVEL": "99"}
# It must not unload itself afterwards where graphs of the device are replayed: some of its
# versions then crash, as torch.profiler says of its own graphs.
STAYS_LOADED = {"TEARDOWN_CUPTI": "0"}


class StepTrace:
    """Records the steps of a range, on this rank.

    `start` is called before one of the steps, or before the one that precedes them, in which the
    profiler then warms up; `advance` before each later step, and `stop` after the last step of the
    run, if the range is not over. Then the files are written.

    Args:
        steps: their numbers; the trace names them.

    Attributes:
        recorded: the numbers of the steps in the trace; empty until it is written.
        is_running: whether it has started, and is not over.
        is_over: whether the files were written, or could not be.
        lacks_device: whether the device is no CPU, and no work of it was recorded.
    """

    def __init__(self, folder: Path, steps: range, ranks: Ranks) -> None:
        self._folder, self._ranks, self._device = folder, ranks, ranks.device
        self._steps = steps
        self._first = self._now = 0
        self._profiler: torch.profiler.profile | None = None
        self.recorded = range(0)
        self.is_running = self.is_over = self.lacks_device = False

    @property
    def trace_path(self) -> Path:
        return self._folder / f"rank{self._ranks.rank}.trace.json.gz"

    @property
    def table_path(self) -> Path:
        return self._folder / f"rank{self._ranks.rank}.operators.txt"

    def start(self, step: int) -> None:
        """Begin before this step."""
        for name, value in {**QUIET, **STAYS_LOADED}.items():
            os.environ.setdefault(name, value)
        self._first, self._now = max(step, self._steps.start), step
        # PyTorch 2.11 says so of every trace, though this one has a single cycle.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        activity = device_activity(self._device)
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([activity] if activity else [])],
            schedule=self._action,
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.step_num = step  # the trace then has the run's numbers
        devices.synchronize(self._device)  # the work of earlier steps is not theirs
        ranges.use(record_function)
        self.is_running = True
        self._profiler.start()

    def advance(self) -> None:
        """The next step follows. Raises OSError where the files cannot be written."""
        self._now += 1
        if self._now == self._first:
            devices.synchronize(self._device)
        self._profiler.step()

    def stop(self) -> None:
        """No step follows. Raises OSError where the files cannot be written."""
        self._now += 1
        self._profiler.stop()
        self._finish()

    def abandon(self) -> None:
        """The run ends with an error: record no more, and write nothing.

        PyTorch 2.13 ends by a segmentation fault if the process ends while its profiler runs.
        """
        if self.is_running:
            self._profiler.on_trace_ready = None
            self._finish()
            self._profiler.stop()

    def _action(self, _: int) -> ProfilerAction:
        step = self._now  # the profiler counts from 0 until it is told otherwise
        if step < self._steps.start:
            return ProfilerAction.WARMUP
        if step < self._steps.stop - 1:
            return ProfilerAction.RECORD
        last = step == self._steps.stop - 1
        return ProfilerAction.RECORD_AND_SAVE if last else ProfilerAction.NONE

    def _finish(self) -> None:
        ranges.use(None)
        self.is_running, self.is_over = False, True

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._finish()
        steps = range(self._first, self._now)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.trace_path, lambda temporary: _export(profiler, temporary))
        events = profiler.key_averages()
        self.lacks_device = self._device.type != "cpu" and not any(
            event.device_type != torch.autograd.DeviceType.CPU for event in events
        )
        rank, world_size = self._ranks.rank, self._ranks.world_size
        what = f"rank {rank} of {world_size} ({devices.name(self._device)})"
        write_whole(self.table_path, operator_table(events, steps, what))
        self.recorded = steps


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    """Write the trace, compressed.

    torch.profiler would use the folder of temporary files for it, which may be small. It does not
    say where it cannot write all: OSError then.
    """
    plain = with_ending(path, ".json")
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
            source.seek(max(source.tell() - 16, 0))
            if not source.read().rstrip().endswith(b"}"):
                raise OSError(errno.EIO, "torch.profiler wrote a part of it only", str(plain))
    finally:
        plain.unlink(missing_ok=True)
