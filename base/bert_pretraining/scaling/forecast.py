"""The rows of a plan: what each number of ranks gives, and where more ranks stop paying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bert_pretraining.scaling.messages import Memory, Messages
from bert_pretraining.scaling.step import BACKWARD, Asked, Step, step_of
from bert_pretraining.scaling.training_run import Targets, TrainingRun, run_of

# Of the ranks that are added, at least so much must be won, or they do not pay.
LEAST_MARGINAL = 0.5


@dataclass(frozen=True)
class Problem:
    """What is planned.

    batch: sequences of a rank's micro-batch, as configured. messages: by the
    number of ranks and how they share the optimizer's state. memory: by the number of ranks.
    evaluated: sequences of an evaluation. evaluation_batch: of them, in one pass of a rank.
    can_shard: whether the optimizer can share its state.
    """

    asked: Asked
    batch: int
    messages: Callable[[int, str], Messages]
    memory: Callable[[int], Memory]
    targets: Targets
    evaluated: int
    evaluation_batch: int
    can_shard: bool = True

    def messages_at(self, ranks: int) -> Messages:
        """Those of the sharing that is asked for."""
        return self.messages(ranks, self.asked.sharing)

    def global_batch(self, ranks: int, batch: int) -> int:
        """Sequences of an update."""
        return ranks * batch * self.asked.accumulation


@dataclass(frozen=True)
class Row:
    """What a number of ranks gives. batch: of a rank's micro-batch, at most that configured.

    efficiency: sequences a second of a rank, by those of the first row. run: None where no
    reference point tells the sequences to the target.
    """

    ranks: int
    batch: int
    global_batch: int
    step: Step
    rate: float
    efficiency: float
    memory: Memory
    run: TrainingRun | None


def row_of(problem: Problem, ranks: int, batch: int, alone: float | None = None) -> Row:
    """alone: sequences a second of one rank; None where this row is it."""
    step = step_of(problem.asked, problem.messages_at(ranks), ranks, batch)
    size = problem.global_batch(ranks, batch)
    rate = size / step.seconds
    samples = problem.targets.samples(size)
    run = None
    if samples is not None:
        run = run_of(samples, size, step.seconds, evaluation_seconds(problem, ranks))
    memory = problem.memory(ranks)
    return Row(ranks, batch, size, step, rate, rate / ranks / (alone or rate / ranks), memory, run)


def evaluation_seconds(problem: Problem, ranks: int) -> float:
    """Of one evaluation: each rank's sequences and passes, at least the fixed part of a pass."""
    parts = problem.asked.parts
    if parts.includes_evaluation:
        return 0.0
    own = math.ceil(problem.evaluated / ranks)
    passes = math.ceil(own / problem.evaluation_batch)
    fixed = parts.fixed.value * (1.0 - BACKWARD)
    if not parts.evaluation_has_fixed:
        return own * parts.evaluation.value + passes * fixed
    return max(own * parts.evaluation.value, fixed)


def allowed_batch(problem: Problem, ranks: int) -> int:
    """The configured batch of a rank, or less where the global batch would pass the largest RCP."""
    largest = problem.targets.largest
    if largest is None:
        return problem.batch
    return max(1, min(problem.batch, largest // (ranks * problem.asked.accumulation)))


def by_ranks(problem: Problem, most: int) -> list[Row]:
    """One row for each of `counts_of`; the batch of a rank is the allowed one."""
    counts = counts_of(most, problem.asked.network.machine)
    first = row_of(problem, 1, allowed_batch(problem, 1))
    rest = [row_of(problem, n, allowed_batch(problem, n), first.rate) for n in counts if n > 1]
    return [first, *rest]


def counts_of(most: int, machine: int) -> list[int]:
    """Numbers of ranks: 1, 2, 4, ... ranks of a machine, then 1, 2, 4, ... machines, and `most`."""
    powers = [2**power for power in range(most.bit_length())]
    inside = [ranks for ranks in powers if ranks < machine]
    counts = inside + [machine * machines for machines in powers]
    return [ranks for ranks in counts if ranks < most] + [most]


def by_batch(problem: Problem, ranks: int) -> list[Row]:
    """At so many ranks, each batch of a rank whose global batch is that of a reference point, or
    the nearest ones below and above it up to the largest one, at most the configured batch; small
    ones first."""
    alone = row_of(problem, 1, allowed_batch(problem, 1)).rate
    each = ranks * problem.asked.accumulation
    below = {size // each for size in problem.targets.sizes}
    above = {math.ceil(size / each) for size in problem.targets.sizes}
    most = allowed_batch(problem, ranks)
    sizes = below | {size for size in above if size <= most} | {most}
    return [
        row_of(problem, ranks, size, alone) for size in sorted(sizes) if 1 <= size <= problem.batch
    ]


@dataclass(frozen=True)
class Limit:
    """Where more ranks stop paying. ranks: the last number that pays. why: what the next one
    fails; "" where all pay."""

    ranks: int
    why: str


def limit_of(rows: Sequence[Row]) -> Limit:
    """The first row after which more ranks take more time, or bring less than they should."""
    for row, after in itertools.pairwise(rows):
        if row.run and after.run and after.run.seconds >= row.run.seconds:
            return Limit(row.ranks, f"with {after.ranks:,} the time to the target does not fall")
        if row.run and not after.run:
            return Limit(row.ranks, f"with {after.ranks:,} no RCP allows the batch")
        marginal = (after.rate / row.rate - 1.0) / (after.ranks / row.ranks - 1.0)
        if marginal < LEAST_MARGINAL:
            return Limit(
                row.ranks,
                f"of the ranks added to reach {after.ranks:,}, {marginal:.0%} is won, less than "
                f"{LEAST_MARGINAL:.0%}",
            )
    return Limit(rows[-1].ranks, "")
