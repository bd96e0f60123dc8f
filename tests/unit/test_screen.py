"""What a stream can show, by the terminal that it is and the environment."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.runtime import screen
from screens import read_until, rendered, resize

VARIABLES = ("CI", "TERM", "NO_COLOR", "LC_ALL", "LC_CTYPE", "LANG")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A stream to a pseudo-terminal, and the descriptor of its other end."""
    ours, its = pty.openpty()
    with open(its, "w", encoding="utf-8") as stream:
        yield stream, ours
    os.close(ours)


@pytest.mark.parametrize(
    ("environment", "watched", "codes", "bold"),
    [
        ({}, True, True, True),
        ({"NO_COLOR": "1"}, True, True, False),
        ({"NO_COLOR": ""}, True, True, True),
        ({"TERM": "dumb"}, True, False, False),
        ({"TERM": ""}, True, False, False),
        ({"CI": "true"}, False, False, False),
        ({"CI": "1"}, False, False, False),
        ({"CI": "false"}, True, True, True),
        ({"CI": ""}, True, True, True),
    ],
)
def test_the_environment_says_what_a_terminal_takes(
    terminal: tuple[io.TextIOWrapper, int],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    watched: bool,
    codes: bool,
    bold: bool,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream, _ = terminal
    found = (screen.is_watched(stream), screen.takes_codes(stream), screen.takes_bold(stream))
    assert found == (watched, codes, bold)


def test_a_terminal_without_a_name_takes_no_codes(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TERM")
    assert not screen.takes_codes(terminal[0])


def test_a_file_a_pipe_and_text_in_memory_are_no_terminals(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    with open(writes, "w") as piped, open(tmp_path / "out.txt", "w") as file:
        for stream in (piped, file, io.StringIO()):
            assert not screen.is_watched(stream)
            assert not screen.takes_codes(stream)
            assert screen.columns(stream) == 80
        assert [screen.is_pipe(stream) for stream in (piped, file, io.StringIO())] == [
            True, False, False,
        ]  # fmt: skip
    assert os.read(reads, 10) == b""
    os.close(reads)
    assert (tmp_path / "out.txt").read_text() == ""


def test_the_columns_are_those_of_this_moment(terminal: tuple[io.TextIOWrapper, int]) -> None:
    stream, ours = terminal
    for columns, wanted in ((100, 100), (20, 20), (0, 80)):
        resize(ours, columns)
        assert screen.columns(stream) == wanted


def test_the_bar_is_on_stderr_but_not_beside_a_program_that_reads_stdout(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown, _ = terminal
    reads, writes = os.pipe()
    with open(writes, "w") as piped, open(tmp_path / "out.txt", "w") as file:
        for stdout, stderr, wanted in (
            (shown, shown, shown),
            (shown, file, shown),
            (shown, piped, shown),
            (file, shown, shown),
            (piped, shown, None),
            (file, file, None),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stdout)
                patch.setattr(sys, "stderr", stderr)
                found = screen.stream_of_the_bar()
            assert found is wanted
    os.close(reads)


def test_cleaning_removes_a_bar_and_ends_bold(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, ours = terminal
    stream.write(f"{screen.BOLD}a line\n3/10 ###  loss")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    screen.clean()
    shown = rendered(read_until(ours, screen.NORMAL), 80)
    assert shown.lines == ["a line"]
    assert not shown.ends_bold


def test_where_nothing_may_be_bold_no_bold_text_is_ended(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, ours = terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    screen.clean()
    stream.write("end")
    stream.flush()
    assert read_until(ours, "end") == f"{screen.CLEAR_LINE}end"


def test_what_is_told_at_once_takes_the_place_of_the_bar(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream, ours = terminal
    stream.write("3/10 ###  loss^C")
    stream.flush()
    with open(tmp_path / "err.txt", "w") as file:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", file)
        screen.tell_at_once("Stopping")
        monkeypatch.setattr(sys, "stdout", file)
        screen.tell_at_once("Stopping, too")
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        screen.tell_at_once("nobody sees this")
    assert rendered(read_until(ours, "Stopping\r\n"), 80).lines == ["Stopping"]
    assert (tmp_path / "err.txt").read_text() == "Stopping, too\n"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C.UTF-8"}, True),
        ({"LANG": "C"}, False),
        ({}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),  # Python's own doing
        ({"LANG": "C", "LC_CTYPE": "de_DE.UTF-8"}, True),
        ({"LANG": "en_US.UTF-8", "LC_CTYPE": "C"}, False),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "C", "LC_ALL": "C.UTF-8"}, True),
    ],
)
def test_the_locale_says_whether_the_bar_may_be_unicode(
    terminal: tuple[io.TextIOWrapper, int],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    wanted: bool,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert screen.takes_unicode(terminal[0]) == wanted


def test_an_encoding_without_blocks_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "de_DE.ISO-8859-1")
    assert not screen.takes_unicode(io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1"))
