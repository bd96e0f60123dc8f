"""Files are written whole, or not at all."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from bert_pretraining.runtime import files
from bert_pretraining.runtime.files import in_threads, write_shared, write_whole


@pytest.mark.parametrize(
    "content", ["caf\u00e9\n", "caf\u00e9\n".encode(), lambda path: path.write_text("caf\u00e9\n")]
)
def test_text_bytes_and_a_function_are_written(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_whole(path, content)
    assert path.read_text(encoding="utf-8") == "caf\u00e9\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the")
        raise kind("disk is full")

    with pytest.raises(kind, match="disk is full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_function_finds_no_rest_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("the rest of a process that was killed")
    write_whole(tmp_path / "file", lambda temporary: temporary.open("x").close())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["text", lambda path: path.write_text("text")])
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path, content: object) -> None:
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_whole(path, content)
    reader.join()
    assert read == ["text"]
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("opened", ["file", "pipe"])
def test_an_open_file_of_this_process_is_written_to(tmp_path: Path, opened: str) -> None:
    """As `--output /dev/stdout` does, whose link would be replaced."""
    with (tmp_path / "file").open("w+b") as file:
        reader, writer = os.pipe()
        descriptor = file.fileno() if opened == "file" else writer
        write_whole(Path(f"/dev/fd/{descriptor}"), "text")
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert (file if opened == "file" else pipe).read() == b"text"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "folder" / "file", "text")


def test_a_shared_file_has_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_shared(path, "old", 0o600)
    write_shared(path, "new", 0o640)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_shared_file_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_shared(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("count", [0, 1, files.THREADS, 3 * files.THREADS + 1])
def test_threads_keep_the_order(count: int) -> None:
    assert in_threads(str, range(count)) == [str(number) for number in range(count)]


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // (number - 70), range(200))


@pytest.mark.parametrize("allowed", [0, 1])
def test_where_no_more_threads_can_be_started_the_others_do_all(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a container's limit of processes."""
    start, left = threading.Thread.start, iter(range(allowed))

    def limited(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)

    def slow(number: int) -> str:  # so that each item of work needs a thread of its own at first
        time.sleep(0.001)
        return str(number)

    assert in_threads(slow, range(200)) == [str(number) for number in range(200)]
