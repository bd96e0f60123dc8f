"""What the stages of speed share: updates that are timed, and what the ranks' times tell.

A rank measures blocks of updates: it reads what became of them, as `train` does for a log line,
only after each block. A step is the time from one update's end to the next one's, by events on a
device that has them. A rank's own seconds are those of a step without the waiting for others.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from bert_pretraining.bench.workload import batch_of, wikipedia_lengths
from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.errors import TrainingError
from bert_pretraining.logs.sinks import PARTS, Speed, Work
from bert_pretraining.qualify.workload import Outcome, Workload
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.events import event_maker
from bert_pretraining.runtime.process_group import Ranks

# Updates in a block: on a device the host shall be ahead most of the time.
ON_CPU, ON_DEVICE = 1, 10
DIFFERENCE = 0.10  # between like devices, and of step times: above it, something is wrong
# MLPerf evaluates 10,000 sequences after each 150,000 that were trained.
TRAINED, EVALUATED = 150_000, 10_000


# ---- on a rank


class Marks:
    """The seconds between marks in a rank's work, by events on a device that has them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._make_event = device, event_maker(device)
        self._marks: list = []

    def mark(self) -> None:
        """All work that was given to the device before is on this side of the mark."""
        if self._make_event is None:
            devices.synchronize(self._device)
            self._marks.append(time.perf_counter())
            return
        event = self._make_event()
        event.record()
        self._marks.append(event)

    def take(self) -> list[float]:
        """The seconds between the marks since the last call. The device must be done."""
        marks, self._marks = self._marks, []
        pairs = itertools.pairwise(marks)
        if self._make_event is None:
            return [later - earlier for earlier, later in pairs]
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


@dataclass(frozen=True)
class Block:
    """Some updates on one rank.

    seconds: of each step. own: of a step, the mean without the waiting for other ranks; None where
    the device cannot tell. parts: of a step, as the mean over the ranks, by the names of `Work`;
    None likewise. tokens, flops: of all ranks. peak_memory: bytes, the most of any rank.
    """

    seconds: list[float]
    own: float | None
    parts: dict[str, float] | None
    tokens: int
    flops: float
    peak_memory: int | None


def measured_block(work: Workload, marks: Marks, count: int) -> Block:
    """Make and time `count` updates. Every rank must call it.

    Raises TrainingError where a loss is not finite.
    """
    clock = work.training.clock
    waited = clock.whole.seconds["reduction"]
    marks.mark()
    for _ in range(count):
        work.update()
        marks.mark()
    outcome = work.read()
    seconds = marks.take()
    _check(outcome)
    waited = clock.whole.seconds["reduction"] - waited
    done = outcome.work
    return Block(
        seconds,
        (sum(seconds) - waited) / count if clock.measures else None,
        done.seconds,
        done.tokens,
        done.flops,
        done.peak_memory,
    )


def _check(outcome: Outcome) -> None:
    """TrainingError where the latest update's loss is not finite; the same on every rank."""
    result = outcome.result
    if result.last_finite and not all(math.isfinite(value) for value in result.sums):
        raise TrainingError(f"the loss is not finite: {result.sums}")


def steady_blocks(work: Workload, ranks: Ranks, seconds: float, least: int) -> list[Block]:
    """Blocks of updates for at least so many seconds, and so many updates.

    Warm-up updates come before. Every rank must call it, and makes as many.
    """
    marks = Marks(ranks.device)
    size = ON_CPU if ranks.device.type == "cpu" else ON_DEVICE
    measured_block(work, marks, min(size, 3))
    started, found = time.perf_counter(), []
    while True:
        found.append(measured_block(work, marks, size))
        passed = process_group.gather_rows([time.perf_counter() - started], ranks.device)
        if len(found) * size >= least and max(row[0] for row in passed) >= seconds:
            return found


def evaluation_rate(work: Workload, ranks: Ranks, batch_size: int, batches: int) -> float:
    """Sequences a second, over all ranks, of evaluating so many batches on each rank.

    The second of two evaluations counts: graphs are captured in the first.
    """
    count = batches * ranks.world_size
    batch = batch_of(wikipedia_lengths(batch_size), work.model)
    own = range(ranks.rank, count, ranks.world_size)
    made = EvaluationSet(count, [(number, batch) for number in own]).near(ranks.device)
    work.training.evaluate(made)
    process_group.barrier(ranks.device)
    rows = process_group.gather_rows([work.training.evaluate(made).seconds], ranks.device)
    return count * batch_size / max(row[0] for row in rows)


def as_json(blocks: Sequence[Block]) -> list[dict[str, object]]:
    return [asdict(block) for block in blocks]


# ---- from the ranks' figures


class Straggler(NamedTuple):
    """A rank that is slower than the others. share: by how much, 0.15 for 15%."""

    rank: int
    share: float
    own: float
    others: float


def slow_ranks(own: Sequence[float], limit: float = DIFFERENCE) -> list[Straggler]:
    """The ranks that need more time than the median of the others, by more than `limit`.

    own: seconds of each rank's own work.
    """
    found = []
    for rank, seconds in enumerate(own):
        others = [*own[:rank], *own[rank + 1 :]]
        median = statistics.median(others) if others else 0.0
        if median > 0.0 and seconds > (1.0 + limit) * median:
            found.append(Straggler(rank, seconds / median - 1.0, seconds, median))
    return found


@dataclass(frozen=True)
class Steps:
    """What the ranks' blocks tell.

    seconds: of each step of rank 0; the reduction keeps the ranks in step. own: seconds of each
    rank's own work in a step, the median over the blocks; None where the device cannot tell.
    work: of all updates; its parts are medians over the blocks.
    """

    seconds: list[float]
    own: list[float] | None
    work: Work

    @classmethod
    def of(cls, ranks: Sequence[Sequence[Mapping]]) -> Steps:
        """ranks: the blocks of each rank, as JSON."""
        first = ranks[0]
        own = None
        if all(block["own"] is not None for blocks in ranks for block in blocks):
            own = [statistics.median(block["own"] for block in blocks) for blocks in ranks]
        parts = None
        if all(block["parts"] is not None for block in first):
            parts = {
                name: statistics.median(block["parts"][name] for block in first)
                for name in PARTS
                if name in first[0]["parts"]
            }
        seconds = [one for block in first for one in block["seconds"]]
        work = Work(
            len(seconds),
            sum(block["tokens"] for block in first),
            sum(block["flops"] for block in first),
            max((block["peak_memory"] or 0 for block in first), default=0) or None,
            parts,
        )
        return cls(seconds, own, work)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """How far the middle 80% of the steps reach, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        lower, *_, upper = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return (upper - lower) / self.median

    def figures(self, sequences: int, matrix_rate: float | None) -> dict[str, object]:
        """As JSON: the speed at the median step, and the times of the steps.

        sequences: of a step, over all ranks. matrix_rate: floating-point operations a second of
        all ranks, to compare with.
        """
        updates = len(self.seconds)
        speed = Speed.of(self.work, updates * sequences, updates * self.median, matrix_rate)
        return {
            "sequences/s": sequences / self.median,
            **speed.named(),
            "updates": updates,
            "step_seconds_median": self.median,
            "step_seconds_min": min(self.seconds),
            "step_seconds_max": max(self.seconds),
            "step_spread_share": self.spread,
            **({} if self.own is None else {"rank_own_seconds": self.own}),
        }


def throughputs(steps: Steps, sequences: int, evaluation: float) -> dict[str, float]:
    """FlagPerf's three, in sequences a second over all ranks.

    p_train: of all updates. p_core: without the waiting for batches. p_whole: with evaluations as
    MLPerf asks for them, EVALUATED sequences after each TRAINED ones, at the rate `evaluation`.
    """
    total = sum(steps.seconds)
    trained = len(steps.seconds) * sequences
    found = {"p_train": trained / total}
    found["p_whole"] = TRAINED / (TRAINED / found["p_train"] + EVALUATED / evaluation)
    if steps.work.seconds is not None:
        waited = len(steps.seconds) * steps.work.seconds["data"]
        found["p_core"] = trained / max(total - waited, 1e-9)
    return found
