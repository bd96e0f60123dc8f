"""What would help at a number of ranks: rules with bounds, told only where they apply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from bert_pretraining.report.view import duration
from bert_pretraining.runtime.words import counted
from bert_pretraining.scaling import collectives
from bert_pretraining.scaling.forecast import Problem, Row
from bert_pretraining.scaling.step import REPLICATED, SHARDED, Step, step_of
from bert_pretraining.scaling.tables import milliseconds

SMALL_BATCH = 8  # sequences of a rank, at which an unknown fixed part would matter
LAUNCHES = 0.25  # of the computing: the fixed part, from which on it is worth a graph
EXPOSED = 0.10  # of a step: the exchange, from which on it is worth a change
LATENCY = 0.5  # of the exchange: the latencies, from which on fewer hops help
OPTIMIZER = 0.10  # of a step, with a replicated state
EVALUATION = 0.05  # of a run


class Advice(NamedTuple):
    """kind: what to do, the same words at each number of ranks. effect: what that gives, and why,
    as the rest of the sentence."""

    kind: str
    effect: str

    def at(self, ranks: int) -> str:
        """The sentence, without its full stop."""
        return f"At {counted(ranks, 'rank')}, {self.kind} {self.effect}"


def advice_of(problem: Problem, row: Row) -> Iterator[Advice]:
    """One for each rule that applies."""
    step, asked = row.step, problem.asked
    fixed = asked.accumulation * asked.parts.fixed.value
    if step.is_host_bound:
        yield Advice(
            "a step captured as a graph (--use_cuda_graph), or a larger batch a rank,",
            "would keep the device busy: it waits for the host, which queues a micro-batch more "
            "slowly",
        )
    elif fixed > LAUNCHES * step.compute:
        yield Advice(
            "a graph over the whole update",
            f"{_saves(fixed, step)}: {fixed / step.compute:.0%} of the computing does not depend "
            f"on the batch (more than {LAUNCHES:.0%})",
        )
    elif not asked.parts.has_fixed and row.batch <= SMALL_BATCH:
        yield Advice(
            "times of two batch sizes or more",
            "would tell the fixed part of a step: launches may dominate with a batch a rank as "
            f"small as {row.batch}",
        )
    yield from _of_exchange(problem, row)
    yield from _of_a_sharded_state(problem, row)
    yield from _of_a_whole_state(problem, row)
    if row.run and row.run.evaluation_seconds > EVALUATION * row.run.seconds:
        rest = row.run.seconds - row.run.evaluation_seconds
        yield Advice(
            "evaluations beside training, or on other ranks,",
            f"would shorten a run from {duration(row.run.seconds)} to {duration(rest)}",
        )
    largest = problem.targets.largest
    if largest is not None and row.global_batch > largest:
        yield Advice(
            "the global batch",
            f"is {row.global_batch:,} sequences at least, more than the largest RCP, {largest:,}: "
            "take fewer ranks",
        )


def _saves(seconds: float, step: Step) -> str:
    return f"would save up to {milliseconds(seconds)} of a step's {milliseconds(step.seconds)} ms"


def _shortens(step: Step, changed: Step) -> str:
    before, after = milliseconds(step.seconds), milliseconds(changed.seconds)
    return f"would shorten a step from {before} to {after} ms"


def _step(problem: Problem, row: Row, **changes: str) -> Step:
    """The step of a row, with another exchange or sharing."""
    asked = replace(problem.asked, **changes)
    return step_of(asked, problem.messages(row.ranks, asked.sharing), row.ranks, row.batch)


def _of_a_whole_state(problem: Problem, row: Row) -> Iterator[Advice]:
    step = row.step
    if problem.asked.sharing != REPLICATED or not problem.can_shard:
        return
    if step.optimizer <= OPTIMIZER * step.seconds:
        return
    shared = _step(problem, row, sharing=SHARDED)
    if shared.seconds < step.seconds:
        is_refused = problem.asked.exchange in (collectives.TREE, collectives.IN_NETWORK)
        ring = " --exchange ring" if is_refused else ""  # see `inputs.py`
        yield Advice(f"--distributed_lamb{ring}", _shortens(step, shared))


def _of_a_sharded_state(problem: Problem, row: Row) -> Iterator[Advice]:
    if problem.asked.sharing != SHARDED or row.ranks == 1:
        return
    whole = _step(problem, row, sharing=REPLICATED)
    if whole.seconds < (1.0 - EXPOSED) * row.step.seconds:
        yield Advice(
            "--distributed_lamb false", f"{_shortens(row.step, whole)}, if memory allows it"
        )


def _of_exchange(problem: Problem, row: Row) -> Iterator[Advice]:
    step, exchange = row.step, problem.asked.exchange
    shown = step.exposed + step.publish
    if shown <= EXPOSED * step.seconds:
        return
    if not problem.messages_at(row.ranks).overlaps:
        yield Advice(
            "buckets that are sent while backward runs",
            f"{_saves(shown, step)}: backward hides none of the exchange",
        )
        return
    others = [collectives.HIERARCHICAL]
    if problem.asked.sharing == REPLICATED:
        others.append(collectives.IN_NETWORK)
    steps = {one: _step(problem, row, exchange=one) for one in others if one != exchange}
    best = min(steps, key=lambda one: steps[one].seconds, default="")
    if best and steps[best].seconds < step.seconds:
        yield Advice(f"--exchange {best}", _shortens(step, steps[best]))
        return
    why = ""
    if step.latency > LATENCY * (shown + step.hidden):
        why = ", though most of the exchange are latencies"
    yield Advice(
        "a larger batch a rank, faster links, or gradients of fewer bytes",
        f"{_saves(shown, step)}, in which it waits for the exchange{why}",
    )
