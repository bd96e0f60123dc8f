"""Which rank is said to hold up the others, and where the logs are too slow."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace

import pytest

from bert_pretraining.logs.watch_outputs import SlowOutputs
from bert_pretraining.logs.watch_ranks import Pace, delay_of, text_of_delay
from bert_pretraining.runtime.standstill import Standstill


def steps_until_named(share: float, noise: float, own: float = 1.0, steps: int = 600) -> int | None:
    """After how many logged steps a rank that is slower by `share` is called slow."""
    draw, pace = random.Random(5), Pace()
    for step in range(1, steps + 1):
        pace.logged(own * (1 + share) * draw.uniform(1 - noise, 1 + noise), own)
        if pace.excess():
            return step
    return None


@pytest.mark.parametrize(
    ("share", "noise", "expected"),
    [
        (0.25, 0.01, 20),
        (0.2, 0.4, 100),  # steps differ by more than the ranks do: only many steps tell
        (0.09, 0.01, None),
        (0.0, 0.9, None),
    ],
)
def test_a_slow_rank_is_told_from_chance(share: float, noise: float, expected: int | None) -> None:
    assert steps_until_named(share, noise) == expected


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_of_two_equal_ranks_whose_steps_differ_by_chance_none_is_slow(seed: int) -> None:
    draw, paces = random.Random(seed), (Pace(), Pace())
    for _ in range(600):
        first, second = draw.lognormvariate(0.0, 0.5), draw.lognormvariate(0.0, 0.5)
        paces[0].logged(first, second)
        paces[1].logged(second, first)
        assert [pace.excess() for pace in paces] == [0.0, 0.0]


def test_a_rank_that_is_slow_for_moments_is_not_called_slow() -> None:
    assert steps_until_named(0.25, 0.0, own=0.01, steps=500) is None, "5 s of its work"
    assert steps_until_named(0.25, 0.0, own=0.1, steps=500) == 80, "10 s of its work"
    assert steps_until_named(9.0, 0.0, own=0.04, steps=40) == 25, "10 s of its work"


@pytest.mark.parametrize("own", [0.005, 0.019])
def test_a_slow_rank_is_named_however_short_its_steps_are(own: float) -> None:
    """Also where 10 s of its work are more logged steps than are kept."""
    named = steps_until_named(0.25, 0.0, own=own, steps=2000)
    assert named is not None and 10.0 <= named * 1.25 * own <= 10.3
    assert steps_until_named(0.0, 0.5, own=own, steps=2000) is None


def test_one_long_step_makes_no_slow_rank() -> None:
    pace = Pace()
    for step in range(200):
        pace.logged(50.0 if step == 50 else 1.0, 1.0)
        assert pace.excess() == 0.0


def test_a_slow_rank_says_who_it_is_and_by_how_much() -> None:
    pace = Pace()
    for _ in range(20):
        pace.logged(1.25, 1.0)
    assert pace.text("rank 5 (gpu07)").startswith(
        "rank 5 (gpu07) is 25% slower than the other ranks are on average, over the last logged "
        "steps (1.25 s of its own work a step, 1 s there), and all ranks wait for it: look at"
    )


@pytest.mark.parametrize(
    ("standstill", "data", "computing", "expected"),
    [
        (0.3, 0.3, 0.5, None),
        (5.0, 0.1, 5.5, (5.0, "standstill")),  # the pass was long because the process stood still
        (5.0, 0.1, 0.5, (5.0, "standstill")),  # while it waited for the others
        (0.3, 5.0, 0.5, (4.9, "data")),
        (0.3, 0.1, 6.5, (6.0, "forward_backward")),
        (3.0, 8.0, 0.5, (7.9, "data")),
        (0.0, 1.9, 0.5, None),
    ],
)
def test_what_a_rank_was_delayed_by(
    standstill: float, data: float, computing: float, expected: tuple[float, str] | None
) -> None:
    longest = {"data": data, "forward_backward": computing}
    found = delay_of(standstill, longest, {"data": 0.1, "forward_backward": 0.5})
    assert found == (expected and (pytest.approx(expected[0]), expected[1]))


def test_updates_that_differ_by_nature_are_no_delay() -> None:
    assert delay_of(0.0, {"forward_backward": 25.0}, {"forward_backward": 10.0}) is None


def test_the_line_of_a_delay() -> None:
    delay = delay_of(5.2, {}, {})
    line = text_of_delay(delay, "rank 3 (gpu07)", 101, 110, 1)
    assert line.startswith("rank 3 (gpu07) held up all ranks for 5 s in steps 101 to 110: its pro")
    assert " in step 7, and 2 other ranks for less: " in text_of_delay(delay, "rank 3", 7, 7, 3)


def test_a_thread_finds_that_the_process_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    standstill = Standstill()
    now[0] += 5.25
    assert standstill.take() == 5.0, "also where the caller is the first to look"
    now[0] += 0.2
    assert standstill.take() <= 0.0


def test_what_was_before_the_thread_began_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    standstill = Standstill()
    now[0] += 60.0
    standstill.start()
    assert standstill.take() <= 0.0


def written(
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[float],
    between: float = 1.0,
    evaluated: float | None = None,
) -> list[str]:
    """What is told of logged steps, `between` seconds each, whose line took so many seconds.

    evaluated: seconds that writing took in an evaluation before these steps, if there was one.
    """
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = SimpleNamespace(name="/runs/perflog.txt", seconds=0.0)
    outputs = SlowOutputs([SimpleNamespace(name="stdout", seconds=0.0), file])
    told = list(outputs.logged())
    if evaluated is not None:
        file.seconds += evaluated
        outputs.count_anew()
    for one in seconds:
        now[0] += between
        file.seconds += one
        told += outputs.logged()
    return told


def test_slow_log_files_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, [0.09] * 20) == []
    assert written(monkeypatch, [0.04] * 20, between=0.1) == [], "a fast step, and a fast disk"
    assert written(monkeypatch, [0.2] * 4) == []
    (line,) = written(monkeypatch, [0.2] * 5)
    assert line.startswith(
        "writing the logs of a step took 0.2 s of 1 s between two logged steps, 0.2 s of it for "
        "/runs/perflog.txt, and all ranks wait meanwhile: pass a larger --log_freq"
    )


def test_a_log_that_stops_once_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = written(monkeypatch, [0.0, 5.0], between=6.0)
    assert line.startswith("writing the logs of a step took 5 s of 6 s between")


def test_a_log_that_stops_after_an_evaluation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, [0.0] * 5, evaluated=3.0) == [], "in the evaluation itself"
    (line,) = written(monkeypatch, [2.9], between=3.0, evaluated=3.0)
    assert line.startswith("writing the logs of a step took 2.9 s of 3 s between")
