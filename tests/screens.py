"""Pseudo-terminals: run a command in one, and render what it wrote as people see it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_TOKEN = re.compile(r"\033\[([?\d;]*)([A-Za-z])|[\r\n\b]|[^\033\r\n\b]+", re.DOTALL)


class Screen(NamedTuple):
    """What a terminal shows. lines: without spaces at their ends, and without empty last ones."""

    lines: list[str]
    bold: list[str]  # the lines that are bold from their first character on
    ends_bold: bool  # whether text that follows would be bold
    column: int  # of the cursor at the end


def rendered(text: str, columns: int) -> Screen:
    """Interpret what was written to a terminal of so many columns, all rows kept.

    It knows carriage return, line feed, backspace, "clear to the end of the line", cursor up and
    down, and bold. An AssertionError names any other escape code.
    """
    rows: list[list[str]] = [[]]
    first_is_bold: dict[int, bool] = {}
    row = column = 0
    bold = False
    end = 0
    for token in _TOKEN.finditer(text):
        assert token.start() == end, f"not understood: {text[end : token.start() + 9]!r}"
        end, whole = token.end(), token[0]
        if token[2]:
            number = int(token[1] or 0) if token[1].isdigit() or not token[1] else -1
            if token[2] == "m":
                assert number in (0, 1), f"another colour or style: {whole!r}"
                bold = number == 1
            elif token[2] == "K" and number == 0:
                del rows[row][column:]
            elif token[2] in "AB":
                row = max(0, row + (number or 1) * (-1 if token[2] == "A" else 1))
            else:
                raise AssertionError(f"another escape code: {whole!r}")
        elif whole == "\r":
            column = 0
        elif whole == "\b":
            column = max(0, column - 1)
        elif whole == "\n":
            row += 1
        else:
            for character in whole:
                if column == columns:
                    row, column = row + 1, 0
                rows.extend([] for _ in range(row + 1 - len(rows)))
                rows[row].extend(" " * (column + 1 - len(rows[row])))
                rows[row][column] = character
                if column == 0:
                    first_is_bold[row] = bold
                column += 1
        rows.extend([] for _ in range(row + 1 - len(rows)))
    assert end == len(text), f"not understood: {text[end:]!r}"
    lines = ["".join(cells).rstrip() for cells in rows]
    while lines and not lines[-1]:
        lines.pop()
    marked = [line for at, line in enumerate(lines) if line and first_is_bold.get(at)]
    return Screen(lines, marked, bold, column)


def resize(descriptor: int, columns: int) -> None:
    """Give a pseudo-terminal so many columns, as when its window changes."""
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def read_until(ours: int, end: str, seconds: float = 60.0) -> str:
    """What is written to a pseudo-terminal up to that end: a terminal may hand it over in parts."""
    text = b""
    while not text.endswith(end.encode()):
        ready, _, _ = select.select([ours], [], [], seconds)
        assert ready, f"{seconds:g} s without {end!r} after {text!r}"
        text += os.read(ours, 65536)
    return text.decode()


class Written(NamedTuple):
    """What a command wrote to its terminal, and its exit code."""

    text: str
    code: int


def in_a_terminal(
    command: Sequence[object],
    cwd: Path,
    columns: int,
    environment: Mapping[str, str | None],
    seen: Callable[[str, int, subprocess.Popen], None] = lambda text, descriptor, process: None,
    **streams: object,
) -> Written:
    """Run a command with a pseudo-terminal as stdin, stdout and stderr, and with its own session.

    Args:
        environment: variables beside those of this process; None removes one.
        seen: called with all text so far, the terminal's descriptor and the process, after each
            part of the text.
        streams: stdout or stderr, where that is no terminal.
    """
    ours, its = pty.openpty()
    resize(its, columns)
    merged = {**os.environ, "TERM": "xterm", "LANG": "C.UTF-8", "CI": None, "NO_COLOR": None}
    merged |= {"LC_ALL": None, "LC_CTYPE": None, **environment}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in merged.items() if value is not None},
        start_new_session=True,
        # The terminal controls the session, so that it sends Ctrl-C to the processes.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        **{"stdin": its, "stdout": its, "stderr": its, **streams},
    )
    os.close(its)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux ends a terminal so
            break
        if not part:
            break
        text += part
        seen(text.decode(errors="replace"), ours, process)
    os.close(ours)
    return Written(text.decode(), process.wait(timeout=300))
