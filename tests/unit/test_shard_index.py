"""The index beside many shards, and the reading of many headers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.data import headers, shard_index, shards
from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.data.shard_names import INDEX_NAME, shard_folder
from bert_pretraining.data.shards import inspect_shard, list_shards, read_listed, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import files
from helpers import padded_arrays

VOCAB = 90
OLD = 10**18  # nanoseconds since 1970: in 2001
Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of 1, 2 and 3 sequences, written long ago; they count as many."""
    monkeypatch.setattr(shard_index, "FEWEST", 3)
    for number in range(3):
        path = tmp_path / f"part_{number}.hdf5"
        write_shard(path, padded_arrays([9] * (number + 1), 16, VOCAB, number))
        os.utime(path, ns=(OLD, OLD))
    return tmp_path


def sequences(folder: Path, said: list[str] | None = None) -> list[int]:
    say = None if said is None else said.append
    return [info.num_sequences for info in list_shards(folder, say=say)]


def lose_content(folder: Path) -> None:
    """Make the shards unreadable, with the size and time that they had."""
    for path in folder.glob("part*"):
        size = path.stat().st_size
        path.write_bytes(bytes(size))
        os.utime(path, ns=(OLD, OLD))


def stored(folder: Path) -> dict:
    return json.loads((folder / INDEX_NAME).read_text())


def test_a_second_start_opens_no_shard(folder: Path) -> None:
    first = list_shards(folder)
    lose_content(folder)
    said: list[str] = []
    assert list_shards(folder, say=said.append) == first
    assert [info.num_sequences for info in first] == [1, 2, 3]
    assert said == []
    with pytest.raises(UserError, match=r"part_0\.hdf5"):
        read_listed(first[0], VOCAB)


def test_few_shards_leave_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "FEWEST", 4)
    assert sequences(folder) == [1, 2, 3]
    assert not (folder / INDEX_NAME).exists()


def replace(folder: Path, count: int, changed: int) -> None:
    write_shard(folder / "part_1.hdf5", padded_arrays([9] * count, 16, VOCAB, 1))
    os.utime(folder / "part_1.hdf5", ns=(changed, changed))


def add(folder: Path) -> None:
    write_shard(folder / "part_3.hdf5", padded_arrays([9] * 7, 16, VOCAB, 1))
    os.utime(folder / "part_3.hdf5", ns=(OLD, OLD))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: replace(folder, 70, OLD), [1, 70, 3]),
        (lambda folder: replace(folder, 4, OLD + 1), [1, 4, 3]),
        (lambda folder: replace(folder, 4, OLD - 1), [1, 4, 3]),
        (add, [1, 2, 3, 7]),
        (lambda folder: write_shard(folder / "part_4.hdf5", padded_arrays([9], 16, VOCAB, 4)),
         [1, 2, 3, 1]),
    ],
)  # fmt: skip
def test_what_changed_is_read_again_and_kept(
    folder: Path, change: Spoil, expected: list[int]
) -> None:
    sequences(folder)
    change(folder)
    assert sequences(folder) == expected
    assert [entry[2] for entry in stored(folder)["shards"].values()] == expected


def test_a_shard_that_is_gone_is_not_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences(folder)
    (folder / "part_0.hdf5").unlink()
    monkeypatch.setattr(shard_index, "FEWEST", 2)
    assert sequences(folder) == [2, 3]


def test_a_shard_that_changed_as_the_index_was_written_is_read_again(folder: Path) -> None:
    """It may have changed once more within one tick of the file system's clock."""
    sequences(folder)
    written = OLD + 2 * 10**9
    os.utime(folder / INDEX_NAME, ns=(written, written))
    lose_content(folder)
    with pytest.raises(UserError, match=r"part_0\.hdf5"):
        sequences(folder)
    os.utime(folder / INDEX_NAME, ns=(written + 1, written + 1))
    assert sequences(folder) == [1, 2, 3]


def test_another_shard_of_equal_size_and_time_is_found_when_it_is_read(folder: Path) -> None:
    sequences(folder)
    size = (folder / "part_1.hdf5").stat().st_size
    replace(folder, 4, OLD)
    assert (folder / "part_1.hdf5").stat().st_size == size
    infos = list_shards(folder)
    with pytest.raises(
        UserError, match=r"part_1\.hdf5: it has 4 sequences now, and had 2"
    ) as caught:
        read_listed(infos[1], VOCAB)
    assert f"if it fails in the same way, delete {INDEX_NAME} " in caught.value.fix
    counts = {f"part_{number}.hdf5": count for number, count in enumerate((1, 4, 3))}
    assert shard_index.contradictions(folder, counts) == ["part_1.hdf5"]
    (folder / INDEX_NAME).unlink()
    assert sequences(folder) == [1, 4, 3]
    assert shard_index.contradictions(folder, counts) == []


def entry(*values: object) -> Spoil:
    """An index that says this of the first shard, and the truth of the others."""

    def spoil(folder: Path) -> None:
        content = stored(folder)
        content["shards"]["part_0.hdf5"] = list(values)
        (folder / INDEX_NAME).write_text(json.dumps(content))

    return spoil


def text(content: str) -> Spoil:
    return lambda folder: (folder / INDEX_NAME).write_text(content)


def in_place(make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / INDEX_NAME).unlink()
        make(folder / INDEX_NAME)

    return spoil


def of_another_version(folder: Path) -> None:
    content = stored(folder)
    for values in content["shards"].values():
        values[2] = 5
    (folder / INDEX_NAME).write_text(json.dumps({**content, "version": 2}))


def first_size(folder: Path) -> int:
    return (folder / "part_0.hdf5").stat().st_size


SPOILT: dict[str, Spoil] = {
    "no JSON": text("not JSON"),
    "cut": lambda folder: os.truncate(folder / INDEX_NAME, 100),
    "bytes": lambda folder: (folder / INDEX_NAME).write_bytes(b"\xff\x00" * 50),
    "a list": text("[]"),
    "a number": text("7"),
    "no shards": text('{"version": 1}'),
    "shards in a list": text('{"version": 1, "shards": []}'),
    "deep": text("[" * 3000),
    "long": lambda folder: os.truncate(folder / INDEX_NAME, 2**40),
    "other version": of_another_version,
    "too few values": entry(1, 2),
    "too many values": lambda folder: entry(first_size(folder), OLD, 1, 16, [], 1)(folder),
    "no list": lambda folder: entry(first_size(folder), OLD, 1, 16, {})(folder),
    "negative": lambda folder: entry(first_size(folder), OLD, -1, 16, [])(folder),
    "a truth value": lambda folder: entry(first_size(folder), OLD, True, 16, [])(folder),
    "a fraction": lambda folder: entry(first_size(folder), OLD, 1.0, 16, [])(folder),
    "a text": lambda folder: entry(first_size(folder), OLD, "1", 16, [])(folder),
    "a length that is a text": lambda folder: entry(first_size(folder), OLD, 1, "16", [])(folder),
    "huge": lambda folder: entry(first_size(folder), OLD, 10**30, 16, [])(folder),
    "control characters": lambda folder: entry(first_size(folder), OLD, 1, 16, ["\x1b[2J"])(folder),
    "a time that is a text": lambda folder: entry(first_size(folder), "now", 1, 16, [])(folder),
    "other bytes": entry(1, OLD, 1, 16, []),
    "a pipe": in_place(os.mkfifo),
    "a link to nothing": in_place(lambda path: path.symlink_to("absent")),
    "a link to itself": in_place(lambda path: path.symlink_to(path.name)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_an_index_that_is_none_counts_as_absent_and_is_made_again(
    folder: Path, spoil: Spoil
) -> None:
    expected = list_shards(folder)
    spoil(folder)
    assert list_shards(folder) == expected
    assert [found[2:] for found in stored(folder)["shards"].values()] == [
        [1, 16, []], [2, 16, []], [3, 16, []],
    ]  # fmt: skip
    assert not (folder / INDEX_NAME).is_symlink()


def test_names_of_other_folders_are_never_looked_at(folder: Path) -> None:
    sequences(folder)
    content = stored(folder)
    content["shards"]["../part_9.hdf5"] = [0, 0, 0, 16, []]
    content["shards"]["/dev/zero"] = [0, 0, 0, 16, []]
    (folder / INDEX_NAME).write_text(json.dumps(content))
    lose_content(folder)
    assert sequences(folder) == [1, 2, 3]


def test_where_it_cannot_be_written_the_run_goes_on_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    (folder / INDEX_NAME).mkdir()
    assert sequences(folder, said) == [1, 2, 3]
    (line,) = said
    assert line == (
        f"Notice: {folder / INDEX_NAME} cannot be written (Is a directory): each start reads the "
        "headers of 3 shards, until a user who may write there starts a run"
    )
    (folder / INDEX_NAME).rmdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_whole", full)
    said.clear()
    assert sequences(folder, said) == [1, 2, 3]
    assert "(No space left on device)" in said[0]
    assert sorted(path.name for path in folder.iterdir()) == [f"part_{n}.hdf5" for n in range(3)]


def test_whoever_may_read_the_shards_may_read_the_index(folder: Path) -> None:
    (folder / "part_0.hdf5").chmod(0o640)
    sequences(folder)
    assert (folder / INDEX_NAME).stat().st_mode & 0o777 == 0o640


def test_the_index_is_no_part_of_the_data_set(folder: Path) -> None:
    sequences(folder)
    (folder / f"{INDEX_NAME}-other-host-12.partial").touch()  # another run writes it just now
    found = shard_folder(folder, "")
    assert (len(found.shards), found.unread, found.unfinished) == (3, [], [])
    assert shard_folder(folder, "", "*").names == found.names


def test_a_pattern_below_the_folder_is_indexed_too(folder: Path) -> None:
    for number in range(3):
        below = folder / f"d{number}"
        below.mkdir()
        (folder / f"part_{number}.hdf5").rename(below / "x.h5")
    first = list_shards(folder, "*/*.h5")
    for path in folder.glob("*/*.h5"):
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(OLD, OLD))
    assert list_shards(folder, "*/*.h5") == first


# ---- many headers at once


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few headers there are, processes read them at once."""
    monkeypatch.setattr(headers, "PROCESSES", 2)
    monkeypatch.setattr(headers, "FEW", 0)
    monkeypatch.setattr(headers, "SECONDS_HERE", 0.0)


def never(path: Path) -> None:
    raise AssertionError(f"{path} was read in this process")


def test_processes_read_the_same_in_the_same_order(folder: Path, in_processes: None) -> None:
    paths = sorted(folder.iterdir())
    expected = [inspect_shard(path) for path in paths]
    assert headers.read_headers(paths, never) == expected
    assert list_shards(folder) == expected


class Clock:
    """A clock that each reading of a header moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self._seconds = 0.0, seconds
        self.read: list[str] = []
        monkeypatch.setattr(headers, "monotonic", lambda: self.now)

    def inspect(self, path: Path) -> ShardInfo:
        self.now += self._seconds
        self.read.append(path.name)
        return inspect_shard(path)


@pytest.mark.parametrize(
    ("seconds", "few", "here"),
    [(0.1, 2, 3), (0.6, 1, 2), (0.6, 2, 3), (1.5, 2, 1), (1.5, 3, 3)],
    ids=["a fast disk", "one is left", "few are left", "a slow disk", "few from the start"],
)
def test_processes_begin_where_reading_here_takes_long(
    folder: Path, seconds: float, few: int, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(folder.iterdir())
    expected = [inspect_shard(path) for path in paths]
    monkeypatch.setattr(headers, "FEW", few)
    clock = Clock(monkeypatch, seconds)
    assert headers.read_headers(paths, clock.inspect) == expected
    assert clock.read == [path.name for path in paths[:here]]


def test_many_headers_are_not_tried_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "FEW", 2)
    monkeypatch.setattr(headers, "MANY", 3)
    paths = sorted(folder.iterdir())
    assert len(headers.read_headers(paths, never)) == 3


def test_few_shards_use_processes_too_where_it_takes_long(
    folder: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "FEWEST", 4)
    monkeypatch.setattr(shards, "inspect_shard", never)
    assert sequences(folder) == [1, 2, 3]
    assert not (folder / INDEX_NAME).exists()


def test_the_first_damaged_shard_is_named(folder: Path, in_processes: None) -> None:
    for name in ("part_1.hdf5", "part_2.hdf5"):
        (folder / name).write_text("text")
    with pytest.raises(UserError) as here:
        inspect_shard(folder / "part_1.hdf5")
    with pytest.raises(UserError) as caught:
        list_shards(folder)
    assert (caught.value.problem, caught.value.fix) == (here.value.problem, here.value.fix)
    assert "part_1.hdf5" in caught.value.problem
    assert not (folder / INDEX_NAME).exists()


def test_odd_bytes_of_a_library_are_no_error(
    folder: Path, in_processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library below Python may print the name of a file as it is."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nprintf 'cannot read \\377\\n' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    said: list[str] = []
    assert sequences(folder, said) == [1, 2, 3]
    assert said[0].endswith("have failed (cannot read \ufffd)")


def test_without_processes_the_headers_are_read_here(
    folder: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "READER", "bert_pretraining.no_such_module")
    said: list[str] = []
    assert sequences(folder, said) == [1, 2, 3]
    (line,) = said
    assert line.startswith("Notice: the headers of 3 shards are read one after the other, because")
    assert "No module named bert_pretraining.no_such_module" in line
