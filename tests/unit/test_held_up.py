"""All ranks agree on which one holds up the others, and only that one is named."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from bert_pretraining.logs.sinks import OWN_PARTS, Work
from bert_pretraining.model.flops import NOTHING
from bert_pretraining.runtime import agreement
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.standstill import Standstill
from bert_pretraining.training.held_up import MOST_DELAYS, HeldUp
from bert_pretraining.training.step_clock import StepClock, Tally

CPU = torch.device("cpu")
USUAL = {
    "standstill": 0.0,
    "data": 0.0,
    "forward_backward": 0.8,
    "reduction": 0.1,
    "optimizer": 0.2,
}


class Exchange:
    """Collectives between the threads of a test, one for each rank."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=600)
        self._given: dict[int, object] = {}
        self.own = threading.local()

    def all(self, given: object) -> list:
        """What all ranks give, in the order of ranks."""
        self._given[self.own.rank] = given
        self._barrier.wait()
        found = [self._given[rank] for rank in sorted(self._given)]
        self._barrier.wait()
        return found

    def largest_of(
        self, values: Sequence[float], device: torch.device
    ) -> tuple[list[float], list[int], list[int]]:
        columns = list(zip(*self.all(values), strict=True))
        most = [max(column) for column in columns]
        who = [column.index(max(column)) for column in columns]
        return most, who, [sum(value > 0 for value in column) for column in columns]

    def from_rank(self, rank: int, text: str) -> str:
        return self.all(text)[rank]


def notices(
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    seconds: list[dict[int, dict[str, float]]],
    optimizer_waits: bool = False,
) -> list[tuple[str, str]]:
    """What rank 0 of 4 is told in so many logged steps, one update each.

    seconds: by step (0 is the first) and rank, the parts that take other than the usual seconds.
    "standstill" is the process's.
    """
    exchange = Exchange(4)
    monkeypatch.setattr(agreement, "largest_of", exchange.largest_of)
    monkeypatch.setattr(agreement, "from_rank", exchange.from_rank)
    monkeypatch.setattr(Standstill, "take", lambda _: exchange.own.standstill)
    told: list[list[tuple[str, str]]] = [[] for _ in range(4)]

    def of(step: int, rank: int) -> dict[str, float]:
        changed = seconds[step] if step < len(seconds) else {}
        return {**USUAL, **changed.get(rank, {})}

    def run(rank: int) -> None:
        exchange.own.rank = rank
        clock = StepClock(CPU)
        held_up = HeldUp(
            clock, Ranks(rank, 4, CPU), lambda *one: told[rank].append(one), optimizer_waits
        )
        for step in range(steps):
            parts = of(step, rank)
            exchange.own.standstill = parts.pop("standstill")
            monkeypatch.setattr(clock, "take_longest", lambda parts=parts: parts)
            tally = Tally(1, NOTHING, parts)
            clock.whole.add(tally)
            mean = {part: sum(of(step, one)[part] for one in range(4)) / 4 for part in parts}
            held_up.logged(step + 1, tally, Work(1, 1, 1.0, None, mean))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert told[1:] == [told[0]] * 3, "all ranks are told the same"
    return told[0]


def standing_still() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "standstill"]


def test_the_thread_that_looks_at_the_clock_ends_with_the_training() -> None:
    held_up = HeldUp(StepClock(CPU), Ranks(0, 2, CPU), lambda *_: None)
    held_up.begin()
    assert standing_still() == ["standstill"]
    held_up.end()
    assert standing_still() == []
    alone = HeldUp(StepClock(CPU), Ranks(0, 1, CPU), lambda *_: None)
    alone.begin()
    alone.end()  # it has no thread


def test_a_slow_rank_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [{2: {"forward_backward": 1.0}}] * 60
    ((kind, text),) = notices(monkeypatch, 60, slow)
    assert kind == "straggler"
    assert text.startswith("rank 2 (")
    assert "is 20% slower than the other ranks" in text
    assert set(OWN_PARTS) < set(USUAL)


def test_a_rank_that_reads_slowly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ((kind, text),) = notices(monkeypatch, 30, [{3: {"data": 0.5}}] * 30)
    assert (kind, text[:8]) == ("straggler", "rank 3 (")


def test_of_equal_ranks_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notices(monkeypatch, 40, []) == []
    # The others wait for a slow reduction, and no rank's own work is longer.
    assert notices(monkeypatch, 40, [{1: {"reduction": 9.0}}] * 40) == []


def test_a_rank_that_holds_up_the_others_once_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[dict[int, dict[str, float]]] = [{} for _ in range(30)]
    seconds[9] = {1: {"data": 5.0}, 2: {"data": 3.8}}
    seconds[14] = {1: {"data": 6.0}}  # less than twice as long: told before
    seconds[19] = {1: {"data": 12.0}}
    found = notices(monkeypatch, 30, seconds)
    assert [kind for kind, _ in found] == ["rank_delayed"] * 2
    assert (
        "held up all ranks for 5 s in step 10, and another rank for less: it waited" in found[0][1]
    )
    assert "rank 1 (" in found[1][1]
    assert "for 11 s in step 20: " in found[1][1]


def test_what_all_ranks_do_in_the_first_steps_is_no_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = [{rank: {"standstill": 60.0} for rank in range(4)}] * 2
    assert notices(monkeypatch, 1, stopped) == []
    ((kind, text),) = notices(monkeypatch, 2, stopped)
    assert kind == "rank_delayed"
    assert "held up all ranks for 60 s in step 2, and 3 other ranks for less: its process" in text


def test_ranks_that_wait_for_one_that_stood_still_are_not_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo may make them wait in their backward pass, and a sharded optimizer in its step."""
    seconds: list[dict[int, dict[str, float]]] = [{} for _ in range(30)]
    waiting: dict[str, float] = {"optimizer": 5.3}
    seconds[9] = {0: waiting, 1: waiting, 2: {"standstill": 4.8}, 3: {"forward_backward": 5.9}}
    seconds[19] = {0: waiting, 1: waiting, 2: {"standstill": 5.1}, 3: waiting}  # told before
    seconds[29] = {0: {"forward_backward": 40.0}, 2: {"standstill": 5.1}}
    found = [text for _, text in notices(monkeypatch, 30, seconds)]
    assert len(found) == 2
    assert found[0].startswith("rank 2 (")
    assert "held up all ranks for 5 s in step 10: its process stood still" in found[0]
    assert found[1].startswith("rank 0 (")
    assert "held up all ranks for 39 s in step 30: its forward and backward pass" in found[1]


def test_an_optimizer_in_which_all_wait_tells_nothing_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds: list[dict[int, dict[str, float]]] = [{} for _ in range(10)]
    seconds[9] = {rank: {"optimizer": 9.0} for rank in range(4)}
    assert len(notices(monkeypatch, 10, seconds)) == 1
    assert notices(monkeypatch, 10, seconds, optimizer_waits=True) == []


def test_the_number_of_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [{step % 4: {"data": 3.0 * 2.1**step}} for step in range(2, 60)]
    found = notices(monkeypatch, 60, [{}, {}, *seconds])
    assert sum(kind == "rank_delayed" for kind, _ in found) == MOST_DELAYS
