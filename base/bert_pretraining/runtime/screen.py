"""What a stream can show: whether people watch it, and with which escape codes."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from typing import TextIO

BOLD, NORMAL = "\033[1m", "\033[0m"
CLEAR_LINE = "\r\033[K"
USUAL_COLUMNS = 80
_C_LOCALES = ("", "C", "POSIX")
_COERCED = ("C.UTF-8", "C.utf8", "UTF-8")  # what Python makes of LC_CTYPE in a C locale


def is_watched(stream: TextIO) -> bool:
    """Whether people look at the stream: it is a terminal, and not that of a CI's job."""
    return stream.isatty() and os.environ.get("CI", "").lower() in ("", "0", "false")


def takes_codes(stream: TextIO) -> bool:
    """Whether people look at it, and it is no terminal without escape codes (TERM=dumb)."""
    return is_watched(stream) and os.environ.get("TERM", "dumb") not in ("", "dumb")


def takes_bold(stream: TextIO) -> bool:
    """Whether text may be bold there: NO_COLOR forbids it."""
    return takes_codes(stream) and not os.environ.get("NO_COLOR")


def is_pipe(stream: TextIO) -> bool:
    """Whether another program reads it, such as tee, which may write to the same terminal."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (io.UnsupportedOperation, OSError):
        return False


def columns(stream: TextIO) -> int:
    """The terminal's columns at this moment; USUAL_COLUMNS where it does not tell."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (io.UnsupportedOperation, OSError):
        return USUAL_COLUMNS


def takes_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding has all characters, by the user's locale.

    In a C locale Python itself writes UTF-8 all the same, and sets LC_CTYPE to it, so that the
    stream's encoding alone does not tell.
    """
    get = os.environ.get
    if not (stream.encoding or "").lower().replace("-", "").startswith("utf"):
        return False
    if get("LC_ALL"):
        return get("LC_ALL") not in _C_LOCALES
    if get("LC_CTYPE") and get("LC_CTYPE") not in _COERCED:
        return get("LC_CTYPE") not in _C_LOCALES
    return get("LANG", "") not in _C_LOCALES


def stream_of_the_bar() -> TextIO | None:
    """stderr if it is a terminal, else stdout if that is one.

    No bar where a program reads stdout: tee would write its lines into the bar.
    """
    if takes_codes(sys.stderr) and not is_pipe(sys.stdout):
        return sys.stderr
    return sys.stdout if takes_codes(sys.stdout) else None


def clean() -> None:
    """Remove a bar that another process has left in the last line, and end bold text."""
    stream = stream_of_the_bar()
    if stream is not None:
        stream.write(CLEAR_LINE + (NORMAL if takes_bold(stream) else ""))
        stream.flush()


def tell_at_once(text: str) -> None:
    """A line for people, from a signal handler: on stderr, or where the bar is.

    It goes past Python's buffers, whose lock the code that was interrupted may hold. It takes the
    place of a bar, which is drawn below it at its next change.
    """
    stream = stream_of_the_bar()
    clear = "" if stream is None else CLEAR_LINE
    # Who has no stream any more, or does not read it, is told nothing.
    with contextlib.suppress(OSError):
        os.write((stream or sys.stderr).fileno(), f"{clear}{text}\n".encode())
