"""Batches with a reserve: what cannot be read is tried again, and then stops the run."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training import feed
from bert_pretraining.training.feed import Feed

BAD = UserError("part_7: not a readable HDF5 file", "copy it again")
AWAY = OSError(errno.ESTALE, "Stale file handle", "part_7")


class Source:
    """Numbers in the place of batches; reading number `bad` fails the first `times` times."""

    def __init__(self, bad: int = -1, times: int = 0, error: Exception = BAD) -> None:
        self.bad, self.times, self.error = bad, times, error
        self.starts: list[int] = []

    def __call__(self, first: int) -> Iterator[int]:
        self.starts.append(first)
        number = first
        while True:
            if number == self.bad and self.times:
                self.times -= 1
                raise self.error
            yield number
            number += 1


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SECONDS_TO_RETRY", 0.0)


def take(batches: Iterator, count: int) -> list:
    return [next(batches) for _ in range(count)]


def test_without_an_error_every_batch_comes_once() -> None:
    source, stop = Source(), StopRequest()
    assert take(iter(Feed(source, 3, stop)), 6) == [0, 1, 2, 3, 4, 5]
    assert source.starts == [0]
    assert not stop.asked


@pytest.mark.parametrize("error", [BAD, AWAY])
@pytest.mark.parametrize("bad", [0, 7])
def test_what_can_be_read_the_second_time_stops_nothing(
    bad: int, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    source, stop = Source(bad, 1, error), StopRequest()
    assert take(iter(Feed(source, 3, stop, rank=2)), 12) == list(range(12))
    assert source.starts == [0, bad]
    assert not stop.asked
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Notice: rank 2: {getattr(error, 'problem', error)}; trying again in 0 s"


def test_another_batch_gets_another_try() -> None:
    source, stop = Source(4, 1), StopRequest()
    batches = iter(Feed(source, 1, stop))
    assert take(batches, 6) == list(range(6))
    source.bad, source.times = 9, 1
    assert take(batches, 6) == list(range(6, 12))
    assert not stop.asked


def test_after_the_second_failure_the_reserve_is_left() -> None:
    """Batch 7 is bad: the run is to stop as soon as 4, 5 and 6 are the reserve."""
    source, stop = Source(7, 2), StopRequest()
    batches = iter(Feed(source, 3, stop))
    assert take(batches, 4) == [0, 1, 2, 3]
    assert not stop.asked
    assert take(batches, 3) == [4, 5, 6]
    assert stop.asked
    assert str(stop.failure) == (
        "part_7: not a readable HDF5 file; copy it again, then go on with --resume auto"
    )
    with pytest.raises(UserError, match="part_7"):
        next(batches)


@pytest.mark.parametrize("bad", [0, 2])
def test_before_the_first_batch_there_is_nothing_to_save(bad: int) -> None:
    stop = StopRequest()
    with pytest.raises(UserError, match="part_7: not a readable"):
        next(iter(Feed(Source(bad, 2), 3, stop)))
    assert stop.failure is None


def test_an_error_of_the_system_names_the_file() -> None:
    stop = StopRequest()
    take(iter(Feed(Source(7, 2, AWAY), 3, stop)), 6)
    assert isinstance(stop.failure, UserError)
    assert "Stale file handle: 'part_7'" in str(stop.failure)


def test_a_defect_stops_the_run_too_and_keeps_its_traceback() -> None:
    source, stop = Source(7, 1, ZeroDivisionError("of the packer")), StopRequest()
    take(iter(Feed(source, 3, stop)), 6)
    assert source.starts == [0]
    assert isinstance(stop.failure, TrainingError)
    assert "ZeroDivisionError: of the packer" in str(stop.failure)
    assert stop.failure.detail.startswith("Traceback")
