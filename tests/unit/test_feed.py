"""Batches with a reserve: what cannot be read is tried again, and then stops the run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.data.shards import read_listed, read_shard, write_shard
from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime.file_kind import may_come_back
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training import feed
from bert_pretraining.training.feed import Feed
from helpers import padded_arrays

BAD = UserError("part_7: the disk failed to read it", "copy it again")
BAD.__cause__ = OSError(errno.EIO, "Input/output error")
WRONG = UserError("part_7: no dataset 'input_ids'", "make the shard again")
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
        "part_7: the disk failed to read it; see that its folder and disk are there, then go on "
        "with --resume auto"
    )
    with pytest.raises(UserError, match="part_7"):
        next(batches)


@pytest.mark.parametrize("bad", [0, 2])
def test_before_the_first_batch_there_is_nothing_to_save(bad: int) -> None:
    stop = StopRequest()
    with pytest.raises(UserError, match="part_7: the disk"):
        next(iter(Feed(Source(bad, 2), 3, stop)))
    assert stop.failure is None


def test_wrong_content_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    source, stop = Source(7, 1, WRONG), StopRequest()
    assert take(iter(Feed(source, 3, stop)), 7) == list(range(7))
    assert source.starts == [0]
    assert str(stop.failure) == (
        "part_7: no dataset 'input_ids'; make the shard again, then go on with --resume auto"
    )
    assert capsys.readouterr().err == ""


def test_which_shards_may_come_back(tmp_path: Path) -> None:
    """By what the reader raises for real files."""
    path = tmp_path / "part.hdf5"
    write_shard(path, padded_arrays([9, 9], 16, 90, 1))
    content = path.read_bytes()

    def error() -> UserError:
        with pytest.raises(UserError) as caught:
            read_shard(path, 90)
        return caught.value

    path.unlink()
    assert may_come_back(error())
    for length in (50, len(content) // 2, len(content) - 1):  # as while it is copied
        path.write_bytes(content[:length])
        assert may_come_back(error())
    for wrong in (b"no HDF5 file" * 100, b"abcd" + content[4:], content[:2000] + bytes(99_999)):
        path.write_bytes(wrong)
        assert not may_come_back(error())
    with h5py.File(path, "w") as file:
        file["input_ids"] = [[0.5]]
    assert not may_come_back(error())
    write_shard(path, padded_arrays([9, 9], 16, 90, 1))
    with pytest.raises(UserError, match="vocab") as caught:
        read_shard(path, 5)
    assert not may_come_back(caught.value)
    with pytest.raises(UserError, match="has 2 sequences now, and had 3") as caught:
        read_listed(ShardInfo(path, 3, 16), 90)
    assert not may_come_back(caught.value)


@pytest.mark.parametrize("kind", [OSError, RuntimeError, KeyError])
def test_a_disk_that_fails_inside_a_shard_may_come_back(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H5py raises each of these for a failed read, depending on what it reads of the file."""
    path = tmp_path / "part.hdf5"
    write_shard(path, padded_arrays([9, 9], 16, 90, 1))

    def fail(file: h5py.File, name: str) -> None:
        raise kind("Unable to synchronously open object (file read failed: ..., errno = 5, ...)")

    monkeypatch.setattr(h5py.File, "__getitem__", fail)
    with pytest.raises(UserError, match=r"cannot read .*part.hdf5: .*errno 5") as caught:
        read_shard(path, 90)
    assert may_come_back(caught.value)


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
