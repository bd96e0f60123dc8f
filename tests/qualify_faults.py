"""For tests of `qualify`: updates on a fake clock, and ranks with faults and a small, fast model.

A folder for PYTHONPATH holds a sitecustomize.py, which Python imports in every process. In ranks it
changes `Workload`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bert_pretraining.logs.sinks import Work
from bert_pretraining.qualify import other_programs
from qualify_doubles import context_of as context_of_one_size

# FAULT: what rank 1 does in each update, from the third one on.
PROGRAM = """
import os

if os.environ.get("RANK"):
    import signal, time
    import torch
    from bert_pretraining.model.bert_config import BertConfig
    from bert_pretraining.qualify import workload

    workload.BERT_LARGE = BertConfig(512, 64, 2, 1, 128, 512)
    build, update = workload.Workload.__init__, workload.Workload.update

    def built(self, context, ranks, batch_size, *rest, **settings):
        build(self, context, ranks, batch_size, *rest, **settings)
        self.size, self.made = batch_size, 0

    def updated(self):
        self.made += 1
        if os.environ["RANK"] == "1" and self.made > 2:
            fault(self)
        update(self)

    def fault(self):
        FAULT

    workload.Workload.__init__, workload.Workload.update = built, updated
"""


# As there, with two batch sizes.
context_of = functools.partial(context_of_one_size, batch_sizes=(1, 2))


def faulty_ranks(folder: Path, fault: str) -> Path:
    """A folder for PYTHONPATH. fault: statements in one line, `self` is the `Workload`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PROGRAM.replace("FAULT", fault))
    return folder


class FakeClock:
    """In the place of time.perf_counter."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Time that passes only in updates; on a machine where nobody can tell who uses the CPUs."""
    fake = FakeClock()
    monkeypatch.setattr(time, "perf_counter", fake)
    monkeypatch.setattr(other_programs, "busy_seconds", dict)
    return fake


class FakeWorkload:
    """Updates that take the seconds that a function of their number says, on a fake clock.

    waited: of each update, for other ranks. losses: of each update.
    """

    def __init__(
        self,
        clock: FakeClock,
        seconds: Callable[[int], float],
        waited: float = 0.0,
        losses: Iterator[float] | None = None,
    ) -> None:
        self._clock, self._seconds, self._waited = clock, seconds, waited
        self._losses = losses or itertools.repeat(10.5)
        self._made = self._unread = 0
        self.said: list[str] = ["Kernels: torch", "Notice: not compiled"]
        rate = SimpleNamespace(flop_per_second=4e12)
        tally = SimpleNamespace(seconds={"reduction": 0.0})
        self.training = SimpleNamespace(
            clock=SimpleNamespace(measures=True, whole=tally), precision="fp32", matrix_rate=rate
        )

    def update(self) -> None:
        self._clock.now += self._seconds(self._made)
        self._made += 1
        self._unread += 1
        self._loss = next(self._losses)

    def read(self) -> SimpleNamespace:
        count, self._unread = self._unread, 0
        self.training.clock.whole.seconds["reduction"] += count * self._waited
        parts = {"data": 0.1, "forward_backward": 0.6, "reduction": self._waited, "optimizer": 0.2}
        work = Work(count, 500 * count, 1e12 * count, 3 * 2**30, parts)
        return SimpleNamespace(
            result=SimpleNamespace(last_finite=True, sums=(self._loss, 3.0)), work=work
        )
